"""Ratios of each layer of ResNet-20: uniform, chosen by the output's loss, or learned by AMC.

    LBYL_WEIGHTS=FOLDER python benchmarks/trials/amc.py

Half of the operations stay. All plans are restored by the same 128 training images and reported on
the 10,000 test images; AMC is rewarded on 1,000 other training images. For AMC, rows also have its
rewards: mean of the random quarter and of the last ten, the best of all, and of the random quarter.
Rows go into nbs/results/amc.csv; the same call goes on where it stopped. About half an hour on one
core.
"""

import time
from functools import cache, partial
from pathlib import Path

import torch
from photographs import same_ratio

from lbyl_nb import budget, calibration, layerwise, restore
from lbyl_nb.bench import accuracy, sweep
from lbyl_nb.criteria import l1_norm
from lbyl_nb.data import STATS, load, normalise, subset
from lbyl_nb.models import pretrained
from lbyl_nb.sensitivity import output_loss
from lbyl_nb.strategies import amc

RESULTS = Path(__file__).resolve().parents[2] / 'nbs' / 'results' / 'amc.csv'
X = torch.zeros(1, 3, 32, 32)
NORMALISED = STATS['imagenet']
EPISODES = 80


@cache
def network():
    "ResNet-20 as published, and the images it was trained on."
    return pretrained('resnet20_cifar10'), load('cifar10', 'train')


def shown(seed):
    "The 128 images that AMC restores with, too."
    return normalise(subset(network()[1], 1128, seed)[:128].images, *NORMALISED)


def uniform(s):
    "L1 norm, the same ratio everywhere."
    return same_ratio(network()[0], X, s['macs_wanted'], l1_norm)


def by_loss(s):
    "All channels in one ranking of what the output loses for what they cost."
    criterion = output_loss(calibration(shown(s['seed'])))
    return budget(network()[0], X, macs=s['macs_wanted'], criterion=criterion)


def searched(s):
    "The best plan that AMC meets."
    net, train_set = network()
    mean, std = NORMALISED
    search = partial(amc, net, X, train_set, s['macs_wanted'], mean=mean, std=std)
    return search(episodes=s['episodes'], seed=s['seed'])


def measure(s):
    "One plan, restored: right test images, and the seconds that the choice took."
    net, _ = network()
    start = time.process_time()
    told = {}
    if s['choice'] == 'AMC':
        found = searched(s)
        keep, right = found.plan, found.candidates.accuracy
        warm = s['episodes'] // 4
        told = dict(
            first=right[:warm].mean(),
            last=right[-10:].mean(),
            best=right.max(),
            best_at=int(right.argmax()),
            best_random=right[:warm].max(),
        )
    else:
        keep = dict(uniform=uniform, loss=by_loss)[s['choice']](s)
    seconds = time.process_time() - start
    small = restore(net, X, keep=keep, restorer=layerwise(calibration(shown(s['seed']))))
    right, n = accuracy(small.model, load('cifar10', 'test'), *NORMALISED)
    macs = small.cost.macs.after / small.cost.macs.before
    blank = dict.fromkeys(('first', 'last', 'best', 'best_at', 'best_random'))
    kept = ' '.join(str(len(v)) for v in keep.values())
    return dict(n=n, right=right, macs=macs, seconds=seconds, kept=kept) | blank | told


def settings():
    "Trials, the quick ones first."
    for choice in ('uniform', 'loss', 'AMC'):
        for seed in range(3):
            episodes = EPISODES if choice == 'AMC' else 0
            yield dict(choice=choice, macs_wanted=0.5, episodes=episodes, seed=seed)


if __name__ == '__main__':
    trials = sorted(settings(), key=lambda s: s['seed'])
    print(sweep(RESULTS, trials, measure).to_string())
