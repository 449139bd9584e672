"""Strategies in networks of many shapes, against loops and sums by hand.

And what ADMM does to weights, and bad input.
"""

import copy
import importlib
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lbyl_nb.bench import accuracy, train
from lbyl_nb.cost import cost
from lbyl_nb.data import crop_flip, digits, normalise, subset
from lbyl_nb.files import read_safetensors, write_safetensors
from lbyl_nb.finetune import Recipe, finetune
from lbyl_nb.graph import find_groups
from lbyl_nb.layerwise import layerwise
from lbyl_nb.least_lost import least_lost
from lbyl_nb.models import digits_net, initialised, resnet20
from lbyl_nb.probes import calibration
from lbyl_nb.recover import plan, restore
from lbyl_nb.restorers import prune_only
from lbyl_nb.strategies import (
    _mac_fraction,
    _map_ranks,
    _projected,
    _Split,
    _Walk,
    _walked,
    _within_budget,
    adaptive_bn,
    admm,
    amc,
    contribution_gram,
    eagleeye,
    greedy_order,
    hrank,
    joined_parameters,
    thinet,
)
from lbyl_nb.trace import trace

Accelerator(cpu=True)  # the first one decides for all
MODULE = importlib.import_module('lbyl_nb.layerwise')  # the package has a function of that name


def randomised(net, seed=0):
    "The network in evaluation mode, with batch norms that do something."
    gen = torch.Generator().manual_seed(seed)

    def rand(v, low, high):
        v.data.copy_(low + (high - low) * torch.rand(v.shape, generator=gen))

    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            rand(m.weight, 0.5, 1.5)
            rand(m.bias, -0.5, 0.5)
            rand(m.running_mean, -0.3, 0.3)
            rand(m.running_var, 0.5, 2)
    return net.eval()


def kept_as(net, before):
    "Whether the state of a network is what it was."
    return all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def sizes(kept):
    "How many channels a plan keeps, layer by layer."
    return {k: len(v) for k, v in kept.items()}


class Joined(nn.Module):
    """Two branches added, two concatenated.

    And a depthwise and a transposed convolution, PReLU, a flattening.
    """

    def __init__(self):
        super().__init__()

        def conv(m, n, k=3, groups=1):
            layer = nn.Conv2d(m, n, k, padding=k // 2, groups=groups, bias=False)
            return nn.Sequential(layer, nn.BatchNorm2d(n))

        self.stem, self.a, self.b = conv(2, 6), conv(6, 6), conv(6, 6, 1)
        self.wide, self.depth, self.act = conv(6, 8), conv(8, 8, groups=8), nn.PReLU(8)
        self.up = nn.ConvTranspose2d(8, 5, 2, 2)
        self.other = nn.Conv2d(8, 4, 3, 2, 1, padding_mode='reflect')
        self.last, self.head = nn.Conv2d(9, 3, 1), nn.Linear(3 * 16, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.a(x) + self.b(x))
        x = self.act(self.depth(F.relu(self.wide(x))))
        x = torch.cat([F.relu(self.up(x)[:, :, ::4, ::4]), F.relu(self.other(x))], 1)
        return self.head(F.relu(self.last(x)).flatten(1))


def plain():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 9, 7),
        nn.ReLU(),
        nn.Linear(7, 3),
    )


