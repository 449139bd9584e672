"""Every way to make a pruned network good again, on the same checkpoints: accuracy, needs, seconds.

    python benchmarks/trials/head_to_head.py [NETWORK ...]

Networks are found through $LBYL_WEIGHTS, their images through $LBYL_DATA. Rows go into
nbs/results/head_to_head.csv, learning rates that were tried on held-out training images into
nbs/results/head_to_head_rates.csv; the same call goes on where it stopped. Hours on one core.
"""

import copy
import sys
import time
from functools import cache
from pathlib import Path

import torch
from folding import fold

from lbyl_nb import (
    calibration,
    default_restorer,
    distilled,
    gaussian,
    layerwise,
    lbyl,
    merging,
    noise,
    photographs,
    plan,
    probe,
    prune_only,
    restore,
    with_mean,
)
from lbyl_nb.bench import accuracy, results, sweep, train
from lbyl_nb.data import STATS, crop_flip, load, normalise, subset
from lbyl_nb.models import pretrained
from lbyl_nb.strategies import adaptive_bn

RESULTS = Path(__file__).resolve().parents[2] / 'nbs' / 'results'
RATIOS = 0.5, 0.3, 0.7, 0.1  # the most telling first
RATES = 0.01, 0.03, 0.1  # highest learning rates that are tried
X = torch.zeros(1, 3, 32, 32)
# name of the weights: statistics of the images; merging and LBYL as chosen on training images, in
# 41_cifar_resnets and 41a_vgg16
NETWORKS = dict(
    resnet20_cifar10=('imagenet', merging(1.0), lbyl(0.0, 3.0)),
    resnet56_cifar10=('imagenet', merging(), lbyl(1.0, 0.3)),
    vgg16_bn_cifar10=('cifar10', merging(), lbyl(1.0, 0.01)),
)


@cache
def network(name):
    "A trained network and the statistics of its images."
    return pretrained(name), STATS[NETWORKS[name][0]]


@cache
def images(name, split):
    "A split of the images of a network."
    return load(name.rpartition('_')[2], split)


@cache
def unlabelled(name, seed):
    "128 training images as a network takes them."
    return normalise(subset(images(name, 'train'), 128, seed).images, *network(name)[1])


@cache
def same_ratio(name, ratio):
    "A plan by the L2 norm, and the share of the operations that it leaves."
    net, _ = network(name)
    made = plan(net, X, ratio)
    cost = restore(net, X, keep=made, restorer=prune_only()).cost.macs
    return made, cost.after / cost.before


def restored(restorer):
    "A method that restores with what `restorer` makes of the network's name and the seed."

    def method(name, ratio, seed):
        kept, _ = same_ratio(name, ratio)
        return restore(network(name)[0], X, keep=kept, restorer=restorer(name, seed))

    return method


def folded(name, ratio, seed, repair=True):
    "Folding with the variance corrected from the weights."
    sizes = {k: len(v) for k, v in same_ratio(name, ratio)[0].items()}
    return fold(network(name)[0], X, sizes, repair, seed)


def budgeted(name, ratio, seed):
    "The package's choice and its default restorer, with as many operations left."
    return restore(network(name)[0], X, macs=same_ratio(name, ratio)[1])


def seen(method):
    "A method, then batch norms with the statistics of 128 images."

    def then(name, ratio, seed):
        done = method(name, ratio, seed)
        return done, adaptive_bn(done.model, unlabelled(name, seed))

    return then


def one_epoch(model, dataset, stats, lr, seed=0):
    "A copy after one epoch of SGD with labels."
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    how = dict(mean=stats.mean, std=stats.std, augment=crop_flip, seed=seed)
    return train(model, dataset, 1, lr, **how)


def tuned(name, ratio, seed):
    "Pruned, then an epoch with labels."
    done = pruned(name, ratio, seed)
    lr = best_rate(name)
    return done, one_epoch(done.model, images(name, 'train'), network(name)[1], lr, seed)


