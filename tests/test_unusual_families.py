"""Families of transformers that are written in ways of their own.

Positions that are computed anew for long inputs, tables of tokens with a scale, layers that put out
more than one tensor, tokens that have to be counted. Networks have random weights; what is removed
is worth nothing, so that a smaller copy must give what the dense network gives.
"""

import pytest
import torch
import torch.nn.functional as F
from test_heads import SIZES, WIDTH, gap, own, run, words
from torch import nn

from lbyl_nb.graph import find_groups
from lbyl_nb.recover import plan, restore
from lbyl_nb.restorers import prune_only
from lbyl_nb.trace import trace

HALF = list(range(SIZES['intermediate_size'] // 2))


def drawn(net):
    "A network in double precision with weights that matter."
    torch.manual_seed(0)
    for name, p in net.named_parameters():
        if p.ndim > 1 and 'embed' not in name:
            nn.init.normal_(p, std=2 / p.shape[-1] ** 0.5)
    return net.double().eval()


@pytest.mark.parametrize('share', [0.5, 1.0])
def test_positions_that_are_computed_anew_for_long_inputs(share):
    rope = dict(rope_type='dynamic', factor=2.0, rope_theta=1e4, partial_rotary_factor=share)
    sizes = SIZES | dict(max_position_embeddings=16, num_hidden_layers=1, rope_parameters=rope)
    net = drawn(own(('GPTNeoX', 'ForCausalLM'), **sizes))
    net.gpt_neox.layers[0].attention.dense.weight.data[:, WIDTH // 2 :] = 0
    x = dict(input_ids=words(4), use_cache=False)
    heads = [g for g in find_groups(trace(net, x)) if g.heads and not g.reason]
    keep = {g.name: (g.unit < 2).nonzero().flatten().tolist() for g in heads}
    small = restore(net, x, keep=keep, restorer=prune_only()).model
    longer = dict(input_ids=words(2, 30), use_cache=False)
    assert gap(run(net, x), run(small, x)) < 1e-9
    assert gap(run(net, longer), run(small, longer)) < 1e-9
    assert (small.config.num_attention_heads, small.config.head_dim) == (2, WIDTH // 4)
    assert net.config.num_attention_heads == 4 and getattr(net.config, 'head_dim', None) is None


def test_a_scale_of_the_old_width_is_not_described():
    net = drawn(own(('BioGpt', 'ForCausalLM'), **SIZES))
    x = dict(input_ids=words(4), use_cache=False)
    keep = plan(net, x, 0.25, streams=True)
    small = restore(net, x, keep=keep, restorer=prune_only(), new_biases=False).model
    assert small.output_projection.weight.shape[1] < WIDTH
    assert small.config.hidden_size == net.config.hidden_size == WIDTH


@pytest.mark.parametrize('kind', ['Gemma', 'Gemma2', 'Gemma3'])
def test_tables_of_tokens_with_a_scale(kind):
    tf = pytest.importorskip('transformers')
    sizes = SIZES | dict(num_key_value_heads=2, head_dim=8, pad_token_id=0)
    config = getattr(tf, 'Gemma3TextConfig' if kind == 'Gemma3' else f'{kind}Config')(**sizes)
    net = drawn(getattr(tf, f'{kind}ForCausalLM')(config))
    for layer in net.model.layers:
        layer.mlp.down_proj.weight.data[:, len(HALF) :] = 0
    x = dict(input_ids=words(4), use_cache=False)
    keep = {f'model.layers.{i}.mlp.gate_proj': HALF for i in range(2)}
    small = restore(net, x, keep=keep, restorer=prune_only()).model
    assert small.model.layers[1].mlp.up_proj.weight.shape[0] == len(HALF)
    assert gap(run(net, x), run(small, x)) < 1e-9


class Router(nn.Linear):
    "A linear layer that puts out two tensors."

    def forward(self, x):
        y = super().forward(x)
        return y.softmax(-1), y


class Routed(nn.Module):
    "Hidden units beside a router."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.router = Router(6, 2)

    def forward(self, x):
        h = x + self.b(F.relu(self.a(x)))
        return self.o(h) * self.router(h)[0][:, :1]


def test_layers_that_put_out_two_tensors_are_left_alone():
    torch.manual_seed(0)
    net, x = Routed().eval(), torch.randn(16, 6)
    net.b.weight.data[:, 4:] = 0
    done = restore(net, x, keep=dict(a=range(4)), restorer=prune_only())
    assert gap(net(x), done.model(x)) < 1e-5
    assert plan(net, x, 0.5).keys() == {'a'}
    assert 'Router' in next(g.reason for g in find_groups(trace(net, x)) if g.name == 'router')


class Counted(nn.Module):
    "A network that wants as many tokens of a kind as it has numbers to put in their place."

    def __init__(self):
        super().__init__()
        self.table, self.a, self.o = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, tokens, seen):
        marked = tokens == 8
        if marked.sum() != seen.shape[0] * seen.shape[1]:
            raise ValueError('other tokens than there are numbers')
        x = self.table(tokens).masked_scatter(marked[..., None], seen)
        return self.o(F.relu(self.a(x)))


@pytest.mark.parametrize('restorer', [prune_only(), None])
def test_tokens_that_have_to_be_counted(restorer):
    torch.manual_seed(0)
    tokens = torch.randint(8, (16, 5))
    tokens[:, 1:3] = 8
    net, x = Counted().eval(), (tokens, torch.randn(16, 2, 6))
    net.o.weight.data[:, 4:] = 0
    assert len(plan(net, x, 0.5)['a']) == 4
    small = restore(net, x, keep=dict(a=range(4)), restorer=restorer).model
    assert small.a.weight.shape[0] == 4
    assert gap(net(*x), small(*x)) < 1e-4
