"Expansion and contraction over random layers, networks and settings, and bad input."

import copy
import io
import threading
import types
import warnings

import pytest
import torch
import torchvision
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lbyl_nb.expand import Expanded, contract, expand, expandable, is_composed, operations
from lbyl_nb.models import digits_net, resnet20
from lbyl_nb.recover import lbyl_restore

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
pytestmark = pytest.mark.filterwarnings('ignore:Using padding=.same. with even kernel')


@st.composite
def convolutions(draw):
    "A random convolution and an input that it accepts, batched or not."
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    per_axis = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))
    n = groups * draw(st.integers(1, 3))
    m = groups * draw(st.integers(1, 3))
    kernel = per_axis(1, 3)
    dilation = per_axis(1, 2)
    padding = draw(st.sampled_from(['same', 'valid', per_axis(0, 2), 1]))
    stride = 1 if padding == 'same' else per_axis(1, 2)
    mode = draw(st.sampled_from(['zeros', 'reflect', 'replicate', 'circular']))
    torch.manual_seed(draw(st.integers(0, 1000)))
    how = stride, padding, dilation, groups, draw(st.booleans()), mode
    layer = CONVOLUTIONS[dims](m, n, kernel, *how)
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    x = torch.randn(*batch, m, *per_axis(5, 7))
    if mode != 'zeros' and not batch:
        x = x[None]
    return layer, x


@st.composite
def linears(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = nn.Linear(draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.booleans()))
    batch = draw(st.sampled_from([(), (1,), (4,), (2, 3)]))
    return layer, torch.randn(*batch, layer.in_features)


def far(a, b):
    "Largest difference, relative to the largest number."
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()


def forms(net):
    "The network with all layers composed, and with all consecutive."
    for composed in (True, False, None):
        for m in net.modules():
            if isinstance(m, Expanded):
                m.composed = composed
        yield net


def condition(big):
    """By how much rounding may be magnified: product of the random factors' condition numbers.

    Up to 100 is taken for granted. Few channels may be drawn badly.
    """
    worst = 1.0
    for w in (big.first, big.last):
        if w is None:
            continue
        s = torch.linalg.svdvals(w.detach().double().reshape(big.groups, -1, w.shape[1]))
        worst *= (s[..., 0] / s[..., -1]).max().item()
    return max(1.0, worst / 100)


@FEW
@given(
    st.one_of(convolutions(), linears()),
    st.floats(2, 4),
    st.sampled_from([2, 3]),
    st.integers(0, 99),
    st.sampled_from([(torch.float64, 1e-10), (torch.float32, 1e-5)]),
)
def test_any_layer(case, rate, factors, seed, precision):
    "Same output there and back, in all forms; same class, settings and state names."
    (layer, x), (dtype, bound) = case, precision
    layer, x = layer.to(dtype), x.to(dtype)
    big = expand(layer, rate, linear_rate=rate, linear_factors=factors, seed=seed)
    y = layer(x)
    for net in forms(big):
        assert far(net(x), y) < bound * condition(big)
    small = contract(big)
    assert far(small(x), y) < bound * condition(big)
    assert type(small) is type(layer)
    assert str(small) == str(layer)
    assert list(small.state_dict()) == list(layer.state_dict())


@FEW
@given(st.one_of(convolutions(), linears()), st.floats(1, 4), st.sampled_from([2, 3]))
def test_gradients_and_counts(case, rate, factors):
    """Gradients of both forms are equal.

    The form taken by itself is the one with fewer multiplications.
    """
    layer, x = case[0].double(), case[1].double()
    big = expand(layer, rate, linear_rate=rate, linear_factors=factors)
    grads = []
    for net in forms(big):
        inputs = [x.clone().requires_grad_(), *net.parameters()]
        grads.append(torch.autograd.grad(net(inputs[0]).sin().sum(), inputs))
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            assert far(a, b) < 1e-10 * condition(big)
    cost = operations(big, x.shape)
    assert is_composed(big, x.shape) == (cost['composed'] <= cost['consecutive'])
    assert cost['compact'] <= cost['composed']


class Shared(nn.Module):
    "A convolution used twice, one under two names, and two linear layers with one weight."

    def __init__(self):
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.a = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 4)
        self.tail = nn.Linear(4, 4)
        self.b, self.tail.weight = self.a, self.head.weight

    def forward(self, x):
        x = self.twice(self.twice(x)).relu()
        x = self.a(x).mean((2, 3))
        return self.tail(self.head(x).relu())


