"""Language models and their kin as people hand them over, and as other programs take them.

Networks are built from tiny configurations, with random weights.
"""

import copy
import importlib
import io
import shutil

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from test_heads import SIZES, gap, made, run, words
from torch import nn

from lbyl_nb import calibration, layerwise, noise, probe, prune_only, restore, written
from lbyl_nb.fisher import _answers, _mean_divergence, fisher
from lbyl_nb.least_lost import least_lost


def small_of(kind, **how):
    net, x = made(kind)
    how = dict(restorer=layerwise(calibration(x)), new_biases=False) | how
    return restore(net, x, ratio=0.5, **how).model, x


def padded(x, more=3, left=False):
    "Tokens with padding, and the mask that says so."
    n, t = x.shape
    zeros, ones = x.new_zeros(n, more), torch.ones_like(x)
    parts = (zeros, x) if left else (x, zeros)
    marks = (zeros, ones) if left else (ones, zeros)
    return dict(input_ids=torch.cat(parts, 1), attention_mask=torch.cat(marks, 1))


WAYS = dict(probe=probe, layerwise=layerwise)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind, left', [('llama', False), ('llama', True), ('gpt2', False)])
def test_padding_is_not_looked_at(kind, left, way):
    "Texts with padding restore the weights that texts without it restore."
    net, x = made(kind)
    tokens = words(40, 9)
    give = lambda t: calibration(t | dict(use_cache=False))
    plain, with_padding = dict(input_ids=tokens), padded(tokens, left=left)
    how = dict(ratio=0.5, restorer=WAYS[way](give(plain), ridge=1e-3))
    one = restore(net, x, **how).model
    two = restore(net, x, **how | dict(restorer=WAYS[way](give(with_padding), ridge=1e-3))).model
    full = dict(with_padding, attention_mask=torch.ones_like(with_padding['input_ids']))
    three = restore(net, x, **how | dict(restorer=WAYS[way](give(full), ridge=1e-3))).model
    largest = lambda a, b: max((a[k] - b[k]).abs().max().item() for k in a)
    one, two, three = (m.state_dict() for m in (one, two, three))
    assert largest(one, two) < 5e-5 < 1e-3 < largest(one, three)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('kind', ['llama', 'bert'])
def test_a_mask_that_is_given_by_position_hides_padding(kind, way):
    "Texts with padding, as arguments without names, restore what texts without it restore."
    net, _ = made(kind)
    tokens = words(40, 9)
    hidden = tuple(padded(tokens).values())
    give = lambda x: dict(ratio=0.5, restorer=WAYS[way](calibration(x), ridge=1e-3))
    one = restore(net, (tokens,), **give((tokens,))).model.state_dict()
    two = restore(net, hidden, **give(hidden)).model.state_dict()
    assert max((one[k] - two[k]).abs().max().item() for k in one) < 5e-5


@pytest.mark.parametrize('hidden', [False, True])
@pytest.mark.parametrize('kind', ['llama', 'bert'])
def test_a_wide_last_layer_is_met_some_samples_at_a_time(kind, hidden, monkeypatch):
    "Whether the layer's outputs are held at once or not, padded or not, the weights are the same."
    net, x = made(kind)
    x = dict(x) | (padded(words(40, 9)) if hidden else {})
    module, widths = importlib.import_module('lbyl_nb.layerwise'), []
    last = net.lm_head if kind == 'llama' else net.classifier
    small = []
    for limit in (2**28, 500):
        monkeypatch.setattr(module, '_WIDE', limit)
        met = module._meet_in_parts
        monkeypatch.setattr(module, '_meet_in_parts', lambda *v: (widths.append(v[2]), met(*v)))
        how = dict(ratio=0.5, restorer=layerwise(calibration(x)))
        small.append(restore(net, x, **how).model.state_dict())
        monkeypatch.setattr(module, '_meet_in_parts', met)
    assert [w.out_features for w in widths] == [last.out_features]
    for k, v in small[0].items():
        assert (small[1][k] - v).abs().max() < 1e-9, k


def test_padding_is_not_looked_at_by_criteria():
    net, x = made('llama')
    tokens = words(40, 9)
    give = lambda t: calibration(t | dict(use_cache=False))
    how = dict(ratio=0.5, restorer=prune_only())
    plans = []
    for t in (dict(input_ids=tokens), padded(tokens)):
        plans.append(restore(net, x, criterion=least_lost(give(t)), **how).plan)
    assert plans[0] == plans[1]


