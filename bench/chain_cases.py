"""What a chain costs: each case yields rows for the table.

A case is a function with the name and the docstring that
`bench/run --list` shows; it gets a Bench and yields Rows. Within a case all that is
compared is open at the same time and takes turns.
"""

import os
import tempfile
from contextlib import ExitStack, contextmanager

from chains import GIB, Chains
from compared import ROOT
from sides import ONE_CPU, Crash, Probe, Row, node, turns


class Bench:
    """The sides, the chains, and how long to measure."""

    def __init__(self, sides, chains, rounds, quick, figures, say):
        self.stock, self.inserted, self.ours = sides
        self.chains, self.rounds, self.quick, self.say = chains, rounds, quick, say
        self.figures = figures
        self.ms = 150 if quick else 300
        # Reads that the page cache can answer are done in the thread that asks:
        # without worker threads, whose wake-ups cost more than all drivers.
        self.aio = 'io_uring' if self.ours.has_io_uring(chains.workspace) else 'threads'
        # The first depth that a side crashes at.
        self.crashes = {}
        # For what takes seconds each time.
        self.few = 2 if quick else 3

    def full_tables(self):
        return self.chains.full_tables(100 if self.quick else 300, 16 * GIB)

    def read_tables(self, tables):
        """Seconds to read all tables of `Chain.list_tables` through QEMU's file driver."""
        with Probe(self.ours, aio=self.aio) as probe:
            return probe.ask(f'tables {tables}')['seconds']

    def reads(self, probes, offsets, queue_depth=1, threads=None):
        """Probes by name take turns. Returns the microseconds for each request
        by the clock, and of CPU time. The first turn of each does not count."""
        def reader(name):
            return lambda: probes[name].read(
                offsets[name] if isinstance(offsets, dict) else offsets,
                self.ms, queue_depth, threads[name] if threads else 0)

        measures = {name: reader(name) for name in probes}
        turns(measures, 1)
        samples = turns(measures, self.rounds)
        return [{name: [both[which] for both in found] for name, found in samples.items()}
                for which in (0, 1)]


@contextmanager
def warm_probes(bench, chains, **options):
    """rqcow2 with each of the chains open and all its tables in memory, by chain."""
    with ExitStack() as stack:
        probes = {chain: stack.enter_context(bench.ours.probe(chain.top, **options)) for chain in chains}
        for chain, probe in probes.items():
            probe.warm(chain.warm)
        yield probes


@contextmanager
def on_disk(bench):
    """Chains on a disk. In memory there is no page cache to go past, nor one
    that io_uring would read from in the thread that asks."""
    with tempfile.TemporaryDirectory(prefix='bench.', dir=os.path.join(ROOT, 'build')) as directory:
        chains = Chains(directory, bench.quick, bench.say)
        one, deep = chains.spread(1), chains.spread(1000)
        # What waits to be written would be in the way of reads.
        os.sync()
        yield one, deep


def read_depth(bench):
    """4 KiB random reads of data and holes by rqcow2, depth 1000 beside depth 1."""
    name = 'depth 1000 against depth 1'
    with on_disk(bench) as (one, deep):
        # The floor: no image, nothing but QEMU's file driver and the kernel.
        files = [chain.places(bench.ours) for chain in (one, deep)]
        for aio in dict.fromkeys(('threads', bench.aio)):
            with warm_probes(bench, (one, deep), aio=aio, under=ONE_CPU) as probes, \
                    ExitStack() as stack:
                offsets = {chain: chain.data for chain in probes}
                for places in files:
                    probe = stack.enter_context(Probe(bench.ours, aio=aio, under=ONE_CPU))
                    probe.go_to_files(places)
                    probes[places], offsets[places] = probe, places
                clock, _ = bench.reads(probes, offsets)
                floor = [clock[places] for places in files]
                yield Row(f'4 KiB random read, aio={aio}: {name}', 'us', clock[deep], clock[one],
                          speed=True, least=0.95 if aio == 'threads' else None)
                yield Row(f'the same of the files alone, aio={aio}: 1000 against one', 'us',
                          floor[1], floor[0], speed=True)
                yield Row(f'4 KiB random read, aio={aio}, times the files alone: {name}', '',
                          quotients(clock[deep], floor[1]), quotients(clock[one], floor[0]),
                          speed=True, least=0.95)
        with warm_probes(bench, (one, deep), aio=bench.aio, under=ONE_CPU) as probes:
            _, cpu = bench.reads(probes, {chain: chain.holes for chain in probes})
        yield Row(f'hole, CPU time: {name}', 'us', cpu[deep], cpu[one], most=1.1)


def quotients(these, those):
    """Of samples of the same rounds."""
    return [this / that for this, that in zip(these, those)]


def read_direct(bench):
    """The reads of data once more past the page cache, from a disk."""
    with on_disk(bench) as (one, deep):
        for aio in dict.fromkeys((bench.aio, 'threads')):
            with warm_probes(bench, (one, deep), aio=aio, direct=True) as probes:
                clock, cpu = bench.reads(probes, {chain: chain.data for chain in probes})
            name = f'4 KiB random read, direct I/O, aio={aio}'
            yield Row(f'{name}: depth 1000 against depth 1', 'us', clock[deep], clock[one],
                      speed=True, least=0.95)
            yield Row(f'{name}, CPU time: depth 1000 against depth 1', 'us', cpu[deep], cpu[one])


