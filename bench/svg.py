"""Draws curves over depth: both axes logarithmic, lines labelled where they end."""

import math
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 78, 190, 64, 52

STYLE = '''
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #3b4148 }
.title { font-size: 16px; font-weight: 600; fill: #16191d }
.grid { stroke: #d9dde2; stroke-width: 1 }
.line { fill: none; stroke-width: 2; stroke-linejoin: round }
.line0 { stroke: #c2410c } .fill0 { fill: #c2410c }
.line1 { stroke: #8a6d1b; stroke-dasharray: 6 4 } .fill1 { fill: #8a6d1b }
.line2 { stroke: #1d5fbf; stroke-width: 3 } .fill2 { fill: #1d5fbf }
.label { font-weight: 600 }
.guess { stroke-dasharray: 2 4 }
.cross { fill: none; stroke-width: 3; stroke-dasharray: none }
@media (prefers-color-scheme: dark) {
  text { fill: #b7bec7 } .title { fill: #eef1f4 }
  .grid { stroke: #3a4048 }
  .line0 { stroke: #ff8a57 } .fill0 { fill: #ff8a57 }
  .line1 { stroke: #d9b84f } .fill1 { fill: #d9b84f }
  .line2 { stroke: #6ea8ff } .fill2 { fill: #6ea8ff }
}'''


def duration(microseconds):
    for unit, name in ((1, 'µs'), (1e3, 'ms'), (1e6, 's')):
        if microseconds < unit * 1000 or name == 's':
            return f'{microseconds / unit:g} {name}'
    raise AssertionError


def memory(mib):
    return f'{mib:g} MiB'


class Axis:
    """From values to places, by powers of ten."""

    def __init__(self, low, high, begin, end):
        self.low, self.high = math.log10(low), math.log10(high)
        self.begin, self.end = begin, end

    def __call__(self, value):
        part = (math.log10(value) - self.low) / (self.high - self.low)
        return self.begin + part * (self.end - self.begin)

    def marks(self):
        """The powers of ten that it has."""
        return [10 ** power for power in range(math.ceil(self.low - 1e-9),
                                               math.floor(self.high + 1e-9) + 1)]


def spread_labels(places, heights):
    """Moves labels apart that would cover each other; their order stays."""
    order = sorted(range(len(places)), key=lambda number: places[number])
    moved = list(places)
    for before, after in zip(order, order[1:]):
        moved[after] = max(moved[after], moved[before] + heights[before])
    excess = max(0, moved[order[-1]] - (HEIGHT - BOTTOM)) if order else 0
    return [place - excess for place in moved]


def chart(title, axis_title, lines, text, below='layers in the chain'):
    """Returns an SVG. `lines` is a list of (name, [(depth, value)], crash): the
    depth at which the program crashed or None; `text` shows a value, `below` is
    the title of the other axis."""
    points = [point for _, line, _ in lines for point in line]
    depths = [depth for depth, _ in points] + [crash for _, _, crash in lines if crash]
    values = [value for _, value in points]
    if max(depths) <= min(depths):
        raise ValueError('a curve needs more than one depth')
    across = Axis(min(depths), max(depths), LEFT, WIDTH - RIGHT)
    low = 10 ** math.floor(math.log10(min(values)))
    high = 10 ** math.ceil(math.log10(max(values)) + 1e-9)
    up = Axis(low, max(high, low * 10), HEIGHT - BOTTOM, TOP)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           f'width="{WIDTH}" height="{HEIGHT}" role="img">',
           f'<title>{escape(title)}</title>', f'<style>{STYLE}\n</style>',
           f'<text class="title" x="16" y="27">{escape(title)}</text>',
           f'<text x="16" y="47">{escape(axis_title)}</text>']

    def grid(x1, y1, x2, y2):
        out.append(f'<path class="grid" d="M{x1:.1f},{y1:.1f}L{x2:.1f},{y2:.1f}"/>')

    for value in up.marks():
        grid(LEFT, up(value), WIDTH - RIGHT, up(value))
    for value in across.marks():
        grid(across(value), TOP, across(value), HEIGHT - BOTTOM)
    for value in up.marks():
        out.append(f'<text x="{LEFT - 8}" y="{up(value) + 4:.1f}" text-anchor="end">'
                   f'{text(value)}</text>')
    for value in sorted(set(across.marks()) | {max(depths)}):
        out.append(f'<text x="{across(value):.1f}" y="{HEIGHT - BOTTOM + 19}" '
                   f'text-anchor="middle">{value:g}</text>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 12}" '
               f'text-anchor="middle">{escape(below)}</text>')

    ends = []
    for number, (name, line, crash) in enumerate(lines):
        if not line:
            continue
        places = [(across(depth), up(value)) for depth, value in line]
        path = ' '.join(f'{x:.1f},{y:.1f}' for x, y in places)
        out.append(f'<polyline class="line line{number}" points="{path}"/>')
        x, y = places[-1]
        if crash:
            # Going on to where it ended at the slope it had.
            if len(places) > 1 and across(crash) > x:
                (x0, y0), (x1, y1) = places[-2:]
                x, y = across(crash), y1 + (y1 - y0) / (x1 - x0) * (across(crash) - x1)
                y = max(y, TOP)
                out.append(f'<path class="line line{number} guess" '
                           f'd="M{x1:.1f},{y1:.1f}L{x:.1f},{y:.1f}"/>')
            out.append(f'<path class="cross line{number}" d="M{x - 6:.1f},{y - 6:.1f}l12,12m0,-12'
                       'l-12,12"/>')
        for px, py in places:
            out.append(f'<circle class="fill{number}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>')
        ends.append((number, name, crash, x, y))
    moved = spread_labels([end[4] for end in ends], [34 if end[2] else 18 for end in ends])
    for (number, name, crash, x, _), y in zip(ends, moved):
        more = f'<tspan x="{x + 12:.1f}" dy="15">crashes at {crash}</tspan>' if crash else ''
        out.append(f'<text class="label fill{number}" x="{x + 12:.1f}" y="{y + 4:.1f}">'
                   f'{escape(name)}{more}</text>')
    out.append('</svg>\n')
    return '\n'.join(out)
