"""The drawings of the text: how the format is built, and the way of a read, a
write and a stream, function by function."""

from xml.sax.saxutils import escape

from svg import STYLE

MORE = '''
.box { fill: #f4f6f8; stroke: #8b949e; stroke-width: 1.3 }
.hot { fill: #fde8dc; stroke: #c2410c }
.ours { fill: #e3edfb; stroke: #1d5fbf }
.disk { fill: #e4f3ea; stroke: #177245 }
.arrow { fill: none; stroke: #57606a; stroke-width: 1.5 }
.dashed { stroke-dasharray: 5 4 }
.tip { fill: #57606a }
.code { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
.small { font-size: 12px }
@media (prefers-color-scheme: dark) {
  .box { fill: #22272e; stroke: #768390 } .hot { fill: #3d2419; stroke: #ff8a57 }
  .ours { fill: #1b2c45; stroke: #6ea8ff } .disk { fill: #183226; stroke: #5fc98f }
  .arrow { stroke: #adbac7 } .tip { fill: #adbac7 }
}'''


class Picture:
    """An SVG that is built from boxes, arrows and words."""

    def __init__(self, width, height, title):
        self.title = title
        self.out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
                    f'width="{width}" height="{height}" role="img">',
                    f'<title>{escape(title)}</title>', f'<style>{STYLE}{MORE}\n</style>',
                    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
                    'markerHeight="7" orient="auto"><path class="tip" d="M0,0L8,4L0,8z"/>'
                    '</marker></defs>']
        self.words(16, 27, title, 'title')

    def words(self, x, y, text, kind='', anchor='start'):
        self.out.append(f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">'
                        f'{escape(text)}</text>')

    def box(self, x, y, wide, high, lines=(), kind='', code=False):
        """A box with lines of text in its middle."""
        self.out.append(f'<rect class="box {kind}" x="{x}" y="{y}" width="{wide}" '
                        f'height="{high}" rx="4"/>')
        top = y + high / 2 - (len(lines) - 1) * 8 + 4.5
        for number, line in enumerate(lines):
            self.words(x + wide / 2, top + number * 16, line, 'code' if code else 'small',
                       'middle')

    def arrow(self, *points, dashed=False):
        path = 'L'.join(f'{x},{y}' for x, y in points)
        self.out.append(f'<path class="arrow{" dashed" if dashed else ""}" d="M{path}" '
                        'marker-end="url(#tip)"/>')

    def svg(self):
        return '\n'.join([*self.out, '</svg>\n'])


def image_format():
    """One file, and what a snapshot does."""
    p = Picture(760, 430, 'A qcow2 file, and a snapshot')
    p.words(16, 56, 'A guest offset, clusters of 64 KiB:')
    for x, wide, text in ((16, 150, 'which L2 table'), (166, 150, 'which entry'),
                          (316, 150, 'where in the cluster')):
        p.box(x, 64, wide, 26, [text])
    p.words(91, 106, 'bits 29 and up', 'small', 'middle')
    p.words(241, 106, '13 bits', 'small', 'middle')
    p.words(391, 106, '16 bits', 'small', 'middle')

    p.words(16, 144, 'l1.qcow2, the overlay: what was written since', 'label')
    p.box(16, 152, 110, 96, ['header', 'backing file:', 'l0.qcow2'])
    p.box(150, 152, 80, 96, ['L1 table', '1 entry for', '512 MiB'])
    p.box(254, 152, 118, 96, ['L2 table', '8192 entries', 'of 8 bytes'])
    p.box(396, 152, 70, 44, ['cluster', 'A, new'], 'disk')
    p.box(474, 152, 70, 44, ['cluster', 'C'], 'disk')
    p.box(396, 208, 148, 40, ['refcount table, blocks'])
    p.arrow((230, 184), (252, 184))
    p.arrow((372, 174), (394, 174))
    p.words(560, 172, 'entry: offset in this file', 'small')
    p.words(560, 190, '0: not here, ask the backing file', 'small')
    p.words(560, 208, 'bit 0: reads as zeroes', 'small')

    p.words(96, 292, 'l0.qcow2, the base: read-only from the snapshot on', 'label')
    p.box(16, 300, 110, 96, ['header', 'no backing file'])
    p.box(150, 300, 80, 96, ['L1 table'])
    p.box(254, 300, 118, 96, ['L2 table'])
    p.box(396, 300, 70, 44, ['cluster', 'A, old'], 'disk')
    p.box(474, 300, 70, 44, ['cluster', 'B'], 'disk')
    p.box(396, 356, 148, 40, ['refcount table, blocks'])
    p.arrow((230, 332), (252, 332))
    p.arrow((372, 322), (394, 322))
    p.arrow((71, 248), (71, 298))
    p.words(96, 270, 'backing', 'small')
    p.words(560, 318, 'A is hidden by the overlay,', 'small')
    p.words(560, 336, 'B is seen through it.', 'small')
    p.words(560, 360, 'A snapshot creates a new,', 'small')
    p.words(560, 378, 'empty overlay; no table and', 'small')
    p.words(560, 396, 'no data are copied.', 'small')
    return p


