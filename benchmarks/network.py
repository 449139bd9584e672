"""Restoring whole networks against one forward pass of 64 images, in time and peak memory.

ResNet-50 and VGG-16 (with batch norm) at 224 pixels, 30 % of the channels removed, random weights: they decide nothing about time.
Every network runs in a process of its own, so that its peak memory can be read."""
import json
import resource
import subprocess
import sys
import time

import pandas as pd
import torch
import torchvision

from lbyl_nb.bench import environment
from lbyl_nb.recover import lbyl, merging, prune_only, restore

RESTORERS = dict(pruned=prune_only, merging=merging, lbyl=lbyl)


def peak():
    "Most memory this process ever held, in GB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 / (1000 if sys.platform == 'darwin' else 1)


def one(network, restorer):
    "Times and peaks for one network, as a dict; restorer '' is the forward pass."
    torch.manual_seed(0)
    net = getattr(torchvision.models, network)().eval()
    before, x = peak(), torch.randn(1, 3, 224, 224)
    if not restorer: x = torch.randn(64, 3, 224, 224)
    with torch.inference_mode(not restorer):
        start = time.perf_counter()
        if restorer: restore(net, x, ratio=.3, restorer=RESTORERS[restorer]())
        else: net(x)
    return dict(network=network, what=restorer or 'forward', seconds=time.perf_counter() - start, gigabytes=peak() - before)


def main():
    rows = []
    for network in ('resnet50', 'vgg16_bn'):
        for restorer in ('', *RESTORERS):
            print(f'{network}: {restorer or "one forward pass of 64 images"}', file=sys.stderr)
            out = subprocess.run([sys.executable, __file__, network, restorer], check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
    t = pd.DataFrame(rows).set_index(['network', 'what'])
    forward = t.xs('forward', level='what')
    t['time / forward pass of 64'] = t.seconds / forward.seconds.reindex(t.index, level='network')
    print(t.rename(columns=dict(gigabytes='peak memory beyond the model (GB)')).drop(columns='seconds').round(2).to_string())
    print('\n' + ', '.join(f'{k} {v}' for k, v in environment().items()) + f', {torch.get_num_threads()} threads')


if __name__ == '__main__':
    if len(sys.argv) == 3: print(json.dumps(one(*sys.argv[1:])))
    else: main()
