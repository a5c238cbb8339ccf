"""The tables of the guest, and the set-up beside the paper's."""

from context import NAMES
from tables import INSERTED, NOTHING, OURS, STOCK, digits, ratio, shown, table

ROWS = (('fio sequential', 'read KiB/s', 'fio, 1 MiB sequential reads, QD 4'),
        ('fio random-1', 'read op/s', 'fio, 4 KiB random reads, QD 1'),
        ('fio random-32', 'read op/s', 'fio, 4 KiB random reads, QD 32'),
        ('fio mixed', 'read op/s', 'fio, 4 KiB 70 % reads, QD 8: reads'),
        ('fio mixed', 'write op/s', 'the same: writes'),
        ('database uniform', 'op/s', 'RocksDB, reads, all records alike'),
        ('database skewed', 'op/s', 'RocksDB, reads, some much more often'),
        ('database mixed', 'op/s', 'RocksDB, 95 % reads, 5 % writes'))


def value(results, side, what, unit=None, depth=500):
    wanted = {'unit': unit} if unit else {}
    return results.value('guest', side=side, what=what, depth=depth, **wanted)


def speeds(results):
    rows = []
    for what, unit, name in ROWS:
        values = [value(results, side, what, unit) for side in NAMES]
        if unit == 'read KiB/s':
            values = [found / 1024 if found is not None else None for found in values]
            unit = 'MiB/s'
        one = value(results, STOCK, what, 'read KiB/s' if unit == 'MiB/s' else unit, 1)
        rows.append([name, *(shown(found, unit.replace('read ', '').replace('write ', ''))
                             for found in values),
                     ratio(values[2], values[0]), ratio(values[2], values[1]),
                     shown(one / 1024 if unit == 'MiB/s' and one else one,
                           unit.replace('read ', '').replace('write ', ''))])
    return table(['500 layers', *NAMES, 'times unpatched', 'times + is_inserted',
                  'unpatched, 1 layer'], rows)


def memory(results):
    rows = []
    for what, name in (('memory at first', 'after boot and mount'),
                       ('memory after reads', 'a block of each 32 MiB read'),
                       ('memory', 'at the end')):
        values = [value(results, side, what) for side in NAMES]
        rows.append([name, *(shown(found, 'MiB') for found in values),
                     ratio(values[0], values[2]), shown(value(results, STOCK, what, depth=1),
                                                        'MiB')])
    return table(["QEMU's memory besides the guest's", *NAMES, 'times less',
                  'unpatched, 1 layer'], rows)


def gain(results, what, than=STOCK):
    ours, stock = (value(results, side, what, 'op/s') for side in (OURS, than))
    return f'+{digits((ours / stock - 1) * 100)} %' if ours and stock else NOTHING


def beside(results):
    """The paper's set-up and result, and ours."""
    found = results.records('guest', depth=500)
    if not found:
        return NOTHING
    facts = found[0]
    stock, ours = (value(results, side, 'memory') for side in (STOCK, OURS))
    one = value(results, STOCK, 'memory', depth=1)
    less = ratio(stock, ours)
    above = ratio(stock - one, ours - one) if ours and one and ours > one else NOTHING
    return table(['', 'SVD, as published', 'here'], [
        ['QEMU', '4.2 with the format changed, beside 4.2; both with coroutine stacks of 1 GiB',
         '10.0 with rqcow2, beside unpatched 10.0; stacks as they are'],
        ['images', 'a format of its own: QEMU cannot open the overlays', 'plain qcow2'],
        ['guest', '4 CPUs, 4 GiB, KVM, IDE disk, page cache',
         f'1 CPU, 512 MiB, {facts["accelerator"].upper()}, virtio-blk with an I/O thread, '
         'direct reads'],
        ['disk', '50 GB, 64 KiB clusters', '50 GiB, 64 KiB clusters'],
        ['chain', '500 layers, filled through the guest: each layer one piece',
         '500 layers, the clusters dealt out at random'],
        ['database', '1 000 000 records of 50 fields of 50 bytes; YCSB-C reads 500 000 times '
         '(of 1000 records, as the scripts stand)',
         f'{digits(facts["count"])} records of 2500 bytes; db_bench reads for '
         f'{facts["seconds"]} s'],
        ['caches for tables', "3.5 MiB; what each layer of the baseline gets of it is not clear",
         'defaults: 32 MiB for a chain, and for each layer of the baseline'],
        ['RocksDB, reads', '+48 %', gain(results, 'database uniform')
         + ' (all records alike), ' + gain(results, 'database skewed') + ' (skewed); beside '
         'unpatched + is_inserted ' + gain(results, 'database uniform', INSERTED) + ' and '
         + gain(results, 'database skewed', INSERTED)],
        ["memory besides the guest's", '2466 and 163 MB: 15 times less',
         f'{shown(stock, "MiB")} and {shown(ours, "MiB")}: {less} times less; above what one '
         f'layer takes: {above} times less'],
    ])
