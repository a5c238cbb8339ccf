"""The operations. Each takes the chain and a random generator of its own.

What an operation does depends on its generator and on the state of the chain
only, so that a sequence can be replayed, and with operations left out.
"""

import os
import shutil

from . import bitmaps
from .bitmaps import bitmap
from .chain import KIB, MIB, Chain, Layer, check_run
from .header import Header
from .programs import SECRET, Mismatch, parse

# QEMU's driver cannot preallocate if it finds the room within the file.
GAP = 'Cannot use preallocation for shrinking files'
DATA = [1, 2, 3, 0x55, 0xaa, 0xfe, 0xff]


def spot(chain, rng):
    """An offset where something may go wrong."""
    top = chain.top
    other = rng.choice(chain.layers)
    cluster = rng.choice([top.cluster, other.cluster, top.part, other.part])
    table = cluster * cluster // 8
    draw = rng.random()
    if draw < 0.3:
        base = rng.randrange(0, max(1, min(top.size, 64 * cluster)))
    elif draw < 0.5:
        base = rng.randrange(top.size)
    elif draw < 0.65:
        base = top.size - rng.randint(1, 4) * cluster
    elif draw < 0.8:
        base = table * rng.randint(0, top.size // table + 1)
    else:
        # Where the layers below end.
        base = rng.choice(chain.layers).size
    if rng.random() < 0.7:
        base -= base % cluster
    if rng.random() < 0.4:
        base += rng.choice([-1, 1, 511, -511, 512, -512, rng.randint(-cluster, cluster)])
    return min(max(base, 0), top.size - 1)


def stretch(chain, rng, limit=4 * MIB):
    """A range: (offset, length)."""
    top = chain.top
    cluster = rng.choice([top.cluster, top.part])
    start = spot(chain, rng)
    draw = rng.random()
    if draw < 0.2:
        length = rng.randint(1, 4096)
    elif draw < 0.35:
        length = 512 * rng.randint(1, 64)
    elif draw < 0.6:
        length = rng.randint(1, 3 * cluster)
    elif draw < 0.9:
        length = cluster * rng.randint(1, 12)
        if rng.random() < 0.6:
            start -= start % cluster
    else:
        length = rng.randint(1, limit)
    limit = max(limit, 2 * top.cluster)
    return start, max(1, min(length, limit, top.size - start))


def opened(chain, rng):
    """Opens the top unless it is open."""
    if not chain.io:
        chain.open(rng)


def write(chain, rng):
    """Writes, of all kinds."""
    opened(chain, rng)
    start, length = stretch(chain, rng)
    value = rng.choice(DATA)
    flags = ' -f' if rng.random() < 0.1 else ''
    if rng.random() < 0.2 and length > 3:
        # Scattered buffers.
        cut = sorted(rng.sample(range(1, length), 2))
        parts = [cut[0], cut[1] - cut[0], length - cut[1]]
        # readv and writev want whole sectors for each buffer.
        parts = [max(512, part // 512 * 512) for part in parts]
        if start + sum(parts) <= chain.top.size:
            chain.must(f'writev -q{flags} -P {value} {start} {" ".join(map(str, parts))}')
            chain.top.content.fill(start, start + sum(parts), value)
            return
    chain.must(f'write -q{flags} -P {value} {start} {length}')
    chain.top.content.fill(start, start + length, value)


def compress(chain, rng):
    """Writes compressed clusters, where no other cluster is in the way."""
    top = chain.top
    if top.kind != 'qcow2' or not chain.alike or top.packed is None:
        return
    # Opened anew: QEMU's driver goes on packing into the cluster it packed into
    # last even if that was freed and given to a table meanwhile.
    chain.close()
    opened(chain, rng)
    for _ in range(rng.randint(1, 6)):
        start = spot(chain, rng)
        start -= start % top.cluster
        if start in top.packed or start + top.cluster > top.size:
            continue
        value = rng.choice(DATA)
        # A cluster that has data is refused.
        if not chain.commands(f'write -q -c -P {value} {start} {top.cluster}'):
            top.content.fill(start, start + top.cluster, value)
            top.packed.add(start)


def zero(chain, rng):
    """Writes zeroes the short way."""
    opened(chain, rng)
    start, length = stretch(chain, rng, 16 * MIB)
    flags = rng.choice(['', '', ' -u', ' -u', ' -n', ' -n -u', ' -f'])
    cluster = chain.top.part
    if '-n' in flags:
        start -= start % cluster
        length = min(-(-length // cluster) * cluster, chain.top.size - start)
    answer = chain.commands(f'write -q -z{flags} {start} {length}')
    if answer:
        # Without a fallback, old images cannot do this.
        if '-n' not in flags or answer != ['write failed: Operation not supported']:
            raise Mismatch(f'write -z{flags} {start} {length}: ' + ' / '.join(answer))
    else:
        chain.top.content.fill(start, start + length, 0)


def discard(chain, rng):
    """Discards. What is left is known: whole clusters read as zeroes."""
    opened(chain, rng)
    start, length = stretch(chain, rng, 16 * MIB)
    chain.must(f'discard -q {start} {length}')
    discarded(chain, start, length)


def discarded(chain, start, length):
    """Does to the model what a discard does."""
    top = chain.top
    if not chain.discard:
        return
    if top.kind == 'raw':
        top.content.fill(start, start + length, 0)
        return
    if top.version < 3 and len(chain.layers) > 1:
        return      # would bring the backing file's data back
    end = start + length
    first = -(-start // top.cluster) * top.cluster
    last = end if end == top.size else end // top.cluster * top.cluster
    if first < last:
        top.content.fill(first, last, 0)


def read(chain, rng):
    """Reads that cross runs of different data, each part compared."""
    opened(chain, rng)
    lines = []
    for _ in range(rng.randint(1, 4)):
        start, length = stretch(chain, rng)
        runs = list(chain.top.content.runs(start, start + length))
        for a, b, value in rng.sample(runs, min(len(runs), 6)):
            lines.append(f'read -q -P {value} -s {a - start} -l {b - a} {start} {length}')
    chain.must(*lines)


def read_all(chain, rng):
    """Reads everything."""
    opened(chain, rng)
    chain.read_all(rng)


def parallel(chain, rng):
    """Requests in flight together, that share clusters but not bytes."""
    opened(chain, rng)
    content = chain.top.content
    cluster = rng.choice([chain.top.cluster, chain.top.part])
    size = chain.top.size
    base = spot(chain, rng)
    taken, lines, after = [], [], []
    for _ in range(rng.randint(2, 24)):
        if rng.random() < 0.8:
            start = base + 512 * rng.randint(-8, 8 + 4 * cluster // 512)
        else:
            start = spot(chain, rng)
        start = min(max(start - start % 512, 0), size - 512)
        length = 512 * rng.choice([1, 2, 7, rng.randint(1, max(1, 2 * cluster // 512))])
        length = min(length, (size - start) // 512 * 512, MIB)
        if any(start < b and a < start + length for a, b in taken):
            continue
        taken.append((start, start + length))
        draw = rng.random()
        if draw < 0.55:
            value = rng.choice(DATA)
            lines.append(f'aio_write -q -P {value} {start} {length}')
            after.append((start, start + length, value))
        elif draw < 0.7:
            lines.append(f'aio_write -q -z {"-u " if rng.random() < 0.5 else ""}{start} {length}')
            after.append((start, start + length, 0))
        else:
            runs = list(content.runs(start, start + length))
            if len(runs) == 1:
                lines.append(f'aio_read -q -P {runs[0][2]} {start} {length}')
            else:
                lines.append(f'aio_read -q {start} {length}')
    if rng.random() < 0.3:
        lines.insert(rng.randint(0, len(lines)), 'flush')
    chain.must(*lines, 'aio_flush')
    for start, end, value in after:
        content.fill(start, end, value)
    # Which of two requests came first decides where things are, and whether a
    # cluster was there when zeroes were to be written to a part of it.
    chain.alike = False


def flush(chain, rng):
    """Flushes."""
    opened(chain, rng)
    chain.must('flush')


def truncate(chain, rng):
    """Resizes, in the open image or with qemu-img."""
    top = chain.top
    size = top.size
    draw = rng.random()
    if draw < 0.5:
        size += 512 * rng.randint(1, 256)
    elif draw < 0.6:
        size += top.cluster * rng.randint(1, 4 + 64 * KIB // top.cluster)
    elif draw < 0.8:
        size -= min(512 * rng.randint(1, 512), size // 2)
    else:
        size = chain.draw_size(rng, top.cluster)
    size = max(512, size // 512 * 512)
    if not chain.large:
        size = min(size, 32 * MIB)
    if size == top.size:
        return
    mode = 'off'
    if size > top.size and not chain.large and size - top.size < 8 * MIB and rng.random() < 0.4:
        modes = ['metadata', 'falloc', 'full'] if top.kind == 'qcow2' else ['falloc', 'full']
        if chain.counts.get('bitmap') or chain.counts.get('compress'):
            # QEMU's driver begins behind the last cluster in use, though the
            # file may be longer, and leaves what was freed there.
            modes = ['off']
        if top.encrypted:
            modes = ['off']
        mode = rng.choice(modes)
        top.preallocated = True
    if rng.random() < 0.6:
        opened(chain, rng)
        answer = chain.commands(f'truncate -m {mode} {size}', weakness=GAP, instead=f'truncate -m off {size}')
        if answer:
            # Both drivers refuse it in the same words.
            chain.note(' / '.join(answer))
            return
    else:
        chain.close()
        chain.deal(rng)
        shrink = ['--shrink'] if size < top.size else []
        args = ['resize', '-q', *shrink]
        image = chain.image(top)
        done = chain.both('qemu-img', [*args, f'--preallocation={mode}', *image, size], status=None, weakness=GAP)
        if done is None:
            return
        if done in (0, 1):
            chain.run(chain.served[done], done, 'qemu-img', [*args, *image, size])
    old, cut = top.size, top.cut
    top.content.resize(size)
    if size < old:
        top.cut = size % top.cluster != 0
    elif mode == 'metadata':
        # QEMU's driver may reuse clusters here that were in use before, and
        # leaves in them what there was.
        opened(chain, rng)
        chain.must(f'write -q -P 9 {old} {size - old}')
        top.content.fill(old, size, 9)
        top.cut = False
    elif cut:
        # Nobody promises zeroes there. Make it known what there is.
        opened(chain, rng)
        end = min(size, -(-old // top.cluster) * top.cluster)
        chain.must(f'write -q -P 7 {old} {end - old}')
        top.content.fill(old, end, 7)
        top.cut = size < -(-old // top.cluster) * top.cluster


def inspect(chain, rng):
    """What the open image says of itself."""
    opened(chain, rng)
    chain.commands('length')
    if chain.alike and chain.top.kind == 'qcow2':
        start, length = stretch(chain, rng)
        chain.commands(f'alloc {start - start % 512} {max(512, length // 512 * 512)}', 'map')


def reopen(chain, rng):
    """Changes options of the open image, or closes it."""
    if chain.io and chain.top.kind == 'qcow2' and rng.random() < 0.5:
        options = ','.join(o for o in chain.draw_open_options(rng)
                           if not o.startswith(('discard=', 'cache.', 'discard-no-unref')))
        if options and rng.random() < 0.7:
            chain.commands(f'reopen -o {options}')
            return
        # Closed right after: in QEMU itself, requests in flight at once may
        # find a file descriptor closed after a change of this kind.
        chain.commands('reopen -r', 'read -q 0 512', 'reopen -w')
    chain.close()
    if rng.random() < 0.3:
        chain.verify(rng, False)


def snapshot(chain, rng):
    """Puts an overlay on top."""
    if len(chain.layers) >= 13:
        return commit(chain, rng)
    chain.close()
    chain.deal(rng)
    return chain.add_layer(rng)


def keep(chain, rng):
    """Takes an internal snapshot, goes back to one, or deletes one."""
    top = chain.top
    if top.kind != 'qcow2':
        return
    chain.close()
    chain.deal(rng)
    kept = top.kept
    draw = rng.random()
    args = ['snapshot', '-q', *SECRET, '--image-opts']
    image = [lambda d: chain.node(d, top)]
    if not kept or draw < 0.5 and len(kept) < 6:
        name = f's{chain.serial}'
        chain.serial += 1
        if chain.both('qemu-img', [*args, '-c', name, *image], status=None) is None:
            # Refcounts are at their limit. What was counted already is leaked.
            mend(chain)
        else:
            kept[name] = (top.content.copy(), top.cut)
    elif draw < 0.75:
        name = rng.choice(sorted(kept))
        content, cut = kept[name]
        # QEMU wants bitmaps to go first then.
        bound = bitmaps.read(os.path.join(chain.directories[0], top.name))
        if chain.both('qemu-img', [*args, '-a', name, *image], status=None) is not None:
            top.content, top.cut = content.copy(), cut
        elif not bound and (top.version == 3 or content.size == top.size):
            # Only an old image cannot change its size.
            if not refcounts_are_small(chain):
                raise Mismatch(f'going back to {name} of {top.name} failed')
            for side in (0, 1):
                if chain.served[side].is_rust:
                    # It takes back what it did.
                    chain.check_layer(side, top)
            mend(chain)
            even_out(chain, min(top.size, content.size))
    else:
        name = rng.choice(sorted(kept))
        chain.both('qemu-img', [*args, '-d', name, *image])
        del kept[name]
    for side in (0, 1):
        chain.check_layer(side, top)


def mend(chain):
    """Repairs what an operation left that was given up in the middle."""
    for side in (0, 1):
        # QEMU's driver loses the snapshots of an image that has bitmaps as well.
        chain.run(chain.settings.driver, side, 'qemu-img',
                  ['check', '-q', '-r', 'all', *chain.image(chain.top)])


def even_out(chain, size):
    """Where going back to a snapshot failed QEMU's driver has changed the size already."""
    top = chain.top
    for side, driver in enumerate(chain.served):
        if driver.is_rust:
            status, text = chain.run(driver, side, 'qemu-img', ['info', '--output=json', *chain.image(top)])
            if status or parse(text)['virtual-size'] != top.size:
                raise Mismatch(f'the size of {top.name} of side {"ab"[side]} is not as before')
        chain.run(driver, side, 'qemu-img', ['resize', '-q', '--shrink', *chain.image(top), size])
    if size < top.size:
        top.content.resize(size)
        top.cut = size % top.cluster != 0


def refcounts_are_small(chain):
    """Whether the top's refcounts have less than 4 bits."""
    return Header.of(os.path.join(chain.directories[0], chain.top.name)).refcount_order < 2


def amend(chain, rng):
    """Changes options of the top."""
    top = chain.top
    if top.kind != 'qcow2':
        return
    chain.close()
    chain.deal(rng)
    bits = 1 << Header.of(os.path.join(chain.directories[0], top.name)).refcount_order
    # QEMU's driver makes zero clusters of an encrypted image zeroes that are not encrypted.
    encrypts = all(driver.is_rust for driver in chain.served)
    lowering = top.version == 3 and not top.kept and not chain.large and (encrypts or not top.encrypted) \
        and not bitmaps.read(os.path.join(chain.directories[0], top.name))
    words = []
    if rng.random() < 0.5 and (top.version == 2 or lowering):
        # QEMU's driver damages snapshots that share preallocated zero clusters.
        words.append('compat=' + rng.choice(['0.10', '1.1']))
    if rng.random() < 0.5:
        words.append('lazy_refcounts=' + rng.choice(['on', 'off']))
    if rng.random() < 0.6 or not words:
        # Which count does not fit is told by its place. QEMU's driver walks over all that the table has room for.
        widths = [1 << n for n in range(7) if chain.alike or 1 << n >= bits]
        if top.cluster ** 2 // bits <= 1 << 26:
            words.append(f'refcount_bits={rng.choice(widths)}')
    if not words:
        return
    done = chain.both('qemu-img', ['amend', '-o', ','.join(words), *chain.image(top)], status=None)
    # Some of it may be done although the rest is refused; tables are where there is room.
    chain.alike = False
    header = Header.of(os.path.join(chain.directories[0], top.name))
    top.version = header.version
    top.lazy = header.lazy_refcounts
    if done is not None and 'compat=0.10' in words and top.version != 2:
        raise Mismatch(f'{top.name} is still of version {top.version}')
    for side in (0, 1):
        chain.check_layer(side, top)


def commit(chain, rng):
    """Commits the top into an image below."""
    if len(chain.layers) < 2 or any(layer.kept for layer in chain.layers):
        # Snapshots see what is below, too.
        return
    chain.close()
    chain.deal(rng)
    top = chain.top
    depth = 1
    # With a key a layer has no plain name that -b could tell.
    if len(chain.layers) > 2 and not chain.with_secrets(top) and rng.random() < 0.3:
        depth = rng.randint(1, len(chain.layers) - 1)
    base = chain.layers[-1 - depth]
    if base.cut and base.size < top.size:
        return
    args = ['commit', '-q']
    if depth > 1:
        args += ['-b', base.name]
    elif rng.random() < 0.4:
        args += ['-d']
    if chain.both('qemu-img', args + chain.image(top), status=None) is None:
        # An old image cannot grow if its backing file is longer than itself,
        # and none that has bitmaps which nobody kept.
        old = base.version == 2 and base is not chain.layers[0]
        lost = chain.counts.get('crash') and chain.counts.get('bitmap')
        if base.size >= top.size or not (old or lost):
            raise Mismatch(f'committing {top.name} to {base.name} failed')
        return
    base.content.overlay(top.content)
    # How much of what is zero is written depends on what is allocated.
    base.bits_differ = True
    base.preallocated = base.preallocated or top.preallocated
    # A commit into a raw file or one with other clusters leaves something
    # else than the model of allocation knows, but both sides do the same.
    if depth > 1 or '-d' in args or rng.random() < 0.5:
        del chain.layers[-depth:]
    else:
        # The top has been emptied, and reads what is below now.
        chain.check_layer(rng.randint(0, 1), top)


def rebase(chain, rng):
    """Gives the top another backing file, or none, with the same contents."""
    if len(chain.layers) < 2 or chain.top.size > 256 * MIB or any(layer.kept for layer in chain.layers):
        return
    chain.close()
    chain.deal(rng)
    draw = rng.random()
    top = chain.top
    if draw < 0.3:
        # Another name of the same file.
        below = chain.layers[-2]
        name = f'./{below.name}' if rng.random() < 0.5 else below.name
        args = ['rebase', '-q', '-u', '-b', name, '-F',
                (lambda d: d.format) if below.kind == 'qcow2' else 'raw', *chain.image(top, alone=True)]
        chain.both('qemu-img', args)
    elif chain.with_secrets(chain.layers[-2]):
        return      # it opens them by what the header says alone
    elif draw < 0.6 or len(chain.layers) < 3 or top.encrypted:
        # Opened by options with its key, it has no name that others are relative to.
        chain.both('qemu-img', ['rebase', '-q', '-b', '', *chain.image(top)])
        del chain.layers[:-1]
    else:
        keep = rng.randint(1, len(chain.layers) - 2)
        below = chain.layers[keep - 1]
        chain.both('qemu-img', ['rebase', '-q', '-b', below.name, '-F',
                                (lambda d: d.format) if below.kind == 'qcow2' else 'raw', *chain.image(top)])
        del chain.layers[keep:-1]


def convert(chain, rng):
    """Copies the disk into another image, which may take the chain's place."""
    chain.close()
    chain.deal(rng)
    top = chain.top
    options, cluster, version, lazy, preallocated = chain.draw_options(rng, False)
    if top.size > 64 * MIB:
        options = ','.join(o for o in options.split(',') if 'prealloc' not in o)
        preallocated = False
    layer = Layer(chain.name('qcow2'), 'qcow2', top.size, cluster, version)
    layer.lazy, layer.preallocated = lazy, preallocated
    layer.describe(options)
    layer.content = top.content.copy()
    args = ['convert', '-q', *([] if chain.with_secrets(top) else SECRET), '-O', lambda d: d.format, '-o', options]
    if rng.random() < 0.3:
        args += ['-S', rng.choice(['0', '4k', '64k'])]
    # Copying out of order lays the new image out differently.
    unordered = rng.random() < 0.3
    if unordered:
        args += ['-W', '-m', rng.randint(1, 16)]
    if not (preallocated or layer.encrypted or layer.data_file) and rng.random() < 0.4:
        args.append('-c')
        layer.packed = None
    chain.both('qemu-img', [*args, *chain.image(top), layer.name])
    for side in (0, 1):
        chain.check_layer(side, layer)
    driver = rng.choice([chain.settings.driver, chain.settings.oracle])
    chain.verify_layer(driver, rng.randint(0, 1), layer)
    if rng.random() < 0.3:
        chain.layers = [layer]
    else:
        for directory in chain.directories:
            os.remove(os.path.join(directory, layer.name))


def measure(chain, rng):
    """How large images would be."""
    chain.close()
    chain.deal(rng)
    options, *_ = chain.draw_options(rng, False)
    texts = chain.both('qemu-img', ['measure', '--output=json', *SECRET, '-O', lambda d: d.format, '-o', options,
                                    '--size', rng.randint(0, 1 << rng.randint(10, 46))], status=None)
    if texts and texts[0] != texts[1]:
        raise Mismatch(f'qemu-img measure: {texts[0]}\n  {texts[1]}')


def crash(chain, rng):
    """Ends the programs at once: what was flushed is there."""
    opened(chain, rng)
    top = chain.top
    # QEMU's driver gives compressed clusters that were written to away at once:
    # a crash makes them unreadable, and what the guest flushed before is lost.
    if top.kind != 'qcow2' or top.packed is None:
        return
    chain.must('flush')
    flushed = top.content.copy()
    later = []
    for _ in range(rng.randint(0, 5)):
        start, length = stretch(chain, rng)
        if any(at < start + length and start < at + top.cluster for at in top.packed):
            continue
        draw = rng.random()
        if draw < 0.6:
            value = rng.choice(DATA)
            chain.must(f'write -q -P {value} {start} {length}')
        elif draw < 0.8:
            value = 0
            chain.must(f'write -q -z -u {start} {length}')
        else:
            value = 0
            chain.must(f'discard -q {start} {length}')
        later.append((start, start + length, value))
    chain.crash()
    driver, oracle = chain.settings.driver, chain.settings.oracle
    for side in (0, 1):
        # Opening, by a driver that may not have been the one that crashed,
        # or a repair: both have to be enough.
        repair = rng.choice([driver, oracle])
        image = chain.image(top)
        # A lazy image is marked dirty, and its refcounts are allowed to be wrong.
        status, text = chain.run(oracle, side, 'qemu-img', ['check', '-U', *image], (0, 2, 3))
        if status == 2 and not Header.of(os.path.join(chain.directories[side], top.name)).dirty:
            raise Mismatch(f'{top.name} of side {"ab"[side]} is corrupt after a crash:\n{text}')
        if rng.random() < 0.5:
            chain.run(repair, side, 'qemu-io', ['-c', 'read 0 512', *SECRET, '--image-opts',
                                                lambda d: chain.node(d, top)])
        chain.run(repair, side, 'qemu-img', ['check', '-q', '-r', rng.choice(['leaks', 'all'])
                                             if not Header.of(os.path.join(chain.directories[side], top.name)).dirty
                                             else 'all', *image])
        chain.check_layer(side, top)
        crashed_contents(chain, rng.choice([driver, oracle]), side, flushed, later)
    # Make it known again what is there.
    chain.alike = False
    top.content = flushed
    chain.open(rng)
    for start, end, _ in later:
        value = rng.choice(DATA)
        chain.must(f'write -q -P {value} {start} {end - start}')
        top.content.fill(start, end, value)


def crashed_contents(chain, driver, side, flushed, later):
    """Everything flushed is there, the rest is old or new."""
    top = chain.top
    chain.run(driver, side, 'qemu-img', ['convert', '-O', 'raw', *chain.image(top), 'out.raw'])
    path = os.path.join(chain.directories[side], 'out.raw')
    edges = sorted({0, top.size, *(a for a, _, _ in later), *(b for _, b, _ in later)})
    with open(path, 'rb') as file:
        for low, high in zip(edges, edges[1:]):
            new = {v for a, b, v in later if a < high and low < b}
            if top.encrypted and 0 in new and not chain.served[side].is_rust:
                # QEMU's driver punches a hole where the cluster was before the
                # table that lets go of it is on disk: zeroes, decrypted.
                continue
            for start, end, value in flushed.runs(low, high):
                check_run(file, start, end, bytes(new | {value}), f'{top.name} of side {"ab"[side]} after a crash')
    os.remove(path)


def repair(chain, rng):
    """Damages a copy of an image: both drivers find and repair the same."""
    chain.close()
    layers = [layer for layer in chain.layers if layer.kind == 'qcow2' and layer.size <= 64 * MIB]
    if not layers:
        return
    layer = rng.choice(layers)
    side = rng.randint(0, 1)
    directory = chain.directories[side]
    if layer.kept and bitmaps.read(os.path.join(directory, layer.name)):
        return      # QEMU's driver loses the snapshots when it repairs such an image
    names = ['damaged.0', 'damaged.1']
    for name in names:
        shutil.copyfile(os.path.join(directory, layer.name), os.path.join(directory, name))
    what = wound(os.path.join(directory, names[0]), rng)
    shutil.copyfile(os.path.join(directory, names[0]), os.path.join(directory, names[1]))
    chain.note(f'damage a copy of {layer.name} of side {"ab"[side]}: {what}')
    pair = [chain.settings.driver, chain.settings.oracle]
    level = rng.choice(['leaks', 'all', 'all'])
    has_bitmaps = bool(bitmaps.read(os.path.join(directory, layer.name)))
    for args in ([], ['-r', level], []):
        texts = []
        for driver, name in zip(pair, names):
            status, text = chain.run(driver, side, 'qemu-img',
                                     ['check', '--output=json', *args, *chain.image(layer, name)], (0, 1, 2, 3))
            texts.append((status, comparable(text, bool(args))))
        if texts[0] != texts[1]:
            raise Mismatch(f'qemu-img check {" ".join(args)} of {layer.name}, damaged ({what}):\n  {pair[0].name}: '
                           f'status {texts[0][0]}: {texts[0][1]}\n  {pair[1].name}: status {texts[1][0]}: {texts[1][1]}')
        if args and texts[1][0] == 1 and has_bitmaps:
            # Given up, but the bitmaps are stored all the same, in clusters that only seem to be free. QEMU's driver
            # has no L1 table any more when it closes an image, and overwrites an L2 table where rqcow2 stops.
            level = None
            break
    if level == 'all':
        # Whoever repaired it: the unpatched qemu-img agrees.
        for name in names:
            status, text = chain.run(chain.settings.oracle, side, 'qemu-img',
                                     ['check', *chain.image(layer, name)], (0, 1, 2, 3))
            if status != texts[1][0]:
                raise Mismatch(f'{layer.name}, damaged ({what}) and repaired, is not sound:\n{text}')
    for name in names:
        os.remove(os.path.join(directory, name))


def comparable(text, repaired):
    """A report of check, less the name and what a repair lays out freely."""
    lines = []
    for line in text.splitlines():
        key = line.strip().split('"')[1:2]
        if key and key[0] in ('filename', 'format'):
            continue
        if repaired and key and key[0] == 'image-end-offset':
            continue
        lines.append(line.strip().rstrip(','))
    return ' '.join(sorted(line for line in lines if line.startswith('"')))


def wound(path, rng):
    """Damages an image, and says how."""
    import struct
    from .chain import Tables
    with open(path, 'r+b') as file:
        tables = Tables(file)
        header = tables.header
        order = header.refcount_order
        draw = rng.random()
        if draw < 0.5:
            file.seek(header.refcount_table)
            block, = struct.unpack('>Q', file.read(8))
            if block:
                width = max(1, (1 << order) // 8)
                count = min(tables.cluster // width, 64)
                at = block + width * rng.randrange(count)
                file.seek(at)
                old = file.read(width)
                new = rng.choice([0, 1, 2]).to_bytes(width, 'big') if order >= 3 else bytes([rng.randrange(256)])
                file.seek(at)
                file.write(new)
                return f'refcount at {at} from {old.hex()} to {new.hex()}'
        entries = [(at, entry) for at, entry in tables.entries() if entry & 0x00fffffffffffe00]
        if entries:
            at, entry = rng.choice(entries)
            kind = rng.randrange(4)
            if kind == 0:
                new = entry ^ 1 << 63
            elif kind == 1:
                new = 0
            elif kind == 2:
                new = rng.choice(entries)[1]
            else:
                new = entry ^ 512
            file.seek(at)
            file.write(struct.pack('>Q', new))
            return f'L2 entry at {at} from {entry:#x} to {new:#x}'
        return 'nothing'


OPERATIONS = {
    write: 30, compress: 6, zero: 10, discard: 9, read: 9, read_all: 3, parallel: 8, flush: 3, truncate: 5, inspect: 3,
    reopen: 8, bitmap: 6, snapshot: 7, commit: 4, rebase: 2, keep: 5, amend: 3, convert: 2, measure: 1, crash: 3, repair: 2,
}
BY_NAME = {operation.__name__: operation for operation in OPERATIONS}


def draw_sequence(rng):
    """A list of (name, seed)."""
    names = [operation.__name__ for operation in OPERATIONS]
    weights = list(OPERATIONS.values())
    sequence = []
    # First a chain with something in it.
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3, 5, 8, 11])):
        for _ in range(rng.randint(0, 5)):
            sequence.append(rng.choice(['write', 'write', 'write', 'compress', 'zero', 'discard']))
        sequence.append('snapshot')
    for _ in range(rng.randint(5, 60)):
        sequence.append(rng.choices(names, weights)[0])
    return [(name, rng.getrandbits(48)) for name in sequence]


def play(settings, directory, seed, sequence):
    """Plays a sequence; raises Mismatch. Returns the chain."""
    import random
    chain = Chain(settings, directory, seed)
    try:
        for number, (name, own) in enumerate(sequence):
            chain.note(f'#{number} {name}')
            chain.counts[name] = chain.counts.get(name, 0) + 1
            BY_NAME[name](chain, random.Random(own))
            chain.note_tails()
            if settings.inject and number >= len(sequence) // 2:
                if settings.inject != 'lost-write' and not chain.injected:
                    chain.close()
                    chain.damage()
        chain.close()
        chain.verify(chain.rng, True)
    except Mismatch as error:
        chain.abandon()
        error.log = chain.log
        raise
    except BaseException:
        chain.abandon()
        raise
    return chain
