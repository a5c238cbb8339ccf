"""The programs that are compared, and how they are run."""

import json
import os
import select
import signal
import statistics
import subprocess


class Crash(Exception):
    """A program ended by a signal, or with an error."""


class Slow(Exception):
    """Something took longer than anybody would wait."""


# What runs a program on one CPU. With one request at a time through worker
# threads, most of the time goes by until another CPU of a virtual machine
# wakes up, and how long that takes has nothing to do with the driver.
ONE_CPU = ('taskset', '-c', str(max(os.sched_getaffinity(0))))


class Side:
    """A set of programs, and the name of the format in them."""

    def __init__(self, name, programs, driver):
        self.name = name
        self.programs = programs
        self.driver = driver

    def program(self, name):
        return os.path.join(self.programs, name)

    def run(self, name, *words, under=(), **options):
        """What it says. `under` is a program that runs it, with its options."""
        return subprocess.run([*under, self.program(name), *words], check=True, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              **options).stdout

    def probe(self, image, patience=None, aio='threads', **options):
        return Probe(self, node(self.driver, image), patience, aio, **options)

    def raw(self, image):
        return Probe(self, node('raw', image))

    def has_io_uring(self, workspace):
        """Whether the kernel lets it be used."""
        path = os.path.join(workspace, 'io_uring')
        with open(path, 'wb') as file:
            file.truncate(65536)
        try:
            self.run('qemu-img', 'bench', '-f', 'raw', '-i', 'io_uring', '-c', '1', path)
            return True
        except subprocess.CalledProcessError:
            return False
        finally:
            os.remove(path)


def node(driver, image):
    """Options of a block node. No locks on the top: several programs have it
    open for writing at a time, and none of them writes."""
    return {'driver': driver, 'file': {'driver': 'file', 'filename': image, 'locking': 'off'}}


def ended(process, errors=''):
    """Says how a process ended."""
    status = process.wait()
    if status < 0:
        return signal.Signals(-status).name
    lines = errors.strip().splitlines()
    return f'exit status {status}: {lines[-1] if lines else ""}'


class Probe:
    """bench/probe.c, with an image open. The commands are explained there.
    `under` is a program that runs it, with its options."""

    def __init__(self, side, options=None, patience=None, aio='threads', under=(), direct=False):
        self.patience = patience
        self.process = subprocess.Popen(  # pylint: disable=consider-using-with
            [*under, side.program('probe')], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, bufsize=1)
        self.offsets = None
        self.opened = None
        # Not an option of a node: backing files get this one too.
        self.ask(f'aio {aio}')
        if direct:
            self.ask('direct')
        if options:
            try:
                self.opened = self.ask('open ' + json.dumps(options))['seconds']
            except (Crash, Slow):
                self.end()
                raise

    def ask(self, command):
        try:
            self.process.stdin.write(command + '\n')
        except BrokenPipeError:
            pass
        if self.patience and not select.select([self.process.stdout], [], [], self.patience)[0]:
            raise Slow(f'over {self.patience} s')
        answer = self.process.stdout.readline()
        if not answer:
            raise Crash(ended(self.process, self.process.stderr.read()))
        return json.loads(answer)

    def go(self, offsets):
        """The list of places that the next requests go to."""
        if offsets != self.offsets:
            self.ask(f'offsets {offsets}')
            self.offsets = offsets

    def go_to_files(self, places):
        """The same in files, without an image: `Spread.places`."""
        self.ask(f'places {places}')
        self.offsets = places

    def warm(self, offsets):
        """Reads at each of the offsets once; returns the seconds."""
        self.go(offsets)
        return self.ask('pass 1')['seconds']

    def read(self, offsets, milliseconds, queue_depth=1, threads=0):
        """Microseconds for each request: of the clock, and of all CPUs."""
        self.go(offsets)
        answer = self.ask(f'read {milliseconds} {queue_depth} {threads}')
        return (answer['seconds'] / answer['count'] * 1e6,
                answer['cpu'] / answer['count'] * 1e6)

    def write(self, offsets, count):
        """Writes at so many of the offsets; returns microseconds for each."""
        self.go(offsets)
        answer = self.ask(f'write {count}')
        return answer['seconds'] / answer['count'] * 1e6

    def extent(self):
        """Microseconds for each extent of the block status of the whole disk."""
        answer = self.ask('status')
        return answer['seconds'] / answer['count'] * 1e6

    def spin(self, milliseconds, threads):
        """Microseconds for each piece of arithmetic."""
        answer = self.ask(f'spin {milliseconds} {threads}')
        return answer['seconds'] / answer['count'] * 1e6

    def status(self, name):
        """A line of /proc/PID/status, in MiB."""
        with open(f'/proc/{self.process.pid}/status', encoding='ascii') as file:
            for line in file:
                if line.startswith(name + ':'):
                    return int(line.split()[1]) / 1024
        raise KeyError(name)

    def end(self):
        """Without closing the image: nothing was written."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            try:
                stream.close()
            except BrokenPipeError:
                pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


def turns(measures, rounds):
    """Calls each of the measures (a dictionary) in every round, in another
    order each time; returns the samples."""
    names = list(measures)
    samples = {name: [] for name in names}
    for number in range(rounds):
        start = number // 2 % len(names)
        order = names[start:] + names[:start]
        for name in order if number % 2 == 0 else reversed(order):
            samples[name].append(measures[name]())
    return samples


class Row:
    """One line of the table: this against that.

    The ratio is that of the medians; with `speed` the samples are times and the
    ratio says how many times faster this is, otherwise how many times as large.
    """

    def __init__(self, name, unit, this, that, *, least=None, most=None, speed=False):
        self.name, self.unit, self.this, self.that = name, unit, this, that
        self.least, self.most = least, most
        self.ratio, self.spread = None, ''
        if this and that:
            pairs = list(zip(this, that))
            ratios = [b / a if speed else a / b for a, b in pairs]
            first, second = statistics.median(this), statistics.median(that)
            self.ratio = second / first if speed else first / second
            self.spread = f'({min(ratios):.3g} .. {max(ratios):.3g})'
        self.note = ''

    @property
    def target(self):
        if self.least is not None:
            return f'>= {self.least:.3g}'
        if self.most is not None:
            return f'<= {self.most:.3g}'
        return ''

    @property
    def reached(self):
        """None if there is nothing to reach."""
        if self.ratio is None or not self.target:
            return None
        return self.ratio >= self.least if self.least is not None else self.ratio <= self.most

    HEAD = (f'{"":66} {"this":>12} {"against":>12} {"ratio":>7} {"to reach":>9}'
            '              (single rounds)')

    def __str__(self):
        def number(samples):
            if isinstance(samples, str):
                return samples
            return f'{statistics.median(samples):.4g} {self.unit}' if samples else ''

        ratio = '' if self.ratio is None else f'{self.ratio:.3g}'
        verdict = {None: '', True: 'reached', False: 'NOT reached'}[self.reached]
        return (f'{self.name:66} {number(self.this):>12} {number(self.that):>12} {ratio:>7} '
                f'{self.target:>9} {verdict:12} {self.spread}{self.note}').rstrip()

    def record(self):
        return {'figure': self.name, 'unit': self.unit, 'ratio': self.ratio,
                'to_reach': self.target, 'reached': self.reached, 'this': self.this,
                'against': self.that, 'note': self.note}
