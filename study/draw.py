"""Bars that are stacked, in the style of bench/svg.py."""

from xml.sax.saxutils import escape

from svg import STYLE

WIDTH, LEFT, RIGHT, TOP, HEIGHT, GAP = 760, 206, 84, 92, 22, 6
COLOURS = (('#c2410c', '#ff8a57'), ('#1d5fbf', '#6ea8ff'), ('#8a6d1b', '#d9b84f'),
           ('#177245', '#5fc98f'), ('#6b4fa0', '#b79cf0'), ('#8b949e', '#6e7681'))


def short(value):
    """Three digits, thousands and millions with a letter."""
    for unit, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if value >= unit:
            return f'{float(f"{value / unit:.3g}"):g}{letter}'
    return f'{float(f"{value:.3g}"):g}'


def stacked(title, subtitle, parts, groups):
    """Returns an SVG. `groups` is a list of (heading, [(label, values)]), one
    value for each of `parts`; the bars of a group have a scale of their own."""
    light = ''.join(f'.part{n} {{ fill: {pair[0]} }} ' for n, pair in enumerate(COLOURS))
    dark = ''.join(f'.part{n} {{ fill: {pair[1]} }} ' for n, pair in enumerate(COLOURS))
    rows = sum(len(bars) for _, bars in groups)
    height = TOP + rows * (HEIGHT + GAP) + len(groups) * 26 + 10
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
           f'width="{WIDTH}" height="{height}" role="img">', f'<title>{escape(title)}</title>',
           f'<style>{STYLE}\n{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}</style>',
           f'<text class="title" x="16" y="27">{escape(title)}</text>',
           f'<text x="16" y="47">{escape(subtitle)}</text>']
    x = 16.0
    for number, part in enumerate(parts):
        out.append(f'<rect class="part{number}" x="{x:.0f}" y="62" width="12" height="12"/>'
                   f'<text x="{x + 17:.0f}" y="73">{escape(part)}</text>')
        x += 32 + 7.2 * len(part)
    y = TOP
    for heading, bars in groups:
        out.append(f'<text class="label" x="16" y="{y + 15}">{escape(heading)}</text>')
        y += 26
        most = max([sum(values) for _, values in bars if values] or [1]) or 1
        for label, values in bars:
            out.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(label)}</text>')
            x = LEFT
            for number, value in enumerate(values or []):
                wide = value / most * (WIDTH - LEFT - RIGHT)
                out.append(f'<rect class="part{number}" x="{x:.1f}" y="{y}" width="{wide:.1f}" '
                           f'height="{HEIGHT}"/>')
                x += wide
            said = short(sum(values)) if values else 'crashes'
            out.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{said}</text>')
            y += HEIGHT + GAP
    out.append('</svg>\n')
    return '\n'.join(out)
