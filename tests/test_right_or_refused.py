"""What comes back is right, or it is refused.

Random small networks contain what once made a network wrong without a word, with removed channels
that repeat kept ones.
"""

import copy
from collections import deque
from collections.abc import ValuesView
from dataclasses import dataclass, fields
from functools import partial
from types import MethodType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lbyl_nb import recover
from lbyl_nb.budget import budget
from lbyl_nb.layerwise import layerwise, probe, probed_lbyl
from lbyl_nb.probes import calibration, noise
from lbyl_nb.recover import plan, restore
from lbyl_nb.restorers import lbyl, merging, prune_only

FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
EXACT = dict(
    merging=lambda x: merging(),
    lbyl=lambda x: lbyl(0, 0),
    probe=lambda x: probe(calibration(x), ridge=1e-9),
    layerwise=lambda x: layerwise(calibration(x), refit=False, ridge=1e-9),
)
exact = st.sampled_from(sorted(EXACT))


class Net(nn.Module):
    "A function of named layers and of the input."

    def __init__(self, f, **layers):
        super().__init__()
        self.f = f
        for k, m in layers.items():
            setattr(self, k, m)

    def forward(self, *x):
        return self.f(self, *x)


def gap(a, b):
    "The largest difference of two outputs, as a part of the largest entry of the second."
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def out(net, *x):
    with torch.no_grad():
        return net(*x)


