"""Curves over depth: what a read, opening, memory and a snapshot cost."""

import os
import statistics
from contextlib import ExitStack

import svg
from job_cases import snapshots
from sides import Crash, Slow

DEPTHS = (1, 10, 30, 100, 300, 500, 800, 1000, 3000)
FEW_DEPTHS = (1, 10, 100, 300, 1000)

# Name, file, title, what the left axis is, how many of the unit of the axis
# (microseconds, MiB) one of the samples is, and how it is written.
CURVES = {
    'read': ('A 4 KiB random read', 'time, queue depth 1, data in the page cache, io_uring', 1,
             svg.duration),
    'open': ('Opening a chain', 'time', 1e6, svg.duration),
    'memory': ('Memory of a process that has a chain open',
               'resident, 1 GiB disk, every L2 table touched', 1, svg.memory),
    'snapshot': ('Taking one more snapshot', 'time of blockdev-snapshot', 1e6, svg.duration),
}


class Point:
    """What one side does at one depth: values, or why there is none."""

    def __init__(self, side, depth):
        self.side, self.depth = side, depth
        self.values = {}
        self.ends = {}

    def __str__(self):
        shown = []
        for name, (_, _, unit, text) in CURVES.items():
            if name in self.values:
                value = text(float(f'{self.values[name] * unit:.3g}'))
            else:
                value = self.ends.get(name, '')
            shown.append(f'{name} {value:>10}')
        return f'depth {self.depth:4}  {self.side.name:24} ' + '  '.join(shown)

    def record(self):
        return {'curve': self.side.name, 'depth': self.depth, 'values': self.values,
                'ends': self.ends}


def opened(bench, side, chain, patience, point):
    """A probe with the chain open and warm, or None."""
    samples = []
    probe = None
    try:
        # What takes long is not so much at the mercy of the moment.
        while len(samples) < bench.few - 1 and sum(samples) < 1 and chain.depth < 1000:
            with side.probe(chain.top, patience) as probe:
                samples.append(probe.opened)
        probe = None
        probe = side.probe(chain.top, patience, bench.aio)
        samples.append(probe.opened)
        point.values['open'] = statistics.median(samples)
        probe.warm(chain.warm)
        point.values['memory'] = probe.status('VmRSS')
        return probe
    except (Crash, Slow) as reason:
        if probe:
            probe.end()
        for name in ('open', 'memory', 'read'):
            if name not in point.values:
                point.ends[name] = str(reason)
    return None


def measure(bench, sides, chain, patience):
    """All sides at one depth; for reads they take turns."""
    points = {side: Point(side, chain.depth) for side in sides}
    with ExitStack() as stack:
        probes = {}
        for side, point in points.items():
            bench.say(f'depth {chain.depth}: {side.name}')
            probe = opened(bench, side, chain, patience, point)
            if probe:
                probes[side] = stack.enter_context(probe)
        clock, _ = bench.reads(probes, chain.data)
        for side, samples in clock.items():
            points[side].values['read'] = statistics.median(samples)
    for side, point in points.items():
        if 'open' in point.ends:
            point.ends['snapshot'] = point.ends['open']
            continue
        try:
            _, taken = snapshots(side, chain, 5, patience)
            point.values['snapshot'] = statistics.median(taken)
        except (Crash, Slow) as reason:
            point.ends['snapshot'] = str(reason)
    return list(points.values())


def curves(bench):
    """What reads, opening, memory and snapshots cost from depth 1 to 3000."""
    patience = 40 if bench.quick else 150
    points = []
    given_up = set()
    sides = (bench.stock, bench.inserted, bench.ours)
    bench.chains.drop()
    for depth in FEW_DEPTHS if bench.quick else DEPTHS:
        chain = bench.chains.spread(depth)
        for point in measure(bench, [side for side in sides if side not in given_up], chain,
                             patience):
            yield point
            points.append(point)
            if 'open' in point.ends:
                given_up.add(point.side)
        bench.chains.drop()
    os.makedirs(bench.figures, exist_ok=True)
    for name, (title, axis, unit, text) in CURVES.items():
        lines = []
        for side in sides:
            own = [point for point in points if point.side is side]
            crash = min((point.depth for point in own
                         if point.ends.get(name, '').startswith('SIG')), default=None)
            if crash:
                crash = min(crash, bench.crashes.get(side, crash))
            lines.append((side.name, [(point.depth, point.values[name] * unit) for point in own
                                      if name in point.values], crash))
        with open(os.path.join(bench.figures, f'{name}.svg'), 'w', encoding='utf-8') as file:
            file.write(svg.chart(title, axis, lines, text))
        bench.say(f'drew {os.path.relpath(file.name)}')


CASES = [curves]
