"""Fills tables, figures and values into study/text/*.md.

{{table NAME}} is a function of tables.py, {{guest NAME}} one of guest_tables.py,
{{figure NAME}} one of figures.py, {{drawing NAME}} one of drawings.py.
What was not measured leaves a line that says so.
"""

import os
import re

import drawings
import figures
import guest_tables
import tables

HERE = os.path.dirname(os.path.abspath(__file__))
MISSING = '*(not measured yet: `study/run --only ...`)*'


class Writer:
    """Knows where the text and the figures go."""

    def __init__(self, results, text, directory):
        self.results, self.directory = results, directory
        self.shown = os.path.relpath(directory, os.path.dirname(os.path.abspath(text)))

    def figure(self, name):
        drawn = figures.FIGURES[name](self.results)
        if not drawn:
            return MISSING
        title, svg = drawn
        with open(os.path.join(self.directory, f'study-{name}.svg'), 'w',
                  encoding='utf-8') as file:
            file.write(svg)
        return f'![{title}]({self.shown}/study-{name}.svg)'

    def drawing(self, name):
        picture = drawings.DRAWINGS[name]()
        with open(os.path.join(self.directory, f'study-{name}.svg'), 'w',
                  encoding='utf-8') as file:
            file.write(picture.svg())
        return f'![{picture.title}]({self.shown}/study-{name}.svg)'

    def table(self, module, name):
        text = getattr(module, name)(self.results)
        # A head and a rule, and nothing below.
        return text if text != tables.NOTHING and text.count('\n') > 1 else MISSING

    def fill(self, match):
        kind, name = match.groups()
        if kind == 'figure':
            return self.figure(name)
        if kind == 'drawing':
            return self.drawing(name)
        return self.table({'table': tables, 'guest': guest_tables}[kind], name)


def write(results, path, directory):
    os.makedirs(directory, exist_ok=True)
    writer, parts = Writer(results, path, directory), []
    source = os.path.join(HERE, 'text')
    for name in sorted(os.listdir(source)):
        with open(os.path.join(source, name), encoding='utf-8') as file:
            parts.append(re.sub(r'\{\{(\w+) ([\w-]+)\}\}', writer.fill, file.read()).strip())
    with open(path, 'w', encoding='utf-8') as file:
        file.write('\n\n'.join(parts) + '\n')
