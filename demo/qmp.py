# SPDX-License-Identifier: GPL-2.0-or-later
"""A small QMP client on the standard library."""

import json
import socket
import time


class QMPError(Exception):
    """The command failed, or QEMU went away."""


class QMP:
    def __init__(self, path, timeout=60):
        self.events = []
        self.buffer = b''
        self.log = None
        deadline = time.monotonic() + timeout
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(path)
                break
            except OSError:
                self.socket.close()
                if time.monotonic() > deadline:
                    raise QMPError(f'no QMP on {path}') from None
                time.sleep(0.05)
        self._receive(deadline)
        self.command('qmp_capabilities')

    def _receive(self, deadline):
        while b'\n' not in self.buffer:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                data = self.socket.recv(65536)
            except TimeoutError:
                raise QMPError('no answer over QMP in time') from None
            if not data:
                raise QMPError('QEMU closed the QMP connection')
            self.buffer += data
        line, self.buffer = self.buffer.split(b'\n', 1)
        if self.log:
            self.log.write('<- ' + line.decode().strip() + '\n')
            self.log.flush()
        return json.loads(line)

    def command(self, name, arguments=None, timeout=120):
        request = {'execute': name}
        if arguments:
            request['arguments'] = arguments
        text = json.dumps(request)
        if self.log:
            self.log.write('-> ' + text + '\n')
            self.log.flush()
        self.socket.sendall(text.encode() + b'\n')
        deadline = time.monotonic() + timeout
        while True:
            answer = self._receive(deadline)
            if 'event' in answer:
                self.events.append(answer)
            elif 'error' in answer:
                raise QMPError(f'{name}: {answer["error"]["desc"]}')
            else:
                return answer['return']

    def wait_event(self, name, timeout=120, match=lambda data: True):
        deadline = time.monotonic() + timeout
        while True:
            for event in self.events:
                if event['event'] == name and match(event.get('data', {})):
                    self.events.remove(event)
                    return event
            answer = self._receive(deadline)
            if 'event' in answer:
                self.events.append(answer)

    def poll_events(self):
        """Collects what has arrived and returns all events so far."""
        try:
            while True:
                answer = self._receive(time.monotonic())
                if 'event' in answer:
                    self.events.append(answer)
        except (QMPError, OSError):
            pass
        return self.events

    def run_job(self, name, arguments, timeout=120):
        """Starts a job such as blockdev-create and waits for its end."""
        self.command(name, arguments)
        job = arguments['job-id']
        self.wait_event('JOB_STATUS_CHANGE', timeout,
                        lambda d: d['id'] == job and d['status'] == 'concluded')
        error = [entry.get('error') for entry in self.command('query-jobs')
                 if entry['id'] == job][0]
        self.command('job-dismiss', {'id': job})
        if error:
            raise QMPError(f'{name}: {error}')
