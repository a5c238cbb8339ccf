"""Memory: over depth, size of the disk, share of tables touched, size of caches.

The images are those of the case `memory` of bench/: each layer has all L2
tables of the disk, with one cluster of data under each.
"""

import array

from chains import GIB, KIB
from context import ENDS
from sides import Probe, node


def part(chain, share):
    """A list of one hole in each 32 MiB of the first part of the disk."""
    offsets = array.array('Q')
    with open(chain.slices, 'rb') as file:
        offsets.frombytes(file.read())
    path = chain.path(f'part{share}')
    with open(path, 'wb') as file:
        offsets[:max(1, round(len(offsets) * share))].tofile(file)
    return path


def budgeted(side, chain, budget, ours):
    """Options of a chain with so many bytes for all its L2 tables.

    rqcow2 takes the option of the top as the budget of the chain. QEMU's driver
    gives each layer its own cache: to each an equal part, of small entries."""
    if side is ours:
        return {**node(side.driver, chain.top), 'l2-cache-size': budget}
    size = max(budget // chain.depth // KIB, 4) * KIB
    caches = {'l2-cache-size': size, 'l2-cache-entry-size': 2 * KIB}
    options = None
    for number in range(chain.depth):
        options = {**node(side.driver, chain.layer(number)), **caches,
                   **({'backing': options} if options else {})}
    return options


def memory(study, records):
    """Resident memory of a process that has a chain open and has read in it."""
    for gib, depths in (((4, (1, 10, 100, 500)), (16, (1, 10, 100, 300)), (64, (1, 10, 30)))
                        if study.quick else
                        ((4, (1, 10, 100, 500, 850)), (16, (1, 10, 30, 100, 300)),
                         (64, (1, 10, 30, 100)))):
        for depth in depths:
            chain = study.chains.full_tables(depth, gib * GIB)
            for share in (0, 0.25, 1) if depth == 100 else (1,):
                for side in study.sides:
                    with side.probe(chain.top, study.patience * 3, study.aio) as probe:
                        if share:
                            probe.warm(part(chain, share))
                        records.add(side, 'resident', 'MiB', probe.status('VmRSS'), depth=depth,
                                    disk=gib, share=share)
            study.tidy()


def cache_size(study, records):
    """Warm reads and memory with little memory for tables, the same for each side."""
    depth, gib = (100, 16) if study.quick else (300, 16)
    chain = study.chains.full_tables(depth, gib * GIB)
    offsets = part(chain, 1)
    for mib in (1, 4, 16, 64, 256) if study.quick else (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for side in study.sides:
            try:
                with Probe(side, budgeted(side, chain, mib << 20, study.ours),
                           study.patience, study.aio) as probe:
                    probe.warm(offsets)
                    clock = [probe.read(offsets, study.ms)[0] for _ in range(study.rounds)]
                    records.add(side, 'hole', 'us', clock, depth=depth, budget=mib)
                    records.add(side, 'resident', 'MiB', probe.status('VmRSS'), depth=depth,
                                budget=mib)
            except ENDS as reason:
                records.end(side, 'hole', reason, depth=depth, budget=mib)


CASES = [memory, cache_size]
