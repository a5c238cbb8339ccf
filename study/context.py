"""What every measurement of the study has: programs, chains, how long, records."""

import json
import os
import statistics
import sys
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, '..', 'bench'))
# pylint: disable=wrong-import-position
from chain_cases import Bench
from chains import GIB, Chains
from compared import machine
from sides import Crash, Slow

NAMES = ('unpatched', 'unpatched + is_inserted', 'rqcow2')
# What runs out of time or of stack has no value but an end.
ENDS = (Crash, Slow)


class Study(Bench):
    """What the cases of bench/ get, and where results go."""

    def __init__(self, sides, directory, quick, say):
        chains = Chains(directory, quick, say)
        super().__init__(sides, chains, 5 if quick else 9, quick, None, say)
        self.sides = (self.stock, self.inserted, self.ours)
        self.directory = directory
        self.patience = 40 if quick else 200
        # The first depth at which a side crashes, as far as it is known.
        self.gone = {}

    def works(self, depth):
        """The sides that may get this far: who crashed before is not tried again."""
        return [side for side in self.sides if depth < self.gone.get(side.name, depth + 1)]

    def tidy(self, most=2 * GIB):
        """Gives the space of the chains back if it is much: the next case may
        have use for them."""
        if sum(entry.stat().st_size for chain in self.chains.made.values()
               for entry in os.scandir(chain.directory)) > most:
            self.chains.drop()

    def path(self, name):
        return os.path.join(self.directory, name)


class Records:
    """What a case measured: a value for each side, depth, kind and setting."""

    def __init__(self, say):
        self.all, self.say = [], say

    def add(self, side, what, unit, samples, **setting):
        samples = samples if isinstance(samples, list) else [samples]
        value = statistics.median(samples)
        self.all.append({'side': getattr(side, 'name', side), 'what': what, 'unit': unit,
                         'value': value, 'samples': samples, **setting})
        shown = ', '.join(f'{name} {setting[name]}' for name in setting)
        self.say(f'  {what}, {shown}: {getattr(side, "name", side)}: {value:.4g} {unit}')

    def end(self, side, what, reason, **setting):
        """There is no value, for a reason."""
        self.all.append({'side': getattr(side, 'name', side), 'what': what, 'value': None,
                         'end': str(reason), **setting})
        self.say(f'  {what}, {setting}: {getattr(side, "name", side)}: {reason}')


def save(directory, name, study, records, seconds):
    """One file for each case, so that cases can be run again one by one."""
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, f'{name}.json'), 'w', encoding='utf-8') as file:
        json.dump({'machine': machine(study.sides), 'quick': study.quick, 'aio': study.aio,
                   'date': time.strftime('%Y-%m-%d'), 'seconds': round(seconds),
                   'records': records}, file, indent=None, separators=(',', ':'))
        file.write('\n')


class Results:
    """What was saved, for the text."""

    def __init__(self, directory):
        self.cases = {}
        for name in sorted(os.listdir(directory)):
            if name.endswith('.json'):
                with open(os.path.join(directory, name), encoding='utf-8') as file:
                    self.cases[name.removesuffix('.json')] = json.load(file)

    def records(self, case, **wanted):
        found = self.cases.get(case, {'records': []})['records']
        return [record for record in found
                if all(record.get(key) == value for key, value in wanted.items())]

    def value(self, case, **wanted):
        """The value, None if it was not measured or there is none."""
        found = self.records(case, **wanted)
        return found[0]['value'] if found else None

    def settings(self, case, key, **wanted):
        """The values that a setting was given, in order."""
        return sorted({record[key] for record in self.records(case, **wanted) if key in record})
