"""Networks that are not what one hopes for.

Each is pruned as far as it can be, with a reason for the rest, or refused with an error that says
what is wrong.
"""

import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lbyl_nb.graph import find_groups
from lbyl_nb.layerwise import layerwise, probe
from lbyl_nb.probes import calibration, noise
from lbyl_nb.pruned_elsewhere import restore_inside
from lbyl_nb.recover import lbyl_restore, plan, restore
from lbyl_nb.restorers import lbyl, prune_only
from lbyl_nb.saved import load_restored, save_restored
from lbyl_nb.trace import trace

RESTORERS = dict(lbyl=lbyl(), probe=probe(noise(8)), layerwise=layerwise(noise(8)))
each_restorer = pytest.mark.parametrize('restorer', RESTORERS.values(), ids=RESTORERS.keys())
rows = torch.rand(4, 6)
image = torch.randn(2, 3, 8, 8)
sequence = torch.randn(4, 5, 6)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Net(nn.Module):
    "Layers as attributes, and a function of the network and its input."

    def __init__(self, f, **layers):
        super().__init__()
        self.f = f
        for k, v in layers.items():
            self.add_module(k, v)

    def forward(self, x):
        return self.f(self, x)


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 3, 1),
    )


def linear():
    return nn.Linear(8, 8)


def chain(middle=linear):
    front = [nn.Linear(6, 8), nn.ReLU(), middle(), nn.ReLU()]
    return nn.Sequential(*front, nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def reasons(r):
    return {g.layer: g.left_alone for g in r.report.itertuples() if g.left_alone}


# Outputs


def outputs(f):
    "Three layers; a function of both hidden outputs and of the last one is put out."

    def forward(n, x):
        h = n.a(x).relu()
        g = n.b(h).relu()
        return f(h, g, n.c(g))

    return Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))


@dataclass
class Pair:
    y: Tensor
    h: Tensor


def flat(v):
    "Tensors in an output, by hand."
    if isinstance(v, Tensor):
        return [v]
    if isinstance(v, Pair):
        v = [v.y, v.h]
    if isinstance(v, dict):
        v = list(v.values())
    if not isinstance(v, (tuple, list)):
        return []
    return [t for w in v for t in flat(w)]


STRUCTURES = dict(
    tuple=lambda h, g, y: (y, g),
    dict=lambda h, g, y: dict(y=y, h=h),
    nested=lambda h, g, y: dict(a=[y, (g,)]),
)
OTHERS = dict(
    dataclass=lambda h, g, y: Pair(y, h),
    none=lambda h, g, y: (y, None),
    number=lambda h, g, y: dict(y=y, n=3),
)


@each_restorer
@pytest.mark.parametrize('f', [*STRUCTURES.values(), *OTHERS.values()], ids=[*STRUCTURES, *OTHERS])
def test_outputs_of_any_structure(f, restorer):
    "Whatever is put out, at any depth, keeps its shape; hidden channels that are not can go."
    net = outputs(f)
    h = net.a(rows).relu()
    hidden = dict(a=h, b=net.b(h).relu())
    is_out = lambda h: any(t.shape == h.shape and torch.equal(t, h) for t in flat(net(rows)))
    out = {k for k, h in hidden.items() if is_out(h)}
    r = restore(net, rows, ratio=0.5, restorer=restorer)
    assert type(r.model(rows)) is type(net(rows))
    shapes = lambda net: [t.shape for t in flat(net(rows))]
    assert shapes(r.model) == shapes(net)
    assert r.plan.keys() == {'a', 'b'} - out
    said = reasons(r)
    assert all(said[k] == "its channels are the network's output" for k in out | {'c'})


# Control flow


