#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Check from outside, with the unpatched tools, what the guest left behind.

Every check is made even if an earlier one failed. The flat copy of the top is
made by the driver and compared with the chain as the unpatched qemu-img reads
it; the files in it are then compared with the list of what was on the disk
plus what the guest says it wrote.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys


def digest(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def alone(path):
    """How an image is named to be opened without its backing chain."""
    return 'json:' + json.dumps({
        'driver': 'qcow2', 'backing': None,
        'file': {'driver': 'file', 'filename': path}})


class Checks:
    def __init__(self, args):
        self.args = args
        self.failed = 0
        self.log = open(args.log, 'w', encoding='utf-8')
        self.log_path = args.log

    def run(self, *command, cwd=None):
        """A command with its output in the log. Returns status and output."""
        env = dict(os.environ, LC_ALL='C',
                   PATH=os.environ['PATH'] + ':/usr/sbin:/sbin')
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, check=False, env=env,
                              cwd=cwd or self.args.dir, errors='replace')
        self.log.write(f'$ {" ".join(command)}\n{done.stdout}'
                       f'[status {done.returncode}]\n')
        self.log.flush()
        return done.returncode, done.stdout

    def report(self, what, problems):
        if problems:
            self.failed += 1
            print(f'FAIL: does not hold: {what}')
            for problem in problems[:10]:
                print(f'      {problem}')
                self.log.write(f'FAIL: {what}: {problem}\n')
            if len(problems) > 10:
                print(f'      and {len(problems) - 10} more')
            print(f'      see {self.log_path}', flush=True)
        else:
            print(f'    {what}', flush=True)
            self.log.write(f'ok: {what}\n')

    def tool(self, *command):
        """The unpatched qemu-img."""
        return self.run(self.args.stock_qemu_img, *command)


def frozen_layers(checks, layers):
    with open(checks.args.frozen, encoding='utf-8') as file:
        before = dict(reversed(line.split()) for line in file)
    changed = [name for name in layers[:-1]
               if digest(os.path.join(checks.args.dir, name)) != before[name]]
    checks.report(f'the {len(layers) - 1} layers below the one the guest '
                  'started on are as they were, byte for byte', changed)


def check_layers(checks, layers, snapshots):
    bad = []
    for name in layers + snapshots:
        status, _ = checks.tool('check', alone(name))
        if status:
            bad.append(f'{name}: qemu-img check ended with status {status}')
    checks.report(f'unpatched qemu-img check: all {len(layers + snapshots)} '
                  'layers are clean', bad)


def check_by_driver(checks, snapshots):
    bad = []
    for name in snapshots:
        status, _ = checks.run(checks.args.qemu_img, 'check', '-f',
                               checks.args.driver, name)
        if status:
            bad.append(f'{name}: status {status}')
    checks.report(f'{checks.args.driver} finds the {len(snapshots)} new layers '
                  'clean, too', bad)


def check_names(checks, layers, snapshots):
    problems = []
    expected = list(reversed(layers + snapshots))
    # Without locks and one by one: this opens no backing files.
    status, text = checks.tool('info', '-U', '--backing-chain',
                               '--output=json', expected[0])
    chain = json.loads(text) if status == 0 else []
    if status:
        problems.append(f'qemu-img info ended with status {status}')
    elif len(chain) != len(expected):
        problems.append(f'{len(chain)} images, not {len(expected)}')
    for image, name, below in zip(chain, expected, expected[1:] + [None]):
        for key, value in (('filename', name), ('format', 'qcow2'),
                           ('backing-filename', below),
                           ('backing-filename-format', below and 'qcow2'),
                           ('dirty-flag', False)):
            if image.get(key) != value:
                problems.append(f'{name}: {key} is {image.get(key)}, not {value}')
        if image.get('format-specific', {}).get('data', {}).get('corrupt'):
            problems.append(f'{name}: marked corrupt')
    for name in snapshots:
        with open(os.path.join(checks.args.dir, name), 'rb') as file:
            if b'rqcow2' in file.read(65536):
                problems.append(f'{name}: "rqcow2" is in its header')
    checks.report(f'qemu-img info --backing-chain: {len(expected)} images, all '
                  'qcow2 with backing format qcow2, by relative names', problems)


