"""What else an image can have, beside QEMU's driver: compression, encryption,
subclusters, bitmaps, snapshots, and checking it all.

Cases as in chain_cases.py.
"""

import os
import random
import time

from cases import BLOCK, GIB, SCATTER, requests
from sides import ONE_CPU, Row, turns

MIB = 1 << 20
SECRET = ['--object', 'secret,id=sec0,data=123456']


class Files:
    """Files in the workspace that go when the case ends."""

    def __init__(self, bench):
        self.bench = bench
        self.paths = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for path in self.paths:
            self.fresh(path)

    def path(self, name):
        path = os.path.join(self.bench.chains.workspace, name)
        self.paths.add(path)
        return path

    @staticmethod
    def fresh(path):
        """Removes a file; returns its name."""
        if os.path.exists(path):
            os.remove(path)
        return path

    def compare(self, name, measure, least=0.95):
        """One row: the times of measure(side), which take turns."""
        samples = turns({side: lambda side=side: measure(side)
                         for side in (self.bench.stock, self.bench.ours)}, self.bench.rounds)
        return Row(f'{name}: rqcow2 against unpatched', 's', samples[self.bench.ours],
                   samples[self.bench.stock], least=least, speed=True)


def seconds(side, *words, **options):
    """How long a program takes."""
    begin = time.monotonic()
    side.run(*words, **options)
    return time.monotonic() - begin


def compression(bench):
    """qemu-img convert -c, and reading what it wrote."""
    size = (64 if bench.quick else 256) * MIB
    words = [word.encode() for word in 'cluster table layer snapshot overlay guest host refcount zero'.split()]
    rng = random.Random(1)
    with Files(bench) as files:
        raw = files.path('source.raw')
        with open(raw, 'wb') as file:
            for _ in range(size // MIB):
                # Half of it is text, the other half cannot be compressed.
                text = b' '.join(rng.choices(words, k=MIB // 14))
                file.write(text[:MIB // 2].ljust(MIB // 2, b'.') + rng.randbytes(MIB // 2))
        packed = files.path('packed.qcow2')
        for method in ('zlib', 'zstd'):
            options = ['-c', '-o', f'compression_type={method}']
            yield files.compare(f'convert -c, {method}', lambda side, options=options: seconds(
                side, 'qemu-img', 'convert', '-f', 'raw', '-O', side.driver, *options, raw, files.fresh(packed)))
            yield files.compare(f'read compressed clusters, {method}', lambda side: requests(
                side, packed, size // 65536, 65536, 8, False))


def encryption(bench):
    """Reading and writing a LUKS image."""
    size = 128 * MIB if bench.quick else 512 * MIB
    with Files(bench) as files:
        image = files.path('luks.qcow2')
        key = ',encrypt.format=luks,encrypt.key-secret=sec0'
        bench.stock.run('qemu-img', 'create', '-q', '-f', 'qcow2', *SECRET, '-o',
                        'encrypt.format=luks,encrypt.key-secret=sec0,encrypt.iter-time=10,preallocation=falloc',
                        image, str(size))
        # qemu-img bench takes no secrets.
        for what in ('write', 'read'):
            commands = '\n'.join(f'{what} -q {at} 64k' for at in range(0, size, 65536))
            yield files.compare(f'LUKS, 64 KiB {what}, whole program', lambda side, commands=commands: seconds(
                side, 'qemu-io', *SECRET, '--image-opts', f'driver={side.driver},file.filename={image}{key}',
                input=commands, under=ONE_CPU))


def subclusters(bench):
    """Random writes to an image with extended L2 entries, allocating."""
    count = 4000 if bench.quick else 16000
    with Files(bench) as files:
        image = files.path('extended.qcow2')

        def write(side, depth):
            side.run('qemu-img', 'create', '-q', '-f', side.driver, '-o', 'extended_l2=on,cluster_size=128k',
                     files.fresh(image), str(GIB))
            return requests(side, image, count, BLOCK, depth, True, step=SCATTER)

        for depth in (1, 32):
            yield files.compare(f'extended L2, 4 KiB random write, allocating, QD {depth}',
                                lambda side, depth=depth: write(side, depth))


def bitmaps(bench):
    """Loading and storing the persistent bitmap of a disk of 1 TiB."""
    with Files(bench) as files:
        image = files.path('bitmap.qcow2')
        bench.stock.run('qemu-img', 'create', '-q', '-f', 'qcow2', image, '1T')
        bench.stock.run('qemu-img', 'bitmap', '--add', '-g', '65536', '-f', 'qcow2', image, 'b')
        # A bit here and there in most parts of the bitmap.
        requests(bench.stock, image, 4000, BLOCK, 1, True, step=BLOCK * 67103)
        yield files.compare('open, write, close with a bitmap, disk of 1 TiB', lambda side: seconds(
            side, 'qemu-io', '-f', side.driver, '-c', 'write -q 0 4k', image))


def internal_snapshots(bench):
    """Taking and deleting an internal snapshot."""
    size = (16 if bench.quick else 64) * GIB
    with Files(bench) as files:
        image = files.path('snapshot.qcow2')
        bench.stock.run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'preallocation=metadata', image, str(size))

        def change(side, what):
            name = f'driver={side.driver},file.filename={image}'
            times = {kind: seconds(side, 'qemu-img', 'snapshot', '-q', f'-{kind}', 's', '--image-opts', name)
                     for kind in 'cd'}
            return times[what]

        yield files.compare(f'snapshot -c, {size // GIB} GiB allocated', lambda side: change(side, 'c'))
        yield files.compare(f'snapshot -d, {size // GIB} GiB allocated', lambda side: change(side, 'd'))


def check(bench):
    """qemu-img check of an image of 100 GiB, all of it allocated."""
    size = (20 if bench.quick else 100) * GIB
    with Files(bench) as files:
        image = files.path('check.qcow2')
        bench.stock.run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'preallocation=metadata', image, str(size))
        yield files.compare(f'qemu-img check, {size // GIB} GiB', lambda side: seconds(
            side, 'qemu-img', 'check', '-q', '-f', side.driver, image), least=1)


CASES = [compression, encryption, subclusters, bitmaps, internal_snapshots, check]
