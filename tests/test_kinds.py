"""Every kind of channel group: removed channels that repeat kept ones are restored without loss.

Whatever lies between producer and consumer.
"""

import copy
from dataclasses import fields, is_dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lbyl_nb.graph import find_groups
from lbyl_nb.layers import by_output
from lbyl_nb.layerwise import layerwise, probe
from lbyl_nb.least_lost import least_lost
from lbyl_nb.probes import calibration
from lbyl_nb.recover import lbyl_restore, restore
from lbyl_nb.restorers import lbyl, merging, prune_only
from lbyl_nb.trace import trace

EXACT = dict(
    merging=lambda s: merging(),
    lbyl=lambda s: lbyl(0, 0),
    probe=lambda s: probe(s, ridge=1e-9),
    channels=lambda s: probe(s, taps=False, ridge=1e-9),
    layerwise=lambda s: layerwise(s, refit=False, ridge=1e-9),
)


class Net(nn.Module):
    "Layers by name, and a function of them and of the input."

    def __init__(self, f, **layers):
        super().__init__()
        self.f, self.layers = f, nn.ModuleDict(layers)

    def forward(self, x):
        return self.f(self.layers, x)


class NormAct(nn.BatchNorm2d):
    "A batch norm with its activation inside, as timm has it."

    def forward(self, x):
        return F.relu(super().forward(x))


class Own(nn.Conv2d):
    "A convolution with a class of its own that changes nothing."


def stream(net, x):
    x = net['bn0'](net['stem'](x)).relu()
    y = net['bn1'](net['a'](x)).relu()
    x = (x + net['bn2'](net['b'](y))).relu()
    x = (x + net['c'](x)).relu()
    return net['fc'](x.mean((2, 3)))


def dense(net, x):
    x = net['stem'](x)
    for k in 'abc':
        x = torch.cat([x, net[k](net['n' + k](x).relu())], 1)
    return net['fc'](x.relu().mean((2, 3)))


def gated(net, x):
    x = F.silu(net['bn'](net['expand'](x)))
    x = net['dbn'](net['dw'](x))
    gate = net['squeeze'](x.mean((2, 3), keepdim=True)).relu()
    gate = net['excite'](gate).sigmoid()
    return net['out'](x * gate).mean((2, 3))


def mlp(net, x):
    x = x + net['down'](F.gelu(net['up'](net['norm'](x))))
    return net['fc'](x.mean(1))


def several(net, x):
    y = net['a'](x).relu()
    return net['b'](y).relu().mean((2, 3)) + net['c'](y)[:, :, 0, 0]


C, B = nn.Conv2d, nn.BatchNorm2d
# what builds a network of a kind, and the shape of its inputs
KINDS = dict(
    stream=(
        lambda: Net(
            stream,
            stem=C(3, 8, 3, padding=1),
            bn0=B(8),
            a=C(8, 10, 3, padding=1),
            bn1=B(10),
            b=C(10, 8, 3, padding=1),
            bn2=B(8),
            c=C(8, 8, 1),
            fc=nn.Linear(8, 4),
        ),
        (3, 8, 8),
    ),
    concatenation=(
        lambda: Net(
            dense,
            stem=C(3, 4, 1),
            na=B(4),
            a=C(4, 6, 3, padding=1),
            nb=B(10),
            b=C(10, 6, 3, padding=1),
            nc=B(16),
            c=C(16, 6, 3, padding=1),
            fc=nn.Linear(22, 4),
        ),
        (3, 8, 8),
    ),
    gated_depthwise=(
        lambda: Net(
            gated,
            expand=C(3, 8, 1),
            bn=B(8),
            dw=C(8, 8, 3, padding=1, groups=8),
            dbn=B(8),
            squeeze=C(8, 6, 1),
            excite=C(6, 8, 1),
            out=C(8, 4, 1),
        ),
        (3, 8, 8),
    ),
    grouped=(
        lambda: nn.Sequential(
            C(3, 12, 1),
            B(12),
            nn.ReLU(),
            C(12, 8, 3, padding=1, groups=2),
            B(8),
            nn.ReLU(),
            C(8, 8, 3, groups=4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(288, 4),
        ),
        (3, 8, 8),
    ),
    grouped_1d=(
        lambda: nn.Sequential(
            nn.Conv1d(3, 12, 1),
            nn.ReLU(),
            nn.Conv1d(12, 6, 3, groups=3),
            nn.ReLU(),
            nn.Conv1d(6, 2, 1),
        ),
        (3, 12),
    ),
    separable=(
        lambda: nn.Sequential(
            C(3, 8, 3),
            B(8),
            nn.ReLU(),
            C(8, 6, 1),
            nn.ReLU(),
            C(6, 6, 3, padding=1, groups=6),
            B(6),
            nn.ReLU(),
            C(6, 4, 1),
        ),
        (3, 8, 8),
    ),
    activation_in_norm=(
        lambda: nn.Sequential(
            C(3, 8, 3, padding=1),
            NormAct(8),
            C(8, 6, 3),
            NormAct(6),
            C(6, 4, 1),
        ),
        (3, 8, 8),
    ),
    norm_without_statistics=(
        lambda: nn.Sequential(
            C(3, 8, 3, padding=1),
            B(8, track_running_stats=False),
            nn.ReLU(),
            C(8, 6, 3),
            B(6, track_running_stats=False),
            nn.ReLU(),
            C(6, 4, 1),
        ),
        (3, 8, 8),
    ),
    instance_norm=(
        lambda: nn.Sequential(
            C(3, 8, 3, padding=1),
            nn.InstanceNorm2d(8, affine=True),
            nn.LeakyReLU(0.1),
            C(8, 6, 3),
            nn.InstanceNorm2d(6),
            nn.ReLU(),
            C(6, 4, 1),
        ),
        (3, 8, 8),
    ),
    own_class=(
        lambda: nn.Sequential(
            Own(3, 8, 3, padding=1),
            B(8),
            nn.ReLU(),
            Own(8, 6, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.modules.linear.NonDynamicallyQuantizableLinear(54, 4),
        ),
        (3, 8, 8),
    ),
    transposed=(
        lambda: nn.Sequential(
            C(3, 8, 3),
            B(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 3, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 6, 2, bias=False),
            nn.ReLU(),
            C(6, 2, 1),
        ),
        (3, 8, 8),
    ),
    one_dimension=(
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 3, padding=1),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Conv1d(8, 6, 5, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, 4),
        ),
        (3, 16),
    ),
    three_dimensions=(
        lambda: nn.Sequential(
            nn.Conv3d(2, 8, 3, padding=1),
            nn.BatchNorm3d(8),
            nn.ReLU(),
            nn.MaxPool3d(2),
            nn.Conv3d(8, 6, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48, 4),
        ),
        (2, 6, 6, 6),
    ),
    transformer_mlp=(
        lambda: Net(
            mlp,
            norm=nn.LayerNorm(6),
            up=nn.Linear(6, 12),
            down=nn.Linear(12, 6),
            fc=nn.Linear(6, 3),
        ),
        (5, 6),
    ),
    several_consumers=(
        lambda: Net(several, a=C(3, 8, 3), b=C(8, 4, 3), c=C(8, 4, 1)),
        (3, 8, 8),
    ),
)