def test_a_branch_that_is_not_taken():
    """What example inputs do not reach is left as it is, and a warning names it.

    Inputs that do reach it may find it too wide.
    """

    def forward(n, x):
        branch = n.p if x.sum() > 0 else n.n
        return n.o(branch(n.a(x).relu()).relu())

    net = Net(forward, a=nn.Linear(6, 8), p=linear(), n=linear(), o=nn.Linear(8, 3))
    with pytest.warns(UserWarning, match='not called on example_inputs.*: n$'):
        r = restore(net, rows, ratio=0.5)
    assert r.plan.keys() == {'a', 'p'}
    assert r.model(rows).shape == (4, 3)
    assert r.model.n.weight.shape == (8, 8)
    with pytest.raises(RuntimeError):
        r.model(-rows)
    says = 'p: not called when the probes pass'
    for restorer in (probe, layerwise):
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=says):
            restore(net, rows, ratio=0.5, restorer=restorer(calibration(-rows)))


@each_restorer
def test_a_branch_without_layers(restorer):
    "Either way the same layers are called, so either way the smaller network runs."

    def forward(n, x):
        h = n.a(x).relu()
        return n.o(h if x.sum() > 0 else h * 2)

    net = Net(forward, a=nn.Linear(6, 8), o=nn.Linear(8, 3))
    small = lbyl_restore(net, rows, ratio=0.5, restorer=restorer)
    assert small(rows).shape == small(-rows).shape == (4, 3)
    assert small.a.out_features == 4


# Inputs


class Detector(nn.Module):
    "Takes a list of images, as torchvision's detectors do."

    def __init__(self):
        super().__init__()
        self.body = cnn()

    def forward(self, images):
        return [y.mean((1, 2)) for y in self.body(torch.stack(images))]


def test_a_list_of_images():
    """Closed form: as any network.

    Probes: there is no batch to make them like, but there is one for the body.
    """
    net, images = Detector(), [torch.randn(3, 8, 8)] * 4
    assert len(lbyl_restore(net, (images,), ratio=0.5)(images)) == 4
    says = 'none of the arguments is a tensor of samples.*restore_inside'
    for restorer in (probe(noise(8)), layerwise(noise(8)), probe(calibration((images,)))):
        with pytest.raises(ValueError, match=says):
            restore(net, (images,), ratio=0.5, restorer=restorer)
    for restorer in RESTORERS.values():
        r = restore_inside(net, 'body', (images,), ratio=0.5, restorer=restorer)
        assert r.model.body[0].out_channels == 4


# Layers


def tied():
    "A network whose head has the weight of its embedding."

    def forward(n, i):
        z = n.e(i)
        return n.head(z + n.b(n.a(z).relu()))

    embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    net = Net(forward, e=embedding, a=nn.Linear(6, 8), b=nn.Linear(8, 6), head=head)
    net.head.weight = net.e.weight
    return net


@each_restorer
def test_a_head_tied_to_an_embedding(restorer, tmp_path):
    """The tie holds in the restored network and in what is read from its file.

    The layers in between are pruned.
    """
    net, words = tied(), torch.randint(11, (4, 5))
    r = restore(net, words, ratio=0.5, restorer=restorer)
    assert r.model.head.weight is r.model.e.weight is not net.e.weight
    assert r.plan.keys() == {'a'}
    assert reasons(r)['head'] == 'head shares a parameter with e'
    assert torch.equal(r.model.e.weight, net.e.weight)
    says = 'keep: head cannot be pruned: head shares a parameter with e'
    with pytest.raises(ValueError, match=says):
        lbyl_restore(net, words, keep=dict(head=[0, 1]))
    save_restored(r.model, r.plan, tmp_path / 'f.safetensors')
    loaded = load_restored(tied(), words, tmp_path / 'f.safetensors')
    assert loaded.head.weight is loaded.e.weight
    assert torch.equal(loaded(words), r.model(words))


