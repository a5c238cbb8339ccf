"""A disk whose power may fail: an NBD server that notes when writes and flushes began and ended."""

import contextlib
import dataclasses
import mmap
import random
import select
import socket
import struct
import threading

from . import nbd

SECTOR = 512
OPT_ABORT = 2
REP_UNSUPPORTED = 1 << 31 | 1
# Has flags, flush, trim, write zeroes.
FLAGS = 1 | 4 | 32 | 64
FOREVER = 1 << 62


@dataclasses.dataclass
class Change:
    """A write, or what amounts to one."""

    began: int
    ended: int
    offset: int
    data: bytes


class Disk(threading.Thread):
    """Serves one connection after the other. Has a volatile cache, and finishes what is under way in any order.

    Moments are numbers of a counter that all disks and their users share.
    """

    # Loses what was flushed: to see that this is found.
    liar = False

    def __init__(self, path, content, size, clock, seed):
        super().__init__(daemon=True)
        self.path, self.size, self.clock = path, size, clock
        self.rng = random.Random(seed)
        self.first = bytes(content)
        # Takes room for what is written alone.
        self.content = mmap.mmap(-1, size)
        self.content[:len(content)] = self.first
        self.changes, self.flushes = [], []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen()
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                with sock, contextlib.suppress(EOFError, ConnectionError):
                    self.greet(sock)
                    self.serve(sock)

    def close(self):
        """No more connections."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.join()

    def greet(self, sock):
        """From the greeting to the transmission phase, with no option but the one that leads there."""
        sock.sendall(nbd.INIT_MAGIC + struct.pack('>H', 3))
        receive(sock, 4)
        while True:
            _, option, length = struct.unpack('>QII', receive(sock, 16))
            receive(sock, length)
            if option == nbd.OPT_GO:
                info = struct.pack('>HQH', 0, self.size, FLAGS)
                for kind, body in ((nbd.REP_INFO, info), (nbd.REP_ACK, b'')):
                    sock.sendall(struct.pack('>QIII', nbd.OPTION_REPLY, option, kind, len(body)) + body)
                return
            if option == OPT_ABORT:
                raise EOFError
            sock.sendall(struct.pack('>QIII', nbd.OPTION_REPLY, option, REP_UNSUPPORTED, 0))

    def serve(self, sock):
        """Requests, until the client goes."""
        waiting = []
        while True:
            if not waiting or self.rng.random() < 0.8 and select.select([sock], [], [], 0)[0]:
                _, _, command, handle, offset, length = struct.unpack('>IHHQQI', receive(sock, 28))
                if command == nbd.DISC:
                    return
                data = receive(sock, length) if command == nbd.WRITE else bytes(length)
                change = Change(next(self.clock), FOREVER, offset, data)
                if command in (nbd.WRITE, nbd.TRIM, nbd.WRITE_ZEROES):
                    self.changes.append(change)
                waiting.append((command, handle, change))
            else:
                command, handle, change = waiting.pop(self.rng.randrange(len(waiting)))
                answer = self.finish(command, change)
                sock.sendall(struct.pack('>IIQ', nbd.REPLY, 0, handle) + answer)

    def finish(self, command, change):
        """Does what was asked for; returns the data of a read."""
        end = change.offset + len(change.data)
        if command == nbd.READ:
            return bytes(self.content[change.offset:end])
        if command == nbd.FLUSH:
            self.flushes.append((change.began, next(self.clock)))
        else:
            self.content[change.offset:end] = change.data
            change.ended = next(self.clock)
        return b''

    def length(self, changes):
        """Of a file with no more than that."""
        return max([len(self.first)] + [change.offset + len(change.data) for change in changes])

    def all(self):
        """What is on it."""
        return self.content[:self.length(self.changes)]

    def after(self, moment, lucky):
        """What may be left if the power fails at that moment.

        What had ended when a flush began that has ended is there. Of the rest each sector is for which `lucky` says so,
        given whether its write had ended.
        """
        begun = [change for change in self.changes if change.began <= moment]
        content = bytearray(self.first) + bytes(self.length(begun) - len(self.first))
        flushed = -1 if self.liar else last_flush(self.flushes, moment)
        for change in sorted(begun, key=lambda change: change.ended):
            start, end = change.offset, change.offset + len(change.data)
            if change.ended <= flushed:
                content[start:end] = change.data
                continue
            at = start
            while at < end:
                to = min((at // SECTOR + 1) * SECTOR, end)
                if lucky(change.ended <= moment):
                    content[at:to] = change.data[at - start:to - start]
                at = to
        return content


def last_flush(flushes, moment):
    """When the last flush began that had ended at that moment: what had ended before is kept."""
    return max((began for began, ended in flushes if ended <= moment), default=-1)


def receive(sock, length):
    """That many bytes."""
    data = bytearray()
    while len(data) < length:
        more = sock.recv(length - len(data))
        if not more:
            raise EOFError
        data += more
    return bytes(data)
