"What networks keep between calls, how they call their layers, and arguments that are refused."

import copy
import math
import random
import threading

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from conftest import MoreState
from torch import nn

from lbyl_nb.cost import cost
from lbyl_nb.data import Dataset
from lbyl_nb.distilled import distilled
from lbyl_nb.files import write_safetensors
from lbyl_nb.finetune import Recipe, finetune, fresh
from lbyl_nb.fisher import _answers
from lbyl_nb.layers import keeping_state
from lbyl_nb.layerwise import layerwise, probe, probed_lbyl
from lbyl_nb.probes import calibration, noise
from lbyl_nb.pruned_elsewhere import restore_inside
from lbyl_nb.recover import plan, restore
from lbyl_nb.restorers import lbyl, merging, prune_only
from lbyl_nb.saved import load_restored, save_restored
from lbyl_nb.sensitivity import sensitivity

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
WAYS = dict(prune_only=prune_only(), probe=probe(), layerwise=layerwise(), default=None)


class Remembers(nn.Module):
    "Counts its calls, keeps means of what it reads and makes, and fills a table when first called."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3), nn.Linear(8, 4)
        self.register_buffer('calls', torch.tensor(0))
        self.register_buffer('mean', torch.zeros(3))
        self.register_buffer('made', torch.zeros(8))
        self.count, self.seen, self.table, self.last = 0, [], None, None

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.seen.append(len(x))
        self.mean.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        h = F.relu(self.a(x))
        if self.table is None:
            self.table = torch.linspace(0, 1, h.shape[-1]).expand_as(h[:1]).clone()
        h = F.relu(self.b(h + self.table)).mean((2, 3))
        self.made = 0.9 * self.made + 0.1 * h.detach().mean(0)
        return self.o(h - self.made)


class Draws(nn.Sequential):
    "Uses the global generators of NumPy, Python and PyTorch, and keeps what it computed last."

    def forward(self, x):
        drawn = np.random.rand() + random.random() + torch.rand(())
        self.last = self[1](self[0](x)) + 1e-3 * drawn
        return self[4](self[3](self[2](self.last)))


def with_copies(net):
    "Let the second half of the filters of two layers repeat the first half."
    for layer in (net.a, net.b):
        half = len(layer.weight) // 2
        layer.weight.data[half:], layer.bias.data[half:] = layer.weight[:half], layer.bias[:half]
    return net.eval()


def state_of(net):
    held = net.count, list(net.seen), net.table is None
    return held, {k: v.clone() for k, v in net.state_dict().items()}


def same(a, b):
    equal = a[1].keys() == b[1].keys() and all(torch.equal(v, b[1][k]) for k, v in a[1].items())
    return a[0] == b[0] and equal


@pytest.mark.parametrize('way', WAYS)
def test_what_a_network_keeps_is_neither_moved_nor_taken_from_probes(way):
    torch.manual_seed(0)
    net = with_copies(Remembers())
    with torch.no_grad():
        net(X)
    net.table = None
    before = state_of(net)
    r = restore(net, X, ratio=0.5, restorer=WAYS[way])
    assert same(state_of(net), before)
    assert len(r.plan['a']) == 6 and len(r.plan['b']) == 4
    small = state_of(r.model)
    assert small[0] == before[0]
    for k in ('calls', 'mean'):
        assert torch.equal(small[1][k], before[1][k]), k
    assert torch.equal(small[1]['made'], before[1]['made'][r.plan['b']])


def test_no_other_entry_moves_it():
    torch.manual_seed(0)
    net = with_copies(Remembers())
    before = state_of(net)
    plan(net, X, 0.5)
    restore(net, X, macs=0.6)
    assert same(state_of(net), before)
    whole = nn.Sequential(nn.Identity(), net)
    r = restore_inside(whole, '1', X, ratio=0.5, restorer=prune_only())
    assert same(state_of(net), before) and state_of(r.model[1])[0] == before[0]


