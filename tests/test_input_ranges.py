"""Inputs that are not like noise: positive ones, bytes, samples of 16 bits, several units.

The oracle is the dense network with the removed columns of the next layer set to zero by hand.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lbyl_nb.distilled import distilled
from lbyl_nb.layerwise import layerwise
from lbyl_nb.photographs import photographs
from lbyl_nb.probes import noise, pin
from lbyl_nb.recover import restore
from lbyl_nb.restorers import prune_only
from lbyl_nb.saved import load_restored, save_restored


class Net(nn.Module):
    "A function of three layers, a first one that is cut, and of the input."

    def __init__(self, f, a, b, c):
        super().__init__()
        self.f, self.a, self.b, self.c = f, a, b, c
        self.half = 4

    def forward(self, *x):
        return self.f(self, *x)


def net_of(f, kind=nn.Conv2d, read=3, size=3):
    "A network in double precision, always the same."
    torch.manual_seed(0)
    layers = kind(read, 8, size), kind(8, 6, size), nn.Linear(6, 3)
    return Net(f, *layers).double().eval()


def rest(net, y):
    "What follows the first layer."
    y = F.relu(net.b(F.relu(y)))
    return net.c(y.flatten(2).mean(2))


def out(net, *x):
    with torch.no_grad():
        return net(*x)


def silent(net, keep):
    "The dense network, deaf to the removed channels of its first layer."
    deaf = copy.deepcopy(net)
    with torch.no_grad():
        deaf.b.weight[:, [i for i in range(8) if i not in keep]] = 0
    return deaf


def same_or_refused(net, x, keep, *others):
    "Is a network without channels of its first layer, if there is one, the silent one?"
    try:
        small = restore(net, x, keep={'a': keep}, restorer=prune_only()).model
    except ValueError as e:
        assert 'a' in str(e)
        return None
    for v in (x, *others):
        torch.testing.assert_close(out(small, v), out(silent(net, keep), v))
    return small


POSITIVE = dict(
    log=torch.log,
    log1p=torch.log1p,
    sqrt=torch.sqrt,
    power=lambda x: x**0.3,
    logit=lambda x: torch.logit(x / 6),
)


@pytest.mark.parametrize('name', POSITIVE)
def test_inputs_that_must_be_positive(name):
    "They are cut, whatever the example inputs hold, and their output can be compared."
    net = net_of(lambda net, x: rest(net, net.a(POSITIVE[name](x))), read=1)
    x = torch.rand(4, 1, 12, 12).double() * 5 + 0.1
    assert same_or_refused(net, x, [1, 2, 5]) is not None
    for example in (torch.zeros_like(x), torch.randn_like(x)):
        done = restore(net, example, keep={'a': [1, 2, 5]}, restorer=prune_only())
        torch.testing.assert_close(out(done.model, x), out(silent(net, [1, 2, 5]), x))
        assert 0 <= done.divergence < 10
    assert restore(net, x, ratio=0.5).divergence < 0.1


def test_a_graph_whose_nodes_have_degrees():
    "The adjacency is what must be positive."

    def f(net, x, adjacency):
        d = adjacency.sum(1).rsqrt()
        a = d[:, None] * adjacency * d
        return net.c(F.relu(a @ net.b(F.relu(a @ net.a(x)))))

    net = net_of(f)
    net.a, net.b = nn.Linear(5, 8).double(), nn.Linear(8, 6).double()
    x = torch.randn(7, 5).double(), (torch.rand(7, 7) > 0.5).double() + torch.eye(7).double()
    keep = [0, 3, 4]
    small = restore(net, x, keep={'a': keep}, restorer=prune_only()).model
    torch.testing.assert_close(out(small, *x), out(silent(net, keep), *x))


def test_what_is_finite_on_nothing_is_refused():
    net = net_of(lambda net, x: rest(net, net.a((-1 - x.abs()).log())))
    with pytest.raises(ValueError, match='example_inputs: .*nothing but NaN'):
        restore(net, torch.randn(2, 3, 12, 12).double(), ratio=0.5, restorer=prune_only())


def halves(net, x):
    "Each half has a threshold of its own, which noise does not reach."
    y = net.a(x / 255)
    return rest(net, torch.cat([F.relu(y[:, : net.half] - 0.1), F.relu(y[:, net.half :] - 0.3)], 1))


def shifted(net, x):
    "A quarter of the channels is late; noise is too faint to show it."
    y = net.a(x / 32768)
    n = y.shape[1] // 4
    return rest(net, torch.cat([y[:, :n].roll(3, 2), y[:, n:]], 1))


KEPT = [0, 2, 3, 4, 6, 7], [2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [3, 4, 5, 6, 7]


@pytest.mark.parametrize('keep', KEPT)
def test_noise_shows_nothing_and_the_example_does(keep):
    pixels, bytes = net_of(halves), torch.rand(4, 3, 12, 12).double() * 255
    same_or_refused(pixels, bytes, keep)
    audio = net_of(shifted, nn.Conv1d, 1, 9)
    audio.a.bias.data.zero_()
    same_or_refused(audio, torch.randn(4, 1, 200).double() * 8000, keep)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    "A half that follows the cut, where noise, or zeros, show nothing."
    keep, x = [1, 2, 3, 4, 6, 7], torch.rand(4, 3, 12, 12).double() * 255
    for example in (x, torch.zeros_like(x)):
        done = restore(net_of(halves), example, keep={'a': keep}, restorer=prune_only())
        save_restored(done.model, done.plan, tmp_path / 'saved')
        loaded = load_restored(net_of(halves), example, tmp_path / 'saved')
        torch.testing.assert_close(out(loaded, x), out(done.model, x))
        torch.testing.assert_close(out(loaded, x), out(silent(net_of(halves), keep), x))


def test_outputs_in_units_of_their_own():
    "A hard-coded half is found out beside an output of a thousand, for every way to lay it out."

    def f(net, x):
        y = net.a(x)
        y = net.b(torch.cat([F.relu(y[..., :4]), torch.tanh(y[..., 4:])], -1))
        return y if x.ndim < 3 else y.movedim(-1, 1)

    net = net_of(f).float()
    net.a, net.b, net.c = nn.Linear(6, 8), nn.Linear(8, 2), nn.Identity()
    nn.init.constant_(net.b.bias[:1].data, 1013)
    for shape in ((2, 6), (8, 6), (2, 20, 6)):
        torch.manual_seed(1)
        assert same_or_refused(net, torch.randn(shape), [2, 3, 4, 5]) is None


def two_widths(net, x):
    "Two widths, and a longest sequence that happens to be as long as they are wide."
    x = x[:, : net.longest]
    y = torch.cat([net.a(x), net.b(x)], -1).view(*x.shape[:2], net.left + net.right)
    return net.c(F.relu(y))


def width_of_two(net, x):
    "A width and a longest sequence side by side."
    width, longest = net.shape
    x = x[:, :longest]
    return net.c(F.relu(net.a(x).view(*x.shape[:2], width)))


@pytest.mark.parametrize('f', [two_widths, width_of_two])
def test_attributes_that_only_look_like_a_width(f):
    "They stay; the examples are too short to show it."
    net = net_of(f)
    net.left = net.right = net.longest = 8
    net.shape = 8, 8
    both = f is two_widths
    net.a, net.b = nn.Linear(5, 8).double(), nn.Linear(5, 8).double() if both else nn.Identity()
    net.c = nn.Linear(16 if both else 8, 3).double()
    kept = dict(a=[0, 1, 2, 5, 7]) | (dict(b=[1, 2, 3, 4, 6]) if both else {})
    small = restore(net, torch.randn(2, 4, 5).double(), keep=kept, restorer=prune_only()).model
    deaf = copy.deepcopy(net)
    for i, k in enumerate(kept):
        deaf.c.weight.data[:, [8 * i + j for j in range(8) if j not in kept[k]]] = 0
    for length in (4, 7, 8, 12):
        x = torch.randn(3, length, 5).double()
        torch.testing.assert_close(out(small, x), out(deaf, x))


def of_bytes(net, x):
    return rest(net, net.a((x - 128) / 64))


@pytest.mark.parametrize('read', [1, 5])
def test_bytes_are_restored_and_judged_as_bytes(read):
    "What the example shows of the range counts: all is as for the network that takes noise."
    torch.manual_seed(2)
    plain, scaled = (
        net_of(lambda net, x: rest(net, net.a(x)), read=read),
        net_of(of_bytes, read=read),
    )
    x = torch.randn(64, read, 12, 12).double()
    b = x * 64 + 128
    kept = dict(a=[1, 2, 5, 6])
    a = restore(plain, torch.zeros_like(x[:8]), keep=kept)
    s = restore(scaled, b[:8], keep=kept)
    far = [(out(m.model, v) - out(n, v)).norm() for m, n, v in ((a, plain, x), (s, scaled, b))]
    assert 0.8 < far[1] / far[0] < 1.25
    assert 0.5 < s.divergence / a.divergence < 2


def test_a_network_that_does_not_react_to_probes_is_warned_of():
    net = net_of(lambda net, x: rest(net, net.a(x / 32768)))
    net.b.bias.data.normal_()
    with pytest.warns(UserWarning, match='hardly depends on the held-out probes'):
        restore(net, torch.zeros(1, 3, 12, 12).double(), ratio=0.5, restorer=prune_only())


class Packed(nn.Module):
    "Tokens of sorted lengths through a recurrent network, two layers beside it, and a mean."

    def __init__(self, kind):
        super().__init__()
        self.table, self.rnn = nn.Embedding(50, 16), kind(16, 12, batch_first=True)
        self.a, self.b, self.out = nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, tokens, lengths):
        pack, pad = nn.utils.rnn.pack_padded_sequence, nn.utils.rnn.pad_packed_sequence
        y, _ = self.rnn(pack(self.table(tokens), lengths, batch_first=True))
        y, _ = pad(y, batch_first=True, total_length=tokens.shape[1])
        y = y + self.b(self.a(y).relu())
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        return self.out((y * real[..., None]).sum(1) / lengths[:, None])


@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU])
def test_lengths_that_must_be_sorted(kind):
    "Cut as by hand; and restored on drawn tokens, whoever repeats others is removed without loss."
    torch.manual_seed(0)
    net = Packed(kind).double().eval()
    x = torch.randint(1, 50, (6, 9)), torch.tensor([9, 8, 8, 5, 3, 2])
    keep = dict(a=[0, 1, 2, 3])
    small = restore(net, x, keep=keep, restorer=prune_only()).model
    torch.testing.assert_close(out(small, *x), out(silent(net, keep['a']), *x))
    with torch.no_grad():
        for v in net.a.parameters():
            v[4:] = v[:4]
    small = restore(net, x, keep=keep, restorer=layerwise(ridge=1e-10)).model
    assert (out(silent(net, keep['a']), *x) - out(net, *x)).abs().max() > 1e-3
    torch.testing.assert_close(out(small, *x), out(net, *x), rtol=1e-5, atol=1e-6)


class Masked(nn.Module):
    "Of its first layer's eight channels, four read what is no padding, and four its square."

    def __init__(self, seen):
        super().__init__()
        self.seen, self.table = seen, nn.Embedding(20, 4)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)
        with torch.no_grad():
            self.a.weight[:, 4:] = 0
            self.a.weight[:4, 4] = torch.rand(4) + 1
            self.a.weight[4:, :4] = self.a.weight[:4, :4]
            self.a.weight[4:, 5] = self.a.weight[:4, 4]
            self.a.bias[4:] = self.a.bias[:4]

    def forward(self, x, mask):
        x = x if x.is_floating_point() else self.table(x)
        m = self.seen(mask)[..., None]
        y = self.a(torch.cat([x, m, m * m], -1))
        return self.c(self.b(y.relu()).relu())


LENGTHS = torch.arange(9) < torch.arange(12)[:, None] % 6 + 3
ADDED = torch.zeros(12, 1, 9, 9).masked_fill(~LENGTHS[:, None, None], -torch.inf)
REAL_MASKS = dict(
    factor=(LENGTHS.double(), lambda m: m),
    added=(ADDED.double(), lambda m: m[:, 0, 0].exp()),
    finite=(ADDED.double().clamp(min=-1e9), lambda m: m[:, 0, 0].exp()),
    single=(ADDED.clamp(min=torch.finfo(torch.float).min), lambda m: m[:, 0, 0].exp().double()),
)


@pytest.mark.parametrize('beside', ['tokens', 'zeros'])
@pytest.mark.parametrize('name', REAL_MASKS)
def test_masks_of_floating_point_numbers(name, beside):
    "Where a mask is zero or one, its square is the mask: half of the channels repeat the others."
    torch.manual_seed(0)
    mask, seen = REAL_MASKS[name]
    net = Masked(seen).double().eval()
    tokens = torch.randint(20, (12, 9))
    x = tokens if beside == 'tokens' else torch.zeros(12, 9, 4).double()
    how = dict(keep={'a': [0, 1, 2, 3]}, restorer=layerwise(ridge=1e-10))
    small = restore(net, (x, mask), **how).model
    real = tokens if beside == 'tokens' else torch.randn(12, 9, 4).double()
    assert (out(silent(net, [0, 1, 2, 3]), real, mask) - out(net, real, mask)).abs().max() > 1e-2
    torch.testing.assert_close(out(small, real, mask), out(net, real, mask), rtol=1e-5, atol=1e-6)


def test_ones_beside_tokens_hide_nothing_and_black_and_white_images_are_no_masks():
    net = Masked(lambda m: m).double().eval()
    tokens, ones = torch.zeros(2, 9, dtype=torch.long), torch.ones(2, 9).double()
    assert (noise(40)(net, (tokens, ones)).args[1] == 1).all()
    for x in ((torch.rand(4, 1, 8, 8) > 0.5).float(), torch.ones(4, 1, 8, 8), torch.zeros(4, 9)):
        assert noise(40)(nn.Identity(), (x,)).args[0].unique().numel() > 300


class Holes(nn.Module):
    "Images of bytes with holes in them, as the mask says."

    def __init__(self):
        super().__init__()
        self.a, self.n, self.c = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x, mask):
        return self.c(self.n(self.a(torch.cat([x, mask], 1))).relu().mean((2, 3)))


@pytest.mark.parametrize('source', [noise(8), distilled(8, steps=2), photographs(8)])
def test_every_source_leaves_masks_as_they_are(source):
    "And brings images into the range that the first batch norm remembers."
    torch.manual_seed(0)
    x, mask = 64 * torch.randn(4, 3, 12, 12) + 128, (torch.rand(4, 1, 12, 12) > 0.3).float()
    net = pin(Holes(), [(x, mask)])
    made, same = source(net, (x, mask)).args
    assert torch.equal(same, torch.cat([mask, mask]))
    assert made.unique().numel() > 1000 and made.std() > 8
