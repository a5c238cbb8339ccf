"""What a chain costs over its depth: latency, opening, memory, throughput,
block status, where it crashes.

A case is a function with the name and the docstring that `study/run --list`
shows; it gets the Study and the Records. What is compared at a depth is open at
the same time and takes turns.
"""

import os
import re
import statistics
from contextlib import ExitStack
from functools import partial

from chain_cases import reads_hole
from chains import CLUSTER, MIB, empty_overlay, write_offsets
from context import ENDS
from job_cases import mapped, timed
from sides import turns

GROUPS = ((1, 2, 5, 10, 30), (100, 200, 300, 500), (700, 850, 1000), (3000,), (10000,))
DEPTHS = tuple(depth for group in GROUPS for depth in group)
FEW_DEPTHS = (1, 10, 100, 500, 800, 1000, 3000)


def depths(study, most=10000, few=FEW_DEPTHS, all_=DEPTHS):
    return [depth for depth in (few if study.quick else all_) if depth <= most]


def opened(study, side, chain, records, stack):
    """A probe with the chain open and all its tables known; None if that crashes.

    Records opening, the first read of each 4 MiB, memory and closing."""
    depth = chain.depth
    samples, closed = [], []
    probe = None
    try:
        while len(samples) < study.few and sum(samples) < 1:
            probe = side.probe(chain.top, study.patience, study.aio)
            samples.append(probe.opened)
            closed.append(probe.ask('close')['seconds'])
            probe.end()
        records.add(side, 'open', 's', samples, depth=depth)
        records.add(side, 'close', 's', closed, depth=depth)
        probe = side.probe(chain.top, study.patience, study.aio)
        seconds = probe.warm(chain.warm)
        count = os.path.getsize(chain.warm) // 8
        records.add(side, 'cold', 'us', seconds / count * 1e6, depth=depth)
        records.add(side, 'memory', 'MiB', probe.status('VmRSS'), depth=depth)
        return stack.enter_context(probe)
    except ENDS as reason:
        if probe:
            probe.end()
        known = {record['what'] for record in records.all
                 if record['side'] == side.name and record['depth'] == depth}
        for what in ('open', 'close', 'cold', 'memory', 'hole', 'data'):
            if what not in known:
                records.end(side, what, reason, depth=depth)
        study.gone[side.name] = min(depth, study.gone.get(side.name, depth))
        return None


def latency(study, records):
    """4 KiB reads, cold and warm, opening, closing and memory from depth 1 on."""
    # As many depths as there is room for take turns with each other.
    for group in (FEW_DEPTHS,) if study.quick else GROUPS:
        with ExitStack() as stack:
            probes, data, holes = {}, {}, {}
            for depth in group:
                chain = study.chains.spread(depth)
                for side in study.works(depth):
                    probe = opened(study, side, chain, records, stack)
                    if probe:
                        probes[side, depth] = probe
                        data[side, depth], holes[side, depth] = chain.data, chain.holes
            for what, offsets in (('data', data), ('hole', holes)):
                clock, cpu = study.reads(probes, offsets)
                for side, depth in probes:
                    records.add(side, what, 'us', clock[side, depth], depth=depth)
                    records.add(side, what + ', CPU', 'us', cpu[side, depth], depth=depth)
        study.tidy()


def copy_on_write(study, side, chain, count):
    """Microseconds of a 4 KiB write to a cluster that a new overlay lacks."""
    overlay = chain.path('overlay.qcow2')
    empty_overlay(overlay, chain.disk, chain.top)
    try:
        with side.probe(overlay, study.patience, study.aio) as probe:
            probe.warm(chain.warm)
            # The overlay's first tables and refcounts do not count.
            probe.write(chain.clusters, 8)
            return probe.write(chain.clusters, count)
    finally:
        os.remove(overlay)


def sequential(study, side, chain, size):
    """MiB/s of reads from the start of the disk on, four at a time, in a fresh process."""
    count = min(chain.disk, 64 * MIB) // size
    said = side.run('qemu-img', 'bench', '-f', side.driver, '-i', study.aio, '-t', 'writeback',
                    '-c', str(count), '-d', '4', '-s', str(size), chain.top)
    return count * size / MIB / float(
        re.search(r'completed in ([0-9.]+) seconds', said).group(1))


