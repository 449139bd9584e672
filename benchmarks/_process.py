"""Measurements in processes of their own, so that the peak memory of each can be read."""

import json
import resource
import subprocess
import sys
import time

import torch

from lbyl_nb.bench import environment


def peak():
    "Most memory this process ever held, in GB."
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    units = 1e9 if sys.platform == 'darwin' else 1e6  # macOS counts bytes, Linux kilobytes
    return most / units


def time_and_memory(network, what, f, before, clock=time.perf_counter):
    "Time of a call, and memory beyond what was held `before`, as a dict."
    start = clock()
    f()
    seconds = clock() - start
    return dict(network=network, what=what, seconds=seconds, gigabytes=peak() - before)


def each(script, cases):
    "What a script prints when it is called with (network, what), for all cases, as dicts."
    rows = []
    for network, what in cases:
        print(f'{network}: {what}', file=sys.stderr)
        command = [sys.executable, script, network, what]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append(json.loads(out.splitlines()[-1]))
    return rows


def against(t, base):
    "Times as multiples of that of `base` for the same network; `t` is indexed by network and what."
    of_base = t.seconds.xs(base, level='what')
    return t.seconds / of_base.reindex(t.index, level='network')


def footer(device='cpu'):
    "Versions, device and threads, as a line to print below a table."
    versions = ', '.join(f'{k} {v}' for k, v in environment(device).items())
    return f'\n{versions}, {torch.get_num_threads()} threads'


def run(one, main):
    "Entry of a script: one measurement where a network and what are given, all otherwise."
    if len(sys.argv) == 3:
        print(json.dumps(one(*sys.argv[1:])))
    else:
        main()
