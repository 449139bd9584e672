"Restorers that run the network: properties, edges, bad input, and trained networks on real images."

import copy
import math
from collections import UserDict
from operator import sub

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from test_recover import FEW, networks, out
from torch import nn

from lbyl_nb import bench, data, models
from lbyl_nb.distilled import distil, distilled
from lbyl_nb.layers import as_args
from lbyl_nb.layerwise import layerwise, probe, probed_lbyl
from lbyl_nb.least_lost import least_lost
from lbyl_nb.moments import RIDGES, _held_out_error, held_out_ridge, in_turn, look, row_moments
from lbyl_nb.probes import calibration, noise, pin
from lbyl_nb.recover import lbyl_restore, plan, restore
from lbyl_nb.restorers import merging, prune_only

MAKE = dict(
    channels=lambda s: probe(s, taps=False),
    taps=probe,
    consumers=lambda s: layerwise(s, refit=False),
    every_layer=layerwise,
    lbyl=probed_lbyl,
)


@pytest.mark.parametrize('name', MAKE)
@FEW
@given(networks())
def test_random_networks(name, drawn):
    """Any ratio gives a network of the wanted widths with finite outputs.

    The model passed in is what it was.
    """
    net, x = drawn
    state = copy.deepcopy(net.state_dict())
    r = restore(net, x, ratio=0.5, restorer=MAKE[name](noise(8)))
    assert out(r.model, x).isfinite().all()
    assert out(r.model, x).shape == out(net, x).shape
    for k, v in net.state_dict().items():
        assert torch.equal(v, state[k]), k
    for k, kept in r.plan.items():
        assert len(r.model.get_submodule(k).weight) == len(kept), k


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
    sizes = lambda kept: {k: len(v) for k, v in kept.items()}
    assert sizes(plan(net, x, 0.5, least_lost(noise(8)))) == sizes(plan(net, x, 0.5))


def simple(norm=True):
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(216, 4),
    ]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize('name', MAKE)
def test_without_batch_norm(name):
    "Noise cannot be pinned there, and everything still works; distillation says that it cannot."
    net, x = simple(norm=False), torch.randn(2, 3, 8, 8)
    small = lbyl_restore(net, x, ratio=0.5, restorer=MAKE[name](noise(16)))
    assert out(small, x).isfinite().all()
    with pytest.raises(ValueError, match='no batch norm with running statistics'):
        lbyl_restore(net, x, ratio=0.5, restorer=MAKE[name](distilled(4)))


@pytest.mark.parametrize('name', MAKE)
def test_frozen_batch_norm(name):
    """A batch norm that does not learn and stays in evaluation mode is pinned like any other.

    It stays frozen.
    """
    net, x = simple().train(), torch.randn(2, 3, 8, 8)
    net[1].eval().requires_grad_(False)
    small = lbyl_restore(net, x, ratio=0.5, restorer=MAKE[name](noise(16)))
    assert not small[1].training and not small[1].weight.requires_grad
    assert small[0].training and small[0].weight.requires_grad


class Several(nn.Module):
    "Tokens and an image."

    def __init__(self):
        super().__init__()
        self.tokens, self.image = nn.Embedding(10, 8), simple()
        self.a, self.b = nn.Linear(12, 9), nn.Linear(9, 2)

    def forward(self, tokens, image):
        both = torch.cat([self.tokens(tokens).mean(1), self.image(image)], 1)
        return self.b(self.a(both).relu())


@pytest.mark.parametrize('name', MAKE)
@pytest.mark.parametrize('named', [True, False])
def test_several_inputs(name, named):
    net = Several().eval()
    inputs = dict(tokens=torch.tensor([[0, 9, 3]]), image=torch.randn(1, 3, 8, 8))
    examples = inputs if named else tuple(inputs.values())
    small = lbyl_restore(net, examples, ratio=0.5, restorer=MAKE[name](noise(12)))
    assert small(**inputs).isfinite().all()
    assert small.a.out_features == 4


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    """Half precision is left for the probes: activations of 1e5 do not overflow.

    The result comes back in the model's type.
    """
    net = simple()
    net[1].weight.data.fill_(3e4)
    net, x = net.to(dtype), torch.randn(2, 3, 8, 8).to(dtype)
    small = lbyl_restore(net, x, ratio=0.5, restorer=layerwise(noise(16)))
    for v in small.state_dict().values():
        if v.is_floating_point():
            assert v.dtype == dtype and v.isfinite().all()


