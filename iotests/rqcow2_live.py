"""Chains that change below their top while it is read.

A model knows every cluster of every layer, so that a test can write to a layer
in the middle and still say what the top has to read. The top is exported over
NBD; threads of this program read it all the time and compare.
"""

import contextlib
import json
import os
import random
import sys

import iotests
from rqcow2_common import DRIVER, KIB, MIB, Case, check, img

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
sys.path[:0] = [os.path.join(ROOT, 'tests'), os.path.join(ROOT, 'tools')]
from qcow2writer import write_qcow2                 # noqa: E402  pylint: disable=wrong-import-position
from soaklib import model, nbd                      # noqa: E402  pylint: disable=wrong-import-position

SIZE = 4 * MIB
# Clusters of all sizes, both versions, layers shorter and longer than others.
MIXED = [{'cluster': 64 * KIB}, {'cluster': 4 * KIB, 'version': 2}, {'cluster': 64 * KIB, 'size': 3 * MIB},
         {'cluster': 16 * KIB}, {'cluster': 4 * KIB, 'size': 2 * MIB}, {'cluster': 512}, {'cluster': 64 * KIB}]


KINDS = ('write', 'zero', 'unmap', 'discard', 'write')
SLOT = 128 * KIB


def request(kind, start, length, data):
    """What to submit to a connection."""
    if kind == 'write':
        return nbd.WRITE, start, length, data
    if kind == 'discard':
        return nbd.TRIM, start, length
    return nbd.WRITE_ZEROES, start, length, b'', 0 if kind == 'unmap' else nbd.FLAG_NO_HOLE


class Layer:
    """One image: the clusters it has of its own."""

    def __init__(self, size=SIZE, cluster=64 * KIB, version=3, raw=False):
        self.size = size
        self.cluster = cluster
        self.version = version
        self.raw = raw
        self.data = {}


