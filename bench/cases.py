"""What is measured: each case runs one program once and returns a number."""

import os
import re
import resource
import subprocess
import time

GIB = 1 << 30
BLOCK = 4096
# An odd number of blocks: going on by it visits every 4 KiB block of an image
# whose size is a power of two once before any of them twice, far apart.
SCATTER = BLOCK * 18517


class Side:
    """One of the two that are compared: programs, and the name of the format."""

    def __init__(self, name, programs, driver):
        self.name = name
        self.programs = programs
        self.driver = driver

    def program(self, name):
        return os.path.join(self.programs, name)

    def run(self, name, *words, **options):
        return subprocess.run([self.program(name), *words], check=True, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              **options).stdout


class Case:
    """A figure. `better` says whether less (seconds) or more is better."""

    target = None
    unit = 's'

    def __init__(self, name):
        self.name = name

    def prepare(self, workspace, stock):
        """Makes what both sides use."""

    def measure(self, side, workspace):
        """Returns the figure for one side, from one run."""
        raise NotImplementedError


class Requests(Case):
    """Requests through qemu-img bench: the driver in the process that measures,
    data in the page cache, so that neither a device nor a transport is in the
    way. The time is that of the requests, without open and close."""

    target = 0.95

    def __init__(self, name, size, depth, count, write=False, fresh=False, base=False):
        super().__init__(name)
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
        words = ['-w'] if self.write else []
        text = side.run('qemu-img', 'bench', '-f', side.driver, '-t', 'writeback',
                        '-c', str(self.count), '-d', str(self.depth), '-s', str(self.size),
                        '-S', str(step), *words, image)
        return float(re.search(r'Run completed in ([\d.]+) seconds', text).group(1))


class Chain(Case):
    """Something on a chain whose data are spread over the layers."""

    def __init__(self, name, depth, disk='1G', data='256K'):
        super().__init__(f'{name}, depth {depth}')
        self.depth, self.disk, self.data = depth, disk, data

    def top(self, workspace):
        return os.path.join(workspace, f'chain{self.depth}', f'l{self.depth - 1}.qcow2')

    def prepare(self, workspace, stock):
        if os.path.exists(self.top(workspace)):
            return
        maker = os.path.join(os.path.dirname(__file__), '..', 'tools', 'make-chain.py')
        subprocess.run([maker, os.path.dirname(self.top(workspace)), '--layers', str(self.depth),
                        '--disk', self.disk, '--data-per-layer', self.data, '--seed', '1'],
                       check=True, stdout=subprocess.DEVNULL)


class ChainOpen(Chain):
    """Open and close, milliseconds."""

    unit = 'ms'

    def measure(self, side, workspace):
        before = time.monotonic()
        side.run('qemu-io', '-r', '-f', side.driver, '-c', 'quit', self.top(workspace))
        return (time.monotonic() - before) * 1e3


class ChainRead(Chain):
    """4 KiB random reads at queue depth 1, microseconds each."""

    unit = 'us'

    def measure(self, side, workspace):
        count = 2000
        text = side.run('qemu-img', 'bench', '-f', side.driver, '-t', 'writeback',
                        '-c', str(count), '-d', '1', '-s', str(BLOCK), '-S', str(SCATTER),
                        self.top(workspace))
        seconds = float(re.search(r'Run completed in ([\d.]+) seconds', text).group(1))
        return seconds / count * 1e6


class ChainMemory(Chain):
    """Peak resident memory of 2000 random reads, MiB."""

    unit = 'MiB'

    def measure(self, side, workspace):
        command = [side.program('qemu-img'), 'bench', '-f', side.driver, '-t', 'writeback',
                   '-c', '2000', '-d', '1', '-s', str(BLOCK), '-S', str(SCATTER),
                   self.top(workspace)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise subprocess.CalledProcessError(process.returncode, command)
        assert isinstance(usage, resource.struct_rusage)
        return usage.ru_maxrss / 1024


def cases(quick):
    """All cases, fewer requests each with `quick`."""
    few = 4 if quick else 1
    yield Requests('4 KiB random read, QD 1', BLOCK, 1, 60000 // few)
    yield Requests('4 KiB random read, QD 32', BLOCK, 32, 120000 // few)
    yield Requests('4 KiB random write, QD 1', BLOCK, 1, 60000 // few, write=True)
    yield Requests('4 KiB random write, QD 32', BLOCK, 32, 120000 // few, write=True)
    yield Requests('4 KiB random write, allocating, QD 1', BLOCK, 1, 8000 // few,
                   write=True, fresh=True)
    yield Requests('4 KiB random write, allocating, QD 32', BLOCK, 32, 8000 // few,
                   write=True, fresh=True)
    yield Requests('4 KiB random write, copy-on-write, QD 1', BLOCK, 1, 8000 // few,
                   write=True, fresh=True, base=True)
    yield Requests('1 MiB sequential read', 1 << 20, 1, 2048 // few)
    yield Requests('1 MiB sequential write', 1 << 20, 1, 1024 // few, write=True)
    for depth in (1, 100, 300, 500):
        yield ChainOpen('open and close', depth)
        yield ChainRead('4 KiB random read', depth)
        yield ChainMemory('memory', depth)