OF_NUMBERS = dict(
    restore=lambda net, x: restore(net, x, ratio=0.5),
    budget=lambda net, x: restore(net, x, macs=0.5),
    sensitivity=sensitivity,
    cost=cost,
    restore_inside=lambda net, x: restore_inside(nn.Sequential(net), '0', x, ratio=0.5),
)


@pytest.mark.parametrize('way', OF_NUMBERS)
def test_no_global_generator_moves_and_activations_may_be_kept(way):
    "Those that a network keeps have a history, and cannot be copied as they are."
    layers = nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
    net, x = Draws(*layers).eval(), torch.randn(4, 5)
    net(x)
    kept, state = net.last, (random.getstate(), torch.get_rng_state(), np.random.get_state()[1:])
    OF_NUMBERS[way](net, x)
    assert net.last is kept and kept.grad_fn is not None
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert all(map(np.array_equal, np.random.get_state()[1:], state[2]))


class Seen(nn.Sequential):
    "Keeps its features of the last pass, with their history."

    def forward(self, x):
        self.last = self[1](self[0](x))
        return self[4](self[3](self[2](self.last)))


def finetuned(net, x):
    few = Dataset(torch.zeros(8, 3, 9, 9, dtype=torch.uint8), torch.arange(8) % 2)
    finetune(net, few, teacher=net, recipe=Recipe(1, batch=4))


OF_IMAGES = dict(
    finetune=finetuned,
    fresh=lambda net, x: fresh(net),
    distilled=lambda net, x: distilled(4, 2)(net, (x,)),
)


@pytest.mark.parametrize('way', OF_IMAGES)
def test_trained_networks_keep_their_activations(way):
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    net = Seen(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(196, 2))
    net(X)
    kept = net.last
    OF_IMAGES[way](net, X)
    assert net.last is kept and kept.grad_fn is not None


def test_copies_of_channels_are_exact_also_for_what_is_kept(tmp_path):
    "From the same state on, two calls of both networks."
    torch.manual_seed(0)
    net = with_copies(Remembers())
    keep = dict(a=list(range(6)), b=list(range(4)))
    r = restore(net, X, keep=keep, restorer=layerwise(refit=False))
    assert r.plan == keep
    save_restored(r.model, r.plan, tmp_path / 'net.safetensors')
    again = load_restored(net, X, tmp_path / 'net.safetensors')
    nets = [copy.deepcopy(net), r.model, again]
    for x in (X, X.flip(0) + 1):
        with torch.no_grad():
            want, *others = (m(x) for m in nets)
        for y in others:
            torch.testing.assert_close(y, want, rtol=1e-3, atol=1e-4)


