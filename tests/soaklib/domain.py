"""A guest that libvirt runs, and what libvirt does to the chain of its disk."""

import json
import os
import re
import socket
import threading
import time

import libvirt
import libvirt_qemu

from .daemon import Failure
from .machine import Guest, firmware
from .model import Wrong

# libvirt describes chains of 200 layers at most. Its JSON parser since version 11 takes no more than this, as QEMU's
# answers to query-block have the layers one inside the other.
MOST_LAYERS = 190 if libvirt.getVersion() < 11_000_000 else 24
DISK = 'vda'
CONFIGURATION = '''stdio_handler = "file"
user = "+{user}"
group = "+{group}"
security_driver = "none"
cgroup_controllers = []
dynamic_ownership = 0
remember_owner = 0
namespaces = []
'''
DOMAIN = '''
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>disk</name><memory unit='MiB'>512</memory><vcpu>2</vcpu><iothreads>2</iothreads>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>
    <cmdline>console=ttyS0 quiet loglevel=3 panic=-1 soak.seed={seed} soak.threads={threads}</cmdline>
  </os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>{program}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap' iothread='1'/>
      <source file='{top}'/><target dev='vda' bus='virtio'/>
    </disk>
    <serial type='unix'><source mode='bind' path='{console}'/></serial>
    <controller type='usb' model='none'/><memballoon model='none'/>
  </devices>
  <qemu:commandline>
    <qemu:env name='QEMU_RQCOW2_TAKEOVER' value='1'/>
    {firmware}
  </qemu:commandline>
</domain>
'''


class Unusable(Exception):
    """libvirt does not start on this machine."""


