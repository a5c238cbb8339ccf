"""The tables and the single values of the text; each takes the Results."""

from context import NAMES

STOCK, INSERTED, OURS = NAMES
NOTHING = '-'


def digits(value):
    """Three of them, thousands apart."""
    value = float(f'{value:.3g}')
    return (f'{value:,.0f}' if value >= 1000 else f'{value:g}').replace(',', ' ')


def shown(value, unit):
    """A value with its unit, times and sizes in the unit that suits."""
    if value is None:
        return NOTHING
    steps = {'us': ((1, 'µs'), (1e3, 'ms'), (1e6, 's')),
             's': ((1e-6, 'µs'), (1e-3, 'ms'), (1, 's'))}.get(unit)
    if not steps:
        return f'{digits(value)} {unit}'.replace('each read', '').strip()
    factor, name = next((step for step in steps if value < step[0] * 1000), steps[-1])
    return f'{digits(value / factor)} {name}'


def cell(results, case, **wanted):
    """The value, or how it ended."""
    found = results.records(case, **wanted)
    if not found:
        return NOTHING
    record = found[0]
    if record['value'] is None:
        end = record['end']
        return '**crashes**' if end.startswith('SIG') else end.split(':')[0]
    return shown(record['value'], record['unit'])


def ratio(first, second):
    """How many times as large."""
    if not first or not second:
        return NOTHING
    return f'{digits(first / second)}'


def table(head, rows):
    return '\n'.join(['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head),
                      *('| ' + ' | '.join(row) + ' |' for row in rows)])


def over_depth(results, case, kinds, **wanted):
    """One block of rows for each kind, a row for each side, a column for each depth."""
    found = sorted({record['depth'] for record in results.records(case, **wanted)
                    if record['what'] in kinds})
    rows = []
    for what, name in kinds.items():
        for side in NAMES:
            cells = [cell(results, case, what=what, side=side, depth=depth, **wanted)
                     for depth in found]
            if any(text != NOTHING for text in cells):
                rows.append([name, side, *cells])
                name = ''
    return table(['', 'layers:', *(str(depth) for depth in found)], rows)


def machine(results):
    rows = []
    first = next(iter(results.cases.values()))
    facts = first['machine']
    rows = [('processor', f'{facts["cpus"]} CPUs: {facts["cpu"]}'),
            ('kernel', f'Linux {facts["kernel"]}'),
            *((f'QEMU, {side}', text.removeprefix('qemu-img version ').split(' Copyright')[0])
              for side, text in facts['qemu'].items()),
            ('files are read with', f'aio={first["aio"]}'),
            ('form', 'quick: fewer depths, smaller images, shorter runs'
             if any(case['quick'] for case in results.cases.values()) else 'whole'),
            ('measured', ', '.join(sorted({case['date'] for case in results.cases.values()}))
             + f', in {round(sum(case["seconds"] for case in results.cases.values()) / 60)} min')]
    return table(['', ''], rows)


def short(results):
    """What stands out, unpatched beside rqcow2, at the greatest depths of both."""
    rows = []
    for case, what, name, wanted in (
            ('latency', 'data', '4 KiB random read of data', {}),
            ('latency', 'hole', '4 KiB read of a hole', {}),
            ('throughput', 'sequential', '1 MiB sequential reads', {}),
            ('throughput', 'copy-on-write', '4 KiB write, copy-on-write', {}),
            ('latency', 'open', 'opening', {}),
            ('jobs', 'snapshot', 'blockdev-snapshot', {}),
            ('jobs', 'block-stream', 'block-stream of all', {}),
            ('status', 'convert', 'qemu-img convert', {}),
            ('memory', 'resident', 'memory, 16 GiB disk, all tables touched',
             {'disk': 16, 'share': 1})):
        depths = [r['depth'] for r in results.records(case, what=what, side=STOCK, **wanted)
                  if r['value'] is not None]
        if not depths:
            continue
        deep = {'what': what, 'depth': max(depths), **wanted}
        one = cell(results, case, side=STOCK, what=what, depth=1, **wanted)
        rows.append([name, str(max(depths)), *(cell(results, case, side=side, **deep)
                                               for side in NAMES), one])
    return table(['', 'layers', *NAMES, 'unpatched, 1 layer'], rows)


def latency(results):
    return over_depth(results, 'latency', {
        'data': 'data, warm', 'hole': 'hole, warm', 'hole, CPU': 'hole, warm, CPU time',
        'cold': 'first read of each 4 MiB'})


def opening(results):
    return over_depth(results, 'latency', {'open': 'open', 'close': 'close'})


