"""The figures: each function takes the Results and returns title and SVG."""

import svg
from context import NAMES
from draw import stacked


def lines(results, case, what, scale=1, key='depth', **wanted):
    """What svg.chart() draws: a line for each side, and where it crashed."""
    found = []
    for side in NAMES:
        own = results.records(case, what=what, side=side, **wanted)
        points = sorted((record[key], record['value'] * scale) for record in own
                        if record['value'] is not None)
        crashes = [record[key] for record in own if record.get('end', '').startswith('SIG')]
        known = results.value('crash', side=side, what='crashes')
        if key == 'depth' and crashes and known:
            crashes.append(round(known))
        found.append((side, points, min(crashes, default=None) if key == 'depth' else None))
    return found


def rounded(text):
    return lambda value: text(float(f'{value:.3g}'))


def count(value):
    return (f'{value:,.0f}' if value >= 1 else f'{value:g}').replace(',', ' ')


def curve(title, axis, case, what, scale, text, **wanted):
    def draw(results):
        drawn = lines(results, case, what, scale, **wanted)
        if sum(len(points) for _, points, _ in drawn) < 2:
            return None
        return title, svg.chart(title, axis, drawn, rounded(text))
    return draw


def causes(what):
    def draw(results):
        records = results.records('causes', what=what)
        if not records:
            return None
        parts = list(dict.fromkeys(record['cause'] for record in records if 'cause' in record))
        groups = []
        for depth in results.settings('causes', 'depth'):
            bars = []
            for side in NAMES:
                values = [results.value('causes', what=what, side=side, depth=depth, cause=part)
                          for part in parts]
                if None not in values:
                    bars.append((side, values))
            groups.append((f'{depth} layers' if depth > 1 else '1 layer', bars))
        title = f'Instructions for a 4 KiB read of {"a hole" if what == "hole" else "data"}'
        return title, stacked(title, 'user space, by what they are for; each group has its own '
                              'scale', parts, groups)
    return draw


def walk(results):
    """What lookups meet at each tenth of the chain, unpatched."""
    parts = ('found the data', 'nothing here: the next layer', 'table not in memory', 'no table')
    records = [record for record in results.records('lookups', side=NAMES[0], what='no table')
               if record['depth'] >= 50]
    if not records:
        return None
    groups = []
    for record in records[-2:]:
        depth, tenths = record['depth'], [[0] * len(parts) for _ in range(10)]
        for layer, table, end, each in record['layers']:
            part = 2 if table == 'miss' else 3 if table == 'no table' else end == 'unallocated'
            tenths[layer * 10 // depth][int(part)] += each
        groups.append((f'{depth} layers: lookups for each read', [
            (f'layers {n * depth // 10 + 1} to {(n + 1) * depth // 10}', values)
            for n, values in enumerate(tenths)]))
    title = 'What the lookups of a read meet on the way, unpatched'
    return title, stacked(title, 'counted from trace events; layers from the top down', parts,
                          groups)


def budgets(results):
    drawn = lines(results, 'cache_size', 'hole', key='budget')
    if not any(points for _, points, _ in drawn):
        return None
    title = 'A read that goes to all layers, over the memory for tables'
    return title, svg.chart(title, 'time, warm, queue depth 1', drawn, rounded(svg.duration),
                            'MiB for the L2 tables of all layers together')


FIGURES = {
    'data': curve('A 4 KiB random read of data', 'time, warm, queue depth 1', 'latency', 'data',
                  1, svg.duration),
    'hole': curve('A 4 KiB read of a hole', 'time, warm, queue depth 1: all lookup, no data',
                  'latency', 'hole', 1, svg.duration),
    'cold': curve('The first read of each 4 MiB', 'time for each, a fresh process, queue depth 1',
                  'latency', 'cold', 1, svg.duration),
    'random': curve('4 KiB random reads, queue depth 32', 'requests a second', 'throughput',
                    'random', 1, count),
    'sequential': curve('1 MiB sequential reads, queue depth 4', 'MiB a second', 'throughput',
                        'sequential', 1, count),
    'cow': curve('A 4 KiB write that copies a cluster', 'time, queue depth 1, into a new overlay',
                 'throughput', 'copy-on-write', 1, svg.duration),
    'open': curve('Opening a chain', 'time', 'latency', 'open', 1e6, svg.duration),
    'close': curve('Closing a chain', 'time', 'latency', 'close', 1e6, svg.duration),
    'map': curve('Block status of a whole disk', 'time of qemu-img map from its first extent to '
                 'its last', 'status', 'map', 1e6, svg.duration),
    'convert': curve('Copying a whole disk', 'time of qemu-img convert to a raw file, less open '
                     'and close', 'status', 'convert', 1e6, svg.duration),
    'snapshot': curve('Taking one more snapshot', 'time of blockdev-snapshot', 'jobs', 'snapshot',
                      1e6, svg.duration),
    'stream': curve('Streaming a whole chain into its top', 'time of block-stream, with a client '
                    'that reads', 'jobs', 'block-stream', 1e6, svg.duration),
    'commit': curve('Committing a whole chain into its base', 'time of block-commit, with a client '
                    'that reads', 'jobs', 'block-commit', 1e6, svg.duration),
    'stream-guest': curve('Reads of a client while the chain is streamed', 'requests a second, '
                          '4 KiB, queue depth 1, over NBD', 'jobs', 'block-stream: while', 1,
                          count),
    'commit-guest': curve('Reads of a client while the chain is committed', 'requests a second, '
                          '4 KiB, queue depth 1, over NBD', 'jobs', 'block-commit: while', 1,
                          count),
    'streaming': curve('Streaming 64 MiB of data', 'time of block-stream, with a client that reads',
                       'streaming', 'block-stream', 1e6, svg.duration, data=64, times=1),
    'memory': curve('Memory of a process that has a chain open', 'resident, 16 GiB disk, every '
                    'L2 table touched', 'memory', 'resident', 1, svg.memory, disk=16, share=1),
    'memory-small': curve('The same for a disk of 4 GiB', 'resident, every L2 table touched',
                          'memory', 'resident', 1, svg.memory, disk=4, share=1),
    'cache-size': budgets,
    'causes-hole': causes('hole'),
    'causes-data': causes('data'),
    'lookups': walk,
}
