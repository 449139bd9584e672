"""Heads of attention go as a whole, and what repeats another head is removed without loss.

Networks of transformers are built from tiny configurations, with random weights.
"""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_kinds import told
from torch import nn

from lbyl_nb.graph import find_groups
from lbyl_nb.heads import HeadsLeft
from lbyl_nb.layers import tensors_within
from lbyl_nb.layerwise import layerwise, probe
from lbyl_nb.least_lost import least_lost
from lbyl_nb.plans import families_of
from lbyl_nb.probes import calibration
from lbyl_nb.recover import plan, restore
from lbyl_nb.restorers import lbyl, prune_only
from lbyl_nb.saved import load_restored, save_restored
from lbyl_nb.sensitivity import output_loss
from lbyl_nb.trace import trace

EXACT = dict(
    probe=lambda x: probe(calibration(x), ridge=1e-10),
    layerwise=lambda x: layerwise(calibration(x), refit=False, ridge=1e-10),
)
WIDTH, HEADS = 32, 4
D = WIDTH // HEADS


def words(n=48, length=7, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(2, 48, (n, length), generator=gen)


def pictures(n=24, side=16):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0)).double()


def own(kind, attention='sdpa', **given):
    "A network of transformers, and the attention it shall use."
    tf = pytest.importorskip('transformers')
    tf.logging.set_verbosity_error()
    config = getattr(tf, f'{kind[0]}Config')(**given)
    config._attn_implementation = attention
    return getattr(tf, kind[0] + kind[1])(config)


SIZES = dict(
    vocab_size=48,
    hidden_size=WIDTH,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    max_position_embeddings=32,
)
PATCHES = {k: v for k, v in SIZES.items() if k not in ('vocab_size', 'max_position_embeddings')}
PATCHES |= dict(image_size=16, patch_size=4)


def llama(attention):
    net = own(('Llama', 'ForCausalLM'), attention, **SIZES, num_key_value_heads=2)
    return net, dict(input_ids=words(), use_cache=False)


def qwen2(attention):
    net = own(('Qwen2', 'ForCausalLM'), attention, **SIZES, num_key_value_heads=2)
    return net, dict(input_ids=words(), use_cache=False)


def gpt2(attention):
    sizes = dict(vocab_size=48, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=HEADS)
    net = own(('GPT2', 'LMHeadModel'), attention, **sizes)
    return net, dict(input_ids=words(), use_cache=False)


def bert(attention):
    mask = torch.ones(48, 7, dtype=torch.long)
    mask[::2, 5:] = 0
    net = own(('Bert', 'ForSequenceClassification'), attention, **SIZES)
    return net, dict(input_ids=words(), attention_mask=mask)


def vit(attention):
    return own(('ViT', 'ForImageClassification'), attention, **PATCHES), dict(
        pixel_values=pictures()
    )


def clip(attention):
    text, image = SIZES | dict(max_position_embeddings=16, eos_token_id=47), PATCHES
    net = own(('CLIP', 'Model'), attention, text_config=text, vision_config=image)
    return net, dict(input_ids=words(24), pixel_values=pictures())


def whisper(attention):
    names = 'encoder_layers decoder_layers'.split()
    sizes = dict.fromkeys(names, 2) | dict(d_model=WIDTH, num_mel_bins=8, vocab_size=48)
    sizes |= dict.fromkeys(['encoder_attention_heads', 'decoder_attention_heads'], HEADS)
    sizes |= dict.fromkeys(['encoder_ffn_dim', 'decoder_ffn_dim'], 40)
    sizes |= dict(max_source_positions=10, max_target_positions=16, pad_token_id=0)
    sizes |= dict(bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    net = own(('Whisper', 'ForConditionalGeneration'), attention, **sizes)
    sound = torch.randn(24, 8, 20, generator=torch.Generator().manual_seed(0)).double()
    return net, dict(input_features=sound, decoder_input_ids=words(24, 5), use_cache=False)


def phi3(attention):
    net = own(('Phi3', 'ForCausalLM'), attention, **SIZES, num_key_value_heads=2, pad_token_id=0)
    return net, dict(input_ids=words(), use_cache=False)


def mixtral(attention):
    sizes = SIZES | dict(num_key_value_heads=2, num_local_experts=4)
    net = own(('Mixtral', 'ForCausalLM'), attention, **sizes)
    net.config._experts_implementation = 'eager'  # the only one in double precision
    return net, dict(input_ids=words(), use_cache=False)


def qwen3(attention):
    sizes = SIZES | dict(num_key_value_heads=2, head_dim=D)
    return own(('Qwen3', 'ForCausalLM'), attention, **sizes), dict(
        input_ids=words(), use_cache=False
    )


def t5(attention):
    sizes = dict(vocab_size=48, d_model=WIDTH, d_kv=D, d_ff=40, num_layers=2, num_heads=HEADS)
    net = own(('T5', 'ForConditionalGeneration'), attention, **sizes)
    return net, dict(input_ids=words(), decoder_input_ids=words(48, 5, 1), use_cache=False)


def swin(attention):
    sizes = dict(embed_dim=WIDTH, depths=[2], num_heads=[HEADS], window_size=4, mlp_ratio=1.25)
    net = own(('Swin', 'ForImageClassification'), attention, image_size=32, patch_size=4, **sizes)
    return net, dict(pixel_values=pictures(side=32))


def segformer(attention):
    sizes = dict(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, WIDTH])
    sizes |= dict(patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[2, HEADS])
    net = own(('Segformer', 'ForSemanticSegmentation'), attention, **sizes, decoder_hidden_size=16)
    return net, dict(pixel_values=pictures(side=32))


class Modulated(nn.Module):
    "A block of a diffusion transformer: packed projections, shifts and scales by a condition."

    def __init__(self):
        super().__init__()
        self.num_heads, self.norm = HEADS, nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, c):
        a, b, g, d, e, h = self.ada(c)[:, None].chunk(6, -1)
        z = self.qkv(self.norm(x) * (1 + b) + a)
        q, k, v = z.reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + g * self.proj(y)
        return x + h * self.fc2(F.gelu(self.fc1(self.norm(x) * (1 + e) + d), approximate='tanh'))


class DiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.blocks = (
            nn.Conv2d(3, WIDTH, 4, 4),
            nn.ModuleList([Modulated() for _ in 'ab']),
        )
        self.time, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 12)

    def forward(self, pixel_values, t):
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        c = self.time((t[:, None] * torch.arange(1.0, WIDTH + 1).to(t) / 9).cos())
        for b in self.blocks:
            x = b(x, c)
        return self.last(x)


def dit(attention):
    return DiT(), dict(pixel_values=pictures(), t=torch.arange(24.0).double() / 24)


class Encoder(nn.Module):
    "PyTorch's own."

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 40, batch_first=True, norm_first=True)
        self.inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.first, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x, mask):
        return self.last(self.inner(self.first(x), src_key_padding_mask=mask).mean(1))


def encoder(attention):
    x = torch.randn(48, 7, 6, generator=torch.Generator().manual_seed(0)).double()
    return Encoder(), dict(x=x, mask=torch.arange(7) > torch.arange(48)[:, None] % 4 + 3)


FAMILIES = dict(
    llama=llama,
    qwen2=qwen2,
    qwen3=qwen3,
    phi3=phi3,
    mixtral=mixtral,
    gpt2=gpt2,
    bert=bert,
    vit=vit,
    clip=clip,
    whisper=whisper,
    t5=t5,
    swin=swin,
    segformer=segformer,
    dit=dit,
    encoder=encoder,
)


def made(kind, attention='sdpa'):
    "A network in double precision with weights that matter, and its inputs."
    torch.manual_seed(0)
    net, x = FAMILIES[kind](attention)
    net = net.double().eval()
    for name, p in net.named_parameters():
        if p.ndim > 1 and 'embed' not in name:
            nn.init.normal_(p, std=2 / p.shape[-1] ** 0.5)
        elif p.ndim == 1:
            p.data += 0.2 * torch.randn_like(p)
    return net, x


