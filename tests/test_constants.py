"""Constants of removed channels: into which bias or norm they go, and to whom none may go.

Channel 0 of a layer is a constant, as its batch norm multiplies it by zero. Without it a network
must give what it gave, or, where a reader's share is not known, what it gives with zeros there.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lbyl_nb.graph import find_groups
from lbyl_nb.layerwise import layerwise, probe
from lbyl_nb.probes import calibration
from lbyl_nb.recover import restore
from lbyl_nb.restorers import gaussian, lbyl, prune_only, with_mean
from lbyl_nb.strategies import adaptive_bn
from lbyl_nb.trace import trace

CONSTANTS = lbyl(0, 1e6)  # delivers next to nothing but constants


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def is_constant(norm, value):
    "Let a batch norm make channel 0 a constant."
    norm.weight.data[0], norm.bias.data[0] = 0, value


def gap(net, other, x):
    with torch.no_grad():
        return (net(x) - other(x)).abs().max().item()


def without(net, x, name, restorer=CONSTANTS):
    "The network without channel 0 of a layer."
    width = net.get_submodule(name).weight.shape[0]
    return restore(net, x, keep={name: range(1, width)}, restorer=restorer).model


def silenced(net, **columns):
    "A copy whose layers of these names give some input columns weight zero."
    other = copy.deepcopy(net)
    for name, at in columns.items():
        other.get_submodule(name).weight.data[:, at] = 0
    return other


class TwoLayers(nn.Module):
    "Two layers without bias, each with a batch norm behind it: one module, or one running mean."

    def __init__(self, shared):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.b, self.c = nn.Conv2d(6, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.m = nn.BatchNorm2d(4)
        self.k = self.m if shared == 'module' else nn.BatchNorm2d(4)
        self.o = nn.Conv2d(8, 2, 1)
        if shared == 'mean':
            self.k.running_mean = self.m.running_mean

    def forward(self, x):
        y = self.n(self.a(x)).relu()
        return self.o(torch.cat([self.m(self.b(y)).relu(), self.k(self.c(x)).relu()], 1))


@pytest.mark.parametrize('how', ['constants', 'layerwise'])
@pytest.mark.parametrize('shared', ['nothing', 'module', 'mean'])
def test_a_batch_norm_of_two_layers_takes_no_constant_of_one(shared, how):
    torch.manual_seed(0)
    net, x = TwoLayers(shared).eval(), draw(64, 3, 5, 5)
    is_constant(net.n, 1)
    restorer = CONSTANTS if how == 'constants' else layerwise(calibration(x))
    small = without(net, x, 'a', restorer)
    assert small.a.out_channels == 5
    assert gap(net, small, x) < 1e-5
    assert (small.b.bias is None) == (shared == 'nothing')


def test_without_new_biases_a_batch_norm_of_two_layers_stays_as_it_is():
    torch.manual_seed(0)
    net, x = TwoLayers('module').eval(), draw(8, 3, 5, 5)
    is_constant(net.n, 1)
    keep = {'a': range(1, 6)}
    small = restore(net, x, keep=keep, restorer=CONSTANTS, new_biases=False).model
    assert small.b.bias is None and torch.equal(small.m.running_mean, net.m.running_mean)
    assert gap(silenced(net, b=0), small, x) < 1e-5


def test_what_passes_a_batch_norm_one_after_the_other_is_no_sum():
    torch.manual_seed(0)
    norm, x = nn.BatchNorm2d(6), draw(8, 3, 5, 5)
    first, second, last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)
    net = nn.Sequential(first, norm, nn.ReLU(), second, norm, nn.ReLU(), last).eval()
    is_constant(norm, 1)
    small = without(net, x, '0', gaussian(ridge=1e6, fallback=prune_only()))
    expected = copy.deepcopy(net)
    expected[3].weight.data[:, 0] = expected[6].weight.data[:, 0] = 0
    assert gap(expected, small, x) < 1e-4


def test_norms_that_share_a_running_mean_keep_their_names():
    net = TwoLayers('mean').eval()
    group = next(g for g in find_groups(trace(net, draw(1, 3, 5, 5))) if g.name == 'b')
    assert group.branches == ((('b', 'm'),), (('c', 'k'),))


class Read(nn.Module):
    "What a function makes of channels, read by a convolution or a linear layer."

    def __init__(self, f, reader, factors=1):
        super().__init__()
        self.a, self.n, self.b, self.f = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), reader, f
        self.w = nn.Parameter(torch.rand(factors) + 0.5)
        is_constant(self.n, 1)

    def forward(self, x):
        return self.b(self.f(self.n(self.a(x)).relu(), self.w))


def read(f, reader, size=4, **kwargs):
    "Such a network without channel 0, what it should give at best, and without a constant."
    torch.manual_seed(0)
    net, x = Read(f, reader, **kwargs).eval(), draw(16, 3, size, size)
    columns = list(range(4)) if isinstance(reader, nn.Linear) else list(range(0, 12, 6))
    columns = [c for c in columns if c < reader.weight.shape[1]]
    small = without(net, x, 'a')
    return gap(net, small, x), gap(silenced(net, b=columns), small, x)


@pytest.mark.parametrize('one, other', [(2.0, 2.0), (2.0, 3.0), (1.0, 3.0), (3.0, -3.0)])
def test_columns_that_are_multiplied_by_different_numbers_get_no_constant(one, other):
    f = lambda y, w: torch.cat([one * y, other * y], 1)
    as_dense, as_silenced = read(f, nn.Conv2d(12, 2, 1))
    assert (as_dense if one == other else as_silenced) < 1e-5
    assert max(as_dense, as_silenced) > 1e-2


@pytest.mark.parametrize('equal', [True, False])
def test_one_channel_with_several_factors_gets_no_constant(equal):
    f = lambda y, w: y.flatten(1) * (0 * w + 2 if equal else w)
    as_dense, as_silenced = read(f, nn.Linear(24, 2), size=2, factors=24)
    assert (as_dense if equal else as_silenced) < 1e-5
    assert max(as_dense, as_silenced) > 1e-2


GRID = F.affine_grid(2 * torch.eye(2, 3).expand(16, 2, 3), (16, 6, 4, 4), align_corners=False)
SPATIAL = dict(  # and whether a constant stays one
    pool=(lambda y, w: F.avg_pool2d(y, 2), True),
    divided=(lambda y, w: F.avg_pool2d(y, 2, divisor_override=2), False),
    grid=(lambda y, w: F.grid_sample(y, GRID, align_corners=False), False),
    border=(lambda y, w: F.grid_sample(y, GRID, padding_mode='border', align_corners=False), True),
    padded=(lambda y, w: F.pad(y, (1, 1, 1, 1), value=2.0), False),
)


@pytest.mark.parametrize('name', SPATIAL)
def test_positions_that_are_worked_on_with_other_numbers_get_no_constant(name):
    f, stays = SPATIAL[name]
    as_dense, as_silenced = read(f, nn.Conv2d(6, 2, 1))
    assert (as_dense if stays else as_silenced) < 1e-5
    assert max(as_dense, as_silenced) > 1e-2


class Sum(nn.Module):
    "What a function makes of two branches, whose channels are the same, read by a convolution."

    def __init__(self, f):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.b, self.m = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.k, self.c, self.f = nn.BatchNorm2d(6), nn.LazyConv2d(2, 1), f
        is_constant(self.n, -1)
        is_constant(self.m, 1.5)
        self.k.bias.data[0] = 1

    def forward(self, x):
        return self.c(self.f(self.n(self.a(x)), self.m(self.b(x)), self.k))


SUMS = dict(  # and whether readers see one function of the sum, times a number
    relu=(lambda a, b, k: (a + b).relu(), True),
    difference=(lambda a, b, k: (b - a).relu(), True),
    multiplied=(lambda a, b, k: 2 * (a + b).relu(), True),
    factors=(lambda a, b, k: torch.cat([(a + b).relu(), 3 * (a + b).relu()], 1), False),
    summand_too=(lambda a, b, k: torch.cat([(a + b).relu(), b.relu()], 1), False),
    normed=(lambda a, b, k: k(a + b).relu(), False),
    behind_silu=(lambda a, b, k: (F.silu(a) + b).relu(), False),
    behind_norm=(lambda a, b, k: (F.instance_norm(a) + b).relu(), False),
)


@pytest.mark.parametrize('name', SUMS)
def test_what_is_made_of_a_sum_decides_whether_its_constant_is_delivered(name):
    f, delivered = SUMS[name]
    torch.manual_seed(0)
    net, x = Sum(f).eval(), draw(16, 3, 4, 4)
    net(x)
    columns = list(range(0, net.c.weight.shape[1], 6))
    without_it = silenced(net, c=columns)
    assert gap(net, without_it, x) > 1e-2
    small = restore(net, x, keep=dict(a=range(1, 6)), restorer=with_mean(prune_only())).model
    assert gap(net if delivered else without_it, small, x) < 1e-5


# Taps that do not reach every position

GONE = [2, 3, 6, 7]


class OneReader(nn.Module):
    "Half of the channels are constants where the last layer reads them."

    def __init__(self, dims, reader):
        super().__init__()
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        self.a, self.n = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 8, 1), norms[dims - 1](8)
        self.o = reader
        with torch.no_grad():
            self.n.weight[GONE] = 0
            self.n.bias[GONE] = torch.tensor([1.0, 2, 0.5, 3])

    def forward(self, x):
        return self.o(F.relu(self.n(self.a(x))))


READERS = dict(
    transposed=(lambda: nn.ConvTranspose2d(8, 2, 4, stride=2, padding=1), (6, 6)),
    uneven=(lambda: nn.ConvTranspose1d(8, 2, 5, 3, 1, 1, dilation=2), (9,)),
    transposed_3d=(lambda: nn.ConvTranspose3d(8, 2, (2, 3, 1), stride=(2, 1, 2)), (2, 3, 2)),
    padded_1d=(lambda: nn.Conv1d(8, 2, 9, padding=4), (6,)),
    padded_2d=(lambda: nn.Conv2d(8, 2, (3, 5), padding=(1, 2), stride=2), (4, 4)),
    padded_3d=(lambda: nn.Conv3d(8, 2, 3, padding=1), (2, 4, 4)),
    grouped=(lambda: nn.Conv1d(8, 4, 5, padding=3, groups=2), (4,)),
    same=(lambda: nn.Conv1d(8, 2, 3, padding='same', dilation=2), (7,)),
    reflect=(lambda: nn.Conv1d(8, 2, 5, padding=2, padding_mode='reflect'), (6,)),
)
RESTORERS = dict(lbyl=CONSTANTS, gaussian=gaussian(), channels=probe(taps=False))


@pytest.mark.parametrize('how', RESTORERS)
@pytest.mark.parametrize('kind', READERS)
def test_a_bias_grows_by_what_constants_give_on_the_mean_over_positions(kind, how):
    torch.manual_seed(0)
    make, size = READERS[kind]
    net, x = OneReader(len(size), make()).eval(), draw(64, 3, *size)
    keep = [k for k in range(8) if k not in GONE]
    small = restore(net, x, keep=dict(a=keep), restorer=RESTORERS[how]).model
    pruned = copy.deepcopy(net)
    pruned.n.bias.data[GONE] = 0
    with torch.no_grad():
        want = (net(x) - pruned(x)).transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(small.o.bias - net.o.bias, want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('seed', range(4))
def test_a_generator_is_nearer_with_constants_than_without(seed):
    torch.manual_seed(seed)
    up = lambda i, o: nn.ConvTranspose2d(i, o, 4, 2, 1)
    first = [nn.Linear(5, 8 * 16), nn.Unflatten(1, (8, 4, 4)), nn.BatchNorm2d(8), nn.ReLU()]
    net = nn.Sequential(*first, up(8, 6), nn.BatchNorm2d(6), nn.ReLU(), up(6, 3), nn.Tanh())
    nn.init.normal_(net[7].weight, 0, 0.3)
    net, z = adaptive_bn(net, torch.randn(256, 5)), torch.randn(256, 5)

    def far(restorer):
        small = restore(net, z[:4], ratio=0.3, restorer=restorer).model
        with torch.no_grad():
            return (net(z) - small(z)).norm()

    assert far(None) < far(prune_only())
    assert far(gaussian()) < far(prune_only())