def test_a_norm_that_always_adapts_keeps_its_statistics():
    class Adapts(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(True)

    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), Adapts(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten()
    net = nn.Sequential(*layers, nn.Linear(150, 4)).eval()
    net[1].running_mean.normal_()
    mean = net[1].running_mean.clone()
    r = restore(net, X, ratio=0.5, restorer=prune_only())
    assert torch.equal(net[1].running_mean, mean)
    assert torch.equal(r.model[1].running_mean, mean[r.plan['0']])


def test_a_network_that_keeps_what_it_trained_on_is_compared():
    torch.manual_seed(0)

    class Keeps(nn.Sequential):
        def forward(self, x):
            self.last = [super().forward(x)]
            return self.last[0]

    net = Keeps(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(150, 4))
    net(X)
    last = net.last
    assert math.isfinite(restore(net, X, ratio=0.5, restorer=prune_only()).divergence)
    assert net.last is last and last[0].requires_grad


class Calls(nn.Module):
    "Layers that are given their input by position, or by name, and sizes of what they give."

    def __init__(self, named):
        super().__init__()
        self.named = named
        self.a, self.n, self.b = nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=0 if named else 1)
        self.g, self.o = nn.GroupNorm(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        if not self.named:
            y = F.relu(self.up(F.relu(self.g(self.b(F.relu(self.n(self.a(x))))))))
            return self.o(y.mean((2, 3)))
        y = self.g(input=self.b(input=F.relu(self.n(input=self.a(input=x)))))
        y = F.relu(self.up(output_size=x.shape[-2:], input=F.relu(y)))
        return self.o(input=y.mean((2, 3)))


RUN = dict(
    probe=probe(),
    layerwise=layerwise(noise(32)),
    distilled=layerwise(distilled(32, steps=3)),
    probed_lbyl=probed_lbyl(),
    default=None,
)


@pytest.mark.parametrize('way', RUN)
def test_input_by_name_is_input_by_position(way):
    torch.manual_seed(0)
    nets = Calls(named=True), Calls(named=False)
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(2, 3, 10, 10)
    one, other = (restore(m.eval(), x, macs=0.5, restorer=RUN[way]).model for m in nets)
    torch.testing.assert_close(one(x), other(x))
    assert len(one.b.weight) < 8 or len(one.a.weight) < 12


def test_answers_begin_with_the_same_state():
    net = Remembers().eval()
    probes = noise(32)(net, (X,))
    one, other = (torch.cat(_answers(probes.model, probes)) for _ in range(2))
    assert torch.equal(one, other)


class Small(nn.Sequential):
    "Two convolutions and a classifier."

    def __init__(self):
        torch.manual_seed(0)
        body = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()
        super().__init__(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
        self.eval()


HOW = dict(ratio=0.5, restorer=prune_only())
COUNT = dict(restorer=prune_only())
BAD = [  # arguments, the error, and what its message must name
    (COUNT | dict(keep={'0': 3}), TypeError, 'keep: 0 must be a list'),
    (COUNT | dict(keep={'0': None}), TypeError, 'keep: 0 must be a list'),
    (COUNT | dict(keep={'0': torch.tensor(3)}), TypeError, 'keep: 0 must be a list'),
    (COUNT | dict(keep={'0': [True]}), TypeError, 'keep: 0 has indices that are not integers'),
    (COUNT | dict(keep={0: [1]}), TypeError, 'keep: layers are named by strings, got 0'),
    (COUNT | dict(ratio={0: 0.5}), TypeError, 'ratio: layers are named by strings, got 0'),
    (COUNT | dict(macs='x'), TypeError, "macs must be a number, got 'x'"),
    (COUNT | dict(params='x'), TypeError, "params must be a number, got 'x'"),
    (COUNT | dict(macs=True), TypeError, 'macs must be a number, got True'),
    (HOW | dict(restorer=5), TypeError, 'restorer must be .* got 5'),
    (HOW | dict(restorer='lbyl'), TypeError, "restorer must be .* got 'lbyl'"),
    (HOW | dict(restorer=lbyl), TypeError, r'restorer: .*call it: lbyl\(\)'),
    (HOW | dict(restorer=prune_only), TypeError, r'restorer: .*call it: prune_only\(\)'),
    (HOW | dict(restorer=layerwise), TypeError, r'restorer: .*call it: layerwise\(\)'),
    (HOW | dict(restorer=nn.ReLU()), TypeError, 'restorer: ReLU is no function of channels'),
    (HOW | dict(restorer=noise()), TypeError, 'restorer: .* a source of probes, not a restorer'),
    (HOW | dict(restorer=lambda ch, keep: None), TypeError, 'restorer: gives NoneType for 0'),
    (HOW | dict(restorer=lambda ch, keep: ch.W), TypeError, 'restorer: gives Tensor for 0'),
    (HOW | dict(criterion=5), TypeError, 'criterion must be a function'),
    (HOW | dict(criterion='l2'), TypeError, "criterion must be a function .* got 'l2'"),
    (COUNT | dict(macs=0.5, criterion='l2'), TypeError, "criterion must be a function .* got 'l2'"),
    (HOW | dict(criterion=lambda ch: [1.0] * len(ch)), TypeError, 'criterion: gives list for 0'),
    (HOW | dict(criterion=lambda ch: np.ones(len(ch))), TypeError, 'criterion: gives ndarray'),
    (HOW | dict(criterion=lambda ch: torch.ones(3)), ValueError, r'criterion: gives \(3,\) for 0'),
    (HOW | dict(dtype=torch.float16), ValueError, 'dtype must be torch.float64 or torch.float32'),
    (HOW | dict(dtype='float64'), ValueError, 'dtype must be torch.float64 or torch.float32'),
    (HOW | dict(restorer=layerwise(calibration(X[:, :2]))), ValueError, 'images: the model cannot'),
    (HOW | dict(restorer=layerwise(calibration(X[0]))), ValueError, 'images: the model cannot'),
]


@pytest.mark.parametrize('how, error, says', BAD, ids=[v[2][:40] for v in BAD])
def test_arguments_are_refused_by_name(how, error, says):
    with pytest.raises(error, match=says):
        restore(Small(), X, **how)


def test_numbers_of_numpy_are_numbers():
    want = restore(Small(), X, ratio=0.5, restorer=prune_only())
    assert restore(Small(), X, ratio=np.float32(0.5), restorer=prune_only()).plan == want.plan
    keep = {k: list(np.array(v)) for k, v in want.plan.items()}
    r = restore(Small(), X, keep=keep, restorer=prune_only())
    assert r.plan == want.plan and torch.equal(r.model(X), want.model(X))


def test_weights_of_restorers_are_numbers():
    for make, name in (
        (lambda: lbyl(lam1='a'), 'lam1'),
        (lambda: lbyl(lam2='a'), 'lam2'),
        (lambda: layerwise(ridge='x'), 'ridge'),
        (lambda: merging(cos_weight='x'), 'cos_weight'),
        (lambda: merging(threshold='x'), 'threshold'),
    ):
        with pytest.raises(TypeError, match=f'{name} must be a number'):
            make()


def test_files_are_refused_by_name(tmp_path):
    net, path = Small(), tmp_path / 'net.safetensors'
    r = restore(net, X, ratio=0.5, restorer=prune_only())
    for model, plan_, error, says in (
        (r.model, None, TypeError, 'plan must be a dict'),
        (r.model, {'0': None}, TypeError, 'plan must be a dict'),
        (r.model, {'0': [0, 1, 2]}, ValueError, 'plan: 0 has 4 channels .* keeps 3'),
        (r.model, {'stem': [0]}, ValueError, "plan: the model has no layer 'stem'"),
        (r.model.state_dict(), r.plan, TypeError, 'model must be a torch.nn.Module'),
    ):
        with pytest.raises(error, match=says):
            save_restored(model, plan_, path)
        assert not path.exists()
    save_restored(r.model, r.plan, path)
    with pytest.raises(TypeError, match='model must be a torch.nn.Module'):
        load_restored(None, X, path)
    write_safetensors(r.model.state_dict(), path, dict(format='lbyl_nb.restored.1'))
    with pytest.raises(ValueError, match='net.safetensors: holds no plan'):
        load_restored(net, X, path)


def test_weights_that_lie_elsewhere_are_not_copied(monkeypatch):
    copied = []
    monkeypatch.setattr(torch.Tensor, '__deepcopy__', lambda self, memo: copied.append(self.shape))
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    net[0].register_buffer('mask', torch.ones(5))
    x = torch.randn(2, 3)
    want = net(x)
    cpu_offload(net, execution_device=torch.device('cpu'))
    with keeping_state(net):
        assert torch.equal(net(x), want)
    assert copied == [(5,)]


class Installs(nn.Module):
    "Puts a hook on its layer when it is first called, and remembers that it has; holds a lock."

    def __init__(self):
        super().__init__()
        self.layer, self.installed = nn.Linear(3, 3), False
        self.lock = threading.Lock()

    def forward(self, x):
        if not self.installed:
            self.layer.register_forward_hook(lambda m, i, y: y + 1)
            self.installed = True
        return self.layer(x)


def test_hooks_that_a_network_installs_are_not_installed_twice():
    net, x = Installs().eval(), torch.randn(2, 3)
    want = net.layer(x) + 1
    for _ in range(2):
        with keeping_state(net):
            assert torch.equal(net(x), want) and torch.equal(net(x), want)
        assert not net.installed and not net.layer._forward_hooks
    assert torch.equal(net(x), want)


class Labels(nn.Sequential):
    "Puts out the class alone."

    def forward(self, x):
        return super().forward(x).argmax(1)


class Versioned(MoreState, nn.Linear):
    pass


def chain(first=nn.Linear):
    return first(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)


def test_what_gives_no_numbers_or_has_another_state_is_refused(tmp_path):
    x = torch.randn(4, 5)
    labels = Labels(*chain()).eval()
    for f in (sensitivity, lambda net, x: restore(net, x, macs=0.5)):
        with pytest.raises(ValueError, match='puts out no floating-point numbers'):
            f(labels, x)
    with pytest.raises(TypeError, match='ratios must be several, .* got 0.3'):
        sensitivity(nn.Sequential(*chain()), x, ratios=0.3)
    r = restore(nn.Sequential(*chain(Versioned)).eval(), x, ratio=0.5)
    with pytest.raises(ValueError, match='0._extra_state is no tensor but dict'):
        save_restored(r.model, r.plan, tmp_path / 'net')
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('way', [dict(ratio=0.5), dict(macs=0.5)])
def test_a_network_made_in_inference_mode_can_be_trained_afterwards(way):
    x = torch.randn(4, 5)
    with torch.inference_mode():
        net = nn.Sequential(*chain()).eval()
        net[2].weight[:, 4:] = 0
    r = restore(net, x, **way)
    r.model(x).sum().backward()
    assert all(p.grad is not None for p in r.model.parameters())
    same = restore(net, x, keep={'0': [0, 1, 2, 3]}, restorer=prune_only()).model
    with torch.inference_mode():
        torch.testing.assert_close(same(x), net(x))


class Deaf(nn.Module):
    "A stream whose last layer nothing reads, with it or without it, as WaveNet has it."

    def __init__(self, last):
        super().__init__()
        self.a, self.c = nn.Linear(5, 8), nn.Linear(8, 3)
        self.last = nn.Linear(8, 5) if last else None

    def forward(self, x):
        y = self.a(x).relu()
        if self.last is not None:
            x = x + self.last(y)
        return self.c(y)


def test_a_layer_that_is_read_by_nobody_loses_nothing():
    "The losses are those of the network without it."
    torch.manual_seed(0)
    deaf, plain, x = Deaf(True).eval(), Deaf(False).eval(), torch.randn(4, 5)
    deaf.load_state_dict(plain.state_dict(), strict=False)
    have, want = sensitivity(deaf, x), sensitivity(plain, x)
    pd.testing.assert_frame_equal(have.loc[['a']], want.loc[['a']], rtol=1e-3)
    assert len(restore(deaf, x, macs=0.5).plan['a']) < 8


def test_a_transposed_convolution_may_get_a_bias(tmp_path):
    "Its weight has inputs first; what was written can be read."
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 5, 2, 2, bias=False)
    net, x = nn.Sequential(*layers, nn.Sigmoid()).eval(), torch.randn(8, 3, 6, 6)
    r = restore(net, x, ratio=0.5, restorer=layerwise(calibration(x)))
    assert r.model[2].bias is not None and r.model[2].weight.shape[:2] == (4, 5)
    save_restored(r.model, r.plan, tmp_path / 'net.safetensors')
    again = load_restored(net, x, tmp_path / 'net.safetensors')
    with torch.no_grad():
        torch.testing.assert_close(again(x), r.model(x))