def throughput(results):
    return over_depth(results, 'throughput', {
        'random': '4 KiB random, QD 32', 'sequential': '1 MiB sequential, QD 4',
        'copy-on-write': '4 KiB write, copy-on-write'})


def status(results):
    return over_depth(results, 'status', {'map': 'map', 'convert': 'convert'})


def jobs(results):
    kinds = {'snapshot': 'snapshot'}
    for job in ('block-stream', 'block-commit'):
        kinds |= {job: job, f'{job}: before': 'client before it',
                  f'{job}: while': 'client while it runs', f'{job}: slowest': 'slowest 50 ms'}
    return over_depth(results, 'jobs', kinds)


def streaming(results):
    rows = []
    for depth, data, times in sorted({(r['depth'], r['data'], r['times'])
                                      for r in results.records('streaming')}):
        row = [str(depth), f'{data} MiB', f'{data * times} MiB']
        for side in NAMES:
            wanted = {'side': side, 'depth': depth, 'data': data, 'times': times}
            before, during = (results.value('streaming', what=f'block-stream: {name}', **wanted)
                              for name in ('before', 'while'))
            row += [cell(results, 'streaming', what='block-stream', **wanted),
                    f'{digits(during)} op/s ({round(during / before * 100)} %)'
                    if before and during else NOTHING]
        rows.append(row)
    return table(['layers', 'data', 'with what is hidden',
                  *(text for side in NAMES for text in (side, 'client meanwhile'))], rows)


def crash(results):
    rows = []
    for side in NAMES:
        works, fails = (results.value('crash', side=side, what=what)
                        for what in ('works', 'crashes'))
        if works is not None:
            signal = [r.get('signal', '') for r in results.records('crash', side=side,
                                                                   what='crashes')]
            rows.append([side, digits(works),
                         f'{digits(fails)} ({signal[0]})' if fails else 'none up to there'])
    return table(['', 'a read works through', 'crashes at'], rows)


def causes(results):
    rows = []
    parts = list(dict.fromkeys(r['cause'] for r in results.records('causes') if 'cause' in r))
    for what in ('hole', 'data'):
        for depth in results.settings('causes', 'depth'):
            for side in NAMES:
                values = [results.value('causes', what=what, side=side, depth=depth, cause=part)
                          for part in parts]
                if None not in values:
                    rows.append([what, str(depth), side, digits(sum(values)),
                                 *(f'{digits(value)}' for value in values)])
    return table(['', 'layers', '', 'instructions', *parts], rows)


def largest(results):
    """The functions that take most, at the greatest depth that all sides were counted at."""
    found = [r for r in results.records('causes', what='hole') if 'largest' in r]
    depths = [r['depth'] for r in found if r['side'] == STOCK]
    if not depths:
        return NOTHING
    columns = []
    for side in NAMES:
        best = next(r['largest'] for r in found
                    if r['side'] == side and r['depth'] == max(depths))
        columns.append([f'`{name[:44]}` {digits(cost)}' for name, cost in best[:6]])
    return table([f'{side}, {max(depths)} layers' for side in NAMES], zip(*columns))


def lookups(results):
    kinds = {'lookups': 'lookups', 'hits with data': 'hits with data',
             'hits, unallocated': 'hits on unallocated entries', 'misses': 'misses',
             'no table': 'layer without a table', 'table reads': 'pieces of tables read'}
    return over_depth(results, 'lookups', kinds)


def memory(results):
    rows = []
    for disk in results.settings('memory', 'disk'):
        for depth in results.settings('memory', 'depth', disk=disk, share=1):
            values = [results.value('memory', disk=disk, depth=depth, side=side, share=1)
                      for side in NAMES]
            rows.append([f'{disk} GiB', str(depth), *(shown(value, 'MiB') for value in values)])
    return table(['disk', 'layers', *NAMES], rows)


def touched(results):
    rows = []
    for disk in results.settings('memory', 'disk'):
        for share in (0, 0.25, 1):
            cells = [cell(results, 'memory', disk=disk, depth=100, side=side, share=share)
                     for side in NAMES]
            if any(text != NOTHING for text in cells):
                rows.append([f'{disk} GiB', f'{share:.0%}'.replace('%', ' %'), *cells])
    return table(['disk, 100 layers', 'of the tables touched', *NAMES], rows)


def cache_size(results):
    rows = []
    for what, name in (('hole', 'warm read'), ('resident', 'resident memory')):
        for side in NAMES:
            rows.append([name if side == STOCK else '', side, *(
                cell(results, 'cache_size', what=what, side=side, budget=budget)
                for budget in results.settings('cache_size', 'budget'))])
    return table(['', 'memory for tables:', *(f'{budget} MiB' for budget in
                                              results.settings('cache_size', 'budget'))], rows)