NETWORKS = {
    'joined': (Joined, (2, 8, 8)),
    'plain': (plain, (2, 8, 8)),
    'resnet20': (resnet20, (3, 8, 8)),
    'digits': (lambda: digits_net(3), (1, 8, 8)),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    "A network with its images and all groups that can be pruned, streams too."
    build, shape = NETWORKS[request.param]
    net = randomised(initialised(build, 0)).double()
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    traced = trace(net, x)
    return net, x, traced, [g for g in find_groups(traced, streams=True) if not g.reason]


def inputs_of(net, names, x):
    "What layers read."
    seen = {}
    see = lambda k: lambda m, inputs, output: seen.update({k: inputs[0]})
    hooks = [net.get_submodule(k).register_forward_hook(see(k)) for k in names]
    with torch.no_grad():
        net(x)
    for h in hooks:
        h.remove()
    return seen


def contributions(net, group, x):
    "(m, outputs of all consumers): what each channel alone adds to them, by calling the layers."
    read, rows = inputs_of(net, [c.name for c in group.consumers], x), []
    for j in range(group.channels):
        parts = []
        for c in group.consumers:
            layer, v, at = net.get_submodule(c.name), read[c.name], c.columns[j]
            dim = -1 if isinstance(layer, nn.Linear) else 1
            only = torch.zeros_like(v).index_copy(dim, at, v.index_select(dim, at))
            parts.append((layer(only) - layer(0 * v)).flatten())
        rows.append(torch.cat(parts))
    return torch.stack(rows).detach()


def added(y, gone, j):
    "Square of what is missing when channel j goes too."
    return y[[*gone, j]].sum(0).square().sum()


def naive_order(y):
    "ThiNet by its definition: next goes the channel with which the sum of the removed is smallest."
    gone = []
    while len(gone) < len(y):
        left = [j for j in range(len(y)) if j not in gone]
        gone.append(min(left, key=lambda j: added(y, gone, j).item()))
    return gone


def test_thinet_is_the_naive_loop(case):
    """In every group: several producers and consumers.

    Strides, reflections, transposed convolutions, flattenings.
    """
    net, x, traced, groups = case
    scores = thinet(x).scores(traced, groups)
    for g in groups:
        y = contributions(net, g, x)
        assert scores[g.name].argsort().tolist() == naive_order(y), g.name


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 999))
def test_greedy_order(m, d, seed):
    "Each step adds the least, of whatever rank the matrix is."
    y = torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = greedy_order(y @ y.T)
    assert sorted(order.tolist()) == list(range(m))
    gone = order.argsort().tolist()
    for n in range(m):
        least = min(added(y, gone[:n], j) for j in gone[n:]).item()
        taken = added(y, gone[:n], gone[n]).item()
        assert taken == pytest.approx(least, rel=1e-6, abs=1e-9)


def test_layers_too_wide_for_one_gram_matrix(monkeypatch):
    "Convolutions and linear layers whose taps do not fit go by outputs, with the same result."
    x = torch.randn(5, 6, 7, 7, dtype=torch.float64)
    for layer, v in ((nn.Conv2d(6, 4, 3, 2, 1), x), (nn.Linear(6, 4), x[..., 0])):
        for columns in (torch.arange(6)[:, None], torch.arange(6).view(3, 2)):
            by_taps = contribution_gram(layer.double(), v, columns)
            with monkeypatch.context() as patch:
                patch.setattr(MODULE, '_MOST_TAPS', 1)
                torch.testing.assert_close(contribution_gram(layer, v, columns), by_taps)


def test_hrank_by_hand():
    """Ranks of conv, batch norm and ReLU before the pooling.

    And of a depthwise convolution behind them, and the mean over the branches of a stream.
    """
    net = randomised(initialised(Joined, 0), 3).double()
    x = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[:, :, 3:] = x[:, :, 2:3]

    def rank(z):
        ranks = [[torch.linalg.matrix_rank(channel).item() for channel in image] for image in z]
        return torch.tensor(ranks, dtype=torch.float64).mean(0)

    with torch.no_grad():
        stem = F.relu(net.stem(x))
        added = F.relu(net.a(stem) + net.b(stem))
        wide = net.depth(F.relu(net.wide(added)))
        want = {
            'stem.0': rank(stem),
            'a.0': (rank(F.relu(net.a(stem))) + rank(F.relu(net.b(stem)))) / 2,
            'up': rank(F.relu(net.up(net.act(wide)))),
        }
    traced = trace(net, x)
    groups = [g for g in find_groups(traced, streams=True) if g.name in want]
    scores = hrank(x).scores(traced, groups)
    assert scores.keys() == want.keys()
    for k in want:
        torch.testing.assert_close(scores[k], want[k])
    assert len({v for s in scores.values() for v in s.tolist()}) > 5
    z = torch.randn(3, 4, 5, 6)
    z[:, 1, :, 2:] = 0
    z[1, 2] = 0
    assert _map_ranks(z).tolist() == [15, 6, 10, 15]


@pytest.mark.parametrize('make', [thinet, hrank])
def test_criteria_in_plan_and_restore(make):
    """With ratio and dict, in `plan` and in `restore`, on tensors, tuples and dicts.

    The network and the caller's random numbers stay.
    """
    net, x = randomised(initialised(resnet20, 0)), torch.randn(4, 3, 8, 8)
    before, drawn = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    kept = plan(net, x[:1], 0.5, make(x))
    assert {len(v) for k, v in kept.items() if k.startswith('layer1')} == {8}
    assert plan(net, x[:1], 0.5, make((x,))) == kept
    assert plan(net, dict(x=x[:1]), 0.5, make(dict(x=x))) == kept
    ratio = {'layer1.0.conv1': 0.25, 'layer2.1.conv1': 0.75}
    how = dict(criterion=make(x), restorer=layerwise(calibration(x)))
    r = restore(net, x[:1], ratio=ratio, **how)
    assert sizes(r.plan) == {'layer1.0.conv1': 12, 'layer2.1.conv1': 8}
    assert kept_as(net, before)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize('make', [thinet, hrank])
