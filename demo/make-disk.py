#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Make the demonstration's disk: an ext4 file system that grew up layer by layer.

The base holds busybox, the guest's init and a large file, var/db/table. Every
further layer is what one "day" changed on that disk: some files of the kernel
package are added, older files are replaced or removed, pieces of var/db/table
are overwritten in place. So directories, inode tables, bitmaps and the table
are pieced together from all the layers, as on a machine that is snapshotted
every day.

No guest and no mount is needed: debugfs makes the changes on a raw image, and
the undo file that it writes tells which blocks it touched. Those clusters
become the layer.

Writes DIR/l0.qcow2 ... DIR/l<N-1>.qcow2, the raw image, a list of checksums
(as sha256sum prints it) and a description in JSON for the steps that follow.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(HERE), 'tools'))
from qcow2writer import write_qcow2  # noqa: E402

BLOCK = 4096
CLUSTER = 65536
TABLE = 'var/db/table'
TABLE_SIZE = 96 << 20
PIECES_PER_LAYER = 4
REPLACED_PER_LAYER = 1
REMOVED_EVERY = 3

UNDO_MAGIC = b'E2UNDO02'
UNDO_KEYBLOCK_MAGIC = 0xCADECADE


def run(*command):
    """Runs an e2fsprogs command; anything but its banner on stderr is fatal."""
    env = dict(os.environ, LC_ALL='C',
               PATH=os.environ['PATH'] + ':/usr/sbin:/sbin')
    done = subprocess.run(command, env=env, text=True, capture_output=True,
                          check=False)
    noise = [line for line in done.stderr.splitlines()
             if line and not line.startswith((command[0] + ' 1.', 'mke2fs 1.'))]
    if done.returncode or noise:
        raise RuntimeError(f'{" ".join(command)}: status {done.returncode}: '
                           + '; '.join(noise))
    return done.stdout


