"""One image, without a chain: rqcow2 must not be slower than QEMU's driver."""

import os
import re

from sides import ONE_CPU, Row, turns

GIB = 1 << 30
BLOCK = 4096
# An odd number of blocks: going on by it visits every 4 KiB block of an image
# whose size is a power of two once before any of them twice, far apart.
SCATTER = BLOCK * 18517


def requests(side, image, count, size, depth, write, *, step=0):
    """How long requests take, without open and close."""
    words = ['-w'] if write else []
    text = side.run('qemu-img', 'bench', '-t', 'writeback', '-c', str(count), '-d', str(depth),
                    '-s', str(size), '-S', str(step or size), *words,
                    '--image-opts', f'driver={side.driver},file.filename={image}',
                    under=ONE_CPU if depth == 1 else ())
    return float(re.search(r'Run completed in ([\d.]+) seconds', text).group(1))


class Requests:
    """Requests through qemu-img bench: the driver in the process that measures,
    data in the page cache, so that neither a device nor a transport is in the
    way. The time is that of the requests, without open and close."""

    def __init__(self, name, size, depth, count, write=False, fresh=False, base=False):
        self.name = name
        self.size, self.depth, self.count = size, depth, count
        self.write, self.fresh, self.base = write, fresh, base

    def image(self, workspace):
        return os.path.join(workspace, 'fresh.qcow2' if self.fresh else 'full.qcow2')

    def prepare(self, workspace, stock):
        full = os.path.join(workspace, 'full.qcow2')
        if not os.path.exists(full):
            stock.run('qemu-img', 'create', '-q', '-f', 'qcow2', '-o', 'preallocation=full',
                      full, str(GIB))
            stock.run('qemu-io', '-f', 'qcow2', '-c', f'write -q -P 7 0 {GIB}', full)

    def measure(self, side, workspace):
        image = self.image(workspace)
        if self.fresh:
            if os.path.exists(image):
                os.remove(image)
            backing = ['-b', 'full.qcow2', '-F', 'qcow2'] if self.base else []
            side.run('qemu-img', 'create', '-q', '-f', 'qcow2', *backing, image, str(GIB))
        step = SCATTER if self.size == BLOCK else self.size
        return requests(side, image, self.count, self.size, self.depth, self.write, step=step)


def one_image(bench):
    """Reads and writes of one image through qemu-img bench, beside unpatched QEMU."""
    few = 4 if bench.quick else 1
    workspace = bench.chains.workspace
    for case in (
            Requests('4 KiB random read, QD 1', BLOCK, 1, 60000 // few),
            Requests('4 KiB random read, QD 32', BLOCK, 32, 120000 // few),
            Requests('4 KiB random write, QD 1', BLOCK, 1, 60000 // few, write=True),
            Requests('4 KiB random write, QD 32', BLOCK, 32, 120000 // few, write=True),
            Requests('4 KiB random write, allocating, QD 1', BLOCK, 1, 8000 // few,
                     write=True, fresh=True),
            Requests('4 KiB random write, allocating, QD 32', BLOCK, 32, 8000 // few,
                     write=True, fresh=True),
            Requests('4 KiB random write, copy-on-write, QD 1', BLOCK, 1, 8000 // few,
                     write=True, fresh=True, base=True),
            Requests('256 KiB sequential write, allocating, QD 1', 256 << 10, 1, 4096 // few,
                     write=True, fresh=True),
            Requests('1 MiB sequential read', 1 << 20, 1, 2048 // few),
            Requests('1 MiB sequential write', 1 << 20, 1, 1024 // few, write=True)):
        case.prepare(workspace, bench.stock)
        samples = turns({side: lambda case=case, side=side: case.measure(side, workspace)
                         for side in (bench.stock, bench.ours)}, bench.rounds)
        yield Row(f'{case.name}: rqcow2 against unpatched', 's', samples[bench.ours],
                  samples[bench.stock], least=0.95, speed=True)
    for name in ('full.qcow2', 'fresh.qcow2'):
        os.remove(os.path.join(workspace, name))


ONE_IMAGE = [one_image]
