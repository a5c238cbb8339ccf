"""A small NBD client: one connection to an export on a Unix socket."""

import errno
import socket
import struct
import time

READ, WRITE, DISC, FLUSH, TRIM, _, WRITE_ZEROES = range(7)
FLAG_NO_HOLE = 1 << 1
INIT_MAGIC = b'NBDMAGICIHAVEOPT'
OPTION_REPLY = 0x3e889045565a9
OPT_GO = 7
REP_ACK, REP_INFO = 1, 3
REQUEST, REPLY = 0x25609513, 0x67446698


class NBDError(Exception):
    """The server reports an error, or breaks the protocol."""

    def __init__(self, text, number=0):
        super().__init__(text)
        self.errno = number


class Client:
    """A connection. Not for more than one thread at a time."""

    def __init__(self, path, export, timeout=120):
        self.size = 0
        self.serial = 0
        self.pending = {}
        self.where = f'{export} on {path}'
        self.sock = connect(path, timeout)
        self.negotiate(export)

    def receive(self, length):
        """That many bytes."""
        data = bytearray(length)
        view = memoryview(data)
        at = 0
        while at < length:
            count = self.sock.recv_into(view[at:])
            if not count:
                raise NBDError(f'connection to {self.where} lost')
            at += count
        return data

    def negotiate(self, export):
        """From the greeting to the transmission phase."""
        if self.receive(16) != INIT_MAGIC:
            raise NBDError(f'{self.where}: not an NBD server')
        flags, = struct.unpack('>H', self.receive(2))
        # Fixed newstyle, and no zeroes to pad the answer if the server can.
        self.sock.sendall(struct.pack('>I', flags & 3))
        name = export.encode()
        body = struct.pack('>I', len(name)) + name + struct.pack('>H', 0)
        self.sock.sendall(b'IHAVEOPT' + struct.pack('>II', OPT_GO, len(body)) + body)
        while True:
            magic, _, kind, length = struct.unpack('>QIII', self.receive(20))
            data = self.receive(length)
            if magic != OPTION_REPLY or kind & 1 << 31:
                raise NBDError(f'no export {self.where}: {bytes(data).decode(errors="replace")}')
            if kind == REP_INFO and data[:2] == b'\0\0':
                self.size, = struct.unpack('>Q', data[2:10])
            if kind == REP_ACK:
                return

    def submit(self, command, offset=0, length=0, data=b'', flags=0):
        """Sends a request; returns its handle."""
        self.serial += 1
        self.pending[self.serial] = (command, offset, length)
        self.sock.sendall(struct.pack('>IHHQQI', REQUEST, flags, command, self.serial, offset, length) + data)
        return self.serial

    def collect(self):
        """Waits for the next reply; returns (handle, data of a read)."""
        magic, error, handle = struct.unpack('>IIQ', self.receive(16))
        if magic != REPLY or handle not in self.pending:
            raise NBDError(f'{self.where}: not a reply')
        command, offset, length = self.pending.pop(handle)
        if error:
            name = errno.errorcode.get(error, error)
            raise NBDError(f'{self.where}: {name} for request {command} at {offset}+{length}', error)
        return handle, self.receive(length) if command == READ else b''

    def request(self, command, offset=0, length=0, data=b'', flags=0):
        """Sends a request and waits for its end."""
        assert not self.pending
        self.submit(command, offset, length, data, flags)
        return self.collect()[1]

    def read(self, offset, length):
        """Reads."""
        return self.request(READ, offset, length)

    def write(self, offset, data):
        """Writes."""
        self.request(WRITE, offset, len(data), data)

    def zero(self, offset, length, unmap=True):
        """Writes zeroes."""
        self.request(WRITE_ZEROES, offset, length, flags=0 if unmap else FLAG_NO_HOLE)

    def discard(self, offset, length):
        """Discards."""
        self.request(TRIM, offset, length)

    def flush(self):
        """Flushes."""
        self.request(FLUSH)

    def close(self):
        """Ends the connection."""
        try:
            self.sock.sendall(struct.pack('>IHHQQI', REQUEST, 0, DISC, 0, 0, 0))
        except OSError:
            pass
        self.sock.close()


def connect(path, timeout):
    """A connected socket; a server that has just started may need a moment."""
    deadline = time.monotonic() + timeout
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect(path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
