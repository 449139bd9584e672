"What a network costs: counted by hand, known before the cut, and found without leaving a trace."

import copy
import io
import itertools
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lbyl_nb.budget import bill, budget
from lbyl_nb.cost import _dry_run, _sample_count, cost
from lbyl_nb.graph import find_groups
from lbyl_nb.recover import restore
from lbyl_nb.restorers import prune_only
from lbyl_nb.trace import trace

C, Up, L = nn.Conv2d, nn.ConvTranspose2d, nn.Linear
image = torch.zeros(2, 3, 9, 8)


def taps(m):
    "All places of a kernel."
    return itertools.product(*map(range, m.kernel_size))


def convolved(m, x):
    "A convolution of one sample, product by product; the outcome, and how many there were."
    pad = [p for size in reversed(m.padding) for p in (size, size)]
    x, n, read = F.pad(x, pad), 0, m.in_channels // m.groups
    sizes = zip(x.shape[1:], m.dilation, m.kernel_size, m.stride)
    size = [(s - d * (k - 1) - 1) // t + 1 for s, d, k, t in sizes]
    y = torch.zeros(m.out_channels, *size, dtype=x.dtype)
    for at in itertools.product(*map(range, size)):
        for tap, o, i in itertools.product(taps(m), range(len(y)), range(read)):
            where = zip(at, m.stride, tap, m.dilation)
            place = [a * t + k * d for a, t, k, d in where]
            source = o // (m.out_channels // m.groups) * read + i
            y[(o, *at)] += m.weight[(o, i, *tap)] * x[(source, *place)]
            n += 1
    return y + m.bias.view(-1, *[1] * len(size)), n


def spread(m, x):
    "A transposed convolution likewise: what it puts down outside is cut off."
    sizes = zip(x.shape[1:], m.stride, m.padding, m.dilation, m.kernel_size, m.output_padding)
    size = [(s - 1) * t - 2 * p + d * (k - 1) + o + 1 for s, t, p, d, k, o in sizes]
    y, n = torch.zeros(m.out_channels, *size, dtype=x.dtype), 0
    read, written = m.in_channels // m.groups, m.out_channels // m.groups
    for at in itertools.product(*map(range, x.shape[1:])):
        for tap, i, o in itertools.product(taps(m), range(m.in_channels), range(written)):
            where = zip(at, m.stride, tap, m.dilation, m.padding)
            place = [a * t + k * d - p for a, t, k, d, p in where]
            product = m.weight[(i, o, *tap)] * x[(i, *at)]
            n += 1
            if any(p < 0 or p >= s for p, s in zip(place, size)):
                continue
            y[(i // read * written + o, *place)] += product
    return y + m.bias.view(-1, *[1] * len(size)), n


LAYERS = {
    'conv1d': (nn.Conv1d(2, 3, 3, stride=2, padding=1), (7,)),
    'conv1d dilated': (nn.Conv1d(2, 4, 2, dilation=3, groups=2), (7,)),
    'conv2d': (C(3, 2, (2, 3), stride=(2, 1), padding=(1, 0)), (4, 5)),
    'conv2d in groups': (C(4, 6, 2, groups=2, dilation=2), (4, 4)),
    'conv2d depthwise': (C(3, 3, 2, groups=3), (3, 4)),
    'conv3d': (nn.Conv3d(2, 2, 2, stride=2), (3, 4, 2)),
    'transposed 1d': (nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (4,)),
    'transposed 2d': (Up(2, 3, (3, 2), stride=(3, 2), output_padding=(1, 0)), (3, 2)),
    'transposed 2d dilated': (Up(2, 2, 2, stride=1, dilation=2, padding=1), (3, 3)),
    'transposed 2d in groups': (Up(4, 6, 2, stride=4, groups=2), (2, 3)),
    'transposed 3d': (nn.ConvTranspose3d(2, 1, 2, stride=2), (2, 1, 2)),
}


@pytest.mark.parametrize('name', LAYERS)
def test_convolutions_by_hand(name):
    "The loops compute what the layer does, so what they count is what it takes."
    layer, size = LAYERS[name]
    layer = copy.deepcopy(layer).double().requires_grad_(False)
    x = torch.randn(3, layer.in_channels, *size, dtype=torch.float64)
    y, n = (spread if name.startswith('transposed') else convolved)(layer, x[0])
    torch.testing.assert_close(y, layer(x)[0])
    assert cost(layer, x) == dict(params=sum(p.numel() for p in layer.parameters()), macs=n)
    assert bill(trace(nn.Sequential(layer), x), []).total({}) == cost(layer, x)


@pytest.mark.parametrize('shape', [(4, 3), (4, 5, 3), (4, 2, 5, 3)])
def test_linear_layers_by_hand(shape):
    "One product for each weight, at each place of a sequence."
    layer, x = L(3, 6), torch.zeros(shape)
    places = list(itertools.product(*map(range, shape[1:-1])))
    assert cost(layer, x)['macs'] == sum(1 for _ in itertools.product(places, range(3), range(6)))
    assert bill(trace(nn.Sequential(layer), x), []).total({}) == cost(layer, x)


def test_attention_by_hand():
    "Written out as products, and as PyTorch's layer, which is one operation."
    n, d, h = 5, 8, 2
    attention, x = nn.MultiheadAttention(d, h, batch_first=True), torch.zeros(3, n, d)
    projections = sum(1 for _ in itertools.product(range(n), range(d), range(4 * d)))
    products = 2 * sum(1 for _ in itertools.product(range(n), range(n), range(d)))
    assert cost(attention, (x, x, x))['macs'] == projections + products
    fused = dict(query=x, key=x, value=x, need_weights=False)
    assert cost(attention, fused)['macs'] == projections + products


class Written(nn.Module):
    "Products that a forward writes down itself: an einsum, a matrix and a vector, two vectors."

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 4))

    def forward(self, x):  # (n, 5, 4)
        y = torch.einsum('nti,oi->nto', x, self.weight)
        v = self.weight.mv(x[0, 0])
        return y + v.dot(v)


def test_products_without_a_layer():
    x = torch.zeros(1, 5, 4)
    assert cost(Written(), x)['macs'] == 5 * 4 * 6 + 6 * 4 + 6


@pytest.mark.parametrize('build, gates', [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize('both', [False, True])
def test_recurrent_layers_by_hand(build, gates, both):
    "In every step, layer and direction: gates from the input and from the state."
    net = build(3, 5, num_layers=2, bidirectional=both, batch_first=True)
    directions = 2 if both else 1
    step = sum(directions * gates * 5 * (width + 5) for width in (3, 5 * directions))
    assert cost(net, torch.zeros(2, 7, 3))['macs'] == 7 * step


@pytest.mark.parametrize('mask', [False, True])
def test_encoder_layers_are_counted_in_every_mode(mask):
    "In evaluation mode PyTorch does all in one operation; with gradients it does not."
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 2), torch.zeros(2, 5, 8)
    args = dict(src=x, src_key_padding_mask=torch.arange(5).expand(2, 5) > 3) if mask else x
    hand = 2 * 5 * (4 * 8 * 8 + 2 * 5 * 8 + 2 * 8 * 16)
    assert cost(net, args)['macs'] == cost(net.eval(), args)['macs'] == hand


def test_under_inference_mode():
    "Operations come whole there, a linear layer as one."
    net, x = nn.Sequential(C(3, 4, 3), nn.Flatten(), L(4 * 7 * 6, 5)), image

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        @torch.inference_mode()
        def forward(self, x):
            return self.net(x)

    want = cost(net, x)
    assert want['macs'] == 3 * 4 * 9 * 7 * 6 + 4 * 7 * 6 * 5
    assert cost(Inside(), x) == want
    with torch.inference_mode():
        assert cost(net, x.clone()) == want


class Shared(nn.Module):
    "One layer called twice, and one weight in two layers."

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.tied, self.last = L(6, 8), L(8, 8), L(8, 8), L(8, 2)
        self.tied.weight = self.twice.weight

    def forward(self, x):
        for layer in (self.first, self.twice, self.twice, self.tied):
            x = layer(x).relu()
        return self.last(x)


class TimeFirst(nn.Module):
    "Works on windows of steps, with time in front."

    def __init__(self):
        super().__init__()
        self.a, self.b = L(6, 8), L(8, 2)

    def forward(self, x):
        windows = x.transpose(0, 1).unflatten(0, (2, -1))
        return self.b(self.a(windows).relu()).flatten(0, 1).transpose(0, 1)


S, R, rows = nn.Sequential, nn.ReLU, torch.zeros(2, 6)


def turned(groups):
    return S(C(3, 8, 1), R(), C(8, 8, 1), Up(8, 8, 3, 2, groups=groups), C(8, 4, 3))


def decoder():
    "Two transposed convolutions that are cut on both sides."
    first = S(C(3, 8, 3), nn.BatchNorm2d(8), R(), Up(8, 6, 3, 2, 1, 1))
    return S(*first, R(), Up(6, 4, 4, 4), R(), C(4, 3, 1))


def in_1d():
    "A decoder of signals."
    return S(nn.Conv1d(3, 8, 3), R(), nn.ConvTranspose1d(8, 6, 5, 3), R(), nn.Conv1d(6, 2, 1))


def parametrized():
    "Its second layer keeps its weight in two parts."
    return S(L(6, 8), R(), weight_norm(L(8, 8)), R(), L(8, 6), R(), L(6, 3))


def normed(between):
    return S(C(3, 8, 3), between, R(), C(8, 4, 3))


NETWORKS = {
    'decoder': (decoder, image),
    'transposed in groups': (lambda: turned(2), image),
    'transposed depthwise': (lambda: turned(8), image),
    'transposed in 1d': (in_1d, torch.zeros(2, 3, 9)),
    'grouped': (lambda: S(C(3, 8, 1), nn.PReLU(8), C(8, 8, 3, groups=4), R(), C(8, 4, 1)), image),
    'norm without weights': (lambda: normed(nn.BatchNorm2d(8, affine=False)), image),
    'instance norm': (lambda: normed(nn.InstanceNorm2d(8)), image),
    'one slope': (lambda: normed(nn.PReLU()), image),
    'parametrized': (parametrized, rows),
    'flattened': (lambda: S(C(3, 4, 3), R(), nn.Flatten(), L(4 * 7 * 6, 5)), image),
    'time first': (TimeFirst, torch.zeros(2, 8, 6)),
    'time first, fewer steps than samples': (TimeFirst, torch.zeros(5, 4, 6)),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_the_bill_is_the_cost_of_the_network_that_is_cut(name):
    "Before the cut and after it; each layer on its own, by hand, gives the same sum."
    build, x = NETWORKS[name]
    net = build().eval()
    traced = trace(net, x)
    groups = [g for g in find_groups(traced) if not g.reason]
    whole, r = bill(traced, groups), restore(net, x, ratio=0.5, restorer=prune_only())
    assert whole.total({}) == cost(net, x) == r.cost.loc['before'].to_dict()
    lost = {g.name: g.channels - len(r.plan[g.name]) for g in groups}
    assert any(lost.values())
    assert whole.total(lost) == cost(r.model, x) == r.cost.loc['after'].to_dict()
    assert whole.total(lost)['params'] == sum(p.numel() for p in r.model.parameters())


def test_the_bill_of_what_is_shared():
    "A layer that is called twice is paid twice, a weight in two layers is one."
    net = Shared().eval()
    have = bill(trace(net, rows), []).total({})
    hand = dict(params=(6 * 8 + 8) + (8 * 8 + 8) + 8 + (8 * 2 + 2), macs=6 * 8 + 3 * 8 * 8 + 8 * 2)
    assert have == cost(net, rows) == hand


@pytest.mark.parametrize('share', [0.3, 0.5, 0.8])
def test_budgets_of_decoders_are_met_by_hand(share):
    "Each layer by hand: what it reads, what it puts out, taps, and how often."
    torch.manual_seed(0)
    encoder = S(C(3, 32, 3, padding=1), R(), C(32, 32, 3, padding=1), R())
    net = S(*encoder, Up(32, 16, 4, 4), R(), C(16, 3, 1)).eval()
    x = torch.zeros(1, 3, 8, 8)

    def by_hand(a, b, c):
        return 64 * 9 * 3 * a + 64 * 9 * a * b + 64 * 16 * b * c + 32 * 32 * c * 3

    kept = [len(v) for v in budget(net, x, macs=share).values()]
    left = by_hand(*kept) / by_hand(32, 32, 16)
    assert share - 0.1 < left <= share


@pytest.mark.parametrize('share', [0.5, 0.7, 0.9])
def test_a_budget_of_parameters_holds_with_the_biases_that_are_added(share):
    torch.manual_seed(0)
    layers = [L(a, b, bias=False) for a, b in zip([6, 10, 10, 10], [10, 10, 10, 4])]
    net = S(*(m for layer in layers for m in (layer, R())))
    whole = sum(p.numel() for p in net.parameters())
    for new in (True, False):
        r = restore(net.eval(), torch.randn(8, 6), params=share, new_biases=new)
        assert any(m.bias is not None for m in r.model if isinstance(m, L)) == new
        assert sum(p.numel() for p in r.model.parameters()) <= share * whole
        assert restore(net, rows, params=1.0, new_biases=new).plan['0'] == list(range(10))


class Alike(nn.Module):
    "Each of 40 tokens becomes a mean of all, by how alike they are."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = L(6, 32), L(32, 6), L(6, 3)

    def forward(self, x):
        h = self.b(self.a(x).relu())
        return self.o(((h @ h.mT).softmax(-1) @ h).mean(1))

    def by_hand(self):
        return 40 * 6 * 2 * self.a.out_features + 2 * 40 * 40 * 6 + 18


class Steps(nn.Module):
    "A recurrent layer behind two convolutions."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 32, 3, padding=1), nn.Conv1d(32, 6, 3, padding=1)
        self.r, self.o = nn.LSTM(6, 16, batch_first=True), L(16, 3)

    def forward(self, x):
        return self.o(self.r(self.b(self.a(x).relu()).relu().mT)[0][:, -1])

    def by_hand(self):
        return 40 * (27 * self.a.out_channels + 4 * 16 * (6 + 16)) + 16 * 3


class Heads(nn.Module):
    "Attention with 4 heads of width 4, whose products cost more than its layers."

    def __init__(self, fused):
        super().__init__()
        self.fused, self.q, self.k, self.v, self.o = fused, L(6, 16), L(6, 16), L(6, 16), L(16, 3)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.mT / 2).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))

    def by_hand(self):
        return 40 * self.q.out_features * (3 * 6 + 2 * 40 + 3)


