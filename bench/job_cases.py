"""What is done with a chain as a whole: open, close, snapshots, jobs, tools.

Cases as in chain_cases.py.
"""

import os
import statistics
import subprocess
import time
from contextlib import contextmanager

from chains import empty_overlay
from qmp import Daemon
from sides import Crash, Row, node, turns


def open_close(bench):
    """Open and the first read, which goes through all layers; close."""
    deep, half = bench.chains.spread(1000), bench.chains.spread(500)
    close = {deep: [], half: []}

    def begin(chain):
        with bench.ours.probe(chain.top) as probe:
            seconds = probe.opened + probe.warm(chain.first)
            close[chain].append(probe.ask('close')['seconds'])
            return seconds

    def only_open(side):
        # Reading a hole ends unpatched programs: their time is without it.
        with side.probe(deep.top) as probe:
            return probe.opened

    ours = turns({deep: lambda: begin(deep), half: lambda: begin(half)}, bench.rounds)
    other = turns({'ours': lambda: begin(deep), 'inserted': lambda: only_open(bench.inserted),
                   'stock': lambda: only_open(bench.stock)}, bench.few)
    yield Row('open and first read, depth 1000: rqcow2 against unpatched, open alone', 's',
              other['ours'], other['stock'], most=1 / 10)
    yield Row('open and first read, depth 1000: rqcow2 against + is_inserted, open alone', 's',
              other['ours'], other['inserted'])
    yield Row('open and first read: depth 1000 against depth 500', 's',
              ours[deep], ours[half], most=2.3)
    yield Row('close: depth 1000 against depth 500', 's',
              close[deep][:bench.rounds], close[half], most=2.3)


@contextmanager
def served(side, chain, patience=None):
    """A storage daemon with the chain in an NBD export, as a guest would be
    above it. Nobody connects."""
    socket = chain.path('nbd.sock')
    with Daemon(side, patience) as daemon:
        daemon.ask('blockdev-add', node_name='n0', **node(side.driver, chain.top))
        daemon.ask('nbd-server-start', addr={'type': 'unix', 'data': {'path': socket}})
        daemon.ask('block-export-add', type='nbd', id='disk', node_name='n0', writable=True)
        yield daemon
    if os.path.exists(socket):
        os.remove(socket)


def snapshots(side, chain, count, patience=None):
    """Seconds of each of so many blockdev-snapshot on the chain, and of adding
    the new overlay before."""
    paths = [chain.path(f'overlay{number}.qcow2') for number in range(1, count + 1)]
    added, taken = [], []
    try:
        with served(side, chain, patience) as daemon:
            for number, path in enumerate(paths, 1):
                empty_overlay(path, chain.disk, chain.top if number == 1 else paths[number - 2])
                added.append(daemon.ask('blockdev-add', node_name=f'n{number}', backing=None,
                                        **node(side.driver, path)))
                taken.append(daemon.ask('blockdev-snapshot', node=f'n{number - 1}',
                                        overlay=f'n{number}'))
    finally:
        for path in paths:
            if os.path.exists(path):
                os.remove(path)
    return added, taken


def snapshot(bench):
    """blockdev-snapshot at depth 1000 beside depth 10."""
    count = 5 if bench.quick else 10
    samples = {}
    for depth in (10, 1000):
        for side in (bench.ours, bench.stock):
            added, taken = snapshots(side, bench.chains.spread(depth), count)
            samples[depth, side] = [s * 1e3 for s in taken]
            samples[depth, side, 'add'] = [s * 1e3 for s in added]
    yield Row('blockdev-snapshot: depth 1000 against depth 10', 'ms',
              samples[1000, bench.ours], samples[10, bench.ours], most=2)
    yield Row('blockdev-add of the overlay: depth 1000 against depth 10', 'ms',
              samples[1000, bench.ours, 'add'], samples[10, bench.ours, 'add'])
    yield Row('blockdev-snapshot, depth 1000: rqcow2 against unpatched', 'ms',
              samples[1000, bench.ours], samples[1000, bench.stock])


def timed(side, *words):
    """Seconds that a program takes, its output thrown away."""
    begin = time.monotonic()
    with open(os.devnull, 'w', encoding='ascii') as null:
        status = subprocess.run([side.program(words[0]), *words[1:]], stdout=null, check=False)
    if status.returncode:
        raise Crash(f'{words[0]}: status {status.returncode}')
    return time.monotonic() - begin


def job(side, nodes, command, until='BLOCK_JOB_COMPLETED', **arguments):
    """Seconds of a job on the node `top`, from the command to an event."""
    with Daemon(side) as daemon:
        for name, image in nodes.items():
            daemon.ask('blockdev-add', node_name=name, **node(side.driver, image))
        begin = time.monotonic()
        daemon.ask(command, device='top', job_id='job', **arguments)
        data = daemon.wait(until)
        if 'error' in data:
            raise Crash(f'{command}: {data["error"]}')
        return time.monotonic() - begin