@torch.no_grad()
def repeat(*modules):
    "Let the second half of the channels of modules be the first half once more."
    for m in modules:
        for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)]:
            if t.ndim:
                t[len(t) // 2 :] = t[: len(t) // 2]


def first_half(layer):
    return list(range(len(layer.weight) // 2))


# Outputs


@dataclass
class Data:
    value: object
    number: int = 3


@dataclass(frozen=True, slots=True)
class Slots:
    value: object


class Thing:
    def __init__(self, value):
        self.value = value


WRAPS = dict(
    tuple=lambda v: (v, 1),
    list=lambda v: ['a', v],
    dict=lambda v: dict(b=v),
    data=Data,
    slots=Slots,
    deque=lambda v: deque([v]),
    values=lambda v: {1: v}.values(),
)


def inside(v):
    "All tensors of an output, in order."
    if isinstance(v, torch.Tensor):
        return [v]
    if isinstance(v, (Data, Slots)):
        v = [getattr(v, f.name) for f in fields(v)]
    elif isinstance(v, Thing):
        v = [v.value]
    elif isinstance(v, dict):
        v = list(v.values())
    elif not isinstance(v, (tuple, list, deque, ValuesView)):
        return []
    return [t for w in v for t in inside(w)]


def shown(h, how):
    "A hidden tensor as a network puts it out."
    for k in how['wraps']:
        if k == 'detach':
            h = h.detach()
        if k == 'spatial mean':
            h = h.mean((2, 3))
        if k == 'half':
            h = h[:, 1::2]
    for k in how['containers']:
        h = WRAPS[k](h)
    return Thing(h) if how['thing'] else h


made_of_it = st.sampled_from(['detach', 'spatial mean', 'half'])
hidden_output = st.fixed_dictionaries(
    dict(
        layer=st.integers(0, 2),
        containers=st.lists(st.sampled_from(sorted(WRAPS)), max_size=12),
        wraps=st.lists(made_of_it, unique=True, max_size=3),
        first=st.booleans(),
        thing=st.booleans(),
        before=st.booleans(),
    )
)


def showing(outputs):
    "Four convolutions; hidden tensors are put out before or after their ReLU."

    def f(net, x):
        seen = []
        for k in 'abc':
            z = getattr(net, k)(x)
            x = z.relu()
            seen.append((z, x))
        y = net.d(x)
        part = lambda o: shown(seen[o['layer']][not o['before']], o)
        front = [part(o) for o in outputs if o['first']]
        behind = [part(o) for o in outputs if not o['first']]
        return (*front, y, *behind)

    torch.manual_seed(0)
    sizes = dict(a=(3, 8), b=(8, 6), c=(6, 8), d=(8, 4))
    net = Net(f, **{k: nn.Conv2d(*s, 3, padding=1) for k, s in sizes.items()}).double().eval()
    repeat(net.a, net.b, net.c)
    return net, torch.randn(16, 3, 6, 6).double()


def one_output(**how):
    "The network whose second layer is put out, and its input."
    usual = dict(layer=1, containers=[], wraps=[], first=True, thing=False, before=False)
    return showing([{**usual, **how}])


@pytest.mark.parametrize('depth', [1, 10])
@pytest.mark.parametrize('kind', WRAPS)
def test_one_output(kind, depth):
    "However deep it lies, the layer is left alone, and no other one."
    net, x = one_output(containers=[kind] * depth)
    assert restore(net, x, ratio=0.5, restorer=prune_only()).plan.keys() == {'a', 'c'}


def test_a_part_of_a_layer_that_is_put_out():
    "What the layer reads is not to blame for the slice behind it."
    net, x = one_output(wraps=['half'], before=True)
    r = restore(net, x, ratio=0.5, restorer=prune_only())
    assert r.plan.keys() == {'a', 'c'}
    assert out(r.model, x)[0].shape[1] == 3


@FEW
@given(st.lists(hidden_output, max_size=2), exact, st.floats(0.1, 0.7))
def test_outputs(outputs, name, ratio):
    "Whatever is put out, at any depth, is what the dense network puts out; the rest is pruned."
    net, x = showing(outputs)
    free = {'abc'[i] for i in range(3)} - {'abc'[o['layer']] for o in outputs}
    if not free and not any('half' in o['wraps'] for o in outputs):
        with pytest.raises(ValueError, match="its channels are the network's output"):
            restore(net, x, ratio=ratio)
        return
    want = inside(out(net, x))
    r = restore(net, x, ratio=ratio)
    assert {k for k in r.plan if '[' not in k} == free  # the other channels of a layer may go
    assert [v.shape for v in inside(out(r.model, x))] == [v.shape for v in want]
    keep = {k: first_half(getattr(net, k)) for k in free}
    found = inside(out(restore(net, x, keep=keep, restorer=EXACT[name](x)).model, x))
    assert len(found) == len(want) == 1 + len(outputs)
    for a, b in zip(found, want):
        assert a.shape == b.shape and gap(a, b) < 1e-4


# Cuts


def ramp(y):
    return torch.linspace(0.5, 1.5, y.shape[1], dtype=y.dtype).view(1, -1, 1, 1)


def halves_in_turn(y):
    return y.view(len(y), 2, -1, *y.shape[2:]).flip(1).flatten(1, 2)


def by_fours(y):
    return y.view(-1, 4, *y.shape[2:]).relu().view(y.shape)


# what a network makes of the layer in front and of the next one, by its width
WIDTH = dict(
    nothing=lambda y, z: (y, z),
    scaled=lambda y, z: (y, z / y.shape[1] ** 0.5),
    in_front=lambda y, z: (y * y.shape[1], z),
    branch=lambda y, z: (y, z if y.shape[1] > 6 else -z),
    slices=lambda y, z: (torch.cat([y[:, :4], 2 * y[:, 4:]], 1), z),
    view=lambda y, z: (halves_in_turn(y), z),
    fixed_view=lambda y, z: (by_fours(y), z),
    places=lambda y, z: (y * ramp(y), z),
    shifted=lambda y, z: (y.roll(1, 1).roll(-1, 1), z + y.shape[1]),
)
SEEN = {'scaled', 'in_front', 'branch', 'places', 'shifted'}  # the labels say nothing of them


def by_width(kinds, end, side):
    "Three convolutions and a linear layer; `kinds` stand behind the first and the second one."

    def f(net, x):
        x, widths = net.a(x), []
        for layer, kind in ((net.b, kinds[0]), (net.c, kinds[1])):
            y = x.relu()
            y, _ = WIDTH[kind](y, y)
            _, x = WIDTH[kind](y, layer(y))
            widths.append(y.shape[1])
        y = net.o(x.relu().mean((2, 3)))
        if end:
            y = y * widths[0] ** -0.5
        return (y, y.sum(1) * widths[1]) if side else (y,)

    torch.manual_seed(0)
    layers = dict(a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(8, 8, 1), c=nn.Conv2d(8, 8, 1))
    net = Net(f, **layers, o=nn.Linear(8, 4)).double().eval()
    return net, torch.randn(4, 3, 6, 6).double()


def silenced(net, kept):
    "The network whose next layers do not listen to what a plan removes."
    net = copy.deepcopy(net)
    with torch.no_grad():
        for k, nxt in ('ab', 'bc', 'co'):
            gone = [i for i in range(8) if i not in kept.get(k, range(8))]
            getattr(net, nxt).weight[:, gone] = 0
    return net


widths = st.tuples(*[st.sampled_from(sorted(WIDTH))] * 2)


def unequal(kinds, end, side, ratio):
    "By how much a pruned network and the silenced one differ; the plan. None where refused."
    net, x = by_width(kinds, end, side)
    try:
        r = restore(net, x, ratio=ratio, restorer=prune_only())
    except ValueError as e:
        assert str(e).startswith('Net has nothing to prune (')
        return None, {}
    pairs = zip(out(r.model, x), out(silenced(net, r.plan), x))
    return max(gap(a, b) for a, b in pairs), r.plan


@FEW
@given(widths, st.booleans(), st.booleans(), st.sampled_from([0.25, 0.5, 0.75]))
def test_cuts(kinds, end, side, ratio):
    "A layer is cut if that changes nothing but what it is for, and left alone otherwise."
    far, kept = unequal(kinds, end, side, ratio)
    assert far is None or far < 1e-4
    if kinds == ('nothing', 'nothing'):
        assert kept.keys() == {'a', 'b', 'c'} - outputs_show(end, side)


def outputs_show(end, side):
    "Layers whose width shows in what is put out."
    return {k for k, shows in dict(a=end, b=side).items() if shows}


@pytest.mark.parametrize('end', [False, True])
@pytest.mark.parametrize('side', [False, True])
def test_behind_the_last_layer(end, side):
    "What is done with the width where no layer follows shows in the outputs alone."
    far, kept = unequal(('nothing', 'nothing'), end, side, 0.75)
    assert far < 1e-4
    assert kept.keys() == {'a', 'b', 'c'} - outputs_show(end, side)


@pytest.mark.parametrize('kind', sorted(SEEN))
def test_it_is_the_check_that_finds_them(kind, monkeypatch):
    "Without it they come out wrong."
    assert (unequal((kind, 'nothing'), False, False, 0.75)[0] or 0) < 1e-4
    monkeypatch.setattr(recover, '_differing', lambda *_: None)
    assert unequal((kind, 'nothing'), False, False, 0.75)[0] > 1e-3


# Arithmetic on the way

KNOWN = dict(
    relu=torch.relu,
    silu=F.silu,
    gelu=F.gelu,
    tanh=torch.tanh,
    none=lambda x: x,
    leaky=lambda x: F.leaky_relu(x, 0.3),
    hardswish=F.hardswish,
)
SCALES = dict(
    times=lambda x: x * 1.7,
    over=lambda x: x / -3,
    neg=lambda x: -x,
    flipped=lambda x: 0.5 * x,
)
UNKNOWN = dict(
    square=lambda x: x**2,
    power=lambda x: (x.abs() + 1) ** 1.5,
    exp=lambda x: (-(x**2)).exp(),
    swish=lambda x: x * torch.sigmoid(x),
    shift=lambda x: x + 1,
    hardswish=lambda x: x * F.relu6(x + 3) / 6,
    less=lambda x: 2 - x,
    gelu=lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    relu=lambda x: x * (x > 0),
    maximum=lambda x: torch.maximum(x, x * 0),
    inverse=lambda x: 1 / (2 + x**2),
    absolute=torch.abs,
    twice=lambda x: x + F.relu(x),
    then_silu=F.silu,
    then_relu=torch.relu,
    clamp=lambda x: x.clamp(-1, 0.5),
)
MODULES = dict(prelu=lambda: nn.PReLU(8, 0.3), layer_scale=lambda: Scale(8))
FUNCTIONS = {**SCALES, **UNKNOWN}
STEPS = sorted({*FUNCTIONS, *MODULES})


class Scale(nn.Module):
    "A factor for each channel."

    def __init__(self, m):
        super().__init__()
        self.factor = nn.Parameter(torch.randn(1, m, 1, 1))

    def forward(self, x):
        return x * self.factor


def arithmetic(first, steps, seed):
    "A network with a chain of operations behind a batch norm, two of whose channels are constant."

    def f(net, x):
        x = KNOWN[first](net.norm(net.a(x)))
        for i, k in enumerate(steps):
            step = getattr(net, f's{i}') if k in MODULES else FUNCTIONS[k]
            x = step(x)
        return net.o(x)

    torch.manual_seed(seed)
    own = {f's{i}': MODULES[k]() for i, k in enumerate(steps) if k in MODULES}
    net = Net(f, a=nn.Conv2d(3, 8, 3), norm=nn.BatchNorm2d(8), **own, o=nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.bias.normal_(std=2)
        net.norm.weight[[2, 5]] = 0
    return net.double().eval(), torch.randn(8, 3, 6, 6).double()


steps = st.lists(st.sampled_from(STEPS), max_size=3)


def check_constants(first, steps, name, seed, value=None):
    net, x = arithmetic(first, steps, seed)
    if value is not None:
        net.norm.bias.data[[2, 5]] = value

    def far(restorer):
        small = restore(net, x, keep=dict(a=[0, 1, 3, 4, 6, 7]), restorer=restorer).model
        return gap(out(small, x), out(net, x))

    probed = probed_lbyl(calibration(x))
    found = far(dict(lbyl=lbyl(), merging=merging(), probed=probed)[name])
    if set(steps) <= {*SCALES, 'layer_scale'}:
        assert found < 1e-4
    else:
        assert found <= far(prune_only()) * (1 + 1e-6) + 1e-9


known = st.sampled_from(sorted(KNOWN))
closed_form = st.sampled_from(['lbyl', 'merging'])


@settings(FEW, max_examples=60)
@given(known, steps, closed_form, st.integers(0, 9))
def test_constants_on_their_way(first, steps, name, seed):
    "Constant channels are made up for where their way to a reader is known, else no harm is done."
    check_constants(first, steps, name, seed)


@pytest.mark.parametrize('name', ['lbyl', 'probed'])
@pytest.mark.parametrize('step', STEPS)
def test_constants_behind_one_step(step, name):
    for seed in range(3):
        check_constants('leaky', [step], name, seed)


ONE_AND_ANOTHER = [
    ('hardswish', ['then_silu']),
    ('none', ['neg', 'then_relu']),
    ('tanh', ['clamp', 'then_relu']),
    ('none', ['over', 'layer_scale', 'then_relu']),
]


@pytest.mark.parametrize('first, steps', ONE_AND_ANOTHER)
@pytest.mark.parametrize('value', [-4.0, 3.0])
def test_constants_that_one_function_makes_and_another_takes(first, steps, value):
    "What is zero behind both is not made up for by what one of them alone would make."
    for seed in range(3):
        check_constants(first, steps, 'lbyl', seed, value)


@FEW
@given(steps, exact)
def test_copies_on_their_way(steps, name):
    "Whatever is done to channels one by one, a copy is a copy; scales of copies may differ."
    net, x = arithmetic('relu', steps, 0)
    net.norm.weight.data.uniform_(0.5, 2)
    repeat(net.a, net.norm)
    for k in ('s0', 's1', 's2'):
        if isinstance(getattr(net, k, None), nn.PReLU):
            repeat(getattr(net, k))
    keep = dict(a=[0, 1, 2, 3])
    if 'layer_scale' in steps and set(steps) & {*UNKNOWN, 'prelu'}:
        return
    r = restore(net, x, keep=keep, restorer=EXACT[name](x))
    assert r.model.a.out_channels == 4
    assert gap(out(r.model, x), out(net, x)) < 1e-4


def test_side_by_side():
    "Copies, all layers rewritten."
    net, x = showing([])
    keep = {k: first_half(getattr(net, k)) for k in 'abc'}
    r = restore(net, x, keep=keep, restorer=layerwise(calibration(x), ridge=1e-9))
    assert gap(out(r.model, x)[0], out(net, x)[0]) < 1e-4


# Tokens


@settings(FEW, max_examples=8)
@given(
    rows=st.integers(5, 40),
    width=st.integers(4, 12),
    seed=st.integers(0, 99),
    padded=st.booleans(),
    restorer=st.sampled_from([probe, layerwise]),
)
def test_tokens(rows, width, seed, padded, restorer):
    "Example tokens that are all zero restore as well as random ones."

    def f(net, t):
        h = net.table(t)
        return net.o(h + net.down(net.up(h).relu()))

    torch.manual_seed(seed)
    table = nn.Embedding(rows, width, padding_idx=0 if padded else None)
    layers = dict(up=nn.Linear(width, 32), down=nn.Linear(32, width), o=nn.Linear(width, 3))
    net = Net(f, table=table, **layers).eval()
    real = torch.randint(rows, (64, 12))

    def missed(example, restorer):
        small = restore(net, example, ratio=0.5, restorer=restorer).model
        return (out(small, real) - out(net, real)).norm().item()

    zeros = missed(torch.zeros(1, 12, dtype=torch.long), restorer(noise()))
    assert zeros <= 2 * missed(real[:1], restorer(noise()))
    assert zeros < missed(real[:1], prune_only())


@pytest.mark.parametrize('by_token', [True, False])
def test_what_tokens_look_up_and_a_layer_adds_to_is_a_stream(by_token):
    "It keeps its channels unless streams are asked for; what positions look up is a constant."

    def f(net, x, tokens):
        return net.o((net.up(x) + net.table(tokens if by_token else net.places)).relu())

    torch.manual_seed(0)
    layers = dict(up=nn.Linear(4, 8), o=nn.Linear(8, 3))
    net = Net(f, table=nn.Embedding(7, 8), **layers).eval()
    net.register_buffer('places', torch.arange(5))
    inputs = torch.randn(2, 5, 4), torch.randint(7, (2, 5))
    kept = plan(net, inputs, ratio=0.5, streams=True)
    assert [len(v) for v in kept.values()] == [4]
    if by_token:
        with pytest.raises(ValueError, match='residual stream'):
            plan(net, inputs, ratio=0.5)
    else:
        assert [len(v) for v in plan(net, inputs, ratio=0.5).values()] == [4]


# Half precision


@FEW
@given(st.floats(5e3, 6e4), st.integers(2, 4))
def test_half_precision(size, copies):
    "Copies add up to a weight that float16 has room for, or has not."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2 * copies, 1), nn.ReLU(), nn.Conv2d(2 * copies, 2, 1)).eval()
    with torch.no_grad():
        for i in range(copies):
            for t in (net[0].weight, net[0].bias):
                t[2 * i : 2 * i + 2] = t[:2]
        net[2].weight.fill_(size)
    net, limit = net.half(), 65504 / copies
    if abs(size / limit - 1) < 0.01:
        return  # rounded up or down
    x = torch.zeros(1, 3, 4, 4).half()
    how = dict(keep={'0': [0, 1]}, restorer=lbyl(0, 0))
    if size > limit:
        with pytest.raises(ValueError, match=r'2\.weight: .* too large for torch.float16'):
            restore(net, x, **how)
    else:
        small = restore(net, x, **how).model
        want = torch.full((2, 2, 1, 1), copies * size)
        torch.testing.assert_close(small[2].weight.float(), want, rtol=1e-3, atol=0)


# Networks that are the same, written another way

image = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def chain(norm=nn.BatchNorm2d, inplace=False, conv=nn.Conv2d):
    torch.manual_seed(0)
    net = nn.Sequential(
        conv(3, 8, 3),
        norm(8),
        nn.ReLU(inplace),
        conv(8, 6, 3),
        norm(6),
        nn.ReLU(inplace),
        conv(6, 4, 1),
    ).eval()
    for m in net:
        if isinstance(m, nn.Conv2d):
            continue
        for v in [*m.parameters(), *m.buffers()]:
            if v.is_floating_point():
                v.data.uniform_(0.5, 2)
    return net


def both(a, b, x=image, y=None, **how):
    "Two networks restored in the same way: the same plan, all layers of theirs cut."
    r = restore(a, x, ratio=0.5, **how)
    s = restore(b, x if y is None else y, ratio=0.5, **how)
    assert r.plan == s.plan and r.cost.params.equals(s.cost.params)
    return r, s


def test_channels_last():
    "The same plan, and the same network, in its own memory format."
    net = chain()
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    r, s = both(net, last)
    assert r.plan.keys() == {'0', '3'}
    torch.testing.assert_close(out(s.model, image), out(r.model, image))
    for i in (0, 3):
        w = s.model[i].weight
        assert w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous()
    assert r.model[3].weight.is_contiguous()


def test_channels_last_through_a_flattening():
    "What stands in front of a flattening is cut as in the usual format."
    torch.manual_seed(0)
    flat = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), *flat, nn.Linear(32, 4)).eval()
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    r, s = both(net, last)
    where = image.to(memory_format=torch.channels_last)
    assert s.plan.keys() == {'0'}
    torch.testing.assert_close(out(s.model, where), out(r.model, image))