@pytest.mark.parametrize(
    'build, x, share, least',
    [
        (Alike, torch.randn(2, 40, 6), 0.8, 0.75),
        (Steps, torch.randn(2, 3, 40), 0.8, 0.75),
        (lambda: Heads(True), torch.randn(2, 40, 6), 0.5, 0.5),
        (lambda: Heads(False), torch.randn(2, 40, 6), 0.5, 0.5),
    ],
)
def test_a_budget_of_operations_holds_with_those_of_no_layer(build, x, share, least):
    "Recurrent layers stay, products of matrices stay or go with their heads."
    torch.manual_seed(0)
    net = build().eval()
    r = restore(net, x, macs=share)
    assert least <= r.model.by_hand() / net.by_hand() <= share
    plan = budget(net, x, macs=share)
    small = restore(net, x, keep=plan, restorer=prune_only()).model
    assert least <= small.by_hand() / net.by_hand() <= share
    if not isinstance(net, Heads):
        with pytest.raises(ValueError, match='macs: 0.2 of them cannot be reached'):
            restore(net, x, macs=0.2)


class InPlace(nn.Module):
    "Works in place on its input, draws, writes into a buffer, and counts its calls."

    def __init__(self):
        super().__init__()
        self.layer, self.calls = L(6, 2), 0
        self.register_buffer('seen', torch.zeros(6))

    def forward(self, x):
        self.calls += 1
        self.seen += x.sub_(0.5).sum(0)
        return self.layer(F.dropout(x))


