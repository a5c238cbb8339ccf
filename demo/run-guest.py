#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Boot the guest from the chain and take three live snapshots while it writes.

The guest reports on the serial console in lines that start with @@ (see
demo/guest). Everything the console and QMP said is in LOGS/console.log,
LOGS/qmp.log and LOGS/qemu.log. What the guest wrote, by its own account, goes
to a JSON file for the check from outside.
"""

import argparse
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from qmp import QMP, QMPError  # noqa: E402

KERNEL_LINE = 'console=ttyS0 quiet loglevel=3 panic=-1'
FIRMWARE = ('/usr/share/seabios', '/usr/share/qemu')


class GuestError(Exception):
    """The guest did not do what it should."""


class Guest:
    """A QEMU process with its console and its monitor."""

    def __init__(self, args, accelerator, command_line='', disk=()):
        self.sockets = tempfile.mkdtemp(prefix='rqcow2-demo-')
        self.logs = args.logs
        self.wrong = []
        self.buffer = b''
        self.lines = []
        self.process = None
        self.console = None
        self.qemu_log = open(os.path.join(args.logs, 'qemu.log'), 'ab')
        console_log = os.path.join(args.logs, 'console.log')
        # Named explicitly: the programs may run from where they were built.
        firmware = [word for directory in FIRMWARE if os.path.isdir(directory)
                    for word in ('-L', directory)]
        command = [
            args.qemu, *firmware, '-nodefaults', '-no-user-config',
            '-display', 'none', '-no-reboot', '-S', '-machine', 'pc',
            '-accel', accelerator, '-m', '512', '-smp', '1',
            '-kernel', args.kernel, '-initrd', args.initrd,
            '-append', f'{KERNEL_LINE} {command_line}',
            '-chardev', f'socket,id=console,path={self.sockets}/console,'
                        f'server=on,wait=off,logfile={console_log},logappend=on',
            '-serial', 'chardev:console',
            '-qmp', f'unix:{self.sockets}/qmp,server=on,wait=off', *disk]
        if accelerator == 'kvm':
            command += ['-cpu', 'host']
        self.qemu_log.write((' '.join(command) + '\n').encode())
        self.qemu_log.flush()
        self.said_from = self.qemu_log.tell()
        self.process = subprocess.Popen(
            command, cwd=args.dir, stdin=subprocess.DEVNULL,
            stdout=self.qemu_log, stderr=subprocess.STDOUT)

    def start(self):
        try:
            self.qmp = QMP(f'{self.sockets}/qmp', 20)
        except QMPError as error:
            status = self.process.poll()
            if status is not None:
                raise GuestError(f'QEMU ended with status {status} before it '
                                 'had a monitor') from None
            raise GuestError(str(error)) from None
        self.qmp.log = open(os.path.join(self.logs, 'qmp.log'), 'a',
                            encoding='utf-8')
        self.console = socket.socket(socket.AF_UNIX)
        self.console.connect(f'{self.sockets}/console')
        self.qmp.command('cont')

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
        if self.process:
            self.process.wait()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def qemu_said(self):
        """The last lines QEMU printed."""
        with open(self.qemu_log.name, encoding='utf-8', errors='replace') as file:
            file.seek(self.said_from)
            return file.read().splitlines()[-3:]

    def _read(self, deadline):
        """The next console line; None at the end of the console."""
        while b'\n' not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.console], [], [], left)[0]:
                raise GuestError('the guest was silent for too long')
            try:
                data = self.console.recv(65536)
            except OSError:
                data = b''
            if not data:
                return None
            self.buffer += data
        line, self.buffer = self.buffer.split(b'\n', 1)
        return line.decode(errors='replace').strip()

    def wait(self, pattern, timeout):
        """Waits for a @@ line; lines in between are remembered."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                line = self._read(deadline)
                if line is None:
                    raise GuestError('the guest ended')
                if 'Kernel panic' in line:
                    raise GuestError(f'the guest died: {line}')
                # The console may have put something in front of it.
                at = line.find('@@ ')
                if at < 0:
                    self.lines.append(line)
                    continue
                line = line[at + 3:]
                if line.startswith('wrong '):
                    self.wrong.append(line[6:])
                elif line.startswith('fail '):
                    raise GuestError(f'the guest gave up: {line[5:]}')
                match = re.fullmatch(pattern, line)
                if match:
                    return match
        except GuestError as error:
            raise GuestError(f'{error} (waiting for "{pattern}")') from None

    def take_list(self, name, timeout):
        self.wait(f'begin {name}', timeout)
        self.lines = []
        self.wait(f'end {name}', timeout)
        return [line for line in self.lines if line]

    def wait_end(self, timeout):
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestError('QEMU did not end after the guest') from None


