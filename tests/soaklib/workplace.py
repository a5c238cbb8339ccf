"""Where a test has its images, and what it does with programs there."""

import concurrent.futures
import json
import os
import random
import subprocess
import tempfile
import time

from .commandline import report
from .daemon import Failure
from .model import Wrong


class Workplace:
    """A directory, and what is drawn by lot of all chains in it."""

    # What the guest boots from and the checker, where there is a guest.
    image = None

    def __init__(self, args, root):
        self.args = args
        self.root = root
        self.rng = random.Random(args.seed)
        self.size = args.size << 20
        self.cluster = self.rng.choice((16 << 10, 64 << 10))
        self.directory = tempfile.mkdtemp(prefix='rqsoak', dir=args.dir)
        self.begin = time.monotonic()
        self.passed = 0

    def run(self, *command):
        """A program that has to succeed; returns what it says."""
        done = subprocess.run(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors='replace', check=False, timeout=1800)
        if done.returncode:
            raise Failure(f'{" ".join(map(str, command))}: status {done.returncode}\n{done.stdout}')
        return done.stdout

    def raw(self, content):
        """A raw image with this content; returns the path."""
        path = os.path.join(self.directory, 'model.raw')
        with open(path, 'wb') as file:
            file.write(content)
        return path

    def digest(self, content):
        """What the checker says of a disk with this content."""
        path = self.raw(content)
        digest = self.image.digest(path)
        os.unlink(path)
        return digest

    def compare(self, directory, driver, path, content):
        """A disk has to be what the model says, or the guest."""
        program = os.path.join(directory, 'qemu-img')
        if self.image:
            raw = os.path.join(self.directory, 'guest.raw')
            self.run(program, 'convert', '-f', driver, '-O', 'raw', path, raw)
            digest = self.image.digest(raw)
            if digest != content:
                raise Wrong(f'{path} has the digest {digest}, what the guest saw has {content}')
        else:
            raw = self.raw(content)
            self.run(program, 'compare', '-f', driver, '-F', 'raw', path, raw)
        os.unlink(raw)

    def sound(self, layers):
        """Unpatched qemu-img finds nothing wrong in any of these images."""
        program = os.path.join(self.args.stock, 'qemu-img')
        # Without the layers below: to open those takes unpatched QEMU longer than anything else here.
        alone = [json.dumps({'driver': 'qcow2', 'file': {'driver': 'file', 'filename': path}, 'backing': None})
                 for path in layers]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [pool.submit(self.run, program, 'check', '-q', 'json:' + image) for image in alone]:
                done.result()

    def late(self):
        """Whether the time is up."""
        return self.args.time and time.monotonic() - self.begin > self.args.time

    def conclude(self):
        """All that a test does, which is what it calls `all`, and what came of it; returns the exit status."""
        status = 1
        try:
            self.all()
            status = 0
        except Exception as error:  # pylint: disable=broad-except
            print(f'FAILED, seed {self.args.seed}, after {time.monotonic() - self.begin:.0f} s: '
                  f'{type(error).__name__}: {error}', flush=True)
        finally:
            self.close(keep=status)
        report(self.args, self.passed, status)
        return status

    def events(self, chain, kinds):
        """What happens to a chain, in random order, while its guest goes on; returns how long which took."""
        self.rng.shuffle(kinds)
        spent = {}
        for kind in kinds:
            if self.late():
                break
            before = time.monotonic()
            try:
                getattr(chain, kind)()
                chain.guest.judge()
            except Exception as error:
                raise Failure(f'during {kind}, event after {spent}: {type(error).__name__}: {error}') from error
            spent[kind] = spent.get(kind, 0) + time.monotonic() - before
        return spent
