"""Two chains of images that see the same operations, and their model."""

import os
import random
import re
import struct
import zlib

from . import bitmaps, programs
from .header import Header
from .programs import Mismatch
from .runs import Runs

KIB = 1024
MIB = 1024 * KIB
KEY = 'encrypt.key-secret=sec0'


class Layer:
    """What is known of one image of the chain."""

    def __init__(self, name, kind, size, cluster, version):
        self.name = name
        self.kind = kind            # qcow2 or raw
        self.cluster = cluster
        # The smallest part that is allocated by itself.
        self.part = cluster
        self.version = version
        self.lazy = False
        self.preallocated = False
        # The end is within a cluster, and the rest of that may hold something
        # else than zeroes: it was cut off, or copied from a longer backing file.
        self.cut = False
        # Guest clusters that were written compressed: QEMU's driver loses space
        # where it does so again. None: it may be any of them.
        self.packed = set()
        # The bits in its bitmaps need not be the same on both sides.
        self.bits_differ = False
        self.content = Runs(size)
        # Internal snapshots: name, and content and cut as they were.
        self.kept = {}
        # The name of the external data file, and whether the disk is there as it is.
        self.data_file = None
        self.data_is_raw = False
        self.encrypted = False

    def describe(self, options):
        """Takes from the creation options what there is to know."""
        for word in options.split(','):
            key, value = word.split('=')
            if word == 'extended_l2=on':
                self.part = self.cluster // 32
            elif key == 'data_file':
                self.data_file = value
            elif word == 'data_file_raw=on':
                self.data_is_raw = True
            elif key == 'encrypt.format':
                self.encrypted = True

    @property
    def size(self):
        """The virtual size."""
        return self.content.size


class Settings:
    """What a whole run has in common."""

    def __init__(self, driver, oracle, limit, inject=None):
        self.driver = driver
        self.oracle = oracle
        self.limit = limit
        self.inject = inject


