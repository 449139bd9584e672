"""What other programs can load: saved by transformers alone and read by it, with the same logits.

Networks are built from tiny configurations, with random weights.
"""

import pytest
import torch
from test_heads import WIDTH, gap, made, run

from lbyl_nb import recover
from lbyl_nb.budget import budget
from lbyl_nb.layerwise import layerwise, probe
from lbyl_nb.probes import calibration
from lbyl_nb.recover import plan, restore
from lbyl_nb.restorers import prune_only
from lbyl_nb.saved import load_restored, save_restored

# names of hidden layers, of attentions whose heads a configuration can count, room for biases
KINDS = dict(
    llama=('*mlp*', '*self_attn*', False),
    qwen2=('*mlp*', '*self_attn*', False),
    mixtral=('*experts*', '*self_attn*', False),
    t5=('*wi*', '*ttention*', False),
    vit=('*fc1*', '*attention*', True),
    bert=('*intermediate*', None, True),
    gpt2=('*c_fc*', None, True),
)


def again(net, folder):
    "The network that transformers reads from what it has written."
    net.save_pretrained(folder)
    read, told = type(net).from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    assert not any(told[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), told
    if hasattr(net.config, '_experts_implementation'):
        read.config._experts_implementation = net.config._experts_implementation
    return read.eval()


def tied():
    "A Llama whose last layer is its table of tokens; all other layers may have biases."
    net, x = made('llama')
    net.config.tie_word_embeddings = True
    net.tie_weights()
    return net, x


@pytest.mark.parametrize('how', ['ratio', 'budget'])
@pytest.mark.parametrize('kind', KINDS)
def test_saved_and_read_by_transformers_alone(kind, how, tmp_path):
    net, x = made(kind)
    hidden, heads, room = KINDS[kind]
    wish = dict(together=[hidden]) if heads is None else dict(together=[hidden, heads])
    if heads is None:
        wish['ignore'] = ['*attn*'] if kind == 'gpt2' else ['*attention.self*', '*pooler*']
    if how == 'ratio':
        keep = plan(net, x, 0.5, **wish)
    else:
        keep = budget(net, x, params=0.8, round_to=2, **wish)
    r = restore(net, x, keep=keep, restorer=layerwise(calibration(x)), new_biases=room)
    assert r.cost.params['after'] < r.cost.params['before']
    small = again(r.model, tmp_path)
    assert gap(run(small, x), run(r.model, x)) < 1e-9
    assert type(small.config) is type(net.config) and small.config.to_dict() != net.config.to_dict()


def test_widths_are_multiples_and_equal():
    net, x = made('llama')
    keep = budget(net, x, params=0.75, round_to=4, together=['*mlp*', '*self_attn*'])
    small = restore(net, x, keep=keep, restorer=prune_only()).model
    mlps = [layer.mlp for layer in small.model.layers]
    assert {m.up_proj.out_features for m in mlps} == {small.config.intermediate_size}
    assert small.config.intermediate_size % 4 == 0 and small.config.intermediate_size < 40
    assert {m.intermediate_size for m in mlps} == {small.config.intermediate_size}


def test_unequal_widths_are_saved_with_their_plan(tmp_path):
    "The configuration says what the dense one says, and transformers refuses to read the weights."
    net, x = made('llama')
    first = next(k for k in plan(net, x, 0.5) if k.startswith('model.layers.0.mlp'))
    keep = {first: list(range(20))}
    r = restore(net, x, keep=keep, restorer=layerwise(calibration(x)))
    assert r.model.config.intermediate_size == 40
    with pytest.raises(RuntimeError, match='size|shape'):
        again(r.model, tmp_path)
    save_restored(r.model, r.plan, tmp_path / 'small')
    assert gap(run(load_restored(made('llama')[0], x, tmp_path / 'small'), x), run(r.model, x)) == 0


def test_described_networks_are_loaded_from_their_plan_too(tmp_path):
    net, x = tied()
    r = restore(net, x, ratio=0.5, restorer=layerwise(calibration(x)))
    assert r.model.config.mlp_bias and r.model.config.num_attention_heads == 2
    assert r.model.model.layers[1].mlp.down_proj.bias.any()
    said = r.model.config.to_dict()
    assert gap(run(again(r.model, tmp_path / 'own'), x), run(r.model, x)) < 1e-9
    save_restored(r.model, r.plan, tmp_path / 'small')
    same = load_restored(tied()[0], x, tmp_path / 'small')
    assert gap(run(same, x), run(r.model, x)) == 0
    assert same.config.to_dict() == said


def test_a_configuration_that_would_change_the_output_is_taken_back(monkeypatch):
    "Something else than its own describes the copy: modules, biases and configuration stay."

    def wrongly(small, dense):
        small.config.intermediate_size = 7
        small.model.layers[0].self_attn.scaling *= 2
        small.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(torch.ones(WIDTH).double())

    net, x = made('llama')
    right = restore(net, x, ratio=0.5, restorer=prune_only()).model
    monkeypatch.setattr(recover, 'describe', wrongly)
    small = restore(net, x, ratio=0.5, restorer=prune_only()).model
    assert gap(run(small, x), run(right, x)) == 0
    assert small.model.layers[1].mlp.down_proj.bias is None
    assert small.config.intermediate_size == net.config.intermediate_size


def test_parameters_are_counted_as_they_are():
    net, x = made('llama')
    r = restore(net, x, ratio=0.5, restorer=layerwise(calibration(x)))
    assert r.cost.params['after'] == sum(p.numel() for p in r.model.parameters())


def test_a_fit_without_new_biases_is_the_least_squares_fit_without_a_constant():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(6, 10, bias=False)
            self.down = torch.nn.Linear(10, 3, bias=False)

        def forward(self, x):
            return self.down(self.up(x).exp())

    torch.manual_seed(0)
    net, x = Plain().double().eval(), torch.randn(64, 6).double()
    how = dict(ratio=0.5, restorer=probe(calibration(x), ridge=1e-12))
    r = restore(net, x, **how, new_biases=False)
    assert r.model.down.bias is None and restore(net, x, **how).model.down.bias is not None
    h = net.up(x).exp()
    oracle = torch.linalg.lstsq(h[:, r.plan['up']], net.down(h)).solution.T
    torch.testing.assert_close(r.model.down.weight, oracle, rtol=1e-6, atol=1e-8)
