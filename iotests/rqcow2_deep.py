"""Chains of 1000 layers, and a daemon that has one open."""

import os
import random
import resource
import shutil
import subprocess

import iotests
from rqcow2_common import DRIVER, KIB, MIB, PROGRAMS, Case, assert_header, backing_format, check, header, img, only_rust
from rqcow2_live import ROOT
from soaklib import guest, model, nbd
from soaklib.daemon import Daemon

LAYERS = 1000
SIZE = 64 * MIB
CLUSTER = 16 * KIB
FILES = 2 * LAYERS + 500


class DeepCase(Case):
    """A chain, made anew for each test."""

    layers = LAYERS

    def setUp(self):
        super().setUp()
        self.daemon = self.guest = None
        self.serial = 0
        self.rng = random.Random(self.id())
        self.directory = os.path.join(iotests.test_dir, 'deep')
        flat = self.path('flat')
        done = subprocess.run([os.path.join(ROOT, 'tools', 'make-chain.py'), self.directory, '--layers', str(self.layers),
                               '--disk', str(SIZE), '--cluster-size', str(CLUSTER), '--data-per-layer', '32K',
                               '--zeroes-per-layer', '16K', '--place', 'deal', '--flat', flat],
                              check=True, stdout=subprocess.PIPE, text=True)
        self.names = [os.path.join(self.directory, f'l{number}.qcow2') for number in range(self.layers)]
        self.assertEqual(done.stdout.strip(), self.names[-1])
        self.flat = flat

    def tearDown(self):
        if self.daemon:
            self.daemon.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
        super().tearDown()

    # A daemon that has the chain open.

    def open(self):
        """Opens the chain, exports it, starts two threads that use it."""
        self.daemon = Daemon(PROGRAMS['qemu-storage-daemon'], iotests.sock_dir, self.path('log'))
        self.add('top', self.names[-1])
        nodes = {n['file']: n['node-name'] for n in self.query() if n['drv'] == DRIVER}
        self.nodes = [nodes[path] for path in self.names]
        self.sock = os.path.join(iotests.sock_dir, 'deep.sock')
        self.daemon.command('nbd-server-start', addr={'type': 'unix', 'data': {'path': self.sock}}, max_connections=0)
        self.daemon.command('block-export-add', type='nbd', id='disk', name='disk', node_name='top', writable=True,
                            allocation_depth=True)
        with open(self.flat, 'rb') as file:
            disk = model.Disk(file.read())
        self.guest = guest.Guest(disk, lambda: nbd.Client(self.sock, 'disk', 600), CLUSTER,
                                 [random.Random(f'{self.id()} {number}') for number in range(2)])
        self.verify()

    def query(self):
        """All nodes."""
        return self.daemon.command('query-named-block-nodes', flat=True)

    def add(self, name, path, **more):
        """Adds a node."""
        self.daemon.command('blockdev-add', driver=DRIVER, node_name=name, discard='unmap',
                            file={'driver': 'file', 'filename': path, 'discard': 'unmap'}, **more)

    def verify(self):
        """All of the disk, with the threads at rest."""
        with self.guest.paused():
            client = nbd.Client(self.sock, 'disk', 600)
            for at in range(0, SIZE, 4 * MIB):
                self.guest.disk.check(at, 4 * MIB, client.read)
            client.close()

    def job(self, command, complete=False, **arguments):
        """A job with the threads at work."""
        self.daemon.command(command, job_id='job', **arguments)
        self.guest.more(10)
        while not self.daemon.finish('job'):
            self.assertTrue(complete)
            self.guest.more(10)
            self.daemon.command('block-job-complete', device='job')
        self.guest.more(10)

    def dropped(self, low, high):
        """Layers have left the chain: their nodes are gone as well."""
        gone = self.names[low:high]
        for node in self.nodes[low:high][::-1]:
            self.daemon.ask('blockdev-del', node_name=node)
        del self.names[low:high], self.nodes[low:high]
        files = {n['file'] for n in self.query()}
        self.assertEqual([path for path in gone if path in files], [])

    def settle(self, checked):
        """Ends the daemon; some of the images are looked at."""
        self.verify()
        self.guest.stop()
        self.daemon.quit()
        self.daemon = None
        for path in checked:
            check(path)
            assert_header(path)
            if header(path).backing_file_offset:
                self.assertEqual(backing_format(path), 'qcow2')

    def compare(self, path, driver, content):
        """An image has this content."""
        raw = self.path('raw')
        with open(raw, 'wb') as file:
            file.write(content)
        img('compare', '-f', driver, '-F', 'raw', path, raw)


def main(files=FILES):
    """Runs the tests of a file. The other driver would crash."""
    only_rust()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] != resource.RLIM_INFINITY and limits[1] < files:
        iotests.notrun(f'{files} open files needed, the limit is {limits[1]}')
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, limits[0]), limits[1]))
    iotests.main(supported_fmts=['qcow2'], supported_protocols=['file'],
                 unsupported_imgopts=['data_file', 'compat', 'encrypt'])
