"""A chain of layers in a running daemon, and what is done to it."""

import errno
import os
import subprocess
import time

from qcow2writer import write_qcow2

from .daemon import Failure


# What images are about to write when there is no space, in the words of blkdebug.
WRITES = ('write_aio', 'cow_write', 'l2_update', 'l2_alloc_write', 'l1_update', 'refblock_update',
          'refblock_alloc_write', 'cluster_alloc', 'pwritev')


class Chain:
    """The layers from the base to the top, each (path, node name)."""

    def __init__(self, soak, daemon, top):
        self.soak = soak
        self.rng = soak.rng
        self.daemon = daemon
        self.guest = None
        self.serial = 0
        daemon.command('blockdev-add', driver=soak.args.driver, node_name='top', discard='unmap',
                       file={'driver': 'file', 'filename': top, 'discard': 'unmap'})
        # The nodes below have names that the daemon has made up.
        nodes = {n['file']: n for n in daemon.command('query-named-block-nodes', flat=True)
                 if n['drv'] == soak.args.driver}
        self.layers = []
        path = top
        while path:
            node = nodes[path]
            self.layers.insert(0, (path, node['node-name']))
            backing = node.get('backing_file')
            path = os.path.join(os.path.dirname(path), backing) if backing else None

    @property
    def top(self):
        """The node name of the top."""
        return self.layers[-1][1]

    def name(self, kind):
        """A new name."""
        self.serial += 1
        name = f'{kind}{self.soak.serial}-{self.serial}'
        return name, os.path.join(self.soak.directory, name + '.qcow2')

    def empty(self, path, backing):
        """A new image without any data."""
        write_qcow2(path, self.soak.size, [], None, backing=backing, backing_format='qcow2' if backing else None,
                    cluster_size=self.soak.cluster)

    def add(self, name, path, backing, **above):
        """A node for an image; `above` are options of a node above its file, which is named then."""
        file = {'driver': 'file', 'filename': path, 'discard': 'unmap'}
        if above:
            file = {'image': {**file, 'node-name': name + '-file'}, **above}
        self.daemon.command('blockdev-add', driver=self.soak.args.driver, node_name=name, backing=backing,
                            discard='unmap', file=file)

    def gone(self, layers):
        """These have left the chain: no node, no file. Some are still the monitor's."""
        for path, node in reversed(layers):
            reply = self.daemon.ask('blockdev-del', node_name=node)
            text = reply.get('error', {}).get('desc', '')
            if text and 'Failed to find' not in text and 'not owned by the monitor' not in text:
                raise Failure(text)
        left = {n['file'] for n in self.daemon.command('query-named-block-nodes', flat=True)}
        for path, node in layers:
            if path in left:
                raise Failure(f'{path} is still in use as {node}')
            os.unlink(path)

    def job(self, command, ready=None, **arguments):
        """A job, at full speed or slowly at first, while the guest goes on."""
        slow = self.rng.random() < 0.5
        self.daemon.command(command, job_id='job', speed=1 << 20 if slow else 0, **arguments)
        self.guest.more(20)
        if slow:
            # It may have ended.
            self.daemon.ask('block-job-set-speed', device='job', speed=0)
        while not self.daemon.finish('job'):
            self.guest.more(10)
            ready()
        self.guest.more(10)

    # What happens to the chain.

    def snapshot(self):
        """A new top."""
        name, path = self.name('s')
        below = self.layers[-1][0]
        if self.rng.random() < 0.5:
            self.empty(path, below)
            self.add(name, path, None)
            self.daemon.command('blockdev-snapshot', node=self.top, overlay=name)
        else:
            self.daemon.command('blockdev-snapshot-sync', node_name=self.top, snapshot_file=path,
                                snapshot_node_name=name, format=self.soak.args.driver)
        self.layers.append((path, name))
        self.guest.more(5)

    def undo(self):
        """A snapshot in a transaction that fails: the guest must not notice."""
        name, path = self.name('u')
        self.empty(path, self.layers[-1][0])
        self.add(name, path, None)
        reply = self.daemon.ask('transaction', actions=[
            {'type': 'blockdev-snapshot', 'data': {'node': self.top, 'overlay': name}}, {'type': 'abort', 'data': {}}])
        if 'error' not in reply:
            raise Failure('a transaction that has to fail does not')
        self.daemon.command('blockdev-del', node_name=name)
        os.unlink(path)
        self.guest.more(5)

    def stream(self):
        """The lower half becomes one layer."""
        middle = len(self.layers) // 2
        if middle < 1:
            return
        self.job('block-stream', device=self.layers[middle][1])
        gone, self.layers = self.layers[:middle], self.layers[middle:]
        self.gone(gone)

    def commit(self):
        """A tenth of the layers, in the middle, go to the one below them."""
        count = max(1, self.soak.args.layers // 10)
        if len(self.layers) < count + 4:
            return
        base = self.rng.randrange(0, len(self.layers) - count - 2)
        top = base + count
        self.job('block-commit', device=self.top, top_node=self.layers[top][1], base_node=self.layers[base][1])
        gone = self.layers[base + 1:top + 1]
        del self.layers[base + 1:top + 1]
        self.gone(gone)

    def active(self):
        """The uppermost layers go to the one below them."""
        count = max(1, min(self.soak.args.layers // 20, len(self.layers) - 1))
        if len(self.layers) < 2:
            return
        base = len(self.layers) - 1 - count
        self.job('block-commit', device=self.top, base_node=self.layers[base][1], ready=self.complete)
        gone = self.layers[base + 1:]
        del self.layers[base + 1:]
        self.gone(gone)

    def mirror(self):
        """The top goes to another image on the same layers."""
        if len(self.layers) < 2:
            return
        name, path = self.name('m')
        below = self.layers[-2]
        self.empty(path, below[0])
        self.add(name, path, below[1])
        self.job('blockdev-mirror', device=self.top, target=name, sync='top', ready=self.complete)
        gone = [self.layers.pop()]
        self.layers.append((path, name))
        self.gone(gone)

    def copy(self):
        """The whole disk goes to an image of its own, which has to be what the guest has at the end."""
        name, path = self.name('c')
        self.empty(path, None)
        self.add(name, path, None)
        self.job('blockdev-mirror', device=self.top, target=name, sync='full', ready=self.freeze)
        self.compare(name, path, self.frozen)
        os.unlink(path)

    def backup(self):
        """A full backup, and an incremental one: both have to be what the guest had when they began."""
        top, (base, base_path), (name, path) = self.top, self.name('b'), self.name('b')
        bitmap = {'node': top, 'name': 'changed'}
        self.empty(base_path, None)
        self.empty(path, base_path)
        self.back_up(base, base_path, [('block-dirty-bitmap-add', bitmap)], sync='full')
        self.back_up(name, path, [], sync='incremental', bitmap='changed')
        self.daemon.command('block-dirty-bitmap-remove', **bitmap)
        os.unlink(base_path)
        os.unlink(path)

    def back_up(self, name, path, before, **how):
        """One backup; the commands `before` belong to the same moment."""
        self.add(name, path, None)
        actions = [*before, ('blockdev-backup', {'job-id': 'job', 'device': self.top, 'target': name, **how})]
        # Requests of other threads are earlier than the job then.
        with self.daemon.starved():
            with self.guest.paused():
                content = self.guest.content
                self.daemon.command('transaction', actions=[{'type': kind, 'data': data} for kind, data in actions])
            self.guest.more(20)
        self.daemon.finish('job')
        self.compare(name, path, content)

    def compare(self, name, path, content):
        """Lets a copy of the disk go as a node; it has to have this content."""
        self.daemon.command('blockdev-del', node_name=name)
        self.soak.compare(self.soak.args.stock, 'qcow2', path, content)

    def complete(self):
        """Lets a job that is ready end, with the target in use."""
        self.daemon.command('block-job-complete', device='job')

    def halt(self):
        """The machine stops and goes on, many times: no queue may stand still after it."""
        for _ in range(40):
            time.sleep(self.rng.random() / 50)
            self.daemon.command('stop')
            self.daemon.command('cont')
        self.guest.verify()

    def full(self):
        """A new top finds no space now and then, while layers are streamed into it: the machine stops until there is
        some again, and so does the job. The guest must not notice."""
        if len(self.layers) < 4:
            return
        name, path = self.name('f')
        self.empty(path, self.layers[-1][0])
        events = ['none'] + [self.rng.choice(WRITES) for _ in range(9)]
        rules = [{'event': event, 'iotype': 'write', 'errno': errno.ENOSPC, 'once': True} for event in events]
        self.add(name, path, None, driver='blkdebug', **{'inject-error': rules})
        self.daemon.command('blockdev-snapshot', node=self.top, overlay=name)
        base = self.layers[-3]
        self.use_full(name, base[1])
        # There is enough from now on.
        self.daemon.command('blockdev-reopen', options=[{
            'driver': self.soak.args.driver, 'node-name': name, 'backing': base[1], 'discard': 'unmap',
            'file': name + '-file'}])
        self.go_on()
        self.guest.verify()
        gone, self.layers = self.layers[-2:], [*self.layers[:-2], (path, name)]
        self.gone(gone)

    def use_full(self, top, base):
        """The guest goes on, and layers are streamed, on a top that finds no space now and then."""
        stream = {'device': top, 'job_id': 'job', 'base_node': base, 'on_error': 'enospc'}
        goal, stops, streaming = self.guest.operations + 300, 0, True
        self.daemon.command('block-stream', **stream)
        while streaming or self.guest.operations < goal:
            self.guest.judge()
            stops += self.go_on()
            jobs = self.daemon.command('query-block-jobs')
            if jobs and jobs[0]['status'] == 'paused':
                stops += 1
                self.daemon.ask('block-job-resume', device='job')
            elif streaming and not jobs:
                # It cannot wait where it is the new name of the backing file that finds no space.
                streaming = 'error' in self.daemon.event('BLOCK_JOB_COMPLETED')['data']
                if streaming:
                    stops += 1
                    self.daemon.command('block-stream', **stream)
            time.sleep(0.005)
        self.daemon.events.clear()
        if not stops:
            raise Failure('there was space all the time')

    def go_on(self):
        """Lets the machine go on if an error has stopped it; returns whether it has."""
        stopped = self.daemon.command('query-status')['status'] == 'io-error'
        if stopped:
            self.daemon.command('cont')
        return stopped

    def freeze(self):
        """Lets a mirror end as a copy of a moment."""
        with self.guest.paused():
            self.daemon.command('block-job-cancel', device='job')
            self.frozen = self.guest.content
            event = self.daemon.event('BLOCK_JOB_COMPLETED')
            self.daemon.events.append(event)


def make(soak, directory, seed):
    """Builds a chain; returns the path of the top, and the disk's content."""
    flat = os.path.join(directory, 'flat')
    args = soak.args
    command = [os.path.join(soak.root, 'tools', 'make-chain.py'), directory, '--layers', args.layers,
               '--disk', soak.size, '--cluster-size', soak.cluster, '--data-per-layer', 4 * soak.cluster,
               '--zeroes-per-layer', soak.cluster, '--place', 'deal', '--seed', seed, '--flat', flat]
    top = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    with open(flat, 'rb') as file:
        content = file.read()
    os.unlink(flat)
    return top, content