def warm(study, side, chain, records):
    """A probe that has been to all tables; None if that crashes it."""
    probe = None
    try:
        probe = side.probe(chain.top, study.patience, study.aio)
        probe.warm(chain.warm)
        return probe
    except ENDS as reason:
        if probe:
            probe.end()
        for what in ('random', 'sequential', 'copy-on-write'):
            records.end(side, what, reason, depth=chain.depth)
        study.gone[side.name] = min(chain.depth, study.gone.get(side.name, chain.depth))
        return None


def throughput(study, records):
    """Sequential and random reads with many requests under way; copy-on-write."""
    for group in ((1, 30, 300, 800, 1000),) if study.quick else GROUPS[:-1]:
        chains = {depth: study.chains.spread(depth) for depth in group}
        with ExitStack() as stack:
            probes = {}
            for depth, chain in chains.items():
                for side in study.works(depth):
                    probe = warm(study, side, chain, records)
                    if probe:
                        probes[side, depth] = stack.enter_context(probe)
            clock, _ = study.reads(probes, {key: chains[key[1]].data for key in probes},
                                   queue_depth=32)
            for side, depth in probes:
                records.add(side, 'random', 'op/s', [1e6 / us for us in clock[side, depth]],
                            depth=depth)
        for depth, chain in chains.items():
            chain.clusters = chain.path('clusters')
            write_offsets(chain.clusters, range(0, chain.disk, CLUSTER))
            samples = turns({
                (what, side): partial(call, study, side, chain, last)
                for what, call, last in (('sequential', sequential, MIB),
                                         ('copy-on-write', copy_on_write,
                                          32 if depth > 200 else 256))
                for side, there in probes if there == depth},
                1 if depth > 500 else study.few + 1)
            for (what, side), values in samples.items():
                records.add(side, what, 'MiB/s' if what == 'sequential' else 'us', values,
                            depth=depth)
        study.tidy()


def status(study, records):
    """Block status: qemu-img map from the first extent to the last; convert."""
    for depth in depths(study, 3000, (1, 10, 100, 300, 1000)):
        chain = study.chains.spread(depth)
        out = chain.path('out.raw')
        for side in study.works(depth):
            if side is not study.ours and depth > (300 if study.quick else 850):
                continue
            records.add(side, 'map', 's', [mapped(side, chain.top)
                                           for _ in range(study.few)], depth=depth)
            if depth <= 1000:
                idle = [timed(side, 'qemu-img', 'bench', '-f', side.driver, '-t', 'writeback',
                              '-c', '1', chain.top) for _ in range(study.few)]
                whole = [timed(side, 'qemu-img', 'convert', '-f', side.driver, '-O', 'raw',
                               chain.top, out) for _ in range(study.few)]
                least = statistics.median(idle)
                records.add(side, 'convert', 's', [max(value - least, 1e-3) for value in whole],
                            depth=depth)
                os.remove(out)
        study.tidy()


def crash(study, records):
    """Reads a hole through ever more layers until the process dies."""
    chain = study.chains.spread(1000)
    exact = 25 if study.quick else 1
    for side in (study.ours, study.inserted, study.stock):
        end = reads_hole(study, side, chain, chain.depth - 1)
        if end == 'works':
            records.add(side, 'works', 'layers', chain.depth)
            continue
        # Both die somewhere here; if not, the search starts from depth 1.
        works, fails = 850, chain.depth
        if reads_hole(study, side, chain, works - 1) != 'works':
            works, fails = 1, works
        while fails - works > exact:
            middle = (works + fails) // 2
            if reads_hole(study, side, chain, middle - 1) == 'works':
                works = middle
            else:
                fails = middle
        records.add(side, 'works', 'layers', works)
        records.add(side, 'crashes', 'layers', fails, signal=end)


CASES = [latency, throughput, status, crash]
