"""What the lookups of a read meet on the way through the layers.

Taken from QEMU's own trace events while qemu-io reads, one request after the
other, so that the order of the events says what belongs to what:

- bdrv_open_common: which node is which layer;
- bdrv_co_preadv_part on a layer: the request has come to it;
- qcow2_cache_get: it looks for an L2 table, in memory at first;
- qcow2_cache_get_read: the table is not there and is read from the file;
- bdrv_co_preadv_part on the file of a layer, when it is not for a table: the
  data are there. If a lower layer is asked instead, they are not.

rqcow2 has an event for each piece of a read, rqcow2_read, when it knows where
the data are; what it reads from files before that are tables.
"""

import array
import re
import subprocess
from collections import Counter

from depth_cases import depths

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
            found = re.search(r'l(\d+)\.qcow2".*format_name "r?qcow2"', rest)
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


class Resolved(Walk):
    """Follows those of rqcow2: one lookup for each piece of a read, which may
    have to read tables first."""

    def __init__(self, top):
        super().__init__(top)
        self.lookups = self.hits = self.misses = self.file_reads = 0
        self.depths = Counter()

    def event(self, name, node, rest):
        if name == 'bdrv_open_common':
            super().event(name, node, rest)
        elif name == 'bdrv_co_preadv_part':
            if node in self.layers:
                self.reads += 1
                self.file_reads = 0
            elif self.reads:
                self.file_reads += 1
        elif name == 'rqcow2_read':
            # What was read from files before it is known where the data are.
            self.lookups += 1
            self.misses += self.file_reads > 0
            self.hits += self.file_reads == 0
            self.table_reads += self.file_reads
            self.depths[int(re.search(r' depth (\d+)', rest).group(1))] += 1


def events_of(side, chain, offsets, walk):
    """What the requests of a side meet: a Walk that has followed its events."""
    command = [side.program('qemu-io'), '-r', '-f', side.driver]
    for event in EVENTS + (('rqcow2_read',) if side.driver == 'rqcow2' else ()):
        command += ['-T', f'enable={event}']
    command += [word for offset in offsets for word in ('-c', f'read -q {offset} 4k')]
    with subprocess.Popen([*command, chain.top], stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            found = LINE.search(line)
            if found:
                walk.event(found.group(1), found.group(2), found.group(3))
    walk.close('unallocated')
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[0])
    if walk.reads != len(offsets):
        raise ValueError(f'{walk.reads} of {len(offsets)} reads were seen')
    return walk


def lookups(study, records):
    """Hits, misses, hits on unallocated entries and missing tables, by layer."""
    count = 300 if study.quick else 2000
    for depth in depths(study, 1000, (1, 50, 100, 500), (1, 10, 50, 100, 500, 800)):
        chain = study.chains.spread(depth)
        offsets = array.array('Q')
        with open(chain.data, 'rb') as file:
            offsets.fromfile(file, count)
        walk = events_of(study.stock, chain, offsets, Walk(chain.top))
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
        walk = events_of(study.ours, chain, offsets, Resolved(chain.top))
        for what, value in (('lookups', walk.lookups), ('hits with data', walk.hits),
                            ('misses', walk.misses), ('table reads', walk.table_reads)):
            records.add(study.ours, what, 'each read', value / count, depth=depth)
        records.all[-1]['depths'] = [[key, n / count] for key, n in sorted(walk.depths.items())]
        study.tidy()


CASES = [lookups]
