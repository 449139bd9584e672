"""Convolutions that are given a single image or sequence, without a dimension of samples.

Half of the channels of the first layer are copies of the others, so that nothing may change
without them.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lbyl_nb.layerwise import layerwise, probe, probed_lbyl
from lbyl_nb.least_lost import least_lost
from lbyl_nb.probes import calibration
from lbyl_nb.recover import restore
from lbyl_nb.restorers import merging


class Tokens(nn.Module):
    "One sequence (length, features), which convolutions read as (features, length)."

    def __init__(self, first=nn.Conv1d):
        super().__init__()
        self.a = nn.Linear(4, 16) if first is nn.Linear else nn.Conv1d(4, 16, 3, padding=1)
        self.b, self.o = nn.Conv1d(16, 12, 3, padding=1), nn.Linear(12, 3)

    def forward(self, x):
        y = self.a(x).t() if isinstance(self.a, nn.Linear) else self.a(x.t())
        return self.o(F.relu(self.b(F.relu(y))).t())


class First(nn.Module):
    "The first image of a batch alone."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3), nn.Linear(12, 3)

    def forward(self, x):
        return self.o(F.relu(self.b(F.relu(self.a(x[0])))).mean((-2, -1)))[None]


NETWORKS = dict(
    tokens=(Tokens, (64, 4)),
    behind_linear=(lambda: Tokens(nn.Linear), (64, 4)),
    image=(First, (4, 3, 20, 20)),
    square=(First, (16, 3, 20, 20)),  # as many samples as channels
)
RESTORERS = dict(
    merging=lambda x: merging(),
    layerwise=lambda x: layerwise(calibration(x), ridge=1e-9),
    consumers_alone=lambda x: layerwise(calibration(x), refit=False, ridge=1e-9),
    probe=lambda x: probe(calibration(x), ridge=1e-9),
    channels=lambda x: probe(calibration(x), taps=False, ridge=1e-9),
)


def twins(name):
    "A network whose last eight channels of eight pairs are copies, and its input."
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    net, x = make().eval(), torch.randn(shape)
    with torch.no_grad():
        net.a.weight[8:], net.a.bias[8:] = net.a.weight[:8].clone(), net.a.bias[:8].clone()
    return net, x


@pytest.mark.filterwarnings('ignore:b. is given a single sample')
@pytest.mark.parametrize('how', RESTORERS)
@pytest.mark.parametrize('name', NETWORKS)
def test_copies_are_removed_without_loss(name, how):
    net, x = twins(name)
    small = restore(net, x, keep={'a': range(8)}, restorer=RESTORERS[how](x)).model
    assert small.b.in_channels == 8
    other = torch.randn_like(x)
    with torch.no_grad():
        torch.testing.assert_close(small(other), net(other), rtol=1e-3, atol=1e-4)


def test_it_is_said_which_layer_is_given_no_samples():
    net, x = twins('tokens')
    with pytest.warns(UserWarning, match='b: is given a single sample'):
        restore(net, x, keep={'a': range(8)}, restorer=layerwise(calibration(x)))


@pytest.mark.parametrize('name', NETWORKS)
def test_a_criterion_that_looks_at_readers_removes_one_of_two_copies(name):
    net, x = twins(name)
    how = dict(criterion=least_lost(calibration(x), ridge=1e-6), restorer=probed_lbyl())
    kept = restore(net, x, ratio={'a': 0.5}, **how).plan['a']
    assert sorted(k % 8 for k in kept) == list(range(8))
