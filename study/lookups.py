"""What the lookups of a read meet on the way through the layers.

Taken from QEMU's own trace events while qemu-io reads, one request after the
other, so that the order of the events says what belongs to what:

- bdrv_open_common: which node is which layer;
- bdrv_co_preadv_part on a layer: the request has come to it;
- qcow2_cache_get: it looks for an L2 table, in memory at first;
- qcow2_cache_get_read: the table is not there and is read from the file;
- bdrv_co_preadv_part on the file of a layer, when it is not for a table: the
  data are there. If a lower layer is asked instead, they are not.

rqcow2 has counters of its own, which query-blockstats tells.
"""

import array
import re
import subprocess
from collections import Counter

from depth_cases import depths
from job_cases import served

EVENTS = ('bdrv_open_common', 'bdrv_co_preadv_part', 'qcow2_cache_get', 'qcow2_cache_get_read')
LINE = re.compile(r'(\w+) (?:bs (0x[0-9a-f]+)|co 0x[0-9a-f]+)(.*)')


class Walk:
    """Follows the events; counts by (depth below the top, what was met)."""

    def __init__(self, top):
        self.top = int(re.search(r'l(\d+)\.qcow2$', top).group(1))
        self.layers = {}
        self.met = Counter()
        self.at = self.table = None
        self.reading = False
        self.reads = self.table_reads = 0

    def close(self, end):
        """The request has left the layer that it was at."""
        if self.at is not None:
            self.met[self.at, self.table, end] += 1
        self.at = None

    def event(self, name, node, rest):
        if name == 'bdrv_open_common':
            found = re.search(r'l(\d+)\.qcow2".*format_name "qcow2"', rest)
            if found:
                self.layers[node] = self.top - int(found.group(1))
        elif name == 'bdrv_co_preadv_part' and node in self.layers:
            depth = self.layers[node]
            # From the top again: what came before ended at the bottom.
            self.close('unallocated')
            self.reads += depth == 0
            self.at, self.table, self.reading = depth, 'no table', False
        elif self.at is None:
            return
        elif name == 'qcow2_cache_get' and 'is_l2_cache 1' in rest:
            self.table = 'hit'
        elif name == 'qcow2_cache_get_read' and 'is_l2_cache 1' in rest:
            self.table, self.reading = 'miss', True
            self.table_reads += 1
        elif name == 'bdrv_co_preadv_part':
            if self.reading:
                self.reading = False
            else:
                self.close('data')


def walked(side, chain, offsets):
    """What requests of QEMU's own driver meet, a Walk."""
    command = [side.program('qemu-io'), '-r', '-f', side.driver]
    for event in EVENTS:
        command += ['-T', f'enable={event}']
    command += [word for offset in offsets for word in ('-c', f'read -q {offset} 4k')]
    walk = Walk(chain.top)
    with subprocess.Popen([*command, chain.top], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            found = LINE.search(line)
            if found:
                walk.event(found.group(1), found.group(2), found.group(3))
    walk.close('unallocated')
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[0])
    return walk


def asked(side, chain, offsets):
    """The counters of rqcow2 after the same reads through an NBD export."""
    with served(side, chain) as daemon:
        socket = chain.path('nbd.sock')
        side.run('qemu-io', '-r', '-f', 'raw',
                 *[word for offset in offsets for word in ('-c', f'read -q {offset} 4k')],
                 f'nbd+unix:///n0?socket={socket}')
        daemon.ask('query-blockstats', query_nodes=True)
        return next(stats['driver-specific'] for stats in daemon.answer
                    if stats.get('node-name') == 'n0')


def lookups(study, records):
    """Hits, misses, hits on unallocated entries and missing tables, by layer."""
    count = 300 if study.quick else 2000
    for depth in depths(study, 1000, (1, 50, 100, 500), (1, 10, 50, 100, 500, 800)):
        chain = study.chains.spread(depth)
        offsets = array.array('Q')
        with open(chain.data, 'rb') as file:
            offsets.fromfile(file, count)
        walk = walked(study.stock, chain, offsets)
        if walk.reads != count:
            raise ValueError(f'{walk.reads} of {count} reads were seen')
        for what, wanted in (('lookups', lambda key: True),
                             ('hits with data', lambda key: key[1:] == ('hit', 'data')),
                             ('hits, unallocated',
                              lambda key: key[1:] == ('hit', 'unallocated')),
                             ('misses', lambda key: key[1] == 'miss'),
                             ('no table', lambda key: key[1] == 'no table')):
            records.add(study.stock, what, 'each read',
                        sum(n for key, n in walk.met.items() if wanted(key)) / count,
                        depth=depth)
        records.all[-1]['layers'] = [[*key, n / count] for key, n in sorted(walk.met.items())]
        stats = asked(study.ours, chain, offsets)
        for what, value in (('lookups', stats['hits'] + stats['misses']),
                            ('hits with data', stats['hits']), ('misses', stats['misses']),
                            ('slices merged', stats['merged-slices']),
                            ('table reads', stats['table-reads'])):
            records.add(study.ours, what, 'each read', value / count, depth=depth)
        study.chains.drop()


CASES = [lookups]
