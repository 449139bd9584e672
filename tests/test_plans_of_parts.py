"""Plans for parts: a part of a model, of a family, of the filters of a layer.

Networks here have hidden channels that nothing reads, or that come twice, so that what is left of
them must give what they gave.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lbyl_nb.layers import LAYERS
from lbyl_nb.plans import FilterNumbers
from lbyl_nb.pruned_elsewhere import from_masks, from_pruned, restore_inside
from lbyl_nb.recover import lbyl_restore
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
