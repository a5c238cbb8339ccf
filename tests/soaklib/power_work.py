"""What is done to a chain before the power fails: writes, and changes of the chain online and offline."""

import contextlib
import json
import os
import random
import socket
import subprocess
import threading
import time

from . import nbd
from .daemon import Failure
from .disk import FOREVER, SECTOR, Change

MIB = 1 << 20
# The key of what is encrypted, for all programs.
SECRET = ('--object', 'secret,id=key,data=secret')


class GuestChange(Change):
    """One of a writer's."""

    discard = False


class Writer(threading.Thread):
    """Writes to its own parts of the disk, several requests at once, flushes, and notes when."""

    def __init__(self, client, clock, seed, parts, part, cluster):
        super().__init__(daemon=True)
        self.client, self.clock, self.parts, self.part, self.cluster = client, clock, parts, part, cluster
        self.rng = random.Random(seed)
        self.ending, self.failure = False, None
        self.changes, self.flushes = [], []

    def run(self):
        try:
            while not self.ending:
                self.batch()
                # Or a commit of the top never keeps up.
                time.sleep(self.rng.random() * 0.01)
        except (nbd.NBDError, OSError, socket.timeout) as error:
            self.failure = error

    def end(self):
        """Waits until nothing is under way."""
        self.ending = True
        self.join(60)
        if self.failure or self.is_alive():
            raise Failure(f'a writer: {self.failure or "hangs"}')
        self.client.close()

    def batch(self):
        """Some requests at once, no two of them to the same part."""
        if self.rng.random() < 0.3:
            began = next(self.clock)
            self.client.flush()
            self.flushes.append((began, next(self.clock)))
        under_way = {}
        for part in self.rng.sample(self.parts, self.rng.randint(1, min(len(self.parts), 8))):
            command = self.rng.choice((nbd.WRITE, nbd.WRITE, nbd.WRITE, nbd.WRITE_ZEROES, nbd.TRIM))
            # Less than a cluster is not discarded.
            grain = max(self.cluster, SECTOR) if command == nbd.TRIM else SECTOR
            count = self.part // grain
            at = self.rng.choice((0, self.rng.randrange(count)))
            limit = min(count - at, self.rng.choice((2, 16, count)))
            length = self.rng.choice((limit, self.rng.randint(1, limit))) * grain
            data = self.rng.randbytes(16) * (length // 16) if command == nbd.WRITE else bytes(length)
            change = GuestChange(next(self.clock), FOREVER, part * self.part + at * grain, data)
            change.discard = command == nbd.TRIM
            self.changes.append(change)
            flags = nbd.FLAG_NO_HOLE if command == nbd.WRITE_ZEROES and self.rng.random() < 0.5 else 0
            sent = data if command == nbd.WRITE else b''
            under_way[self.client.submit(command, change.offset, length, sent, flags)] = change
        while under_way:
            handle, _ = self.client.collect()
            under_way.pop(handle).ended = next(self.clock)


# While it is written to


def live(internal):
    """What may happen to a chain, or to an image with snapshots of its own."""
    if internal:
        return [create_internal, create_internal, delete_internal, bitmap, nothing]
    return [snapshot, commit, commit_active, stream, bitmap, nothing]


def nothing(_):
    """Writes alone."""


def snapshot(chain):
    """An overlay."""
    if len(chain.layers) < 6:
        chain.now('snapshot')
        top = chain.layers[-1]
        number = chain.make(top)
        chain.add(number, None)
        chain.daemon.command('blockdev-snapshot', node=f'n{top}', overlay=f'n{number}')


def merged(chain, first, end):
    """Takes the nodes of layers that are not needed any more away."""
    gone, chain.layers[first:end] = chain.layers[first:end], []
    for number in reversed(gone):
        chain.daemon.command('blockdev-del', node_name=f'n{number}')


def commit(chain):
    """From below the top into a layer below."""
    if len(chain.layers) > 2:
        chain.now('commit')
        at = chain.rng.randrange(1, len(chain.layers) - 1)
        base = chain.rng.randrange(at)
        chain.daemon.command(
            'block-commit', job_id='job', device=f'n{chain.layers[-1]}', top_node=f'n{chain.layers[at]}',
            base_node=f'n{chain.layers[base]}', backing_file=chain.file(f'l{chain.layers[base]}'))
        chain.daemon.finish('job')
        merged(chain, base + 1, at + 1)


def commit_active(chain):
    """The top into a layer below, which becomes the top."""
    if len(chain.layers) > 2:
        chain.now('active commit')
        base = chain.rng.randrange(len(chain.layers) - 1)
        chain.daemon.command('block-commit', job_id='job', device=f'n{chain.layers[-1]}',
                             base_node=f'n{chain.layers[base]}')
        if not chain.daemon.finish('job'):
            time.sleep(chain.rng.random() * 0.1)
            chain.daemon.command('job-complete', id='job')
            chain.daemon.finish('job')
        merged(chain, base + 1, len(chain.layers))


def stream(chain):
    """Into a layer, all that is above another one."""
    if len(chain.layers) > 2:
        chain.now('stream')
        at = chain.rng.randrange(2, len(chain.layers))
        base = chain.rng.randrange(at - 1)
        chain.daemon.command(
            'block-stream', job_id='job', device=f'n{chain.layers[at]}', base_node=f'n{chain.layers[base]}',
            backing_file=chain.file(f'l{chain.layers[base]}'))
        chain.daemon.finish('job')
        merged(chain, base + 1, at)


def bitmap(chain):
    """A bitmap that is kept in the image."""
    moment = chain.now('bitmap')
    chain.daemon.command('block-dirty-bitmap-add', node=f'n{chain.layers[-1]}', name=f'b{moment}', persistent=True)


def create_internal(chain):
    """A snapshot within the image."""
    moment = chain.now('internal snapshot')
    chain.daemon.command('blockdev-snapshot-internal-sync', device=f'n{chain.layers[-1]}', name=f's{moment}')


def delete_internal(chain):
    """One of those less."""
    node = f'n{chain.layers[-1]}'
    nodes = chain.daemon.command('query-named-block-nodes', flat=True)
    image = next(found['image'] for found in nodes if found['node-name'] == node)
    names = [found['name'] for found in image.get('snapshots', [])]
    if names:
        chain.now('internal delete')
        chain.daemon.command('blockdev-snapshot-delete-internal-sync', device=node, name=chain.rng.choice(names))


# While nobody uses it


def tool(chain, *words, may_fail=True):
    """Runs qemu-img of the driver on the top, which NAME stands for."""
    top = chain.layers[-1]
    # For bitmaps it looks at nothing below.
    keys = {} if words[0] == 'bitmap' else chain.keys(chain.file(f'l{top}'))
    name = 'json:' + json.dumps({**keys, **chain.image(top)})
    command = [os.path.join(chain.args.bin, 'qemu-img'), *(name if word == 'NAME' else word for word in words), *SECRET]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # What is not possible is refused, with a message.
    if done.returncode and not (may_fail and done.returncode == 1 and done.stderr):
        raise Failure(f'{" ".join(command)}: status {done.returncode}, {done.stdout}{done.stderr}')


def grow(chain):
    """A larger disk, whose L1 table and refcount table grow as well."""
    if chain.layers[-1] in chain.data:
        # Of a data file the NBD client would have to be the one to change the size.
        return
    chain.now('grow')
    mode = chain.rng.choice(('off', 'off', 'metadata'))
    size = chain.size + chain.rng.choice((1, 8, 64, 500) if mode == 'off' else (1, 8)) * MIB
    try:
        tool(chain, 'resize', '-q', f'--preallocation={mode}', 'NAME', str(size), may_fail=False)
    except Failure as failure:
        # Version 2 has no place for the size that a snapshot had.
        if "Can't resize a v2 image which has snapshots" not in str(failure):
            raise
    else:
        chain.size = size


def shrink(chain):
    """A smaller one, but not smaller than at first."""
    chain.now('shrink')
    size = max(len(chain.before), chain.size // 2 // chain.cluster * chain.cluster)
    with contextlib.suppress(Failure):
        tool(chain, 'resize', '-q', '--shrink', 'NAME', str(size), may_fail=False)
        chain.size = size


def snapshots(chain):
    """Creates one, deletes another."""
    moment = chain.now('snapshot -c, -d')
    tool(chain, 'snapshot', '-c', f'o{moment}', 'NAME')
    if chain.rng.random() < 0.5:
        tool(chain, 'snapshot', '-d', f'o{moment}', 'NAME')


def apply(chain):
    """Goes back to a snapshot. What the disk shows then is not known."""
    chain.tops.append((chain.now('snapshot -a'), None))
    tool(chain, 'snapshot', '-c', 'now', 'NAME')
    tool(chain, 'snapshot', '-a', 'now', 'NAME')


def amend(chain):
    """Other refcounts, another version."""
    chain.now('amend')
    option = chain.rng.choice(('refcount_bits=8', 'refcount_bits=32', 'refcount_bits=64', 'compat=0.10', 'compat=1.1'))
    tool(chain, 'amend', '-o', option, 'NAME')


def offline_bitmap(chain):
    """By the tool."""
    chain.now('bitmap')
    tool(chain, 'bitmap', chain.rng.choice(('--add', '--remove', '--clear')), 'NAME', 'bits')


def rebase(chain):
    """What is above another layer is copied into the top."""
    # The tool finds no key for what is below another layer.
    if len(chain.layers) > 2 and not chain.encrypted:
        chain.now('rebase')
        base = chain.rng.randrange(len(chain.layers) - 2)
        tool(chain, 'rebase', '-b', chain.file(f'l{chain.layers[base]}'), '-F', 'qcow2', 'NAME', may_fail=False)
        del chain.layers[base + 1:-1]


def key(chain):
    """The same one once more, or once less."""
    if chain.layers[-1] in chain.encrypted:
        chain.now('key')
        tool(chain, 'amend', '-o', chain.rng.choice((
            'encrypt.state=active,encrypt.new-secret=key,encrypt.iter-time=10',
            'encrypt.state=inactive,encrypt.keyslot=0')), 'NAME')


OFFLINE = [grow, grow, shrink, snapshots, apply, amend, amend, offline_bitmap, rebase, rebase, key]
