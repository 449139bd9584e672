"""Restoring whole networks against one forward pass of 64 images, in time and peak memory.

ResNet-50 and VGG-16 (with batch norm) at 224 pixels, 30 % of the channels removed, random
weights: they decide nothing about time. Every network runs in a process of its own, so that its
peak memory can be read.
"""

import pandas as pd
import torch
import torchvision

from _process import against, each, footer, peak, run, time_and_memory
from lbyl_nb.recover import restore
from lbyl_nb.restorers import lbyl, merging, prune_only

RESTORERS = dict(pruned=prune_only, merging=merging, lbyl=lbyl)


def one(network, what):
    "Time and memory of one measurement, as a dict."
    torch.manual_seed(0)
    net, before = getattr(torchvision.models, network)().eval(), peak()
    x = torch.randn(64 if what == 'forward' else 1, 3, 224, 224)

    def work():
        if what == 'forward':
            net(x)
        else:
            restore(net, x, ratio=0.3, restorer=RESTORERS[what]())

    with torch.inference_mode(what == 'forward'):
        return time_and_memory(network, what, work, before)


def main():
    cases = [(n, w) for n in ('resnet50', 'vgg16_bn') for w in ('forward', *RESTORERS)]
    t = pd.DataFrame(each(__file__, cases)).set_index(['network', 'what'])
    t['time / forward pass of 64'] = against(t, 'forward')
    shown = t.drop(columns='seconds').round(2)
    shown = shown.rename(columns=dict(gigabytes='peak memory beyond the model (GB)'))
    print(shown.to_string())
    print(footer())


if __name__ == '__main__':
    run(one, main)
