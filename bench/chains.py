"""The images that are measured, and the places in them that are read."""

import array
import bisect
import json
import os
import random
import shutil
import struct
import subprocess
import sys

sys.dont_write_bytecode = True
TOOLS = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'tools')
sys.path.insert(0, TOOLS)
from qcow2writer import write_qcow2  # noqa: E402 pylint: disable=wrong-import-position

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
CLUSTER = 64 * KIB
BLOCK = 4 * KIB
TABLE = CLUSTER // 8 * CLUSTER      # what one L2 table maps


class Chain:
    """Files l0.qcow2 to l<depth-1>.qcow2 in a directory."""

    def __init__(self, directory, depth, disk):
        self.directory, self.depth, self.disk = directory, depth, disk
        self.top = self.layer(depth - 1)

    def layer(self, number):
        return os.path.join(self.directory, f'l{number}.qcow2')

    def path(self, name):
        return os.path.join(self.directory, name)

    def list_tables(self):
        """Writes where the L2 tables of all layers are, for the probe; returns the path."""
        path = self.path('tables')
        with open(path, 'w', encoding='utf-8') as lists:
            for layer in map(self.layer, range(self.depth)):
                for offset in l2_tables(layer):
                    lists.write(f'{offset} {CLUSTER} {layer}\n')
        return path


class Spread(Chain):
    """The same guest clusters at any depth, dealt out to the layers at random.

    55 % of the disk have data (73 % of the smaller one), the rest was never written.
    `flat` is a raw file with the same content. The files `data`, `holes` and
    `warm` are lists of offsets: of all blocks with data and without, shuffled,
    and one hole every 4 MiB, which takes a request through every layer and to
    every L2 table and every piece of an index, however small.
    """

    def __init__(self, directory, depth, quick=False):
        super().__init__(directory, depth, (256 * MIB) if quick else GIB)
        # Divides by 10, 30, 100, 300, 500, 1000, 3000.
        clusters = 3000 if quick else 9000
        self.flat = self.path('flat.raw')
        self.data, self.holes, self.warm = map(self.path, ('data', 'holes', 'warm'))
        self.first = self.path('first')
        subprocess.run(
            [sys.executable, os.path.join(TOOLS, 'make-chain.py'), directory,
             '--layers', str(depth), '--disk', str(self.disk), '--place', 'deal',
             '--data-per-layer', str(-(-clusters // depth) * CLUSTER), '--seed', '1',
             '--flat', self.flat], check=True, stdout=subprocess.DEVNULL)
        self._lists()

    def _lists(self):
        has_data = [False] * (self.disk // CLUSTER)
        with open(self.flat, 'rb', buffering=0) as file:
            end = 0
            while True:
                try:
                    begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
                except OSError:
                    break
                end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
                for number in range(begin // CLUSTER, -(-end // CLUSTER)):
                    has_data[number] = True
        per = CLUSTER // BLOCK
        blocks = range(self.disk // BLOCK)
        holes = [n * BLOCK for n in blocks if not has_data[n // per]]
        write_offsets(self.data, [n * BLOCK for n in blocks if has_data[n // per]])
        write_offsets(self.holes, holes)
        first = {}
        for offset in holes:
            first.setdefault(offset // (4 * MIB), offset)
        write_offsets(self.warm, sorted(first.values()), shuffle=False)
        write_offsets(self.first, holes[:1])

    def places(self, side):
        """Writes where the blocks of `data` are, in the same order, for probes
        that read them without an image; returns the path."""
        extents = json.loads(side.run('qemu-img', 'map', '-f', side.driver, '--output', 'json',
                                      self.top))
        extents = [extent for extent in extents if extent['data']]
        starts = [extent['start'] for extent in extents]
        blocks = array.array('Q')
        with open(self.data, 'rb') as file:
            blocks.frombytes(file.read())
        path = self.path('places')
        with open(path, 'w', encoding='utf-8') as file:
            for block in blocks:
                extent = extents[bisect.bisect(starts, block) - 1]
                offset = extent['offset'] + block - extent['start']
                file.write(f"{offset} {self.layer(self.depth - 1 - extent['depth'])}\n")
        return path


class FullTables(Chain):
    """Every layer has every L2 table, with one cluster of data under each.

    `slices` is a list of one hole for each 32 MiB (512 clusters, a slice of
    4 KiB of an L2 table), `tables` that of `list_tables`.
    """

    def __init__(self, directory, depth, disk):
        super().__init__(directory, depth, disk)
        self.slices = self.path('slices')
        self.count = disk // TABLE
        os.makedirs(directory)
        chance = random.Random(1)
        content = chance.randbytes(CLUSTER)
        taken = set()
        for number in range(depth):
            clusters = [table * (TABLE // CLUSTER) + chance.randrange(TABLE // CLUSTER)
                        for table in range(self.count)]
            taken.update(clusters)
            write_qcow2(self.layer(number), disk, clusters, lambda _: content,
                        backing=f'l{number - 1}.qcow2' if number else None,
                        backing_format='qcow2' if number else None)
        self.tables = self.list_tables()
        step = 32 * MIB // CLUSTER
        write_offsets(self.slices, [
            next(n for n in range(start, start + step) if n not in taken) * CLUSTER
            for start in range(0, disk // CLUSTER, step)], shuffle=False)


def l2_tables(path):
    """Where the L2 tables of an image are."""
    with open(path, 'rb') as file:
        size, offset = struct.unpack('>36xIQ', file.read(48))
        file.seek(offset)
        entries = struct.unpack(f'>{size}Q', file.read(8 * size))
    # Without the flags around it.
    offsets = (entry & 0x00fffffffffffe00 for entry in entries)
    return [offset for offset in offsets if offset]


def empty_overlay(path, disk, backing):
    """An image without data; the backing file is named and not looked at."""
    write_qcow2(path, disk, [], None, backing=backing, backing_format='qcow2')


def write_offsets(path, offsets, shuffle=True):
    offsets = array.array('Q', offsets)
    if shuffle:
        offsets = list(offsets)
        random.Random(1).shuffle(offsets)
        offsets = array.array('Q', offsets)
    with open(path, 'wb') as file:
        offsets.tofile(file)


class Chains:
    """Makes chains when they are first asked for."""

    def __init__(self, workspace, quick, say):
        self.workspace, self.quick, self.say = workspace, quick, say
        self.made = {}

    def _get(self, key, make):
        if key not in self.made:
            self.say(f'making {key}')
            self.made[key] = make(os.path.join(self.workspace, key))
        return self.made[key]

    def spread(self, depth):
        return self._get(f'chain{depth}', lambda path: Spread(path, depth, self.quick))

    def full_tables(self, depth, disk):
        return self._get(f'tables{depth}-{disk // GIB}G',
                         lambda path: FullTables(path, depth, disk))

    def drop(self):
        """Gives the space back."""
        for chain in self.made.values():
            shutil.rmtree(chain.directory)
        self.made.clear()
