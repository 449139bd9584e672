"""Restoring and choosing against forward passes of 128 images, in CPU time and peak memory.

At 224 pixels: ResNet-50 and VGG-16 (with batch norm) without 30 % of the channels, MobileNetV1 of
width 0.75 with 80 % of its operations left. Random weights: they decide nothing about time. Every
measurement runs in a process of its own, so that its peak memory can be read. The images on which
`restore` tells afterwards how far the output moved are not counted. Rows go into
nbs/results/network.csv.
"""

import time
from pathlib import Path

import pandas as pd
import torch
import torchvision
from torch.nn import functional as F
from trials.photographs import MobileNet

from _process import against, each, footer, peak, run, time_and_memory
from lbyl_nb import budget, default_restorer, distilled, lbyl, merging, output_loss, prune_only
from lbyl_nb.bench import environment
from lbyl_nb.criteria import l2_norm
from lbyl_nb.files import writing
from lbyl_nb.photographs import stand_ins
from lbyl_nb.plans import by_ratio
from lbyl_nb.recover import verified

RESULTS = Path(__file__).resolve().parents[1] / 'nbs' / 'results' / 'network.csv'
N = 128
X = torch.zeros(1, 3, 224, 224)
RESTORERS = dict(pruned=prune_only, merging=merging, lbyl=lbyl, default=default_restorer)
CASES = dict(
    resnet50=('forward', *RESTORERS),
    vgg16_bn=('forward', 'pruned', 'merging', 'lbyl'),
    mobilenet=('forward', 'both ways', 'default', 'choice', 'distilled'),
)


def forward(net):
    "Forward passes of 128 images, 32 at a time."
    with torch.inference_mode():
        for x in torch.randn(N, 3, 224, 224).split(32):
            net(x)


def both_ways(net):
    "Forward and backward passes of 128 images, 16 at a time."
    for x in torch.randn(N, 3, 224, 224).split(16):
        net.zero_grad()
        F.cross_entropy(net(x), torch.zeros(16, dtype=torch.long)).backward()


def choice(net):
    "Channels of all layers by what the output loses."
    budget(net, X, macs=0.8, criterion=output_loss(stand_ins(N)))


def restoration(what):
    "A restoration at 30 % by name."
    return lambda net: verified(net, X, RESTORERS[what](), by_ratio(0.3, l2_norm))


WORK = {
    'forward': forward,
    'both ways': both_ways,
    'choice': choice,
    'distilled': lambda net: distilled(N // 2, reflect=True, photographs=True)(net, (X,)),
}


def one(network, what):
    "CPU time and memory of one measurement, as a dict."
    torch.manual_seed(0)
    net = MobileNet() if network == 'mobilenet' else getattr(torchvision.models, network)()
    net, work, before = net.eval(), WORK.get(what) or restoration(what), peak()
    return time_and_memory(network, what, lambda: work(net), before, time.process_time)


def main():
    t = pd.DataFrame(each(__file__, [(n, w) for n, ways in CASES.items() for w in ways]))
    with writing(RESULTS) as temporary:
        t.assign(**environment(), threads=torch.get_num_threads()).to_csv(temporary, index=False)
    t = t.set_index(['network', 'what'])
    t['CPU time / forward passes of 128'] = against(t, 'forward')
    trained = t.seconds.xs('both ways', level='what')
    t['CPU time / forward and backward'] = t.seconds / trained.reindex(t.index, level='network')
    shown = t.drop(columns='seconds').round(2)
    shown = shown.rename(columns=dict(gigabytes='peak memory beyond the model (GB)'))
    print(shown.to_string(na_rep=''))
    print(footer())


if __name__ == '__main__':
    run(one, main)