@each_restorer
def test_layers_that_share_a_weight(restorer):
    net = nn.Sequential(
        nn.Linear(6, 6),
        nn.ReLU(),
        nn.Linear(6, 6),
        nn.ReLU(),
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    net[2].weight = net[0].weight
    r = restore(net, rows, ratio=0.5, restorer=restorer)
    assert r.model[2].weight is r.model[0].weight
    assert r.plan.keys() == {'4'}
    assert reasons(r)['2'] == '2 shares a parameter with 0'


NORMS = dict(
    weight_norm=parametrizations.weight_norm,
    spectral_norm=parametrizations.spectral_norm,
    orthogonal=parametrizations.orthogonal,
)


@each_restorer
@pytest.mark.parametrize('norm', NORMS)
def test_parametrized_layers(norm, restorer):
    "They and what they read are left alone, and stay parametrized; the rest is pruned."
    net = chain(lambda: NORMS[norm](nn.Linear(8, 8))).eval()
    r = restore(net, rows, ratio=0.5, restorer=restorer)
    assert r.plan.keys() == {'4'}
    assert parametrize.is_parametrized(r.model[2])
    assert torch.equal(r.model[2].weight, net[2].weight)
    assert all('2 is a ParametrizedLinear' in reasons(r)[k] for k in '02')
    with pytest.raises(ValueError, match='keep: 2 cannot be pruned: 2 is a ParametrizedLinear'):
        lbyl_restore(net, rows, keep={'2': [0]})


@pytest.mark.filterwarnings('ignore:The .grad attribute')
def test_a_parametrized_batch_norm():
    net = cnn()

    class Positive(nn.Module):
        def forward(self, x):
            return x.abs()

    parametrize.register_parametrization(net[1], 'weight', Positive())
    small = restore(net, image, keep={'0': [0, 2, 3]}, restorer=prune_only()).model
    assert parametrize.is_parametrized(small[1])
    assert torch.equal(small[1].weight, net[1].weight[[0, 2, 3]])


OLD = dict(
    weight_norm=nn.utils.weight_norm,
    spectral_norm=nn.utils.spectral_norm,
    masks=lambda layer: prune.l1_unstructured(layer, 'weight', 0.5),
)


@pytest.mark.filterwarnings('ignore:.*deprecated')
@pytest.mark.parametrize('norm', OLD)
def test_weights_that_a_hook_computes(norm):
    "Weight norm and spectral norm of old, and masks: what they make of a layer cannot be copied."
    with pytest.raises(ValueError, match='2.weight'):
        plan(chain(lambda: OLD[norm](nn.Linear(8, 8))), rows, 0.5)


@pytest.mark.filterwarnings('ignore')  # of torch, about the end of its quantization
def test_quantized_layers():
    net = torch.ao.quantization.quantize_dynamic(chain(), {nn.Linear})
    for call in (lbyl_restore, plan):
        with pytest.raises(ValueError, match='0._packed_params.*quantized weights are not handled'):
            call(net, rows, ratio=0.5)


def test_networks_without_values():
    with pytest.raises(ValueError, match='0.weight: is on the meta device'):
        plan(cnn().to('meta'), image.to('meta'), 0.5)
    with pytest.raises(ValueError, match='example_inputs'):
        plan(cnn(), image.to('meta'), 0.5)


def test_lazy_layers():
    with pytest.raises(ValueError, match='0.weight'):
        plan(nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1)), image, 0.5)


def test_a_plan_that_breaks_the_groups_of_a_convolution():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 3, 1)
    )
    said = 'keep: 0: channels that must be kept or removed together, as those of a grouped'
    with pytest.raises(ValueError, match=said):
        restore(net, image, keep={'0': [0, 1, 2]})
    assert restore(net, image, keep={'0': [0, 1, 4, 5]}).model[2].weight.shape == (8, 2, 1, 1)


