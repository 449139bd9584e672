"Layer by layer: equal networks written differently, samples that are not alone, and what is counted by hand."
import copy

import pytest
import torch
from torch import nn

from lbyl_nb.layerwise import layerwise
from lbyl_nb.probe import Probes, calibration
from lbyl_nb.recover import lbyl_restore, plan, restore
from lbyl_nb.selection import least_lost


class Net(nn.Module):
    "Layers by name, and a function of them and of the input; it counts its forward passes."
    def __init__(self, f, **layers):
        super().__init__()
        self.f, self.layers, self.passes = f, nn.ModuleDict(layers), 0
    def forward(self, x):
        self.passes += 1
        return self.f(self.layers, x)


def out(net, x):
    with torch.no_grad(): return net(x)


def far(net, small, x):
    "Distance of two outputs, relative to how much the first varies among samples."
    y = out(net, x)
    return ((out(small, x) - y).norm() / (y - y.mean(0)).norm()).item()


# Which channels can be spared

def dense(depth):
    "Each layer reads all layers before it."
    def forward(l, x):
        x = l['stem'](x)
        for i in range(depth): x = torch.cat([x, l[f'l{i}'](x.relu())], 1)
        return l['fc'](x.relu().mean((2, 3)))
    layers = {f'l{i}': nn.Conv2d(4 * (i + 1), 4, 3, padding=1) for i in range(depth)}
    return Net(forward, stem=nn.Conv2d(3, 4, 3), **layers, fc=nn.Linear(4 * (depth + 1), 3)).eval()


def test_choosing_takes_one_pass_of_the_probes():
    "However many groups a layer reads."
    x, counts = torch.randn(8, 3, 6, 6), {}
    for depth in (2, 6):
        net, probed = dense(depth), []
        def source(model, args):
            probed.append(copy.deepcopy(model))
            probed[-1].passes = 0
            return Probes(probed[-1], (x,))
        assert len(plan(net, x, .5, least_lost(source))) == depth + 1
        counts[depth] = [p.passes for p in probed]
    assert counts == {2: [1], 6: [1]}


def test_errors_count_where_the_next_layer_reads_them():
    """A batch norm that scales one output of the consumer down makes channels that only this output reads
    cheap; the plan is the one of the network without batch norm, its scale written into the weights."""
    torch.manual_seed(0)
    a, b, x, kept = nn.Linear(4, 4), nn.Linear(4, 2), torch.randn(64, 4), {}
    with torch.no_grad():
        a.weight.copy_(torch.eye(4)); a.bias.zero_()
        b.weight.copy_(torch.tensor([[1., 1, 0, 0], [0, 0, 1, 1]])); b.bias.zero_()
    for small in (0, 1):
        norm = nn.BatchNorm1d(2, eps=0)
        norm.weight.data[small] = -.01
        norm.running_var.copy_(torch.tensor([4., .25]))
        factor = norm.weight.detach() / norm.running_var.sqrt()
        folded = copy.deepcopy(b)
        folded.weight.data *= factor[:, None]
        normed = nn.Sequential(a, nn.ReLU(), b, norm, nn.ReLU(), nn.Linear(2, 2)).eval()
        plain = nn.Sequential(a, nn.ReLU(), folded, nn.Identity(), nn.ReLU(), normed[-1]).eval()
        torch.testing.assert_close(out(normed, x), out(plain, x))
        plans = [plan(n, x[:1], .5, least_lost(calibration(x)))['0'] for n in (normed, plain)]
        assert plans[0] == plans[1]
        kept[small] = plans[0]
    assert kept == {0: [2, 3], 1: [0, 1]}


# The stream

def test_a_tiny_scale_cannot_make_up_for_the_stream():
    """An output that the batch norm multiplies by nearly nothing keeps its own target: it comes out as it was,
    and not as what the shortcut lacks, divided by nearly nothing."""
    torch.manual_seed(0)
    def forward(l, x):
        x = l['stem'](x).relu()
        return l['fc']((l['n'](l['b'](l['a'](x).relu())) + l['up'](l['down'](x).relu())).relu())
    net = Net(forward, stem=nn.Linear(8, 8), a=nn.Linear(8, 16), b=nn.Linear(16, 8), n=nn.BatchNorm1d(8),
              down=nn.Linear(8, 16), up=nn.Linear(16, 8), fc=nn.Linear(8, 4)).eval()
    net.layers.n.weight.data[3] = 1e-6
    x, seen = torch.randn(128, 8), []
    keep = {'layers.a': range(15), 'layers.down': range(4)}
    small = lbyl_restore(net, x, keep=keep, restorer=layerwise(calibration(x), refit=False))
    for m in (net, small):
        m.layers.b.register_forward_hook(lambda layer, i, o: seen.append(o))
        out(m, x)
    missed = (seen[1] - seen[0]).norm(dim=0) / (seen[0] - seen[0].mean(0)).norm(dim=0)
    assert missed[3] < .5, missed
    others = torch.cat([missed[:3], missed[4:]])
    assert others.min() > missed[3]    # these do make up for the stream