def projections(net):
    "For each attention, (layer, first row, heads) of queries, keys and values."
    for name, m in net.named_modules():
        kids = dict(m.named_children())
        prefix = f'{name}.' if name else ''
        for parts in (('q_proj', 'k_proj', 'v_proj'), ('query', 'key', 'value'), ('q', 'k', 'v')):
            if set(parts) <= set(kids):
                yield [(prefix + k, 0, kids[k].out_features // D) for k in parts]
        for packed in {'c_attn', 'qkv'} & set(kids):
            yield [(prefix + packed, i * WIDTH, HEADS) for i in range(3)]
        if 'qkv_proj' in kids:  # four heads of queries, two of keys and of values
            heads = HEADS, HEADS // 2, HEADS // 2
            yield [(prefix + 'qkv_proj', D * sum(heads[:i]), heads[i]) for i in range(3)]
        if isinstance(m, nn.MultiheadAttention):
            yield [(name, i * WIDTH, HEADS) for i in range(3)]


@torch.no_grad()
def repeat_heads(net):
    "The second half of all heads becomes equal to the first; what reads them stays as it is."
    for layers in projections(net):
        for name, first, heads in layers:
            layer = net.get_submodule(name)
            half = heads // 2 * D
            for p in layer.parameters(recurse=False):
                rows = p.T if type(layer).__name__ == 'Conv1D' and p.ndim > 1 else p
                rows[first + half : first + 2 * half] = rows[first : first + half]
    for p in tables(net):
        p[:, HEADS // 2 :] = p[:, : HEADS // 2]


def tables(net):
    "Tables of positions, with a column for each head."
    for name, p in net.named_parameters():
        if 'relative' in name and p.ndim == 2:
            yield p


def first_half(net, x):
    "The plan that keeps the first half of the heads of every attention."
    groups = find_groups(trace(net, x), streams=True)
    keep = {}
    for f in families_of(groups):
        members = {g.name: g for g in groups if g.name in dict(f.members)}
        if all(g.heads for g in members.values()):
            units = f.members[-1][1].unique_consecutive()
            keep |= f.rows(units[: len(units) // 2].tolist())
    return keep


def gap(a, b):
    "The largest relative difference of what two networks put out."
    pairs = list(zip(tensors_within(a), tensors_within(b), strict=True))
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in pairs)


def run(net, x):
    with torch.no_grad():
        return net(**x)


WRITTEN_OUT = 'llama phi3 gpt2 bert whisper t5 swin'.split()


@pytest.mark.parametrize(
    'kind, attention', [(k, 'sdpa') for k in FAMILIES] + [(k, 'eager') for k in WRITTEN_OUT]
)
def test_repeated_heads_are_removed_without_loss(kind, attention):
    net, x = made(kind, attention)
    repeat_heads(net)
    keep = first_half(net, x)
    pruned = restore(net, x, keep=keep, restorer=prune_only()).model
    assert rows(pruned) == {k: n // 2 for k, n in rows(net).items()} and rows(net)
    assert gap(run(pruned, x), run(net, x)) > 1e-3
    for f in EXACT.values():
        small = restore(net, x, keep=keep, restorer=f(x)).model
        assert gap(run(small, x), run(net, x)) < 1e-5


def rows(net):
    "{layer of an attention: rows of its weights}."
    found = {}
    for name in {layer for layers in projections(net) for layer, *_ in layers}:
        m = net.get_submodule(name)
        weight = m.in_proj_weight if isinstance(m, nn.MultiheadAttention) else m.weight
        found[name] = weight.shape[type(m).__name__ == 'Conv1D']
    return found


HIDDEN = 'up_proj gate_up_proj gate_up c_fc intermediate.dense fc1 wi linear1'.split()


@torch.no_grad()
def repeat_hidden(net):
    "The second half of the hidden units of each feed-forward block becomes equal to the first."
    for name, m in net.named_modules():
        packed = getattr(m, 'gate_up_proj', None)
        if packed is not None:  # in a layer, or of several experts
            weight = getattr(packed, 'weight', packed)
            for part in weight.chunk(2, -2):
                half = part.shape[-2] // 2
                part[..., half:, :] = part[..., :half, :]
            if packed is weight:
                yield from ((f'{name}.experts.{e}.gate_up', half) for e in range(len(weight)))
            else:
                yield f'{name}.gate_up_proj', half
        if not name.endswith(tuple(HIDDEN)) or name.endswith('gate_up_proj'):
            continue
        for layer in (m, *gates(net, name)):
            for p in layer.parameters():
                row = p.T if type(m).__name__ == 'Conv1D' and p.ndim > 1 else p
                half = len(row) // 2
                row[half:] = row[:half]
        yield name, half


def gates(net, name):
    "The layer of the gate beside a layer of hidden units, or a depthwise convolution behind it."
    modules = dict(net.named_modules())
    beside = {name.replace('up_proj', 'gate_proj'), name.replace('fc1', 'dwconv.dwconv')} - {name}
    return [modules[k] for k in beside if k in modules]


@pytest.mark.parametrize('kind', FAMILIES)
def test_repeated_hidden_units_are_removed_without_loss(kind):
    net, x = made(kind)
    halves = dict(repeat_hidden(net))
    groups = {g.name for g in find_groups(trace(net, x)) if not g.reason}
    keep = {}
    for name, half in halves.items():
        keep[name if name in groups else name.replace('up_proj', 'gate_proj')] = list(range(half))
    assert keep
    for f in EXACT.values():
        small = restore(net, x, keep=keep, restorer=f(x)).model
        assert gap(run(small, x), run(net, x)) < 1e-5


# shares of the channels of queries, keys, values, gates and hidden units that can go
REACHED = dict.fromkeys(FAMILIES, 1.0)


@pytest.mark.parametrize('kind', FAMILIES)
def test_all_channels_inside_of_blocks_are_reached(kind):
    net, x = made(kind)
    inner = {layer for layers in projections(net) for layer, *_ in layers}
    t, free = trace(net, x), {}
    inner |= {k for k, _ in t.model.named_modules() if k.endswith((*HIDDEN, 'gate_proj'))}
    for g in find_groups(t):
        for k, at in g.cut if not g.reason else ():
            free[k] = free.get(k, 0) + at.numel()
    sizes = {k: m.out_features for k, m in t.model.named_modules() if isinstance(m, nn.Linear)}
    parts = [k for k in sizes if k in inner or k.rpartition('.')[0] in inner and 'out' not in k]
    assert sum(free.get(k, 0) for k in parts) >= REACHED[kind] * sum(sizes[k] for k in parts) > 0


@pytest.mark.parametrize('ratio', [0.3, 0.5, 0.9])
@pytest.mark.parametrize('kind', ['llama', 'phi3', 'gpt2', 'bert', 'whisper', 't5', 'swin'])
def test_numbers_of_heads_are_right(kind, ratio):
    """Modules and configurations say how many heads there are.

    At least one is left. The dense network says what it said."""
    net, x = made(kind)
    before, weights = said(net), copy.deepcopy(net.state_dict())
    small = restore(net, x, ratio=ratio, restorer=prune_only()).model
    assert said(net) == before
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    units = HEADS // 2 if kind in ('llama', 'phi3') else HEADS
    left = {HEADS: max(round(units * (1 - ratio)), 1) * HEADS // units}
    if units < HEADS:
        left[2] = left[HEADS] // 2
    for k, numbers in said(small).items():
        if kind != 't5' or k:  # T5 itself has a configuration that no attention holds
            assert numbers == {a: left[n] for a, n in before[k].items()}, k
    assert run(small, x)[0].isfinite().all()


BY_HEADS = """num_heads num_attention_heads num_key_value_heads n_head n_heads
    encoder_attention_heads decoder_attention_heads""".split()


def said(net):
    "{module: its numbers of heads, and those of its configuration}."
    found = {}
    for name, m in net.named_modules():
        held = vars(m) | vars(getattr(m, 'config', object))
        numbers = {k: v for k, v in held.items() if k in BY_HEADS and type(v) is int}
        if numbers:
            found[name] = numbers
    return found


@pytest.mark.parametrize('kind', ['phi3', 'llama'])
@pytest.mark.parametrize('biases', [True, False])
def test_biases_that_transformers_would_not_load_are_named(kind, biases, tmp_path):
    "Heads alone are removed; the warning counts the biases that transformers itself calls unknown."
    net, x = made(kind)
    keep = plan(net, x, 0.5, ignore=['*mlp*'])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        how = dict(restorer=layerwise(calibration(x)), new_biases=biases)
        small = restore(net, x, keep=keep, **how).model
    small.save_pretrained(tmp_path)
    how = dict(dtype=torch.float64, output_loading_info=True)
    again, told = type(net).from_pretrained(tmp_path, **how)
    lost = sorted(told['unexpected_keys'])
    said = [str(w.message) for w in heard if 'from_pretrained' in str(w.message)]
    assert len(said) == bool(lost) == biases
    if lost:
        names = said[0].partition(':')[0].partition(' and ')
        first = names[0].split(', ')
        assert {f'{k}.bias' for k in first} <= set(lost)
        assert len(first) + int(names[2].removesuffix(' more') or 0) == len(lost)
    assert (gap(run(again.eval(), x), run(small, x)) > 1e-3) == bool(lost)


def test_layers_with_different_numbers_of_heads_get_configurations_of_their_own():
    net, x = made('bert')
    first = 'bert.encoder.layer.0.attention.self'
    keep = {f'{first}.value': list(range(D))}
    small = restore(net, x, keep=keep, restorer=prune_only()).model
    other = small.bert.encoder.layer[1].attention.self
    assert small.get_submodule(first).config.num_attention_heads == 1
    assert small.get_submodule(first).num_attention_heads == 1
    assert (other.num_attention_heads, other.config.num_attention_heads) == (HEADS, HEADS)
    assert small.config.num_attention_heads == net.config.num_attention_heads == HEADS


@pytest.mark.parametrize('kind', ['llama', 'phi3'])
@pytest.mark.parametrize('both', [False, True])
def test_layers_with_different_numbers_of_heads_hear_of_another_attention(kind, both):
    """Another implementation of attention reaches all layers, and changes nothing but rounding.

    Phi-3 looks up its number of heads in the configuration while it runs."""
    net, x = made(kind, 'eager')
    first, *more = [g for g in find_groups(trace(net, x)) if g.heads and not g.reason]
    half = {g.name: (g.unit < 1).nonzero().flatten().tolist() for g in [first, *more][: both + 1]}
    small = restore(net, x, keep=half, restorer=prune_only()).model
    before = run(small, x)
    for again in (small, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        again.set_attn_implementation('sdpa')
        held = [m.config for m in again.modules() if hasattr(m, 'config')]
        assert {c._attn_implementation for c in held} == {'sdpa'}
        assert gap(run(again, x), before) < 1e-5  # softmax is in single precision
        again.set_attn_implementation('eager')
        assert {c._attn_implementation for c in held} == {'eager'}
    assert net.config._attn_implementation == 'eager'
    small.set_attn_implementation('sdpa')
    other = x['input_ids'].clone()
    other[:, -1] = 2 + (other[:, -1] + 7) % 40
    a, b = (run(small, y).logits[:, :-1] for y in (x | dict(input_ids=other), x))
    assert gap(a, b) < 1e-9  # it looks at no later token


def test_weights_alone_hand_nothing_from_head_to_head():
    net, x = made('vit')
    keep = {'vit.layers.0.attention.v_proj': list(range(2 * D))}
    keep = (
        keep if 'vit.layers.0.attention.v_proj' in dict(net.named_modules()) else first_half(net, x)
    )
    a, b = (restore(net, x, keep=keep, restorer=f) for f in (lbyl(), prune_only()))
    assert gap(run(a.model, x), run(b.model, x)) == 0
    row = a.report[a.report.kept < a.report.channels].iloc[-1]
    assert row.activation == 'attention' and row.re_after == row.re_before


def test_plans_that_heads_forbid():
    net, x = made('llama')
    layer = 'model.layers.0.self_attn'
    for name, kept, says in (
        ('q_proj', range(4), 'together'),  # half a head of queries and their rotated halves
        ('q_proj', range(D // 2), 'together'),  # one of two heads that share keys and values
        ('v_proj', range(D - 1), 'together|no channel'),
        ('v_proj', (), 'no channel'),
    ):
        with pytest.raises(ValueError, match=f'keep: {layer}.{name}.*({says})'):
            restore(net, x, keep={f'{layer}.{name}': list(kept)})
    with pytest.raises(ValueError, match='ratio must be a number in'):
        restore(net, x, ratio=1.0)


def test_criteria_that_look_at_consumers_and_budgets(tmp_path):
    net, x = made('gpt2')
    for criterion in (least_lost(calibration(x)), output_loss(calibration(x))):
        r = restore(net, x, ratio=0.5, criterion=criterion, restorer=prune_only())
        assert rows(r.model) == {k: n // 2 for k, n in rows(net).items()}
    for how in (dict(macs=0.7), dict(params=0.8)):
        r = restore(net, x, **how, criterion=least_lost(calibration(x)), restorer=prune_only())
        assert run(r.model, x)[0].shape == run(net, x)[0].shape
    save_restored(r.model, r.plan, tmp_path / 'small')
    again = load_restored(made('gpt2')[0], x, tmp_path / 'small')
    assert gap(run(again, x), run(r.model, x)) == 0 and said(again) == said(r.model)


def test_less_is_lost_of_the_output_when_a_twin_goes():
    "The criterion that looks at consumers takes heads that others can stand in for."
    net, x = made('bert')
    repeat_heads(net)
    criterion = least_lost(calibration(x), ridge=1e-6)
    r = restore(net, x, ratio=0.5, criterion=criterion, restorer=EXACT['probe'](x))
    kept = r.plan['bert.encoder.layer.0.attention.self.value']
    assert {k // D % (HEADS // 2) for k in kept} == set(range(HEADS // 2))


@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('need_weights', [False, True])
def test_own_attention_with_one_head_less(batch_first, need_weights):
    "Against PyTorch's, with the columns that read the head at zero; masks, and weights."

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.o = nn.Linear(6, 12), nn.Linear(12, 3)
            self.a = nn.MultiheadAttention(12, 3, batch_first=batch_first)

        def forward(self, x, causal):
            z = self.i(x)
            y = self.a(z, z, z, attn_mask=causal, need_weights=need_weights)[0]
            return self.o(torch.cat([y, z.tanh()], -1)[..., :12])

    torch.manual_seed(0)
    net, x = Net().double().eval(), torch.randn(8, 8, 6).double()
    args = x, torch.ones(8, 8).triu(1).bool()
    keep = {'a.v_proj': [*range(4), *range(8, 12)]}
    small = restore(net, args, keep=keep, restorer=prune_only())
    silent = copy.deepcopy(net)
    silent.a.out_proj.weight.data[:, 4:8] = 0
    with torch.no_grad():
        assert gap(small.model(*args), silent(*args)) < 1e-12
        assert gap(small.model.train().eval()(*args), silent(*args)) < 1e-12
    assert type(small.model.a) is HeadsLeft and small.model.a.num_heads == 2
    assert small.model.a.in_proj_weight.shape == (24, 12)


@pytest.mark.parametrize('made', EXACT.values(), ids=EXACT)
@pytest.mark.parametrize('more', [{}, dict(kdim=12, vdim=12)], ids=['together', 'apart'])
def test_own_attention_without_biases_takes_no_constants(made, more):
    "What is always one goes without loss if it stays once more: no constant can say it."

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.j, self.o = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 3)
            self.a = nn.MultiheadAttention(12, 3, bias=False, batch_first=True, **more)

        def forward(self, x):
            y = self.j(x).relu()
            return self.o(self.a(self.i(x).relu(), y, y, need_weights=False)[0])

    torch.manual_seed(0)
    net, x = randomised(Net()), torch.randn(32, 5, 6).double()
    with torch.no_grad():
        for layer in (net.i, net.j):
            layer.weight[10:], layer.bias[10:] = 0, 1
    r = restore(net, x, keep=dict.fromkeys('ij', list(range(11))), restorer=made(x))
    assert r.model.i.out_features == r.model.j.out_features == 11
    with torch.no_grad():
        assert gap(r.model(x), net(x)) < 1e-5
    assert r.model.a.in_proj_bias is None
    assert sum(p.numel() for p in r.model.parameters()) == r.cost.params['after']


class Attending(nn.Module):
    "Layers, attentions of PyTorch among them, beside hidden units."

    def __init__(self, first, second=None):
        super().__init__()
        self.i, self.u, self.d = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.first, self.second, self.o = first, second or first, nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.i(x)
        for m in (self.first, self.second):
            own = isinstance(m, nn.MultiheadAttention)
            x = x + (m(x, x, x, need_weights=False)[0] if own else m(x).tanh())
        return self.o(x + self.d(self.u(x).relu()))


def test_whole_attentions_of_pytorch_come_back():
    "Its own way to compute them in one step gives the same, so hidden units beside them may go."
    torch.manual_seed(0)
    own = [nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2)]
    net, x = randomised(Attending(*own)), torch.randn(8, 5, 6).double()
    r = restore(net, x, ratio={'u': 0.5}, restorer=prune_only())
    silent = copy.deepcopy(net)
    silent.d.weight.data[:, [i for i in range(40) if i not in r.plan['u']]] = 0
    assert type(r.model.first) is type(r.model.second) is nn.MultiheadAttention
    with torch.no_grad():
        assert gap(r.model(x), silent(x)) < 1e-12


def conv1d():
    tf = pytest.importorskip('transformers.pytorch_utils')
    return tf.Conv1D(WIDTH, WIDTH)


TWICE = dict(
    attention=lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
    conv1d=conv1d,
    inside=lambda: nn.Sequential(conv1d()),
)


@pytest.mark.parametrize('kind', TWICE)
def test_layers_of_other_kinds_with_two_names_keep_both(kind, tmp_path):
    "One layer, called under two names, is one layer afterwards."
    torch.manual_seed(0)
    net, x = randomised(Attending(TWICE[kind]())), torch.randn(8, 5, 6).double()
    r = restore(net, x, ratio={'u': 0.5}, restorer=prune_only())
    silent = copy.deepcopy(net)
    silent.d.weight.data[:, [i for i in range(40) if i not in r.plan['u']]] = 0
    save_restored(r.model, r.plan, tmp_path / 'small')
    for small in (r.model, load_restored(net, x, tmp_path / 'small')):
        assert small.first is small.second and type(small.first) is type(net.first)
        assert sum(p.numel() for p in small.parameters()) == r.cost.params['after']
        with torch.no_grad():
            assert gap(small(x), silent(x)) < 1e-12


def test_a_second_name_of_an_attention_is_that_of_the_smaller_one():
    torch.manual_seed(0)
    own = [nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2)]
    net, x = randomised(Attending(*own)), torch.randn(8, 5, 6).double()
    net.other = nn.ModuleList(own)
    r = restore(net, x, keep={'first.v_proj': list(range(D))}, restorer=prune_only())
    assert r.model.other[0] is r.model.first and r.model.other[1] is r.model.second
    assert (type(r.model.first), r.model.first.num_heads) == (HeadsLeft, 1)
    with torch.no_grad():
        assert gap(r.model(x), unheard(net, r.plan)(x)) < 1e-12


class Nesting(nn.Module):
    "An encoder that packs padded inputs, as PyTorch's do by default; or one with a decoder."

    def __init__(self, decoder=False):
        super().__init__()
        self.first, self.last = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)
        how = dict(dim_feedforward=40, batch_first=True)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, **how)
        whole = nn.Transformer(WIDTH, HEADS, 2, 2, **how)
        self.inner = whole if decoder else nn.TransformerEncoder(layer, 2)

    def forward(self, x, mask=None):
        masks, z = dict(src_key_padding_mask=mask), self.first(x)
        if isinstance(self.inner, nn.Transformer):
            return self.last(self.inner(z, z[:, :3], memory_key_padding_mask=mask, **masks))
        return self.last(self.inner(z, **masks))


def unheard(net, plan):
    "A copy that does not listen to what a plan of heads and hidden units removes."
    silent = copy.deepcopy(net)
    for name, kept in plan.items():
        owner, _, layer = name.rpartition('.')
        if layer in ('v_proj', 'linear1'):
            reader = 'out_proj' if layer == 'v_proj' else 'linear2'
            W = silent.get_submodule(f'{owner}.{reader}').weight.data
            W[:, [i for i in range(W.shape[1]) if i not in kept]] = 0
    return silent


@pytest.mark.parametrize('decoder', [False, True])
@pytest.mark.parametrize('masked', [False, True])
def test_encoders_that_nest_run_with_masks(decoder, masked, tmp_path):
    "With fewer heads they give what the dense one gives for each sample alone, without padding."
    torch.manual_seed(0)
    net, x = randomised(Nesting(decoder)), torch.randn(8, 7, 6).double()
    lengths = torch.arange(8) % 5 + 3
    mask = torch.arange(7) >= lengths[:, None]
    args = (x, mask) if masked else x
    r = restore(net, args, ratio=0.5, restorer=prune_only())
    assert sum(type(m) is HeadsLeft for m in r.model.modules()) == (6 if decoder else 2)
    save_restored(r.model, r.plan, tmp_path / 'small')
    again, silent = load_restored(net, args, tmp_path / 'small'), unheard(net, r.plan)
    with torch.no_grad():
        for small in (r.model, again):
            for y, sample, n in zip(small(x, mask), x, lengths):
                assert gap(y[:n], silent(sample[None, :n])[0]) < 1e-10
    encoder = net.inner.encoder if decoder else net.inner
    assert encoder.use_nested_tensor


def test_encoders_with_all_heads_nest_as_before(tmp_path):
    "What they give at padded positions is zero then, before the last layer."
    torch.manual_seed(0)
    net, x = randomised(Nesting()), torch.randn(8, 7, 6).double()
    args = x, torch.arange(7) >= torch.arange(8)[:, None] % 5 + 3
    ratio = {f'inner.layers.{i}.linear1': 0.5 for i in range(2)}
    r = restore(net, args, ratio=ratio, restorer=prune_only())
    assert r.model.inner.layers[1].linear1.out_features == 20
    save_restored(r.model, r.plan, tmp_path / 'small')
    with torch.no_grad():
        for small in (r.model, load_restored(net, args, tmp_path / 'small')):
            y = small(*args)
            assert gap(y, unheard(net, r.plan)(*args)) < 1e-10
            assert torch.equal(y[args[1]], net.last.bias.expand_as(y[args[1]]))


def test_what_cannot_be_followed_is_left_alone():
    "A width in the code, weights of all heads in the output, a single head of keys."

    class Net(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 2 if kind == 'shared' else 8)
            self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 3)
            self.u, self.d = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            q, k, v = (
                f(x).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            w = (q @ k.mT).softmax(-1)
            y = (w @ v).transpose(1, 2)
            y = y.reshape(len(x), -1, 8) if self.kind == 'width' else y.flatten(2)
            out = self.d(self.u(self.o(y)).relu())
            return (out, w) if self.kind == 'weights' else out

    x = torch.randn(4, 5, 8)
    reasons = dict(
        width='does not run without its channels',
        weights="its channels are the network's output",
        shared='its channels go through a product of matrices',
    )
    for kind, why in reasons.items():
        r = restore(Net(kind), x, ratio=0.5, restorer=prune_only())
        assert why in r.report.set_index('layer').left_alone['q'], kind
        assert r.model.q.out_features == 8 and r.model.u.out_features == 3


class Written(nn.Module):
    "Four heads of width four between two layers; a function says how attention is written."

    def __init__(self, f, **more):
        super().__init__()
        self.f, self.heads = f, 4
        self.i, self.q, self.k, self.v = (nn.Linear(n, 16) for n in (6, 16, 16, 16))
        self.o, self.u, self.d = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        for k, m in more.items():
            setattr(self, k, m)

    def parts(self, z):
        return (f(z).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))

    def forward(self, x):
        z = self.i(x)
        return self.d(self.u(z + self.o(self.f(self, z))).relu())


def side_by_side(y):
    return y.transpose(1, 2).flatten(2)


def by_einsum(s, z):
    q, k, v = (f(z).view(*z.shape[:2], s.heads, -1) for f in (s.q, s.k, s.v))
    w = torch.einsum('bqhd,bkhd->bhqk', q, k).softmax(-1)
    return torch.einsum('bhqk,bkhd->bqhd', w, v).reshape(*z.shape[:2], -1)


def by_bmm(s, z):
    b, t, _ = z.shape
    q, k, v = (x.reshape(b * s.heads, t, -1) for x in s.parts(z))
    y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return y.view(b, s.heads, t, -1).transpose(1, 2).reshape(b, t, -1)


def by_baddbmm(s, z):
    b, t, _ = z.shape
    q, k, v = (x.reshape(b * s.heads, t, -1) for x in s.parts(z))
    w = torch.baddbmm(torch.zeros(1, 1, 1).to(z), q, k.mT).softmax(-1)
    return (w @ v).view(b, s.heads, t, -1).transpose(1, 2).reshape(b, t, -1)


def without_scores(s, z):
    q, k, v = s.parts(z)
    return side_by_side(q.softmax(-1) @ (k.softmax(-2).mT @ v))


def of_channels(s, z):
    q, k, v = s.parts(z)
    w = F.normalize(q, dim=-2).mT @ F.normalize(k, dim=-2)
    return side_by_side((w.softmax(-1) @ v.mT).mT)


def by_cosines(s, z):
    q, k, v = s.parts(z)
    w = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * s.factor
    return side_by_side(w.softmax(-1) @ v)


def gated(s, z):
    q, k, v = s.parts(z)
    return side_by_side((q @ k.mT).softmax(-1) @ v) * s.gate(z).sigmoid()


def with_slopes(s, z):
    q, k, v = s.parts(z)
    slope = 2.0 ** -torch.arange(1, s.heads + 1).to(z)[:, None, None]
    return side_by_side((q @ k.mT + slope * torch.arange(z.shape[1])).softmax(-1) @ v)


def with_sinks(s, z):
    q, k, v = s.parts(z)
    sink = s.sink.expand(len(z), -1, z.shape[1], 1)
    w = torch.cat([q @ k.mT, sink], -1).softmax(-1)[..., :-1]
    return side_by_side(w @ v)


def distances(n):
    return (torch.arange(n)[:, None] - torch.arange(n)).abs()


def with_rows(s, z):
    q, k, v = s.parts(z)
    w = q @ k.mT + s.table[:, distances(z.shape[1])]
    return side_by_side(w.softmax(-1) @ v)


def with_rows_as_mask(s, z):
    table = torch.index_select(s.table, -1, distances(z.shape[1]).flatten())
    mask = table.view(-1, z.shape[1], z.shape[1])
    return side_by_side(F.scaled_dot_product_attention(*s.parts(z), attn_mask=mask))


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


WRITTEN = dict(
    einsum=(by_einsum, dict),
    bmm=(by_bmm, dict),
    baddbmm=(by_baddbmm, dict),
    without_scores=(without_scores, dict),
    of_channels=(of_channels, dict),
    cosines=(by_cosines, lambda: dict(factor=parameter(4, 1, 1))),
    gated=(gated, lambda: dict(gate=nn.Linear(16, 16))),
    sinks=(with_sinks, lambda: dict(sink=parameter(4, 1, 1))),
    rows=(with_rows, lambda: dict(table=parameter(4, 7))),  # more than the example looks up
    rows_as_mask=(with_rows_as_mask, lambda: dict(table=parameter(4, 7))),
)


@pytest.mark.parametrize('kind', WRITTEN)
def test_ways_to_write_attention(kind):
    "Without two of four heads it is what the dense one is that does not listen to them."
    torch.manual_seed(0)
    f, more = WRITTEN[kind]
    net, x = Written(f, **more()).double().eval(), torch.randn(8, 5, 6).double()
    net.all_head_size = 16
    r = restore(net, x, ratio={'v': 0.5}, restorer=prune_only())
    kept = r.plan['v']
    assert len(kept) == 8 and {k // 4 * 4 + i for k in kept for i in range(4)} == set(kept)
    silent = copy.deepcopy(net)
    silent.o.weight.data[:, [i for i in range(16) if i not in kept]] = 0
    with torch.no_grad():
        assert gap(r.model(x), silent(x)) < 1e-12
    sizes = {k: getattr(r.model, k).out_features for k in 'qkv'}
    assert sizes == dict(q=8, k=8, v=8) and r.model.o.in_features == 8
    assert 'bmm' not in kind or r.model.all_head_size == 8


@pytest.mark.parametrize('f', [with_rows, with_rows_as_mask])
def test_tables_with_a_row_for_each_head(f):
    "Twins go without loss, and take their rows of the table with them."
    torch.manual_seed(0)
    net, x = Written(f, table=parameter(4, 7)).double().eval(), torch.randn(16, 5, 6).double()
    with torch.no_grad():
        for p in (net.q.weight, net.q.bias, net.k.weight, net.k.bias, net.v.weight, net.v.bias):
            p[8:] = p[:8]
        net.table[2:] = net.table[:2]
    keep = dict(v=[*range(4), *range(12, 16)])
    for made in EXACT.values():
        small = restore(net, x, keep=keep, restorer=made(x)).model
        assert torch.equal(small.table, net.table[[0, 3]]) and small.q.out_features == 8
        with torch.no_grad():
            assert gap(small(x), net(x)) < 1e-5
    small = restore(net, x, ratio={'v': 0.75}, restorer=prune_only()).model
    assert small.table.shape == (1, 7) and small(x).isfinite().all()


def test_columns_in_another_order_are_channels():
    "An index that takes every column once looks up nothing."

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.o = nn.Linear(6, 8), nn.Linear(8, 3)
            self.places = parameter(5, 8)

        def forward(self, x):
            return self.o((self.i(x) + self.places[:, [1, 0, 3, 2, 5, 4, 7, 6]]).relu())

    torch.manual_seed(0)
    net, x = Net().double().eval(), torch.randn(16, 5, 6).double()
    assert {g.name: (g.units, g.reason) for g in find_groups(trace(net, x))}['i'] == (8, '')


def levit():
    sizes = dict(embed_dim=(16, 24), key_dim=4, depth=(1, 1), num_heads=(2, 4), attn_ratio=2)
    return dict(model_name='levit_128s', img_size=32, **sizes)


def tiny_vit():
    sizes = dict(embed_dims=(8, 16, 32, 32), depths=(1,) * 4, num_heads=(1, 2, 4, 4))
    return dict(model_name='tiny_vit_5m_224', window_sizes=(2,) * 4, **sizes)


def randomised(net):
    "In double precision, with weights that matter."
    for p in net.parameters():
        nn.init.normal_(p, std=2 / p[0].numel() ** 0.5 if p.ndim > 1 else 1.0)
    return net.double().eval()


@pytest.mark.parametrize('made', [levit, tiny_vit])
def test_networks_of_timm_lose_heads_with_their_rows(made):
    "What nobody reads goes, before the network ran and after it."
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    net = randomised(timm.create_model(**made(), num_classes=5))
    x = dict(x=pictures(2, side=32))
    attentions = {k: m for k, m in net.named_modules() if hasattr(m, 'attention_biases')}
    for m in attentions.values():
        last = next(f for f in m.proj.modules() if isinstance(f, nn.Linear))
        last.weight.data[:, last.in_features // 2 :] = 0
    keep = first_half(net, x)
    dense = run(net, x)
    assert first_half(net, x) == keep
    small = restore(net, x, keep=keep, restorer=prune_only()).model
    for k, m in attentions.items():
        left = small.get_submodule(k)
        assert torch.equal(left.attention_biases, m.attention_biases.chunk(2)[0])
        assert left.num_heads == m.num_heads // 2
    assert gap(run(small, x), dense) < 1e-12


def test_tables_that_a_network_keeps_are_no_obstacle():
    "The same plans, and the same networks, before and after a run in evaluation mode."
    sizes = dict(hidden_sizes=[16, 24, 32], num_attention_heads=[2, 4, 4], key_dim=[4] * 3)
    sizes |= dict(depths=[1] * 3, attention_ratio=[2] * 3, mlp_ratio=[2] * 3, drop_path_rate=0)
    torch.manual_seed(0)
    net = randomised(own(('Levit', 'ForImageClassification'), 'eager', image_size=64, **sizes))
    x = dict(pixel_values=pictures(2, side=64))
    keep = first_half(net, x)
    small = restore(net, x, keep=keep, restorer=prune_only()).model
    before = find_groups(trace(net, x))
    net(**x)
    after = find_groups(trace(net, x))
    assert [(g.name, g.reason) for g in after] == [(g.name, g.reason) for g in before]
    again = restore(net, x, keep=keep, restorer=prune_only()).model
    assert gap(run(again, x), run(small, x)) == 0
    tables = [(p, again.get_parameter(k)) for k, p in net.named_parameters() if 'attention_b' in k]
    assert tables and all(len(q) == len(p) // 2 for p, q in tables)


def test_slopes_that_the_number_of_heads_makes_are_not_those_of_other_heads():
    torch.manual_seed(0)
    net, x = Written(with_slopes).double().eval(), torch.randn(8, 5, 6).double()
    first = restore(net, x, keep=dict(v=[*range(8)]), restorer=prune_only()).model
    silent = copy.deepcopy(net)
    silent.o.weight.data[:, 8:] = 0
    with torch.no_grad():
        assert gap(first(x), silent(x)) < 1e-12 and first.heads == 2
    with pytest.raises(ValueError, match='keep: v cannot be pruned: o computes something else'):
        restore(net, x, keep=dict(v=[*range(8, 16)]), restorer=prune_only())


def test_heads_of_more_than_one_attention_that_mix():
    "Scores that a layer mixes: heads of queries go by themselves, those of values likewise."

    def mixed(s, z):
        q, k, v = s.parts(z)
        w = s.mix((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return side_by_side(w.softmax(-1) @ v)

    torch.manual_seed(0)
    net = Written(mixed, mix=nn.Linear(4, 4)).double().eval()
    x = torch.randn(8, 5, 6).double()
    r = restore(net, x, ratio={'v': 0.25, 'k': 0.5}, restorer=prune_only())
    assert (r.model.mix.out_features, r.model.mix.in_features) == (3, 2)
    assert [getattr(r.model, k).out_features for k in 'qkv'] == [8, 8, 12]
    silent = copy.deepcopy(net)
    lost = [i for i in range(4) if 4 * i not in r.plan['k']]
    silent.mix.weight.data[:, lost] = 0
    silent.o.weight.data[:, [i for i in range(16) if i not in r.plan['v']]] = 0
    with torch.no_grad():
        assert gap(r.model(x), silent(x)) < 1e-12


def test_a_cache_of_keys_and_values_is_no_output():
    net, x = made('llama')
    x = dict(input_ids=x['input_ids'])
    small = restore(net, x, ratio=0.5, restorer=prune_only()).model
    assert rows(small) == {k: n // 2 for k, n in rows(net).items()}
    how = dict(max_new_tokens=4, do_sample=False)
    some = [small.generate(x['input_ids'][:2], use_cache=c, **how) for c in (True, False)]
    assert torch.equal(*some)


def test_half_precision_and_training_mode():
    net, x = made('gpt2')
    net = net.bfloat16().train()
    r = restore(net, x, ratio=0.5, restorer=prune_only())
    assert r.model.training and {p.dtype for p in r.model.parameters()} == {torch.bfloat16}
    assert rows(r.model) == {k: n // 2 for k, n in rows(net).items()}
    assert run(r.model, x)[0].isfinite().all()


@pytest.mark.parametrize('kind', ['gpt2', 'encoder', 'mixtral'])
def test_nothing_is_shared_with_the_network_that_was_given(kind):
    "Not a hook, not a module, not a number, also of layers that come back in their own classes."
    net, x = made(kind)
    small = restore(net, x, ratio=0.5, restorer=prune_only()).model
    for m in small.modules():
        m.register_forward_hook(lambda *_: None)
    assert not any(m._forward_hooks for m in net.modules())
    assert not {id(m) for m in small.modules()} & {id(m) for m in net.modules()}
    kept = {v.data_ptr() for v in net.state_dict().values() if v.numel()}
    assert not {v.data_ptr() for v in small.state_dict().values() if v.numel()} & kept


@pytest.mark.parametrize('kept', [22, 24])
def test_experts_of_any_width_run(kept):
    "Products of all experts at once want, in single precision, a multiple of four units."
    net, x = made('mixtral')
    net = net.float()
    net.config._experts_implementation = 'grouped_mm'
    keep = plan(net, x, 1 - kept / 40, ignore=['*self_attn*'])
    small = restore(net, x, keep=keep, restorer=prune_only(), new_biases=False).model
    silent = copy.deepcopy(net)
    for name, units in keep.items():
        layer, expert = (int(v) for v in name.split('.') if v.isdigit())
        gone = [k for k in range(40) if k not in units]
        assert len(units) == kept
        silent.model.layers[layer].mlp.experts.down_proj.data[expert][:, gone] = 0
    assert small.model.layers[1].mlp.experts.down_proj.shape[-1] == 24
    assert small.config.intermediate_size == 24
    assert gap(run(small, x), run(silent, x)) < 1e-5 < gap(run(net, x), run(silent, x))


@pytest.mark.parametrize('kind', FAMILIES)
def test_half_precision_is_seen_as_single_is(kind):
    net, x = made(kind)
    real = lambda v: isinstance(v, torch.Tensor) and v.is_floating_point()
    x = {k: v.bfloat16().float() if real(v) else v for k, v in x.items()}
    half = net.bfloat16()
    assert told(half, x) == told(copy.deepcopy(half).float(), x)


@pytest.mark.parametrize('kind', ['segformer', 'dit'])
def test_frozen_networks_are_seen_as_others_are(kind):
    "PyTorch multiplies by weights that need no gradient in another way."
    net, x = made(kind)
    seen = told(net, x)
    assert told(net.requires_grad_(False), x) == seen
    r = restore(net, x, ratio=0.5, restorer=prune_only())
    assert not any(p.requires_grad for p in r.model.parameters())


class Slopes(nn.Module):
    "Attention with a slope for each head (ALiBi), made of the number of heads that it has."

    def __init__(self, fused):
        super().__init__()
        self.fused, self.heads = fused, 4
        self.i, self.q, self.k, self.v = (nn.Linear(n, 16) for n in (6, 16, 16, 16))
        self.o, self.last = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        z = self.i(x)
        split = lambda v: v.unflatten(-1, (self.heads, 4)).transpose(1, 2)
        q, k, v = split(self.q(z)), split(self.k(z)), split(self.v(z))
        slopes = 2.0 ** -torch.arange(1, self.heads + 1)[:, None, None]
        bias = slopes * torch.arange(z.shape[1])
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, bias[None].to(z))
        else:
            y = (q @ k.mT / 2 + bias).softmax(-1) @ v
        return self.last(z + self.o(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize('fused', [False, True])
def test_the_comparison_sees_through_attention(fused):
    "With two heads less the others would get other slopes, however attention is computed."
    torch.manual_seed(0)
    net, x = Slopes(fused).eval(), torch.randn(8, 9, 6)
    for p in net.parameters():
        p.data.normal_(std=0.5)
    with pytest.raises(ValueError, match='v cannot be pruned: o computes something else'):
        restore(net, x, keep=dict(v=[*range(8, 16)]), restorer=prune_only())


class Distances(nn.Module):
    "Attention with a bias for each head and pair of places, sliced to the length of the input."

    def __init__(self):
        super().__init__()
        self.i, self.qkv, self.o = nn.Linear(6, 32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.u, self.d = nn.Linear(32, 16), nn.Linear(16, 3)
        self.table = nn.Parameter(torch.randn(4, 20, 20))

    def forward(self, x):
        z, t = self.i(x), x.shape[1]
        q, k, v = self.qkv(z).unflatten(-1, (3, -1, 8)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 8**0.5 + self.table[:, :t, :t]).softmax(-1)
        return self.d(self.u(z + self.o((weights @ v).transpose(1, 2).flatten(2))).relu())


@pytest.mark.parametrize('length', [7, 20])
def test_tables_of_which_the_example_uses_a_part(length):
    "Their heads stay, with the reason; all else goes, and what is left is right at full length."
    torch.manual_seed(0)
    net, x = Distances().double().eval(), torch.randn(8, length, 6).double()
    r = restore(net, x, ratio=0.5, restorer=prune_only())
    why = r.report.left_alone[r.report.left_alone.str.contains('only a part of table')]
    assert bool(len(why)) == (length == 7)
    assert r.model.table.shape == ((4, 20, 20) if length == 7 else (2, 20, 20))
    silent, whole = copy.deepcopy(net), torch.randn(8, 20, 6).double()
    silent.d.weight.data[:, [i for i in range(16) if i not in r.plan['u']]] = 0
    if length == 20:
        heads = {i // 8 for i in r.plan['qkv[64:96]']}
        silent.o.weight.data[:, [i for i in range(32) if i // 8 not in heads]] = 0
    with torch.no_grad():
        torch.testing.assert_close(r.model(whole), silent(whole))
