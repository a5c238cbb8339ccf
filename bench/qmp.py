"""qemu-storage-daemon and what is said to it."""

import json
import select
import subprocess
import time

from sides import Crash, Slow, ended


class Daemon:
    """A storage daemon with its monitor on standard input and output."""

    def __init__(self, side, patience=None):
        self.patience = patience
        self.events = []
        self.answer = None
        self.process = subprocess.Popen(  # pylint: disable=consider-using-with
            [side.program('qemu-storage-daemon'), '--chardev', 'stdio,id=monitor',
             '--monitor', 'chardev=monitor'],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._buffer = b''
        self._receive()
        self.ask('qmp_capabilities')

    def _receive(self):
        while b'\n' not in self._buffer:
            if not select.select([self.process.stdout], [], [], self.patience)[0]:
                raise Slow(f'over {self.patience} s')
            data = self.process.stdout.read1(65536)
            if not data:
                raise Crash(ended(self.process, self.process.stderr.read().decode()))
            self._buffer += data
        line, self._buffer = self._buffer.split(b'\n', 1)
        return json.loads(line)

    def ask(self, command, **arguments):
        """Returns the seconds until the answer, which is in `answer` then."""
        arguments = {name.replace('_', '-'): value for name, value in arguments.items()}
        text = json.dumps({'execute': command, 'arguments': arguments})
        begin = time.monotonic()
        self.process.stdin.write(text.encode() + b'\n')
        self.process.stdin.flush()
        while True:
            answer = self._receive()
            if 'error' in answer:
                raise Crash(f'{command}: {answer["error"]["desc"]}')
            if 'return' in answer:
                self.answer = answer['return']
                return time.monotonic() - begin
            self.events.append(answer)

    def happened(self, event):
        """What an event said, if it has arrived since the last that was asked for."""
        while b'\n' in self._buffer or select.select([self.process.stdout], [], [], 0)[0]:
            self.events.append(self._receive())
        return self.wait(event) if any(found['event'] == event for found in self.events) else None

    def wait(self, event):
        while True:
            for position, found in enumerate(self.events):
                if found['event'] == event:
                    del self.events[:position + 1]
                    return found['data']
            self.events.append(self._receive())

    def end(self):
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