def test_frozen_batch_norms():
    frozen = pytest.importorskip('torchvision.ops').FrozenBatchNorm2d
    net = chain()
    twin = chain(frozen)
    twin.load_state_dict({k: v for k, v in net.state_dict().items() if 'tracked' not in k})
    torch.testing.assert_close(out(twin, image), out(net, image))
    for restorer in (lbyl(), layerwise(noise(16))):
        r, s = both(net, twin, restorer=restorer)
        assert r.plan.keys() == {'0', '3'} and type(s.model[1]) is frozen
        torch.testing.assert_close(out(s.model, image), out(r.model, image), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('affine', [False, True])
def test_instance_norm_and_relu_in_place(affine):
    norm = lambda m: nn.InstanceNorm2d(m, affine=affine)
    r, s = both(chain(norm), chain(norm, inplace=True))
    assert r.plan.keys() == {'0', '3'}
    assert torch.equal(out(s.model, image), out(r.model, image))


class Conv1D(nn.Module):
    "The linear layer of GPT-2: its weight stands the other way."

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_linear_layers_that_stand_the_other_way():
    torch.manual_seed(0)
    rows = torch.randn(4, 6)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    twin = nn.Sequential(Conv1D(8, 6), nn.ReLU(), Conv1D(3, 8)).eval()
    for i in (0, 2):
        twin[i].weight.data = net[i].weight.T.clone()
        twin[i].bias.data = net[i].bias
    r, s = both(net, twin, rows)
    assert type(s.model[0]) is Conv1D
    assert (s.model[0].nf, s.model[2].nx) == (4, 4)
    torch.testing.assert_close(out(s.model, rows), out(r.model, rows))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_around_the_call(dtype):
    net = chain()
    want = restore(net, image, ratio=0.5)
    with torch.autocast('cpu', dtype=dtype):
        found = restore(net, image, ratio=0.5)
    assert found.plan == want.plan and found.plan.keys() == {'0', '3'}
    for k, v in want.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[k], v)


