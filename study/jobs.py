"""Snapshots, stream and commit: how long they take, and what a guest that reads
at the same time gets.

The guest is a client of an NBD export of the storage daemon that runs the job:
4 KiB random reads of blocks with data, one after the other.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial

from chains import MIB, TOOLS, Chain, empty_overlay, write_offsets
from context import ENDS
from depth_cases import depths
from job_cases import snapshots
from qmp import Daemon
from sides import Crash, Probe, Slow, ended, node, turns

SLICE = 50  # milliseconds that the client reads between two looks at the job


@contextmanager
def in_use(study, side, top, socket):
    """A storage daemon with an image, and a client that reads from it."""
    with Daemon(side, study.patience * 3) as daemon:
        daemon.ask('blockdev-add', node_name='top', **node(side.driver, top))
        daemon.ask('nbd-server-start', addr={'type': 'unix', 'data': {'path': socket}})
        daemon.ask('block-export-add', type='nbd', id='disk', node_name='top', writable=True)
        # The same client for all.
        with Probe(study.stock, {'driver': 'nbd', 'export': 'top',
                                 'server': {'type': 'unix', 'path': socket}}) as client:
            try:
                yield daemon, client
            except Crash as reason:
                # The client complains, the daemon may be what ended.
                try:
                    daemon.process.wait(3)
                except subprocess.TimeoutExpired:
                    raise reason from None
                raise Crash(ended(daemon.process)) from None
    if os.path.exists(socket):
        os.remove(socket)


def after(seconds):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def reads_while(client, offsets, done, most=None):
    """Requests a second until something is done: all slices."""
    speeds, begin = [], time.monotonic()
    while True:
        speeds.append(1e6 / client.read(offsets, SLICE)[0])
        if done():
            return speeds
        if most and time.monotonic() - begin > most:
            raise Slow(f'over {most} s')


def job(study, side, chain, command, offsets):
    """Runs a job on an overlay of the chain; returns its seconds, and the
    requests a second of the client before and while."""
    overlay, socket = chain.path('overlay.qcow2'), chain.path('nbd.sock')
    empty_overlay(overlay, chain.disk, chain.top)
    try:
        with in_use(study, side, overlay, socket) as (daemon, client):
            # The first turn fills the caches.
            reads_while(client, offsets, after(0.4))
            before = reads_while(client, offsets, after(0.4))
            begin = time.monotonic()
            daemon.ask(command, device='top', job_id='job')
            last = {}

            def done():
                if command == 'block-commit' and daemon.happened('BLOCK_JOB_READY'):
                    daemon.ask('job-complete', id='job')
                last.update(daemon.happened('BLOCK_JOB_COMPLETED') or {})
                return bool(last)

            speeds = reads_while(client, offsets, done, study.patience * 3)
            seconds = time.monotonic() - begin
            if 'error' in last:
                raise Crash(f'{command}: {last["error"]}')
            return seconds, before, speeds
    finally:
        os.remove(overlay)


def record(records, side, what, runs, **setting):
    """What so many runs of a job came to, or how it ended."""
    ends = [run for run in runs if isinstance(run, Exception)]
    if ends:
        records.end(side, what, ends[0], **setting)
        return
    records.add(side, what, 's', [run[0] for run in runs], **setting)
    for name, take, number in (('before', statistics.mean, 1), ('while', statistics.mean, 2),
                               ('slowest', min, 2)):
        records.add(side, f'{what}: {name}', 'op/s', [take(run[number]) for run in runs],
                    **setting)


def run_job(study, side, chain, what):
    """As job(), and the way it failed if it did. A commit writes into the lowest
    layer, which is put back."""
    base = chain.path('base.copy')
    shutil.copyfile(chain.layer(0), base)
    try:
        return job(study, side, chain, what, chain.data)
    except ENDS as reason:
        return reason
    finally:
        os.replace(base, chain.layer(0))


def jobs(study, records):
    """Snapshots, stream and commit of whole chains, and a client's reads meanwhile."""
    for depth in depths(study, 3000, (1, 10, 100, 300, 1000, 3000)):
        chain = study.chains.spread(depth)
        # Further down the others crash, which is shown once.
        sides = [side for side in study.works(depth) if side is study.ours or depth <= 1000]
        for side in sides:
            if side is not study.ours and depth > 850:
                continue
            try:
                _, taken = snapshots(side, chain, 5, study.patience)
                records.add(side, 'snapshot', 's', taken, depth=depth)
            except ENDS as reason:
                records.end(side, 'snapshot', reason, depth=depth)
        for what in ('block-stream', 'block-commit'):
            if what == 'block-commit' and depth > 850:
                sides = [study.ours]
            samples = turns({side: partial(run_job, study, side, chain, what) for side in sides},
                            1 if depth > 100 and study.quick else study.few)
            for side, runs in samples.items():
                record(records, side, what, runs, depth=depth)
        study.tidy()


class Shadowed(Chain):
    """A chain with each place written so many times, by different layers."""

    def __init__(self, directory, depth, disk, times):
        super().__init__(directory, depth, disk)
        subprocess.run([sys.executable, os.path.join(TOOLS, 'make-chain.py'), directory,
                        '--layers', str(depth), '--disk', str(disk), '--place', 'deal',
                        '--data-per-layer', str(disk * times // depth)], check=True,
                       stdout=subprocess.DEVNULL)
        self.data = self.path('data')
        write_offsets(self.data, range(0, disk, 65536))


def streaming(study, records):
    """The time of a stream over depth, data, and data that newer layers hide."""
    settings = [(depth, 64, 1) for depth in
                ((1, 32, 256) if study.quick else (1, 8, 32, 128, 256, 512))]
    settings += [(32, mib, 1) for mib in ((16, 256) if study.quick else (16, 256, 1024))]
    settings += [(32, 64, times) for times in ((2, 4) if study.quick else (2, 4, 8))]
    for depth, mib, times in settings:
        name = f'shadow{depth}-{mib}-{times}'
        chain = Shadowed(study.path(name), depth, mib * MIB, times)
        samples = turns({side: partial(run_job, study, side, chain, 'block-stream')
                         for side in study.sides}, study.few)
        for side, runs in samples.items():
            record(records, side, 'block-stream', runs, depth=depth, data=mib, times=times)
        shutil.rmtree(chain.directory)


CASES = [jobs, streaming]