@cache
def best_rate(name):
    "The learning rate that does best on 5,000 training images that it has not seen."
    net, stats = network(name)
    every = images(name, 'train')
    every = subset(every, len(every))  # in random order
    model = restore(net, X, keep=same_ratio(name, 0.5)[0], restorer=prune_only()).model

    def measure(s):
        right, n = accuracy(one_epoch(model, every[5000:], stats, s['lr']), every[:5000], *stats)
        return dict(right=right, n=n)

    tries = [dict(network=name, ratio=0.5, lr=lr, seed=0) for lr in RATES]
    rows = sweep(RESULTS / 'head_to_head_rates.csv', tries, measure)
    return rows.lr[rows.right.idxmax()]


pruned = restored(lambda name, seed: prune_only())
# name: what it needs, does a seed play a part, how it is done
METHODS = {
    'pruned': ('nothing', False, pruned),
    'merging': ('nothing', False, restored(lambda name, seed: NETWORKS[name][1])),
    'LBYL': ('nothing', False, restored(lambda name, seed: NETWORKS[name][2])),
    'LBYL, mean': ('nothing', False, restored(lambda name, seed: with_mean(lbyl()))),
    'folding': ('nothing', True, folded),
    'Gaussian': ('nothing', False, restored(lambda name, seed: gaussian())),
    'noise': ('nothing', True, restored(lambda name, seed: layerwise(noise(128, seed)))),
    'default': ('nothing', False, restored(lambda name, seed: default_restorer())),
    'chosen, default': ('nothing', False, budgeted),
    'distilled': (
        'nothing',
        True,
        restored(lambda name, seed: layerwise(distilled(64, seed, reflect=True))),
    ),
    'batch norms': ('128 images', True, seen(pruned)),
    'folding, batch norms': ('128 images', True, seen(folded)),
    'channels': (
        '128 images',
        True,
        restored(lambda name, seed: probe(calibration(unlabelled(name, seed)), taps=False)),
    ),
    'outputs': (
        '128 images',
        True,
        restored(lambda name, seed: layerwise(calibration(unlabelled(name, seed)))),
    ),
    'photographs': (
        'nothing',
        True,
        restored(lambda name, seed: layerwise(photographs(128, seed))),
    ),
    'one epoch': ('labels, training', True, tuned),
}


def measure(s):
    "One way to shrink a network: test images that it gets right, operations left, seconds."
    name, ratio = s['network'], s['ratio']
    net, stats = network(name)
    if s['method'] == 'unpruned':
        right, n = accuracy(net, images(name, 'test'), *stats, batch=100)
        return dict(needs='', right=right, n=n, macs=1.0, seconds=0.0)
    needs, _, method = METHODS[s['method']]
    same_ratio(name, ratio)  # the plan is common to all, and no part of their time
    if needs != 'nothing':
        unlabelled(name, s['seed'])
    if needs == 'labels, training':
        best_rate(name)
    start = time.process_time()
    done = method(name, ratio, s['seed'])
    seconds = time.process_time() - start
    done, model = done if isinstance(done, tuple) else (done, done.model)
    model = model.to(memory_format=torch.channels_last)
    right, n = accuracy(model, images(name, 'test'), *stats, batch=100)
    left = done.cost.macs.after / done.cost.macs.before
    return dict(needs=needs, right=right, n=n, macs=left, seconds=seconds)


def settings(names):
    "Trials: first every method once, then other seeds."
    trains = lambda m: METHODS[m][0] == 'labels, training'
    quick = [m for m in METHODS if not trains(m)]
    slow = [m for m in METHODS if trains(m)]
    row = lambda name, ratio, m, seed: dict(network=name, ratio=ratio, method=m, seed=seed)
    out = []
    for name in names:
        out.append(row(name, 0.0, 'unpruned', 0))
        out += [row(name, r, m, 0) for r in RATIOS for m in quick]
        out += [row(name, r, m, 0) for r in RATIOS for m in slow]
    seeded = [m for m in quick if METHODS[m][1]]
    for methods in (seeded, slow):
        for name in names:
            out += [row(name, r, m, seed) for seed in (1, 2) for r in RATIOS for m in methods]
    return out


if __name__ == '__main__':
    torch.set_num_threads(1)
    sweep(RESULTS / 'head_to_head.csv', settings(sys.argv[1:] or list(NETWORKS)), measure)
    print(results(RESULTS / 'head_to_head.csv').to_string())
