"""What goes with a channel, beside Torch-Pruning's account of it, which follows autograd's graph.

The package records labels of channels in a forward pass and knows nothing of that graph.
"""

import pytest
import torch
import torch_pruning as tp
import torchvision

from lbyl_nb.graph import find_groups
from lbyl_nb.layers import LAYERS
from lbyl_nb.trace import trace

NETWORKS = [
    'resnet18',
    'vgg11_bn',
    'mobilenet_v2',
    'mobilenet_v3_small',
    'densenet121',
    'squeezenet1_1',
    'mnasnet0_5',
]


def by_torch_pruning(net, graph, name, channel):
    "{(module, does it lose outputs?): indices} of all that goes with one channel of a layer."
    names = {m: k for k, m in net.named_modules()}
    layer, found = net.get_submodule(name), {}
    cut = graph.get_pruner_of_module(layer).prune_out_channels
    for item in graph.get_pruning_group(layer, cut, [channel]).items:
        module = item.dep.target.module
        if module not in names:
            continue
        of_layer = isinstance(module, LAYERS)
        outputs = not of_layer or graph.is_out_channel_pruning_fn(item.dep.handler)
        found.setdefault((names[module], outputs), set()).update(item.idxs)
    return found


def by_labels(group, channel, depthwise):
    "The same from a group. Of a depthwise convolution inputs and outputs are one."
    at = lambda columns: set(columns[channel].tolist())
    found = {(k, True): at(columns) for k, columns in group.cut}
    found |= {(k, False): v for (k, _), v in found.items() if k in depthwise}
    found |= {(c.name, False): at(c.columns) for c in group.consumers}
    return found


@pytest.mark.parametrize('name', NETWORKS)
def test_the_same_goes_as_torch_pruning_says(name):
    torch.manual_seed(0)
    net, x = torchvision.models.get_model(name, weights=None).eval(), torch.randn(1, 3, 64, 64)
    groups = [g for g in find_groups(trace(net, x), streams=True) if not g.reason]
    graph = tp.DependencyGraph().build_dependency(net, (x,))
    depthwise = {k for k, m in net.named_modules() if getattr(m, 'groups', 1) > 1}
    assert len(groups) > 5
    for g in groups:
        for channel in (0, g.channels // 3, g.channels - 1):
            theirs = by_torch_pruning(net, graph, g.name, channel)
            theirs |= {(k, False): v for (k, out), v in theirs.items() if k in depthwise and out}
            assert by_labels(g, channel, depthwise) == theirs, (g.name, channel)
