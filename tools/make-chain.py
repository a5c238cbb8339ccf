#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Build a chain of qcow2 layers quickly, the same one for the same seed.

DIR/l0.qcow2 is the base, DIR/l<N-1>.qcow2 the top, whose path is printed.
Backing file names are relative and the backing format is recorded. Every
layer has its data at places of its own; what is in a cluster depends on seed,
layer and place, so that a read that ends in the wrong layer or at the wrong
offset is seen. Any qemu-img finds the layers clean.
"""

import argparse
import os
import random
import re
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from qcow2writer import write_qcow2  # noqa: E402

UNITS = {'': 1, 'B': 1, 'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30, 'T': 1 << 40,
         'P': 1 << 50}
POOL = 4 << 20


def size(text):
    """A size in bytes, with an optional suffix K, M, G, T, P."""
    number = text.rstrip('BKMGTPbkmgtp')
    unit = text[len(number):].upper()
    try:
        return int(float(number) * UNITS[unit])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f'not a size: {text}') from None


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n', maxsplit=1)[0],
        epilog=__doc__.split('\n\n', maxsplit=1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('dir', metavar='DIR', help='where the layers go; created if missing, a chain that '
                             'is there is replaced')
    add('--layers', type=int, default=300, metavar='N',
        help='number of files in the chain, the base included (300)')
    add('--disk', '--size', type=size, default='1G', metavar='SIZE',
        help='virtual size (1G)')
    add('--data-per-layer', type=size, default='1M', metavar='SIZE',
        help='data in each layer, rounded up to whole runs (1M)')
    add('--base-data', type=size, metavar='SIZE',
        help='data in the base (as in the other layers)')
    add('--zeroes-per-layer', type=size, default='0', metavar='SIZE',
        help='zero clusters in each layer above the base, placed at random '
             '(0; needs version 3)')
    add('--place', choices=('random', 'deal'), default='random',
        help='random: each layer draws its places on its own, newer layers '
             'hide parts of older ones. deal: the shuffled disk is dealt out, '
             'no place twice before all were given (random)')
    add('--run', type=int, default=1, metavar='N',
        help='clusters side by side at each place (1)')
    add('--cluster-size', type=size, default='64K', metavar='SIZE',
        help='512 to 2M (64K)')
    add('--version', type=int, choices=(2, 3), default=3,
        help='qcow2 version (3)')
    add('--refcount-bits', type=int, default=16, metavar='BITS',
        help='1 to 64 (16)')
    add('--grow', type=size, default='0', metavar='SIZE',
        help='each layer is larger than the one below by this (0)')
    add('--raw-base', action='store_true',
        help='the base is DIR/l0.raw, a raw image')
    add('--seed', type=int, default=1, help='(1)')
    add('--flat', metavar='FILE',
        help='also write what the top reads as, as a sparse raw file')
    args = parser.parse_args()
    if args.layers < 1:
        parser.error('--layers: at least 1')
    if args.run < 1:
        parser.error('--run: at least 1')
    if args.disk % 512 or args.grow % 512 or args.disk == 0:
        parser.error('--disk and --grow: multiples of 512')
    return args


class Content:
    """The bytes of any cluster of any layer, cut from one random pool."""

    def __init__(self, seed, cluster_size):
        self.cluster_size = cluster_size
        self.seed = seed
        self.pool = random.Random(f'pool {seed}').randbytes(POOL + cluster_size)

    def get(self, layer, number):
        start = (layer * 0x9E3779B1 + number * 0x85EBCA77) * 32 % POOL
        # A stamp a person can read in a hex dump.
        stamp = b'seed %d layer %d cluster %d\n' % (self.seed, layer, number)
        stamp = stamp[:self.cluster_size]
        return stamp + self.pool[start + len(stamp):start + self.cluster_size]


class Places:
    """Which clusters the next layer gets."""

    def __init__(self, args):
        self.args = args
        self.random = random.Random(f'places {args.seed}')
        self.stack = []
        self.dealt_slots = 0

    def _slots(self, disk):
        return -(-disk // (self.args.cluster_size * self.args.run))

    def _deal(self, slots, count):
        if slots != self.dealt_slots:
            # The disk has grown: its new part is shuffled in.
            self.stack.extend(range(self.dealt_slots, slots))
            self.random.shuffle(self.stack)
            self.dealt_slots = slots
        chosen = set()
        while len(chosen) < count:
            if not self.stack:
                self.stack.extend(range(slots))
                self.random.shuffle(self.stack)
            chosen.add(self.stack.pop())
        return chosen

    def draw(self, disk, amount, dealt=True):
        slots = self._slots(disk)
        count = min(-(-amount // (self.args.cluster_size * self.args.run)),
                    slots)
        if dealt and self.args.place == 'deal':
            chosen = self._deal(slots, count)
        else:
            chosen = self.random.sample(range(slots), count)
        last = -(-disk // self.args.cluster_size)
        return [number for slot in sorted(chosen)
                for number in range(slot * self.args.run,
                                    min((slot + 1) * self.args.run, last))]


def write_raw(path, length, pieces):
    """A sparse raw file from (offset, bytes) pairs."""
    with open(path, 'wb', buffering=0) as out:
        out.truncate(length)
        for offset, content in pieces:
            os.pwrite(out.fileno(), content, offset)


def main():
    args = parse_arguments()
    os.makedirs(args.dir, exist_ok=True)
    for name in os.listdir(args.dir):
        if re.fullmatch(r'l\d+\.qcow2|l0\.raw', name):
            os.unlink(os.path.join(args.dir, name))
    content = Content(args.seed, args.cluster_size)
    places = Places(args)
    unit = args.cluster_size
    owner = {}
    below = None

    def clipped(layer, number):
        # What lies past the end of a layer is not seen through larger ones.
        end = args.disk + layer * args.grow
        return content.get(layer, number)[:end - number * unit]

    for layer in range(args.layers):
        disk = args.disk + layer * args.grow
        amount = args.data_per_layer
        if layer == 0 and args.base_data is not None:
            amount = args.base_data
        clusters = places.draw(disk, amount)
        zeroes = []
        if layer and args.zeroes_per_layer:
            zeroes = places.draw(disk, args.zeroes_per_layer, dealt=False)
            zeroes = set(zeroes).difference(clusters)
        name = f'l{layer}.qcow2'
        if layer == 0 and args.raw_base:
            name = 'l0.raw'
            write_raw(os.path.join(args.dir, name), disk,
                      ((n * unit, clipped(0, n)) for n in clusters))
        else:
            backing_format = None
            if below:
                backing_format = 'raw' if below.endswith('.raw') else 'qcow2'
            write_qcow2(os.path.join(args.dir, name), disk, clusters,
                        lambda n, layer=layer: content.get(layer, n),
                        zeroes=zeroes, backing=below,
                        backing_format=backing_format, cluster_size=unit,
                        version=args.version,
                        refcount_bits=args.refcount_bits)
        if args.flat:
            owner.update(dict.fromkeys(clusters, layer))
            owner.update(dict.fromkeys(zeroes, None))
        below = name

    if args.flat:
        write_raw(args.flat, args.disk + (args.layers - 1) * args.grow,
                  ((n * unit, clipped(layer, n))
                   for n, layer in sorted(owner.items()) if layer is not None))
    print(os.path.join(args.dir, below))


if __name__ == '__main__':
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f'make-chain.py: {error}')
