# SPDX-License-Identifier: GPL-2.0-or-later
"""Write a complete qcow2 file in one pass, with only the standard library.

Made for building long chains quickly: no process is started and nothing is
read back. The caller says which guest clusters the layer has; the file then
holds header, refcount table, refcount blocks, L1, L2 tables and data, in this
order and without gaps, every cluster with a refcount of exactly one.
"""

import struct

MAGIC = 0x514649FB
EXT_END = 0
EXT_BACKING_FORMAT = 0xE2792ACA
COPIED = 1 << 63
ZERO = 1
HEADER_V2 = 72
HEADER_V3 = 112


def _div_up(value, unit):
    return -(-value // unit)


def _header(version, cluster_bits, size, l1_size, l1_offset, rt_offset,
            rt_clusters, refcount_order, backing, backing_format):
    length = HEADER_V3 if version >= 3 else HEADER_V2
    extensions = b''
    if backing_format:
        name = backing_format.encode()
        extensions += struct.pack('>II', EXT_BACKING_FORMAT, len(name))
        extensions += name + bytes(-len(name) % 8)
    extensions += struct.pack('>II', EXT_END, 0)

    backing_name = backing.encode() if backing else b''
    if len(backing_name) > 1023:
        raise ValueError('the backing file name is longer than 1023 bytes')
    backing_offset = length + len(extensions) if backing_name else 0

    header = struct.pack('>IIQIIQIIQQIIQ', MAGIC, version, backing_offset,
                         len(backing_name), cluster_bits, size, 0, l1_size,
                         l1_offset, rt_offset, rt_clusters, 0, 0)
    if version >= 3:
        # incompatible, compatible and autoclear features; refcount order;
        # header length; compression type and padding
        header += struct.pack('>QQQIIQ', 0, 0, 0, refcount_order, length, 0)
    header += extensions + backing_name
    if len(header) > 1 << cluster_bits:
        raise ValueError('header and backing file name exceed one cluster')
    return header


def _refcounts(count, refcount_order, total_bytes):
    """`count` refcounts of one, then zeroes up to total_bytes."""
    bits = 1 << refcount_order
    if bits >= 8:
        data = (1).to_bytes(bits // 8, 'big') * count
    else:
        per_byte = 8 // bits
        unit = sum(1 << (i * bits) for i in range(per_byte))
        data = bytes([unit]) * (count // per_byte)
        rest = count % per_byte
        if rest:
            data += bytes([sum(1 << (i * bits) for i in range(rest))])
    return data + bytes(total_bytes - len(data))


def write_qcow2(path, size, clusters, data, *, zeroes=(), backing=None,
                backing_format=None, cluster_size=65536, version=3,
                refcount_bits=16):
    """Write the image `path` with the virtual size `size`.

    clusters  guest cluster numbers that hold data
    data      called with each of them, in ascending order; returns the
              cluster's bytes (one that is too short is padded with zeroes)
    zeroes    guest cluster numbers that read as zeroes (version 3)

    Returns the length of the file in bytes.
    """
    cluster_bits = cluster_size.bit_length() - 1
    if 1 << cluster_bits != cluster_size or not 9 <= cluster_bits <= 21:
        raise ValueError('cluster size: a power of two from 512 to 2 MiB')
    refcount_order = refcount_bits.bit_length() - 1
    if 1 << refcount_order != refcount_bits or refcount_order > 6:
        raise ValueError('refcount bits: a power of two from 1 to 64')
    if version not in (2, 3):
        raise ValueError('version: 2 or 3')
    if version == 2 and (refcount_bits != 16 or zeroes):
        raise ValueError('version 2 has 16-bit refcounts and no zero clusters')
    if size % 512:
        raise ValueError('size: a multiple of 512')

    clusters = sorted(clusters)
    zeroes = sorted(set(zeroes).difference(clusters))
    for numbers in (clusters, zeroes):
        if numbers and (numbers[0] < 0 or numbers[-1] * cluster_size >= size):
            raise ValueError('a cluster outside the disk')

    l2_entries = cluster_size // 8
    l1_size = _div_up(_div_up(size, cluster_size), l2_entries)
    l1_clusters = _div_up(l1_size * 8, cluster_size)
    # L1 index -> the [guest cluster, is data] pairs of its L2 table
    tables = {}
    for number in clusters:
        tables.setdefault(number // l2_entries, []).append((number, True))
    for number in zeroes:
        tables.setdefault(number // l2_entries, []).append((number, False))

    # The refcount structures count themselves: iterate until it is stable.
    block_entries = cluster_size * 8 // refcount_bits
    others = 1 + l1_clusters + len(tables) + len(clusters)
    blocks, rt_clusters = 1, 1
    while True:
        total = others + blocks + rt_clusters
        want_blocks = _div_up(total, block_entries)
        want_rt = _div_up(want_blocks * 8, cluster_size)
        if (want_blocks, want_rt) == (blocks, rt_clusters):
            break
        blocks, rt_clusters = max(blocks, want_blocks), max(rt_clusters, want_rt)

    rt_offset = cluster_size
    blocks_offset = rt_offset + rt_clusters * cluster_size
    l1_offset = blocks_offset + blocks * cluster_size
    l2_offset = l1_offset + l1_clusters * cluster_size
    data_offset = l2_offset + len(tables) * cluster_size

    with open(path, 'wb', buffering=1 << 20) as out:
        header = _header(version, cluster_bits, size, l1_size,
                         l1_offset if l1_size else 0, rt_offset, rt_clusters,
                         refcount_order, backing, backing_format)
        out.write(header.ljust(cluster_size, b'\0'))

        table = b''.join((blocks_offset + i * cluster_size).to_bytes(8, 'big')
                         for i in range(blocks))
        out.write(table.ljust(rt_clusters * cluster_size, b'\0'))
        out.write(_refcounts(total, refcount_order, blocks * cluster_size))

        l1 = bytearray(l1_clusters * cluster_size)
        for i, index in enumerate(sorted(tables)):
            struct.pack_into('>Q', l1, index * 8,
                             COPIED | (l2_offset + i * cluster_size))
        out.write(l1)

        offset = data_offset
        for index in sorted(tables):
            l2 = bytearray(cluster_size)
            for number, is_data in sorted(tables[index]):
                entry = COPIED | offset if is_data else ZERO
                struct.pack_into('>Q', l2, number % l2_entries * 8, entry)
                offset += cluster_size if is_data else 0
            out.write(l2)

        for number in clusters:
            content = data(number)
            if len(content) > cluster_size:
                raise ValueError('more data than a cluster holds')
            out.write(content)
            if len(content) < cluster_size:
                out.write(bytes(cluster_size - len(content)))
    return offset
