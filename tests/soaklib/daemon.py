"""qemu-storage-daemon, or another program with a monitor like it."""

import contextlib
import json
import os
import socket
import subprocess
import time


class Failure(Exception):
    """The daemon does not do what it should."""


class Daemon:
    """A running qemu-storage-daemon."""

    def __init__(self, program, directory, log, timeout=900, monitor=('--monitor', 'chardev=qmp'), arguments=()):
        self.timeout = timeout
        self.events = []
        self.buffer = b''
        self.path = os.path.join(directory, 'qmp.sock')
        self.log = open(log, 'ab')  # pylint: disable=consider-using-with
        self.process = subprocess.Popen(  # pylint: disable=consider-using-with
            [program, '--chardev', f'socket,id=qmp,path={self.path},server=on,wait=off', *monitor, *arguments],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.sock = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.sock.connect(self.path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise Failure(f'no monitor, status {self.process.poll()}') from None
                time.sleep(0.02)
        self.receive()
        self.command('qmp_capabilities')

    def receive(self, timeout=None):
        """The next message of the monitor."""
        self.sock.settimeout(timeout or self.timeout)
        while b'\n' not in self.buffer:
            try:
                data = self.sock.recv(1 << 20)
            except socket.timeout:
                raise Failure('the monitor says nothing') from None
            except OSError:
                data = b''
            if not data:
                raise Failure(f'the daemon has ended, status {self.process.wait(60)}')
            self.buffer += data
        line, self.buffer = self.buffer.split(b'\n', 1)
        return json.loads(line)

    def ask(self, name, /, **arguments):
        """A command; returns the reply, be it an error."""
        arguments = {key.replace('_', '-'): value for key, value in arguments.items()}
        self.sock.sendall(json.dumps({'execute': name, 'arguments': arguments}).encode() + b'\n')
        while True:
            message = self.receive()
            if 'event' in message:
                self.events.append(message)
            else:
                return message

    def command(self, name, /, **arguments):
        """A command that has to succeed; returns what it returns."""
        reply = self.ask(name, **arguments)
        if 'error' in reply:
            raise Failure(f'{name} {arguments}: {reply["error"]["desc"]}')
        return reply['return']

    def event(self, *names):
        """Waits for an event of one of these names."""
        deadline = time.monotonic() + self.timeout
        while True:
            for event in self.events:
                if event['event'] in names:
                    self.events.remove(event)
                    return event
            if time.monotonic() > deadline:
                raise Failure(f'no event {" or ".join(names)} within {self.timeout} s')
            message = self.receive()
            if 'event' in message:
                self.events.append(message)

    def finish(self, job):
        """Waits for the end of a job, which must be a good one; returns False if it is ready instead."""
        event = self.event('BLOCK_JOB_COMPLETED', 'BLOCK_JOB_READY', 'BLOCK_JOB_ERROR', 'BLOCK_JOB_CANCELLED')
        data = event['data']
        if data['device'] != job or event['event'] == 'BLOCK_JOB_ERROR' or 'error' in data:
            raise Failure(f'{event["event"]}: {data}')
        return event['event'] != 'BLOCK_JOB_READY'

    def starved(self):
        """The thread that jobs run in gets hardly any time meanwhile, if it is not the only one."""
        return contextlib.nullcontext()

    def quit(self):
        """Ends it."""
        self.command('quit')
        status = self.process.wait(self.timeout)
        self.sock.close()
        self.log.close()
        if status:
            raise Failure(f'the daemon ends with status {status}')

    def kill(self):
        """Ends it at once."""
        self.process.kill()
        self.process.wait()
        self.sock.close()
        self.log.close()
