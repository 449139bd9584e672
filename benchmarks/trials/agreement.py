"""Small trained networks, pruned and restored: accuracy, and what is known of it without a label.

    python benchmarks/trials/agreement.py [NETWORK ...]

Networks are found through $LBYL_WEIGHTS, their test images through $LBYL_DATA; `digits` is trained
here. Rows go into nbs/results/agreement.csv; the same call goes on where it stopped. An hour.
"""

import sys
import time
from functools import cache
from pathlib import Path

import torch
from photographs import closed_form

from lbyl_nb import calibration, default_restorer, distilled, layerwise, noise, output_loss, restore
from lbyl_nb.bench import accuracy, sweep
from lbyl_nb.cli import _trained
from lbyl_nb.data import STATS, digits, load
from lbyl_nb.models import pretrained

RESULTS = Path(__file__).resolve().parents[2] / 'nbs' / 'results' / 'agreement.csv'
# images, statistics of their normalisation, ratios, shares of the operations
NETWORKS = dict(
    digits=('digits', None, (0.3, 0.4, 0.5, 0.6), ()),
    lenet_300_100_fashion_mnist=('fashion_mnist', 'half', (0.5, 0.6, 0.7, 0.8), ()),
    resnet20_cifar10=('cifar10', 'imagenet', (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), (0.73, 0.5)),
    resnet56_cifar10=('cifar10', 'imagenet', (0.1, 0.3, 0.5, 0.7), (0.5, 0.3)),
)
CLOSED = 'pruned', 'merging', 'lbyl', 'lbyl, mean', 'gaussian'
PROBED = dict(noise=lambda: layerwise(noise()), default=default_restorer)


@cache
def network(name):
    "A trained network, its test images, and an input."
    images, stats, _, _ = NETWORKS[name]
    if name == 'digits':
        train, test = digits()
        return _trained(train, 0, 8, 32, 1.0), test, ()
    return pretrained(name), load(images, 'test'), STATS[stats]


@cache
def probes(name):
    "128 distilled probes of a network, and mirrored."
    net, test, _ = network(name)
    return distilled(128, reflect=True)(net, (torch.zeros(1, *test.images.shape[1:]),)).args[0]


def source(name):
    "The distilled probes of a network as a source."
    return calibration(probes(name))


def restorer(method):
    "Restorers by name."
    return PROBED[method]() if method in PROBED else closed_form(method)


def measure(s):
    "One restoration: test images that it gets right, and what is known without labels."
    net, test, stats = network(s['network'])
    x = torch.zeros(1, *test.images.shape[1:])
    if s['method'] == 'unpruned':
        right, n = accuracy(net, test, *stats)
        return dict(right=right, n=n, agreement=1.0, divergence=0.0, macs=1.0, seconds=0.0)
    start = time.process_time()
    if s['what'] == 'ratio':
        r = restore(net, x, ratio=s['amount'], restorer=restorer(s['method']))
    elif s['method'] == 'default':
        r = restore(net, x, macs=s['amount'])
    else:
        of_probes = source(s['network'])
        how = dict(criterion=output_loss(of_probes), restorer=layerwise(of_probes))
        r = restore(net, x, macs=s['amount'], **how)
    seconds = time.process_time() - start
    right, n = accuracy(r.model, test, *stats)
    left = r.cost.macs.after / r.cost.macs.before
    told = dict(agreement=r.agreement, divergence=r.divergence)
    return dict(right=right, n=n, **told, macs=left, seconds=seconds)


def settings(names):
    "Trials: budgets first, then the same ratio everywhere."
    out = []
    for name in names:
        row = lambda what, amount, method: dict(
            network=name, what=what, amount=amount, method=method, seed=0
        )
        _, _, ratios, shares = NETWORKS[name]
        out.append(row('', 0.0, 'unpruned'))
        out += [row('macs', v, m) for v in shares for m in ('distilled', 'default')]
        out += [row('ratio', v, m) for v in ratios for m in (*CLOSED, *PROBED)]
    return out


if __name__ == '__main__':
    torch.set_num_threads(1)
    rows = sweep(RESULTS, settings(sys.argv[1:] or list(NETWORKS)), measure)
    rows['accuracy'] = 100 * rows.right / rows.n
    print(rows.to_string())
