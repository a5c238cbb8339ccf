"""The programs that are tested, and how to talk to them."""

import json
import os
import re
import selectors
import signal
import subprocess
import time


# The key of all encrypted images.
SECRET = ['--object', 'secret,id=sec0,data=geheim']


class Mismatch(Exception):
    """What a driver did is not what it should have done.

    `log` is what was done before: nothing where it was the first image already.
    """

    def __init__(self, text):
        super().__init__(text)
        self.log = []


class Driver:
    """A driver: which programs have it and under which name."""

    def __init__(self, name, directory, format_name='qcow2', takeover=False):
        self.name = name
        self.directory = directory
        self.format = format_name
        self.is_rust = takeover or format_name == 'rqcow2'
        self.env = {k: v for k, v in os.environ.items() if not k.startswith('QEMU_')}
        if takeover:
            self.env['QEMU_RQCOW2_TAKEOVER'] = '1'

    def program(self, name):
        """The path of one of its programs."""
        return os.path.join(self.directory, name)

    def neutral(self, text):
        """Output with the driver's name as the format's."""
        return text if self.format == 'qcow2' else text.replace(self.format, 'qcow2')


def start(driver, program, args, cwd):
    """Starts a program that ends by itself."""
    return subprocess.Popen([driver.program(program), *map(str, args)], cwd=cwd, env=driver.env,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, limit):
    """Waits for a program; returns (status, output, errors)."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        out, err = process.communicate()
        raise Mismatch(f'no end after {limit} s: {" ".join(process.args)}\n{out}{err}') from None
    if process.returncode < 0 or 'panicked' in err:
        raise Mismatch(f'ended by signal {-process.returncode}: {" ".join(process.args)}\n{out}{err}')
    return process.returncode, out, err


def drop_timing(text):
    """Output of qemu-io without what differs from run to run."""
    text = text.replace('qemu-io> ', '')
    return [line for line in text.splitlines() if line and ' ops; ' not in line]


class Io:
    """A qemu-io process that takes commands from a pipe."""

    prompt = b'qemu-io> '

    def __init__(self, driver, node, options, cwd, limit, read_only=False):
        self.driver = driver
        self.limit = limit
        options = [node, *options]
        # qemu-io polls its standard input, but reads it through a buffer: of
        # two lines that come together it would see the first only.
        args = ['stdbuf', '-i0', driver.program('qemu-io'), *(['-r'] if read_only else []), *SECRET,
                '--image-opts', ','.join(options)]
        self.args = args
        self.process = subprocess.Popen(args, cwd=cwd, env=driver.env, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)
        self.buffer = b''
        self.refused = False

    def fail(self, text):
        """Ends the process and raises."""
        self.process.kill()
        self.process.wait()
        raise Mismatch(f'{text}: {" ".join(self.args)}\n{self.buffer.decode(errors="replace")}')

    def receive(self, prompts):
        """Reads until that many prompts have been seen; returns the text."""
        deadline = time.monotonic() + self.limit
        while self.buffer.count(self.prompt) < prompts:
            if not self.selector.select(max(deadline - time.monotonic(), 0)):
                self.fail(f'no answer after {self.limit} s')
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                status = self.process.wait()
                self.fail(f'qemu-io ended with status {status}')
            self.buffer += data
        text, self.buffer = self.buffer.decode(errors='replace'), b''
        return text

    def opened(self):
        """Waits for the first prompt; returns None or why it does not come."""
        try:
            self.receive(1)
            return None
        except Mismatch:
            if self.process.returncode == 1:
                return self.driver.neutral(self.buffer.decode(errors='replace'))
            raise

    def send(self, commands):
        """Sends commands. At most a few dozen at a time: both pipes are finite."""
        try:
            self.process.stdin.write(''.join(c + '\n' for c in commands).encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass    # the answer says why

    def answer(self, commands):
        """What the commands sent before have printed, less the prompts."""
        lines = drop_timing(self.driver.neutral(self.receive(commands)))
        # The exit status will remember a command that failed.
        self.refused = self.refused or bool(lines)
        return lines

    def close(self):
        """Lets the process end as it should."""
        try:
            out, _ = self.process.communicate(b'quit\n', timeout=self.limit)
        except subprocess.TimeoutExpired:
            self.fail(f'no end after {self.limit} s')
        self.buffer += out or b''
        text = drop_timing(self.buffer.decode(errors='replace'))
        if self.process.returncode not in ((0, 1) if self.refused else (0,)) or text:
            self.fail(f'qemu-io ended with status {self.process.returncode}')

    def kill(self):
        """Ends the process as a crash would."""
        self.process.kill()
        self.process.communicate()


def parse(text):
    """JSON that a program printed."""
    try:
        return json.loads(text)
    except ValueError:
        raise Mismatch(f'not JSON: {text[:2000]}') from None


def without_paths(text, *directories):
    """Text without the directories' names and those that QEMU makes up."""
    text = re.sub(r'#block\d+', 'NODE', text)
    for directory in directories:
        text = text.replace(directory + '/', '')
    return re.sub(r'^qemu-(img|io): ', '', text, flags=re.M)