@pytest.mark.parametrize('name', MAKE)
def test_dead_channels_and_few_probes(name):
    """A dead channel gives a zero row in the Gram matrix, two probes too few equations.

    The answer is finite.
    """
    net, x = simple(), torch.randn(2, 3, 8, 8)
    net[1].weight.data[:4] = 0
    net[1].bias.data[:4] = -1
    for p in net.parameters():
        assert p.isfinite().all()
    small = lbyl_restore(net, x, ratio=0.5, restorer=MAKE[name](noise(2)))
    assert out(small, x).isfinite().all()


def test_nan_names_the_layer():
    how = layerwise(calibration(torch.full((4, 3, 8, 8), float('nan'))))
    with pytest.raises(ValueError, match='^3: NaN or infinity met while probing'):
        lbyl_restore(simple(), torch.zeros(1, 3, 8, 8), ratio=0.5, restorer=how)


def test_wrong_images():
    how = layerwise(calibration(torch.zeros(4, 1, 8, 8)))
    with pytest.raises((ValueError, RuntimeError), match='channels'):
        lbyl_restore(simple(), torch.zeros(1, 3, 8, 8), ratio=0.5, restorer=how)


@pytest.fixture(scope='module')
def resnet(data_dir, weights_dir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LBYL_WEIGHTS', str(weights_dir))
        yield models.pretrained('resnet20_cifar10'), data.subset(data.load('cifar10', 'test'), 1000)


def test_noise_restores_resnet20(resnet):
    """Half of the channels gone, noise is far beyond neuron merging, distilled probes beyond noise.

    The noise goes through the pinned network, layer by layer.
    """
    net, images = resnet

    def right(restorer):
        small = lbyl_restore(net, torch.zeros(1, 3, 32, 32), ratio=0.5, restorer=restorer)
        return bench.accuracy(small, images, *data.STATS['imagenet'])[0]

    merged = right(merging())
    noisy = right(layerwise(noise(64), refit=False))
    made = right(layerwise(distilled(64, steps=20, reflect=True)))
    assert noisy > merged + 150 and made > noisy + 30, (merged, noisy, made)


@pytest.mark.parametrize('make', [probe, layerwise])
def test_the_search_for_a_ridge_ends_at_the_best(resnet, make, monkeypatch):
    """For every regression of a trained network, walking downhill finds what trying all finds.

    The walk starts in the middle, and in single precision; all are tried in double.
    """
    walked, tried = [], []

    def both(halves, prior):
        walked.append(held_out_ridge(halves, prior))
        double = [M.centred() for M in halves]
        tried.append(min(RIDGES, key=lambda r: _held_out_error(double, prior.double(), r)))
        return walked[-1]

    monkeypatch.setattr('lbyl_nb.moments.held_out_ridge', both)
    lbyl_restore(resnet[0], torch.zeros(1, 3, 32, 32), ratio=0.5, restorer=make(noise(64)))
    assert len(walked) >= 9
    assert len({*walked}) > 1
    assert walked == tried


def test_distillation_matches_statistics(resnet):
    "The loss falls by a factor of more than five in twenty steps."
    log = []
    images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    distil(resnet[0], (images,), 20, log=log)
    assert log[-1][1] < log[0][1] / 5


class Tokens(nn.Module):
    "Reads integers in one way or another; the second half of `up` repeats the first."

    def __init__(self, read, **tables):
        super().__init__()
        self.read, self.tables = read, nn.ModuleDict(tables)
        self.up, self.down, self.fc = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 3)
        with torch.no_grad():
            for v in self.up.parameters():
                v[16:] = v[:16]

    def forward(self, t, mask=None):
        h = self.read(self.tables, t)
        if mask is not None:
            h = h * mask[..., None]
        return self.fc(h + self.down(self.up(h).relu()))


def table(rows):
    return nn.Embedding(rows, 8)


def viewed(net, t):
    return net['e'](t.view(-1)[None]).view(*t.shape, 8)


def converted(net, t):
    return net['e'](t.long().t().clone()).transpose(0, 1)


