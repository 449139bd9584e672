"""Restoring networks against one forward pass of 32 images: CPU time and peak memory.

Memory is shown as a multiple of the dense network's. Without arguments one network of each of
seven families; with `--all` the memory of the 95 networks of nbs/46_zoo.ipynb, by closed form and
probes, into nbs/results/zoo_memory.csv (hours; the same call goes on where it stopped).

224 pixels, 30 % of the channels removed, streams included, 32 probes, random weights: they decide
nothing about cost. Every measurement runs in a process of its own, so that its peak memory can be
read. Memory of the dense network: its parameters and one forward pass of 32 images. Gram
matrices: of the closed form, the products of filters of one group; of probes, what is held at
once of patches' and outputs' moments, of two halves of the probes; and what the largest
factorisation takes. All in double precision. The images on which `restore` tells afterwards how
far the output moved are not counted.
"""

import sys
import time
from pathlib import Path

import pandas as pd
import torch
from torchvision.models import get_model, list_models

from _process import against, each, footer, peak, run, time_and_memory
from lbyl_nb.bench import results, sweep
from lbyl_nb.criteria import l2_norm
from lbyl_nb.graph import find_groups
from lbyl_nb.layers import by_output, conv_groups
from lbyl_nb.layerwise import find_sites, layerwise, probe
from lbyl_nb.plans import by_ratio
from lbyl_nb.probes import noise
from lbyl_nb.recover import verified
from lbyl_nb.restorers import lbyl
from lbyl_nb.trace import trace

NETWORKS = (
    'resnet18',
    'densenet121',
    'mobilenet_v2',
    'efficientnet_b0',
    'convnext_tiny',
    'vit_b_16',
    'vgg11_bn',
)
N, RATIO = 32, 0.3
RESTORERS = dict(lbyl=lbyl, probe=lambda: probe(noise(N)), layerwise=lambda: layerwise(noise(N)))
RESULTS = Path(__file__).resolve().parent.parent / 'nbs' / 'results'


def gram(net, s):
    """Memory of the moments of one layer, two halves, and of their factorisation, in GB.

    One half is centred, with a ridge, factored. Of a grouped convolution they are blocks.
    """
    layer = net.get_submodule(s.reader.name)
    rows = by_output(layer)
    if s.free:
        d, o = len(s.read) * rows[0, 0].numel(), len(rows)
    else:
        d, o = len(s.keep), len(s.columns) - len(s.keep)
    unit = 8 * d / conv_groups(layer) / 1e9
    return 2 * unit * (d + o), unit * (3 * d + o)


def products(g, t):
    """Memory of the products of a group's filters, in bytes.

    All of them, centred too without batch norm, those of the t kept ones, and their
    factorisation with its workspace.
    """
    whole = g.channels**2 if g.norm else 2 * g.channels**2
    return 8 * (whole + t * g.channels + 3 * t**2)


def grams(net, x, chosen, what):
    """Memory of the Gram matrices that a restorer holds at once, in GB.

    `lbyl` holds one group's, `probe` the moments of all layers, `layerwise` those of one layer,
    or of two where one waits for its addition.
    """
    traced = trace(net, x)
    groups = [g for g in find_groups(traced, streams=True) if g.name in chosen]
    if what == 'lbyl':
        return max(products(g, len(chosen[g.name])) for g in groups) / 1e9
    sites = list(find_sites(traced, groups, chosen, every=what == 'layerwise').values())
    now, solving = zip(*(gram(net, s) for s in sites))
    if what == 'probe':
        return sum(now) + max(solving)
    waiting = [0] + [v if s.reader.added else 0 for v, s in zip(now, sites)]
    return max(map(sum, zip(now, solving, waiting)))


def build(network):
    "A network of torchvision or timm, random weights, in evaluation mode."
    torch.manual_seed(0)
    if network in list_models():
        return get_model(network, weights=None).eval()
    # only some networks of the whole zoo need it
    from timm import create_model

    return create_model(network).eval()


def one(network, what):
    "CPU time and memory of one measurement, as a dict; or why there is none."
    before, net, done = peak(), build(network), []
    x = torch.randn(N if what == 'forward' else 1, 3, 224, 224)

    def work():
        if what == 'forward':
            with torch.inference_mode():
                net(x)
        else:
            restorer = RESTORERS[what]()
            choose = by_ratio(RATIO, l2_norm)
            done.append(verified(net, x, restorer, choose, streams=True))

    try:
        row = time_and_memory(network, what, work, before, time.process_time)
    except ValueError as e:
        nothing = dict.fromkeys(('seconds', 'gigabytes', 'gram'))
        return dict(network=network, what=what, **nothing, error=str(e)[:300])
    held = grams(net, x, done[0].plan, what) if done else 0.0
    return row | dict(gram=held, error=None)


def table(rows):
    "Measurements as ratios; times only where there are any."
    t = pd.DataFrame(rows).dropna(subset='gigabytes').set_index(['network', 'what'])
    dense = t.gigabytes.xs('forward', level='what').reindex(t.index, level='network')
    if 'seconds' in t:
        t['CPU time / forward pass'] = against(t, 'forward')
    t['memory / dense'] = t.gigabytes / dense
    t['beyond Gram / dense'] = (t.gigabytes - t.gram) / dense
    shown = t[['gigabytes', 'gram', *(k for k in t if '/' in k)]].round(2)
    words = dict(gigabytes='peak memory (GB)', gram='Gram matrices (GB)')
    return shown.rename(columns=words).to_string()


def whole_zoo():
    """Memory of all networks of 46_zoo, a row in the results file for each measurement.

    No times: they are compared within one run only.
    """
    nets = results(RESULTS / 'zoo.csv').drop_duplicates('model').sort_values('parameters')
    settings = []
    for what in ('forward', 'lbyl', 'probe'):
        for r in nets.itertuples():
            case = dict(source=r.source, network=r.model, what=what, images=N, ratio=RATIO)
            settings.append(case)

    def measure(s):
        row = each(__file__, [(s['network'], s['what'])])[0]
        return {k: row[k] for k in ('gigabytes', 'gram', 'error')}

    return sweep(RESULTS / 'zoo_memory.csv', settings, measure)


def main():
    if sys.argv[1:] == ['--all']:
        rows = whole_zoo()
    else:
        rows = each(__file__, [(n, w) for n in NETWORKS for w in ('forward', *RESTORERS)])
    print(table(rows))
    print(footer())


if __name__ == '__main__':
    run(one, main)
