"""What the commands that use this library have in common: options, and how they say what came of it."""

import argparse
import os
import random
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


def parser(doc):
    """With the options that all of them have."""
    result = argparse.ArgumentParser(usage=doc.split('usage: ')[1].split('\n\n')[0], add_help=False)
    result.add_argument('-h', '--help', action='store_true')
    result.add_argument('--seed', type=int)
    result.add_argument('--bin', default=os.path.join(ROOT, 'build', 'bin'))
    result.add_argument('--stock', default=os.path.join(ROOT, 'build', 'stock', 'bin'))
    result.add_argument('--dir')
    result.add_argument('--counts')
    return result


def parse(options, doc):
    """The command line, with defaults that have to be looked up."""
    args = options.parse_args()
    if args.help:
        print(doc)
        sys.exit(0)
    for directory in (args.bin, args.stock):
        if not os.access(os.path.join(directory, 'qemu-img'), os.X_OK):
            sys.exit(f'error: no {directory}/qemu-img: run make build stock first')
    if args.seed is None:
        args.seed = random.randrange(1 << 31)
    if not args.dir:
        shm = os.statvfs('/dev/shm') if os.path.isdir('/dev/shm') else None
        large = shm and shm.f_bavail * shm.f_frsize > 2 << 30
        args.dir = '/dev/shm' if large else os.environ.get('TMPDIR', '/var/tmp')
    return args


def report(args, passed, failed, skipped=0):
    """Says it at the end, and to whoever adds it up."""
    print(f'{passed} passed, {failed} failed', flush=True)
    if args.counts:
        with open(args.counts, 'w', encoding='utf-8') as file:
            file.write(f'{passed} {failed} {skipped}\n')