def test_criteria_for_streams(make):
    net, x = randomised(Joined()), torch.randn(4, 2, 8, 8)
    ratio = {g.name: 0.5 for g in find_groups(trace(net, x), streams=True) if not g.reason}
    how = dict(criterion=make(x), restorer=prune_only(), streams=True)
    r = restore(net, x, ratio=ratio, **how)
    assert len(r.plan['a.0']) == 3
    assert r.model(x).shape == (4, 10)


@pytest.mark.parametrize('make', [thinet, hrank])
def test_criteria_name_what_is_wrong_with_images(make):
    net, x = randomised(initialised(resnet20, 0)), torch.randn(4, 3, 8, 8)
    with pytest.raises(ValueError, match='images: there are none'):
        make(x[:0])
    with pytest.raises(ValueError, match='NaN or infinity met on the images'):
        plan(net, x[:1], 0.5, make(x * torch.inf))


def test_hrank_names_layers_without_maps():
    net, x = plain(), torch.randn(3, 2, 8, 8)
    with pytest.raises(ValueError, match='4: hrank needs feature maps'):
        plan(net, x, 0.5, hrank(x))
    assert len(plan(net, x, {'0': 0.5}, hrank(x))['0']) == 3


def test_thinet_keeps_repetitions_and_least_lost_does_not():
    net, x = plain(), torch.randn(40, 2, 8, 8)
    with torch.no_grad():
        for t in (net[0].weight, net[0].bias):
            t[:3] *= 4
            t[3:] *= 0.1
            t[1] = t[0]
        by_channel = net[4].weight.view(7, 6, 9)
        by_channel[:, 1] = by_channel[:, 0]
    kept = lambda criterion: plan(net, x, {'0': 0.5}, criterion)['0']
    assert kept(thinet(x)) == [0, 1, 2]
    assert len({0, 1} & {*kept(least_lost(calibration(x), 1e-4))}) == 1


def normalised(y, norm):
    "What a batch norm in training mode makes of a batch."
    deviation = (y.var((0, 2, 3), correction=0, keepdim=True) + norm.eps).sqrt()
    y = (y - y.mean((0, 2, 3), keepdim=True)) / deviation
    return y * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


@pytest.mark.parametrize('batch, parts', [(30, 1), (10, 3), (11, 3), (8, 4)])
def test_adaptive_bn_by_hand(batch, parts):
    "Statistics of all images, the second norm reading what the first makes of each batch."
    front = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    behind = [nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.9)]
    net = randomised(nn.Sequential(*front, *behind)).double()
    x = torch.randn(30, 2, 8, 8)
    net.train()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    done, ys, zs = adaptive_bn(net, x, batch), [], []
    pieces = x.double().tensor_split(parts)
    lengths = [len(v) for v in pieces]
    assert max(lengths) <= batch
    assert max(lengths) - min(lengths) <= 1
    for v in pieces:
        y = net[0](v)
        z = net[3](F.relu(normalised(y, net[1])))
        ys.append(y.detach())
        zs.append(z.detach())
    for norm, seen in ((done[1], torch.cat(ys)), (done[4], torch.cat(zs))):
        torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)))
        torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)))
    assert not any(m.training for m in done.modules())
    assert done[1].momentum == net[1].momentum
    assert kept_as(net, before)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), done.parameters()))


def test_adaptive_bn_without_batch_norm_and_with_bad_input():
    net, x = plain(), torch.randn(4, 2, 8, 8)
    assert kept_as(adaptive_bn(net, x), net.state_dict())
    for bad in (dict(images=x[:1]), dict(images=x, batch=1)):
        with pytest.raises(ValueError, match='images, batch: statistics need at least 2 samples'):
            adaptive_bn(net, **bad)
    with pytest.raises(ValueError, match='^images: there are none'):
        adaptive_bn(net, x[:0])