def test_shared_layers_stay_one_and_tied_weights_are_left_alone():
    net, x = Shared().double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    tied = 'shares a parameter with another layer'
    assert expandable(net) == dict(twice='', a='', head=tied, tail=tied)
    big = expand(net)
    assert big.a is big.b and isinstance(big.twice, Expanded) and big.head.weight is big.tail.weight
    for _ in range(2):
        big(x).square().sum().backward()
        with torch.no_grad():
            for p in big.parameters():
                p -= 0.01 * p.grad
    small = contract(big)
    assert small.a is small.b and small.head.weight is small.tail.weight
    assert far(small(x), big(x)) < 1e-10 and far(small(x), net(x)) > 1e-3
    net.load_state_dict(small.state_dict(), strict=True)
    assert far(net(x), big(x)) < 1e-10


def test_weights_tied_by_memory_are_seen():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight.data = net[0].weight.data
    assert all(expandable(net).values())


class FromLists(nn.Module):
    "Layers and a weight that are found in lists, tuples, dicts and objects."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(4))
        self.e = nn.Linear(3, 3, dtype=torch.float64)
        self.listed = [self.a, (self.b,)]
        self.named = dict(c=[self.c])
        self.object = types.SimpleNamespace(layer=self.d)
        self.weights = [types.SimpleNamespace(of_e=self.e.weight)]

    def forward(self, x):
        x = self.listed[1][0](self.listed[0](x).sin()).sin()
        x = self.object.layer(self.named['c'][0](x).sin()).sin()
        return F.linear(x, self.weights[0].of_e, self.e.bias)


def test_layers_are_replaced_wherever_they_are_held():
    "Trained and contracted, a network computes what a new one with the same state does."
    torch.manual_seed(0)
    net, x = FromLists(), torch.randn(4, 3, dtype=torch.float64)
    left = {k: reason for k, reason in expandable(net).items() if reason}
    assert left == dict(e='its weight or bias is in an attribute or a buffer, too')
    big = expand(net)
    assert big.listed[0] is big.a and isinstance(big.a, Expanded)
    optimiser = torch.optim.SGD(big.parameters(), 0.1)
    big(x).square().sum().backward()
    optimiser.step()
    small, new = contract(big), FromLists()
    new.load_state_dict(small.state_dict())
    for y in (small(x), big(x)):
        assert far(y, new(x)) < 1e-10 < 1e-3 < far(y, net(x))
    for k, p in small.named_parameters():
        assert not torch.equal(p, net.get_parameter(k))


def test_parameters_that_overlap_in_memory_are_tied():
    "Those that lie side by side are not."
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    parameters = list(net.parameters())
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(parameters), parameters)
    assert not any(expandable(net).values())
    net.flat = nn.Parameter(torch.zeros(20))
    net[1].weight.data = net.flat.data[5:14].view(3, 3)
    assert [k for k, reason in expandable(net).items() if 'shares a parameter' in reason] == ['1']
    del net.flat
    net.register_buffer('seen', net[1].weight.data[2])
    assert [k for k, reason in expandable(net).items() if 'a buffer' in reason] == ['1']


def test_a_forward_that_is_set_on_a_layer_is_kept():
    "Its class's own, as Accelerate leaves it there, is none."

    def standardised(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w, self.bias)

    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).double(), torch.randn(2, 3, 7, 7)
    net[0].forward = types.MethodType(standardised, net[0])
    net[1].forward = net[1].forward
    y, big = net(x.double()), expand(net)
    assert [type(m) for m in big] == [nn.Conv2d, Expanded]
    assert far(big(x.double()), y) < 1e-10
    with torch.no_grad():
        big[1].middle.mul_(2)
        big[1].bias.mul_(2)
    assert far(contract(big)(x.double()), 2 * y) < 1e-10


class ReadsSettings(nn.Module):
    "A network that asks a convolution and a linear layer for their settings."

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        c = self.conv
        y = F.conv2d(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)
        assert c.kernel_size == (3, 3) and c.in_channels == 3
        return self.fc(y.view(len(x), c.out_channels, -1).mean(2)[:, : self.fc.in_features])


