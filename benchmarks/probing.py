"""Probes against forward passes, distillation against training, the patch Gram against unfolding.

Restoring by probes is compared with forward passes, distillation with training steps, and the
patch Gram by offsets with the one by unfolding.

ResNet-56 at 32 pixels and ResNet-50 at 224, 30 % of the channels removed, random weights: they
decide nothing about time. Every measurement runs in a process of its own, so that its peak
memory can be read; ratios are to what ran in the same call of the script.
"""

import time

import pandas as pd
import torch
import torch.nn.functional as F
import torchvision

from _process import against, each, footer, peak, run, time_and_memory
from lbyl_nb.distilled import distil
from lbyl_nb.layerwise import layerwise, probe
from lbyl_nb.models import resnet56
from lbyl_nb.moments import stationary_gram, unfolded_gram
from lbyl_nb.probes import noise
from lbyl_nb.recover import restore

# what builds a network, the pixels of its images, the number of probes
NETWORKS = dict(
    resnet56=(resnet56, 32, 128),
    resnet50=(torchvision.models.resnet50, 224, 32),
)
STEPS = 3


def forward(net, x, n):
    with torch.inference_mode():
        for part in torch.randn(256, *x.shape[1:]).split(64):
            net(part)


def training(net, x, n):
    net, batch = net.train(), torch.randn(n, *x.shape[1:])
    opt = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(STEPS):
        opt.zero_grad()
        F.cross_entropy(net(batch), torch.zeros(n, dtype=torch.long)).backward()
        opt.step()


def distillation(net, x, n):
    distil(net, (torch.randn(n, *x.shape[1:]),), STEPS)


def restoring(restorer):
    "Restoring by a restorer, which is made of a source of n probes."
    return lambda net, x, n: restore(net, x, ratio=0.3, restorer=restorer(noise(n)))


WHAT = dict(
    forward=forward,
    training=training,
    distillation=distillation,
    probe=restoring(probe),
    layerwise=restoring(lambda source: layerwise(source, refit=False)),
    every_layer=restoring(layerwise),
)


def one(network, what):
    "Time and memory of one measurement, as a dict."
    torch.manual_seed(0)
    build, size, n = NETWORKS[network]
    net, before = build().eval(), peak()
    work = lambda: WHAT[what](net, torch.randn(1, 3, size, size), n)
    row = time_and_memory(network, what, work, before)
    return row | dict(probes=n)


def gram(m, size, n=64):
    "The patch Gram of a 3x3 convolution in two ways: how much faster, and how far apart."
    x, took = torch.randn(n, m, size, size), []
    for f in (unfolded_gram, stationary_gram):
        f(x[:2], 3, 1)
        start = time.perf_counter()
        out = f(x, 3, 1)
        took.append((time.perf_counter() - start, out))
    (slow, a), (fast, b) = took
    apart = ((a - b).abs().max() / a.abs().max()).item()
    return dict(channels=m, pixels=size, faster=slow / fast, difference=apart)


def main():
    cases = [(n, w) for n in NETWORKS for w in WHAT]
    t = pd.DataFrame(each(__file__, cases)).set_index(['network', 'what'])
    t['time / forward pass of 256'] = against(t, 'forward')
    distilled = t.index.get_level_values('what') == 'distillation'
    t['time / training steps'] = against(t, 'training').where(distilled)
    shown = t.drop(columns='seconds').round(2)
    shown = shown.rename(columns=dict(gigabytes='peak memory beyond the model (GB)'))
    print(shown.to_string(na_rep=''))
    print('\npatch Gram of a 3x3 convolution: by offsets against unfolded (times faster),')
    print('and the largest difference relative to the largest entry')
    sizes = (16, 32), (64, 32), (64, 56), (128, 28), (256, 14)
    grams = pd.DataFrame([gram(m, s) for m, s in sizes])
    print(grams.to_string(index=False, float_format='{:.2g}'.format))
    print(footer())


if __name__ == '__main__':
    run(one, main)