# how integers are read, the tables, and the number of rows that may be asked for
READ = dict(
    plainly=(lambda net, t: net['e'](t), dict(e=table(40)), 40),
    two_tables=(lambda net, t: net['e'](t) + net['f'](t), dict(e=table(50), f=table(30)), 30),
    as_a_view=(viewed, dict(e=table(40)), 40),
    converted=(converted, dict(e=table(40)), 40),
    by_index=(lambda net, t: net['e'].weight[t], dict(e=table(40)), 40),
    by_function=(lambda net, t: F.embedding(t, net['e'].weight), dict(e=table(40)), 40),
    in_bags=(lambda net, t: net['e'](t)[:, None], dict(e=nn.EmbeddingBag(40, 8)), 40),
)


@pytest.mark.parametrize('name', READ)
def test_values_of_example_tokens_do_not_matter(name):
    "Tokens that are all zero give the same probes as real ones, which find repeated channels."
    torch.manual_seed(0)
    read, tables, rows = READ[name]
    net = Tokens(read, **tables).eval()
    zeros = torch.zeros(1, 5, dtype=torch.int32)
    real = torch.randint(rows, (64, 5), dtype=torch.int32)
    a, b = (noise(500)(net, as_args(x)).args[0] for x in (zeros, real))
    assert torch.equal(a, b) and a.dtype == torch.int32
    assert set(a.flatten().tolist()) == set(range(rows))
    for make in (probe, layerwise):
        half = dict(keep={'up': [*range(16)]}, restorer=make(noise(), ridge=1e-8))
        small = lbyl_restore(net, zeros, **half)
        torch.testing.assert_close(small(real), net(real), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('padding', [0, 3, 39])
def test_padding_and_masks(padding):
    "No probe is padding; a mask stays what the examples show, sample by sample."
    net = Tokens(lambda net, t: net['e'](t), e=nn.Embedding(40, 8, padding_idx=padding))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    made = noise(200)(net, as_args(dict(t=torch.zeros_like(mask), mask=mask))).args
    assert set(made['t'].flatten().tolist()) == set(range(40)) - {padding}
    assert all(torch.equal(v, mask[i % 2]) for i, v in enumerate(made['mask']))


@pytest.mark.parametrize('source', [noise(8), distilled(8, steps=1)])
def test_tokens_beside_an_image(source):
    "What is found for integers holds for every source that makes its own."
    zeros = dict(tokens=torch.zeros(1, 30, dtype=torch.long), image=torch.randn(1, 3, 8, 8))
    tokens = source(Several().eval(), zeros).args['tokens']
    assert set(tokens.flatten().tolist()) == set(range(10))


def test_probes_that_are_all_the_same_are_refused():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, counts):
            return self.net(counts / 2)

    how = dict(ratio=0.5, restorer=probe())
    for value in (0, 1, 7):
        with pytest.raises(ValueError, match=r"example_inputs\['counts'\]: all 128 probes"):
            lbyl_restore(Halves(), dict(counts=torch.full((2, 4), value)), **how)
    assert lbyl_restore(Halves(), dict(counts=torch.tensor([[0, 1, 2, 9]])), **how)


@pytest.mark.parametrize('sizes', [[66], [64, 2], [30, 30, 6], [2, 64], [1, 65]])
def test_pinned_statistics_are_those_of_all_probes(sizes):
    "Whatever the batches: mean and variance over all rows and positions."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(66, 3, 5, generator=g, dtype=torch.float64)
    x[60:] = 4 * x[60:] + 10
    net = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3)).double()
    norm = pin(net, [(v,) for v in x.split(sizes)])[0]
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2)))
    torch.testing.assert_close(norm.running_var, x.transpose(0, 1).flatten(1).var(1))
    assert norm.momentum == 0.3 and net[0].running_mean.eq(0).all()


@pytest.mark.parametrize('n', [2, 3, 64, 65, 66, 67, 129, 130])
def test_any_number_of_probes(n):
    "No batch of one; behind every batch norm the mean and deviation that training gave it."
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8)]
    net = nn.Sequential(*layers).eval()
    for m in (net[1], net[4]):
        m.weight.data.uniform_(0.5, 2)
        m.bias.data.normal_()
    probes = noise(n)(net, (torch.zeros(1, 4),))
    sizes = [len(v) for (v,) in probes.batches()]
    assert sum(sizes) == n and 2 <= min(sizes) <= max(sizes) <= 64
    with torch.no_grad():
        y = probes.model[:2](probes.args[0])
    torch.testing.assert_close(y.mean(0), net[1].bias.data, rtol=0, atol=1e-4)
    if n > 3:
        torch.testing.assert_close(y.std(0), net[1].weight.data.abs(), rtol=1e-2, atol=1e-3)
    if n > 64:
        with torch.no_grad():
            z = probes.model(probes.args[0])
        torch.testing.assert_close(z.mean(0), net[4].bias.data, rtol=0, atol=0.1)
        torch.testing.assert_close(z.std(0), net[4].weight.data.abs(), rtol=0.1, atol=0)


