"""What our own iotests share.

They run under QEMU's check with -qcow2, so IMGFMT, and what iotests.py does by
default, is QEMU's own driver. The driver under test is DRIVER: rqcow2, or
qcow2 when a test is to show that it expects no more than QEMU's driver does.
"""

import contextlib
import hashlib
import io
import os
import re
import subprocess

import iotests
import qcow2_format

DRIVER = os.environ.get('RQCOW2_DRIVER', 'rqcow2')
TAKEOVER = 'QEMU_RQCOW2_TAKEOVER'
PROGRAMS = {
    'qemu-img': os.environ['QEMU_IMG_PROG'],
    'qemu-io': os.environ['QEMU_IO_PROG'],
    'qemu-nbd': os.environ['QEMU_NBD_PROG'],
    'qemu-storage-daemon': os.environ['QSD_PROG'],
    'qemu-system': os.environ['QEMU_PROG'],
}
KIB = 1024
MIB = 1024 * KIB


def only_rust():
    """Skips a test that makes no sense without the Rust driver."""
    if DRIVER == 'qcow2':
        iotests.notrun('about the Rust driver only')


@contextlib.contextmanager
def takeover():
    """Programs started meanwhile serve qcow2 with the Rust driver."""
    os.environ[TAKEOVER] = '1'
    try:
        yield
    finally:
        del os.environ[TAKEOVER]


def run(program, *args):
    """Runs one of QEMU's programs; returns (status, output), no judgement."""
    done = subprocess.run([PROGRAMS[program], *map(str, args)], stdin=subprocess.DEVNULL, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    return done.returncode, done.stdout.decode(errors='replace')


def img(*args):
    """qemu-img, which has to succeed; returns its output."""
    status, output = run('qemu-img', *args)
    assert status == 0, f'qemu-img {" ".join(map(str, args))}: {output}'
    return output


def qio(driver, path, *commands, options=(), read_only=False):
    """qemu-io commands, which have to succeed; returns the output."""
    status, output = run('qemu-io', *(['-r'] if read_only else []), *interleave('-c', commands), '--image-opts',
                         ','.join([f'driver={driver}', f'file.filename={path}', *options]))
    bad = re.search(r'fail|error|not allowed|invalid|Pattern', output, re.I)
    assert status == 0 and not bad, f'qemu-io {commands} {path}: {output}'
    return output


def neutral(text):
    """Output without the test's directory, with the driver's name as the format's."""
    text = text.replace(iotests.test_dir, 'TEST_DIR')
    return text if DRIVER == 'qcow2' else text.replace(DRIVER, 'qcow2')


def interleave(option, values):
    """The values, each after the option."""
    return [word for value in values for word in (option, value)]


def check(path, driver='qcow2'):
    """qemu-img check has nothing to say against an image."""
    status, output = run('qemu-img', 'check', '-f', driver, path)
    assert status == 0, f'{path}: {output}'


def sha(path):
    """A digest of a file, however large its holes are."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            while at < end:
                data = os.pread(file.fileno(), min(MIB, end - at), at)
                if data.strip(b'\0'):
                    # Zeroes in data and holes are the same.
                    digest.update(b'%d:' % at + data.rstrip(b'\0'))
                at += len(data)
    digest.update(b'%d' % size)
    return digest.hexdigest()


def content(path, driver):
    """A digest of what a disk contains."""
    raw = path + '.raw'
    img('convert', '-f', driver, '-O', 'raw', path, raw)
    digest = sha(raw)
    os.remove(raw)
    return digest


def header(path):
    """The header, as the tests' qcow2.py reads it."""
    with open(path, 'rb') as file:
        return qcow2_format.QcowHeader(file)


def dump(path):
    """What qcow2.py dump-header prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        with open(path, 'rb') as file:
            parsed = qcow2_format.QcowHeader(file)
            parsed.dump()
            print()
            parsed.dump_extensions()
    return out.getvalue()


def backing_format(path):
    """The backing format that an image's header gives."""
    for extension in header(path).extensions:
        if extension.magic == 0xe2792aca:
            return extension.data[:extension.length].decode()
    return None


def assert_stock(path):
    """An image that any QEMU can open: nothing in its header says rqcow2."""
    assert_header(path)
    check(path)


def assert_header(path):
    """Nothing in the header says rqcow2, but the paths of these tests."""
    with open(path, 'rb') as file:
        start = file.read(1 << header(path).cluster_bits)
    assert b'rqcow2' not in start.replace(iotests.test_dir.encode(), b''), dump(path)


# A virtio-blk device with the name disk, as qemu-io finds it.
DEVICE = '/machine/peripheral/disk/virtio-backend'


class Machine(iotests.VM):
    """A virtual machine whose qemu-io commands must not have failed when it ends."""

    def shutdown(self, *args, **kwargs):
        super().shutdown(*args, **kwargs)
        # The monitor says nothing of a command that was carried out: what it prints, a failure of a request or of a
        # comparison among it, is the output of the program.
        log = self.get_log() or ''
        bad = re.search(r'panicked|Pattern verification failed|(read|write|discard|flush)\w* failed', log)
        assert not bad, log


class Case(iotests.QMPTestCase):
    """A test with files of its own and, if it wants one, a virtual machine."""

    def setUp(self):
        self.vm = None
        self.paths = []

    def tearDown(self):
        if self.vm:
            self.vm.shutdown()
        for path in self.paths:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)

    def path(self, name):
        """The path of a file that goes when the test ends."""
        path = os.path.join(iotests.test_dir, f'{os.getpid()}-{name}')
        if path not in self.paths:
            self.paths.append(path)
        return path

    def image(self, name, size=None, backing=None, driver=None, options=None, backing_driver='qcow2'):
        """Makes an image; returns its path."""
        path = self.path(name)
        words = ['create', '-q', '-f', driver or DRIVER]
        if options:
            words += ['-o', options]
        if backing:
            words += ['-b', backing, '-F', backing_driver]
        img(*words, path, *([size] if size else []))
        return path

    def launch(self, *args):
        """Starts a virtual machine."""
        self.vm = Machine()
        if args:
            self.vm.add_args(*args)
        self.vm.launch()
        return self.vm

    def hmp_io(self, node, *commands, qdev=False):
        """qemu-io commands on a node, or through a device, of the running machine."""
        for command in commands:
            # What is printed here are errors of the monitor alone; see Machine.
            self.assertEqual(self.vm.hmp_qemu_io(node, command, qdev=qdev), {'return': ''})

    def drivers(self):
        """The driver of every node, by node name."""
        nodes = self.vm.cmd('query-named-block-nodes', flat=True)
        return {node['node-name']: node['drv'] for node in nodes}

    def backing_drivers(self):
        """The drivers of all format nodes, less the protocols."""
        return sorted(drv for drv in self.drivers().values() if drv not in ('file', 'null-co'))

    def finish_job(self, job, complete=False):
        """Waits until a job is through; it must not fail."""
        while True:
            events = [(name, None) for name in ('BLOCK_JOB_COMPLETED', 'BLOCK_JOB_READY', 'BLOCK_JOB_ERROR')]
            event = self.vm.events_wait(events, timeout=60.0)
            self.assertEqual(event['data']['device'], job)
            if event['event'] == 'BLOCK_JOB_READY':
                self.assertTrue(complete, event)
                self.vm.cmd('block-job-complete', device=job)
                continue
            self.assertEqual(event['event'], 'BLOCK_JOB_COMPLETED')
            self.assertNotIn('error', event['data'], event)
            return