def streamed(side, chain):
    """Seconds of a block-stream of the whole chain into a new overlay."""
    path = chain.path('overlay.qcow2')
    empty_overlay(path, chain.disk, chain.top)
    try:
        return job(side, {'top': path}, 'block-stream')
    finally:
        os.remove(path)


def stream(bench):
    """block-stream of a whole chain beside a copy of the same data from one image."""
    flat, deep = bench.chains.spread(1), bench.chains.spread(1000)
    out = flat.path('copy.qcow2')
    samples = turns({
        'stream': lambda: streamed(bench.ours, deep),
        'convert': lambda: timed(bench.stock, 'qemu-img', 'convert', '-f', 'qcow2', '-O', 'qcow2',
                                 flat.top, out),
        'flat': lambda: streamed(bench.stock, flat)}, bench.rounds)
    os.remove(out)
    yield Row('block-stream, depth 1000: against qemu-img convert of one image', 's',
              samples['stream'], samples['convert'], most=1.3)
    yield Row('block-stream, depth 1000: against unpatched block-stream of one image', 's',
              samples['stream'], samples['flat'])


def copied(side, chain, *how):
    """Seconds until a job has copied all data of a chain to a new image."""
    path = chain.path('copy.qcow2')
    side.run('qemu-img', 'create', '-f', 'qcow2', path, str(chain.disk))
    try:
        return job(side, {'top': chain.top, 'target': path}, *how, target='target', sync='full')
    finally:
        os.remove(path)


def copies(bench):
    """blockdev-mirror and blockdev-backup at depth 1000 beside depth 1."""
    flat, deep = bench.chains.spread(1), bench.chains.spread(1000)
    for how in ('blockdev-mirror', 'BLOCK_JOB_READY'), ('blockdev-backup', 'BLOCK_JOB_COMPLETED'):
        command = how[0]
        samples = turns({
            1000: lambda how=how: copied(bench.ours, deep, *how),
            1: lambda how=how: copied(bench.ours, flat, *how),
            'stock': lambda how=how: copied(bench.stock, flat, *how)}, bench.rounds)
        yield Row(f'{command}: depth 1000 against depth 1', 's', samples[1000], samples[1])
        yield Row(f'{command}, depth 1000: against unpatched with one image', 's',
                  samples[1000], samples['stock'])


def mapped(side, top):
    """Seconds between the first extent that qemu-img map prints and the last:
    without open and close."""
    command = [side.program('qemu-img'), 'map', '-f', side.driver, '--output=json', top]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        begin = end = None
        while os.read(process.stdout.fileno(), 65536):
            end = time.monotonic()
            begin = begin or end
    if process.returncode:
        raise Crash(f'qemu-img map: status {process.returncode}')
    return end - begin


def tools(bench):
    """qemu-img map and convert at depth 1000 beside depth 1, the same data."""
    chains = {depth: bench.chains.spread(depth) for depth in (1, 1000)}
    form, out = bench.ours.driver, chains[1].path('copy.raw')
    tables = chains[1000].list_tables()
    measures = {depth: lambda chain=chain: mapped(bench.ours, chain.top)
                for depth, chain in chains.items()}
    samples = turns({**measures, 'tables': lambda: bench.read_tables(tables)}, bench.few)
    yield Row('qemu-img map, first extent to last: depth 1000 against depth 1', 's',
              samples[1000], samples[1], most=1.2)
    yield Row('the same at depth 1000: against reading every L2 table once', 's',
              samples[1000], samples['tables'])

    with bench.ours.probe(chains[1].top) as one, bench.ours.probe(chains[1000].top) as deep:
        for probe in one, deep:
            probe.extent()
        status = turns({1: one.extent, 1000: deep.extent}, bench.rounds)
    yield Row('block status of the whole disk, asked again, an extent: depth 1000 against 1', 'us',
              status[1000], status[1])

    measures = {}
    for depth, chain in chains.items():
        measures[depth] = lambda top=chain.top: timed(
            bench.ours, 'qemu-img', 'convert', '-f', form, '-O', 'raw', top, out)
        # Opens, reads one block and closes.
        measures[depth, 'idle'] = lambda top=chain.top: timed(
            bench.ours, 'qemu-img', 'bench', '-f', form, '-t', 'writeback', '-c', '1', top)
    samples = turns(measures, bench.rounds)
    os.remove(out)
    net = {}
    for depth in chains:
        idle = statistics.median(samples[depth, 'idle'])
        net[depth] = [max(value - idle, 1e-3) for value in samples[depth]]
    yield Row('qemu-img convert, less open and close: depth 1000 against depth 1', 's',
              net[1000], net[1], most=1.2)
    yield Row('qemu-img convert, the whole program: depth 1000 against depth 1', 's',
              samples[1000], samples[1])


CASES = [open_close, snapshot, stream, copies, tools]