def test_macs_are_those_of_the_cut_network(case):
    "To the last product."
    net, x, traced, groups = case
    count, gen = _mac_fraction(traced, groups), torch.Generator().manual_seed(0)
    macs = cost(net, x)['macs']
    for _ in range(3):
        gone = [int(torch.randint(0, g.channels, (1,), generator=gen)) for g in groups]
        keep = {g.name: range(n, g.channels) for g, n in zip(groups, gone)}
        left = restore(net, x, keep=keep, restorer=prune_only()).cost.macs['after']
        have = count(torch.tensor([gone], dtype=torch.float64)).item()
        assert have == pytest.approx(left / macs, abs=1e-12)
    assert count(torch.zeros(1, len(groups), dtype=torch.float64)).item() == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.floats(0.1, 0.95), st.floats(0.3, 0.95), st.integers(0, 999))
def test_candidates_meet_the_budget(n, budget, most, seed):
    """At most the budget; nearly all of it is used; something stays of every group.

    A channel less removed in every group would exceed the budget.
    """
    gen = torch.Generator().manual_seed(seed)
    widths = torch.randint(1, 40, (n,), generator=gen).double()
    u = 1 - torch.rand(20, n, generator=gen, dtype=torch.float64)
    count = lambda gone: ((1 - gone / widths) * widths).sum(1) / widths.sum()
    try:
        gone = _within_budget(u, widths, count, budget, most)
    except ValueError as e:
        assert 'budget, most' in str(e)
        all_that_may_go = torch.minimum((widths * most).round(), widths - 1)
        assert count(all_that_may_go[None]) > budget
        return
    assert (count(gone) <= budget).all()
    assert (gone >= 0).all()
    assert (gone <= widths - 1).all()
    assert (gone <= widths * most + 0.5).all()
    assert (count((gone - 1).clamp(min=0))[gone.sum(1) > 0] > budget).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.floats(0.1, 0.95), st.floats(0.3, 0.95), st.integers(0, 999))
def test_walks_meet_the_budget(n, budget, most, seed):
    "Whatever the actions; with a unit more in the last group that lost any, no longer."
    gen = torch.Generator().manual_seed(seed)
    units = torch.randint(1, 40, (n,), generator=gen).double()
    count = lambda gone: (units - gone).prod(1) / units.prod()
    largest = torch.minimum((units * most).round(), units - 1)
    if count(largest[None]) > budget:
        return
    walk = _Walk(units, largest, count, budget)
    gone, facts, actions = _walked(walk, lambda _: torch.rand((), generator=gen).item())
    assert count(gone[None]) <= budget
    assert (gone >= 0).all()
    assert (gone <= largest).all()
    last = gone.nonzero().max()
    assert count((gone - F.one_hot(last, n))[None]) > budget
    assert facts.shape == (n, 6)
    assert facts.min() >= 0
    assert facts.max() <= 1
    assert ((actions >= 0) & (actions <= 1)).all()


@pytest.fixture(scope='module')
def trained():
    "A network that can read digits, and its sets."
    train_set, test_set = digits()
    net = initialised(lambda: digits_net(4, offset=0.0), 0)
    net = train(net, train_set, epochs=6, lr=0.1, batch=64).eval()
    return net, train_set, test_set


IMAGE = torch.zeros(1, 1, 8, 8)


def test_amc(trained):
    """The best walk by held-out accuracy, which is that of the network restored.

    The same again; model and random numbers stay.
    """
    net, train_set, _ = trained
    before, drawn = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    how = dict(episodes=9, statistics=100, held_out=400, seed=3)
    found = amc(net, IMAGE, train_set, 0.4, **how)
    rows = found.candidates
    assert len(rows) == 9
    assert (rows.macs <= 0.4).all()
    assert rows.accuracy.nunique() > 1
    part = subset(train_set, 500, 3)
    by_images = layerwise(calibration(normalise(part[:100].images)))
    small = restore(net, IMAGE, keep=found.plan, restorer=by_images)
    assert accuracy(small.model, part[100:])[0] / 4 == rows.accuracy.max()
    left = small.cost.macs['after'] / small.cost.macs['before']
    assert left == pytest.approx(rows.macs[rows.accuracy.argmax()])
    again = amc(net, IMAGE, train_set, 0.4, **how)
    assert again.candidates.equals(rows)
    assert again.plan == found.plan
    assert kept_as(net, before)
    assert torch.equal(torch.get_rng_state(), drawn)


BAD_SEARCHES = [
    (dict(budget=0), 'budget must be in'),
    (dict(budget=0.01, most=0.3), 'budget, most: .* of the operations are left'),
    (dict(most=1), 'most must be in'),
    (dict(episodes=0), 'episodes: 0'),
    (dict(statistics=1), 'statistics, held_out: 1 and 1000 images'),
    (dict(held_out=1200), 'statistics, held_out: 128 and 1200 images from a set of 1297'),
]