def say(text):
    print(f'    {text}', flush=True)


def works_with_kvm(args):
    """/dev/kvm may exist and not work: only a guest that comes up tells."""
    if not os.access('/dev/kvm', os.R_OK | os.W_OK):
        return False
    guest = Guest(args, 'kvm', 'demo.probe')
    try:
        guest.start()
        guest.wait('probe', 20)
        return True
    except (GuestError, QMPError, OSError):
        return False
    finally:
        guest.stop()


def snapshot_sync(guest, args, below, name):
    """QEMU creates the overlay: its name for the format goes into the header."""
    guest.qmp.command('blockdev-snapshot-sync', {
        'node-name': below, 'snapshot-file': f'{name}.qcow2',
        'snapshot-node-name': name, 'format': args.driver})


def snapshot_added(guest, args, below, name):
    """The overlay is created by a job and added as a node of its own."""
    file = f'{name}.qcow2'
    guest.qmp.run_job('blockdev-create', {
        'job-id': 'create-file',
        'options': {'driver': 'file', 'filename': file, 'size': 0}})
    guest.qmp.command('blockdev-add', {
        'driver': 'file', 'node-name': f'{name}-file', 'filename': file,
        'discard': 'unmap'})
    guest.qmp.run_job('blockdev-create', {
        'job-id': 'create-image',
        'options': {'driver': args.driver, 'file': f'{name}-file',
                    'size': args.size, 'backing-file': f'{below}.qcow2',
                    'backing-fmt': args.driver}})
    guest.qmp.command('blockdev-add', {
        'driver': args.driver, 'node-name': name, 'file': f'{name}-file',
        'backing': None, 'discard': 'unmap'})
    guest.qmp.command('blockdev-snapshot', {'node': below, 'overlay': name})


def snapshot_existing(guest, args, below, name):
    """The overlay was created beforehand, by the unpatched qemu-img."""
    subprocess.run([args.stock_qemu_img, 'create', '-q', '-u', '-f', 'qcow2',
                    '-b', f'{below}.qcow2', '-F', 'qcow2', f'{name}.qcow2',
                    str(args.size)], cwd=args.dir, check=True)
    guest.qmp.command('blockdev-snapshot-sync', {
        'node-name': below, 'snapshot-file': f'{name}.qcow2', 'mode': 'existing',
        'snapshot-node-name': name, 'format': args.driver})


SNAPSHOTS = (('blockdev-snapshot-sync', snapshot_sync),
             ('blockdev-create, blockdev-add, blockdev-snapshot', snapshot_added),
             ('blockdev-snapshot-sync onto an overlay of the unpatched qemu-img',
              snapshot_existing))


def check_nodes(guest, args, layers):
    """Every layer is served by the driver that was asked for at the top."""
    formats = {}
    for node in guest.qmp.command('query-named-block-nodes', {'flat': True}):
        formats[node['drv']] = formats.get(node['drv'], 0) + 1
    formats.pop('file', None)
    if formats == {args.driver: layers}:
        say(f'all {layers} layers are nodes of the driver {args.driver}')
    else:
        guest.wrong.append(f'not {layers} nodes of {args.driver} but {formats}')