def undo_blocks(path):
    """The byte ranges that an e2fsprogs undo file covers."""
    with open(path, 'rb') as file:
        undo = file.read()
    (magic, count, _, position, block, fs_block) = \
        struct.unpack_from('<8sQQQII', undo)
    if magic != UNDO_MAGIC:
        raise RuntimeError(f'{path}: not an undo file of e2fsprogs')
    per_block = (block - 16) // 16
    position *= block
    while count:
        if struct.unpack_from('<I', undo, position)[0] != UNDO_KEYBLOCK_MAGIC:
            raise RuntimeError(f'{path}: no key block at {position}')
        keys = min(count, per_block)
        data = 0
        for i in range(keys):
            fs_number, _, size = \
                struct.unpack_from('<QII', undo, position + 16 + i * 16)
            yield fs_number * fs_block, size
            data += -(-size // block)
        count -= keys
        position += (1 + data) * block


class Disk:
    """The raw image as it evolves, and what is known to be on it."""

    def __init__(self, args):
        self.args = args
        self.raw = args.raw
        self.work = args.work
        self.random = random.Random(f'disk {args.seed}')
        self.sums = {}
        self.directories = set()
        self.replaceable = []
        self.dirty = set()
        self.owner = {}
        self.commands = []
        self.cwd = None
        self.staged = 0

    # The base.

    def make_base(self):
        tree = os.path.join(self.work, 'tree')
        for directory in ('bin', 'data', 'dev', 'etc', 'lib', 'proc', 'run',
                          'sbin', 'sys', 'tmp', 'var/db', 'var/log'):
            os.makedirs(os.path.join(tree, directory))
        for source, place in ((self.args.busybox, 'bin/busybox'),
                              (self.args.init, 'sbin/init')):
            shutil.copyfile(source, os.path.join(tree, place))
            os.chmod(os.path.join(tree, place), 0o755)
        os.symlink('busybox', os.path.join(tree, 'bin/sh'))
        self.table = bytearray(self.random.randbytes(TABLE_SIZE))
        with open(os.path.join(tree, TABLE), 'wb') as file:
            file.write(self.table)
        for directory, _, names in os.walk(tree):
            self.directories.add(os.path.relpath(directory, tree))
            for name in names:
                path = os.path.join(directory, name)
                if not os.path.islink(path):
                    self.sums[os.path.relpath(path, tree)] = file_sum(path)
        if os.path.exists(self.raw):
            os.unlink(self.raw)
        run('mke2fs', '-q', '-F', '-t', 'ext4', '-b', str(BLOCK), '-m', '0',
            '-L', 'rqcow2-demo', '-E', 'root_owner=0:0', '-d', tree, self.raw,
            f'{self.args.disk // 1024}k')
        shutil.rmtree(tree)
        self.table_blocks = [int(number) for number in run(
            'debugfs', '-R', f'blocks /{TABLE}', self.raw).split()]
        if len(self.table_blocks) != TABLE_SIZE // BLOCK:
            raise RuntimeError(f'{TABLE} has {len(self.table_blocks)} blocks')

    # What a layer changes. Files are staged on the host for debugfs.

    def enter(self, directory):
        """debugfs resolves only the last part of a name where it creates."""
        if directory not in self.directories:
            self.make_directory(directory)
        if self.cwd != directory:
            self.commands.append(f'cd /{directory}')
            self.cwd = directory

    def make_directory(self, directory):
        parent, name = os.path.split(directory)
        self.enter(parent or '.')
        self.commands.append(f'mkdir {name}')
        self.directories.add(directory)

    def put(self, path, source):
        directory, name = os.path.split(path)
        self.enter(directory)
        if path in self.sums:
            self.commands.append(f'rm {name}')
        self.commands.append(f'write {source} {name}')
        self.sums[path] = file_sum(source)

    def put_bytes(self, path, content):
        self.staged += 1
        source = os.path.join(self.work, f'staged{self.staged}')
        with open(source, 'wb') as file:
            file.write(content)
        os.chmod(source, 0o644)
        self.put(path, source)

    def remove(self, path):
        directory, name = os.path.split(path)
        self.enter(directory)
        self.commands.append(f'rm {name}')
        del self.sums[path]

    def overwrite_piece(self):
        count = self.random.randint(1, 24)
        first = self.random.randrange(len(self.table_blocks) - count)
        content = self.random.randbytes(count * BLOCK)
        self.table[first * BLOCK:(first + count) * BLOCK] = content
        with open(self.raw, 'r+b') as file:
            for i in range(count):
                offset = self.table_blocks[first + i] * BLOCK
                file.seek(offset)
                file.write(content[i * BLOCK:(i + 1) * BLOCK])
                self.dirty.add(offset // CLUSTER)

    def change(self, layer, additions):
        """One layer's changes, the kernel package's files `additions` among them."""
        self.commands, self.cwd, self.staged = [], None, 0
        for source, path in additions:
            self.put(path, source)
        for _ in range(min(REPLACED_PER_LAYER, len(self.replaceable))):
            path = self.random.choice(self.replaceable)
            self.put_bytes(path, self.random.randbytes(
                self.random.randint(1, 200_000)))
        if layer % REMOVED_EVERY == 0 and self.replaceable:
            index = self.random.randrange(len(self.replaceable))
            self.remove(self.replaceable.pop(index))
        self.put_bytes('etc/release', b'layer %d\n' % layer)
        self.put_bytes(f'var/log/layer-{layer:05}', b'this is layer %d\n' % layer
                       + self.random.randbytes(200).hex().encode())
        self.replaceable += [path for _, path in additions]

        script = os.path.join(self.work, 'debugfs.cmd')
        undo = os.path.join(self.work, 'undo')
        with open(script, 'w', encoding='ascii') as file:
            file.write('\n'.join(self.commands) + '\n')
        if os.path.exists(undo):
            os.unlink(undo)
        run('debugfs', '-w', '-z', undo, '-f', script, self.raw)
        for offset, size in undo_blocks(undo):
            self.dirty.update(range(offset // CLUSTER,
                                    (offset + size - 1) // CLUSTER + 1))
        for i in range(self.staged):
            os.unlink(os.path.join(self.work, f'staged{i + 1}'))
        for _ in range(PIECES_PER_LAYER):
            self.overwrite_piece()

    # Layers.

    def save_layer(self, layer):
        with open(self.raw, 'rb') as file:
            fd = file.fileno()
            if layer == 0:
                self.dirty = set(used_clusters(fd, self.args.disk))
            data, zeroes = {}, []
            for number in sorted(self.dirty):
                content = os.pread(fd, CLUSTER, number * CLUSTER)
                if content.count(0) == len(content):
                    zeroes.append(number)
                else:
                    data[number] = content
        if layer == 0:
            zeroes = []
        below = f'l{layer - 1}.qcow2' if layer else None
        write_qcow2(os.path.join(self.args.dir, f'l{layer}.qcow2'),
                    self.args.disk, data, data.__getitem__, zeroes=zeroes,
                    backing=below, backing_format='qcow2' if below else None,
                    cluster_size=CLUSTER)
        self.owner.update(dict.fromkeys(data, layer))
        for number in zeroes:
            self.owner.pop(number, None)
        self.dirty = set()


def used_clusters(fd, size):
    """The clusters of a sparse file that are not holes."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield from range(start // CLUSTER, (min(end, size) - 1) // CLUSTER + 1)
        position = end


def file_sum(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def package_files(tree):
    """The regular files of the unpacked kernel package, and where they go."""
    found = []
    for directory, _, names in os.walk(tree):
        for name in names:
            source = os.path.join(directory, name)
            path = os.path.relpath(source, tree)
            if os.path.isfile(source) and not os.path.islink(source) \
                    and not set(path) & set(' "\n'):
                found.append((source, path))
    return sorted(found)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('dir', metavar='DIR', help='where the layers go')
    add('--layers', type=int, default=300)
    add('--disk', type=int, default=512 << 20, help='virtual size in bytes')
    add('--seed', type=int, default=1)
    add('--package', required=True, help='the unpacked kernel package')
    add('--busybox', required=True)
    add('--init', required=True, help="what becomes the disk's sbin/init")
    add('--raw', required=True, help='the raw image')
    add('--sums', required=True, help='the list of checksums')
    add('--info', required=True, help='the description in JSON')
    add('--work', required=True, help='a directory for temporary files')
    return parser.parse_args()


def main():
    args = parse_arguments()
    for directory in (args.dir, args.work):
        os.makedirs(directory, exist_ok=True)
    disk = Disk(args)
    disk.make_base()
    disk.save_layer(0)

    files = package_files(args.package)
    disk.random.shuffle(files)
    steps = max(args.layers - 1, 1)
    for layer in range(1, args.layers):
        first = (layer - 1) * len(files) // steps
        disk.change(layer, files[first:layer * len(files) // steps])
        disk.save_layer(layer)
    disk.sums[TABLE] = hashlib.sha256(disk.table).hexdigest()

    with open(args.sums, 'w', encoding='utf-8') as file:
        for path, checksum in sorted(disk.sums.items()):
            file.write(f'{checksum}  {path}\n')
    with open(args.info, 'w', encoding='utf-8') as file:
        json.dump({'layers': args.layers, 'disk': args.disk, 'cluster': CLUSTER,
                   'files': len(disk.sums), 'table': TABLE,
                   'table_size': TABLE_SIZE, 'block': BLOCK,
                   'data_clusters': sorted(disk.owner)}, file)
    print(f'{args.layers} layers, {len(disk.sums)} files, '
          f'{len(disk.owner) * CLUSTER >> 20} MiB of data; what the top reads '
          f'as comes from {len(set(disk.owner.values()))} of the layers')


if __name__ == '__main__':
    try:
        main()
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f'make-disk.py: {error}')
