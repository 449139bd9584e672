"""What a network does with its parameters besides calling its layers, and norms that are none.

Weights that `forward` reads by itself, local response norms, autocast inside a network, masks with
infinities, and norms and parameters that only other inputs use.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
import torch.nn.functional as F
from test_right_or_refused import Net, first_half, gap, out, repeat
from torch import nn

from lbyl_nb.layerwise import layerwise
from lbyl_nb.norms import treats_alike
from lbyl_nb.probes import calibration
from lbyl_nb.recover import restore, verified
from lbyl_nb.restorers import merging, prune_only
from lbyl_nb.saved import load_restored, save_restored


def reasons(done):
    "{layer: why it was left alone}."
    return dict(zip(done.report.layer, done.report.left_alone))


READS = dict(
    decoder=lambda b, z: F.linear(z, b.weight.t()),
    einsum=lambda b, z: torch.einsum('nz,zh->nh', z, b.weight),
    product=lambda b, z: z @ b.weight,
    norm=lambda b, z: F.pad(z / b.weight.norm(dim=1), (0, 8)),
    bias=lambda b, z: F.pad(z * b.bias, (0, 8)),
    looked_up=lambda b, z: F.pad(z + b.weight[:, 0], (0, 8)),
)


@pytest.mark.parametrize('read', READS)
@pytest.mark.parametrize('refit', [False, True])
def test_a_layer_whose_weight_is_read_elsewhere_too_stays_as_it_is(read, refit):
    torch.manual_seed(0)
    layers = dict(s=nn.Linear(6, 12), a=nn.Linear(12, 16), b=nn.Linear(16, 8), o=nn.Linear(16, 5))

    def forward(m, x):
        z = F.relu(m.b(F.relu(m.a(F.relu(m.s(x))))))
        return m.o(F.relu(READS[read](m.b, z)))

    net, x = Net(forward, **layers).eval(), torch.randn(64, 6)
    repeat(net.s)
    way = layerwise(calibration(x), refit=refit, ridge=1e-9)
    done = restore(net, x, keep=dict(s=first_half(net.s)), restorer=way)
    assert torch.equal(done.model.b.weight, net.b.weight)
    assert torch.equal(done.model.b.bias, net.b.bias)
    assert gap(out(done.model, x), out(net, x)) < 1e-3
    if read != 'bias':
        assert 'b has a weight or bias that is read outside' in reasons(done)['a']
        with pytest.raises(ValueError, match='a cannot be pruned: b has a weight'):
            restore(net, x, ratio=dict(a=0.5), restorer=prune_only())


def test_to_ask_for_the_type_of_a_weight_is_not_to_read_it():
    torch.manual_seed(0)
    layers = dict(a=nn.Linear(6, 16), b=nn.Linear(16, 8), o=nn.Linear(8, 3))

    def forward(m, x):
        x = F.relu(m.a(x.to(m.a.weight.dtype)))
        return m.o(F.relu(m.b(x.to(m.b.weight.device))))

    net, x = Net(forward, **layers).eval(), torch.randn(64, 6)
    assert {'a', 'b'} <= restore(net, x, ratio=0.5, restorer=prune_only()).plan.keys()


class PlaceNorm(nn.Module):
    "Channels weigh by their places, the more the larger they are."

    def forward(self, x):
        places = torch.arange(x.shape[1]).view(-1, 1, 1)
        return x / (1 + 1e-3 * places * x.abs())


class SoftmaxNorm(nn.Module):
    "Shares of one."

    def forward(self, x):
        return x.softmax(1)


class MaxNorm(nn.Module):
    "The largest channel, everywhere."

    def forward(self, x):
        return x.amax(1, keepdim=True).expand_as(x)


NO_NORMS = [nn.LocalResponseNorm(5), nn.CrossMapLRN2d(5), PlaceNorm(), SoftmaxNorm(), MaxNorm()]


@pytest.mark.parametrize('mid', NO_NORMS, ids=lambda m: type(m).__name__)
def test_no_norm_over_all_channels(mid):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), mid, nn.Conv2d(16, 8, 3), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    done = restore(net, torch.rand(4, 3, 10, 10) * 255, ratio=0.5, restorer=prune_only())
    assert done.plan.keys() == {'3'} and reasons(done)['0']


class SampleNorm(nn.Module):
    "A layer norm by the standard deviation of a sample."

    def __init__(self, n):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(n)), nn.Parameter(torch.rand(n))

    def forward(self, x):
        return self.a * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.b


class LengthNorm(nn.Module):
    "Channels divided by the root of the sum of their squares."

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(n))

    def forward(self, x):
        return self.weight * F.normalize(x, dim=-1)


@pytest.mark.parametrize('kind', [SampleNorm, LengthNorm, nn.LayerNorm, nn.RMSNorm])
def test_norms_that_count_channels_in_other_ways(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), kind(12), nn.GELU(), nn.Linear(12, 3)).eval()
    x, k = torch.randn(8, 6), [0, 2, 3, 5, 6, 8, 11]
    small = restore(net, x, keep={'0': k}, restorer=prune_only()).model
    norm = kind(7)
    for name, p in net[1].named_parameters():
        setattr(norm, name, nn.Parameter(p[k]))
    with torch.no_grad():
        h = F.gelu(norm(x @ net[0].weight[k].T + net[0].bias[k]))
        want = h @ net[3].weight[:, k].T + net[3].bias
    assert gap(out(small, x), want) < 1e-5


def test_a_norm_with_weights_of_zero_is_tried_with_others():
    class Response(SampleNorm):
        "Every second channel counts twice, once the weights are trained."

        def forward(self, x):
            return x + self.a * x * x[..., ::2].square().mean(-1, keepdim=True)

    norm = Response(8)
    nn.init.zeros_(norm.a)
    assert not treats_alike(norm, torch.zeros(2, 8), 1)


class Mixed(nn.Module):
    "A network that computes in half precision by itself, all or the second half of it."

    def __init__(self, late, width=64):
        super().__init__()
        self.late = late
        self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(width, width, 3)
        self.c, self.o = nn.Conv2d(width, width, 1), nn.Linear(width, 4)

    def forward(self, x):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=not self.late):
            x = F.relu(self.b(F.relu(self.a(x))))
        with torch.autocast('cpu', dtype=torch.bfloat16):
            x = self.o(F.relu(self.c(x)).mean((2, 3)))
        return x.float()


@pytest.mark.parametrize('late', [False, True])
@pytest.mark.parametrize('around', [False, True])
@pytest.mark.parametrize('way', [prune_only, layerwise])
def test_a_network_that_opens_autocast_by_itself(late, around, way):
    torch.manual_seed(0)
    net, x = Mixed(late).eval(), torch.randn(8, 3, 8, 8)
    repeat(net.a, net.b, net.c)
    halves = {k: first_half(net.get_submodule(k)) for k in 'abc'}
    for k in 'boc':  # so that what is removed is worth nothing
        net.get_submodule(k).weight.data[:, 32:] = 0
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=around):
        done = restore(net, x, keep=halves, restorer=way())
    assert done.plan.keys() == {*'abc'}
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        assert (
            torch.is_autocast_enabled('cpu') and net.o(x[:, 0].flatten(1)).dtype == torch.bfloat16
        )
    assert gap(out(done.model, x), out(net, x)) < 0.03


def test_autocast_is_off_in_the_thread_that_restores_alone():
    product = lambda: torch.ones(2, 2) @ torch.ones(2, 2)

    def elsewhere():
        with torch.autocast('cpu', dtype=torch.bfloat16):
            return product().dtype

    def choose(*_):
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(elsewhere).result())
        seen.append(elsewhere())
        raise KeyError

    seen = []
    with pytest.raises(KeyError):
        verified(Mixed(True), torch.randn(2, 3, 8, 8), prune_only(), choose)
    assert seen == [torch.bfloat16, torch.float32] and elsewhere() == torch.bfloat16


def test_autocast_stays_off_until_the_last_of_two_threads_is_done():
    net, methods = Mixed(True), (torch.autocast.__enter__, torch.autocast.__exit__)
    first, second, ended = Event(), Event(), Event()

    def begin(*_):
        first.set()
        assert second.wait(60)
        raise KeyError

    def look(*_):
        second.set()
        assert ended.wait(60)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        raise KeyError

    def run(choose):
        with pytest.raises(KeyError):
            verified(net, torch.randn(2, 3, 8, 8), prune_only(), choose)

    seen = []
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run, begin)
        assert first.wait(60)
        other = pool.submit(run, look)
        one.result()
        ended.set()
        other.result()
    assert seen == [torch.float32]
    assert methods == (torch.autocast.__enter__, torch.autocast.__exit__)


class Sized(nn.Module):
    "A network that knows how many channels it has."

    def __init__(self):
        super().__init__()
        self.width, self.a, self.o = 16, nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

    def forward(self, x):
        return self.o(F.relu(self.a(x)).view(len(x), self.width, -1).mean(2))


def test_a_restored_network_is_loaded_under_autocast(tmp_path):
    net, x = Sized().eval(), torch.randn(8, 3, 8, 8)
    done = restore(net, x, ratio=0.5, restorer=prune_only())
    save_restored(done.model, done.plan, tmp_path / 'small.safetensors')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loaded = load_restored(Sized(), x, tmp_path / 'small.safetensors')
    assert loaded.width == done.model.width == 8
    assert torch.equal(out(loaded.eval(), x), out(done.model, x))


class Causal(nn.Module):
    "An attention with a mask that is saved with its weights."

    def __init__(self):
        super().__init__()
        self.e, self.qkv, self.p = nn.Embedding(20, 12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.f, self.g, self.o = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 20)
        self.register_buffer('mask', torch.full((8, 8), -torch.inf).triu(1))

    def forward(self, t):
        x = self.e(t)
        q, k, v = self.qkv(x).view(*t.shape, 3, 3, 4).permute(2, 0, 3, 1, 4)
        n = t.shape[1]
        w = (q @ k.mT / 2 + self.mask[:n, :n]).softmax(-1)
        x = x + self.p((w @ v).transpose(1, 2).flatten(2))
        return self.o(x + self.g(F.gelu(self.f(x))))


def test_a_mask_may_hold_infinity():
    torch.manual_seed(0)
    net, x = Causal().eval(), torch.randint(20, (4, 6))
    repeat(net.f)
    done = restore(net, x, keep=dict(f=first_half(net.f)), restorer=merging())
    assert gap(out(done.model, x), out(net, x)) < 1e-4
    assert torch.equal(done.model.mask, net.mask)
    net.mask[0, 1] = torch.nan
    with pytest.raises(ValueError, match='mask: holds NaN'):
        restore(net, x, ratio=0.5)


@pytest.mark.parametrize('name', ['running_mean', 'running_var', 'weight'])
def test_what_a_norm_computes_with_may_not(name):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)).eval()
    getattr(net[1], name).data[2] = torch.inf
    with pytest.raises(ValueError, match=f'1.{name}: holds NaN or infinity'):
        restore(net, torch.randn(2, 3, 8, 8), ratio=0.5)


class TwoNorms(nn.Module):
    "Another norm for training, and a factor for other inputs."

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
        self.n, self.aux = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.gain = nn.Parameter(torch.rand(16, 1, 1))
        self.b, self.o, self.far = nn.Conv2d(16, 8, 3), nn.Linear(8, 3), nn.LayerNorm(5)

    def forward(self, x, night=False):
        x = self.a(x)
        x = self.aux(x) if self.training else self.n(x)
        return self.o(F.relu(self.b(x * self.gain if night else x)).mean((2, 3)))


def warned(ratio, *x, **kwargs):
    "Messages of a restoration."
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        restore(*x, ratio=ratio, restorer=prune_only(), **kwargs)
    return [str(w.message) for w in seen]


def test_what_only_other_inputs_use_is_named():
    x = torch.randn(2, 3, 8, 8)
    (message,) = warned({'a.0': 0.5}, TwoNorms().eval(), x)
    assert message.startswith('not used on example_inputs') and message.endswith(': gain, aux')
    assert warned({'b': 0.5}, TwoNorms().eval(), x) == []
    (message,) = warned({'a.0': 0.5}, TwoNorms().eval(), (x, True))
    assert message.endswith(': aux')


class Padded(nn.Conv2d):
    "A convolution that pads by itself."

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def test_of_what_is_used_or_made_nothing_is_said():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    net = nn.Sequential(Padded(3, 16, 3, bias=False), nn.ReLU(), Padded(16, 16, 3, bias=False))
    net.append(nn.Flatten(2)).append(nn.Linear(16, 16)).append(block).eval()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        done = restore(net, torch.randn(8, 3, 4, 4), ratio=0.5, restorer=merging())
    assert '0' in done.plan and any(k.startswith('5') for k in done.plan)


def test_of_batch_norms_that_are_used_nothing_is_said():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    net.append(nn.BatchNorm2d(8)).append(nn.Flatten()).append(nn.Linear(128, 5)).eval()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        restore(net, torch.randn(2, 3, 8, 8), ratio=0.5, restorer=prune_only())
    assert not [w for w in said if 'not used' in str(w.message)]