def run(args, guest, slow):
    started = time.monotonic()
    guest.start()
    kernel = guest.wait(r'up (\S+)', 60 * slow).group(1)
    guest.wait('mounted', 60 * slow)
    say(f'Linux {kernel} is up and has mounted the disk after '
        f'{time.monotonic() - started:.1f} s')

    started = time.monotonic()
    checked = int(guest.wait(r'checked (\d+)', 90 * slow).group(1))
    with open(args.sums, encoding='utf-8') as file:
        expected = len(file.readlines())
    if checked != expected and not guest.wrong:
        guest.wrong.append(f'{checked} of {expected} files were checked')
    if guest.wrong:
        raise GuestError('the guest does not read what was written')
    say(f'the guest found all {checked} files right, in '
        f'{time.monotonic() - started:.1f} s')

    guest.wait('writing', 60 * slow)
    names, below = [args.top_name], args.top_name
    for number, (how, take) in enumerate(SNAPSHOTS, 1):
        first = int(guest.wait(r'round (\d+)', 60 * slow).group(1))
        guest.wait(f'round {first + 1}', 60 * slow)
        name = f'snap{number}'
        started = time.monotonic()
        take(guest, args, below, name)
        say(f'snapshot {number} while the guest writes round {first + 1}: '
            f'{time.monotonic() - started:.2f} s ({how})')
        names.append(name)
        below = name
    check_nodes(guest, args, args.layers + len(SNAPSHOTS))
    last = int(guest.wait(r'round (\d+)', 60 * slow).group(1)) + 2
    guest.wait(f'round {last}', 60 * slow)
    guest.console.sendall(b'stop\n')

    written = guest.take_list('written', 90 * slow)
    gone = guest.take_list('gone', 60 * slow)
    verified, total = map(int, guest.wait(r'verified (\d+) of (\d+)',
                                          120 * slow).groups())
    if verified != total and not guest.wrong:
        guest.wrong.append(f'{verified} of {total} files came back right')
    say(f'the guest wrote {len(written)} files and removed {len(gone)}; '
        f'{verified} of {total} read back right with its caches dropped')
    guest.wait('done', 30 * slow)
    errors = [event for event in guest.qmp.poll_events()
              if event['event'] in ('BLOCK_IO_ERROR', 'BLOCK_IMAGE_CORRUPTED',
                                    'GUEST_PANICKED')]
    guest.wrong += [json.dumps(event) for event in errors]
    status = guest.wait_end(30 * slow)
    if status:
        guest.wrong.append(f'QEMU ended with status {status}')
    with open(args.written, 'w', encoding='utf-8') as file:
        json.dump({'written': dict(reversed(line.split('  ', 1))
                                   for line in written),
                   'gone': gone, 'snapshots': names[1:]}, file, indent=1)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--qemu', required=True)
    add('--stock-qemu-img', required=True, help='the unpatched one')
    add('--driver', required=True, help='format driver for the disk')
    add('--accel', choices=('auto', 'kvm', 'tcg'), default='auto')
    add('--dir', required=True, help='where the chain is')
    add('--info', required=True, help="make-disk.py's description")
    add('--sums', required=True)
    add('--kernel', required=True)
    add('--initrd', required=True)
    add('--logs', required=True)
    add('--written', required=True, help='output: what the guest wrote')
    args = parser.parse_args()
    with open(args.info, encoding='utf-8') as file:
        info = json.load(file)
    args.size = info['disk']
    args.layers = info['layers']
    args.top_name = f'l{args.layers - 1}'
    return args


def main():
    args = parse_arguments()
    os.makedirs(args.logs, exist_ok=True)
    accelerator = args.accel
    if accelerator == 'auto':
        accelerator = 'kvm' if works_with_kvm(args) else 'tcg'
    say('KVM works here' if accelerator == 'kvm' else 'the guest runs on TCG')
    # Not leaving QEMU behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    disk = ['-drive', f'driver={args.driver},file.driver=file,'
                      f'file.filename={args.top_name}.qcow2,'
                      f'node-name={args.top_name},id=disk,if=none,discard=unmap',
            '-device', 'virtio-blk-pci,drive=disk']
    guest = Guest(args, accelerator, disk=disk)
    failure = None
    try:
        run(args, guest, 1 if accelerator == 'kvm' else 2)
    except (GuestError, QMPError, OSError, subprocess.CalledProcessError) as error:
        failure = str(error)
    finally:
        guest.stop()
    for line in guest.wrong[:20]:
        print(f'FAIL: the guest: {line}')
    if len(guest.wrong) > 20:
        print(f'FAIL: the guest: and {len(guest.wrong) - 20} more')
    if failure:
        print(f'FAIL: {failure}')
    if failure or guest.wrong:
        for line in guest.qemu_said():
            print(f'      QEMU: {line}')
        print(f'      see console.log, qmp.log and qemu.log in {args.logs}')
        sys.exit(1)


if __name__ == '__main__':
    main()