@each_restorer
def test_channels_that_stand_in_groups(restorer):
    "Every group of the norm keeps equally many of them, and a plan that does not is refused."
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 3, 1),
    )
    r = restore(net, image, ratio=0.5, restorer=restorer)
    assert r.plan.keys() == {'0', '3'}
    assert [i // 2 for i in r.plan['0']] == [0, 1, 2, 3]
    assert r.model[1].num_channels == 4
    says = 'keep: 0: its channels are split in pieces, or normalised in groups'
    with pytest.raises(ValueError, match=says):
        lbyl_restore(net, image, keep={'0': [0, 1, 2]})


def own_attention(n, x):
    "Two heads of width four from one layer for queries, keys and values."
    z = n.i(x)
    q, k, v = n.qkv(z).view(*z.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
    z = z + n.p(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(z.shape))
    return n.o((z + n.d(n.u(z).relu())).mean(1))


def separate_attention(n, x):
    "The same from three layers, by the function that torch has for it."
    z = n.i(x)
    q, k, v = (f(z).view(*z.shape[:2], 2, 4).transpose(1, 2) for f in (n.q, n.k, n.v))
    z = z + n.p(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(z.shape))
    return n.o((z + n.d(n.u(z).relu())).mean(1))


def module_attention(n, x):
    z = n.i(x)
    z = z + n.p(z, z, z, need_weights=False)[0]
    return n.o((z + n.d(n.u(z).relu())).mean(1))


L = nn.Linear
ATTENTION = dict(
    own=(own_attention, dict(qkv=L(8, 24), p=L(8, 8)), 'qkv'),
    separate=(separate_attention, dict(q=L(8, 8), k=L(8, 8), v=L(8, 8), p=L(8, 8)), 'v'),
    module=(module_attention, dict(p=nn.MultiheadAttention(8, 2, batch_first=True)), 'p.v_proj'),
)


@each_restorer
@pytest.mark.parametrize('streams', [False, True])
@pytest.mark.parametrize('kind', ATTENTION)
def test_attention(kind, streams, restorer):
    """Heads go as a whole, where the code does not say how wide all of them are.

    A plan for some channels of a head is refused. What lies between attentions is pruned.
    """
    f, layers, name = ATTENTION[kind]
    net = Net(f, i=L(6, 8), **layers, u=L(8, 12), d=L(12, 8), o=L(8, 3))
    r = restore(net, sequence, ratio=0.5, streams=streams, restorer=restorer)
    assert r.plan.keys() >= {'u'}
    assert r.model(sequence).shape == (4, 3)
    assert r.model.u.out_features == 6
    with pytest.raises(ValueError, match=f'keep: {name}.*(together|no channel)'):
        lbyl_restore(net, sequence, keep={name: [0, 1, 2]})
    if kind == 'module':
        assert (r.model.p.num_heads, r.model.p.out_proj.in_features) == (1, 4)
        return
    assert all(name not in k for k in r.plan)
    values = [g for g in find_groups(trace(net, sequence)) if g.heads and name in g.name][-1]
    one_head = {values.name: list(range(4))}
    with pytest.raises(ValueError, match='cannot be pruned: the network does not run'):
        lbyl_restore(net, sequence, keep=one_head)


@each_restorer
@pytest.mark.parametrize('batch_first', [False, True])
@pytest.mark.parametrize('kind', [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind, batch_first, restorer):
    "They and what they read are left alone with a reason; what lies behind is pruned."

    def forward(n, x):
        states = n.r(n.i(x).relu())[0]
        return n.o(n.m(states.mean(1)).relu())

    recurrent = kind(8, 8, batch_first=batch_first)
    net = Net(forward, i=L(6, 8), r=recurrent, m=L(8, 8), o=L(8, 3))
    r = restore(net, sequence, ratio=0.5, restorer=restorer)
    assert r.plan.keys() == {'m'} and reasons(r)['i'].startswith('its channels go through')
    with pytest.raises(ValueError, match='keep: i cannot be pruned'):
        lbyl_restore(net, sequence, keep=dict(i=[0]))
    with pytest.raises(ValueError, match='nothing to prune'):
        plan(Net(lambda n, x: n.r(x)[0], r=kind(6, 8)), sequence, 0.5)


# Hooks


def forward_hooks(net, log):
    note = lambda what, t: log.append((what, t.shape[1]))
    net[0].register_forward_hook(lambda m, i, o: note('forward', o))
    net[3].register_forward_hook(lambda m, i, k, o: note('keywords', i[0]), with_kwargs=True)
    net[3].register_forward_pre_hook(lambda m, i: note('before', i[0]))
    net.register_forward_hook(lambda m, i, o: note('whole', o))


@each_restorer
def test_hooks_are_kept_and_fire(restorer):
    """They belong to the restored network too.

    On the way they see what passes the private copies, so they must stand other numbers of
    channels and samples.
    """
    net, log = cnn(), []
    forward_hooks(net, log)
    small = lbyl_restore(net, image, ratio=0.5, restorer=restorer)
    log.clear()
    small(image)
    assert log == [('forward', 4), ('before', 4), ('keywords', 4), ('whole', 3)]
    log.clear()
    net(image)
    assert log == [('forward', 8), ('before', 8), ('keywords', 8), ('whole', 3)]


@pytest.mark.filterwarnings('ignore:Using a non-full backward hook')
@pytest.mark.parametrize('full', [True, False])
def test_backward_hooks(full):
    "They are kept, fire, and do not hinder pruning."
    net, log = cnn(), []
    hook = lambda m, i, o: log.append(o[0].shape[1])
    register = net[3].register_full_backward_hook if full else net[3].register_backward_hook
    register(hook)
    r = restore(net, image, ratio=0.5)
    r.model(image).sum().backward()
    assert log == [3] and r.plan.keys() == {'0', '3'}


@pytest.mark.parametrize('restorer', [probe, layerwise])
def test_hooks_that_change_what_passes(restorer):
    """A hook that doubles an output does so in the restored network, once.

    What is solved for is what the layer gives to it.
    """
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 3, 1),
    ).double()
    x = torch.randn(64, 3, 8, 8).double()
    with torch.no_grad():
        net[0].weight[4:] = net[0].weight[:4]
        net[0].bias[4:] = net[0].bias[:4]
    net[4].register_forward_hook(lambda m, i, o: 2 * o)
    net[6].register_forward_pre_hook(lambda m, i: (i[0] - 1,))
    how = restorer(calibration(x), ridge=1e-9)
    small = lbyl_restore(net, x, keep={'0': [0, 1, 2, 3]}, restorer=how)
    assert small[0].out_channels == 4
    torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-5)


