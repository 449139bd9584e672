"""Streams behind layer norms and RMS norms lose channels; networks are built from configurations.

Weights are random, as what is asked for is exact.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_heads import HEADS, SIZES, WIDTH, D, gap, made, own, run, words
from torch import nn

from lbyl_nb.graph import find_groups, remove_channels
from lbyl_nb.layerwise import layerwise, probe
from lbyl_nb.probes import calibration
from lbyl_nb.recover import plan, restore
from lbyl_nb.restorers import lbyl, prune_only
from lbyl_nb.saved import load_restored, save_restored
from lbyl_nb.trace import trace

STAY = [i for i in range(WIDTH) if i % 4]


def stream(net, x):
    "The group that holds the most norms and tables."
    groups = find_groups(trace(net, x), streams=True)
    return max((g for g in groups if not g.reason), key=lambda g: len(g.parameters))


def cut_by_hand(net, small):
    "Fill a narrower network of the same kind with the channels of `STAY`, told by their number."
    state = net.state_dict()
    for k, v in small.state_dict().items():
        whole = state[k]
        for d in range(whole.ndim):
            if v.shape[d] != whole.shape[d]:
                whole = whole.index_select(d, torch.tensor(STAY))
        v.copy_(whole)
    return small


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('kind', ['Llama', 'Qwen2', 'Qwen3', 'Mistral'])
def test_language_models_are_what_a_narrower_configuration_gives(kind, shared):
    torch.manual_seed(0)
    sizes = SIZES | dict(num_key_value_heads=2, head_dim=D, tie_word_embeddings=shared)
    if kind == 'Qwen2':
        del sizes['head_dim']
    net = own((kind, 'ForCausalLM'), **sizes).double().eval()
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    x = dict(input_ids=words(), use_cache=False)
    narrow = sizes | dict(hidden_size=len(STAY), head_dim=D)
    expected = cut_by_hand(net, own((kind, 'ForCausalLM'), **narrow).double().eval())
    small = restore(net, x, keep={stream(net, x).name: STAY}, restorer=prune_only()).model
    assert gap(run(small, x), run(expected, x)) < 1e-10
    assert gap(run(small, x), run(net, x)) > 1e-2
    assert small.config.hidden_size == len(STAY) and net.config.hidden_size == WIDTH
    assert small.get_input_embeddings().embedding_dim == len(STAY)
    same = small.lm_head.weight is small.model.embed_tokens.weight
    assert same == shared


@pytest.mark.parametrize('kind', ['llama', 'phi3'])
def test_what_comes_back_is_loaded_by_transformers(kind, tmp_path):
    net, x = made(kind)
    how = dict(restorer=layerwise(calibration(x)), new_biases=False)
    keep = plan(net, x, 0.4, streams=True, round_to=2)  # one pair of heads of two goes, too
    done = restore(net, x, keep=keep, **how)
    small = done.model
    assert (small.config.hidden_size, small.config.num_key_value_heads) == (20, 1)
    small.save_pretrained(tmp_path / 'theirs')
    again = type(net).from_pretrained(tmp_path / 'theirs', dtype=torch.float64).eval()
    assert gap(run(again, x), run(small, x)) == 0
    save_restored(small, done.plan, tmp_path / 'ours.safetensors')
    loaded = load_restored(net, x, tmp_path / 'ours.safetensors')
    assert gap(run(loaded, x), run(small, x)) == 0


def test_a_configuration_that_transformers_refuses_is_not_written():
    "The width of the stream would be no multiple of the number of heads."
    net, x = made('llama')
    stay = list(range(19))
    small = restore(net, x, keep={stream(net, x).name: stay}, restorer=prune_only()).model
    assert small.config.hidden_size == WIDTH and small.lm_head.in_features == 19


class Block(nn.Module):
    "A pre-norm block with one hidden layer."

    def __init__(self, norm):
        super().__init__()
        self.norm, self.up, self.down = norm(12), nn.Linear(12, 9), nn.Linear(9, 12)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stream(nn.Module):
    "Patches, a token of its own in front, positions, blocks, a norm and a classifier."

    def __init__(self, norm=nn.LayerNorm, turned=False):
        super().__init__()
        self.turned = turned
        self.patches, self.token = nn.Linear(5, 12), nn.Parameter(torch.randn(1, 1, 12))
        self.places = nn.Parameter(torch.randn(1, 8, 12))
        self.blocks = nn.Sequential(Block(norm), Block(norm))
        self.norm, self.head = norm(12), nn.Linear(12, 4)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x)], 1) + self.places
        if self.turned:  # samples are in the second dimension, as PyTorch's own transformer has it
            return self.head(self.norm(self.blocks(x.transpose(0, 1)))[0])
        return self.head(self.norm(self.blocks(x))[:, 0])


class RootNorm(nn.Module):
    "An RMS norm that is written out."

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


class ShiftedNorm(RootNorm):
    "The same with one added to the weight, as Gemma has it."

    def forward(self, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)


class Unscaled(nn.LayerNorm):
    def __init__(self, n):
        super().__init__(n, elementwise_affine=False)


NORMS = dict(
    layer=nn.LayerNorm, rms=nn.RMSNorm, root=RootNorm, shifted=ShiftedNorm, unscaled=Unscaled
)


def patches(net):
    "A network in double precision with norms that are not ones, and its input."
    torch.manual_seed(1)
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return net.double().eval(), torch.randn(64, 7, 5).double()


def narrower(net, stay):
    "The same by hand: all that has twelve channels has those that stay."
    small, at = copy.deepcopy(net), torch.tensor(stay)
    for m in small.modules():
        for k, p in list(m._parameters.items()):
            if p is None:
                continue
            for d in range(p.ndim):
                if p.shape[d] == 12:
                    p = p.index_select(d, at)
            m._parameters[k] = nn.Parameter(p.detach())
        if hasattr(m, 'normalized_shape'):
            m.normalized_shape = (len(at),)
    return small


@pytest.mark.parametrize('norm', NORMS)
def test_a_stream_with_a_token_and_positions(norm):
    net, x = patches(Stream(NORMS[norm]))
    stay = [0, 1, 3, 4, 6, 9, 11]
    g = stream(net, x) if norm != 'unscaled' else find_groups(trace(net, x), streams=True)[0]
    assert (g.channels, g.reason) == (12, '')
    small = restore(net, x, keep={g.name: stay}, restorer=prune_only()).model
    with torch.no_grad():
        expected, y = narrower(net, stay)(x), net(x)
        assert (small(x) - expected).abs().max() < 1e-10 * expected.abs().max()
        assert (small(x) - y).abs().max() > 1e-2 * y.abs().max()
    assert all(m.normalized_shape == (7,) for m in small.modules() if isinstance(m, nn.LayerNorm))


@torch.no_grad()
def without(net, names, dead):
    "Nothing is written to some channels of the stream, and the others have mean zero."
    stay = torch.tensor([i for i in range(12) if i not in dead])
    for name in names:
        owner, _, attribute = name.rpartition('.')
        p = getattr(net.get_submodule(owner), attribute)
        rows = p.data if attribute in ('weight', 'bias') else p.data.movedim(-1, 0)
        rows[dead] = 0
        rows[stay] -= rows[stay].mean(0)
    return net


WRITERS = ['token', 'places', 'patches.weight', 'patches.bias']
WRITERS += [f'blocks.{i}.down.{k}' for i in (0, 1) for k in ('weight', 'bias')]
EXACT = dict(refit=False, ridge=1e-10)


@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize('norm', NORMS)
def test_what_reads_a_norm_of_fewer_channels_is_restored_for_that_norm(norm, turned):
    """Of silent channels nothing is lost but the number by which a norm divides.

    Side by side and one after the other, the readers make up for it exactly; a regression that
    sees the norm of all channels cannot."""
    net, x = patches(Stream(NORMS[norm], turned))
    dead = [2, 5, 7, 8]
    net = without(net, WRITERS, dead)
    keep = {'patches': [i for i in range(12) if i not in dead]}
    y = net(x).detach()
    far = lambda r: (
        (restore(net, x, keep=keep, restorer=r).model(x) - y).abs().max() / y.abs().max()
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert far(layerwise(calibration(x), **EXACT)) < 1e-5
    assert any('one after the other' in str(w.message) for w in said) == turned
    assert far(prune_only()) > 1e-2
    assert far(probe(calibration(x), ridge=1e-10)) > 1e-2


class Grouped(nn.Module):
    "Convolutions with a group norm between."

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 1)
        self.c = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.c(F.relu(self.b(self.norm(self.a(x)))).mean((2, 3), keepdim=True)).flatten(1)


def test_what_reads_a_group_norm_of_fewer_channels_is_restored_for_that_norm():
    torch.manual_seed(0)
    net, x = Grouped().double().eval(), torch.randn(40, 3, 6, 6).double()
    dead, stay = [1, 6], [0, 2, 3, 4, 5, 7]
    with torch.no_grad():  # each group has mean zero without its silent channel
        for p in (net.a.weight, net.a.bias):
            p[dead] = 0
            for g in ([0, 2, 3], [4, 5, 7]):
                p[g] -= p[g].mean(0)
    y = net(x).detach()
    small = restore(net, x, keep={'a': stay}, restorer=layerwise(calibration(x), **EXACT)).model
    assert (small(x) - y).abs().max() < 1e-4 * y.abs().max()


class OddNorm(RootNorm):
    "Called a norm, but its first channel counts twice."

    def forward(self, x):
        first = x[..., :1].square()
        return x * (x.square().mean(-1, keepdim=True) + first).rsqrt() * self.weight


class HalfNorm(RootNorm):
    "Called a norm, but it divides each half by its own number."

    def forward(self, x):
        halves = [v * (v.square().mean(-1, keepdim=True) + 1e-6).rsqrt() for v in x.chunk(2, -1)]
        return torch.cat(halves, -1) * self.weight


class CountedNorm(nn.LayerNorm):
    "A layer norm that remembers something."

    def __init__(self, n):
        super().__init__(n)
        self.register_buffer('seen', torch.zeros(3))

    def forward(self, x):
        return super().forward(x) + self.seen.sum()


@pytest.mark.parametrize('norm', [OddNorm, HalfNorm, CountedNorm])
def test_what_is_no_norm_over_all_channels_is_left_alone(norm):
    net, x = patches(Stream(norm))
    reasons = {g.name: g.reason for g in find_groups(trace(net, x), streams=True)}
    assert reasons['patches']
    small = restore(net, x, ratio=0.3, restorer=prune_only(), streams=True).model
    assert small.head.in_features == 12 and small.blocks[0].up.out_features == 6


class Before(Stream):
    "Positions come first in the sum."

    def forward(self, x):
        x = self.places + torch.cat([self.token.expand(len(x), -1, -1), self.patches(x)], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


@pytest.mark.parametrize('kind', [Stream, Before])
def test_streams_stay_unless_they_are_asked_for(kind):
    net, x = patches(kind())
    groups = {g.name: g.reason for g in find_groups(trace(net, x))}
    assert 'residual stream' in groups['patches']
    assert set(plan(net, x, 0.3)) == {'blocks.0.up', 'blocks.1.up'}


def test_norms_know_their_shape_when_channels_are_removed():
    net, x = patches(Stream(NORMS['unscaled']))
    traced = trace(net, x)
    groups = [g for g in find_groups(traced, streams=True) if not g.reason]
    small = remove_channels(traced, groups, {'patches': [0, 5, 9]})
    shapes = {m.normalized_shape for m in small.modules() if isinstance(m, nn.LayerNorm)}
    assert shapes == {(9,)} and small(x).isfinite().all()


def test_a_shared_table_is_not_rewritten():
    "What looks tokens up and what answers by the same weight lose columns, and nothing else."
    net, x = made('gpt2')
    g = stream(net, x)
    assert 'lm_head' in [c.name for c in g.consumers]
    for restorer in (lbyl(), layerwise(calibration(x))):
        small = restore(net, x, keep={g.name: STAY}, restorer=restorer).model
        assert small.lm_head.weight is small.transformer.wte.weight
        assert torch.equal(small.lm_head.weight, net.lm_head.weight[:, STAY])
        assert small.transformer.wpe.weight.shape == (32, len(STAY))
        assert small.transformer.wte.embedding_dim == len(STAY)
    assert HEADS == small.config.n_head


OUTPUT = "its channels are the network's output"
LEFT = dict.fromkeys('llama qwen2 qwen3 phi3 bert vit swin segformer dit encoder'.split(), {OUTPUT})
LEFT['gpt2'] = {'lm_head shares a parameter with transformer.wte'}


@pytest.mark.parametrize('kind', LEFT)
def test_all_but_outputs_can_go(kind):
    net, x = made(kind)
    groups = find_groups(trace(net, x), streams=True)
    assert {g.reason for g in groups if g.reason} == LEFT[kind]
    done = restore(net, x, ratio=0.5, restorer=prune_only(), streams=True)
    assert done.cost.params.after < 0.6 * done.cost.params.before
    assert run(done.model, x)[0].isfinite().all()
