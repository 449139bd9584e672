"Restorers that run the network: properties, edges, bad input, and trained networks on real images."
import copy

import pytest
import torch
from hypothesis import given
from torch import nn

from lbyl_nb import bench, data, models
from lbyl_nb.distilled import distil, distilled
from lbyl_nb.layerwise import layerwise, probe, probed_lbyl
from lbyl_nb.probe import RIDGES, calibration, held_out_error, held_out_ridge, noise
from lbyl_nb.recover import lbyl_restore, merging, plan, restore
from lbyl_nb.selection import least_lost
from test_recover import FEW, networks, out

MAKE = dict(channels=lambda s: probe(s, taps=False), taps=probe, consumers=lambda s: layerwise(s, refit=False), every_layer=layerwise, lbyl=probed_lbyl)


@pytest.mark.parametrize('name', MAKE)
@FEW
@given(networks())
def test_random_networks(name, drawn):
    "Any ratio gives a network of the wanted widths with finite outputs, and the model passed in is what it was."
    net, x = drawn
    state, r = copy.deepcopy(net.state_dict()), restore(net, x, ratio=.5, restorer=MAKE[name](noise(8)))
    assert out(r.model, x).isfinite().all() and out(r.model, x).shape == out(net, x).shape
    for k, v in net.state_dict().items(): assert torch.equal(v, state[k]), k
    assert {k: r.model.get_submodule(k).weight.shape[0] for k in r.plan} == {k: len(v) for k, v in r.plan.items()}


@pytest.mark.parametrize('name', MAKE)
@FEW
@given(networks())
def test_nothing_removed(name, drawn):
    "With every channel kept the network computes what it did."
    net, x = drawn
    small = lbyl_restore(net, x, ratio=0, restorer=MAKE[name](noise(8)))
    torch.testing.assert_close(out(small, x), out(net, x))


@FEW
@given(networks())
def test_criterion(drawn):
    "The criterion gives every group a plan of the right size."
    net, x = drawn
    kept = plan(net, x, .5, least_lost(noise(8)))
    assert {k: len(v) for k, v in kept.items()} == {k: len(v) for k, v in plan(net, x, .5).items()}


def simple(norm=True):
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize('name', MAKE)
def test_without_batch_norm(name):
    "Noise cannot be pinned there, and everything still works; distillation says that it cannot."
    net, x = simple(norm=False), torch.randn(2, 3, 8, 8)
    assert out(lbyl_restore(net, x, ratio=.5, restorer=MAKE[name](noise(16))), x).isfinite().all()
    with pytest.raises(ValueError, match='no batch norm with running statistics'): lbyl_restore(net, x, ratio=.5, restorer=MAKE[name](distilled(4)))


@pytest.mark.parametrize('name', MAKE)
def test_frozen_batch_norm(name):
    "A batch norm that does not learn and stays in evaluation mode is pinned like any other, and stays frozen."
    net, x = simple().train(), torch.randn(2, 3, 8, 8)
    net[1].eval().requires_grad_(False)
    small = lbyl_restore(net, x, ratio=.5, restorer=MAKE[name](noise(16)))
    assert not small[1].training and not small[1].weight.requires_grad and small[0].training and small[0].weight.requires_grad


class Several(nn.Module):
    "Tokens and an image."
    def __init__(self):
        super().__init__()
        self.tokens, self.image = nn.Embedding(10, 8), simple()
        self.a, self.b = nn.Linear(12, 9), nn.Linear(9, 2)
    def forward(self, tokens, image): return self.b(self.a(torch.cat([self.tokens(tokens).mean(1), self.image(image)], 1)).relu())


@pytest.mark.parametrize('name', MAKE)
@pytest.mark.parametrize('named', [True, False])
def test_several_inputs(name, named):
    net, given_ = Several().eval(), dict(tokens=torch.tensor([[0, 9, 3]]), image=torch.randn(1, 3, 8, 8))
    small = lbyl_restore(net, given_ if named else tuple(given_.values()), ratio=.5, restorer=MAKE[name](noise(12)))
    assert small(**given_).isfinite().all() and small.a.out_features == 4


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    "Half precision is left for the probes: activations of 1e5 do not overflow, and the result comes back in the model's type."
    net = simple()
    net[1].weight.data.fill_(3e4)
    net, x = net.to(dtype), torch.randn(2, 3, 8, 8).to(dtype)
    small = lbyl_restore(net, x, ratio=.5, restorer=layerwise(noise(16)))
    assert all(v.dtype == dtype and v.isfinite().all() for v in small.state_dict().values() if v.is_floating_point())


@pytest.mark.parametrize('name', MAKE)
def test_dead_channels_and_few_probes(name):
    "A dead channel gives a zero row in the Gram matrix, two probes far fewer equations than unknowns; the answer is finite."
    net, x = simple(), torch.randn(2, 3, 8, 8)
    net[1].weight.data[:4], net[1].bias.data[:4] = 0, -1
    for p in net.parameters(): assert p.isfinite().all()
    small = lbyl_restore(net, x, ratio=.5, restorer=MAKE[name](noise(2)))
    assert out(small, x).isfinite().all()


def test_nan_names_the_layer():
    net = simple()
    with pytest.raises(ValueError, match='^3: NaN or infinity met while probing'):
        lbyl_restore(net, torch.zeros(1, 3, 8, 8), ratio=.5, restorer=layerwise(calibration(torch.full((4, 3, 8, 8), float('nan')))))


def test_wrong_images():
    with pytest.raises((ValueError, RuntimeError), match='channels'):
        lbyl_restore(simple(), torch.zeros(1, 3, 8, 8), ratio=.5, restorer=layerwise(calibration(torch.zeros(4, 1, 8, 8))))


@pytest.fixture(scope='module')
def resnet(data_dir, weights_dir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LBYL_WEIGHTS', str(weights_dir))
        yield models.pretrained('resnet20_cifar10'), data.subset(data.load('cifar10', 'test'), 1000)


def test_noise_restores_resnet20(resnet):
    "Half of the channels gone: noise through the pinned network, layer by layer, is far beyond neuron merging, and distilled probes beyond noise."
    net, images = resnet
    def right(r): return bench.accuracy(lbyl_restore(net, torch.zeros(1, 3, 32, 32), ratio=.5, restorer=r), images, *data.STATS['imagenet'])[0]
    merged, noisy, made = right(merging()), right(layerwise(noise(64), refit=False)), right(layerwise(distilled(64, steps=20, reflect=True)))
    assert noisy > merged + 150 and made > noisy + 30, (merged, noisy, made)


@pytest.mark.parametrize('make', [probe, layerwise])
def test_the_search_for_a_ridge_ends_at_the_best(resnet, make, monkeypatch):
    "For every regression of a trained network, walking downhill from the middle finds what trying all ridges finds."
    search, found = held_out_ridge, []
    def both(halves, prior):
        found.append((search(halves, prior), min(RIDGES, key=lambda r: held_out_error(halves, prior, r))))
        return found[-1][0]
    monkeypatch.setattr('lbyl_nb.probe.held_out_ridge', both)
    lbyl_restore(resnet[0], torch.zeros(1, 3, 32, 32), ratio=.5, restorer=make(noise(64)))
    assert len(found) >= 9 and len({a for a, _ in found}) > 1 and all(a == b for a, b in found), found


def test_distillation_matches_statistics(resnet):
    "The loss falls by a factor of more than five in twenty steps."
    log = []
    distil(resnet[0], (torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)),), 20, log=log)
    assert log[-1][1] < log[0][1] / 5
