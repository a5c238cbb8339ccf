"""What is compared, on what machine, and where the images go."""

import os
import platform
import resource
import shutil

from chains import GIB
from sides import Side

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAMS = ('probe', 'qemu-img', 'qemu-io', 'qemu-storage-daemon')


def machine(sides):
    """What the figures were taken on."""
    with open('/proc/cpuinfo', encoding='utf-8') as file:
        model = next((line.split(':', 1)[1].strip() for line in file
                      if line.startswith('model name')), 'unknown')
    return {
        'cpu': model,
        'cpus': os.cpu_count(),
        'kernel': platform.release(),
        'qemu': {side.name: side.run('qemu-img', '--version').splitlines()[0] for side in sides},
    }


def files_and_cores():
    """A file for each layer; crashes are expected, their dumps are large."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def workspace(directory, name):
    """An empty directory, one that no other run uses."""
    if directory is None:
        free = shutil.disk_usage('/dev/shm').free if os.path.isdir('/dev/shm') else 0
        directory = '/dev/shm' if free > 8 * GIB else os.path.join(ROOT, 'build')
    directory = os.path.join(directory, f'{name}.{os.getpid()}')
    os.makedirs(directory)
    return directory


def sides(directory, same=False, programs=PROGRAMS):
    """With copies of the programs: somebody may build while this runs."""
    found = []
    for name, built, driver in (('unpatched', 'stock/bin', 'qcow2'),
                                ('unpatched + is_inserted', 'inserted/bin', 'qcow2'),
                                ('rqcow2', 'bin', 'rqcow2')):
        copies = os.path.join(directory, f'programs{len(found)}')
        os.makedirs(copies)
        for program in programs:
            path = os.path.join(ROOT, 'build', built, program)
            if not os.path.exists(path):
                raise FileNotFoundError(f'no {path}: run bench/build')
            shutil.copy(path, copies)
        found.append(Side(name, copies, driver))
    if same:
        found[2] = Side('unpatched again', found[0].programs, 'qcow2')
    return found