def test_settings_are_read_and_written():
    net, x = ReadsSettings().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    big = expand(net)
    assert far(big(x), net(x)) < 1e-10
    for m in (net, big):
        m.conv.stride = (1, 2)
    assert far(big(x), net(x)) < 1e-10 and far(contract(big)(x), net(x)) < 1e-10
    assert big.conv(x).shape == net.conv(x).shape == (2, 4, 8, 4)
    assert not hasattr(big.conv, 'no_such')


@pytest.mark.parametrize('stride', [1, 2, (2,), [1, 2]])
def test_settings_that_are_one_number(stride):
    "PyTorch takes them for all axes; so do the count and the choice of a form."
    layer, x = nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 8, 9, dtype=torch.float64)
    layer.stride, layer.padding, layer.dilation = stride, 1, 2
    big, y = expand(layer), layer(x)
    for net in forms(big):
        assert far(net(x), y) < 1e-10
    assert operations(big, x.shape)['compact'] == y.numel() * 27


@pytest.mark.parametrize('rate', [1, 1.01, 1.25, 1.5])
def test_low_rates_are_exact_in_single_precision(rate):
    torch.manual_seed(0)
    for layer in (nn.Linear(256, 256), nn.Conv2d(64, 64, 1)):
        exact = layer.weight.detach().double()
        for seed in range(3):
            big = expand(layer, rate, linear_rate=rate, linear_factors=3, seed=seed)
            assert far(big.weight.double(), exact) < 1e-5
            assert far(contract(big).weight.double(), exact) < 1e-6


def test_random_factors_of_the_published_rate_are_normal():
    big, g = expand(nn.Conv2d(4, 6, 3), seed=5), torch.Generator().manual_seed(5)
    normal = lambda h, m: torch.randn(h, m, generator=g, dtype=torch.float64) / h**0.5
    assert torch.equal(big.first[..., 0, 0], normal(12, 4).float())
    assert torch.equal(big.last[..., 0, 0], normal(18, 6).T.float())


def test_frozen_layers_keep_every_bit():
    "Where all are frozen, or those that are chosen, they are expanded."
    net = digits_net()
    net.features.requires_grad_(False)
    small = contract(expand(net))
    for a, b in zip(small.features.parameters(), net.features.parameters()):
        assert torch.equal(a, b) and not a.requires_grad
    big = expand(net, layers=lambda name, m: name == 'features.0')
    assert isinstance(big.features[0], Expanded) and not big.features[0].middle.requires_grad
    big = expand(net.requires_grad_(False))
    assert not any(p.requires_grad for p in big.parameters())
    assert not any(type(m) is nn.Conv2d for m in big.modules())


class Keeps(nn.Sequential):
    "Keeps what it put out last."

    def forward(self, x):
        self.last = [super().forward(x)]
        return self.last[0]


def test_networks_that_keep_their_output_and_such_that_cannot_be_copied():
    net, x = Keeps(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3)
    y = net(x)
    big = expand(net)
    assert far(big(x), y) < 1e-5 and far(contract(big)(x), y) < 1e-5
    assert net.last[0] is y and y.grad_fn is not None
    big.lock = net.lock = threading.Lock()
    for f in (expand, contract):
        with pytest.raises(ValueError, match='Keeps: cannot be copied: TypeError: .*lock'):
            f(net)


def hooked(n):
    n.register_forward_hook(lambda *a: None)
    return n


def with_more(kind):
    "A change of a layer that adds a parameter, a buffer or a module to it."

    def add(n):
        if kind == 'module':
            n.add_module('more', nn.ReLU())
        elif kind == 'buffer':
            n.register_buffer('more', torch.ones(3))
        else:
            n.more = nn.Parameter(torch.ones(3))
        return n

    return add


def doubled(method):
    "A change of a layer that doubles what one of its methods gives."

    def change(n):
        own = getattr(n, method)
        setattr(n, method, lambda *args: 2 * own(*args))
        return n

    return change


