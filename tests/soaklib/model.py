"""What a disk has to contain, while several threads read and change it."""

import contextlib
import threading

SECTOR = 512


class Wrong(Exception):
    """A read gave something that the disk never contained."""


class Change:
    """A range whose content changes: before, it was old; afterwards, new."""

    def __init__(self, start, new, between=None):
        self.start = start
        self.new = bytes(new)
        self.between = between
        self.end = start + len(new)

    def overlaps(self, start, end):
        """Whether it has bytes in a range."""
        return self.start < end and start < self.end


class Disk:
    """The expected content.

    A read that no change overlaps has to give exactly what is here. One that
    is under way together with a change may give what was there before or what
    comes after, and nothing else; unless the change says what may be seen in
    between.
    """

    def __init__(self, content):
        self.content = bytearray(content)
        self.lock = threading.Lock()
        self.changes = []
        self.reads = []

    @property
    def size(self):
        """Size in bytes."""
        return len(self.content)

    @contextlib.contextmanager
    def change(self, start, new, between=None):
        """The content changes while this is open. Changes must not overlap."""
        change = Change(start, new, between)
        with self.lock:
            assert not any(c.overlaps(change.start, change.end) for c in self.changes)
            self.changes.append(change)
            for read in self.reads:
                read.append(change)
        try:
            yield change
        finally:
            with self.lock:
                self.content[change.start:change.end] = change.new
                self.changes.remove(change)

    def check(self, start, length, read):
        """Calls read(start, length) and judges the result."""
        with self.reading(start, length) as judge:
            judge(read(start, length), read)

    @contextlib.contextmanager
    def reading(self, start, length):
        """A read is under way while this is open; gives what judges the result."""
        during = []
        with self.lock:
            before = bytes(self.content[start:start + length])
            during.extend(self.changes)
            self.reads.append(during)
        try:
            yield lambda data, read=None: self.judge(start, before, during, data, read)
        finally:
            with self.lock:
                # Not remove(), which would take an equal list.
                self.reads = [r for r in self.reads if r is not during]

    def judge(self, start, before, during, data, read):
        """Raises if a read has not given what it should."""
        if data == before:
            return
        end = start + len(before)
        if len(data) != len(before):
            raise Wrong(f'{len(data)} bytes instead of {len(before)} at {start}')
        with self.lock:
            during = [c for c in during if c.overlaps(start, end)]
        for at in range(start, end, SECTOR):
            stop = min(at + SECTOR, end)
            found = data[at - start:stop - start]
            if found == before[at - start:stop - start]:
                continue
            allowed = [before[at - start:stop - start]]
            for change in during:
                if change.overlaps(at, stop):
                    allowed += pieces(change, at, stop, before, start)
            # The host's page cache does not keep a sector together.
            if any(byte not in choice for byte, *choice in zip(found, *allowed)):
                text = describe(at, found, before[at - start:stop - start], during)
                if read:
                    text += '; read once more: ' + ('the same' if read(at, stop - at) == found else 'something else')
                raise Wrong(text)


def pieces(change, at, stop, before, start):
    """What a change may make of a sector."""
    low, high = max(at, change.start), min(stop, change.end)
    for new in filter(None, (change.new, change.between)):
        sector = bytearray(before[at - start:stop - start])
        sector[low - at:high - at] = new[low - change.start:high - change.start]
        yield sector


def describe(at, found, expected, during):
    """For the message about a wrong sector."""
    changes = ''.join(f', while {c.start}+{c.end - c.start} changed to {c.new[:8].hex()}' for c in during)
    return (f'sector at {at} ({at:#x}) is {bytes(found[:24]).hex()}..., '
            f'expected {bytes(expected[:24]).hex()}...{changes}')


class Reader(threading.Thread):
    """Reads random ranges through a connection of its own until told to stop."""

    def __init__(self, disk, client, rng, largest=256 << 10):
        super().__init__(daemon=True)
        self.disk = disk
        self.client = client
        self.rng = rng
        self.largest = largest
        self.count = 0
        self.failure = None
        self.progress = threading.Condition()
        self.ending = False

    def run(self):
        """The thread."""
        try:
            while not self.ending:
                length = SECTOR * self.rng.randint(1, self.largest // SECTOR)
                length = min(length, self.disk.size)
                start = self.rng.randrange(0, self.disk.size - length + 1, SECTOR)
                self.disk.check(start, length, self.client.read)
                with self.progress:
                    self.count += 1
                    self.progress.notify_all()
        except Exception as error:  # pylint: disable=broad-except
            with self.progress:
                self.failure = error
                self.progress.notify_all()
        finally:
            self.client.close()

    def more(self, count=3, timeout=120):
        """Waits until that many reads have ended from now on."""
        with self.progress:
            goal = self.count + count
            done = self.progress.wait_for(lambda: self.failure or self.count >= goal, timeout)
        self.judge()
        if not done:
            raise Wrong(f'no read ended within {timeout} s')

    def judge(self):
        """Raises what the thread has found."""
        if self.failure:
            raise self.failure

    def stop(self):
        """Ends the thread and raises what it has found."""
        self.ending = True
        self.join(120)
        self.judge()
        if self.is_alive():
            raise Wrong('a read does not end')