@pytest.mark.parametrize('bad, says', BAD_SEARCHES)
def test_amc_names_bad_input(trained, bad, says):
    net, train_set, _ = trained
    with pytest.raises(ValueError, match=says):
        amc(net, IMAGE, train_set, **{'budget': 0.4, **bad})


def test_eagleeye(trained):
    """The best candidate by held-out accuracy, which is that of the network really cut.

    The same again; model and random numbers stay.
    """
    net, train_set, _ = trained
    before, drawn = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    how = dict(candidates=8, statistics=100, held_out=400, seed=3)
    found = eagleeye(net, IMAGE, train_set, 0.4, **how)
    rows = found.candidates
    assert len(rows) == 8
    assert (rows.macs <= 0.4).all()
    assert rows.accuracy.nunique() > 1
    best = rows.iloc[rows.accuracy.argmax()]
    widths = {'features.0': 4, 'features.3': 16, 'features.7': 16}
    assert sizes(found.plan) == {k: round(w * (1 - best[k])) for k, w in widths.items()}
    part = subset(train_set, 500, 3)
    cut = restore(net, IMAGE, keep=found.plan, restorer=prune_only()).model
    right, n = accuracy(adaptive_bn(cut, normalise(part[:100].images)), part[100:])
    assert n == 400 and best.accuracy == pytest.approx(100 * right / n, abs=0.3)
    again = eagleeye(net, IMAGE, train_set, 0.4, **how)
    assert again.plan == found.plan and again.candidates.equals(rows)
    how['seed'] = 4
    assert not eagleeye(net, IMAGE, train_set, 0.4, **how).candidates.equals(rows)
    assert kept_as(net, before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not net.training
    how.update(seed=3, candidates=2, criterion=thinet(normalise(part.images)))
    small = eagleeye(net, IMAGE, train_set, 0.4, **how)
    assert len(small.candidates) == 2


TOO_MANY = 'statistics, held_out: 1200 and 98 images from a set of 1297'
WRONG_FOR_EAGLEEYE = [
    (dict(budget=0.0), 'budget must be in'),
    (dict(budget=1.5), 'budget must be in'),
    (dict(most=1.0), 'most must be in'),
    (dict(candidates=0), 'candidates: 0'),
    (dict(held_out=0), 'held_out'),
    (dict(statistics=1200, held_out=98), TOO_MANY),
    (dict(budget=0.001), 'budget, most'),
    (dict(statistics=1), 'statistics, held_out: 1 and 50'),
]


@pytest.mark.parametrize('bad, says', WRONG_FOR_EAGLEEYE)
def test_eagleeye_names_what_is_wrong(trained, bad, says):
    net, train_set, _ = trained
    how = dict(budget=0.4, candidates=2, statistics=50, held_out=50)
    how.update(bad)
    with pytest.raises(ValueError, match=says):
        eagleeye(net, IMAGE, train_set, **how)


def test_eagleeye_with_nothing_to_prune():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match='nothing to prune'):
        eagleeye(net, IMAGE, digits()[0], 0.5, statistics=50, held_out=50)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_projection_is_the_nearest(m, d, data):
    t = data.draw(st.integers(1, m))
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    A = torch.randn(m, d, generator=gen, dtype=torch.float64)
    Z = _projected(A, t)
    rows = [torch.tensor(i) for i in itertools.combinations(range(m), t)]
    others = [torch.zeros_like(A).index_copy(0, i, A[i]) for i in rows]
    nearest = min((B - A).norm() for B in others).item()
    assert (Z - A).norm().item() == pytest.approx(nearest)
    assert (Z.norm(dim=1) > 0).sum() == t
    assert torch.equal(_projected(Z, t), Z)


def test_rows_of_zeros_are_channels_of_zeros(case):
    """What `joined_parameters` collects is all that makes a channel, whatever joins in a group.

    Set to zero through it, cutting the channel changes nothing.
    """
    net, x, traced, groups = case
    for g in groups:
        zero, gone = copy.deepcopy(net), list(range(0, g.channels - 1, 2))
        left = [i for i in range(g.channels) if i not in gone]
        read = joined_parameters(zero, g)[gone].sum()
        entries = torch.autograd.grad(read, [*zero.parameters()], allow_unused=True)
        with torch.no_grad():
            for p, grad in zip(zero.parameters(), entries):
                if grad is not None:
                    p[grad != 0] = 0
        assert not joined_parameters(zero, g)[gone].any()
        assert joined_parameters(zero, g)[left].any()
        small = restore(zero, x, keep={g.name: left}, restorer=prune_only())
        assert sizes(small.plan) == {g.name: len(left)}
        torch.testing.assert_close(small.model(x), zero(x), rtol=1e-6, atol=1e-8)


