"""Plans for parts: a part of a model, of a family, of the filters of a layer.

Networks here have hidden channels that nothing reads, or that come twice, so that what is left of
them must give what they gave.
"""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lbyl_nb.budget import budget
from lbyl_nb.layers import LAYERS
from lbyl_nb.plans import FilterNumbers
from lbyl_nb.pruned_elsewhere import from_masks, from_pruned, restore_inside
from lbyl_nb.recover import lbyl_restore, plan
from lbyl_nb.restorers import lbyl, prune_only


def idle_after(m, n, out):
    "Linear, ReLU, linear; of n hidden units the second half is not read."
    net = nn.Sequential(nn.Linear(m, n), nn.ReLU(), nn.Linear(n, out))
    net[2].weight.data[:, n // 2 :] = 0
    return net


def widths(net):
    "{name: filters} of all layers, under all their names."
    named = net.named_modules(remove_duplicate=False)
    return {k: len(m.weight) for k, m in named if isinstance(m, LAYERS)}


class Twice(nn.Module):
    "A part under two names, of which the forward pass uses the second, or neither."

    def __init__(self, hidden=False):
        super().__init__()
        torch.manual_seed(0)
        self.body = idle_after(4, 8, 4)
        self.all = nn.Sequential(self.body, nn.Linear(4, 2))
        self.hidden = [self.body] if hidden else None

    def forward(self, x):
        return self.all[1](self.hidden[0](x)) if self.hidden else self.all(x)


@pytest.mark.parametrize('name', ['body', 'all.0'])
@pytest.mark.parametrize('restorer', [prune_only(), lbyl()])
def test_a_part_is_replaced_under_all_its_names(name, restorer):
    net, x = Twice().eval(), torch.randn(8, 4)
    r = restore_inside(net, name, x, keep={'0': [0, 1, 2, 3]}, restorer=restorer)
    assert r.model.body is r.model.all[0]
    names = 'body.0', 'body.2', 'all.0.0', 'all.0.2', 'all.1'
    assert widths(r.model) == dict(zip(names, (4, 4, 4, 4, 2)))
    torch.testing.assert_close(r.model(x), net(x))
    assert widths(net)['all.0.0'] == 8 and net.body is net.all[0]


def test_a_part_that_is_called_by_no_name():
    "What a plain list holds is not replaced, so the network would stay as it is."
    net, x = Twice(hidden=True).eval(), torch.randn(8, 4)
    with pytest.raises(ValueError, match='^body: the model calls it by something else'):
        restore_inside(net, 'body', x, ratio=0.5, restorer=prune_only())
    with pytest.raises(ValueError, match="Twice has no part ''"):
        restore_inside(net, '', x, ratio=0.5)


class Tied(nn.Module):
    "A table of tokens that is the weight of the last layer, too; a hidden layer is used twice."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Embedding(10, 4), idle_after(4, 8, 4), idle_after(4, 6, 4))
        self.head, self.other = nn.Linear(4, 10, bias=False), nn.Linear(4, 6)
        self.head.weight, self.other.weight = self.body[0].weight, self.body[2][0].weight

    def forward(self, tokens):
        x = self.body(tokens)
        return self.head(x), self.other(x)


def test_what_a_part_shares_stays_shared():
    net, tokens = Tied().eval(), torch.randint(10, (8, 5))
    r = restore_inside(net, 'body', tokens, keep={'1.0': [0, 1, 2, 3]}, restorer=prune_only())
    small = r.model
    assert small.head.weight is small.body[0].weight and len(small.body[1][0].weight) == 4
    assert small.other.weight is small.body[2][0].weight
    torch.testing.assert_close(small(tokens), net(tokens))
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(net) - count(small) == 4 * (4 + 1 + 4)
    assert net.head.weight is net.body[0].weight


def test_what_a_part_shares_cannot_change():
    "The other layer would go on with a weight of its own; both are named."
    net, tokens = Tied().eval(), torch.randint(10, (8, 5))
    why = r'^body\.2\.0\.weight: is shared with other\.weight, outside of the part'
    with pytest.raises(ValueError, match=why):
        restore_inside(net, 'body', tokens, keep={'2.0': [0, 1, 2]}, restorer=prune_only())


class Gated(nn.Module):
    "A gated unit whose two halves are one layer: filters i and i + 4 write channel i."

    kept, filters = [1, 3], [1, 3, 5, 7]

    def __init__(self, channels=4):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2 * channels), nn.Linear(channels, 2)

    def forward(self, x):
        gate, value = self.a(x).chunk(2, -1)
        return self.b(torch.sigmoid(gate) * value)