def made(kind, double=True):
    "A network of a kind with random weights and statistics, and inputs."
    torch.manual_seed(0)
    build, shape = KINDS[kind]
    net, x = build().eval(), torch.randn(64, *shape)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_()
            if m.track_running_stats:
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
    return (net.double(), x.double()) if double else (net, x)


def repeated(net, group):
    """The network with the last units of a group equal to its first ones, and a plan without them.

    Of a grouped convolution, those of every group.
    """
    net, half = copy.deepcopy(net), group.units // 2
    at = torch.arange(group.channels).view(-1, group.units)
    last, first = at[:, -half:].flatten(), at[:, :half].flatten()
    with torch.no_grad():
        for name, cut in group.cut:
            for t in by_channel(net.get_submodule(name)):
                t[cut[last].flatten()] = t[cut[first].flatten()]
    return net, {group.name: at[:, :-half].flatten().tolist()}


def by_channel(m):
    "Parameters and buffers of a module, with output channels first."
    for k, v in [*m.named_parameters(), *m.named_buffers()]:
        if v.ndim:
            yield by_output(m) if k == 'weight' and v.ndim > 1 else v


def groups_of(kind):
    net, x = made(kind)
    return [g for g in find_groups(trace(net, x), streams=True) if not g.reason]


@pytest.mark.parametrize('kind,group', [(k, g.name) for k in KINDS for g in groups_of(k)])
def test_repeated_channels_are_restored_exactly(kind, group):
    net, x = made(kind)
    net, keep = repeated(net, next(g for g in groups_of(kind) if g.name == group))

    def far(restorer):
        small = lbyl_restore(net, x, keep=keep, restorer=restorer)
        return (small(x) - net(x)).abs().max().item() / net(x).abs().max().item()

    gaps = {k: far(f(calibration(x))) for k, f in EXACT.items()}
    assert max(gaps.values()) < 1e-5 < far(prune_only()), gaps


@pytest.mark.parametrize('kind', KINDS)
def test_all_groups_together(kind):
    """Everything pruned at once, by a ratio and an own kept set.

    It runs, is smaller, and is the better for restoration.
    """
    net, x = made(kind, double=False)
    how = dict(ratio=0.3, streams=True, criterion=least_lost(calibration(x)))
    pruned = restore(net, x, **how, restorer=prune_only())
    restored = restore(net, x, **how, restorer=layerwise(calibration(x)))
    assert len(pruned.plan) == len(groups_of(kind))
    assert restored.model(x).shape == net(x).shape
    assert restored.cost.params['after'] < restored.cost.params['before']
    gap = lambda r: (r.model(x) - net(x)).norm().item()
    assert gap(restored) < gap(pruned) + 1e-4 * net(x).norm().item()


def told(net, x):
    "All that is known of the groups of a network."

    def plain(v):
        if isinstance(v, torch.Tensor):
            return v.tolist()
        if is_dataclass(v):
            return {f.name: plain(getattr(v, f.name)) for f in fields(v) if f.name != 'roots'}
        return [plain(e) for e in v] if isinstance(v, (tuple, list)) else str(v)

    return [plain(g) for g in find_groups(trace(net, x), streams=True)]


@pytest.mark.parametrize('kind', KINDS)
def test_half_precision_is_seen_as_single_is(kind):
    "The same groups, with the same norms, activations, scales and readers."
    net, x = made(kind, double=False)
    half, x = net.bfloat16(), x.bfloat16()
    assert told(half, x) == told(copy.deepcopy(half).float(), x.float())