@pytest.mark.parametrize('left', [False, True])
def test_padding_is_not_looked_at_by_the_output(left):
    "Fisher information and divergence are those of the texts without padding."
    net, x = made('llama')
    tokens, other = words(40, 9), copy.deepcopy(net)
    other.lm_head.weight.data *= 0.9
    names = ['model.layers.0.mlp.gate_proj', 'model.layers.1.self_attn.v_proj']
    found = []
    for given in (dict(input_ids=tokens), padded(tokens, left=left)):
        probes = calibration(given | dict(use_cache=False))(net, x)
        moved = _mean_divergence(_answers(net, probes), _answers(other, probes))
        found.append((*fisher(probes, names).values(), torch.tensor(moved)))
    for plain, with_padding in zip(*found):
        assert (with_padding - plain).norm() < 1e-5 * plain.norm()


def test_what_a_tokenizer_returns():
    "A mapping of its own class, with a mask, is an example and a calibration set."
    tf = pytest.importorskip('transformers')
    net, x = made('llama')
    given = tf.BatchEncoding(padded(words(24, 6)))
    small = restore(net, given, ratio=0.5, restorer=layerwise(calibration(given))).model
    assert run(small, given)[0].shape == (24, 9, 48)
    drawn = restore(net, given, ratio=0.5, restorer=layerwise(noise(16))).model
    assert run(drawn, given)[0].isfinite().all()


def test_own_text_restores_and_who_cannot_write_is_told():
    net, x = made('llama')
    r = restore(net, x, ratio=0.5, restorer=layerwise(written(32, length=9)))
    pruned = restore(net, x, ratio=0.5, restorer=prune_only())
    texts = written(64, length=7, seed=1)(net, dict(input_ids=x['input_ids'])).args
    dense = run(net, texts)[0].log_softmax(-1)
    lost = lambda m: (dense.exp() * (dense - run(m, texts)[0].log_softmax(-1))).sum(-1).mean()
    assert lost(r.model) < 0.5 * lost(pruned.model)
    for kind in ('bert', 't5'):
        net, x = made(kind)
        with pytest.warns(UserWarning, match='cannot write a text by itself'):
            restore(net, x, ratio=0.2, restorer=layerwise(written(16)))


def test_tied_embeddings_are_named():
    net, x = made('llama')
    net.config.tie_word_embeddings = True
    net.tie_weights()
    assert net.lm_head.weight is net.model.embed_tokens.weight
    with pytest.raises(ValueError, match='keep: .*lm_head.*shares a parameter'):
        restore(net, x, keep={'lm_head': range(8)})
    small = restore(net, x, ratio=0.5, restorer=layerwise(calibration(x))).model
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert torch.equal(small.lm_head.weight, net.lm_head.weight)


def test_no_ratio_leaves_an_attention_without_heads():
    net, x = made('llama')
    small = restore(net, x, ratio=0.99, restorer=prune_only()).model
    attention = small.model.layers[0].self_attn
    assert attention.k_proj.out_features == attention.head_dim
    assert attention.q_proj.out_features == 2 * attention.head_dim


