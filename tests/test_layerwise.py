"Layer by layer: equal networks written differently, samples that are not alone, counts by hand."

import copy
import importlib
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import shufflenet_v2_x0_5

from lbyl_nb.graph import find_groups
from lbyl_nb.layerwise import layerwise, probe
from lbyl_nb.least_lost import least_lost
from lbyl_nb.probes import Probes, calibration, noise
from lbyl_nb.recover import lbyl_restore, plan, restore
from lbyl_nb.restorers import prune_only
from lbyl_nb.trace import trace

MODULE = importlib.import_module('lbyl_nb.layerwise')  # the package has a function of that name


class Net(nn.Module):
    "Layers by name, and a function of them and of the input; it counts its forward passes."

    def __init__(self, f, **layers):
        super().__init__()
        self.f, self.layers, self.passes = f, nn.ModuleDict(layers), 0

    def forward(self, x):
        self.passes += 1
        return self.f(self.layers, x)


def out(net, x):
    with torch.no_grad():
        return net(x)


def far(net, small, x):
    "Distance of two outputs, relative to how much the first varies among samples."
    y = out(net, x)
    return ((out(small, x) - y).norm() / (y - y.mean(0)).norm()).item()


# Which channels can be spared


def dense(depth):
    "Each layer reads all layers before it."

    def forward(net, x):
        x = net['stem'](x)
        for i in range(depth):
            x = torch.cat([x, net[f'l{i}'](x.relu())], 1)
        return net['fc'](x.relu().mean((2, 3)))

    layers = {f'l{i}': nn.Conv2d(4 * (i + 1), 4, 3, padding=1) for i in range(depth)}
    return Net(forward, stem=nn.Conv2d(3, 4, 3), **layers, fc=nn.Linear(4 * (depth + 1), 3)).eval()


def test_choosing_takes_one_pass_of_the_probes():
    "However many groups a layer reads."
    x, counts = torch.randn(8, 3, 6, 6), {}
    for depth in (2, 6):
        net, probed = dense(depth), []

        def source(model, args):
            probed.append(copy.deepcopy(model))
            probed[-1].passes = 0
            return Probes(probed[-1], (x,))

        assert len(plan(net, x, 0.5, least_lost(source))) == depth + 1
        counts[depth] = [p.passes for p in probed]
    assert counts == {2: [1], 6: [1]}


def test_errors_count_where_the_next_layer_reads_them():
    """A batch norm that scales an output of the consumer down makes what it alone reads cheap.

    The plan is that of the network whose weights hold the scale.
    """
    torch.manual_seed(0)
    a, b, x = nn.Linear(4, 4), nn.Linear(4, 2), torch.randn(64, 4)
    kept = {}
    with torch.no_grad():
        a.weight.copy_(torch.eye(4))
        a.bias.zero_()
        b.weight.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))
        b.bias.zero_()
    for small in (0, 1):
        norm = nn.BatchNorm1d(2, eps=0)
        norm.weight.data[small] = -0.01
        norm.running_var.copy_(torch.tensor([4.0, 0.25]))
        factor = norm.weight.detach() / norm.running_var.sqrt()
        folded = copy.deepcopy(b)
        folded.weight.data *= factor[:, None]
        normed = nn.Sequential(a, nn.ReLU(), b, norm, nn.ReLU(), nn.Linear(2, 2)).eval()
        plain = nn.Sequential(a, nn.ReLU(), folded, nn.Identity(), nn.ReLU(), normed[-1]).eval()
        torch.testing.assert_close(out(normed, x), out(plain, x))
        plans = [plan(n, x[:1], 0.5, least_lost(calibration(x)))['0'] for n in (normed, plain)]
        assert plans[0] == plans[1]
        kept[small] = plans[0]
    assert kept == {0: [2, 3], 1: [0, 1]}


# The stream