class Chain:
    """The chain in two copies, a and b, each served by one of the drivers."""

    def __init__(self, settings, directory, seed):
        self.settings = settings
        self.directory = directory
        self.directories = [os.path.join(directory, side) for side in 'ab']
        for path in self.directories:
            os.makedirs(path)
        self.rng = random.Random(seed)
        self.layers = []
        self.serial = 0
        # Same allocation on both sides; a crash ends that.
        self.alike = True
        self.io = None
        self.discard = False
        self.no_unref = False
        self.served = [settings.driver, settings.oracle]
        self.counts = {}
        self.log = []
        self.injected = False
        # Version 2 has no zero clusters: zeroing much of a large disk takes
        # as much space in the image.
        self.large = self.rng.random() < 0.15
        self.first_layer()

    # Running programs

    def note(self, text):
        """Adds a line to what is printed if this sequence fails."""
        self.log.append(text)

    def deal(self, rng):
        """Which driver serves which side next."""
        draw = rng.random()
        driver, oracle = self.settings.driver, self.settings.oracle
        if draw < 0.65:
            self.served = [driver, oracle]
        elif draw < 0.85:
            self.served = [oracle, driver]
        else:
            self.served = [driver, driver]

    def both(self, program, args, status=0, weakness=None):
        """Runs a program on both sides; checks that the same comes out.

        Arguments may be functions of the driver. Returns the two outputs, or
        None if both failed in the same way and status is None. If only the
        oracle failed, and said what matches weakness, returns its side.
        """
        assert self.io is None
        words = [[str(a(d)) if callable(a) else str(a) for a in args] for d in self.served]
        self.note(f'{program} {" ".join(words[0])} [{self.served[0].name}, {self.served[1].name}]')
        running = [programs.start(driver, program, line, directory)
                   for driver, line, directory in zip(self.served, words, self.directories)]
        results = [programs.finish(process, self.settings.limit) for process in running]
        texts = [programs.without_paths(driver.neutral(result[2]), *self.directories)
                 for driver, result in zip(self.served, results)]
        if results[0][0] != results[1][0] or texts[0] != texts[1]:
            for side in (0, 1):
                if self.weak(side, weakness, texts[side]) and results[1 - side][0] == 0:
                    return side
            raise Mismatch(f'{program} {" ".join(words[0])}:\n'
                           + ''.join(f'  {d.name}: status {r[0]}: {t or r[1]}\n'
                                     for d, r, t in zip(self.served, results, texts)))
        if status is not None and results[0][0] != status:
            raise Mismatch(f'{program} {" ".join(words[0])}: status {results[0][0]}: {texts[0]}')
        if results[0][0] != 0:
            return None
        return [programs.without_paths(driver.neutral(result[1]), *self.directories)
                for driver, result in zip(self.served, results)]

    def weak(self, side, weakness, text):
        """Whether the oracle serves this side and refuses what it need not."""
        return bool(weakness and self.served[side] is self.settings.oracle
                    and self.settings.driver is not self.settings.oracle and re.search(weakness, text))

    def run(self, driver, side, program, args, status=(0,)):
        """Runs a program on one side; returns (status, output)."""
        assert self.io is None
        words = [str(a(driver)) if callable(a) else str(a) for a in args]
        process = programs.start(driver, program, words, self.directories[side])
        result = programs.finish(process, self.settings.limit)
        if result[0] not in status:
            raise Mismatch(f'{program} {" ".join(words)} [{driver.name}] in {"ab"[side]}: '
                           f'status {result[0]}: {result[1]}{result[2]}')
        return result[0], driver.neutral(result[1])

    # The chain

    def name(self, kind):
        """A new file name."""
        self.serial += 1
        return f'{self.serial}.{kind}'

    @property
    def top(self):
        """The image that is written to."""
        return self.layers[-1]

    def with_secrets(self, layer):
        """Whether a layer, or one below it, is encrypted."""
        return any(other.encrypted for other in self.layers[:self.layers.index(layer) + 1])

    def node(self, driver, layer, name=None, alone=False):
        """The options that open a layer, or a copy of it called name, with what is below or alone."""
        fmt = driver.format if layer.kind == 'qcow2' else 'raw'
        words = [f'driver={fmt}', f'file.filename={name or layer.name}']
        below = self.layers[:self.layers.index(layer) + 1][::-1] if layer in self.layers else [layer]
        words += ['backing.' * depth + KEY for depth, other in enumerate(below[:1] if alone else below)
                  if other.encrypted]
        return ','.join(words)

    def image(self, layer, name=None, alone=False):
        """Arguments for qemu-img that name what node() opens."""
        if layer in self.layers and self.with_secrets(layer) or layer.encrypted:
            return [*programs.SECRET, '--image-opts', lambda d: self.node(d, layer, name, alone)]
        return ['-f', (lambda d: d.format) if layer.kind == 'qcow2' else 'raw', name or layer.name]

    def note_tails(self):
        """Notes which images may have copied something beyond their end."""
        for below, layer in zip(self.layers, self.layers[1:]):
            if layer.size % layer.cluster and below.size > layer.size:
                layer.cut = True

    def draw_size(self, rng, cluster):
        """The size of a disk."""
        if self.large:
            return rng.choice([rng.randint(1, 64) * MIB, rng.randint(1, 16) * 64 * MIB,
                               rng.randint(1, 1 << 15) * 32 * KIB + 512 * rng.randint(0, 64)])
        if cluster >= 512 * KIB:
            return max(512, rng.randint(1, 10) * cluster + 512 * rng.randint(-40, 40))
        return rng.choice([rng.randint(1, 64) * 512, rng.randint(1, 64) * cluster,
                           rng.randint(1, 4096) * 512, rng.randint(1, 8192) * 512])

    def draw_options(self, rng, backed):
        """Creation options: (text, cluster size, version, lazy, preallocated)."""
        bits = rng.choice([9, 9, 10, 11, 12, 12, 13, 14, 15, 16, 16, 16, 16, 17, 18, 19, 20, 21])
        if self.large:
            bits = max(bits, 12)
        version = 3 if self.large or rng.random() < 0.75 else 2
        options = [f'cluster_size={1 << bits}', 'compat=' + ('1.1' if version == 3 else '0.10')]
        lazy = version == 3 and rng.random() < 0.2
        if version == 3:
            if rng.random() < 0.6:
                options.append(f'refcount_bits={1 << rng.randint(0, 6)}')
            if lazy:
                options.append('lazy_refcounts=on')
            if rng.random() < 0.2:
                options.append('compression_type=zstd')
        extended = version == 3 and bits >= 14 and rng.random() < 0.4
        if extended:
            options.append('extended_l2=on')
        encrypted = rng.random() < 0.12
        if encrypted:
            options += ['encrypt.format=' + rng.choice(['luks', 'luks', 'aes']), KEY]
            if options[-2].endswith('luks'):
                options.append('encrypt.iter-time=10')
        if version == 3 and rng.random() < 0.15:
            options.append('data_file=' + self.name('data'))
            # All clusters of an image that is raw are allocated.
            if not backed and not encrypted and rng.random() < 0.5:
                options.append('data_file_raw=on')
        preallocation = 'off'
        # What an encrypted image has in a cluster that nobody wrote to is noise.
        if (extended or not backed) and not self.large and not encrypted and rng.random() < 0.3:
            preallocation = rng.choice(['metadata', 'falloc', 'full'])
            options.append(f'preallocation={preallocation}')
        return ','.join(options), 1 << bits, version, lazy, preallocation != 'off'

    def first_layer(self):
        """Makes the bottom of the chain."""
        rng = self.rng
        self.deal(rng)
        if rng.random() < 0.2:
            layer = Layer(self.name('raw'), 'raw', self.draw_size(rng, 64 * KIB), 64 * KIB, 0)
            self.both('qemu-img', ['create', '-q', '-f', 'raw', layer.name, layer.size])
        else:
            options, cluster, version, lazy, preallocated = self.draw_options(rng, False)
            layer = Layer(self.name('qcow2'), 'qcow2', self.draw_size(rng, cluster), cluster, version)
            layer.lazy, layer.preallocated = lazy, preallocated
            layer.describe(options)
            self.both('qemu-img', ['create', '-q', *programs.SECRET, '-f', lambda d: d.format, '-o', options,
                                   layer.name, layer.size])
        self.layers.append(layer)

    def add_layer(self, rng):
        """Puts a new overlay on top."""
        options, cluster, version, lazy, preallocated = self.draw_options(rng, True)
        below = self.top
        size = below.size
        if rng.random() < 0.3:
            size = self.draw_size(rng, cluster)
        # Not created with a size, an overlay has that of the image below.
        args = [size] if size != below.size or rng.random() < 0.5 else []
        # Nor is there a way to tell how to open that, if it takes more than its name.
        if self.with_secrets(below):
            args = [size, '-u']
        layer = Layer(self.name('qcow2'), 'qcow2', below.size, cluster, version)
        layer.lazy, layer.preallocated = lazy, preallocated
        layer.describe(options)
        layer.content = below.content.copy()
        layer.content.resize(size)
        same_name = rng.random() < 0.5
        backing = [lambda d: d.format if same_name else 'qcow2'] if below.kind == 'qcow2' else ['raw']
        self.both('qemu-img', ['create', '-q', *programs.SECRET, '-f', lambda d: d.format, '-o', options,
                               '-b', below.name, '-F', *backing, layer.name, *args])
        self.layers.append(layer)

    # The open image

    def open(self, rng):
        """Opens the top on both sides."""
        self.deal(rng)
        for _ in range(5):
            options = self.draw_open_options(rng)
            pair = [programs.Io(driver, self.node(driver, self.top), self.format_options(options), directory,
                                self.settings.limit)
                    for driver, directory in zip(self.served, self.directories)]
            self.note(f'open {self.top.name} {",".join(options)} [{self.served[0].name}, {self.served[1].name}]')
            answers = [programs.without_paths(io.opened() or '', directory)
                       for io, directory in zip(pair, self.directories)]
            if answers[0] != answers[1]:
                for io in pair:
                    io.kill()
                raise Mismatch(f'opening {self.top.name} with {options}:\n'
                               + ''.join(f'  {d.name}: {a or "opened"}\n' for d, a in zip(self.served, answers)))
            if not answers[0]:
                self.io = pair
                self.discard = 'discard=unmap' in options
                self.no_unref = 'discard-no-unref=on' in options
                return
        raise Mismatch(f'cannot open {self.top.name}: {answers[0]}')

    def format_options(self, options):
        """The options, for the driver that has them."""
        return options if self.top.kind == 'qcow2' else [o for o in options if o.startswith('discard=')]

    def draw_open_options(self, rng):
        """Run-time options."""
        options = ['discard=' + ('unmap' if rng.random() < 0.75 else 'ignore')]
        cluster = self.top.cluster
        if rng.random() < 0.4:
            # Tiny caches, so that tables are written and read again.
            if rng.random() < 0.7:
                options.append(f'l2-cache-size={rng.choice([1, 2 * cluster, 4 * cluster, 8 * KIB, 64 * KIB])}')
                if rng.random() < 0.5:
                    entry = 512 << rng.randint(0, 12)
                    options.append(f'l2-cache-entry-size={min(entry, cluster)}')
                if rng.random() < 0.6:
                    options.append(f'refcount-cache-size={rng.choice([1, 4 * cluster, 8 * cluster])}')
            else:
                options.append(f'cache-size={rng.choice([64 * KIB, MIB, 16 * cluster])}')
        if rng.random() < 0.1:
            options.append('cache-clean-interval=1')
        if rng.random() < 0.2:
            options.append('overlap-check=' + rng.choice(['none', 'constant', 'cached', 'all']))
        if self.top.version == 3:
            # With snapshots QEMU's driver lets the file forget data that they have, too.
            if rng.random() < 0.2 and not self.top.kept:
                options.append('discard-no-unref=on')
            if rng.random() < 0.2:
                options.append('lazy-refcounts=' + rng.choice(['on', 'off']))
        for name in ('request', 'snapshot', 'other'):
            if rng.random() < 0.1:
                options.append(f'pass-discard-{name}=' + rng.choice(['on', 'off']))
        if rng.random() < 0.15:
            options.append('cache.no-flush=on')
        return options

    def commands(self, *lines, weakness=None, instead=None):
        """Sends commands to both sides; returns the answers, which are equal.

        Lines of asynchronous requests come in any order. If only the oracle
        says what matches weakness, it gets another command instead.
        """
        for line in lines:
            self.note(f'  {line}')
        for number, io in enumerate(self.io):
            io.send(self.tamper(number, lines))
        answers = [sorted(io.answer(len(lines))) for io in self.io]
        if answers[0] != answers[1]:
            for side in (0, 1):
                if self.weak(side, weakness, ' '.join(answers[side])) and not answers[1 - side]:
                    self.note(f'  {instead} [{self.served[side].name}]')
                    # What is allocated is another matter then.
                    self.alike = False
                    self.io[side].send([instead])
                    answer = self.io[side].answer(1)
                    if not answer:
                        return []
            raise Mismatch('after ' + '; '.join(lines) + ':\n'
                           + ''.join(f'  {d.name}: {" / ".join(a[:20]) or "nothing said"}\n'
                                     for d, a in zip(self.served, answers)))
        return answers[0]

    def must(self, *lines):
        """Sends commands that are to succeed, and so to say nothing."""
        answer = self.commands(*lines)
        if answer:
            raise Mismatch('after ' + '; '.join(lines) + ': ' + ' / '.join(answer[:20]))

    def close(self):
        """Closes the image."""
        if self.io:
            pair, self.io = self.io, None
            self.note('close')
            for io in pair:
                io.close()

    def crash(self):
        """Ends both programs at once."""
        pair, self.io = self.io, None
        self.note('kill -9')
        for io in pair:
            io.kill()

    def abandon(self):
        """Ends whatever still runs."""
        if self.io:
            pair, self.io = self.io, None
            for io in pair:
                io.kill()

    # Injected faults: the harness has to find them

    def tamper(self, side, lines):
        """Loses a write, if that is the fault to be injected."""
        lines = list(lines)
        if self.settings.inject == 'lost-write' and side == 0 and not self.injected:
            for number, line in enumerate(lines):
                if line.startswith('write -q -P'):
                    lines[number] = 'length'
                    self.injected = True
                    lines[number] = 'read -q 0 512'
                    break
        return lines

    def damage(self):
        """Damages the top's file on side a, if that is the fault."""
        kind = self.settings.inject
        if self.injected or kind in (None, 'lost-write') or self.top.kind != 'qcow2':
            return
        path = os.path.join(self.directories[0], self.top.name)
        if kind == 'bitmap':
            if not bitmaps.read(path):
                # Version 2 cannot have any.
                self.both('qemu-img', ['bitmap', '--add', *self.image(self.top), 'spoilt'], status=None)
            self.injected = not self.top.bits_differ and bitmaps.spoil(path)
            return
        with open(path, 'r+b') as file:
            image = Tables(file)
            if kind == 'name':
                data = file.read()
                where = data.find(struct.pack('>I', 0xE2792ACA))
                self.injected = 0 <= where < image.cluster
                if self.injected:
                    file.seek(where)
                    file.write(struct.pack('>II', 0xE2792ACA, 6) + b'rqcow2\0\0')
                return
            for offset, entry in image.entries():
                data = entry & 0x00fffffffffffe00
                if not data or entry & 1 or entry >> 62 & 1:
                    continue
                self.injected = True
                if kind == 'data':
                    file.seek(data)
                    byte = file.read(1) or b'\0'
                    file.seek(data)
                    file.write(bytes([byte[0] ^ 0x55]))
                elif kind == 'copied':
                    file.seek(offset)
                    file.write(struct.pack('>Q', entry & ~(1 << 63)))
                elif kind == 'leak':
                    file.seek(offset)
                    file.write(struct.pack('>Q', 0))
                break

    # Checks

    def expect(self, path, content, what):
        """Compares a raw file with the model."""
        size = os.path.getsize(path)
        if size != content.size:
            raise Mismatch(f'{what}: {size} bytes instead of {content.size}')
        with open(path, 'rb') as file:
            for start, end, value in content.runs():
                check_run(file, start, end, bytes([value]), what)

    def read_all(self, rng):
        """Reads everything through the open image."""
        lines = []
        for start, end, value in self.top.content.runs():
            if end - start > 64 * MIB:
                middle = rng.randrange(start, end - 64 * KIB)
                pieces = [(start, start + MIB), (middle, middle + 64 * KIB), (end - MIB, end)]
            else:
                pieces = [(at, min(at + 16 * MIB, end)) for at in range(start, end, 16 * MIB)]
            lines += [f'read -q -P {value} {a} {b - a}' for a, b in pieces]
        for at in range(0, len(lines), 32):
            self.must(*lines[at:at + 32])

    def verify_layer(self, driver, side, layer):
        """Compares what a driver reads from an image with the model."""
        out = os.path.join(self.directories[side], 'out.raw')
        self.run(driver, side, 'qemu-img', ['convert', '-O', 'raw', *self.image(layer), 'out.raw'])
        self.expect(out, layer.content, f'{layer.name} of side {"ab"[side]} as read by {driver.name}')
        os.remove(out)
        if layer.data_is_raw:
            self.expect_raw(side, layer)

    def expect_raw(self, side, layer):
        """A raw data file has the disk without the image."""
        path = os.path.join(self.directories[side], layer.data_file)
        size = os.path.getsize(path)
        with open(path, 'rb') as file:
            for start, end, value in layer.content.runs():
                if value or start < size:
                    check_run(file, start, end if value else min(end, size), bytes([value]),
                              f'the data file of {layer.name} of side {"ab"[side]}')

    def check_layer(self, side, layer):
        """The unpatched qemu-img finds nothing to complain about."""
        if layer.kind != 'qcow2':
            return
        self.run(self.settings.oracle, side, 'qemu-img', ['check', '-q', *self.image(layer)])
        path = os.path.join(self.directories[side], layer.name)
        with open(path, 'rb') as file:
            if b'rqcow2' in file.read(layer.cluster):
                raise Mismatch(f'the header of {layer.name} says rqcow2')

    def verify_kept(self, driver, side, layer):
        """Compares the internal snapshots of an image with the model."""
        out = os.path.join(self.directories[side], 'out.raw')
        for name, (content, _) in layer.kept.items():
            # It is shown with the size of the disk.
            if content.size == layer.size:
                self.run(driver, side, 'qemu-img', ['convert', '-l', f'snapshot.name={name}', '-O', 'raw',
                                                    *self.image(layer), 'out.raw'])
                self.expect(out, content, f'snapshot {name} of {layer.name} of side {"ab"[side]} as read by '
                                          f'{driver.name}')
                os.remove(out)

    def normal_map(self, text, exact):
        """What qemu-img map says, less where in the file things are."""
        merged = []
        for entry in programs.parse(text):
            flags = (entry['depth'], entry['present'])
            if exact:
                # Which parts of data are holes in the file is its storage's choice.
                data = entry['data']
                flags += (data or entry['zero'], data, entry['compressed'])
            if merged and merged[-1][1] == flags:
                merged[-1][0][1] += entry['length']
            else:
                merged.append(([entry['start'], entry['length']], flags))
        return merged

    def verify(self, rng, thorough):
        """Checks the closed images."""
        assert self.io is None
        driver, oracle = self.settings.driver, self.settings.oracle
        for side in (0, 1):
            for layer in self.layers if thorough else [self.top]:
                self.check_layer(side, layer)
        for layer in self.layers if thorough else [self.top]:
            bitmaps.compare(self, layer)
        # Each side by the driver that did not write it, at the least.
        self.verify_layer(driver, 0, self.top)
        self.verify_layer(oracle, 0, self.top)
        self.verify_layer(driver, 1, self.top)
        self.verify_kept(driver, 1, self.top)
        self.verify_kept(oracle, 0, self.top)
        if thorough:
            for layer in self.layers[:-1]:
                if rng.random() < 0.3:
                    self.verify_layer(rng.choice([driver, oracle]), rng.randint(0, 1), layer)
        # One image, two drivers: all they say of it is the same.
        side = rng.randint(0, 1)
        if self.top.kind != 'qcow2':
            return
        commands = [['map', '--output=json'], ['info', '--output=json'], ['snapshot', '-l'], ['check', '--output=json'],
                    ['measure', '--output=json', '-O', lambda d: d.format]]
        if thorough:
            commands.append(['info', '--backing-chain', '--output=json'])
        for command in commands:
            line = [*command, *self.image(self.top, alone=command[0] == 'info')]
            if command[0] == 'snapshot':
                line = [*command, *programs.SECRET, '--image-opts', lambda d: self.node(d, self.top)]
            texts = [self.run(d, side, 'qemu-img', line)[1] for d in (driver, oracle)]
            answers = texts if command[0] == 'snapshot' else [programs.parse(text) for text in texts]
            if command[0] == 'measure' and answers[1].get('bitmaps') == 0:
                # Known only to a driver that can keep bitmaps.
                answers = [{k: v for k, v in answer.items() if k != 'bitmaps'} for answer in answers]
            if command[0] == 'info':
                answers = [without_chain(answer) for answer in answers]
            if answers[0] != answers[1]:
                raise Mismatch(f'qemu-img {command[0]} {self.top.name}:\n  {driver.name}: {texts[0]}\n'
                               f'  {oracle.name}: {texts[1]}')
            if command[0] == 'map' and self.alike:
                other = self.run(oracle, 1 - side, 'qemu-img', line)[1]
                # A commit keeps the zeroes that it sees, and how many of those
                # are seen in sparse files depends on their storage: so does how
                # the two drivers lay bitmaps and compressed data out.
                unlike = any(self.counts.get(name) for name in ('commit', 'bitmap', 'compress'))
                exact = not unlike and not any(layer.preallocated for layer in self.layers)
                maps = [self.normal_map(text, exact) for text in (texts[1], other)]
                if maps[0] != maps[1]:
                    raise Mismatch(f'qemu-img map {self.top.name}: side {"ab"[side]}: {maps[0]}\n'
                                   f'  side {"ab"[1 - side]}: {maps[1]}')