def check_snapshots_used(checks, snapshots):
    empty = []
    for name in snapshots:
        status, text = checks.tool('map', '--output=json', alone(name))
        if status:
            empty.append(f'{name}: qemu-img map ended with status {status}')
        elif not any(extent['data'] for extent in json.loads(text)):
            empty.append(f'{name} holds no data')
    checks.report('the guest wrote into each of the new layers', empty)


def check_flat(checks, top, flat):
    problems = []
    status, _ = checks.run(checks.args.qemu_img, 'convert', '-f',
                           checks.args.driver, '-O', 'raw', top, flat)
    if status:
        problems.append(f'qemu-img convert -f {checks.args.driver} ended with '
                        f'status {status}')
    else:
        status, text = checks.tool('compare', '-f', 'qcow2', '-F', 'raw', top,
                                   flat)
        if status:
            problems.append(text.strip())
    checks.report(f'qemu-img compare: the chain as unpatched qcow2 reads it and '
                  f'the flat copy made by {checks.args.driver} are the same',
                  problems)
    return not problems


def check_file_system(checks, flat):
    status, _ = checks.run('e2fsck', '-f', '-n', flat)
    checks.report('e2fsck finds the file system clean',
                  [f'e2fsck ended with status {status}'] if status else [])


def check_files(checks, flat, written):
    with open(checks.args.sums, encoding='utf-8') as file:
        expected = dict(reversed(line.rstrip('\n').split('  ', 1))
                        for line in file)
    expected.update(written['written'])
    for path in written['gone']:
        expected.pop(path, None)

    tree = checks.args.tree
    shutil.rmtree(tree, ignore_errors=True)
    os.makedirs(tree)
    problems = []
    status, _ = checks.run('debugfs', '-R', f'rdump / {tree}', flat)
    if status:
        problems.append(f'debugfs ended with status {status}')
    found = {}
    for directory, names, files in os.walk(tree):
        if directory == tree and 'lost+found' in names:
            names.remove('lost+found')
        for name in files:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                found[os.path.relpath(path, tree)] = path
    for path, checksum in sorted(expected.items()):
        if path not in found:
            problems.append(f'{path} is missing')
        elif digest(found.pop(path)) != checksum:
            problems.append(f'{path} has wrong contents')
    problems += [f'{path} should not be there' for path in sorted(found)]
    shutil.rmtree(tree, ignore_errors=True)
    checks.report(f'all {len(expected)} files on the flat copy are right, '
                  f'{len(written["written"])} of them written by the guest',
                  problems)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--qemu-img', required=True, help='the one that has the driver')
    add('--stock-qemu-img', required=True, help='the unpatched one')
    add('--driver', required=True)
    add('--dir', required=True, help='where the chain is')
    add('--info', required=True, help="make-disk.py's description")
    add('--sums', required=True, help='what was on the disk')
    add('--frozen', required=True, help='checksums of the layers themselves')
    add('--written', required=True, help='what the guest wrote')
    add('--flat', required=True, help='output: the flat copy')
    add('--tree', required=True, help='directory for the extracted files')
    add('--log', required=True)
    return parser.parse_args()


def main():
    args = parse_arguments()
    checks = Checks(args)
    with open(args.info, encoding='utf-8') as file:
        layers = [f'l{i}.qcow2' for i in range(json.load(file)['layers'])]
    with open(args.written, encoding='utf-8') as file:
        written = json.load(file)
    snapshots = [f'{name}.qcow2' for name in written['snapshots']]
    frozen_layers(checks, layers)
    check_layers(checks, layers, snapshots)
    check_by_driver(checks, snapshots)
    check_names(checks, layers, snapshots)
    check_snapshots_used(checks, snapshots)
    if check_flat(checks, snapshots[-1], args.flat):
        check_file_system(checks, args.flat)
        check_files(checks, args.flat, written)
    sys.exit(1 if checks.failed else 0)


if __name__ == '__main__':
    main()