# State


@each_restorer
def test_frozen_parameters_and_modes(restorer):
    "Whatever is frozen or in training mode is so afterwards, layer by layer."
    net = cnn().train()
    net[0].weight.requires_grad_(False)
    net[1].eval()
    small = lbyl_restore(net, image, ratio=0.5, restorer=restorer)
    assert [k for k, p in small.named_parameters() if not p.requires_grad] == ['0.weight']
    modes = [True, False, True, True, True, True]
    assert [m.training for m in small] == [m.training for m in net] == modes


@each_restorer
def test_a_buffer_that_two_modules_share(restorer):
    forward = lambda n, x: n.b(n.a(x * n.a.scale).relu()) * n.scale
    net = Net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 3, 1))
    scale = torch.rand(1, 3, 1, 1)
    for m in (net, net.a):
        m.register_buffer('scale', scale)
    small = lbyl_restore(net, image, ratio=0.5, restorer=restorer)
    assert small.scale is small.a.scale is not net.scale
    assert torch.equal(small.scale, scale)


@each_restorer
def test_a_number_for_each_channel(restorer):
    """As a parameter or a buffer it is cut with the channels.

    As a plain attribute it cannot be, so they are left alone.
    """

    def net():
        forward = lambda n, x: n.c(n.b((n.a(x) * n.own).relu()).relu())
        layers = dict(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 6, 1), c=nn.Conv2d(6, 3, 1))
        return Net(forward, **layers)

    of_parameter, of_buffer, of_attribute = net(), net(), net()
    of_parameter.own = nn.Parameter(torch.rand(1, 8, 1, 1))
    of_buffer.register_buffer('own', torch.rand(1, 8, 1, 1))
    of_attribute.own = torch.rand(1, 8, 1, 1)
    for n in (of_parameter, of_buffer):
        r = restore(n, image, ratio=0.5, restorer=restorer)
        assert r.plan.keys() == {'a', 'b'}
        assert r.model.own.shape == (1, 4, 1, 1)
    r = restore(of_attribute, image, ratio=0.5, restorer=restorer)
    assert r.plan.keys() == {'b'}
    assert reasons(r)['a'] == 'its channels meet a tensor of a fixed size'


