"""Threads that use a disk as a guest would, and check all that they read."""

import contextlib
import threading

from . import nbd
from .model import SECTOR, Wrong

SLOT = 1 << 20
LARGEST = 128 << 10


class Worker(threading.Thread):
    """One connection: it reads everything, and writes to slots of its own."""

    def __init__(self, guest, number, client, rng):
        super().__init__(daemon=True)
        self.guest = guest
        self.disk = guest.disk
        self.number = number
        self.client = client
        self.rng = rng
        self.counts = {}

    def run(self):
        """The thread."""
        guest = self.guest
        try:
            while guest.enter():
                kind = self.rng.choices(('read', 'many', 'write', 'zero', 'discard', 'flush'),
                                        (40, 10, 30, 9, 9, 2))[0]
                getattr(self, kind)()
                self.counts[kind] = self.counts.get(kind, 0) + 1
                guest.leave()
        except Exception as error:  # pylint: disable=broad-except
            guest.failed(error)
        finally:
            self.client.close()

    def anywhere(self):
        """A range of the disk."""
        length = SECTOR * self.rng.randint(1, 2 * LARGEST // SECTOR)
        return self.rng.randrange(0, self.disk.size - length + 1, SECTOR), length

    def place(self, unit):
        """A range in one of the slots that only this thread writes."""
        slots = self.disk.size // SLOT
        slot = self.rng.randrange(self.number, slots, len(self.guest.workers))
        length = unit * self.rng.randint(1, max(1, LARGEST // unit))
        return slot * SLOT + self.rng.randrange(0, SLOT - length + 1, unit), length

    def read(self):
        """One read."""
        self.disk.check(*self.anywhere(), self.client.read)

    def many(self):
        """Several reads at once."""
        with contextlib.ExitStack() as stack:
            done = {}
            for _ in range(8):
                start, length = self.anywhere()
                judge = stack.enter_context(self.disk.reading(start, length))
                done[self.client.submit(nbd.READ, start, length)] = judge
            while done:
                handle, data = self.client.collect()
                done.pop(handle)(data)

    def write(self):
        """Random bytes."""
        start, length = self.place(self.rng.choice((SECTOR, 4096, self.guest.cluster)))
        data = self.rng.randbytes(length)
        with self.disk.change(start, data):
            self.client.write(start, data)

    def zero(self):
        """Zeroes."""
        start, length = self.place(self.rng.choice((SECTOR, self.guest.cluster)))
        with self.disk.change(start, bytes(length)):
            self.client.zero(start, length, self.rng.random() < 0.5)

    def discard(self):
        """A discard, which may or may not make zeroes: filters of jobs do not pass it on."""
        start, length = self.place(self.guest.cluster)
        old = bytes(self.disk.content[start:start + length])
        with self.disk.change(start, bytes(length)) as change:
            self.client.discard(start, length)
            data = bytes(self.client.read(start, length))
            for at in range(0, length, SECTOR):
                if data[at:at + SECTOR] not in (bytes(SECTOR), old[at:at + SECTOR]):
                    raise Wrong(f'sector at {start + at} is {data[at:at + 24].hex()}... after a discard')
            change.new = data

    def flush(self):
        """A flush."""
        self.client.flush()


class Guest:
    """All the threads."""

    def __init__(self, disk, connect, cluster, rngs):
        self.disk = disk
        self.connect = connect
        self.cluster = cluster
        self.state = threading.Condition()
        self.running = 0
        self.wanted = True
        self.ending = False
        self.failure = None
        self.operations = 0
        self.workers = []
        self.workers += [Worker(self, number, connect(), rng) for number, rng in enumerate(rngs)]
        for worker in self.workers:
            worker.start()

    def enter(self):
        """A thread may go on; returns False if it has to end."""
        with self.state:
            self.state.wait_for(lambda: self.wanted or self.ending)
            if self.ending:
                return False
            self.running += 1
            return True

    def leave(self):
        """A thread has done something."""
        with self.state:
            self.running -= 1
            self.operations += 1
            self.state.notify_all()

    def failed(self, error):
        """A thread has found something."""
        with self.state:
            self.running -= 1
            self.failure = self.failure or error
            self.ending = True
            self.state.notify_all()

    def judge(self):
        """Raises what the threads have found."""
        if self.failure:
            raise self.failure

    def more(self, count, timeout=900):
        """Waits until that many more operations are done."""
        with self.state:
            goal = self.operations + count
            done = self.state.wait_for(lambda: self.operations >= goal or self.failure, timeout)
        self.judge()
        if not done:
            raise Wrong(f'input and output stand still for {timeout} s')

    @contextlib.contextmanager
    def paused(self):
        """Nothing is read or written meanwhile."""
        with self.state:
            self.wanted = False
            done = self.state.wait_for(lambda: not self.running or self.failure, 900)
        self.judge()
        if not done:
            raise Wrong('requests do not end')
        yield
        with self.state:
            self.wanted = True
            self.state.notify_all()

    @property
    def content(self):
        """What the disk contains, while nobody changes it."""
        return bytes(self.disk.content)

    def verify(self):
        """All of the disk, while nobody else uses it."""
        with self.paused():
            client = self.connect()
            for at in range(0, self.disk.size, 1 << 20):
                self.disk.check(at, min(1 << 20, self.disk.size - at), client.read)
            client.close()

    def stop(self):
        """Ends the threads; returns how often they did what."""
        with self.state:
            self.ending = True
            self.state.notify_all()
        for worker in self.workers:
            worker.join(900)
        self.judge()
        counts = {}
        for worker in self.workers:
            for kind, count in worker.counts.items():
                counts[kind] = counts.get(kind, 0) + count
        return counts