# what a network does to hidden channels, at random
AT_RANDOM = dict(
    dropout=lambda x: F.dropout(x, 0.3),
    spatial=lambda x: F.dropout2d(x, 0.3),
    noise=lambda x: x + 0.1 * torch.randn_like(x),
    mask=lambda x: x * (torch.rand_like(x) > 0.2),
    drawn=lambda x: x + torch.normal(torch.zeros_like(x), 0.1),
    bernoulli=lambda x: x * torch.bernoulli(torch.full_like(x, 0.8)),
)


@pytest.mark.parametrize('kind', AT_RANDOM)
def test_random_numbers_in_the_forward_pass(kind):
    "They are no reason to leave channels alone, and restore without probes as if there were none."

    def restored(change):
        def forward(n, x):
            x = change(n.a(x).relu())
            x = change(n.b(x).relu())
            return n.c(x)

        torch.manual_seed(0)
        layers = dict(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 6, 3), c=nn.Conv2d(6, 4, 1))
        net = Net(forward, **layers).eval()
        return restore(net, image, ratio=0.5, restorer=merging())

    random, still = restored(AT_RANDOM[kind]), restored(lambda x: x)
    assert random.plan == still.plan
    assert random.plan.keys() == {'a', 'b'}
    for k, v in still.model.state_dict().items():
        if k.startswith('a') or kind in ('dropout', 'spatial', 'mask', 'bernoulli'):
            torch.testing.assert_close(random.model.state_dict()[k], v)


