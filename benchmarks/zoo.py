"""Restoring torchvision's networks against one forward pass of 64 images: CPU time, and peak memory as a multiple of the dense network's.

One network of each of seven families at 224 pixels, 30 % of the channels removed, 64 probes, random weights: they decide nothing about time.
Every measurement runs in a process of its own, so that its peak memory can be read. Memory of the dense network: its parameters and one forward pass
of 64 images. Gram matrices: what is held at once of patches' and outputs' moments, of two halves of the probes, in double precision."""
import time

import pandas as pd
import torch
from _process import against, each, footer, measured, peak, run
from torchvision.models import get_model

from lbyl_nb.graph import by_output, find_groups, trace
from lbyl_nb.layerwise import find_sites, layerwise, probe
from lbyl_nb.probe import noise
from lbyl_nb.recover import lbyl, restore

NETWORKS = ('resnet18', 'densenet121', 'mobilenet_v2', 'efficientnet_b0', 'convnext_tiny', 'vit_b_16', 'vgg11_bn')
N = 64
RESTORERS = dict(lbyl=lbyl, probe=lambda: probe(noise(N)), layerwise=lambda: layerwise(noise(N)))


def gram(net, s):
    "Memory of the moments of one layer, two halves, in GB."
    rows = by_output(net.get_submodule(s.reader.name))
    d, o = (len(s.read) * rows[0, 0].numel(), len(rows)) if s.free else (len(s.keep), len(s.columns) - len(s.keep))
    return 2 * 8 * d * (d + o) / 1e9


def grams(net, x, chosen, what):
    "Memory of the moments that a restorer holds at once, in GB: `probe` those of all layers, `layerwise` one layer's, or two where one waits for its addition."
    traced = trace(net, x)
    groups = [g for g in find_groups(traced) if g.name in chosen]
    sites = list(find_sites(traced, groups, chosen, every=what == 'layerwise').values())
    now = [gram(net, s) for s in sites]
    waiting = [0] + [v if s.reader.added else 0 for v, s in zip(now, sites)]
    return sum(now) if what == 'probe' else max(map(sum, zip(now, waiting)))


def one(network, what):
    "CPU time and memory of one measurement, as a dict."
    torch.manual_seed(0)
    before, net, done = peak(), get_model(network, weights=None).eval(), []
    x = torch.randn(N if what == 'forward' else 1, 3, 224, 224)
    def forward():
        with torch.inference_mode(): net(x)
    start = time.process_time()
    row = measured(network, what, forward if what == 'forward' else lambda: done.append(restore(net, x, ratio=.3, restorer=RESTORERS[what]())), before)
    return row | dict(seconds=time.process_time() - start, gram=grams(net, x, done[0].plan, what) if done and what != 'lbyl' else 0.)


def table(rows):
    "Measurements as ratios."
    t = pd.DataFrame(rows).set_index(['network', 'what'])
    dense = t.gigabytes.xs('forward', level='what').reindex(t.index, level='network')
    t['CPU time / forward pass'] = against(t, 'forward')
    t['memory / dense'] = t.gigabytes / dense
    t['beyond Gram / dense'] = (t.gigabytes - t.gram) / dense
    return t.drop(columns='seconds').rename(columns=dict(gigabytes='peak memory (GB)', gram='Gram matrices (GB)')).round(2).to_string()


def main():
    print(table(each(__file__, [(n, w) for n in NETWORKS for w in ('forward', *RESTORERS)])))
    print(footer())


if __name__ == '__main__': run(one, main)
