#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure one chain through unpatched qcow2 and through the driver.

All figures come from qemu-io, both sides in turn, after one run of each that
does not count; medians are shown with the smallest and the largest value.

open    qemu-io opens the top read-only and ends: the whole process.
read    4 KiB reads at random places that hold data, one after the other, in one
        process. The first read starts the clock and is not counted, opening
        is not either. The files are in the page cache: this is what
        the drivers cost, not the disk.
memory  resident memory of that process after the reads.
"""

import argparse
import json
import os
import pty
import random
import statistics
import subprocess
import sys
import time


class MeasureError(Exception):
    """qemu-io did not do what it should."""


def open_time(qemu_io, driver, top):
    start = time.monotonic()
    done = subprocess.run([qemu_io, '-r', '-f', driver, '-c', 'quit', top],
                          capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:
        raise MeasureError(f'{qemu_io}: {done.stderr.strip()}')
    return time.monotonic() - start


class Terminal:
    """The output of a process, line by line as it comes: a terminal is not
    buffered as a pipe would be."""

    def __init__(self, command):
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                        stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.fd = ours
        self.text = ''

    def wait(self, word):
        """Waits for `word` and forgets everything up to it."""
        while word not in self.text:
            try:
                data = os.read(self.fd, 65536).decode(errors='replace')
            except OSError:
                data = ''
            if not data:
                raise MeasureError(f'{self.process.args[0]}: {self.text.strip()}')
            self.text += data
        now = time.monotonic()
        before, self.text = self.text.split(word, 1)
        if 'failed' in before or 'error' in before.lower():
            raise MeasureError(f'{self.process.args[0]}: {before.strip()}')
        return now

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


def resident(pid):
    """In KiB."""
    with open(f'/proc/{pid}/status', encoding='ascii') as file:
        return next(int(line.split()[1]) for line in file
                    if line.startswith('VmRSS:'))


def read_time(qemu_io, driver, top, offsets):
    """Seconds per read, and resident memory in MiB afterwards."""
    command = [qemu_io, '-r', '-f', driver, '-c', f'read {offsets[0]} 4k']
    for offset in offsets[1:-1]:
        command += ['-c', f'read -q {offset} 4k']
    command += ['-c', f'read {offsets[-1]} 4k', '-c', 'sleep 600000', top]
    terminal = Terminal(command)
    try:
        start = terminal.wait(' ops;')
        end = terminal.wait(' ops;')
        memory = resident(terminal.process.pid)
    finally:
        terminal.close()
    return (end - start) / (len(offsets) - 1), memory / 1024


def row(name, unit, scale, digits, stock, ours):
    def cell(values):
        values = [value * scale for value in values]
        return (f'{statistics.median(values):.{digits}f} {unit} '
                f'({min(values):.{digits}f} .. {max(values):.{digits}f})')
    ratio = statistics.median(stock) / statistics.median(ours)
    return name, cell(stock), cell(ours), f'{ratio:.1f}x'


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--qemu-io', required=True, help='the one that has the driver')
    add('--stock-qemu-io', required=True, help='the unpatched one')
    add('--driver', required=True)
    add('--top', required=True)
    add('--info', required=True, help="make-disk.py's description")
    add('--runs', type=int, default=5)
    add('--reads', type=int, default=2000)
    add('--seed', type=int, default=1)
    add('--json', help='output: all single figures')
    args = parser.parse_args()

    with open(args.info, encoding='utf-8') as file:
        info = json.load(file)
    chosen = random.Random(args.seed)
    offsets = [chosen.choice(info['data_clusters']) * info['cluster']
               + chosen.randrange(info['cluster'] // 4096) * 4096
               for _ in range(args.reads + 1)]
    sides = ((args.stock_qemu_io, 'qcow2'), (args.qemu_io, args.driver))
    figures = [{'open': [], 'read': [], 'memory': []} for _ in sides]
    for number in range(args.runs + 1):
        for (qemu_io, driver), values in zip(sides, figures):
            seconds = open_time(qemu_io, driver, args.top)
            per_read, memory = read_time(qemu_io, driver, args.top, offsets)
            if number:
                values['open'].append(seconds)
                values['read'].append(per_read)
                values['memory'].append(memory)
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as file:
            json.dump({'unpatched qcow2': figures[0], args.driver: figures[1]},
                      file, indent=1)

    stock, ours = figures
    rows = [('', 'unpatched qcow2', args.driver, 'ratio'),
            row('open and close', 'ms', 1e3, 1, stock['open'], ours['open']),
            row('4 KiB random read', 'us', 1e6, 1, stock['read'], ours['read']),
            row('memory after the reads', 'MiB', 1, 1, stock['memory'],
                ours['memory'])]
    widths = [max(len(line[i]) for line in rows) for i in range(4)]
    print()
    for line in rows:
        print('    ' + '  '.join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]))
    print(f'\n    medians of {args.runs} runs (smallest .. largest), '
          f'{args.reads} reads a run, files in the page cache')


if __name__ == '__main__':
    try:
        main()
    except (MeasureError, OSError) as error:
        print(f'FAIL: measuring: {error}')
        sys.exit(1)