def test_an_activation_that_a_hook_keeps():
    "It has a history, which cannot be copied; the network can."
    net = chain()
    want = restore(net, image, ratio=0.5).model
    net[0].register_forward_hook(lambda m, i, o: setattr(m, 'seen', o))
    net(image)
    assert net[0].seen.grad_fn is not None
    found = restore(net, image, ratio=0.5).model
    for k, v in want.state_dict().items():
        assert torch.equal(found.state_dict()[k], v)
    assert net[0].seen.grad_fn is not None and net[0].seen.shape[1] == 8


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_network_that_casts_to_a_dtype_that_it_holds(dtype):
    def build(f):
        net = Net(f, n=chain())
        net.dtype = dtype
        return net.to(dtype).eval()

    casts = build(lambda net, x: net.n(x.to(net.dtype)))
    plain = build(lambda net, x: net.n(x))
    r, s = both(plain, casts, image.to(dtype), image)
    assert s.model.dtype == dtype and s.plan.keys() == {'n.0', 'n.3'}
    for k, v in r.model.state_dict().items():
        assert torch.equal(s.model.state_dict()[k], v)


def test_an_input_without_a_batch():
    "One image, or one vector, as PyTorch's layers take them."
    net = chain(norm=lambda m: nn.Identity())
    r, s = both(net, net, image[:1], image[0], restorer=lbyl())
    assert s.plan.keys() == {'0', '3'}
    for k, v in r.model.state_dict().items():
        assert torch.equal(s.model.state_dict()[k], v)


