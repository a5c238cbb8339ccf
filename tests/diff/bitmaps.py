"""Persistent dirty bitmaps: operations on them, and what a file has of them."""

import os
import struct

from .header import Header
from .programs import Mismatch

NAMES = ['a', 'bitmap0', 'b' * 100, 'with space', 'ü', 'a' * 1023]
OFFSET = 0x00fffffffffffe00
IN_USE = 1
AUTO = 2


def bitmap(chain, rng):
    """Adds, removes, changes and merges bitmaps of an image, with qemu-img."""
    chain.close()
    chain.deal(rng)
    layer = chain.top if rng.random() < 0.8 else rng.choice(chain.layers)
    if layer.kind != 'qcow2':
        return
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(NAMES if rng.random() < 0.3 else NAMES[:3])
        words = []
        draw = rng.random()
        if draw < 0.4:
            words = ['--add']
            if rng.random() < 0.7:
                # The ends of the range are 9 and 31.
                words += ['-g', 1 << rng.choice([9, 9, 10, 12, 14, 16, 20, 31, rng.randint(8, 32)])]
            if rng.random() < 0.3:
                words.append('--disable')
        elif draw < 0.5:
            words = ['--remove']
        elif draw < 0.6:
            words = ['--clear']
        elif draw < 0.7:
            words = [rng.choice(['--enable', '--disable'])]
        elif draw < 0.9:
            words = ['--merge', rng.choice(NAMES[:3])]
            if rng.random() < 0.4:
                other = rng.choice(chain.layers)
                if other.kind == 'qcow2' and other is not layer and not chain.with_secrets(other):
                    words += ['-b', other.name, '-F', lambda d: d.format]
        else:
            words = ['--add', '--merge', rng.choice(NAMES[:3]), '--disable']
        # A line of its own with a name that is in the way, or not there, is
        # refused by both in the same words.
        chain.both('qemu-img', ['bitmap', *words, *chain.image(layer), name], status=None)


def read(path):
    """The bitmaps in a file: {name: (granularity, flags, bits or None)}."""
    with open(path, 'rb') as file:
        header = Header(file)
        cluster, size = header.cluster, header.size
        found = {}
        for table, entries, flags, bits, name in entries_of(file, header):
            content = None
            if not flags & IN_USE:
                content = read_bits(file, cluster, table, entries, -(-(size - size % 512) >> bits))
            if name in found:
                raise Mismatch(f'{path}: two bitmaps of one name')
            found[name] = (bits, flags, content)
        return found


def entries_of(file, header):
    """The entries of the directory: (table, entries, flags, granularity, name)."""
    if not header.bitmaps:
        return []
    directory = find_directory(file, header)
    if directory is None:
        return []
    count, length, offset = directory
    file.seek(offset)
    data = file.read(length)
    found = []
    at = 0
    for _ in range(count):
        table, entries, flags, kind, bits, name_length, extra = struct.unpack_from('>QIIBBHI', data, at)
        if kind != 1 or extra or flags & ~(IN_USE | AUTO):
            raise Mismatch('an unusual bitmap')
        found.append((table, entries, flags, bits, data[at + 24:at + 24 + name_length]))
        at += (24 + name_length + 7) // 8 * 8
    if at != length:
        raise Mismatch(f'a bitmap directory of {length} bytes instead of {at}')
    return found


def spoil(path):
    """Makes the first bits of a bitmap wrong; returns whether there was one."""
    with open(path, 'r+b') as file:
        header = Header(file)
        for table, _, flags, _, _ in entries_of(file, header):
            if flags & IN_USE:
                continue
            file.seek(table)
            entry, = struct.unpack('>Q', file.read(8))
            if entry & OFFSET:
                file.seek(entry & OFFSET)
                byte = file.read(1)
                file.seek(entry & OFFSET)
                file.write(bytes([byte[0] ^ 1]))
            else:
                file.seek(table)
                file.write(struct.pack('>Q', entry ^ 1))
            return True
        return False


def find_directory(file, header):
    """The content of the header extension: (bitmaps, bytes, offset), or None."""
    at = header.length
    while at + 8 <= header.cluster:
        file.seek(at)
        magic, length = struct.unpack('>II', file.read(8))
        if magic == 0:
            return None
        if magic == 0x23852875:
            count, reserved, size, offset = struct.unpack('>IIQQ', file.read(24))
            if length != 24 or reserved:
                raise Mismatch('a bitmaps extension of another length')
            return count, size, offset
        at += 8 + (length + 7) // 8 * 8
    return None


def read_bits(file, cluster, table, entries, count):
    """The bits of a bitmap as a number."""
    file.seek(table)
    content = b''
    for entry, in struct.iter_unpack('>Q', file.read(8 * entries).ljust(8 * entries, b'\0')):
        if entry & OFFSET:
            file.seek(entry & OFFSET)
            content += file.read(cluster).ljust(cluster, b'\0')
        else:
            content += (b'\xff' if entry & 1 else b'\0') * cluster
    return int.from_bytes(content, 'little') & ((1 << count) - 1)


def compare(chain, layer):
    """Both sides of an image have the same bitmaps."""
    if layer.kind != 'qcow2':
        return
    sides = [read(os.path.join(directory, layer.name)) for directory in chain.directories]
    if layer.bits_differ:
        # What was written to it is not the same on both sides.
        sides = [{name: entry[:2] for name, entry in side.items()} for side in sides]
    if sides[0] != sides[1]:
        names = [name for name in {**sides[0], **sides[1]} if sides[0].get(name) != sides[1].get(name)]
        texts = [f'  side {"ab"[number]}: {str(side.get(names[0]))[:300]}' for number, side in enumerate(sides)]
        raise Mismatch(f'{layer.name}: bitmap {names[0][:20]}\n' + '\n'.join(texts))