def test_a_tiny_scale_cannot_make_up_for_the_stream():
    """An output that the batch norm multiplies by nearly nothing keeps its own target.

    It comes out as it was, and not as what the shortcut lacks, divided by nearly nothing.
    """
    torch.manual_seed(0)

    def forward(net, x):
        x = net['stem'](x).relu()
        y = net['n'](net['b'](net['a'](x).relu()))
        shortcut = net['up'](net['down'](x).relu())
        return net['fc']((y + shortcut).relu())

    net = Net(
        forward,
        stem=nn.Linear(8, 8),
        a=nn.Linear(8, 16),
        b=nn.Linear(16, 8),
        n=nn.BatchNorm1d(8),
        down=nn.Linear(8, 16),
        up=nn.Linear(16, 8),
        fc=nn.Linear(8, 4),
    )
    net.eval()
    net.layers.n.weight.data[3] = 1e-6
    x, seen = torch.randn(128, 8), []
    keep = {'layers.a': range(15), 'layers.down': range(4)}
    small = lbyl_restore(net, x, keep=keep, restorer=layerwise(calibration(x), refit=False))
    for m in (net, small):
        m.layers.b.register_forward_hook(lambda layer, i, o: seen.append(o))
        out(m, x)
    missed = (seen[1] - seen[0]).norm(dim=0) / (seen[0] - seen[0].mean(0)).norm(dim=0)
    assert missed[3] < 0.5, missed
    others = torch.cat([missed[:3], missed[4:]])
    assert others.min() > missed[3]  # these do make up for the stream


class Branch(nn.Module):
    "A sum, written in one of many ways, of a pruned branch y and of a pruned shortcut h."

    def __init__(self, add, norm):
        super().__init__()
        self.add = add
        self.stem, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 5)
        self.m, self.h = nn.Conv2d(6, 12, 3, padding=1), nn.Conv2d(12, 6, 1)
        self.a, self.y = nn.Conv2d(6, 12, 3, padding=1), nn.Conv2d(12, 6, 1)
        self.n = nn.BatchNorm2d(6) if norm else nn.Identity()

    def forward(self, x):
        x = self.stem(x).relu()
        h, y = self.h(self.m(x).relu()), self.n(self.y(self.a(x).relu()))
        return self.fc(self.add(h, y).relu().mean((2, 3)))


def plus(h, y):
    return h + y


def flipped(h, y):
    return y + h


def in_place(f):
    def add(h, y):
        f(h, y)
        return h

    return add


# name: the sum, and what it multiplies h and y by; which of them is named first
SUMS = {
    'add': (lambda h, y: torch.add(h, y, alpha=-3.0), 1, -3, plus),
    'add.first': (lambda h, y: torch.add(y, h, alpha=0.1), 0.1, 1, flipped),
    'method': (lambda h, y: h.add(y, alpha=10.0), 1, 10, plus),
    'add_': (lambda h, y: h.add_(y, alpha=0.5), 1, 0.5, plus),
    'add_.first': (lambda h, y: y.add_(h, alpha=2), 2, 1, flipped),
    'minus': (lambda h, y: h - y, 1, -1, plus),
    'minus.first': (lambda h, y: y - h, -1, 1, flipped),
    'sub': (lambda h, y: torch.sub(h, y, alpha=0.25), 1, -0.25, plus),
    'sub.first': (lambda h, y: torch.subtract(y, h, alpha=0.25), -0.25, 1, flipped),
    'rsub': (lambda h, y: torch.rsub(y, h, alpha=2), 1, -2, flipped),
    'sub_': (in_place(lambda h, y: h.sub_(y, alpha=-2)), 1, 2, plus),
    'isub': (in_place(lambda h, y: h.__isub__(y)), 1, -1, plus),
}


@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize('name', SUMS)
def test_factors_of_summands(name, norm):
    "A sum with factors is restored as well as the same network whose factors are in the weights."
    torch.manual_seed(0)
    add, of_h, of_y, order = SUMS[name]
    x = torch.randn(96, 3, 6, 6)
    net, folded = Branch(add, norm).eval(), Branch(order, norm).eval()
    if norm:
        net.n.running_var.uniform_(0.5, 2)
        net.n.weight.data.uniform_(0.5, 1.5)
    folded.load_state_dict(net.state_dict())
    for m, factor in ((folded.h, of_h), (folded.n if norm else folded.y, of_y)):
        m.weight.data *= factor
        m.bias.data *= factor
    torch.testing.assert_close(out(net, x), out(folded, x), rtol=1e-4, atol=1e-5)
    how = dict(keep=dict(m=range(5), a=range(10)), restorer=layerwise(calibration(x), ridge=0.01))
    small, as_small = (lbyl_restore(n, x, **how) for n in (net, folded))
    torch.testing.assert_close(out(small, x), out(as_small, x), rtol=1e-3, atol=1e-4)


