"""One training step of a pruned network, as it is and over-parameterized.

Over-parameterized it is contracted before use, or run factor by factor.

ResNet-20 (50 % of the channels inside its blocks removed) and MobileNetV2 for images of 32
pixels (all channels in one ranking, until 30, 15 or 5 % of the parameters are left), rate 3.
Prints the share of the parameters that is left, ratios of times, median of interleaved repeats
in one process, and the peak memory of a process of its own. Weights are random: they decide
which channels stay, nothing about how many.
"""

import argparse
import subprocess
import sys
import time

import pandas as pd
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from _process import footer, peak
from lbyl_nb.budget import budget
from lbyl_nb.expand import expand
from lbyl_nb.models import resnet20
from lbyl_nb.recover import plan, restore
from lbyl_nb.restorers import prune_only

FORMS = {
    'compact': lambda net: net,
    'composed': lambda net: expand(net, composed=True),
    'cheaper form': expand,
    'consecutive': lambda net: expand(net, composed=False),
}


def mobilenet():
    "MobileNetV2 as it is used on CIFAR: the first strides are 1."
    net = torchvision.models.mobilenet_v2(num_classes=10)
    for m in nn.ModuleList([net.features[0], net.features[2]]).modules():
        if isinstance(m, nn.Conv2d):
            m.stride = 1, 1
    return net


def half(net, x):
    return plan(net, x, 0.5)


def share(params):
    "A choice of channels that leaves this share of the parameters."
    return lambda net, x: budget(net, x, params=params, streams=True)


NETWORKS = {
    'resnet20': (resnet20, half),
    **{f'mobilenet_v2 {s:.0%}': (mobilenet, share(s)) for s in (0.3, 0.15, 0.05)},
}


def pruned(network):
    "A compact network, and the share of the parameters that is left."
    make, choose = NETWORKS[network]
    dense, x = make().eval(), torch.randn(1, 3, 32, 32)
    compact = restore(dense, x, keep=choose(dense, x), restorer=prune_only()).model
    return compact, size(compact) / size(dense)


def size(net):
    return sum(p.numel() for p in net.parameters())


def step(net, batch, device):
    "A function that does one training step."
    net = net.to(device).train()
    x = torch.randn(batch, 3, 32, 32, device=device)
    y = torch.randint(10, (batch,), device=device)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def once():
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
        if device == 'cuda':
            torch.cuda.synchronize()

    return once


def seconds(f, device):
    "Time of a call; on the CPU, time of the process, which other work disturbs least."
    clock = time.process_time if device == 'cpu' else time.perf_counter
    start = clock()
    f()
    return clock() - start


def held(device):
    "Most memory this process ever held, in GB: of the GPU where it is used."
    return torch.cuda.max_memory_allocated() / 1e9 if device == 'cuda' else peak()


def memory(network, form, batch, device):
    "Peak memory of two steps in a process of their own, beyond what was held before, in GB."
    torch.manual_seed(0)
    net = FORMS[form](pruned(network)[0])
    before = 0 if device == 'cuda' else held(device)
    once = step(net, batch, device)
    once()
    once()
    return held(device) - before


def compare(network, batch, device, repeats, compiled):
    "Median time of a step in every form, as a multiple of the compact one; forms take turns."
    torch.manual_seed(0)
    net, left = pruned(network)
    steps = {k: f(net) for k, f in FORMS.items()}
    if compiled:
        steps = {k: torch.compile(n) for k, n in steps.items()}
    steps = {k: step(n, batch, device) for k, n in steps.items()}
    for once in steps.values():
        once()
    times = []
    for _ in tqdm(range(repeats), f'{network}, batch {batch}', leave=False):
        times.append({k: seconds(once, device) for k, once in steps.items()})
    t = pd.DataFrame(times).median()
    first = pd.Series({'parameters left': left, 'compact, seconds': t.compact})
    return pd.concat([first, t / t.compact])


def show(title, cases, rows):
    "A table with a column for each network and batch."
    index = pd.MultiIndex.from_tuples(cases, names=['network', 'batch'])
    table = pd.DataFrame(rows, index=index).T.round(2)
    print(f'{title}\n{table.to_string()}\n')


def memory_of_its_own(network, form, batch, device):
    "`memory` in a new process."
    case = network, form, str(batch)
    command = [sys.executable, __file__, '--one', *case, '--device', device]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(out.split()[-1])


def arguments():
    "What the script was called with."
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument('--networks', nargs='+', default=list(NETWORKS), choices=list(NETWORKS))
    p.add_argument('--batches', nargs='+', type=int, default=[128, 256])
    p.add_argument('--repeats', type=int, default=9)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--compile', action='store_true', help='also with torch.compile')
    p.add_argument('--one', nargs=3, help=argparse.SUPPRESS)
    return p.parse_args()


def main():
    a = arguments()
    if a.one:
        network, form, batch = a.one
        return print(memory(network, form, int(batch), a.device))
    cases = [(n, b) for n in a.networks for b in a.batches]
    memories = []
    # memory comes first: a process inherits the peak of the one that starts it
    for network, batch in tqdm(cases, 'peak memory', leave=False):
        row = {form: memory_of_its_own(network, form, batch, a.device) for form in FORMS}
        memories.append(row)
    show('peak memory beyond the model, GB', cases, memories)
    for compiled in (False, True) if a.compile else (False,):
        rows = [compare(*case, a.device, a.repeats, compiled) for case in cases]
        how = ', torch.compile' if compiled else ''
        show(f'time of a training step / compact{how}', cases, rows)
    print(footer(a.device))


if __name__ == '__main__':
    main()
