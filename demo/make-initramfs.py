#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Pack the initramfs: busybox, the init script, kernel modules and other files.

The modules named are taken from the unpacked kernel package together with what
they depend on, in the order in which they have to be loaded (/modules/order).
Written as a gzipped newc archive here, so that neither root nor the tools of
the kernel's own packages are needed.
"""

import argparse
import gzip
import lzma
import os
import re
import sys


class Archive:
    """A cpio archive in the newc format."""

    def __init__(self):
        self.parts = []
        self.inode = 0
        self.directories = set()

    def _entry(self, name, mode, content=b'', device=(0, 0)):
        self.inode += 1
        raw = name.encode() + b'\0'
        fields = (self.inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device,
                  len(raw), 0)
        head = b'070701' + b''.join(b'%08X' % field for field in fields) + raw
        self.parts += [head, bytes(-len(head) % 4), content,
                       bytes(-len(content) % 4)]

    def directory(self, name):
        if name and name not in self.directories:
            self.directory(os.path.dirname(name))
            self.directories.add(name)
            self._entry(name, 0o040755)

    def file(self, name, content, mode=0o644):
        self.directory(os.path.dirname(name))
        self._entry(name, 0o100000 | mode, content)

    def symlink(self, name, target):
        self.directory(os.path.dirname(name))
        self._entry(name, 0o120777, target.encode())

    def character_device(self, name, major, minor):
        self.directory(os.path.dirname(name))
        self._entry(name, 0o020600, device=(major, minor))

    def save(self, path):
        self._entry('TRAILER!!!', 0)
        with gzip.open(path, 'wb', compresslevel=1) as out:
            out.write(b''.join(self.parts))


class Modules:
    """The kernel's modules and what each of them says it depends on."""

    def __init__(self, tree):
        base = os.path.join(tree, 'lib/modules')
        if not os.path.isdir(base):
            base = os.path.join(tree, 'usr/lib/modules')
        self.files, self.builtin = {}, set()
        for directory, _, names in os.walk(base):
            for name in names:
                path = os.path.join(directory, name)
                if re.search(r'\.ko(\.xz)?$', name):
                    self.files[self._plain(name)] = path
                elif name == 'modules.builtin':
                    with open(path, encoding='utf-8') as file:
                        self.builtin.update(self._plain(os.path.basename(line))
                                            for line in file.read().split())
        self.loaded = {}

    @staticmethod
    def _plain(name):
        return re.sub(r'\.ko.*$', '', name).replace('-', '_')

    def add(self, name):
        name = self._plain(name)
        if name in self.builtin or name in self.loaded:
            return
        if name not in self.files:
            raise ValueError(f'the kernel package has no module {name}')
        path = self.files[name]
        with (lzma.open if path.endswith('.xz') else open)(path, 'rb') as file:
            content = file.read()
        depends = re.search(rb'\0depends=([^\0]*)\0', content)
        for other in (depends.group(1).decode() if depends else '').split(','):
            if other:
                self.add(other)
        self.loaded[name] = content


def read(path):
    with open(path, 'rb') as file:
        return file.read()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('output')
    add('--package', required=True, help='the unpacked kernel package')
    add('--busybox', required=True, help='a busybox that is linked statically')
    add('--init', required=True)
    add('--module', action='append', default=[], metavar='NAME')
    add('--file', action='append', default=[], metavar='NAME=PATH',
        help='a further file')
    add('--program', action='append', default=[], metavar='NAME=PATH',
        help='a further file that can be executed, linked statically')
    args = parser.parse_args()

    busybox = read(args.busybox)
    if b'/ld-linux' in busybox[:4096]:
        raise ValueError(f'{args.busybox} is not linked statically')
    archive = Archive()
    for name in ('dev', 'mnt', 'proc', 'run', 'sys', 'tmp'):
        archive.directory(name)
    archive.character_device('dev/console', 5, 1)
    archive.file('bin/busybox', busybox, 0o755)
    archive.symlink('bin/sh', 'busybox')
    archive.file('init', read(args.init), 0o755)

    modules = Modules(args.package)
    for name in args.module:
        modules.add(name)
    for name, content in modules.loaded.items():
        archive.file(f'modules/{name}.ko', content)
    archive.file('modules/order', '\n'.join([*modules.loaded, '']).encode())
    for items, mode in (args.file, 0o644), (args.program, 0o755):
        for item in items:
            name, path = item.split('=', 1)
            archive.file(name, read(path), mode)
    archive.save(args.output)


if __name__ == '__main__':
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f'make-initramfs.py: {error}')
