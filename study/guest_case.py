"""A real guest with fio and RocksDB on a chain of 500 layers.

The file system is made once, outside: db_bench fills a database, mke2fs makes a
file system of it, and its clusters are dealt out to the layers at random, so
that each driver gets the same bytes in the same files. (A database that is
filled while snapshots are taken depends on the speed of what it runs on.) Each
layer also has a cluster under each L2 table, where the file system has nothing
now, as disks have that have been in use for a while.
"""

import json
import os
import random
import shutil
import subprocess
import sys

from chains import CLUSTER, GIB, MIB, TABLE, empty_overlay
from compared import ROOT
from qcow2writer import write_qcow2
from sides import Crash, turns

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.environ.get('RQCOW2_CACHE') or os.path.join(
    os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'rqcow2')
VALUE = 2500    # 50 fields of 50 bytes, as in the paper
DISK = 50 * GIB     # and so is this


def quietly(*words):
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def file_system(study, programs, records, random_mib):
    """A raw image with a database and a file of random bytes in it."""
    tree, raw = study.path('tree'), study.path('disk.raw')
    os.makedirs(tree)
    quietly(f'{programs}/lib/ld.so', '--library-path', f'{programs}/lib',
            f'{programs}/bin/db_bench', f'--db={tree}/db', f'--num={records}',
            f'--value_size={VALUE}', '--compression_type=none', '--seed=1',
            '--benchmarks=filluniquerandom,flush,waitforcompaction')
    chance = random.Random(1)
    with open(os.path.join(tree, 'random'), 'wb') as file:
        for _ in range(random_mib):
            file.write(chance.randbytes(MIB))
    quietly('mke2fs', '-q', '-F', '-t', 'ext4', '-m', '0', '-J', 'size=4', '-E',
            'root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1,discard', '-d', tree, raw,
            f'{DISK // MIB}M')
    shutil.rmtree(tree)
    return raw


def used(raw):
    """The numbers of the clusters that a sparse file has."""
    with open(raw, 'rb', buffering=0) as file:
        end = 0
        while True:
            try:
                begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            yield from range(begin // CLUSTER, -(-end // CLUSTER))


def deal(raw, directory, depth):
    """Makes the chain; returns the path of its top."""
    os.makedirs(directory)
    chance = random.Random(1)
    clusters = sorted(set(used(raw)))
    per = TABLE // CLUSTER
    free = [sorted(set(range(first, first + per)).difference(clusters))
            for first in range(0, DISK // CLUSTER, per)]
    chance.shuffle(clusters)
    old = chance.randbytes(4096)
    with open(raw, 'rb', buffering=0) as file:
        for number in range(depth):
            mine = set(clusters[number::depth])
            stale = {chance.choice(places) for places in free if places}
            path = os.path.join(directory, f'l{number}.qcow2')
            write_qcow2(path, DISK, mine | stale,
                        lambda n, mine=mine: os.pread(file.fileno(), CLUSTER, n * CLUSTER)
                        if n in mine else old,
                        backing=f'l{number - 1}.qcow2' if number else None,
                        backing_format='qcow2' if number else None)
            # Mostly zeroes: tables with few entries.
            quietly('fallocate', '--dig-holes', path)
    return path


def initramfs(study):
    path = study.path('initrd.gz')
    quietly(sys.executable, os.path.join(ROOT, 'demo', 'make-initramfs.py'), path,
            '--package', os.path.join(CACHE, 'demo', 'kernel', 'tree'), '--busybox',
            '/bin/busybox', '--init', os.path.join(HERE, 'guest', 'init'), '--module',
            'virtio_pci', '--module', 'virtio_blk', '--module', 'ext4')
    return path


def guest(study, records):
    """fio and RocksDB in a guest on 500 layers, and QEMU's memory."""
    depth = 500
    rounds, seconds, count, random_mib = (1, 3, 120_000, 96) if study.quick \
        else (3, 30, 500_000, 512)
    programs = os.path.join(CACHE, 'study', 'guest', 'tree')
    study.say('filling a database, making a file system of it')
    raw = file_system(study, programs, count, random_mib)
    study.say(f'dealing it out to {depth} layers')
    chains = {depth: deal(raw, study.path('guest500'), depth),
              1: deal(raw, study.path('guest1'), 1)}
    os.remove(raw)
    image = study.path('programs.raw')
    quietly('mke2fs', '-q', '-F', '-t', 'ext4', '-m', '0', '-d', programs, image, '256M')
    kernels = os.path.join(CACHE, 'demo', 'kernel', 'tree', 'boot')
    kernel = next(os.path.join(kernels, name) for name in sorted(os.listdir(kernels))
                  if name.startswith('vmlinuz-'))
    initrd = initramfs(study)
    accelerator = ['auto']

    def run(side, layers):
        # Each run writes into an overlay of its own.
        study.say(f'the guest on {layers} layers: {side.name}')
        top = os.path.join(os.path.dirname(chains[layers]), 'run.qcow2')
        empty_overlay(top, DISK, chains[layers])
        output = study.path('guest.json')
        with subprocess.Popen(
                [sys.executable, os.path.join(HERE, 'guest', 'run'), '--qemu',
                 side.program('qemu-system-x86_64'), '--driver', side.driver, '--top', top,
                 '--programs', image, '--kernel', kernel, '--initrd', initrd, '--logs',
                 study.path('logs'), '--output', output, '--accel', accelerator[0],
                 '--seconds', str(seconds), '--records', str(count), '--value', str(VALUE)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                said, _ = process.communicate()
            except BaseException:
                # It stops its QEMU then.
                process.terminate()
                raise
        os.remove(top)
        if process.returncode:
            raise Crash(said.strip())
        with open(output, encoding='utf-8') as file:
            found = json.load(file)
        accelerator[0] = found['accelerator']
        return found

    samples = turns({**{(side, depth): lambda side=side: run(side, depth)
                        for side in study.sides},
                     (study.stock, 1): lambda: run(study.stock, 1)}, rounds)
    for (side, layers), runs in samples.items():
        for name, first in runs[0].items():
            setting = {'depth': layers, 'accelerator': accelerator[0], 'seconds': seconds,
                       'count': count}
            if isinstance(first, dict):
                for unit in first:
                    records.add(side, name, unit, [found[name][unit] for found in runs],
                                **setting)
            elif name != 'accelerator':
                records.add(side, name, 's' if name == 'mounted' else 'MiB',
                            [found[name] for found in runs], **setting)


CASES = [guest]