class Libvirt:
    """libvirt's driver for QEMU in this process, with all that it keeps below a directory."""

    def __init__(self, directory):
        os.makedirs(os.path.join(directory, 'etc'))
        with open(os.path.join(directory, 'etc', 'qemu.conf'), 'w', encoding='utf-8') as file:
            file.write(CONFIGURATION.format(user=os.getuid(), group=os.getgid()))
        self.log = os.path.join(directory, 'log', 'qemu', 'disk.log')
        # What fails is an exception anyway.
        libvirt.registerErrorHandler(lambda _, error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        # So that the loop looks whether it is to end.
        libvirt.virEventAddTimeout(100, lambda timer, _: None, None)
        self.running = True
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()
        self.connection = None
        try:
            self.connection = libvirt.open(f'qemu:///embed?root={directory}')
        except libvirt.libvirtError as error:
            self.close()
            raise Unusable(error) from None

    def loop(self):
        """The thread of libvirt's events."""
        while self.running:
            libvirt.virEventRunDefaultImpl()

    def close(self):
        """Ends it."""
        if self.connection:
            self.connection.close()
        self.running = False
        self.thread.join()


class Chain:
    """A domain with one disk: `layers` are the files from the base to the top."""

    def __init__(self, soak, connection, layers):
        self.soak = soak
        self.rng = soak.rng
        self.connection = connection
        self.layers = layers
        self.console = None
        self.serial = 0
        self.path = os.path.join(soak.directory, 'console.sock')
        self.domain = connection.defineXML(DOMAIN.format(
            kernel=soak.image.kernel, initrd=soak.image.initrd, seed=self.rng.getrandbits(31),
            threads=soak.args.threads, top=layers[-1], console=self.path,
            program=os.path.join(soak.args.bin, 'qemu-system-x86_64'),
            firmware=''.join(f"<qemu:arg value='{word}'/>" for word in firmware())))

    def start(self):
        """Switches it on; returns the digest of what is on the disk."""
        self.domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
        self.connect()
        return self.guest.begin()

    def connect(self):
        """Listens to the guest from now on, and lets it go on."""
        self.console = socket.socket(socket.AF_UNIX)
        self.console.connect(self.path)
        self.guest = Guest(self)
        self.domain.resume()

    def name(self, kind):
        """The path of a new file."""
        self.serial += 1
        return os.path.join(self.soak.directory, f'{kind}{self.serial}.qcow2')

    def known(self):
        """The layers that libvirt knows of, from the base to the top."""
        text = re.sub('<mirror.*?</mirror>', '', self.domain.XMLDesc(), flags=re.DOTALL)
        return re.findall("<source file='([^']*)'", text)[::-1]

    def now(self, layers):
        """The chain is that; the files of other layers are let go."""
        known = self.known()
        # While it is off, libvirt knows what it has added to the chain, and looks for the rest when it is switched on.
        if known != (layers if self.domain.isActive() else layers[-len(known):]):
            raise Failure(f'{len(layers)} layers should end with {layers[-3:]}, libvirt has {len(known)}: {known[-3:]}')
        for path in set(self.layers) - set(layers):
            os.unlink(path)
        self.layers = layers

    def until(self, condition, what):
        """Waits for something while the guest goes on."""
        deadline = time.monotonic() + 300
        while not condition():
            self.guest.judge()
            if time.monotonic() > deadline:
                raise Failure(f'{what} takes longer than 300 s')
            time.sleep(0.02)

    def ended(self):
        """Waits for a job of the disk."""
        self.until(lambda: not self.domain.blockJobInfo(DISK), 'the job')

    def ready(self):
        """Waits until a job could end."""
        self.until(lambda: "ready='yes'" in self.domain.XMLDesc(), 'the mirror')
        self.guest.more(20)

    def pivot(self):
        """The disk uses the target of the job that is ready."""
        self.domain.blockJobAbort(DISK, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)

    def overlay(self, kind, memory=''):
        """A snapshot in a file, be the domain on or off."""
        if len(self.layers) >= MOST_LAYERS:
            return
        path = self.name(kind)
        how = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
        self.domain.snapshotCreateXML(
            f"<domainsnapshot>{memory}<disks><disk name='{DISK}' snapshot='external'><source file='{path}'/></disk>"
            '</disks></domainsnapshot>', how | (0 if memory else libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY))
        self.now(self.layers + [path])

    # What happens to the chain.

    def snapshot(self):
        """Of the disk alone."""
        self.overlay('s')
        self.guest.more(5)

    def memory(self):
        """A snapshot with the memory of the guest, which goes on after it."""
        path = os.path.join(self.soak.directory, 'memory')
        self.overlay('m', f"<memory snapshot='external' file='{path}'/>")
        self.guest.more(5)
        if os.path.exists(path):
            os.unlink(path)

    def stream(self):
        """All layers go to the top, or those above one of them."""
        keep = self.rng.randrange(len(self.layers))
        if keep == 0:
            self.domain.blockPull(DISK)
        else:
            self.domain.blockRebase(DISK, self.layers[keep - 1])
        self.guest.more(20)
        self.ended()
        self.now(self.layers[:keep] + self.layers[-1:])

    def commit(self):
        """Layers in the middle go to the one below them."""
        if len(self.layers) < 3:
            return
        base = self.rng.randrange(len(self.layers) - 2)
        top = min(base + self.rng.randint(1, max(1, len(self.layers) // 8)), len(self.layers) - 2)
        self.domain.blockCommit(DISK, self.layers[base], self.layers[top])
        self.guest.more(20)
        self.ended()
        self.now(self.layers[:base + 1] + self.layers[top + 1:])

    def active(self):
        """The uppermost layers go to the one below them, or would have if it were not called off."""
        if len(self.layers) < 2:
            return
        base = len(self.layers) - 1 - self.rng.randint(1, max(1, len(self.layers) // 8))
        self.domain.blockCommit(DISK, self.layers[base], None, flags=libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        self.ready()
        if self.rng.random() < 0.25:
            self.domain.blockJobAbort(DISK)
            self.now(self.layers)
        else:
            self.pivot()
            self.now(self.layers[:base + 1])

    def target(self, how):
        """A copy of the top, or of all, that is ready; returns the path."""
        path = self.name('c')
        self.domain.blockCopy(DISK, f"<disk type='file'><source file='{path}'/><driver type='qcow2'/></disk>",
                              flags=how | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB)
        self.ready()
        return path

    def mirror(self):
        """The top goes to another image on the same layers."""
        if len(self.layers) < 2:
            return
        path = self.target(libvirt.VIR_DOMAIN_BLOCK_COPY_SHALLOW)
        self.pivot()
        self.now(self.layers[:-1] + [path])

    def copy(self):
        """The whole disk goes to an image of its own, which has to be what the guest has at the end."""
        path = self.target(0)
        with self.guest.paused():
            self.domain.blockJobAbort(DISK)
            content = self.guest.content
        self.ended()
        self.verify(path, content)

    def verify(self, path, content):
        """A copy of the disk has to have this content. It is not needed any more."""
        self.soak.compare(self.soak.args.stock, 'qcow2', path, content)
        os.unlink(path)

    def backup(self):
        """A full backup, a snapshot, and an incremental one: both have to be what the guest had when they began."""
        base, base_content = self.back_up('full')
        self.overlay('s')
        if self.rng.random() < 0.5:
            self.active()
        self.guest.more(20)
        path, content = self.back_up('incremental', '<incremental>full</incremental>')
        self.soak.run(os.path.join(self.soak.args.stock, 'qemu-img'), 'rebase', '-u', '-f', 'qcow2', '-F', 'qcow2',
                      '-b', base, path)
        self.verify(path, content)
        self.verify(base, base_content)
        for name in ('incremental', 'full'):
            self.domain.checkpointLookupByName(name).delete()

    def begin_backup(self, text, checkpoint=None):
        """Begins one; returns what is on the disk at that moment."""
        with self.guest.paused():
            self.domain.backupBegin(text, checkpoint)
            return self.guest.content

    def backed_up(self):
        """Waits for the end of a backup."""
        self.until(lambda: self.domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE, 'the backup')

    def back_up(self, name, incremental=''):
        """One backup with a checkpoint; returns the path and the content."""
        path = self.name('b')
        content = self.begin_backup(
            f"<domainbackup>{incremental}<disks><disk name='{DISK}' type='file'><target file='{path}'/>"
            "<driver type='qcow2'/></disk></disks></domainbackup>",
            f"<domaincheckpoint><name>{name}</name><disks><disk name='{DISK}' checkpoint='bitmap'/></disks>"
            '</domaincheckpoint>')
        self.backed_up()
        done = self.domain.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED)
        if not done.get('success'):
            raise Failure(f'the backup ends with {done}')
        return path, content

    def pull(self):
        """A backup that is read from outside."""
        sock = os.path.join(self.soak.directory, 'backup.sock')
        scratch = self.name('scratch')
        content = self.begin_backup(
            f"<domainbackup mode='pull'><server transport='unix' socket='{sock}'/><disks><disk name='{DISK}' "
            f"type='file' exportname='{DISK}'><scratch file='{scratch}'/></disk></disks></domainbackup>")
        self.guest.more(20)
        path = self.name('p')
        program = os.path.join(self.soak.args.stock, 'qemu-img')
        self.soak.run(program, 'convert', '-f', 'raw', '-O', 'qcow2', f'nbd+unix:///{DISK}?socket={sock}', path)
        self.domain.abortJob()
        self.backed_up()
        self.verify(path, content)

    def save(self):
        """The guest is saved and restored."""
        path = os.path.join(self.soak.directory, 'saved')
        self.domain.save(path)
        self.connection.restoreFlags(path, flags=libvirt.VIR_DOMAIN_SAVE_PAUSED)
        os.unlink(path)
        self.connect()
        self.guest.more(20)
        self.now(self.layers)

    def internal(self):
        """A snapshot inside the top with the memory of the guest, who mostly goes back to it."""
        self.domain.snapshotCreateXML('<domainsnapshot><name>then</name></domainsnapshot>')
        self.guest.more(50)
        then = self.domain.snapshotLookupByName('then')
        if self.rng.random() < 0.7:
            # In a new process.
            self.domain.revertToSnapshot(then, libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_FORCE
                                         | libvirt.VIR_DOMAIN_SNAPSHOT_REVERT_PAUSED)
            self.connect()
        self.guest.verify()
        then.delete()

    def cycle(self):
        """Off, a snapshot that qemu-img makes, and on again."""
        content = self.off()
        self.overlay('o')
        if self.start() != content:
            raise Wrong('the guest sees another disk after it was off')
        self.now(self.layers)

    def off(self):
        """Switches it off; the images are sound and have what the guest saw, which is returned."""
        self.guest.rest()
        content = self.guest.content
        self.domain.destroy()
        self.soak.sound(self.layers)
        self.soak.compare(self.soak.args.stock, 'qcow2', self.layers[-1], content)
        return content

    def statistics(self):
        """libvirt sees all layers, and our driver serves them."""
        ((_, numbers),) = self.connection.domainListGetStats(
            [self.domain], libvirt.VIR_DOMAIN_STATS_BLOCK, libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_BACKING)
        if numbers['block.count'] != len(self.layers):
            raise Failure(f'libvirt counts {numbers["block.count"]} of {len(self.layers)} layers')
        reply = libvirt_qemu.qemuMonitorCommand(
            self.domain, '{"execute": "query-blockstats", "arguments": {"query-nodes": true}}', 0)
        served = [node for node in json.loads(reply)['return']
                  if node.get('driver-specific', {}).get('driver') == 'rqcow2']
        if len(served) != len(self.layers):
            raise Failure(f'{len(served)} of {len(self.layers)} layers have our driver')