# Not a network of modules, or not one that can be followed


@pytest.mark.filterwarnings('ignore')  # of torch, about the end of TorchScript
def test_compiled_by_torchscript():
    "Inside a network such a layer is not one of ours, and its neighbours are left alone."
    script = torch.jit.script(nn.Conv2d(8, 8, 1))
    behind = [nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1)]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), script, *behind)
    r = restore(net, image, ratio=0.5)
    assert r.plan.keys() == {'3'}
    assert '0' in reasons(r)
    for net in (torch.jit.script(cnn()), torch.jit.trace(cnn().eval(), image)):
        with pytest.raises(ValueError, match='Module'):
            plan(net, image, 0.5)


@pytest.mark.filterwarnings('ignore')
def test_torchscript_is_named():
    with pytest.raises(ValueError, match='TorchScript'):
        plan(torch.jit.script(cnn()), image, 0.5)


def test_wrapped_networks():
    "Wrappers are networks: names in plans carry their prefix."
    r = restore(nn.DataParallel(cnn()), image, ratio=0.5)
    assert r.plan.keys() == {'module.0', 'module.3'} and r.model.module[0].out_channels == 4


def test_symbolic_traces():
    """Of torch.fx: networks of modules.

    Of torch.export: a graph of functions, with nothing in it that could be pruned.
    """
    net = cnn().eval()
    r = restore(torch.fx.symbolic_trace(net), image, ratio=0.5, restorer=prune_only())
    want = restore(net, image, ratio=0.5, restorer=prune_only())
    assert r.plan == want.plan and r.plan.keys() == {'0', '3'}
    assert isinstance(r.model, torch.fx.GraphModule)
    shapes = lambda m: {k: v.shape for k, v in m.state_dict().items()}
    assert shapes(r.model) == shapes(want.model) != shapes(net)
    torch.testing.assert_close(r.model(image), want.model(image))
    with pytest.raises(ValueError, match='it calls no convolution or linear layer'):
        plan(torch.export.export(cnn().eval(), (image,)).module(), image, 0.5)


def test_gradients_that_are_cut_off():
    "Where autograd is switched off in the network, or around it, makes no difference."

    def f(n, x):
        with torch.no_grad():
            h = n.b(n.a(x).relu())
        return n.d(n.c(h).relu())

    r = restore(Net(f, a=L(6, 8), b=L(8, 8), c=L(8, 8), d=L(8, 3)), rows, ratio=0.5)
    assert r.plan.keys() == {'a', 'b', 'c'}
    with torch.no_grad():
        assert plan(cnn(), image, 0.5).keys() == {'0', '3'}  # around it, that does not matter


def test_inference_mode_is_named():
    with torch.inference_mode(), pytest.raises(ValueError, match='inference_mode'):
        plan(cnn(), image, 0.5)


def test_networks_that_cannot_be_copied():
    net = cnn()
    net.lock = threading.Lock()
    with pytest.raises(ValueError, match='Sequential.* copied'):
        plan(net, image, 0.5)