# what is made of a convolution, and why that is not expanded
SPOILT = [
    (nn.utils.parametrizations.weight_norm, 'parametrised'),
    (nn.utils.spectral_norm, 'not a parameter'),
    (hooked, 'hooks'),
    (lambda n: nn.LazyConv2d(3, 3), 'a class of its own'),
    (lambda n: nn.ConvTranspose2d(3, 3, 3), 'transposed'),
    (lambda n: n.to('meta'), 'no values'),
    (lambda n: n.to(torch.complex64), 'complex64'),
    (doubled('forward'), 'a forward of its own'),
    (doubled('_conv_forward'), 'a _conv_forward of its own'),
    (lambda n: add_hook_to_module(n, ModelHook()), 'a forward of its own'),
    (with_more('parameter'), "'more' among its parameters"),
    (with_more('buffer'), "'more' among its buffers"),
    (with_more('module'), "'more' among its modules"),
]


@pytest.mark.parametrize('spoil, reason', SPOILT)
def test_left_alone_with_reason(spoil, reason):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net = nn.Sequential(spoil(nn.Conv2d(3, 3, 3)), nn.Linear(2, 2))
    assert reason in expandable(net)['0'] and expandable(net)['1'] == ''
    assert type(expand(net)[0]) is type(net[0])
    with pytest.raises(ValueError, match='no layer to expand'):
        expand(net, layers=lambda name, m: name == '0')


ARCHITECTURES = [
    (resnet20, 32),
    (digits_net, 8),
    (lambda: torchvision.models.mobilenet_v2(width_mult=0.25), 32),
    (torchvision.models.shufflenet_v2_x0_5, 32),
]


@pytest.mark.parametrize('build, size', ARCHITECTURES)
def test_architectures(build, size):
    """Every layer is expanded; outputs agree; nothing happens to the model passed in.

    The state of the compact network loads after contraction.
    """
    torch.manual_seed(0)
    net = build().double().eval()
    x = torch.randn(2, 1 if build is digits_net else 3, size, size, dtype=torch.float64)
    before = copy.deepcopy(net.state_dict())
    big = expand(net)
    assert not any(expandable(net).values()) and expandable(big) == {}
    for b in forms(big):
        assert far(b(x), net(x)) < 1e-10
    small = contract(big)
    assert far(small(x), net(x)) < 1e-10
    assert list(small.state_dict()) == list(before) and str(small) == str(net)
    small.load_state_dict(before, strict=True)
    assert torch.equal(small(x), net(x))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_transformer_reads_the_weight():
    "Fast paths that read a layer's weight find the contracted one."
    torch.manual_seed(0)
    net, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    big = expand(net)
    assert [k for k, r in expandable(net).items() if r] == ['self_attn.out_proj']
    with torch.no_grad():
        fast = big(x)
    assert far(fast, net(x)) < 1e-5 and far(big.train().eval()(x), net(x)) < 1e-5


def test_training_on_a_pruned_network():
    "Real steps with batch norm in float32: contraction computes what the expanded network does."
    torch.manual_seed(0)
    net, x = resnet20(), torch.randn(16, 3, 32, 32)
    big = expand(lbyl_restore(net.eval(), x[:1], ratio=0.5)).train()
    optimiser = torch.optim.SGD(big.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(big(x), torch.arange(16) % 10).backward()
        optimiser.step()
    assert all(p.grad.isfinite().all() for p in big.parameters())
    small = contract(big.eval())
    with torch.no_grad():
        assert far(small(x), big(x)) < 1e-5
    compact = lbyl_restore(net, x[:1], ratio=0.5)
    pairs = zip(small.parameters(), compact.parameters())
    assert all(p.shape == q.shape for p, q in pairs)


def test_state_of_an_expanded_network_and_whole_modules_are_files(tmp_path):
    net, x = digits_net().eval(), torch.randn(2, 1, 8, 8)
    big, other = expand(net, seed=1), expand(digits_net().eval(), seed=2)
    other.load_state_dict(big.state_dict(), strict=True)
    assert torch.equal(other(x), big(x))
    file = io.BytesIO()
    torch.save(big, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), big(x))


def test_seed_decides():
    net = digits_net()
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert same(expand(net), expand(net)) and not same(expand(net, seed=1), expand(net))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('rate', [0.99, 0, -1, float('nan'), float('inf')])
def test_rate_too_small_names_the_layer(rate):
    says = r'no inverse exists at rate .* the least rate is 1'
    with pytest.raises(ValueError, match=f'conv1: {says}'):
        expand(resnet20(), rate)
    with pytest.raises(ValueError, match=f'linear: {says}'):
        expand(resnet20(), 2, linear_rate=rate)