@pytest.mark.parametrize('by_keyword', [False, True])
def test_nothing_is_changed(by_keyword):
    net, x = InPlace(), torch.rand(4, 6)
    before, state, drawn = x.clone(), copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert cost(net, dict(x=x) if by_keyword else x) == dict(params=14, macs=12)
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), drawn)
    assert net.training and net.calls == 0
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_a_bill_needs_no_random_numbers_and_no_inputs():
    "The dry run that positions are counted in."
    net, x = trace(InPlace(), torch.rand(4, 6)), torch.rand(4, 6)
    net.args, before, drawn = (x,), x.clone(), torch.get_rng_state()
    assert bill(net, []).total({}) == dict(params=14, macs=12)
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), drawn)
    assert not any(m._forward_hooks for m in net.model.modules())


def test_samples():
    x = torch.zeros(3, 4)
    for args in ((x, torch.zeros(8, 8)), (torch.tensor(2.0), x), dict(scale=2.0, x=x)):
        assert _sample_count(args) == 3
    assert _sample_count(()) == _sample_count((2.0, torch.tensor(1.0))) == 1


@pytest.mark.parametrize('n', [1, 3, 5])
def test_a_batch_of_any_size(n):
    net = nn.Sequential(C(3, 4, 3), nn.ReLU(), Up(4, 2, 3, 2))
    batch = image[:1].expand(n, -1, -1, -1)
    assert cost(net, batch)['macs'] == 4 * 3 * 9 * 7 * 6 + 4 * 2 * 9 * 7 * 6


