"""A real guest that uses the disk, through queues in two I/O threads."""

import contextlib
import glob
import os
import socket
import subprocess
import sys
import threading

from .daemon import Daemon, Failure
from .model import Wrong

FIRMWARE = ('/usr/share/seabios', '/usr/share/qemu')
HERE = os.path.join(os.path.dirname(os.path.realpath(__file__)), 'guest')


def firmware():
    """The options that say where it is."""
    return [word for path in FIRMWARE if os.path.isdir(path) for word in ('-L', path)]


class Image:
    """What the guest boots from, and the checker, made once."""

    def __init__(self, root, directory):
        tree = subprocess.run([os.path.join(root, 'ci', 'kernel')], check=True, stdout=subprocess.PIPE,
                              text=True).stdout.strip() + '/tree'
        kernels = glob.glob(os.path.join(tree, 'boot', 'vmlinuz-*'))
        if not kernels:
            raise Failure(f'no kernel in {tree}/boot')
        self.kernel = kernels[0]
        self.checker = os.path.join(directory, 'checker')
        subprocess.run([os.environ.get('CC', 'gcc'), '-O2', '-Wall', '-Werror', '-static', '-pthread', '-o', self.checker,
                        os.path.join(HERE, 'checker.c')], check=True)
        self.initrd = os.path.join(directory, 'initrd.gz')
        subprocess.run([os.path.join(root, 'demo', 'make-initramfs.py'), self.initrd, '--package', tree,
                        '--busybox', '/bin/busybox', '--init', os.path.join(HERE, 'init'), '--module', 'virtio_pci',
                        '--module', 'virtio_blk', '--module', 'virtio_scsi', '--module', 'sd_mod',
                        '--program', f'bin/checker={self.checker}'], check=True)

    def digest(self, path):
        """What the checker says of a raw image."""
        return subprocess.run([self.checker, 'sum', path], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


class Machine(Daemon):
    """A running qemu-system with two CPUs and two I/O threads; the guest waits."""

    def __init__(self, program, directory, log, image, kernel_line, others=()):
        console = os.path.join(directory, 'console.sock')
        super().__init__(program, directory, log, monitor=('-mon', 'chardev=qmp,mode=control'), arguments=[
            *firmware(), '-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot', '-S', '-machine', 'pc',
            '-accel', 'tcg,thread=multi', '-m', '512', '-smp', '2', '-kernel', image.kernel, '-initrd', image.initrd,
            '-append', f'console=ttyS0 quiet loglevel=3 panic=-1 {kernel_line}',
            '-object', 'iothread,id=thread0', '-object', 'iothread,id=thread1',
            '-chardev', f'socket,id=console,path={console},server=on,wait=off', '-serial', 'chardev:console', *others])
        self.console = socket.socket(socket.AF_UNIX)
        self.console.connect(console)

    def plug(self, node, scsi):
        """The disk, a SCSI one or not, with a queue for each CPU."""
        threads = {'iothread-vq-mapping': [{'iothread': 'thread0'}, {'iothread': 'thread1'}]}
        if scsi:
            self.command('device_add', driver='virtio-scsi-pci', id='bus', **threads)
            self.command('device_add', driver='scsi-hd', id='disk', bus='bus.0', drive=node)
        else:
            self.command('device_add', driver='virtio-blk-pci', id='disk', drive=node, **threads)
        self.command('cont')

    @contextlib.contextmanager
    def starved(self):
        """The first I/O thread only gets what others leave of the CPUs, and they leave nothing."""
        thread, = (thread['thread-id'] for thread in self.command('query-iothreads') if thread['id'] == 'thread0')
        with contextlib.ExitStack() as stack:
            for _ in range(os.cpu_count()):
                busy = stack.enter_context(subprocess.Popen([sys.executable, '-c', 'while True: pass']))
                stack.callback(busy.kill)
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
            yield
        # Not everybody may undo it. The CPUs are free again in any case.
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


class Guest:
    """What the checker in the guest does and says."""

    def __init__(self, machine):
        self.machine = machine
        self.said = threading.Condition()
        self.operations = 0
        self.digests = []
        self.failure = None
        self.content = None
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()

    def listen(self):
        """The thread that reads the console."""
        try:
            with self.machine.console.makefile(encoding='utf-8', errors='replace') as lines:
                for line in lines:
                    # The console may have put something in front of it.
                    _, found, text = line.partition('@@ ')
                    if found:
                        self.hear(*text.strip().partition(' ')[::2])
                    elif 'Kernel panic' in line:
                        self.hear('fail', line.strip())
        except OSError:
            pass
        self.hear('fail', 'the console has ended')

    def hear(self, kind, text):
        """A line of the checker."""
        with self.said:
            if kind == 'done':
                self.operations = int(text)
            elif kind in ('begin', 'rest'):
                self.digests.append(text)
            elif not self.failure:
                self.failure = Wrong(f'the guest says: {kind} {text}')
            self.said.notify_all()

    def tell(self, command):
        """A command for the checker."""
        self.machine.console.sendall(command + b'\n')

    def wait(self, condition, what, timeout=900):
        """Waits until something holds."""
        with self.said:
            done = self.said.wait_for(lambda: self.failure or condition(), timeout)
        self.judge()
        if not done:
            raise Wrong(f'{what} within {timeout} s')

    def judge(self):
        """Raises what is wrong."""
        if self.failure:
            raise self.failure

    def more(self, count):
        """Waits until that many more operations are done."""
        goal = self.operations + count
        self.wait(lambda: self.operations >= goal, f'no {count} operations in the guest')

    def begin(self):
        """Waits until the guest is up and has read the disk; returns the digest."""
        self.wait(lambda: self.digests, 'the guest is not up')
        return self.digests[0]

    def rest(self):
        """Brings the checker to rest, which reads and checks all of the disk."""
        known = len(self.digests)
        self.tell(b'p')
        self.wait(lambda: len(self.digests) > known, 'the guest does not come to rest')
        self.content = self.digests[-1]

    @contextlib.contextmanager
    def paused(self):
        """Nothing is read or written meanwhile; `content` is the digest."""
        self.rest()
        yield
        self.tell(b'r')

    def verify(self):
        """All of the disk, while nobody else uses it."""
        with self.paused():
            pass

    def stop(self):
        """Nothing is read or written from now on; returns how often it did what."""
        self.rest()
        return {'operation': self.operations}