# Samples that are not alone, or not first


def alone(x):
    return x


class Sequence(nn.Module):
    "An MLP beside a shortcut; `turn` puts time first, `mix` lets samples see each other."

    def __init__(self, turn=False, mix=alone, add=plus, hidden=16):
        super().__init__()
        self.turn, self.mix, self.add = turn, mix, add
        self.inp, self.fc = nn.Linear(6, 6), nn.Linear(6, 3)
        self.up, self.down = nn.Linear(6, hidden), nn.Linear(hidden, 6)

    def forward(self, x):
        turned = lambda v: v.transpose(0, 1) if self.turn else v
        x = turned(self.inp(x).relu())
        y = self.down(self.up(x).relu())
        return self.fc(turned(self.mix(self.add(x, y))))


@pytest.mark.parametrize('length', [1, 3, 8, 16, 32])
def test_time_first_is_restored_like_samples_first(length):
    "The same function with and without turning: the same weights come out, at any length."
    torch.manual_seed(0)
    turned, x = Sequence(turn=True).eval(), torch.randn(8, length, 6)
    straight = Sequence()
    straight.load_state_dict(turned.state_dict())
    how = dict(keep=dict(up=range(6)), restorer=layerwise(calibration(x), ridge=None))
    with pytest.warns(UserWarning, match='^down: '):
        small = lbyl_restore(turned, x[:2], **how)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        want = lbyl_restore(straight.eval(), x[:2], **how)
    for k, v in want.state_dict().items():
        torch.testing.assert_close(small.state_dict()[k], v, rtol=1e-2, atol=1e-3)


class Twice(nn.Module):
    "Two MLPs in a row, each beside a shortcut; the second one lacks what the first MLP misses."

    def __init__(self, turn):
        super().__init__()
        self.turn, self.inp, self.fc = turn, nn.Linear(6, 6), nn.Linear(6, 3)
        self.up1, self.down1 = nn.Linear(6, 16), nn.Linear(16, 6)
        self.up2, self.down2 = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x):
        turned = lambda v: v.transpose(0, 1) if self.turn else v
        x = turned(self.inp(x))
        x = x + self.down1(self.up1(x).relu())
        return self.fc(turned(x + self.down2(self.up2(x).relu())))


@pytest.mark.parametrize('size', [1, 2**28])
def test_streams_with_time_first(size, monkeypatch):
    "The stream is made up for as with samples first, in whatever portions the record is kept."
    monkeypatch.setattr(MODULE, '_RECORD', size)
    torch.manual_seed(0)
    turned, straight, x = Twice(True).eval(), Twice(False).eval(), torch.randn(16, 5, 6)
    straight.load_state_dict(turned.state_dict())
    keep = dict(up1=range(5), up2=range(12))
    how = dict(keep=keep, restorer=layerwise(calibration(x), ridge=0.01))
    with pytest.warns(UserWarning, match='^down1: gives'):
        small = lbyl_restore(turned, x[:2], **how)
    want = lbyl_restore(straight, x[:2], **how).state_dict()
    for k, v in small.state_dict().items():
        torch.testing.assert_close(v, want[k], rtol=1e-3, atol=1e-4)


def test_a_recurrent_network_with_time_first():
    "Convolutions, an LSTM that has time first, and a linear layer at each step."

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Sequential(
                nn.Conv2d(1, 8, 3, padding=1),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 12, 3, padding=1),
                nn.ReLU(),
            )
            self.r, self.f = nn.LSTM(12, 8), nn.Linear(8, 5)

        def forward(self, x):
            columns = self.c(x).mean(2).permute(2, 0, 1)
            return self.f(self.r(columns)[0])

    torch.manual_seed(0)
    net, x = Reader().eval(), torch.randn(16, 1, 8, 10)
    keep = {'c.0': range(6)}
    with pytest.warns(UserWarning, match='^f: gives'):
        small = lbyl_restore(net, x[:2], keep=keep, restorer=layerwise(calibration(x)))
    pruned = lbyl_restore(net, x[:2], keep=keep, restorer=prune_only())
    y = out(net, x)
    gap = [(out(m, x) - y).norm() for m in (small, pruned)]
    assert gap[0] < 0.5 * gap[1], gap