class Interleaved(Gated):
    "The same with filters 2i and 2i + 1, of which the first four could as well be four channels."

    kept, filters = [0, 1], [0, 1, 2, 3]

    def forward(self, x):
        x = self.a(x)
        return self.b(torch.sigmoid(x[..., ::2]) * x[..., 1::2])


def cut_by_hand(make):
    "A network, the same with the kept channels only, and an input."
    torch.manual_seed(0)
    net, small = make().eval(), make(len(make.kept)).eval()
    small.a.weight.data = net.a.weight.data[make.filters]
    small.a.bias.data = net.a.bias.data[make.filters]
    small.b.weight.data = net.b.weight.data[:, make.kept]
    small.b.bias.data = net.b.bias.data
    return net, small, torch.randn(5, 3)


def masked(net, filters):
    "A copy whose first layer has a mask that leaves these filters."
    net = copy.deepcopy(net)
    mask = torch.zeros_like(net.a.weight)
    mask[filters] = 1
    prune.custom_from_mask(net.a, 'weight', mask)
    return net


@pytest.mark.parametrize('make', [Gated, Interleaved])
def test_channels_that_are_written_several_times(make):
    "Masks, a smaller network and channels are three ways to say the same."
    net, small, x = cut_by_hand(make)
    dense, by_masks = from_masks(masked(net, make.filters))
    by_matching = from_pruned(net, small, x)
    assert by_matching == {'a': make.kept}
    for keep in (by_masks, by_matching):
        done = lbyl_restore(dense, x, keep=keep, restorer=prune_only())
        assert widths(done) == widths(small)
        torch.testing.assert_close(done(x), small(x))


def test_filters_or_channels():
    "A plain list is filters if there are no such channels; without mistakes about either."
    net, small, x = cut_by_hand(Gated)
    done = lbyl_restore(net, x, keep={'a': Gated.filters}, restorer=prune_only())
    torch.testing.assert_close(done(x), small(x))
    net, small, x = cut_by_hand(Interleaved)
    keep = {'a': FilterNumbers(Interleaved.filters)}
    done = lbyl_restore(net, x, keep=keep, restorer=prune_only())
    torch.testing.assert_close(done(x), small(x))
    same = lbyl_restore(net, x, keep={'a': Interleaved.filters}, restorer=prune_only())
    assert widths(same) == widths(net)


@pytest.mark.parametrize('make', [Gated, Interleaved])
def test_channels_that_lose_some_of_their_filters(make):
    "They cannot be cut; and filters that a layer has not are counted as such."
    net, _, x = cut_by_hand(make)
    n = len(net.a.weight)
    dense, keep = from_masks(masked(net, range(1, n)))
    why = r'^a: it writes each channel of a several times, .* some filters only of \[0\]'
    with pytest.raises(ValueError, match=why):
        lbyl_restore(dense, x, keep=keep, restorer=prune_only())
    with pytest.raises(
        ValueError, match=rf'^keep: a has {n} filters, so there are none at \[{n}\]'
    ):
        lbyl_restore(dense, x, keep={'a': [0, n]}, restorer=prune_only())


class Nested(nn.Module):
    "Of what one layer gives a half goes its own way, and so does each quarter of the other half."

    def __init__(self, channels=64):
        super().__init__()
        torch.manual_seed(0)
        half, quarter = channels // 2, channels // 4
        self.a, self.whole = nn.Linear(3, channels), nn.Linear(half, 2)
        self.third, self.fourth = nn.Linear(quarter, 2), nn.Linear(channels - half - quarter, 2)

    def forward(self, x):
        left, right = self.a(x).chunk(2, -1)
        third, fourth = right.chunk(2, -1)
        return self.whole(left) + self.third(third) + self.fourth(fourth)


