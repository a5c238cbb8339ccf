"""The contents of a disk as runs of equal bytes."""

import bisect


class Runs:
    """What a disk contains: runs of one byte value each.

    All that is ever written is long runs of one value, so a disk of any size
    takes as much memory as it has seen writes.
    """

    def __init__(self, size):
        self.size = size
        self.starts = [0]
        self.values = [0]

    def copy(self):
        """An independent copy."""
        other = Runs(self.size)
        other.starts = self.starts[:]
        other.values = self.values[:]
        return other

    def at(self, offset):
        """The byte at an offset."""
        return self.values[bisect.bisect_right(self.starts, offset) - 1]

    def fill(self, start, end, value):
        """Sets all bytes of a range."""
        assert 0 <= start <= end <= self.size, (start, end, self.size)
        if start == end:
            return
        after = self.at(end) if end < self.size else None
        first = bisect.bisect_left(self.starts, start)
        last = bisect.bisect_right(self.starts, end)
        starts, values = [], []
        if first == 0 or self.values[first - 1] != value:
            starts.append(start)
            values.append(value)
        if after is not None and after != value:
            starts.append(end)
            values.append(after)
        # A run that starts at the end may have to be joined to this one.
        self.starts[first:last] = starts
        self.values[first:last] = values

    def resize(self, size):
        """Cuts the disk off or appends zeroes."""
        if size < self.size:
            last = bisect.bisect_left(self.starts, max(size, 1))
            del self.starts[last:], self.values[last:]
            self.size = size
        elif size > self.size:
            old, self.size = self.size, size
            if self.values[-1] != 0:
                self.starts.append(old)
                self.values.append(0)

    def runs(self, start=0, end=None):
        """Yields (start, end, value) for all of a range."""
        end = self.size if end is None else end
        index = bisect.bisect_right(self.starts, start) - 1
        while start < end:
            stop = self.starts[index + 1] if index + 1 < len(self.starts) else self.size
            stop = min(stop, end)
            yield start, stop, self.values[index]
            start = stop
            index += 1

    def overlay(self, other):
        """Replaces the start of this disk by the whole of another one."""
        if other.size > self.size:
            self.resize(other.size)
        for start, end, value in list(other.runs()):
            self.fill(start, end, value)
