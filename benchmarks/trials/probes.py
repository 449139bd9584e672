"""How many probes a restoration of the networks in `photographs.py` needs, and what prior.

    python benchmarks/trials/probes.py FOLDER LITE0

Plans are those that the default chooses; the default's mixture of photographs and noise restores
them, in several numbers, and the ridge pulls to the weights of kept channels or to what `gaussian`
makes of them. All is measured on the 100 photographs that serve to choose. Rows go into
nbs/results/probes.csv; the same call goes on where it stopped. Half an hour on one core.
"""

import sys
import time
from pathlib import Path

from photographs import RESULTS, SHARES, X, answers, chosen, images, network

from lbyl_nb import gaussian, layerwise
from lbyl_nb.bench import sweep
from lbyl_nb.fisher import divergence
from lbyl_nb.photographs import stand_ins
from lbyl_nb.plans import check_plan
from lbyl_nb.recover import verified

PRIORS = dict(pruning=None, gaussian=gaussian())


def restored(s, source, folder, file, **kwargs):
    "The plan that the default chooses, restored with a source of probes; seconds that this took."
    net, _ = network(s['network'], folder, file)
    made, _ = chosen(s['network'], folder, file, s['share'], 'default')
    keep = lambda model, traced, groups: check_plan(made, groups)
    start = time.process_time()
    small = verified(net, X, layerwise(source, **kwargs), keep, streams=True).model
    return small, time.process_time() - start


def moved(s, small, folder, file):
    "How far the answers to 100 photographs are from the dense network's, and how many are right."
    net, _ = network(s['network'], folder, file)
    x, labels = images(folder, s['network'])[0]
    out = answers(small, x)
    right = int((out.argmax(1) == labels).sum())
    return dict(n=len(x), divergence=divergence(answers(net, x), out), right=right)


def measure(s, folder, file):
    "One restoration with so many probes."
    source = stand_ins(s['probes'], s['seed'])
    small, seconds = restored(s, source, folder, file, prior=PRIORS[s['prior']])
    return moved(s, small, folder, file) | dict(seconds=seconds)


def settings():
    "Trials, network by network."
    for name, shares in SHARES.items():
        for share in shares:
            for n in (16, 32, 64, 128):
                for prior in PRIORS:
                    for seed in range(2):
                        yield dict(network=name, share=share, probes=n, prior=prior, seed=seed)


if __name__ == '__main__':
    folder, file = (Path(v).resolve() for v in sys.argv[1:])
    rows = sweep(RESULTS.with_name('probes.csv'), settings(), lambda s: measure(s, folder, file))
    print(rows.to_string())