def test_a_batch_norm_that_is_not_called_keeps_its_statistics():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.used(x)

    net = Spare()
    net.spare.running_var.fill_(7)
    pinned = pin(net, [(torch.randn(9, 3),)])
    assert pinned.spare.running_var.eq(7).all() and not pinned.used.running_var.eq(1).any()


@pytest.mark.parametrize('n', [1, 2, 5, 8, 33, 64, 65, 97])
def test_images_and_their_mirror_images_are_never_apart(n):
    "In whatever batches they pass, no image is in one half and its mirror image in the other."
    number = torch.arange(float(n)).view(n, 1, 1, 1).expand(n, 1, 2, 2)
    first, second = [], []
    for (v,) in calibration(number, reflect=True)(nn.Identity(), (number,)).batches():
        a, b = in_turn(lambda v: v[:, 0, 0, 0].tolist(), v)
        first += a
        second += b
    assert not {*first} & {*second}
    assert {*first, *second} == {*range(n)}
    assert len(first) + len(second) == 2 * n - n % 2


class Noisy(nn.Module):
    "Draws random numbers, also in evaluation mode."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(F.dropout(x, 0.1, training=True))


SOURCES = dict(
    noise=lambda x: noise(8),
    calibration=calibration,
    distilled=lambda x: distilled(8, steps=2),
)


def chosen(net, x, source):
    return plan(net, x, 0.5, least_lost(source))


def restored(make):
    return lambda net, x, source: lbyl_restore(net, x, ratio=0.5, restorer=make(source))


RUNS = dict(least_lost=chosen, **{k: restored(make) for k, make in MAKE.items()})


@pytest.mark.parametrize('run', RUNS)
@pytest.mark.parametrize('source', SOURCES)
def test_global_generator(source, run):
    "It is neither moved nor needed: with another seed everything comes out the same."
    net, x = simple(), torch.randn(16, 3, 8, 8)

    def done(seed):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        out = RUNS[run](net, x, SOURCES[source](x))
        assert torch.equal(before, torch.get_rng_state())
        return out

    a, b = map(done, (1, 2))
    if run == 'least_lost':
        assert a == b
    else:
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize('source', SOURCES)
def test_networks_that_draw_random_numbers(source):
    "Looking at them does not move the global generator either."
    net, x = Noisy(simple()).eval(), torch.randn(16, 3, 8, 8)
    before = torch.get_rng_state()
    look(SOURCES[source](x)(net, (x,)), ['net.0', 'net.3'])
    assert torch.equal(before, torch.get_rng_state())


class InPlace(nn.Module):
    "Normalises its input, in place or not."

    def __init__(self, net, inside):
        super().__init__()
        self.net, self.inside = net, inside

    def forward(self, x):
        return self.net(x.sub_(0.5).mul_(2) if self.inside else (x - 0.5) * 2)


@pytest.mark.parametrize('make', [probe, layerwise])
@pytest.mark.parametrize('source', SOURCES)
def test_networks_that_work_in_place_on_their_input(source, make):
    "They come out as those do that do not, and neither images nor probes are changed."
    net, x = simple(), torch.rand(16, 3, 8, 8)
    before, states = x.clone(), []
    for inside in (False, True):
        s = SOURCES[source](x)
        one = InPlace(net, inside).eval()
        probes = s(one, (torch.zeros(2, 3, 8, 8),))
        kept = probes.args[0].clone()
        look(probes, ['net.0'])
        assert torch.equal(probes.args[0], kept) and torch.equal(x, before)
        how = dict(keep={'net.0': [0, 1, 2]}, restorer=make(s))
        states.append(lbyl_restore(one, torch.rand(2, 3, 8, 8), **how).state_dict())
    for k, v in states[0].items():
        torch.testing.assert_close(v, states[1][k])


class Subclass(torch.Tensor):
    "As libraries for images have it."


def inferred(x):
    with torch.inference_mode():
        return x.clone()