@pytest.mark.parametrize('round_to, ratio', [(3, 0.5), (4, 0.4), (5, 0.2), (5, 0.6), (6, 0.5)])
def test_halves_keep_multiples(round_to, ratio):
    "Without a warning every part of the layer keeps a multiple or all, also where steps differ."
    net, x = Nested().eval(), torch.randn(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        keep = plan(net, x, ratio, round_to=round_to)
    small = lbyl_restore(net, x, keep=keep, restorer=prune_only())
    left, third, fourth = (m.in_features for m in (small.whole, small.third, small.fourth))
    assert small.a.out_features == left + third + fourth and left == 2 * third == 2 * fourth
    assert not left % round_to or left == 32
    assert not third % round_to or third == 16


class Shuffle(nn.Module):
    "Twice, half of 26 channels passes a layer, and those of both halves are mixed, one by one."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.out = nn.Linear(3, 26), nn.Linear(26, 2)
        self.layers = nn.ModuleList(nn.Linear(13, 13) for _ in range(2))

    def forward(self, x):
        x = self.a(x)
        for layer in self.layers:
            left, right = x.chunk(2, 1)
            x = torch.cat([left, layer(right)], 1)
            x = x.view(len(x), 2, x.shape[1] // 2).transpose(1, 2).reshape(len(x), -1)
        return self.out(x)


def test_halves_that_cannot_keep_multiples():
    """A plan says where it goes without.

    Each of the 13 channels on the left that goes takes one of the right along, and in the second
    round two on the right, so 26 channels lose four at a time and are never a multiple of four."""
    net, x = Shuffle().eval(), torch.randn(4, 3)
    why = 'no multiples of 4 leave its pieces even, so it keeps other numbers'
    for make in (partial(plan, ratio=0.5), partial(budget, params=0.6)):
        with pytest.warns(UserWarning, match=why):
            keep = make(net, x, round_to=4)
        small = lbyl_restore(net, x, keep=keep, restorer=prune_only())
        assert small.a.out_features in (6, 10, 14, 18, 22)


class Attention(nn.Module):
    "Two blocks of attention, of four heads, and a hidden layer behind them."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = lambda: nn.ModuleDict({k: nn.Linear(8, 8) for k in 'qkvo'})
        self.blocks = nn.ModuleList([block(), block()])
        self.hidden, self.out = nn.Linear(8, 12), nn.Linear(12, 2)

    def forward(self, x):
        for b in self.blocks:
            q, k, v = (b[n](x).unflatten(-1, (-1, 2)).transpose(1, 2) for n in 'qkv')
            heads = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + b['o'](heads.transpose(1, 2).flatten(2))
        return self.out(self.hidden(x).relu())


def test_together_and_ignored():
    "Heads that all stay, because their keys are ignored, do not count among the layers of a kind."
    net, x = Attention().eval(), torch.randn(2, 5, 8)
    lengths = lambda **limits: {k: len(v) for k, v in plan(net, x, 0.5, **limits).items()}
    second = {f'blocks.1.{k}': 4 for k in 'qkv'}
    assert lengths(ignore=['*.k'], together=['*.q']) == {'hidden': 6}
    assert lengths(ignore=['*.0.k'], together=['*.q']) == {**second, 'hidden': 6}
    keep = budget(net, x, macs=0.8, ignore=['*.0.k'], together=['*.q'])
    assert (
        not {'blocks.0.q', 'blocks.0.k', 'blocks.0.v'} & keep.keys() and len(keep['blocks.1.q']) < 8
    )


BAD = [
    (dict(at_least='x'), "^at_least must be a number of channels.* got 'x'"),
    (dict(at_least=float('inf')), '^at_least must be a number of channels.* got inf'),
    (dict(round_to='x'), "^round_to must be a positive integer, got 'x'"),
    (dict(ignore=[0]), '^ignore must be a list of names, and 0 is none'),
    (dict(together=[None]), '^together must be a list of names, and None is none'),
    (dict(ignore=None), '^ignore must be a list of names, got None'),
    (dict(foo=1), '^foo is no argument of a plan; its limits are ignore, round_to, at_least, tog'),
    (dict(round=8), 'round is no argument of a plan.*; did you mean round_to'),
]


@pytest.mark.parametrize('wrong, says', BAD)
@pytest.mark.parametrize('make', [lambda *a, **k: plan(*a, 0.5, **k), partial(budget, params=0.7)])
def test_limits_that_are_none(make, wrong, says):
    "An argument of a wrong kind, or of nobody, is named."
    with pytest.raises((TypeError, ValueError), match=says):
        make(Gated(), torch.randn(4, 3), **wrong)


def test_names_that_can_be_gone_through_once():
    "A generator of names is as good as a list."
    net, x = Attention().eval(), torch.randn(2, 5, 8)
    assert plan(net, x, 0.5, ignore=(k for k in ['*.q', '*.k'])).keys() == {'hidden'}