def test_bad_input():
    net = digits_net()
    with pytest.raises(TypeError, match="layers must be a function of name and module, got .'fc'."):
        expand(net, layers=['fc'])
    with pytest.raises(ValueError, match='expanded already'):
        expand(expand(net))
    with pytest.raises(ValueError, match='expanded already'):
        expand(expand(nn.Linear(2, 2)))
    with pytest.warns(UserWarning, match='not expanded'):
        same = contract(net)
    assert same is not net
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), net.parameters()))
    with torch.no_grad():
        next(net.parameters()).fill_(float('nan'))
    with pytest.raises(ValueError, match='holds NaN'):
        expand(net)
    with pytest.raises(ValueError, match='no layer to expand'):
        expand(nn.ReLU())


HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize('how', [dict(), dict(rate=1.5, linear_rate=3, linear_factors=3)])
@pytest.mark.parametrize('dtype', HALVES)
def test_half_precision(dtype, how):
    "There and back weights are what they were, but for the last bit of tiny ones."
    torch.manual_seed(0)
    net, x = digits_net().eval().to(dtype), torch.randn(4, 1, 8, 8, dtype=dtype)
    big, exact = expand(net, **how), copy.deepcopy(net).double()(x.double())
    eps = torch.finfo(dtype).eps
    state = contract(big).state_dict()
    assert state.keys() == net.state_dict().keys()
    for k, v in net.state_dict().items():
        tiny = 1e-6 * v.abs().max().item()
        torch.testing.assert_close(state[k], v, rtol=eps, atol=tiny)
        assert (state[k] == v).float().mean() > 0.99, k
    for b in forms(big):
        bound = max(2 * far(net(x).double(), exact), eps)
        assert b(x).dtype == dtype and far(b(x).double(), exact) < bound
    assert {m.weight.dtype for m in big.modules() if isinstance(m, Expanded)} == {dtype}


@FEW
@given(st.one_of(convolutions(), linears()), st.sampled_from(HALVES), st.integers(0, 99))
def test_any_layer_in_half_precision(case, dtype, seed):
    "The weight is within one rounding of the original's; the output is as near as that brings it."
    layer, x = case[0].to(dtype), case[1].to(dtype)
    big, eps = expand(layer, seed=seed), torch.finfo(dtype).eps
    assert far(contract(big).weight.double(), layer.weight.double()) <= eps
    for net in forms(big):
        torch.testing.assert_close(net(x), layer(x), rtol=8 * eps, atol=8 * eps)


LAYERS = [(nn.Conv2d(8, 6, 3), (2, 8, 5, 5)), (nn.Linear(9, 5), (4, 9))]


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize('layer, shape', LAYERS)
def test_factors_one_by_one_round_the_output_alone(layer, shape, dtype):
    "Every output, small ones too, is that of the same weight in float64, rounded once."
    layer, x = copy.deepcopy(layer).to(dtype), torch.randn(shape).to(dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    y = expand(layer, composed=False)(x).double()
    torch.testing.assert_close(y, exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize('dtype', HALVES)
def test_half_precision_moves_and_trains(dtype):
    "Copied, loaded and trained it is the network that contraction gives; cast to float32, too."
    torch.manual_seed(0)
    net, x = digits_net().eval().to(dtype), torch.randn(4, 1, 8, 8, dtype=dtype)
    big = expand(net)
    other = expand(digits_net().eval().to(dtype), seed=5)
    other.load_state_dict(big.state_dict())
    for b in (other, copy.deepcopy(big)):
        assert torch.equal(b(x), big(x))
    optimiser = torch.optim.SGD(big.parameters(), 1e-2)
    big(x).float().square().sum().backward()
    optimiser.step()
    small = contract(big)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert far(small(x).float(), net(x).float()) > 1e-3
    for b in forms(big):
        assert far(b(x).float(), small(x).float()) < 8 * torch.finfo(dtype).eps
    wide = big.float()
    assert wide(x.float()).dtype == torch.float32
    assert {p.dtype for p in contract(wide).parameters()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_gpu():
    net, x = resnet20().eval().cuda(), torch.randn(4, 3, 32, 32, device='cuda')
    with torch.backends.cudnn.flags(allow_tf32=False), torch.no_grad():
        for b in forms(expand(net)):
            assert far(b(x), net(x)) < 1e-4
        small = contract(expand(net))
    assert next(small.parameters()).device == x.device