DRESSED = dict(
    subclass=lambda x: x.as_subclass(Subclass),
    inferred=inferred,
    parameter=nn.Parameter,
    mapping=lambda x: UserDict(input=x),
    list=lambda x: [x],
)


@pytest.mark.parametrize('name', DRESSED)
@pytest.mark.parametrize('restorer', [prune_only(), probe(noise(8))])
def test_inputs_in_other_clothes(name, restorer):
    "Subclasses, tensors of inference mode, mappings that are no dicts: as the plain tensor."
    net, x = simple(), torch.randn(2, 3, 8, 8)
    how = dict(ratio=0.5, restorer=restorer)
    a, b = (lbyl_restore(net, v, **how).state_dict() for v in (x, DRESSED[name](x)))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_no_inputs():
    none, one = torch.zeros(0, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match='example_inputs: there are none'):
        restore(simple(), none, ratio=0.5)
    with pytest.raises(ValueError, match='images: there are none'):
        restore(simple(), one, ratio=0.5, restorer=probe(calibration(none)))
    ragged = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged)
    with pytest.raises(ValueError, match='example_inputs: nested tensors'):
        restore(nn.Linear(3, 2), ragged, ratio=0.5)


class Scaled(nn.Module):
    "A second argument that is no sample, at some depth or none."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x, scale):
        while not isinstance(scale, (float, torch.Tensor)):
            scale = scale[0]
        return self.b((self.a(x) * scale).relu())


ROWS = torch.randn(130, 4, generator=torch.Generator().manual_seed(0))
TWO, ONE_TWO = torch.tensor(2.0), torch.tensor([2.0])


@pytest.mark.parametrize('scale', [TWO, ONE_TWO, [TWO], ([ONE_TWO],)])
@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('source', [noise(130), calibration((ROWS, 2.0))])
def test_arguments_without_samples(scale, batch, source):
    "They reach the network as they are, in whatever batches: as if the number stood there."
    torch.manual_seed(0)
    net, x = Scaled().eval(), torch.randn(batch, 4)
    how = dict(ratio=0.5, restorer=probe(source))
    a, b = (lbyl_restore(net, (x, v), **how).state_dict() for v in (2.0, scale))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    probes = calibration((ROWS, scale))(net, (x, scale))
    assert len(probes) == 130
    for v, s in probes.batches():
        assert len(v) <= 64 and str(s) == str(scale)


def test_inputs_without_a_batch():
    "A single image without a batch dimension is one sample that cannot be made many."
    with pytest.raises(ValueError, match='cannot be run on 8 samples'):
        noise(8)(simple(), (torch.zeros(3, 8, 8),))


def neighbours(x):
    "Mean difference of neighbouring pixels, one after the other."
    down, along = [], []
    for image in x.flatten(0, 1).tolist():
        for above, below in zip(image, image[1:]):
            down += map(abs, map(sub, above, below))
        for row in image:
            along += map(abs, map(sub, row, row[1:]))
    return sum(down) / len(down) + sum(along) / len(along)


def test_distilled_probes_are_smooth():
    "One step goes against the slope of divergence plus difference of neighbours, pixel by pixel."
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(1).double().eval()
    norm.running_mean.fill_(0.3)
    norm.running_var.fill_(2.0)
    x, weight, h = torch.randn(1, 1, 3, 4, dtype=torch.float64), 0.7, 1e-6

    def objective(x):
        v, m = x.var(correction=0).item() + norm.eps, x.mean().item()
        stored = 2.0 + norm.eps
        divergence = 0.5 * (v / stored - 1 - math.log(v / stored) + (m - 0.3) ** 2 / stored)
        return divergence + weight * neighbours(x)

    step = distil(norm, (x,), steps=1, lr=1e-3, smooth=weight)[0] - x
    for i in range(12):
        up, down = x.clone(), x.clone()
        up.view(-1)[i] += h
        down.view(-1)[i] -= h
        slope = (objective(up) - objective(down)) / (2 * h)
        want = -math.copysign(1e-3, slope)
        assert abs(slope) > 1e-4
        assert abs(step.view(-1)[i].item() - want) < 1e-6


def test_rows_draw_nothing():
    "Moments of rows take a linear layer's part without making one at random."
    rows = torch.randn(9, 4)
    before = torch.get_rng_state()
    torch.testing.assert_close(row_moments(rows).p, rows.double().sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(before, torch.get_rng_state())