def test_one_bad_group_of_twenty(monkeypatch):
    "It is found from what differs, not by trying groups one after the other."

    def f(net, x):
        for i, layer in enumerate(net.layers):
            x = layer(x).relu()
            if i == 7:
                x = x.view(-1, 8)
        return x

    traced, trace = [], recover.trace

    def counted(*args):
        traced.append(trace(*args))
        return traced[-1]

    monkeypatch.setattr(recover, 'trace', counted)
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(20)])
    r = restore(Net(f, layers=layers).eval(), torch.randn(2, 8), ratio=0.5)
    assert r.plan.keys() == {f'layers.{i}' for i in range(19)} - {'layers.7'}
    assert len(traced) <= 4


def grouped():
    "A group norm of four groups; a layer in two pieces, of which one is read by another layer."

    def f(net, x):
        x = net.norm(net.a(x)).relu()
        u, v = net.b(x).relu().chunk(2, 1)
        return net.c(torch.cat([u, v, net.d(v).relu()], 1))

    torch.manual_seed(0)
    layers = dict(
        a=nn.Conv2d(3, 16, 3),
        norm=nn.GroupNorm(4, 16),
        b=nn.Conv2d(16, 12, 3),
        d=nn.Conv2d(6, 4, 1),
        c=nn.Conv2d(16, 4, 1),
    )
    return Net(f, **layers).eval()


