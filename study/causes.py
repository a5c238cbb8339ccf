"""Where the instructions of a read go: callgrind counts them, function by function.

Counting, not sampling: the numbers are those of the user-space code of the
process, the same in each run, without hardware counters (virtual machines
often have none). The kernel's part of a request is not in them.
"""

import array
import glob
import os
import re
import subprocess
from collections import Counter

from context import ENDS
from sides import Probe, node

# What a function's own instructions count as: the first that matches its name.
CAUSES = (
    ('insertion test', r'.*is_inserted|.*is_available|assert_bdrv_graph_readable'),
    ('table lookups', r'qcow2_get_host_offset|qcow2_cache_|l2_load|l2_|qcow2_get_|offset_to_|'
                      r'.*rust_qcow2|.*qemu_glue|<.*rqcow2|rqcow2_|core::|alloc::|std::|'
                      r'<core|<alloc|<std|_ZN|_R'),
    ('request tracking', r'tracked_request|bdrv_(inc|dec)_in_flight|bdrv_wait_serialising|'
                         r'bdrv_make_request_serialising|qemu_co_mutex_|qemu_mutex_|qemu_lockcnt|'
                         r'pthread_mutex|__pthread_mutex|.*mutex_(un)?lock|bdrv_check_qiov|'
                         r'bdrv_check_request|bdrv_pad_request|bdrv_find_overlapping|'
                         r'qemu_co_queue|.*graph_rd(un)?lock|bdrv_graph_co_rd'),
    ('memory copies', r'.*memcpy|.*memset|.*memmove|qemu_iovec_|iov_|buffer_is_zero'),
    ('passing on', r'bdrv_|qcow2_|blk_|raw_|aio_task_'),
    ('rest', r''),
)


def cause(function):
    return next(name for name, pattern in CAUSES if re.match(pattern, function))


def own_instructions(path):
    """Of each function, from a file that callgrind wrote."""
    names, costs = {}, Counter()
    current, skip = None, False

    def name_of(text):
        number, _, name = text.partition(' ')
        if name:
            # 'NUMBER: how often it is on the stack already.
            names[number] = re.sub(r"'\d+$", '', name)
        return names[number]

    with open(path, encoding='utf-8', errors='replace') as file:
        for line in file:
            line = line.rstrip('\n')
            if line.startswith('fn='):
                current = name_of(line[3:])
            elif line.startswith('cfn='):
                name_of(line[4:])
            elif line.startswith('calls='):
                # The next line has what the called function took in all.
                skip = True
            elif line and line[0] in '0123456789+-*':
                if not skip:
                    costs[current] += int(line.split()[1])
                skip = False
    return costs


def counted(study, side, chain, offsets):
    """Own instructions of each function while the probe reads at the offsets."""
    out = study.path('callgrind')
    for name in glob.glob(out + '*'):
        os.remove(name)
    wrapper = ('valgrind', '--quiet', '--tool=callgrind', '--instr-atstart=no',
               f'--callgrind-out-file={out}')

    def control(word, process):
        subprocess.run(['callgrind_control', '-i', word, str(process.pid)], check=True,
                       stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)

    with Probe(side, node(side.driver, chain.top), study.patience * 3, under=wrapper) as probe:
        probe.warm(chain.warm)
        probe.warm(offsets)
        control('on', probe.process)
        probe.warm(offsets)
        control('off', probe.process)
        # It writes its file when it ends by itself.
        probe.process.stdin.close()
        probe.process.wait()
    return sum((own_instructions(name) for name in glob.glob(out + '*')), Counter())


def some(source, path, count):
    """The first of a list of offsets, as a list of its own."""
    offsets = array.array('Q')
    with open(source, 'rb') as file:
        offsets.fromfile(file, count)
    with open(path, 'wb') as file:
        offsets.tofile(file)
    return path


def causes(study, records):
    """Instructions for each 4 KiB read, by what they are for, over depth."""
    for depth in (1, 10, 100, 300) if study.quick else (1, 10, 30, 100, 300, 500, 800, 1000):
        chain = study.chains.spread(depth)
        for what, source in (('hole', chain.holes), ('data', chain.data)):
            count = 200 if depth <= 100 else 40
            offsets = some(source, chain.path('some'), count)
            for side in study.sides:
                if side is not study.ours and depth > 800:
                    continue
                try:
                    found = counted(study, side, chain, offsets)
                except ENDS as reason:
                    records.end(side, what, reason, depth=depth)
                    continue
                total = Counter()
                for function, cost in found.items():
                    total[cause(function)] += cost
                for name, _ in CAUSES:
                    records.add(side, what, 'instructions', total[name] / count, depth=depth,
                                cause=name)
                records.all[-1]['largest'] = [
                    [function, round(cost / count)] for function, cost in found.most_common(12)]
        study.tidy()


CASES = [causes]