def read_raw(bench):
    """4 KiB random reads of data, QD 32, beside a raw file of the same content."""
    for depth in (1, 1000):
        chain = bench.chains.spread(depth)
        with bench.ours.probe(chain.top) as ours, bench.ours.raw(chain.flat) as raw:
            ours.warm(chain.warm)
            raw.warm(chain.warm)
            clock, _ = bench.reads({'ours': ours, 'raw': raw}, chain.data, queue_depth=32)
        yield Row(f'4 KiB random read, QD 32: depth {depth} against a raw file', 'us',
                  clock['ours'], clock['raw'], least=0.90, speed=True)


def read_stock(bench):
    """4 KiB random reads at depth 500, beside unpatched QEMU."""
    chain = bench.chains.spread(500)
    sides = (bench.ours, bench.inserted, bench.stock)
    with ExitStack() as stack:
        probes = {side: stack.enter_context(side.probe(chain.top)) for side in sides}
        for probe in probes.values():
            probe.warm(chain.warm)
        clock, _ = bench.reads(probes, chain.data)
    yield Row('4 KiB random read, depth 500: rqcow2 against unpatched', 'us',
              clock[bench.ours], clock[bench.stock], least=30, speed=True)
    yield Row('4 KiB random read, depth 500: rqcow2 against unpatched + is_inserted', 'us',
              clock[bench.ours], clock[bench.inserted], speed=True)


def reads_hole(bench, side, chain, layer):
    """How a read of a hole through the layers up to this one ends."""
    bench.say(f'{side.name}: a hole through {layer + 1} layers')
    try:
        with side.probe(chain.layer(layer)) as probe:
            probe.warm(chain.first)
            return 'works'
    except Crash as reason:
        return str(reason)


def crash(bench):
    """A read through 1000 layers, and how many layers the others can read through."""
    chain = bench.chains.spread(1000)
    for side in (bench.ours, bench.inserted, bench.stock):
        end = reads_hole(bench, side, chain, chain.depth - 1)
        yield Row(f'hole read, depth {chain.depth}: {side.name}', '', end, '')
        if end == 'works' or bench.quick:
            continue
        works, fails = 1, chain.depth
        while fails - works > 1:
            middle = (works + fails) // 2
            if reads_hole(bench, side, chain, middle - 1) == 'works':
                works = middle
            else:
                fails = middle
        bench.crashes[side] = fails
        yield Row(f'the first depth that crashes: {side.name}', '', str(fails), '')


def threads(bench):
    """Reads of a deep chain from two event loops beside one, on two CPUs."""
    chain = bench.chains.spread(1000)
    null = {'driver': 'null-co', 'size': chain.disk}
    with Probe(bench.ours) as probe:
        samples = turns({n: lambda n=n: probe.spin(bench.ms, n) for n in (1, 2)}, bench.rounds)
    idle = Row('two threads against one, arithmetic', 'us', samples[2], samples[1], speed=True)
    yield idle
    for what, options, offsets, target in (
            ('null-co, no image at all', null, chain.holes, {}),
            ('holes, depth 1000', node(bench.ours.driver, chain.top), chain.holes, {}),
            ('page-cached data, depth 1000', node(bench.ours.driver, chain.top), chain.data,
             {'least': 1.7})):
        with Probe(bench.ours, options, aio=bench.aio) as probe:
            probe.warm(chain.warm)
            clock, _ = bench.reads({1: probe, 2: probe}, offsets, queue_depth=8,
                                   threads={1: 1, 2: 2})
        row = Row(f'two I/O threads against one, {what}', 'us', clock[2], clock[1],
                  speed=True, **target)
        if target and idle.ratio < 1.8 and not row.reached:
            row.least, row.note = None, '  no second CPU to be had'
        yield row


def cold(bench):
    """The first read of each 32 MiB of a disk whose layers have all L2 tables."""
    chain = bench.full_tables()
    name = f'{chain.disk // GIB} GiB, {chain.depth} layers, first read of each 32 MiB'

    def first_reads(side):
        with side.probe(chain.top, aio=bench.aio) as probe:
            return probe.warm(chain.slices)

    samples = turns({'ours': lambda: first_reads(bench.ours),
                     'tables': lambda: bench.read_tables(chain.tables),
                     'stock': lambda: first_reads(bench.stock)}, bench.few)
    yield Row(f'{name}: against reading every L2 table once', 's',
              samples['ours'], samples['tables'], most=2)
    yield Row(f'{name}: rqcow2 against unpatched', 's', samples['ours'], samples['stock'],
              speed=True)


def memory(bench):
    """Resident memory when every L2 table of every layer was touched."""
    chain = bench.full_tables()
    samples = {}
    for side in (bench.ours, bench.inserted, bench.stock):
        samples[side] = []
        for _ in range(bench.few):
            used = []
            # The base alone is a chain of one layer with the same tables.
            for top in (chain.top, chain.layer(0)):
                with side.probe(top) as probe:
                    probe.warm(chain.slices)
                    used.append(probe.status('VmRSS'))
            samples[side].append(used[0] - used[1])
    name = f'memory above depth 1, depth {chain.depth}, {chain.disk // GIB} GiB'
    yield Row(f'{name}: rqcow2 against unpatched', 'MiB', samples[bench.ours],
              samples[bench.stock], most=1 / 15)
    yield Row(f'{name}: unpatched + is_inserted against unpatched', 'MiB',
              samples[bench.inserted], samples[bench.stock])


CASES = [read_depth, read_direct, read_raw, read_stock, crash, threads, cold, memory]
