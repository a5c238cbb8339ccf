"""A chain on disks whose power fails, and what has to be left of it."""

import bisect
import itertools
import json
import os
import random
import shutil
import struct
import subprocess
import time

from . import nbd
from .daemon import Daemon, Failure
from .disk import SECTOR, Disk, last_flush
from .power_work import OFFLINE, SECRET, Writer, live

KIB, MIB = 1 << 10, 1 << 20
# What a round may have, and the share of those that do.
KINDS = {'internal': 0.3, 'lazy': 0.4, 'external': 0.15, 'raw': 0.1, 'compressed': 0.3, 'encrypted': 0.1,
         'preallocated': 0.2, 'large': 0.07}


class Wrong(Exception):
    """Something was lost."""


class Round:
    """A chain, some seconds of work on it, and moments at which the power may have failed."""

    def __init__(self, args, seed, directory):
        self.args, self.directory = args, directory
        self.rng = rng = random.Random(seed)
        self.clock = itertools.count()
        self.disks, self.layers, self.log = [], [], []
        # Beside those of the images, those of data that are in a file of their own, by the number of the image.
        self.data = {}
        # The numbers of images with encrypted data.
        self.encrypted = set()
        # When the top was which layer, None while it changes.
        self.tops = []
        self.kinds = {kind for kind, share in KINDS.items() if rng.random() < share or kind in args.kinds}
        if self.kinds & {'external', 'raw'}:
            self.kinds -= {'internal'}
        self.cluster = 2 * MIB if 'large' in self.kinds else rng.choice((512, 512, KIB, 4 * KIB, 16 * KIB, 64 * KIB))
        self.size = (4 if self.cluster < 4 * KIB else 8 if self.cluster < MIB else 16) * MIB
        # Of the disks that the images are on, in bytes; nothing of it is taken before it is written to.
        self.room = 16 * self.size
        # A writer has no two requests under way to the same one of these.
        self.part = max(64 * KIB, self.cluster)
        self.extended = self.cluster >= 16 * KIB and rng.random() < 0.5
        self.options = {
            'cluster_size': self.cluster, 'lazy_refcounts': 'on' if 'lazy' in self.kinds else 'off',
            'extended_l2': 'on' if self.extended else 'off',
            # Internal snapshots count up.
            'refcount_bits': rng.choice((16, 64) if 'internal' in self.kinds else (1, 2, 16, 16, 64))}
        self.opened = {'discard': 'unmap', 'discard-no-unref': rng.random() < 0.2,
                       'pass-discard-other': rng.random() < 0.5}
        if rng.random() < 0.5:
            self.opened['l2-cache-size'] = rng.choice((2, 4, 16)) * max(self.cluster, KIB)
            self.opened['l2-cache-entry-size'] = max(512, min(self.cluster, 4 * KIB))
        self.before = b''
        self.changes, self.flushes = [], []
        self.end = 0
        self.daemon = None

    def describe(self):
        """What it is like."""
        return f'{self.options} {self.opened}, {", ".join(sorted(self.kinds))}, ' \
               f'{", ".join(f"{what} at {at}" for at, what in self.log)}'

    # Images

    def file(self, name):
        """The path of a file."""
        return os.path.join(self.directory, name)

    def stock(self, program, *words, check=True):
        """Runs a program of unpatched QEMU."""
        done = subprocess.run([os.path.join(self.args.stock, program), *words, *SECRET], capture_output=True,
                              text=True, check=False)
        if check and done.returncode:
            raise Failure(f'{program} {" ".join(words)}: {done.stdout}{done.stderr}')
        return done

    def make(self, below=None):
        """An image on a disk of its own, with some data if nobody uses the disk yet; its number."""
        number = len(self.disks)
        path = self.file(f'l{number}')
        backing = [] if below is None else ['-b', self.file(f'l{below}'), '-F', 'qcow2']
        kind = self.draw(below)
        if kind == 'encrypted':
            self.encrypted.add(number)
            shutil.copy(self.template(), path)
            if backing:
                self.stock('qemu-img', 'rebase', '-u', *backing, self.name(path))
        else:
            more = {'data_file': f'{path}.data'} if kind in ('external', 'raw') else {}
            if kind == 'raw':
                more['data_file_raw'] = 'on'
            if 'preallocated' in self.kinds and kind != 'compressed' and (not backing or self.extended):
                more['preallocation'] = self.rng.choice(('off', 'metadata', 'falloc'))
            self.create(path, *backing, **more)
        if self.daemon is None:
            words = []
            if kind == 'compressed':
                # Before the others: it is refused where there are data.
                clusters = self.size // self.cluster
                for at in self.rng.sample(range(clusters), min(clusters // 2, 24)):
                    words += ['-c', f'write -q -c -P {at % 255 + 1} {at * self.cluster} {self.cluster}']
            for _ in range(12):
                at = self.rng.randrange(0, self.size - 96 * KIB, SECTOR)
                words += ['-c', f'write -q -P {self.rng.randint(1, 255)} {at} 90k']
            self.stock('qemu-io', *words, self.name(path))
        self.disks.append(self.disk(path))
        if os.path.exists(f'{path}.data'):
            self.data[number] = self.disk(f'{path}.data')
        return number

    def draw(self, below):
        """Which one an image is of those that no image is at once, or None."""
        if below is None and 'raw' in self.kinds:
            return 'raw'
        possible = sorted(self.kinds & {'external', 'compressed', 'encrypted'})
        return self.rng.choice(possible) if possible and self.rng.random() < 0.7 else None

    def create(self, path, *backing, **options):
        """An image as the round's are, with some more options."""
        options = ','.join(f'{key}={value}' for key, value in {**self.options, **options}.items())
        self.stock('qemu-img', 'create', '-q', '-f', 'qcow2', *backing, '-o', options, path, str(self.size))

    def template(self):
        """An encrypted image. To make a key takes seconds."""
        path = self.file('encrypted')
        if not os.path.exists(path):
            self.create(path, **{'encrypt.format': 'luks', 'encrypt.key-secret': 'key', 'encrypt.iter-time': 10})
        return path

    def name(self, path, alone=False):
        """What unpatched QEMU opens an image by, perhaps without what is below."""
        return 'json:' + json.dumps({'driver': 'qcow2', 'file': {'driver': 'file', 'filename': path},
                                     **self.keys(path), **({'backing': None} if alone else {})})

    def keys(self, path):
        """Options for the keys of an image and of those below, which are found by the names in the headers."""
        if 'encrypted' not in self.kinds:
            return {}
        with open(path, 'rb') as file:
            head = file.read(4 * KIB)
        offset, length = struct.unpack_from('>QI', head, 8)
        below = {'backing': self.keys(head[offset:offset + length].decode())} if length else {}
        return {'encrypt': {'key-secret': 'key'}, **below}

    def disk(self, path):
        """A disk with the content of a file."""
        with open(path, 'rb') as file:
            return Disk(path + '.sock', file.read(), self.room, self.clock, self.rng.random())

    def files(self):
        """The disks with the paths of the files that are on them."""
        yield from ((self.file(f'l{number}'), disk) for number, disk in enumerate(self.disks))
        yield from ((self.file(f'l{number}.data'), disk) for number, disk in self.data.items())

    def write(self, path, content):
        """A file as long as a disk: preallocated clusters may be at its end, where nothing is written."""
        with open(path, 'wb') as file:
            file.write(content)
            file.truncate(self.room)

    def image(self, number):
        """Options for the image on its disks."""
        def storage(disk):
            return {'driver': 'nbd', 'server': {'type': 'unix', 'path': disk.path}, 'discard': 'unmap'}
        options = {'driver': self.args.driver, 'file': storage(self.disks[number])}
        if number in self.data:
            options['data-file'] = storage(self.data[number])
        if number in self.encrypted:
            options['encrypt'] = {'format': 'luks', 'key-secret': 'key'}
        return options

    def add(self, number, backing):
        """A node for an image, which is the new top."""
        self.daemon.command('blockdev-add', node_name=f'n{number}', backing=backing, **self.image(number),
                            **self.opened)
        self.layers.append(number)

    def now(self, kind):
        """Notes what is done."""
        moment = next(self.clock)
        self.log.append((moment, kind))
        return moment

    # Work

    def work(self):
        """Changes the chain while it is written to, and then, perhaps, while nobody uses it."""
        below = None
        for _ in range(1 if 'internal' in self.kinds or 'raw' in self.kinds and self.rng.random() < 0.5 else 3):
            below = self.make(below)
        self.stock('qemu-img', 'convert', '-O', 'raw', self.name(self.file(f'l{below}')), self.file('before'))
        with open(self.file('before'), 'rb') as file:
            self.before = file.read()
        self.daemon = Daemon(os.path.join(self.args.bin, 'qemu-storage-daemon'), self.directory, self.file('log'),
                             timeout=60, arguments=SECRET)
        try:
            self.online()
            offline = self.rng.random() < 0.7
            if offline:
                self.daemon.quit()
        finally:
            self.daemon.kill()
        if offline:
            self.offline()
        self.end = next(self.clock)
        for _, disk in self.files():
            disk.close()

    def online(self):
        """Two writers, and what happens to the chain meanwhile."""
        for number in range(len(self.disks)):
            self.add(number, f'n{number - 1}' if number else None)
        self.tops.append((0, self.layers[-1]))
        path = self.file('guest.sock')
        self.daemon.command('nbd-server-start', addr={'type': 'unix', 'data': {'path': path}})
        self.daemon.command('block-export-add', type='nbd', id='top', node_name=f'n{self.layers[-1]}', name='top',
                            writable=True)
        # A fifth of the disk stays as it was.
        parts = list(range(len(self.before) // self.part))
        self.rng.shuffle(parts)
        parts = parts[len(parts) // 5:]
        writers = [Writer(nbd.Client(path, 'top'), self.clock, self.rng.random(), parts[half::2], self.part,
                          self.cluster) for half in range(2)]
        for writer in writers:
            writer.start()
        actions = live('internal' in self.kinds)
        for _ in range(self.rng.randint(2, 8)):
            time.sleep(self.rng.random() * 0.2)
            began, top = next(self.clock), self.layers[-1]
            self.rng.choice(actions)(self)
            if self.layers[-1] != top:
                self.tops += [(began, None), (next(self.clock), self.layers[-1])]
        for writer in writers:
            writer.end()
            self.changes += writer.changes
            self.flushes += writer.flushes
        self.changes.sort(key=lambda change: change.began)

    def offline(self):
        """Tools, on the top alone: what is below they find in files, by the names in the headers."""
        for path, disk in self.files():
            self.write(path, disk.all())
        for _ in range(self.rng.randint(1, 6)):
            self.rng.choice(OFFLINE)(self)

    # Afterwards

    def fail(self, moment):
        """The power fails at that moment: what is left has to be sound, and what was flushed has to be there."""
        share, killed = self.rng.choice((0, 0.1, 0.5, 0.9, 1)), self.rng.random() < 0.2
        for path, disk in self.files():
            # If only the process is killed, all that has ended is there.
            self.write(path, disk.after(moment, lambda ended: killed and ended or self.rng.random() < share))
        for number in range(len(self.disks)):
            self.check(self.file(f'l{number}'))
        top = self.tops[bisect.bisect([began for began, _ in self.tops], moment) - 1][1]
        if top is None:
            return
        done = self.stock('qemu-img', 'convert', '-O', 'raw', self.name(self.file(f'l{top}')), self.file('raw'),
                          check=False)
        if done.returncode:
            raise Wrong(f'layer {top}: {done.stderr}')
        # The data of the only image that can be raw are the disk, without the image too.
        for path in ['raw'] + ['l0.data'] * (top == 0 and 'raw' in self.kinds):
            with open(self.file(path), 'rb') as file:
                self.compare(file.read(), moment)

    def check(self, path):
        """No worse than leaks."""
        repairs = ['all'] if 'lazy' in self.kinds else []
        done = None
        # Counts that are too high make flags wrong as well, until they are right.
        for repair in repairs + [None, 'leaks', None]:
            words = ['-r', repair] if repair else []
            done = self.stock('qemu-img', 'check', *words, self.name(path, alone=True), check=False)
            if repair is None and done.returncode in (0, 3):
                return
        raise Wrong(f'{os.path.basename(path)}: {done.stdout[-600:]}{done.stderr[-300:]}')

    def compare(self, found, moment):
        """What is read, beside what was flushed; what was under way may be there or not."""
        flushed = last_flush(self.flushes, moment)
        expected = bytearray(self.before)
        doubtful, discarded = bytearray(len(expected) // SECTOR), bytearray(len(expected) // SECTOR)
        for change in self.changes:
            end = change.offset + len(change.data)
            sectors = slice(change.offset // SECTOR, end // SECTOR)
            if change.ended <= flushed:
                # A discard may be ignored, as a filter that a job has put above does.
                discarded[sectors] = bytes([change.discard]) * (len(change.data) // SECTOR)
                if not change.discard:
                    expected[change.offset:end] = change.data
            elif change.began <= moment:
                doubtful[sectors] = bytes([1]) * (len(change.data) // SECTOR)
        for sector, unknown in enumerate(doubtful):
            at = slice(sector * SECTOR, (sector + 1) * SECTOR)
            zero = discarded[sector] and not any(found[at])
            if not unknown and not zero and found[at] != expected[at]:
                raise Wrong(f'byte {at.start:#x} reads {found[at][:16].hex()}, flushed was {expected[at][:16].hex()}, '
                            f'before all of it {self.before[at][:16].hex()}')

    def keep(self, directory):
        """Copies the files to where they can be looked at."""
        shutil.copytree(self.directory, directory, ignore=shutil.ignore_patterns('*.sock'), dirs_exist_ok=True)