HISTORY = ['step', 'epoch', 'lr', 'loss', 'penalty', 'accuracy', 'primal', 'dual']


def test_admm_trains_towards_its_plan(trained):
    """Residuals fall, rows outside the plan come to be nearly nothing and can go.

    Counts are those of `plan`; the model passed in stays.
    """
    net, train_set, test_set = trained
    before, drawn = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    ratio = {'features.3': 0.5, 'features.7': 0.75}
    recipe = Recipe(epochs=10, lr=0.05, milestones=(8,), batch=64)
    done = admm(net, IMAGE, train_set, ratio, recipe=recipe)
    by_plan = plan(net, IMAGE, ratio)
    assert sizes(done.plan) == sizes(by_plan) == {'features.3': 8, 'features.7': 4}
    primal = done.history.primal
    assert len(done.history) == 10
    assert primal.iloc[-1] < 0.3 * primal.iloc[0]
    assert primal.iloc[5:].mean() < primal.iloc[:5].mean()
    assert done.history.columns.tolist() == HISTORY
    for g in find_groups(trace(done.model, IMAGE)):
        if g.name not in ratio:
            continue
        norms = joined_parameters(done.model, g).detach().norm(dim=1)
        out = [i for i in range(g.channels) if i not in done.plan[g.name]]
        assert norms[out].max() < 0.5 * norms[done.plan[g.name]].min()

    def right_without(net, keep):
        return accuracy(restore(net, IMAGE, keep=keep, restorer=prune_only()).model, test_set)[0]

    assert right_without(done.model, done.plan) > right_without(net, by_plan) + 50
    assert kept_as(net, before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert not net.training
    assert not done.model.training


def test_admm_in_streams():
    "Groups with several producers, by hand: penalty and its gradient, and one update."
    net = randomised(initialised(Joined, 0)).double()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    groups = [g for g in find_groups(trace(net, x), streams=True) if not g.reason]
    assert any(len(g.producers) > 1 for g in groups)
    split = _Split(net, groups, {g.name: g.channels // 2 for g in groups}, 0.3)
    X = {g.name: joined_parameters(net, g).detach() for g in groups}
    missed = {k: X[k] - _projected(X[k], split.keep[k]) for k in X}
    squares = sum(v.square().sum().item() for v in missed.values())
    assert split.penalty().item() == pytest.approx(0.15 * squares)
    stream = next(g for g in groups if len(g.producers) > 1)
    out = [i for i in range(stream.channels) if i not in split.plan[stream.name]]
    for name in stream.producers:
        w = net.get_submodule(name).weight
        (grad,) = torch.autograd.grad(split.penalty(), w)
        torch.testing.assert_close(grad[out], 0.3 * w[out].detach())
        assert not grad[split.plan[stream.name]].any()
    seen = split.update()
    for k in X:
        torch.testing.assert_close(split.U[k], missed[k])
    assert 0 < seen['primal'] < 1 and seen['dual'] == 0
    assert sizes(split.plan) == split.keep


def test_admm_whole_in_streams(trained):
    _, train_set, _ = trained
    build = lambda: nn.Sequential(nn.Conv2d(1, 2, 1), Joined())
    net = initialised(build, 0).eval()
    recipe = Recipe(epochs=1, batch=32, milestones=())
    done = admm(net, IMAGE, subset(train_set, 64), 0.5, streams=True, recipe=recipe)
    assert len(done.plan['1.a.0']) == 3
    assert len(done.history) == 1
    small = restore(done.model, IMAGE, keep=done.plan, restorer=prune_only()).model
    assert small(IMAGE).shape == (1, 10)


SHORT = Recipe(epochs=1, lr=0.05, milestones=(), batch=64)
WRONG_FOR_ADMM = [
    (dict(rho=0), 'rho must be a positive number'),
    (dict(rho=float('nan')), 'rho must be'),
    (dict(every=0), 'every: 0 steps'),
    (dict(ratio=1.0), 'ratio must be'),
    (dict(ratio={'nothing': 0.5}), "ratio: the model has no prunable layer 'nothing'"),
    (dict(recipe=Recipe(batch=2000)), 'batch: 2000 images'),
]


@pytest.mark.parametrize('bad, says', WRONG_FOR_ADMM)
def test_admm_names_what_is_wrong(trained, bad, says):
    net, train_set, _ = trained
    how = dict(ratio=0.5, recipe=SHORT)
    how.update(bad)
    with pytest.raises(ValueError, match=says):
        admm(net, IMAGE, train_set, **how)


def test_admm_diverges_by_name(trained):
    net, train_set, _ = trained
    with pytest.raises(FloatingPointError, match='learning rate or rho may be too large'):
        admm(net, IMAGE, train_set, 0.5, rho=1e5, recipe=SHORT)


class Calls:
    "Shifted images; an augmentation that fails, or gives NaN, at a call."

    def __init__(self, fails=None, nan=None):
        self.calls, self.fails, self.nan = 0, fails, nan

    def __call__(self, x):
        self.calls += 1
        if self.calls == self.fails:
            raise KeyboardInterrupt
        return crop_flip(x, 1) * (float('nan') if self.calls == self.nan else 1)


def leaky():
    "A network that draws random numbers while it is trained."
    net = initialised(lambda: digits_net(4), 0).eval()
    net.flatten = nn.Sequential(nn.Flatten(), nn.Dropout(0.2))
    return net


RECIPE = Recipe(epochs=3, lr=0.05, milestones=(2,), batch=64)
SMALL = dict(ratio=0.5, rho=0.3, every=3, recipe=RECIPE)


@pytest.fixture
def small_set():
    return subset(digits()[0], 256)


@pytest.mark.parametrize('fails, left', [(2, 12), (4, 9), (8, 6), (12, 3)])
def test_admm_goes_on_from_its_checkpoint(tmp_path, one_thread, small_set, fails, left):
    """Killed at any step: weights, plan and history are those of a run that never was.

    Once complete, nothing is trained any more.
    """
    path, net = tmp_path / 'c.safetensors', leaky()
    whole = admm(net, IMAGE, small_set, augment=Calls(), **SMALL)
    with pytest.raises(KeyboardInterrupt):
        admm(net, IMAGE, small_set, augment=Calls(fails), checkpoint=path, **SMALL)
    for n in (left, 0):
        counting = Calls()
        rest = admm(net, IMAGE, small_set, augment=counting, checkpoint=str(path), **SMALL)
        assert counting.calls == n
        assert rest.plan == whole.plan
        assert rest.history.equals(whole.history)
        assert kept_as(rest.model, whole.model.state_dict())
    assert [p.name for p in tmp_path.iterdir()] == ['c.safetensors']


def test_admm_holds_its_variables(tmp_path, one_thread, small_set):
    "Z and U are in the file; with zeros in their place another run comes out."
    path, net = tmp_path / 'c.safetensors', leaky()
    whole = admm(net, IMAGE, small_set, augment=Calls(), **SMALL)
    with pytest.raises(KeyboardInterrupt):
        admm(net, IMAGE, small_set, augment=Calls(5), checkpoint=path, **SMALL)
    tensors, meta = read_safetensors(path)
    assert meta['step'] == '3'
    layers = 'features.0', 'features.3', 'features.7'
    of_variable = {v: [k for k in tensors if k.startswith(f'penalty/{v}/')] for v in 'ZU'}
    for v, names in of_variable.items():
        assert {*names} == {f'penalty/{v}/{k}' for k in layers}
    for k in layers:
        Z, U = tensors[f'penalty/Z/{k}'], tensors[f'penalty/U/{k}']
        assert (Z.norm(dim=1) > 0).sum() == len(Z) / 2
        assert U.any()
    for names in of_variable.values():
        zeros = {k: 0 * tensors[k] for k in names}
        write_safetensors({**tensors, **zeros}, path, meta)
        rest = admm(net, IMAGE, small_set, augment=Calls(), checkpoint=path, **SMALL)
        weight = 'features.3.weight'
        assert not torch.equal(rest.model.state_dict()[weight], whole.model.state_dict()[weight])


def test_admm_refuses_checkpoints(tmp_path, small_set):
    """Of another run, of fine-tuning, truncated, none at all, without a folder.

    And fine-tuning refuses those of ADMM. The files stay as they are.
    """
    path = tmp_path / 'c.safetensors'
    other = tmp_path / 'f.safetensors'
    net = initialised(lambda: digits_net(4), 0).eval()
    usual = dict(model=net, train_set=small_set, checkpoint=path, **SMALL)

    def fit(**how):
        return admm(example_inputs=IMAGE, **{**usual, **how})

    fit()
    finetune(net, small_set, recipe=RECIPE, every=3, checkpoint=other)
    before = path.read_bytes()
    later = replace(RECIPE, milestones=(2.5,))
    other_weights = initialised(lambda: digits_net(4), 1).eval()
    refused = [
        (dict(rho=0.2), 'whose rho is 0.3 and not 0.2'),
        (dict(ratio=0.75), "whose keep is {'features.0': 2,.* and not {'features.0': 1"),
        (dict(ratio={'features.0': 0.5}), 'whose keep is'),
        (dict(every=4), 'whose every is 3 and not 4'),
        (dict(seed=1), 'whose seed is 0 and not 1'),
        (dict(recipe=later), 'whose milestones'),
        (dict(augment=Calls()), 'whose augment is unchanged and not Calls'),
        (dict(train_set=subset(digits()[0], 255)), 'whose images is 256 and not 255'),
        (dict(model=other_weights), 'with other weights: start'),
        (dict(model=digits_net(8)), 'another architecture: features.0.weight is'),
        (dict(checkpoint=other), "not a checkpoint of admm .format 'lbyl_nb.finetune.2'"),
    ]
    for how, says in refused:
        with pytest.raises(ValueError, match=says):
            fit(**how)
    with pytest.raises(ValueError, match="not a checkpoint of finetune .format 'lbyl_nb.admm.2'"):
        finetune(net, small_set, recipe=RECIPE, every=3, checkpoint=path)
    assert path.read_bytes() == before
    for n in (0, 7, 100, len(before) // 2, len(before) - 1):
        other.write_bytes(before[:n])
        with pytest.raises(ValueError, match='truncated'):
            fit(checkpoint=other)
        assert other.read_bytes() == before[:n]
    write_safetensors(net.state_dict(), other)
    with pytest.raises(ValueError, match='not a checkpoint of admm .format None'):
        fit(checkpoint=other)
    with pytest.raises(FileNotFoundError, match='there is no folder'):
        fit(checkpoint=tmp_path / 'nowhere' / 'c.safetensors')


def test_admm_keeps_the_checkpoint_before_a_nan(tmp_path, one_thread, small_set):
    """The message names the step and the file, the file holds the last good projection.

    From there the run can be finished.
    """
    path, net = tmp_path / 'c.safetensors', leaky()

    def fit(**how):
        return admm(net, IMAGE, small_set, augment=Calls(**how), checkpoint=path, **SMALL)

    said = '^step 2: the loss is nan, the penalty .*; the learning rate or rho may be too large$'
    with pytest.raises(FloatingPointError, match=said):
        fit(nan=2)
    assert not path.exists()
    said = 'step 8: the loss is nan, .* rho may be too large; .*c.safetensors holds step 6'
    with pytest.raises(FloatingPointError, match=said):
        fit(nan=8)
    assert read_safetensors(path)[1]['step'] == '6'
    whole = admm(net, IMAGE, small_set, augment=Calls(), **SMALL)
    assert fit().history.equals(whole.history)


def test_grouped_convolutions():
    "EagleEye takes whole units; ThiNet and ADMM, which remove channels one by one, name the layer."
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    ).eval()
    data, x = digits()[0], torch.randn(16, 1, 8, 8)
    found = eagleeye(net, x[:1], data, 0.7, candidates=3, statistics=32, held_out=32)
    assert all({(i + 4) % 8 for i in v} == {*v} for v in found.plan.values())
    assert restore(net, x[:1], keep=found.plan).model(x).shape == (16, 10)
    with pytest.raises(ValueError, match='0: ThiNet removes channels one by one'):
        plan(net, x[:1], 0.5, thinet(x))
    with pytest.raises(ValueError, match='0: ADMM removes channels one by one'):
        admm(net, x[:1], data, 0.5)


def test_candidates_behind_layer_norms_are_judged_as_they_will_be_cut():
    "Silent channels would count in the norm's mean; cut ones do not."
    train_set, part = digits()[0], subset(digits()[0], 400, 3)
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(64, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 10)
    net = train(nn.Sequential(*layers), train_set, 2, lr=0.05, batch=64).eval()
    how = dict(candidates=4, statistics=100, held_out=300, seed=3, most=0.8)
    found = eagleeye(net, torch.zeros(2, 1, 8, 8), train_set, 0.5, streams=True, **how)
    cut = restore(net, torch.zeros(2, 1, 8, 8), keep=found.plan, restorer=prune_only()).model
    right, n = accuracy(cut, part[100:])
    assert found.candidates.accuracy.max() == pytest.approx(100 * right / n)