def without_chain(info):
    """What qemu-img info tells, less what rqcow2 alone says: how long its chains are."""
    if isinstance(info, list):
        return [without_chain(value) for value in info]
    if isinstance(info, dict):
        return {key: without_chain(value) for key, value in info.items() if key != 'chain'}
    return info


class Tables:
    """As much of a qcow2 image as it takes to damage it."""

    def __init__(self, file):
        self.file = file
        self.header = Header(file)
        self.cluster = self.header.cluster
        self.entry = 16 if self.header.extended_l2 else 8
        file.seek(0)

    def entries(self):
        """Yields (offset in the file, entry) of all L2 entries."""
        self.file.seek(self.header.l1_table)
        l1 = struct.unpack(f'>{self.header.l1_size}Q', self.file.read(8 * self.header.l1_size))
        for table in l1:
            table &= 0x00fffffffffffe00
            if table:
                self.file.seek(table)
                data = self.file.read(self.cluster)
                for at in range(0, self.cluster, self.entry):
                    yield table + at, struct.unpack_from('>Q', data, at)[0]


def check_run(file, start, end, allowed, what):
    """All bytes of a range of a file are among those allowed."""
    fd = file.fileno()
    position = start
    while position < end:
        if 0 in allowed:
            # A hole is zeroes: no need to read it.
            try:
                position = min(os.lseek(fd, position, os.SEEK_DATA), end)
            except OSError:
                return
            if position >= end:
                return
        data = os.pread(fd, min(MIB, end - position), position)
        if not data:
            raise Mismatch(f'{what}: ends at {position}')
        if data.translate(None, allowed):
            wrong = next(i for i, byte in enumerate(data) if byte not in allowed)
            raise Mismatch(f'{what}: byte {position + wrong} is {data[wrong]:#04x} instead of '
                           + ' or '.join(f'{byte:#04x}' for byte in allowed)
                           + f' (of {start} to {end})')
        position += len(data)


def fingerprint(path):
    """A number that changes when the file does."""
    with open(path, 'rb') as file:
        return zlib.crc32(file.read())