def read():
    """The same read by both drivers."""
    p = Picture(760, 560, 'The way of a read at depth d')
    p.words(16, 54, "QEMU's driver: a request for each layer", 'label')
    y = 64
    for number, name in enumerate(('layer d, the top', 'layer d-1')):
        p.box(16, y, 330, 150, kind='')
        p.words(26, y + 17, name, 'small')
        p.box(26, y + 24, 310, 24, ['bdrv_co_preadv_part()'], '', True)
        p.box(56, y + 54, 280, 24, ['bdrv_co_is_inserted(): all layers below'], 'hot')
        p.box(56, y + 84, 280, 24, ['qcow2_get_host_offset(): not here'], 'hot', True)
        p.box(26, y + 114, 310, 24, ['qcow2_co_preadv_task()'], '', True)
        p.arrow((181, y + 138), (181, y + (168 if number == 0 else 162)))
        y += 166
    p.words(181, y + 10, '... d-3 times more ...', 'small', 'middle')
    p.arrow((181, y + 16), (181, y + 30))
    p.box(16, y + 32, 330, 92)
    p.words(26, y + 49, 'the layer that has the data', 'small')
    p.box(26, y + 56, 310, 24, ['qcow2_get_host_offset(): an offset'], '', True)
    p.box(26, y + 88, 310, 24, ['bdrv_co_preadv_part() on its file'], 'disk', True)
    p.words(16, y + 142, 'each layer has its frames on one stack of 1 MiB', 'small')

    p.words(400, 54, 'rqcow2: one lookup', 'label')
    p.box(400, 64, 344, 250)
    p.words(410, 81, 'the top', 'small')
    p.box(410, 88, 324, 24, ['bdrv_co_preadv_part()'], '', True)
    p.box(440, 118, 294, 24, ['is_inserted of the driver: its own file'], 'ours')
    p.box(410, 150, 324, 24, ['Image::read() -> chain::walk::find()'], 'ours', True)
    p.box(440, 182, 294, 24, ["the top's own L2 entry"], 'ours')
    p.box(440, 212, 294, 40, ['Index::look_up(): array of slices,', 'array of entries: layer and offset'],
          'ours')
    p.box(440, 260, 294, 42, ['only on the first touch: View::fill()', 'merges the layers\' L2 tables'],
          'ours')
    p.arrow((572, 314), (572, 426))
    p.words(562, 350, 'no layer in between is asked:', 'small', 'end')
    p.words(562, 368, 'no request, no stack, no lock', 'small', 'end')
    p.box(400, 428, 344, 92)
    p.words(410, 445, 'the layer that has the data', 'small')
    p.box(410, 484, 324, 24, ['bdrv_co_preadv_part() on its file'], 'disk', True)
    p.box(410, 452, 324, 24, ['counted in and out, so that it stays'], 'ours')
    return p