def test_what_cannot_be_counted_is_refused():
    says = 'example_inputs: the model cannot be run on them: '
    with pytest.raises(ValueError, match=says + 'RuntimeError'):
        cost(L(3, 5), rows)
    with pytest.raises(ValueError, match=says + 'TypeError'):
        _dry_run(L(6, 5), dict(y=rows))
    net = L(6, 5)
    net.lock = threading.Lock()
    with pytest.raises(ValueError, match='Linear: cannot be copied: TypeError'):
        cost(net, rows)


def test_what_other_threads_print_arrives(monkeypatch):
    "Every line, while networks are counted: standard output belongs to the whole process."
    out, told, done = io.StringIO(), [], threading.Event()
    monkeypatch.setattr(sys, 'stdout', out)

    def talk():
        while not done.is_set():
            print('line')
            told.append(1)

    thread = threading.Thread(target=talk)
    thread.start()
    net = nn.Sequential(*[C(3, 3, 3, padding=1) for _ in range(50)])
    try:
        for _ in range(5):
            cost(net, dict(input=image))
        while not told:
            done.wait(0.001)
    finally:
        done.set()
        thread.join()
    assert out.getvalue() == 'line\n' * len(told)


class Waits(nn.Module):
    "Stops in the middle until all have arrived there."

    def __init__(self, width, gate):
        super().__init__()
        self.a, self.b, self.gate = L(6, width), L(width, 2), [gate]

    def __deepcopy__(self, memo):
        return Waits(self.a.out_features, self.gate[0])

    def forward(self, x):
        y = self.a(x)
        self.gate[0].wait()
        return self.b(y)


