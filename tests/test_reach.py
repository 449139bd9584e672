"""Blocks of detectors, diffusion networks, image restorers and point clouds, as people have them.

What is left alone is counted by hand, and channels that repeat others are removed without loss.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lbyl_nb.graph import find_groups
from lbyl_nb.layers import BATCH_NORM, LAYERS, by_output, tensors_within
from lbyl_nb.layerwise import layerwise, probe
from lbyl_nb.plans import cells_of, families_of
from lbyl_nb.probes import calibration
from lbyl_nb.recover import restore
from lbyl_nb.restorers import lbyl, merging, prune_only
from lbyl_nb.saved import load_restored, save_restored
from lbyl_nb.trace import trace

EXACT = dict(
    merging=lambda x: merging(),
    lbyl=lambda x: lbyl(0, 0),
    probe=lambda x: probe(calibration(x), ridge=1e-9),
    layerwise=lambda x: layerwise(calibration(x), refit=False, ridge=1e-9),
)


class Unit(nn.Module):
    "Convolution, batch norm and SiLU."

    def __init__(self, i, o, k=1, stride=1, groups=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)
        self.bn, self.act = nn.BatchNorm2d(o), nn.SiLU() if act else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = Unit(c, c, 3), Unit(c, c, 3)

    def forward(self, x):
        return x + self.b(self.a(x))


class C2f(nn.Module):
    "Halves by chunk, of which one goes on through bottlenecks; everything is joined."

    def __init__(self, i, o, n=2):
        super().__init__()
        self.first, self.last = Unit(i, o), Unit((2 + n) * o // 2, o)
        self.m = nn.ModuleList(Bottleneck(o // 2) for _ in range(n))

    def forward(self, x):
        y = list(self.first(x).chunk(2, 1))
        for m in self.m:
            y.append(m(y[-1]))
        return self.last(torch.cat(y, 1))


class Attention(nn.Module):
    "Heads over positions, shaped by numbers that the module keeps."

    def __init__(self, c, heads=2):
        super().__init__()
        self.heads, self.head_dim, self.key_dim = heads, c // heads, c // heads // 2
        self.qkv = Unit(c, 2 * c, act=False)
        self.place, self.out = Unit(c, c, 3, groups=c, act=False), Unit(c, c, act=False)

    def forward(self, x):
        b, c, h, w = x.shape
        sizes = [self.key_dim, self.key_dim, self.head_dim]
        q, k, v = self.qkv(x).view(b, self.heads, sum(sizes), h * w).split(sizes, 2)
        a = (q.transpose(-2, -1) @ k * self.key_dim**-0.5).softmax(-1)
        y = (v @ a.transpose(-2, -1)).view(b, c, h, w)
        return self.out(y + self.place(v.reshape(b, c, h, w)))


class Attending(nn.Module):
    "Halves by a number that the module keeps; one has attention and a small network on top."

    def __init__(self, i):
        super().__init__()
        self.c = i // 2
        self.first, self.last = Unit(i, 2 * self.c), Unit(2 * self.c, i)
        self.attention = Attention(self.c)
        self.up, self.down = Unit(self.c, 2 * self.c), Unit(2 * self.c, self.c, act=False)

    def forward(self, x):
        a, b = self.first(x).split((self.c, self.c), 1)
        b = b + self.attention(b)
        b = b + self.down(self.up(b))
        return self.last(torch.cat((a, b), 1))


class Detector(nn.Module):
    "Two scales, boxes as expectations over bins, scores."

    def __init__(self, bins=4, classes=3):
        super().__init__()
        self.bins, self.classes = bins, classes
        self.stem, self.c2f = Unit(3, 16, 3, 2), C2f(16, 16)
        self.down, self.psa = Unit(16, 32, 3, 2), Attending(32)
        self.fuse = C2f(48, 16, 1)

        def box(c):
            return nn.Sequential(Unit(c, 16, 3), nn.Conv2d(16, 4 * bins, 1))

        def score(c):
            depthwise = Unit(c, c, 3, groups=c)
            return nn.Sequential(depthwise, Unit(c, 16), nn.Conv2d(16, classes, 1))

        self.box = nn.ModuleList([box(16), box(32)])
        self.score = nn.ModuleList([score(16), score(32)])

    def forward(self, x):
        p = self.c2f(self.stem(x))
        q = self.psa(self.down(p))
        p = self.fuse(torch.cat([p, F.interpolate(q, scale_factor=2.0)], 1))
        y = [torch.cat([b(z), s(z)], 1) for b, s, z in zip(self.box, self.score, (p, q))]
        y = torch.cat([z.flatten(2) for z in y], 2)
        box, score = y.split((4 * self.bins, self.classes), 1)
        share = box.view(len(x), 4, self.bins, -1).softmax(2)
        mean = torch.einsum('bcka,k->bca', share, torch.arange(self.bins).to(share))
        return torch.cat([mean, score.sigmoid()], 1)


class Resample(nn.Module):
    "Insists on the number of channels that it was built for."

    def __init__(self, c, stride=1):
        super().__init__()
        self.channels, self.out_channels = c, c
        self.conv = nn.Conv2d(c, c, 3, stride, 1)

    def forward(self, x):
        assert x.shape[1] == self.channels
        return self.conv(x)


class TimeBlock(nn.Module):
    "Group norms, and a time embedding that shifts the channels."

    def __init__(self, i, o, time=16):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, i), nn.Conv2d(i, o, 3, padding=1)
        self.time = nn.Linear(time, o)
        self.norm2, self.conv2 = nn.GroupNorm(2, o), nn.Conv2d(o, o, 3, padding=1)
        self.short = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x, t):
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(t))[:, :, None, None]
        return self.short(x) + self.conv2(F.silu(self.norm2(y)))


class Denoiser(nn.Module):
    "Down, up with a concatenation, and out."

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16))
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), Resample(8, 2)
        self.a, self.b, self.c = TimeBlock(8, 8), TimeBlock(8, 16), TimeBlock(24, 8)
        self.up, self.norm, self.last = Resample(16), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        t = self.embed(x[:, :1].mean((2, 3)) * torch.arange(1, 17).to(x))
        y = self.a(self.first(x), t)
        z = self.up(F.interpolate(self.b(self.down(y), t), scale_factor=2.0))
        return self.last(F.silu(self.norm(self.c(torch.cat([y, z], 1), t))))


class LayerNorm2d(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(c) + 0.5), nn.Parameter(torch.randn(c))

    def forward(self, x):
        y = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class Gated(nn.Module):
    "A block of NAFNet: gates by chunk, no activation, a scale for each branch."

    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(c), LayerNorm2d(c)
        self.conv1, self.conv3 = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.conv2 = nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))
        self.conv4, self.conv5 = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.beta = nn.Parameter(torch.randn(1, c, 1, 1))
        self.gamma = nn.Parameter(torch.randn(1, c, 1, 1))

    def forward(self, x):
        y = torch.mul(*self.conv2(self.conv1(self.norm1(x))).chunk(2, 1))
        y = x + self.conv3(y * self.gate(y)) * self.beta
        z = torch.mul(*self.conv4(self.norm2(y)).chunk(2, 1))
        return y + self.conv5(z) * self.gamma


class Translator(nn.Module):
    "A generator of CycleGAN: reflection, instance norms, residual blocks, transposed convolutions."

    def __init__(self, c=8):
        super().__init__()
        norm, act = nn.InstanceNorm2d, nn.ReLU

        def block():
            return nn.Sequential(
                nn.ReflectionPad2d(1),
                nn.Conv2d(2 * c, 2 * c, 3),
                norm(2 * c),
                act(),
                nn.ReflectionPad2d(1),
                nn.Conv2d(2 * c, 2 * c, 3),
                norm(2 * c),
            )

        self.down = nn.Sequential(
            nn.ReflectionPad2d(3),
            nn.Conv2d(3, c, 7),
            norm(c),
            act(),
            nn.Conv2d(c, 2 * c, 3, 2, 1),
            norm(2 * c),
            act(),
        )
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.up = nn.Sequential(
            nn.ConvTranspose2d(2 * c, c, 3, 2, 1, 1),
            norm(c),
            act(),
            nn.ReflectionPad2d(3),
            nn.Conv2d(c, 3, 7),
            nn.Tanh(),
        )

    def forward(self, x):
        x = self.down(x)
        for b in self.blocks:
            x = x + b(x)
        return self.up(x)


class Points(nn.Module):
    "Features of points, their maximum, and layers behind it: a matrix, or scores."

    def __init__(self, i, o, flat=None):
        super().__init__()
        self.flat = flat
        conv = lambda i, o: [nn.Conv1d(i, o, 1), nn.BatchNorm1d(o), nn.ReLU()]
        self.points = nn.Sequential(*conv(i, 6), *conv(6, 8), *conv(8, 16))
        self.cloud = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, o))

    def forward(self, x):
        x = self.points(x).max(2, keepdim=True)[0]
        return self.cloud(self.flat(x) if self.flat else x.flatten(1))


class Turned(nn.Module):
    "PointNet with its input transform."

    def __init__(self):
        super().__init__()
        self.turn, self.rest = Points(3, 9), Points(3, 4)

    def forward(self, x):
        by = self.turn(x).view(-1, 3, 3) + torch.eye(3).to(x)
        return self.rest(torch.bmm(x.transpose(2, 1), by).transpose(2, 1)).log_softmax(1)


class Shuffled(nn.Module):
    "A unit of ShuffleNet V2: half of the channels goes past a branch, then the halves mix."

    def __init__(self, c=16):
        super().__init__()
        h = c // 2
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3), nn.BatchNorm2d(c), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(h, h, 1),
            nn.BatchNorm2d(h),
            nn.ReLU(),
            nn.Conv2d(h, h, 3, padding=1, groups=h),
            nn.BatchNorm2d(h),
            nn.Conv2d(h, h, 1),
            nn.BatchNorm2d(h),
            nn.ReLU(),
        )
        self.last = nn.Conv2d(c, 2, 1)

    def forward(self, x):
        a, b = self.stem(x).chunk(2, 1)
        y = torch.cat([a, self.branch(b)], 1)
        n, c, *size = y.shape
        return self.last(y.view(n, 2, c // 2, *size).transpose(1, 2).reshape(n, c, *size))


def gated():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Gated(8), nn.Conv2d(8, 3, 3, padding=1))


def size_of(net):
    "{layer: number of its output channels}."
    size = lambda m: m.out_features if isinstance(m, nn.Linear) else m.out_channels
    return {k: size(m) for k, m in net.named_modules() if isinstance(m, LAYERS)}


HEADS = {'box.0.1', 'box.1.1', 'score.0.2', 'score.1.2'}
# what builds a network, its inputs, layers that keep all channels, channels that others keep
NETS = dict(
    detector=(Detector, (3, 16, 16), HEADS, {}),
    denoiser=(Denoiser, (3, 8, 8), {'last'}, {}),
    gated=(gated, (3, 8, 8), {'2'}, {}),
    translator=(Translator, (3, 16, 16), {'up.4'}, {}),
    points=(lambda: Points(3, 4), (3, 20), {'cloud.3'}, {}),
    turned=(Turned, (3, 20), {'turn.cloud.3', 'rest.cloud.3'}, {}),
    shuffled=(Shuffled, (3, 8, 8), {'last'}, {}),
)


def made(build, shape):
    "A network in double precision with random statistics, and inputs."
    torch.manual_seed(0)
    net, x = build().double().eval(), torch.randn(32, *shape, dtype=torch.float64)
    for m in net.modules():
        if isinstance(m, (BATCH_NORM, nn.GroupNorm)):
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_()
        if isinstance(m, BATCH_NORM):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return net, x


def found(net, x):
    return find_groups(trace(net, x), streams=True)


def entries(module, places, taken):
    "Write some channels of a module over others."
    for k, v in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if not v.ndim:
            continue
        v = by_output(module) if k == 'weight' and v.ndim > 1 else v
        v.data[places.flatten()] = v.data[places[taken].flatten()].clone()


def twins(net, groups):
    "The network with half of the units of every cell equal to the others, and the plan."
    net, keep, by_name = copy.deepcopy(net), {}, {g.name: g for g in groups}
    for f in families_of(groups):
        source = torch.arange(f.units)
        for c in cells_of(f):
            source[c.at[len(c.at) // 2 :]] = c.at[: len(c.at) // 2]
        gone = source != torch.arange(f.units)
        assert f.balanced(gone) and gone.sum() * 2 == f.units
        for name, unit in f.members:
            g, places = by_name[name], [(unit == u).nonzero().flatten() for u in range(f.units)]
            taken = torch.arange(g.channels)
            for u in gone.nonzero().flatten().tolist():
                taken[places[u]] = places[source[u]]
            for k, at in g.cut:
                entries(net.get_submodule(k), at, taken)
            for k, a, at in g.parameters:
                flat = getattr(net.get_submodule(k), a).data.view(-1)
                flat[at.flatten()] = flat[at[taken].flatten()].clone()
        keep |= f.rows((~gone).nonzero().flatten().tolist())
    return net, keep


def gap(a, b):
    "The largest relative difference of what two networks put out."
    pairs = list(zip(tensors_within(a), tensors_within(b), strict=True))
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in pairs)


@pytest.mark.parametrize('kind', NETS)
def test_only_these_channels_are_left_alone(kind):
    build, shape, whole, some = NETS[kind]
    net, x = made(build, shape)
    kept = dict.fromkeys(size_of(net), 0)
    for g in found(net, x):
        for name, at in g.cut:
            kept[name] = kept.get(name, 0) + at.numel()
    missed = {k: n - kept[k] for k, n in size_of(net).items() if n != kept[k]}
    assert missed == {k: size_of(net)[k] for k in whole} | some


@pytest.mark.parametrize('kind', NETS)
def test_what_is_promised_is_cut(kind):
    net, x = made(*NETS[kind][:2])
    r = restore(net, x, ratio=0.5, streams=True, restorer=prune_only())
    free = {g.name: g.channels for g in found(net, x) if not g.reason}
    assert {k: 2 * len(v) for k, v in r.plan.items()} == free


@pytest.mark.parametrize('kind', NETS)
def test_repeated_channels_are_removed_without_loss(kind):
    net, x = made(*NETS[kind][:2])
    net, keep = twins(net, found(net, x))

    @torch.no_grad()
    def far(restorer):
        return gap(restore(net, x, keep=keep, restorer=restorer).model(x), net(x))

    assert far(prune_only()) > 1e-3
    # weights alone say nothing of what a head looks at
    known = {k: f for k, f in EXACT.items() if kind != 'detector' or k in ('probe', 'layerwise')}
    gaps = {k: far(f(x)) for k, f in known.items()}
    assert max(gaps.values()) < 1e-6, gaps


def numbers(detector):
    "What a detector keeps: of channels, and what has nothing to do with them."
    attention = detector.psa.attention
    of_channels = detector.psa.c, attention.head_dim, attention.key_dim
    return *of_channels, attention.heads, detector.bins, detector.classes


def test_numbers_that_modules_keep_follow_the_cut(tmp_path):
    net, x = made(Detector, (3, 16, 16))
    r = restore(net, x, ratio=0.5, streams=True)
    assert numbers(net) == (16, 8, 4, 2, 4, 3)
    assert numbers(r.model) == (8, 8, 4, 1, 4, 3)
    save_restored(r.model, r.plan, tmp_path / 'small')
    again = load_restored(made(Detector, (3, 16, 16))[0], x, tmp_path / 'small')
    with torch.no_grad():
        assert torch.equal(again(x), r.model(x))
    again = restore(r.model, x, ratio=0.5, streams=True, restorer=prune_only()).model
    assert numbers(again) == (4, 4, 4, 1, 4, 3) and again(x).shape == net(x).shape


class Counted(nn.Module):
    "Keeps equal numbers: of channels, of rounds, and one that channels must not change."

    def __init__(self):
        super().__init__()
        self.rounds, self.dim, self.part = 8, 8, 8
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        p, q = self.a(x).split(self.dim, 1)
        for _ in range(self.rounds):
            p = (p + q).sigmoid()
        return self.b(p) / self.part


def test_equal_numbers_of_something_else_stay():
    net, x = made(Counted, (3, 8, 8))
    small = restore(net, x, ratio=0.5, streams=True, restorer=prune_only()).model
    assert (small.rounds, small.dim, small.part, small.a.out_channels) == (8, 4, 8, 8)


def test_a_number_in_the_code_is_named_and_the_rest_is_cut():
    net, x = made(lambda: Points(3, 4, flat=lambda x: x.view(-1, 16)), (3, 20))
    r = restore(net, x, ratio=0.5, restorer=prune_only())
    assert set(r.plan) == {'points.0', 'points.3', 'cloud.0'}
    why = r.report.set_index('layer').left_alone['points.6']
    assert 'does not run without its channels' in why


class Pieces(nn.Module):
    "Keeps sizes in tuples: of a split, and of a change of shape."

    def __init__(self):
        super().__init__()
        self.sizes, self.a, self.b = (8, 4), nn.Conv2d(3, 12, 1), nn.Conv2d(4, 6, 1)
        self.c, self.d, self.e = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(6, 2, 1)
        self.mixed = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Flatten(1, 2))

    def forward(self, x):
        p, q = self.a(x).split(self.sizes, 1)
        return self.d(self.mixed(self.c(p).relu())) + self.e(self.b(q).relu())


def test_sizes_in_tuples_follow_the_cut():
    net, x = made(Pieces, (3, 8, 8))
    net, keep = twins(net, found(net, x))
    small = restore(net, x, keep=keep, restorer=merging()).model
    assert (net.sizes, net.mixed[0].unflattened_size) == ((8, 4), (2, 4))
    assert (small.sizes, small.mixed[0].unflattened_size) == ((4, 2), (2, 2))
    with torch.no_grad():
        assert gap(small(x), net(x)) < 1e-6