@pytest.mark.parametrize('kind', ['llama', 'qwen2', 'gpt2'])
def test_the_same_text_with_a_cache_and_without(kind):
    small, x = small_of(kind)
    how = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    some = [small.generate(x['input_ids'][:4], use_cache=c, **how) for c in (True, False)]
    assert torch.equal(*some)
    step = x['input_ids'][:4]
    for _ in range(8):
        step = torch.cat([step, run(small, dict(input_ids=step))[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(some[0][:, :15], step[:, : some[0].shape[1]])


@pytest.mark.parametrize('kind', ['vit', 'llama'])
def test_exported_by_torch(kind):
    small, x = small_of(kind)
    program = torch.export.export(small, (), dict(x), strict=False)
    assert gap(program.module()(**x)[0], run(small, x)[0]) < 1e-9


class Logits(nn.Module):
    "The first output alone."

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        named = 'pixel_values' if x.is_floating_point() else 'input_ids'
        more = {} if x.is_floating_point() else dict(use_cache=False)
        return self.net(**{named: x}, **more).logits


@pytest.mark.parametrize('kind', ['vit', 'llama'])
def test_exported_to_onnx(kind, tmp_path):
    ort = pytest.importorskip('onnxruntime')
    small, x = small_of(kind)
    small = Logits(small.float())
    given = next(iter(x.values()))
    given = given.float() if given.is_floating_point() else given
    file = io.BytesIO()
    torch.onnx.export(small, (given,), file, dynamo=True, verbose=False)
    session = ort.InferenceSession(file.getvalue())
    (out,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    with torch.no_grad():
        assert gap(torch.tensor(out), small(given)) < 1e-4


@pytest.mark.parametrize('kind', ['vit', 'llama'])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    small, x = small_of(kind)
    found = []
    for checkpointing in (False, True):
        net = copy.deepcopy(small).train()
        if checkpointing:
            net.gradient_checkpointing_enable()
        net(**x)[0].square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found)
    assert found[0].any()


@pytest.mark.parametrize('kind', ['vit', 'llama'])
def test_compiled(kind):
    "By the compiler that is PyTorch's default, where there is one for C++."
    small, x = small_of(kind, streams=True)
    compiler = any(map(shutil.which, ('c++', 'g++', 'clang++')))
    whole = torch.compile(small, backend='inductor' if compiler else 'eager')
    assert gap(run(whole, x)[0], run(small, x)[0]) < 1e-5


IN_MEMORY = ['lm_head', *(f'model.{k}' for k in ('embed_tokens', 'layers.0', 'norm', 'rotary_emb'))]
AWAY = {
    'cpu': lambda net, folder: cpu_offload(net, execution_device='cpu'),
    'disk': lambda net, folder: disk_offload(net, folder, execution_device='cpu'),
    'both': lambda net, folder: dispatch_model(
        net,
        dict.fromkeys(IN_MEMORY, 'cpu') | {'model.layers.1': 'disk'},
        main_device='cpu',
        offload_dir=folder,
        force_hooks=True,
    ),
}


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('where', AWAY)
def test_networks_that_accelerate_keeps_elsewhere(where, tied, tmp_path):
    "What comes back is whole, and what comes back for the network in memory."
    net, x = made('llama')
    if tied:
        net.config.tie_word_embeddings = True
        net.tie_weights()
    away = AWAY[where](copy.deepcopy(net), tmp_path)
    how = dict(ratio=0.5, restorer=layerwise(calibration(x)))
    want, r = restore(net, x, **how), restore(away, x, **how)
    assert r.plan == want.plan and r.cost.equals(want.cost)
    assert gap(run(r.model, x), run(want.model, x)) < 1e-12
    assert not any(hasattr(m, '_hf_hook') for m in r.model.modules())
    assert (r.model.lm_head.weight is r.model.model.embed_tokens.weight) == tied
    # the network that was passed in is where it was, and computes
    assert any(p.is_meta for p in away.parameters())
    assert gap(run(away, x), run(net, x)) < 1e-12


MLP = dict(
    llama=('model.layers.0.mlp.up_proj', 'model.layers.0.mlp.down_proj'),
    bert=('bert.encoder.layer.0.intermediate.dense', 'bert.encoder.layer.0.output.dense'),
    t5=('encoder.block.0.layer.1.DenseReluDense.wi', 'encoder.block.0.layer.1.DenseReluDense.wo'),
)


def with_head(kind):
    "A network that takes labels, in double precision."
    tf = pytest.importorskip('transformers')
    sizes = dict(vocab_size=48, num_heads=4, d_model=32, d_kv=8, d_ff=40, num_layers=1)
    build = dict(
        llama=lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
        bert=lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)),
        t5=lambda: tf.T5ForConditionalGeneration(tf.T5Config(**sizes, decoder_start_token_id=0)),
    )
    torch.manual_seed(0)
    return build[kind]().double().eval()


@pytest.mark.parametrize('kind', MLP)
def test_labels_that_are_not_counted(kind):
    "A batch as it is trained on: output and loss are those of the network deaf to what is removed."
    net, (first, second) = with_head(kind), MLP[kind]
    x = padded(words(8, 9))
    labels = x['input_ids'].masked_fill(x['attention_mask'] == 0, -100)
    x, keep = x | dict(labels=labels), [*range(3, 30)]
    small = restore(net, x, keep={first: keep}, restorer=prune_only()).model
    deaf = copy.deepcopy(net)
    gone = [i for i in range(40) if i not in keep]
    deaf.get_submodule(second).weight.data[:, gone] = 0
    with torch.no_grad():
        a, b, whole = small(**x), deaf(**x), net(**x)
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.loss, b.loss)
    assert (whole.logits - b.logits).abs().max() > 1e-4
    assert small.get_submodule(first).out_features == len(keep)
    restore(net, x, keep={first: keep})


def test_the_kind_of_tokens_is_kept_in_own_text():
    "What restores weights on texts of the model is those texts, of the kind of the example's."
    net, x = made('gpt2')
    net.generation_config.bos_token_id = net.generation_config.eos_token_id = 1
    ids, how = x['input_ids'], dict(ratio=0.5, new_biases=False)
    zeros, ones = torch.zeros(32, 9, dtype=torch.long), torch.ones(32, 9, dtype=torch.long)
    given = x | dict(token_type_ids=0 * ids, attention_mask=0 * ids + 1)
    own = restore(net, given, restorer=layerwise(written(32, length=9)), **how).model
    texts = written(32, length=9)(net, x).args | dict(attention_mask=ones)
    by_hand = {}
    for kind in (zeros, ones):
        source = calibration(texts | dict(token_type_ids=kind))
        by_hand[kind.any().item()] = restore(net, given, restorer=layerwise(source), **how).model
    far = lambda m: max((a - b).abs().max() for a, b in zip(own.parameters(), m.parameters()))
    assert far(by_hand[False]) < 1e-6 < 1e-3 < far(by_hand[True])