def test_threads_count_their_own():
    "All are in the middle of their networks at the same time."
    widths, counts = (3, 5, 9), {}
    gate = threading.Barrier(len(widths), timeout=60)

    def work(w):
        counts[w] = cost(Waits(w, gate), rows)['macs']

    threads = [threading.Thread(target=work, args=(w,)) for w in widths]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert counts == {w: 6 * w + w * 2 for w in widths}


def test_weights_are_not_copied():
    "What runs is a copy of the modules around the same weights."
    net, same = L(6, 2), []
    net.register_forward_hook(lambda m, *_: same.append(m is not net and m.weight is net.weight))
    cost(net, rows)
    assert same == [True]


@pytest.mark.parametrize('how', ['grouped_mm', 'batched_mm', 'eager'])
def test_experts_count_however_they_are_computed(how):
    "Two of four experts a token, three matrices each; all else is the same without experts."
    tf = pytest.importorskip('transformers')
    sizes = dict(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    net = tf.MixtralForCausalLM(tf.MixtralConfig(**sizes, num_experts_per_tok=2)).eval()
    net.set_experts_implementation(how)
    x = dict(input_ids=torch.arange(64).view(4, 16) % 48, use_cache=False)
    whole = cost(net, x)['macs']
    net.model.layers[0].mlp = Nothing()
    gate = 16 * 32 * 4
    assert whole - cost(net, x)['macs'] == 16 * 2 * 3 * 32 * 48 + gate


class Nothing(nn.Module):
    "In place of experts."

    def forward(self, x):
        return x