def centred(x):
    return x - x.mean(0)


def from_first(x):
    return x - x[:1]


def capped(x):
    "Only the first twelve rows of a batch are looked at: what comes behind is dropped."
    return torch.cat([x[:12], 0 * x[12:]])


def by_number(x):
    return x * len(x) / 12


MIXES = {f.__name__: f for f in (alone, centred, from_first, capped, by_number)}


@pytest.mark.parametrize('refit', [True, False])
@pytest.mark.parametrize('mix', ['alone', 'centred', 'from_first', 'by_number'])
def test_the_reported_error_is_what_the_network_misses(mix, refit):
    """The last layer's error says what fraction of the output's variance is missed on the probes.

    It does only if what was taken for the two networks was them.
    """
    torch.manual_seed(0)
    x = torch.randn(24, 6).double()

    def forward(net, x):
        y = net['n'](net['b'](net['a'](x).relu()))
        return net['d'](net['c'](MIXES[mix](y)).relu())

    layers = dict(
        a=nn.Linear(6, 12),
        b=nn.Linear(12, 6, bias=False),
        n=nn.BatchNorm1d(6),
        c=nn.Linear(6, 10),
        d=nn.Linear(10, 4),
    )
    net = Net(forward, **layers).double().eval()
    net.layers.n.running_mean.normal_()
    keep = {'layers.a': range(7), 'layers.c': range(8)}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        r = restore(net, x, keep=keep, restorer=layerwise(calibration(x), refit=refit, ridge=1e-6))
    y, got = out(net, x), out(r.model, x)
    want = (got - y).square().sum() / (y - y.mean(0)).square().sum()
    report = r.report.set_index('layer').output_error
    assert report['layers.c'] == pytest.approx(want.item(), rel=1e-3)
    assert len(said) == (mix != 'alone')
    assert all(str(w.message).startswith('layers.') for w in said)


def test_batch_norms_without_running_statistics():
    "They take the statistics of the batch, which are not those of two networks together."
    torch.manual_seed(0)
    norm = lambda: nn.BatchNorm2d(8, track_running_stats=False)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        norm(),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        norm(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 4),
    ).eval()
    x = torch.randn(64, 3, 6, 6)
    with pytest.warns(UserWarning, match='depend on each other'):
        how = layerwise(calibration(x), ridge=0.01)
        r = restore(net, x, keep={'0': range(4), '3': range(4)}, restorer=how)
    y, got = out(net, x), out(r.model, x)
    want = (got - y).square().sum() / (y - y.mean(0)).square().sum()
    assert r.report.output_error[1] == pytest.approx(want.item(), rel=1e-2)


def test_a_stream_behind_batch_norms_without_running_statistics():
    "Nothing is known of what they multiply by: no term of the stream, and no error."
    torch.manual_seed(0)
    net = Branch(plus, True)
    net.n = nn.BatchNorm2d(6, track_running_stats=False)
    x, how = torch.randn(96, 3, 6, 6), dict(keep=dict(m=range(8), a=range(10)))
    with pytest.warns(UserWarning, match='depend on each other'):
        small = lbyl_restore(net.eval(), x, **how, restorer=layerwise(calibration(x)))
    pruned = lbyl_restore(net, x, **how, restorer=prune_only())
    assert far(net, small, x) < 0.8 * far(net, pruned, x)


