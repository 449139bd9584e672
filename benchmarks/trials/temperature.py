"""What it is worth to soften answers before the output says which channels go.

    LBYL_WEIGHTS=FOLDER python benchmarks/trials/temperature.py

Half of the operations of ResNet-20 and ResNet-56 stay. Channels are chosen by the output's loss on
probes of three kinds, at several temperatures of the answers, or uniformly by the L2 norm; 128
training images restore all plans. Rows tell how many of 2,000 other training images are right, and
go into nbs/results/temperature.csv; the same call goes on where it stopped. Twenty minutes on one
core.
"""

from functools import cache
from pathlib import Path

import torch
from photographs import same_ratio

from lbyl_nb import budget, calibration, distilled, layerwise, restore
from lbyl_nb.bench import accuracy, sweep
from lbyl_nb.criteria import l2_norm
from lbyl_nb.data import STATS, load, normalise, subset
from lbyl_nb.models import pretrained
from lbyl_nb.photographs import stand_ins
from lbyl_nb.sensitivity import output_loss

RESULTS = Path(__file__).resolve().parents[2] / 'nbs' / 'results' / 'temperature.csv'
X = torch.zeros(1, 3, 32, 32)
NORMALISED = STATS['imagenet']
SHARE = 0.5
TEMPERATURES = 1.0, 2.0, 4.0, 8.0


@cache
def images(seed):
    "128 training images that choose and restore, and 2,000 others that judge."
    some = subset(load('cifar10', 'train'), 2128, seed)
    return normalise(some[:128].images, *NORMALISED), some[128:]


network = cache(pretrained)


@cache
def source(name, probes, seed):
    "Probes by name."
    if probes == 'images':
        return calibration(images(seed)[0])
    if probes == 'stand-ins':
        return stand_ins(128, seed)
    made = distilled(64, seed=seed, reflect=True)(network(name), (X,)).args[0]
    return calibration(made)


def measure(s):
    "One plan, restored: right images."
    net, (shown, judge) = network(s['network']), images(s['seed'])
    if s['probes'] == 'none':
        keep = same_ratio(net, X, SHARE, l2_norm)
    else:
        probes = source(s['network'], s['probes'], s['seed'])
        keep = budget(net, X, macs=SHARE, criterion=output_loss(probes, temperature=s['T']))
    small = restore(net, X, keep=keep, restorer=layerwise(calibration(shown)))
    right, n = accuracy(small.model, judge, *NORMALISED)
    macs = small.cost.macs.after / small.cost.macs.before
    return dict(n=n, right=right, macs=macs)


def settings():
    "Trials, network by network."
    for name in ('resnet20_cifar10', 'resnet56_cifar10'):
        for seed in range(2):
            yield dict(network=name, probes='none', T=0.0, seed=seed)
            for probes in ('images', 'stand-ins', 'distilled'):
                for T in TEMPERATURES:
                    yield dict(network=name, probes=probes, T=T, seed=seed)


if __name__ == '__main__':
    trials = sorted(settings(), key=lambda s: (s['seed'], s['network']))
    print(sweep(RESULTS, trials, measure).to_string())