@pytest.mark.filterwarnings('ignore:Casting complex')
def test_complex_weights():
    net = nn.Sequential(L(6, 8, dtype=torch.complex64), L(8, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match='0.weight'):
        plan(net, rows.to(torch.complex64), 0.5)


@pytest.mark.parametrize('model', [None, torch.relu, dict(a=1)])
def test_what_is_no_network(model):
    with pytest.raises(TypeError, match='model'):
        plan(model, image, 0.5)


def test_cost_of_arguments_by_keyword():
    net = Net(lambda n, x: n.b(n.a(x).relu()), a=L(6, 8), b=L(8, 3))
    assert restore(net, dict(x=rows), ratio=0.5).cost.equals(restore(net, rows, ratio=0.5).cost)


# Of another library


def transformers():
    return pytest.importorskip('transformers', reason='transformers is not installed')


def small_config(config, **sizes):
    return config(vocab_size=50, bos_token_id=0, eos_token_id=0, **sizes)


BERT = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
)
GPT2 = dict(n_embd=16, n_layer=1, n_head=2, n_positions=16)


@each_restorer
def test_bert(restorer):
    """Inputs by keyword, an output of a class of its own, attention, layer norms.

    Heads, the inner layers of the feed-forward blocks and the pooler are pruned.
    """
    hf = transformers()
    net = hf.BertForSequenceClassification(small_config(hf.BertConfig, **BERT)).eval()
    words = torch.randint(3, 50, (4, 6))
    inputs = dict(input_ids=words, attention_mask=torch.ones_like(words))
    r = restore(net, inputs, ratio=0.5, restorer=restorer)
    out = r.model(words)
    assert type(out) is type(net(words))
    assert out.logits.shape == (4, 2)
    block = 'bert.encoder.layer.0'
    inner = {f'{block}.attention.self.{k}' for k in ('query', 'key', 'value')}
    assert r.plan.keys() == inner | {f'{block}.intermediate.dense', 'bert.pooler.dense'}


def test_bert_with_a_tied_head():
    hf = transformers()
    net = hf.BertForMaskedLM(small_config(hf.BertConfig, **BERT)).eval()
    words = torch.randint(3, 50, (4, 6))
    r = restore(net, dict(input_ids=words), ratio=0.5)
    assert r.model.cls.predictions.decoder.weight is r.model.bert.embeddings.word_embeddings.weight
    assert 'shares a parameter' in reasons(r)['cls.predictions.decoder']
    block = 'bert.encoder.layer.0'
    inner = {f'{block}.attention.self.{k}' for k in ('query', 'key', 'value')}
    assert r.plan.keys() == inner | {f'{block}.intermediate.dense'}


@pytest.mark.parametrize('cache', [False, True])
def test_gpt2(cache):
    """Its layers are of a class of its own, which is that of a linear layer.

    A cache in its output is no obstacle.
    """
    hf = transformers()
    net = hf.GPT2LMHeadModel(small_config(hf.GPT2Config, **GPT2)).eval()
    words = torch.randint(3, 50, (4, 6))
    inputs = dict(input_ids=words, use_cache=cache)
    r = restore(net, inputs, ratio=0.5, restorer=prune_only())
    hidden = [k for k, m in net.named_modules() if k.endswith('mlp.c_fc')]
    assert {k: len(r.plan[k]) * 2 for k in hidden} == {k: net.get_submodule(k).nf for k in hidden}
    small, dense = r.model.get_submodule(hidden[0]), net.get_submodule(hidden[0])
    assert type(small) is type(dense)
    assert (small.nx, small.nf) == (dense.nx, dense.nf // 2) == tuple(small.weight.shape)
    assert torch.equal(small.weight, dense.weight[:, r.plan[hidden[0]]])
    assert r.model(**inputs).logits.shape == net(**inputs).logits.shape


class Named(nn.Module):
    "A network with a part of the name that adapters give to what they are put around."

    def __init__(self):
        super().__init__()
        self.base_layer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.head(self.base_layer(x).relu())


def test_a_base_layer_is_no_adapter():
    r = restore(Named().eval(), torch.randn(2, 3, 9, 9), ratio=0.5, restorer=prune_only())
    assert r.model.base_layer[0].out_channels == r.model.head.in_channels == 4