def write():
    """Copy-on-write in an overlay."""
    p = Picture(760, 450, 'The way of a write of 4 KiB to a cluster that the top does not have')
    p.box(16, 48, 330, 28, ['bdrv_co_pwritev_part() on the top'], '', True)
    p.arrow((181, 76), (181, 94))
    p.words(16, 112, "QEMU's driver", 'label')
    steps = ((['qcow2_alloc_host_offset()', 'handle_alloc(): a new cluster'], ''),
             (['perform_cow(): what is before and', 'behind the 4 KiB is read through'], 'hot'),
             (['do_perform_cow_read() -> preadv of the', 'driver -> all layers, as a read'], 'hot'),
             (['one write of the whole cluster'], 'disk'),
             (['qcow2_alloc_cluster_link_l2(): the entry'], ''))
    y = 120
    for number, (lines, kind) in enumerate(steps):
        high = 24 + 16 * (len(lines) - 1) + 6
        p.box(16, y, 330, high, lines, kind)
        if number < len(steps) - 1:
            p.arrow((181, y + high), (181, y + high + 16))
        y += high + 18
    p.words(400, 112, 'rqcow2', 'label')
    p.arrow((346, 62), (572, 62), (572, 94))
    steps = ((['Image::write(): in_place()? no: write_mapped(),', 'plan(), find_space()'], 'ours'),
             (['cow.rs, write_new(): what is before and behind'], 'ours'),
             (['find() in index: read straight from the', 'file of the layer that has it'], 'ours'),
             (['one write of the whole cluster'], 'disk'),
             (['link(): the entry; written back later,', 'after refcounts (writeback.rs)'], 'ours'))
    y = 120
    for number, (lines, kind) in enumerate(steps):
        high = 24 + 16 * (len(lines) - 1) + 6
        p.box(400, y, 344, high, lines, kind)
        if number < len(steps) - 1:
            p.arrow((572, y + high), (572, y + high + 16))
        y += high + 18
    p.words(16, 420, 'A write in place needs none of this in either driver: one lookup in the top, '
            'one write to its file.', 'small')
    return p


def stream():
    """stream_run() with and without the callback."""
    p = Picture(760, 420, 'The way of block-stream, for each 512 KiB of the disk')
    p.box(16, 48, 728, 28, ['stream_run(): what is not allocated in the top, and where is it?'], '')
    p.arrow((181, 76), (181, 94))
    p.arrow((572, 76), (572, 94))
    p.words(16, 112, "QEMU's driver", 'label')
    p.words(400, 112, 'rqcow2', 'label')
    left = ((['bdrv_co_is_allocated_above()', 'bdrv_co_common_block_status_above()'], ''),
            (['qcow2_co_block_status() of layer d-1, d-2, ...', 'a call for each layer above the data'],
             'hot'),
            (['the answer ends where the layer changes:', 'often after one cluster'], 'hot'),
            (['stream_populate(): a read through the chain', 'with copy-on-read, one at a time'], 'hot'))
    right = ((['bdrv_co_is_allocated_above()', 'bdrv_co_common_block_status_above()'], ''),
             (['bdrv_co_skip_layers(): which node has it', 'that node alone is asked'], 'ours'),
             (['answers of several layers are put together', 'to one copy of up to 512 KiB'], 'ours'),
             (['up to eight copies at a time, each piece', 'read straight from its layer'], 'ours'))
    for x, steps in ((16, left), (400, right)):
        y = 120
        for number, (lines, kind) in enumerate(steps):
            p.box(x, y, 344, 46, lines, kind)
            if number < len(steps) - 1:
                p.arrow((x + 172, y + 46), (x + 172, y + 64))
            y += 66
    p.words(16, 404, 'Then stream_prepare() takes the backing file out of the header of the top.',
            'small')
    return p


DRAWINGS = {'format': image_format, 'way-of-a-read': read, 'way-of-a-write': write,
            'way-of-a-stream': stream}