class Layers:
    """What each layer of a chain has, and what it reads as."""

    def __init__(self, layers):
        self.layers = layers

    def read(self, index, start, length):
        """What the node of a layer reads as."""
        if index < 0:
            return bytes(length)
        layer = self.layers[index]
        out = bytearray()
        end = min(start + length, layer.size)
        at = start
        while at < end:
            number, skip = divmod(at, layer.cluster)
            stop = min(end, (number + 1) * layer.cluster)
            own = layer.data.get(number)
            out += self.read(index - 1, at, stop - at) if own is None else own[skip:skip + stop - at]
            at = stop
        return bytes(out) + bytes(length - len(out))

    def whole(self, index):
        """All that a layer reads as."""
        return self.read(index, 0, self.layers[index].size)

    def write(self, index, start, data):
        """Copy-on-write, by the layer's clusters."""
        layer = self.layers[index]
        assert start + len(data) <= layer.size
        at = start
        while at < start + len(data):
            number, skip = divmod(at, layer.cluster)
            count = min(layer.cluster - skip, start + len(data) - at)
            own = bytearray(self.read(index, number * layer.cluster, layer.cluster))
            own[skip:skip + count] = data[at - start:at - start + count]
            layer.data[number] = bytes(own)
            at += count

    def discard(self, index, start, length):
        """Whole clusters, which become zeroes where the format can say so."""
        layer = self.layers[index]
        assert start % layer.cluster == 0 and length % layer.cluster == 0
        if layer.version == 2 and index > 0:
            return
        for number in range(start // layer.cluster, (start + length) // layer.cluster):
            layer.data[number] = bytes(layer.cluster)

    def resize(self, index, size):
        """Both ways, by whole clusters."""
        layer = self.layers[index]
        assert size % layer.cluster == 0 and layer.size % layer.cluster == 0
        below = self.layers[index - 1].size if index else 0
        for number in [n for n in layer.data if n * layer.cluster >= size]:
            del layer.data[number]
        if size > layer.size and below > layer.size:
            # What was not there must not show what is below.
            for number in range(layer.size // layer.cluster, size // layer.cluster):
                layer.data[number] = bytes(layer.cluster)
        layer.size = size

    def between(self, base, top):
        """Where layers above one and up to another have something of their own."""
        size = self.layers[top].size
        ranges = []
        for number in range(base + 1, top + 1):
            layer = self.layers[number]
            ranges += [(n * layer.cluster, (n + 1) * layer.cluster) for n in layer.data]
            # Past the end of a layer that is shorter there are zeroes.
            ranges.append((layer.size, size))
        at = 0
        for start, end in sorted(ranges):
            start, end = max(start, at), min(end, size)
            if start < end:
                yield start, end - start
                at = end

    def commit(self, top, base):
        """Some layers go to the one below them."""
        new = [(start, self.read(top, start, length)) for start, length in self.between(base, top)]
        if self.layers[base].size < self.layers[top].size:
            self.resize(base, self.layers[top].size)
        for start, data in new:
            self.write(base, start, data)
        del self.layers[base + 1:top + 1]

    def stream(self, top, base):
        """A layer gets what is in those below it; base is -1 if all are to go."""
        layer = self.layers[top]
        new = dict(layer.data)
        for start, length in self.between(base, top - 1):
            for number in range(start // layer.cluster, -(-min(start + length, layer.size) // layer.cluster)):
                if number not in new:
                    new[number] = self.read(top, number * layer.cluster, layer.cluster)
        layer.data = new
        del self.layers[base + 1:top]


class LiveCase(Case):
    """A machine with a chain, its model, and threads that read the top."""

    readers = 2

    def setUp(self):
        super().setUp()
        self.rng = random.Random(self.id())
        self.watching = []
        self.clients = {}
        self.disk = None

    def tearDown(self):
        for reader in self.watching:
            reader.ending = True
        for client in self.clients.values():
            client.close()
        super().tearDown()

    # The chain.

    def make(self, specs=None, fill=6):
        """Makes the images and their model. The first is the base."""
        self.chain = Layers([])
        self.names = []
        for number, spec in enumerate(MIXED if specs is None else specs):
            layer = Layer(**spec)
            self.chain.layers.append(layer)
            self.fill(number, fill)
            path = self.path(f'l{number}')
            self.store(layer, path, self.names[-1] if number else None)
            self.names.append(path)
        self.nodes = [f'n{number}' for number in range(len(self.names))]

    def store(self, layer, path, below=None):
        """Writes the image of a layer."""
        if layer.raw:
            with open(path, 'wb') as file:
                file.write(Layers([layer]).whole(0))
            return
        zeroes = {n for n, d in layer.data.items() if layer.version == 3 and not any(d)}
        backing = {}
        if below:
            raw = self.chain.layers[self.names.index(below)].raw
            backing = {'backing': below, 'backing_format': 'raw' if raw else 'qcow2'}
        write_qcow2(path, layer.size, sorted(set(layer.data) - zeroes), layer.data.get, zeroes=zeroes,
                    cluster_size=layer.cluster, version=layer.version, **backing)

    def spare(self, name, **spec):
        """A layer of random content that is not in the chain; its image has this name."""
        layer = Layer(**spec)
        for number in self.rng.sample(range(layer.size // layer.cluster), layer.size // layer.cluster // 3):
            layer.data[number] = self.rng.randbytes(layer.cluster)
        self.store(layer, self.path(name))
        return layer

    def fill(self, number, runs):
        """Gives a layer some data and zeroes."""
        layer = self.chain.layers[number]
        for turn in range(runs if number else 3 * runs):
            length = self.rng.randint(1, max(1, 96 * KIB // layer.cluster)) * layer.cluster
            length = min(length, layer.size)
            start = self.rng.randrange(0, layer.size - length + 1, layer.cluster)
            zero = turn % 4 == 3
            self.chain.write(number, start, bytes(length) if zero else self.rng.randbytes(length))
        if layer.raw:
            content = self.chain.whole(number)
            for at in range(0, layer.size, layer.cluster):
                layer.data[at // layer.cluster] = content[at:at + layer.cluster]

    # The machine.

    def boot(self, writable=(), filters=None, args=()):
        """Starts the machine with a node for each image, and exports the top.

        Layers in writable are not read-only; filters: number of a layer to the
        name of a throttle node between it and what is below.
        """
        args = ['-object', 'throttle-group,id=tg', *args]
        top = len(self.nodes) - 1
        for number in range(len(self.nodes)):
            open_rw = number == top or number in writable
            if number in (filters or {}):
                args += ['-blockdev', f'driver=throttle,node-name={filters[number]},throttle-group=tg,'
                                      f'file=n{number - 1}']
            args += ['-blockdev', json.dumps(self.file_options(number, open_rw))]
            backing = (filters or {}).get(number, f'n{number - 1}') if number else None
            args += ['-blockdev', json.dumps(self.options(number, open_rw, backing))]
        self.launch(*args)
        self.serve()

    def file_options(self, number, writable):
        """The options of the protocol node of a layer."""
        return {'driver': 'file', 'filename': self.names[number], 'node-name': f'f{number}', 'discard': 'unmap',
                **({} if writable else {'auto-read-only': True})}

    def options(self, number, writable, backing, **more):
        """The options of the node of a layer."""
        if self.chain.layers[number].raw:
            return {'driver': 'raw', 'file': f'f{number}', 'node-name': f'n{number}', 'read-only': not writable,
                    'discard': 'unmap', **more}
        return {'driver': DRIVER, 'file': f'f{number}', 'node-name': f'n{number}', 'read-only': not writable,
                'discard': 'unmap', 'backing': backing, **more}

    def serve(self):
        """Exports the top and starts the threads that read it."""
        self.sock = os.path.join(iotests.sock_dir, 'live.sock')
        self.vm.cmd('nbd-server-start', addr={'type': 'unix', 'data': {'path': self.sock}})
        self.export(self.nodes[-1], 'top')
        self.disk = model.Disk(self.chain.whole(len(self.nodes) - 1))
        self.clients = {'top': self.connect('top')}
        # Whatever is remembered of the layers is remembered now.
        self.verify()
        self.watching = []
        for number in range(self.readers):
            reader = model.Reader(self.disk, self.connect('top'), random.Random(f'{self.id()} {number}'))
            self.watching.append(reader)
            reader.start()
        self.steady()

    def export(self, node, name, writable=True):
        """Exports a node over NBD."""
        self.vm.cmd('block-export-add', type='nbd', id=name, node_name=node, name=name, writable=writable)

    def connect(self, name):
        """A connection to an export."""
        return nbd.Client(self.sock, name)

    def client(self, number):
        """A connection to an export of a layer, made when first needed."""
        name = 'top' if number == len(self.nodes) - 1 else self.nodes[number]
        if name not in self.clients:
            self.export(name, name)
            self.clients[name] = self.connect(name)
        return self.clients[name]

    def disconnect(self):
        """Ends the exports of all layers but the top, which keep jobs from starting."""
        for name in [n for n in self.clients if n != 'top']:
            self.clients.pop(name).close()
            self.vm.cmd('block-export-del', id=name, mode='hard')
            self.vm.event_wait('BLOCK_EXPORT_DELETED', timeout=60.0, match={'data': {'id': name}})

    def steady(self, count=3):
        """Every reader reads some more."""
        for reader in self.watching:
            reader.more(count)

    # Checks.

    def verify(self):
        """All of the top, read once more, is what it has to be."""
        client = self.clients['top']
        for at in range(0, self.disk.size, MIB):
            self.disk.check(at, min(MIB, self.disk.size - at), client.read)
        for reader in self.watching:
            reader.judge()

    def settle(self, inner=True):
        """Ends all; every image is sound and has what the model says."""
        self.steady()
        self.verify()
        self.quiet()
        self.vm.shutdown()
        raw = self.path('settled')
        chain = self.chain.layers
        for number, path in enumerate(self.names):
            if chain[number].raw:
                continue
            check(path)
            if not inner and number < len(self.names) - 1:
                continue
            for driver in {DRIVER, 'qcow2'} if number == len(self.names) - 1 else {'qcow2'}:
                img('convert', '-f', driver, '-O', 'raw', path, raw)
                with open(raw, 'rb') as file:
                    self.assertTrue(file.read() == self.chain.whole(number), f'{path} by {driver}')

    def quiet(self):
        """Ends the readers and all connections."""
        watching, self.watching = self.watching, []
        for reader in watching:
            reader.stop()
        for name in list(self.clients):
            self.clients.pop(name).close()

    # Changes.

    def alter(self, stack, number, kind, start, length, data=b''):
        """Changes the model of a layer, and what the top may read while the stack is open."""
        if kind == 'discard':
            self.chain.discard(number, start, length)
        else:
            self.chain.write(number, start, data)
        stack.enter_context(self.altered(start, length))

    def altered(self, start=0, length=None, between=None):
        """The layers' model has changed: while this is open, the top may read as before or as now."""
        length = self.disk.size - start if length is None else min(length, self.disk.size - start)
        if length <= 0:
            return contextlib.nullcontext()
        return self.disk.change(start, self.chain.read(len(self.nodes) - 1, start, length), between)

    def data(self, kind, length, through='nbd'):
        """What to write."""
        if kind != 'write':
            return bytes(length)
        if through == 'nbd':
            return self.rng.randbytes(length)
        return bytes([self.rng.randint(1, 255)]) * length

    def work(self, number, kind, start, length, through='nbd'):
        """Writes to a layer, through NBD or as qemu-io does."""
        data = self.data(kind, length, through)
        with contextlib.ExitStack() as stack:
            self.alter(stack, number, kind, start, length, data)
            if through == 'nbd':
                client = self.client(number)
                client.submit(*request(kind, start, length, data))
                client.collect()
            else:
                word = {'write': f'write -P {data[0]} -q', 'zero': 'write -q -z', 'unmap': 'write -q -z -u',
                        'discard': 'discard -q'}[kind]
                self.qemu_io(number, f'{word} {start} {length}')

    def qemu_io(self, number, command):
        """A qemu-io command that says nothing if it succeeds, on a layer."""
        result = self.vm.hmp_qemu_io(self.nodes[number], command)
        self.assertEqual(result['return'], '', command)

    def batch(self, numbers, meanwhile=None, count=16, kinds=KINDS):
        """Many writes to some layers at once, each in a part of the disk of its own."""
        size = min(self.chain.layers[n].size for n in numbers)
        slots = self.rng.sample(range(size // SLOT), min(count, size // SLOT))
        clients = {number: self.client(number) for number in numbers}
        with contextlib.ExitStack() as stack:
            requests = []
            for turn, slot in enumerate(slots):
                number = numbers[turn % len(numbers)]
                kind = self.rng.choice(kinds)
                start, length = self.place(number, kind, turn, slot * SLOT, SLOT)
                data = self.data(kind, length)
                self.alter(stack, number, kind, start, length, data)
                requests.append((number, request(kind, start, length, data)))
            for number, words in requests:
                clients[number].submit(*words)
            if meanwhile:
                meanwhile()
            for client in clients.values():
                while client.pending:
                    client.collect()

    def place(self, number, kind, turn, low, size):
        """A place for a write of some kind to a layer, within a range."""
        cluster = self.chain.layers[number].cluster
        unit = cluster if kind == 'discard' or turn % 2 else 512
        length = unit * self.rng.randint(1, max(1, min(size, 128 * KIB) // unit))
        return low + self.rng.randrange(0, size - length + 1, unit), length

    def some_work(self, number, count=8, through='nbd', kinds=None):
        """Random writes to a layer; what is there and around it is verified after each."""
        kinds = kinds or KINDS
        for turn in range(count):
            kind = kinds[turn % len(kinds)]
            start, length = self.place(number, kind, turn, 0, self.chain.layers[number].size)
            self.work(number, kind, start, length, through)
            low, high = max(0, start - 4 * KIB), min(start + length + 4 * KIB, self.disk.size)
            if low < high:
                self.disk.check(low, high - low, self.clients['top'].read)

    def guest(self, count=5):
        """Writes to the top."""
        self.some_work(len(self.nodes) - 1, count)

    def committed(self, top, base):
        """Layers have gone to the one below them, in the model and among the nodes."""
        self.chain.commit(top, base)
        del self.nodes[base + 1:top + 1]
        del self.names[base + 1:top + 1]

    def streamed(self, top, base):
        """A layer has got what was below it."""
        self.chain.stream(top, base)
        del self.nodes[base + 1:top]
        del self.names[base + 1:top]