def pieces(kept, n, of):
    "How many channels are kept in each of equal pieces."
    return [sum(i * of // n == k for i in kept) for k in range(of)]


CHOICES = dict(
    ratio=lambda net: plan(net, image, 0.4),
    params=lambda net: budget(net, image, params=0.5),
    macs=lambda net: budget(net, image, macs=0.6),
)


def cut_layer(m, rows, columns):
    "A convolution with some of its filters and of what they read."
    new = nn.Conv2d(len(columns), len(rows), m.kernel_size)
    new.weight = nn.Parameter(m.weight[rows][:, columns])
    new.bias = nn.Parameter(m.bias[rows])
    return new


def channels_of(small, net):
    "Which channels of a layer those of a smaller one were, by their biases."
    return [(net.bias == v).nonzero().item() for v in small.bias]


@pytest.mark.parametrize('choice', CHOICES)
def test_pieces_that_must_stay_equal(choice):
    "Choices respect them, and what comes out is the network that does not hear the others."
    net = grouped()
    small = restore(net, image, keep=CHOICES[choice](net), restorer=prune_only()).model
    a, b, d = (channels_of(getattr(small, k), getattr(net, k)) for k in 'abd')
    assert len(a) < 16 and len(b) < 12
    assert len(set(pieces(a, 16, 4))) == 1
    assert len(set(pieces(b, 12, 2))) == 1
    # by hand: the same layers with the kept channels
    written = copy.deepcopy(net)
    written.a = cut_layer(net.a, a, range(3))
    written.norm = nn.GroupNorm(4, len(a))
    written.b = cut_layer(net.b, b, a)
    written.d = cut_layer(net.d, d, [i - 6 for i in b if i >= 6])
    written.c = cut_layer(net.c, range(4), [*b, *(12 + i for i in d)])
    torch.testing.assert_close(out(small, image), out(written, image))


# Operations on positions, with channels along them


def sampled(h):
    "Half of each number and half of the next."
    at = (torch.arange(8) + 0.5).to(h) * 2 / 8 - 7 / 8
    grid = torch.stack([torch.zeros_like(at), at], 1)
    grid = grid[None, :, None].expand(len(h), 8, 1, 2)
    return F.grid_sample(h[:, None, :, None], grid, align_corners=False)[:, 0, :, 0]


ALONG = dict(
    max_pool=lambda h: F.max_pool1d(h[:, None], 3, 1, 1)[:, 0],
    mean=lambda h: F.avg_pool1d(h[:, None], 3, 1, 1, count_include_pad=False)[:, 0],
    max_pool_2d=lambda h: F.max_pool2d(h[:, None, :, None], (3, 1), 1, (1, 0))[:, 0, :, 0],
    max_pool_3d=lambda h: F.max_pool3d(h.view(-1, 1, 2, 4, 1), (1, 3, 1), 1, (0, 1, 0)).flatten(1),
    resized=lambda h: F.interpolate(h[:, None], scale_factor=1.1)[:, 0],
    sampled=sampled,
)
ACROSS = dict(
    max_pool=lambda y: F.max_pool2d(y[:, None], (1, 3), 1, (0, 1))[:, 0],
    mean=lambda y: F.avg_pool2d(y[:, None], (1, 3), 1, (0, 1))[:, 0],
    adaptive=lambda y: F.adaptive_avg_pool2d(y[:, None], (None, 5))[:, 0],
    resized=lambda y: F.interpolate(y[:, None], scale_factor=(1, 1.1), mode='bilinear')[:, 0],
)


@pytest.mark.parametrize('kind', ALONG)
def test_positions_that_are_channels_stay(kind):
    "On noise the last channel is silent, so that no comparison of outputs shows what reads it."

    def f(net, x):
        return net.o(F.relu(net.b(ALONG[kind](F.relu(net.a(x))))))

    net = Net(f, a=nn.Linear(5, 8), b=nn.Linear(8, 6), o=nn.Linear(6, 3)).double().eval()
    net.a.bias.data[7], net.a.weight.data[7] = -20, 0.5
    r = restore(net, torch.randn(6, 5).double(), ratio=0.3, restorer=prune_only())
    report = r.report.set_index('layer')
    assert report.kept.to_dict() == dict(a=8, b=4, o=3)
    assert 'go through' in report.left_alone['a']


@pytest.mark.parametrize('kind', ACROSS)
def test_positions_beside_channels_do_not_keep_them(kind):
    def f(net, x):
        return net.o(ACROSS[kind](F.relu(net.a(x))).flatten(1))

    net = Net(f, a=nn.Conv1d(3, 8, 1), o=nn.Linear(8 * 5, 3)).double().eval()
    x = torch.randn(6, 3, 5).double()
    repeat(net.a)
    small = restore(net, x, keep=dict(a=range(4)), restorer=merging()).model
    assert small.a.out_channels == 4
    assert gap(out(small, x), out(net, x)) < 1e-6


# Outputs that hold channels in other things than tensors


def one_by_one(h):
    yield from h


HIDDEN = dict(
    array=lambda h: h.detach().numpy(),
    asarray=lambda h: np.asarray(h.detach()),
    worked_on=lambda h: Thing(np.maximum(h.detach().numpy()[:, ::2], 0)),
    numbers=lambda h: h.tolist(),
    floats=lambda h: Data(1, [float(v) for v in h[0]]),
    expression=lambda h: (t for t in (h, None)),
    generator=one_by_one,
    iterator=lambda h: map(abs, [h]),
    function=lambda h: lambda: h,
    default=lambda h: lambda h=h: h,
    partial=lambda h: partial(torch.add, h),
    method=lambda h: MethodType(abs, h),
    own_method=lambda h: h.mean,
)
HARMLESS = dict(
    nothing=None,
    whole=3,
    name='a',
    number=0.5,
    numbers=[0.1, [0.2]],
    data=Data(0.5, 2),
    array=np.arange(8.0),
    scalar=np.float32(1),
    thing=Thing(object()),
    function=lambda: 1,
    generator=(i for i in range(3)),
    partial=partial(max, 0.5),
)


def with_an_output(of):
    "A network that puts something out beside its result, made of a hidden tensor."

    def f(net, x):
        h = F.relu(net.a(x))
        return net.o(F.relu(net.b(h))), of(h)

    torch.manual_seed(0)
    net = Net(f, a=nn.Linear(5, 8), b=nn.Linear(8, 6), o=nn.Linear(6, 3)).eval()
    return restore(net, torch.randn(4, 5), ratio=0.3).report.set_index('layer')


@pytest.mark.parametrize('kind', HIDDEN)
def test_channels_in_an_output_that_is_no_tensor_stay(kind):
    report = with_an_output(HIDDEN[kind])
    assert report.kept.to_dict() == dict(a=8, b=4, o=3)
    assert report.left_alone['a'].startswith('its channels')


@pytest.mark.parametrize('kind', HARMLESS)
def test_other_things_in_an_output_keep_no_channels(kind):
    assert with_an_output(lambda h: HARMLESS[kind]).kept.to_dict() == dict(a=6, b=4, o=3)


def test_numbers_that_are_not_put_out_keep_no_channels():
    seen = []
    report = with_an_output(lambda h: seen.append(h.tolist()) or 'name')
    assert report.kept.to_dict() == dict(a=6, b=4, o=3) and seen


def test_an_output_of_arrays_alone():
    def f(net, x):
        return net.o(F.relu(net.a(x))).detach().numpy()

    net, x = Net(f, a=nn.Linear(5, 8), o=nn.Linear(8, 3)).eval(), torch.randn(4, 5)
    repeat(net.a)
    small = restore(net, x, keep=dict(a=range(4)), restorer=merging()).model
    assert small.a.out_features == 4 and small.o.out_features == 3
    assert np.allclose(small(x), net(x), atol=1e-5)