class Experts(nn.Module):
    """Each token goes to the expert of its largest score, against the mean of the batch.

    An expert takes a third of the tokens of the batch, and those in `closed` take none.
    """

    def __init__(self, closed=()):
        super().__init__()
        self.closed = list(closed)
        self.inp, self.pre, self.gate = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 3)
        self.ups = nn.ModuleList(nn.Linear(6, 12) for _ in range(3))
        self.downs = nn.ModuleList(nn.Linear(12, 6) for _ in range(3))
        self.fc = nn.Linear(6, 3)

    def tokens(self, scores, i):
        scores = scores - scores.mean(0)
        scores[:, self.closed] = -1e9
        return (scores.argmax(-1) == i).nonzero().flatten()[: len(scores) // 3]

    def forward(self, x):
        t = self.pre(self.inp(x).relu()).flatten(0, 1)
        scores, y = self.gate(t), torch.zeros_like(t)
        for i, (up, down) in enumerate(zip(self.ups, self.downs)):
            at = self.tokens(scores, i)
            y = y.index_add(0, at, down(up(t[at]).relu()))
        return self.fc((t + y).view(x.shape))


class Choosing(Experts):
    "Experts take the tokens that they like best, in this order: as many in every network."

    def tokens(self, scores, i):
        return scores[:, i].topk(len(scores) // 3).indices


@pytest.mark.parametrize('length', [6, 7])
@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('kind', [Experts, Choosing])
def test_experts(kind, seed, length):
    """Tokens that are sent elsewhere in the restored network do not spoil the experts' weights.

    Be their number a multiple of that of the samples or not: they are as good as by `probe`.
    """
    torch.manual_seed(seed)
    net, x = kind().eval(), torch.randn(32, length, 6)
    keep = {'inp': range(6), **{f'ups.{i}': range(9) for i in range(3)}}
    small = {}
    for make in (probe, layerwise):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            how = make(calibration(x))
            small[make.__name__] = lbyl_restore(net, x, keep=keep, restorer=how)
        assert len(said) == (make is layerwise)
    t = out(nn.Sequential(net.inp, nn.ReLU(), net.pre, nn.Flatten(0, 1)), x)
    for i in range(3):
        expert = lambda net: nn.Sequential(net.ups[i], nn.ReLU(), net.downs[i])
        gap = {k: far(expert(net), expert(m), t) for k, m in small.items()}
        assert gap['layerwise'] < 1.2 * gap['probe'] + 0.02, gap


def test_an_expert_without_tokens_is_named():
    net, x = Experts(closed=[1]).eval(), torch.randn(32, 7, 6)
    with pytest.raises(ValueError, match=r'ups\.1 is given nothing on example_inputs'):
        lbyl_restore(net, x, keep={'ups.1': range(8)}, restorer=layerwise(calibration(x)))


def test_the_record_is_used_up_in_portions(monkeypatch):
    "One layer at a time or all at once: the same weights."
    torch.manual_seed(0)
    net, x = Sequence(turn=True, mix=centred).eval(), torch.randn(8, 5, 6)
    how, small, passes = dict(keep=dict(up=range(6))), [], []
    net.register_forward_pre_hook(lambda m, i: passes.append(len(i[0])))
    for size in (1, 2**28):
        monkeypatch.setattr(MODULE, '_RECORD', size)
        passes.clear()
        with pytest.warns(UserWarning):
            small.append(lbyl_restore(net, x[:2], **how, restorer=layerwise(calibration(x))))
        # one to see whether it runs, two to find the samples, and two for each portion: two layers
        # are rewritten
        assert passes.count(8) == (7 if size == 1 else 5)
    for k, v in small[0].state_dict().items():
        torch.testing.assert_close(v, small[1].state_dict()[k], rtol=1e-4, atol=1e-5)


def test_random_numbers_are_the_same_in_both_passes():
    "Dropout that is always on: without copies of channels the network gives what it did."

    class Dropping(Sequence):
        def forward(self, x):
            x = nn.functional.dropout(self.inp(x).relu(), 0.03)
            return self.fc(self.down(self.up(x).relu()))

    torch.manual_seed(0)
    net, x = copied(Dropping().double().eval()), torch.randn(16, 4, 6).double()
    traced, ys = trace(net, x), []
    [group] = [g for g in find_groups(traced) if g.name == 'up']
    with pytest.warns(UserWarning, match='depend on each other'):
        layerwise(calibration(x), ridge=1e-9).rewrite(traced, [group], {'up': list(range(12))})
    assert not traced.model.down.weight[:, 12:].any()
    for m in (net, traced.model):
        torch.manual_seed(1)
        ys.append(out(m, x))
    torch.testing.assert_close(*ys, rtol=1e-4, atol=1e-4)


def test_the_check_costs_one_forward_pass():
    "Both networks, on half of the probes each, beside the two that are run side by side."
    net, x, samples = Sequence().eval(), torch.randn(12, 4, 6), []

    def source(model, args):
        copied = copy.deepcopy(model)
        copied.register_forward_pre_hook(lambda m, i: samples.append(len(i[0])))
        return Probes(copied, (x,))

    lbyl_restore(net, x[:1], ratio=0.5, restorer=layerwise(source))
    assert samples == [24, 6, 6]


@pytest.mark.parametrize('turn', [False, True])
def test_probes_are_not_changed(turn):
    "Nor is the model, where a network works in place on what it is given."

    class Own(Sequence):
        def forward(self, x):
            return super().forward(x.sub_(0.5))

    net, x = Own(turn=turn).eval(), torch.randn(8, 4, 6)
    before, state = x.clone(), copy.deepcopy(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        source = lambda model, args: Probes(copy.deepcopy(model), (x,))
        lbyl_restore(net, x[:1].clone(), ratio=0.5, restorer=layerwise(source))
    assert torch.equal(x, before)
    for k, v in net.state_dict().items():
        assert torch.equal(v, state[k]), k


def test_arguments_without_samples():
    "A tensor that is no batch is given to both networks as it is."

    class Scaled(Sequence):
        def forward(self, x, scale, table):
            return super().forward(x * scale + table.sum())

    net, args = Scaled().eval(), (torch.randn(12, 4, 6), torch.full((1,), 2.0), torch.arange(5.0))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        how = layerwise(calibration(args))
        small = lbyl_restore(net, args, keep=dict(up=range(12)), restorer=how)
    with torch.no_grad():
        y = net(*args)
        assert (small(*args) - y).norm() < 0.1 * y.norm()


def copied(net):
    "The network with the last four filters of `up` equal to the first four."
    with torch.no_grad():
        for t in (net.up.weight, net.up.bias):
            t[-4:] = t[:4]
    return net


@st.composite
def sequences(draw):
    "A network with anything that hinders, and inputs."
    torch.manual_seed(draw(st.integers(0, 1000)))
    add = SUMS[draw(st.sampled_from(sorted(SUMS)))][0]
    mix = MIXES[draw(st.sampled_from(sorted(MIXES)))]
    net = Sequence(draw(st.booleans()), mix, lambda h, y: add(h.clone(), y))
    x = torch.randn(draw(st.sampled_from([16, 24])), draw(st.integers(3, 24)), 6)
    return copied(net.eval()).double(), x.double()


@settings(max_examples=50, deadline=None)
@given(sequences(), st.booleans(), st.sampled_from([1, 2**28]))
def test_copies_are_restored_exactly(case, refit, size):
    "Whatever the sum, wherever the samples: without repeated channels the network is what it was."
    net, x = case
    restorer = layerwise(calibration(x), refit=refit, ridge=1e-9)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        patch.setattr(MODULE, '_RECORD', size)
        try:
            small = lbyl_restore(net, x, keep=dict(up=range(12)), restorer=restorer)
        except ValueError as e:
            assert any(f'{k}: ' in str(e) for k, _ in net.named_children()), e
            return
    assert (out(small, x) - out(net, x)).norm() < 1e-4 * out(net, x).norm()


def test_the_state_of_the_random_generator_is_left_alone():
    for turn in (False, True):
        net, x = Sequence(turn=turn).eval(), torch.randn(8, 4, 6)
        state = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            lbyl_restore(net, x[:1], ratio=0.5, restorer=layerwise(calibration(x)))
        assert torch.equal(torch.get_rng_state(), state)


def test_a_table_of_the_network_is_no_reason_for_a_warning():
    "What is made of it alone is solved for alone, and read by both networks."

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)
            self.up, self.down = nn.Linear(2, 16), nn.Linear(16, 6)
            self.register_buffer('table', torch.randn(1, 40, 2))

        def forward(self, x):
            of_table = self.down(self.up(self.table).relu()).amax(1)
            return self.b(self.a(x).relu() + of_table)

    torch.manual_seed(0)
    net, x = Biased().eval(), torch.randn(32, 6)
    keep = dict(up=range(3))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        small = lbyl_restore(net, x, keep=keep, restorer=layerwise(calibration(x)))
        pruned = lbyl_restore(net, x, keep=keep, restorer=prune_only())
    assert far(net, small, x) < far(net, pruned, x)


def test_a_sum_with_itself_is_no_stream():
    "y + y lacks nothing beside y: it is restored like a layer of twice the weights."
    torch.manual_seed(0)

    def once(net, x):
        return net['b'](net['a'](net['stem'](x).relu()).relu())

    def doubled(net, x):
        y = once(net, x)
        return net['fc']((y + y).relu())

    layers = dict(a=nn.Linear(6, 12), b=nn.Linear(12, 6), fc=nn.Linear(6, 3))
    net = Net(doubled, stem=nn.Linear(6, 6), **layers).eval()
    folded = copy.deepcopy(net)
    folded.f = lambda net, x: net['fc'](once(net, x).relu())
    folded.layers.b.weight.data *= 2
    folded.layers.b.bias.data *= 2
    x = torch.randn(64, 6)
    torch.testing.assert_close(out(net, x), out(folded, x))
    how = dict(keep={'layers.a': range(7)}, restorer=layerwise(calibration(x), ridge=0.01))
    ys = [out(lbyl_restore(n, x, **how), x) for n in (net, folded)]
    torch.testing.assert_close(*ys, rtol=1e-3, atol=1e-4)


def test_a_source_may_give_the_model_itself():
    "The layers that are rewritten are then not those that are run."
    torch.manual_seed(0)
    net, x = Sequence(mix=centred).eval(), torch.randn(8, 5, 6)
    itself = lambda model, args: Probes(model, (x,))
    keep = dict(up=range(6))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        own = lbyl_restore(net, x, keep=keep, restorer=layerwise(itself))
        apart = lbyl_restore(net, x, keep=keep, restorer=layerwise(calibration(x)))
    for k, v in own.state_dict().items():
        assert torch.equal(v, apart.state_dict()[k]), k


@pytest.mark.parametrize('seed', [0, 1])
def test_channels_that_are_spared_in_a_shuffle(seed):
    "Units of a shuffle may be of unequal sizes; a plan of whole ones comes out, and is accepted."
    torch.manual_seed(seed)
    net, x = shufflenet_v2_x0_5(num_classes=10).eval(), torch.randn(8, 3, 32, 32)
    chosen = plan(net, x[:1], 0.5, least_lost(calibration(x)), streams=True)
    by_size = plan(net, x[:1], 0.5, streams=True)
    assert {k: len(v) for k, v in chosen.items()} == {k: len(v) for k, v in by_size.items()}
    small = restore(net, x[:1], keep=chosen, restorer=prune_only())
    assert small.plan == chosen


class OnAStream(nn.Module):
    "A residual block on large maps; the second half of its inner channels copies the first."

    def __init__(self, stride=1):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=stride, padding=1)
        self.up, self.norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.down, self.behind = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        with torch.no_grad():
            for name in ('weight', 'bias'):
                for m in (self.up, self.norm):
                    v = getattr(m, name)
                    v[6:] = v[:6]

    def forward(self, x):
        x = self.stem(x)
        x = x + self.behind(self.down(self.norm(self.up(x)).relu()))
        return self.fc(x.relu().mean((2, 3)))


@pytest.mark.parametrize('restorer', [layerwise, probe])
@pytest.mark.parametrize('stride', [1, 2])
def test_on_large_maps_copies_are_restored(stride, restorer):
    "Where the regression sees some of the positions, behind a shortcut too: nothing is lost."
    torch.manual_seed(0)
    net, x = OnAStream(stride).eval(), torch.randn(4, 3, 96, 96)
    r = restore(net, x, keep=dict(up=range(6)), restorer=restorer(noise(64)))
    assert (r.report.output_error.dropna() < 1e-4).all()
    torch.testing.assert_close(out(r.model, x), out(net, x), rtol=1e-2, atol=1e-3)
