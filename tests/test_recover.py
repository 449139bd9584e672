"Properties of restored networks over random small networks and plans, and bad input."

import copy
import gc

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from lbyl_nb import files
from lbyl_nb.cost import cost
from lbyl_nb.criteria import bn_scale, geometric_median, l1_norm, l2_norm, random_scores
from lbyl_nb.graph import find_groups
from lbyl_nb.layerwise import layerwise
from lbyl_nb.models import (
    digits_net,
    resnet20,
    resnet50_cifar,
    resnet56,
    vgg16_bn,
    with_projections,
)
from lbyl_nb.probes import noise
from lbyl_nb.recover import lbyl_restore, plan, restore
from lbyl_nb.restorers import gaussian, lbyl, merging, prune_only
from lbyl_nb.saved import load_restored, save_restored
from lbyl_nb.trace import trace

FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
RESTORERS = dict(
    prune_only=prune_only(),
    merging=merging(),
    gaussian=gaussian(),
    lbyl=lbyl(),
    no_ridge=lbyl(0, 0),
    plain=lbyl(0.1, 0.1, centred=False),
)


class Block(nn.Module):
    "Two convolutions around a residual addition, ReLU spelled as a function and in place."

    def __init__(self, width, inner):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.c2, self.b2 = nn.Conv2d(inner, width, 1), nn.BatchNorm2d(width)

    def forward(self, x):
        y = nn.functional.relu(self.b1(self.c1(x)), inplace=True)
        y = self.b2(self.c2(y))
        return nn.functional.relu(x + y)


@st.composite
def networks(draw):
    "A random network of a few layers, perhaps with batch norm, blocks and pooling; its input."
    width = draw(st.integers(2, 9))
    kernel, bias = draw(st.sampled_from([1, 3])), draw(st.booleans())
    layers = [nn.Conv2d(3, width, kernel, bias=bias)]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(['conv', 'block', 'plain']))
        if kind == 'block':
            layers += [nn.ReLU(), Block(width, draw(st.integers(2, 8)))]
            continue
        if kind == 'conv':
            layers.append(nn.BatchNorm2d(width, affine=draw(st.booleans())))
        layers.append(nn.ReLU(inplace=draw(st.booleans())))
        if draw(st.booleans()):
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        out, stride, bias = draw(st.integers(2, 9)), draw(st.integers(1, 2)), draw(st.booleans())
        layers.append(nn.Conv2d(width, out, 3, stride, padding=1, bias=bias))
        width = out
    hidden = draw(st.integers(2, 7))
    layers += [
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(4 * width, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 3),
    ]
    torch.manual_seed(draw(st.integers(0, 1000)))
    net = nn.Sequential(*layers)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return net.train(draw(st.booleans())), torch.randn(2, 3, 12, 12)


def out(net, x):
    "Output in evaluation mode, whatever mode the network is in."
    with torch.no_grad():
        return copy.deepcopy(net).eval()(x)


@FEW
@given(
    networks(),
    st.floats(0, 0.45),
    st.sampled_from(sorted(RESTORERS)),
    st.sampled_from([l1_norm, l2_norm, geometric_median, random_scores(3)]),
)
def test_any_network_and_ratio(case, ratio, name, criterion):
    """Same output shape, fewer parameters where anything was removed, finite.

    The model passed in is untouched bit for bit.
    """
    net, x = case
    before = copy.deepcopy(net.state_dict())
    r = restore(net, x, ratio=ratio, criterion=criterion, restorer=RESTORERS[name])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert out(r.model, x).shape == out(net, x).shape
    assert out(r.model, x).isfinite().all()
    shrunk = (r.report.kept < r.report.channels).any()
    assert (r.cost.params['after'] < r.cost.params['before']) == shrunk
    assert r.model.training == net.training and type(r.model) is type(net)


@FEW
@given(networks(), st.sampled_from(sorted(RESTORERS)))
def test_ratio_zero_changes_no_bit(case, name):
    net, x = case
    small = lbyl_restore(net, x, ratio=0, restorer=RESTORERS[name])
    assert torch.equal(out(small, x), out(net, x))


@FEW
@given(networks(), st.data())
def test_any_plan_equals_silence(case, data):
    "Pruning by any plan is the dense network whose consumers do not hear the removed channels."
    net, x = case
    groups = [g for g in find_groups(trace(net, x)) if not g.reason]
    keep = {}
    for g in groups:
        channels = st.integers(0, g.channels - 1)
        keep[g.name] = data.draw(st.lists(channels, min_size=1, unique=True))
    silent = copy.deepcopy(net)
    with torch.no_grad():
        for g in groups:
            gone = [j for j in range(g.channels) if j not in keep[g.name]]
            for c in g.consumers:
                silent.get_submodule(c.name).weight[:, c.columns[gone].flatten()] = 0
    small = lbyl_restore(net, x, keep=keep, restorer=prune_only())
    torch.testing.assert_close(out(small, x), out(silent, x), rtol=1e-4, atol=1e-4)


@FEW
@given(networks(), st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
def test_precision_is_kept(case, dtype):
    net, x = case
    cheap = layerwise(noise(8))
    small = lbyl_restore(net.to(dtype), x.to(dtype), ratio=0.4, restorer=cheap)
    assert all(v.dtype == dtype for v in small.state_dict().values() if v.is_floating_point())


@FEW
@given(networks(), st.floats(0, 0.45))
def test_files_round_trip(tmp_path_factory, case, ratio):
    net, x = case
    path = tmp_path_factory.mktemp('files') / 'small.safetensors'
    r = restore(net, x, ratio=ratio, restorer=layerwise(noise(8)))
    save_restored(r.model, r.plan, path)
    fresh = copy.deepcopy(net)
    for p in fresh.parameters():
        nn.init.zeros_(p)
    assert torch.equal(out(load_restored(fresh, x, path), x), out(r.model, x))


# what builds a network, the size of its images, how many groups are pruned at least
ARCHITECTURES = [
    (resnet20, 32, 9),
    (vgg16_bn, 32, 13),
    (resnet50_cifar, 32, 32),
    (digits_net, 8, 2),
    (torchvision.models.resnet50, 64, 32),
]


@pytest.mark.parametrize('build, size, least', ARCHITECTURES)
def test_architectures(build, size, least):
    "Every convolution inside blocks and chains is pruned; all that is left alone has a reason."
    net = build().eval()
    x = torch.randn(1, 1 if build is digits_net else 3, size, size)
    r = restore(net, x, ratio=0.3, restorer=lbyl())
    assert len(r.plan) >= least and r.cost.macs['after'] < r.cost.macs['before']
    assert ((r.report.kept < r.report.channels) | (r.report.left_alone != '')).all()
    assert r.model(x).shape == net(x).shape


def test_bottleneck_and_basic_block_scope():
    """Bottleneck conv1 and conv2, BasicBlock conv1; a VGG's last convolution by its flattening.

    The stem of a ResNet-50 as well: its first block has a projection, so no addition reads the
    stem's channels.
    """
    names = lambda net: set(plan(net.eval(), torch.zeros(1, 3, 64, 64), 0.5))
    blocks = [f'layer{i}.{j}' for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n)]
    first, second = ({f'{b}.{k}' for b in blocks} for k in ('conv1', 'conv2'))
    assert names(torchvision.models.resnet50()) == first | second | {'conv1'}
    assert names(torchvision.models.resnet34()) == first
    vgg = torchvision.models.vgg11_bn()
    layers = {k for k, m in vgg.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert names(vgg) == layers - {'classifier.6'}


def test_inputs_as_tuple_and_dict():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x, scale):
            return self.b(self.a(x).relu()) * scale

    net, x, s = Two(), torch.randn(3, 4), torch.ones(1)
    one = lbyl_restore(net, (x, s), ratio=0.5)
    two = lbyl_restore(net, dict(x=x, scale=s), ratio=0.5)
    assert torch.equal(one(x, s), two(x, s)) and one.a.weight.shape == (3, 4)


# a tensor of the network, a number that it must not hold, what is said of it
BROKEN = [
    ('0.weight', float('nan'), 'holds NaN'),
    ('1.running_mean', float('inf'), 'holds NaN or infinity'),
    ('1.running_var', -1.0, 'holds negative'),
]


@pytest.mark.parametrize('name, number, says', BROKEN)
def test_broken_networks_are_named(name, number, says):
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)).eval()
    net.state_dict()[name].view(-1)[3] = number
    for call in (lbyl_restore, plan):
        with pytest.raises(ValueError, match=f'{name}: {says}'):
            call(net, torch.zeros(1, 1, 8, 8), ratio=0.5)


def test_criterion_without_batch_norm_names_the_layer():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match='0: criterion bn_scale'):
        plan(net, torch.zeros(1, 4), 0.5, bn_scale)


def test_damaged_files_leave_everything_as_it_was(tmp_path):
    """A truncated file, a foreign one, one of another architecture: an error each.

    The network is unchanged.
    """
    net, x = digits_net().eval(), torch.zeros(1, 1, 8, 8)
    path = tmp_path / 'small.safetensors'
    r = restore(net, x, ratio=0.5)
    save_restored(r.model, r.plan, path)
    whole, state = path.read_bytes(), copy.deepcopy(net.state_dict())
    for n in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='small.safetensors'):
            load_restored(net, x, path)
    path.write_bytes(b'\x80\x04pickle?' * 20)
    with pytest.raises(ValueError, match='not a safetensors file'):
        load_restored(net, x, path)
    save_file(dict(a=torch.zeros(1)), path)
    with pytest.raises(ValueError, match='not written by save_restored'):
        load_restored(net, x, path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match='another architecture'):
        load_restored(resnet20(), torch.zeros(1, 3, 32, 32), path)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    net, x = digits_net().eval(), torch.zeros(1, 1, 8, 8)
    path = tmp_path / 'small.safetensors'
    r = restore(net, x, ratio=0.5)
    save_restored(r.model, r.plan, path)
    old = path.read_bytes()

    def fail(tensors, file, meta):
        file.write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(files, 'save_file', fail)
    with pytest.raises(OSError, match='disk full'):
        save_restored(r.model, r.plan, path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ['small.safetensors']
    with pytest.raises(FileNotFoundError, match='no folder'):
        save_restored(r.model, r.plan, tmp_path / 'nowhere' / 'f')


def test_counting_leaves_no_copy_of_the_weights():
    """Not even one in a cycle, which would live until Python looks for cycles.

    The model keeps its modes, methods and weights.
    """
    net, x = digits_net(4).train(), torch.zeros(1, 1, 8, 8)
    held = lambda: sum(type(o) is nn.Parameter for o in gc.get_objects())
    state = copy.deepcopy(net.state_dict())
    names = set(vars(net))
    gc.collect()
    gc.disable()
    try:
        before = held()
        counted = cost(net, x)
        assert held() == before
    finally:
        gc.enable()
    assert counted['params'] == sum(p.numel() for p in net.parameters())
    assert net.training
    assert set(vars(net)) == names
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize('build', [resnet20, resnet56])
def test_padded_shortcuts_as_projections(build):
    "The same function, all of whose streams can be pruned."
    net, x = build().double().eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain = with_projections(net)
    torch.testing.assert_close(plain(x), net(x), rtol=0, atol=1e-10)
    reasons = lambda net: [g.reason for g in find_groups(trace(net, x), streams=True)[:-1]]
    assert not any(reasons(plain))
    assert any(reasons(net))
    small = restore(plain, x, ratio=0.5, streams=True, restorer=prune_only()).model
    convolutions = [m for m in small.modules() if isinstance(m, nn.Conv2d)]
    projections = [m for m in convolutions if m.kernel_size == (1, 1)]
    assert {(m.out_channels, m.in_channels) for m in projections} == {(16, 8), (32, 16)}


class Sliced(nn.Module):
    "Takes channels of its second layer by a number, which a smaller network could not keep to."

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.c, self.d = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x))[:, :6]).relu())


def test_only_the_channels_that_are_wrong_are_left_alone():
    "The slice cannot lose channels; what the layer before it reads, and what comes behind, can."
    torch.manual_seed(0)
    t = restore(Sliced().eval(), torch.randn(2, 3, 4, 4), ratio=0.5).report.set_index('layer')
    assert dict(t.kept[t.left_alone == '']) == dict(a=4, c=4)
    assert t.kept['b[0:6]'] == 6 and 'without its channels' in t.left_alone['b[0:6]']


class Gated(nn.Module):
    "Halves of one layer, of which one goes through a softmax over its channels."

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        p, q = self.a(x).chunk(2, 1)
        return self.c(self.b(q).relu()) * p.softmax(1).sum(1, keepdim=True)


def test_a_half_that_can_lose_nothing_says_so():
    "The other half must keep as many channels: it is no group that could be pruned."
    t = restore(Gated().eval(), torch.randn(2, 3, 4, 4), ratio=0.5).report.set_index('layer')
    assert dict(t.kept[t.left_alone == '']) == dict(b=3)
    assert 'another piece of the same split, which can lose none' in t.left_alone['a[4:8]']


class Pooled(nn.Module):
    "The mean of all steps, by weights from a layer of one channel."

    def __init__(self):
        super().__init__()
        self.a, self.w, self.o = nn.Linear(5, 8), nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x).relu()
        return self.o((self.w(h).softmax(1).mT @ h)[:, 0])


def test_reasons_are_true_where_no_channel_can_go():
    "A score that is multiplied by reaches the output; norms of single channels leave no choice."
    torch.manual_seed(0)
    net, x = Pooled().eval(), torch.randn(2, 6, 5)
    moved = copy.deepcopy(net)
    moved.w.weight.data.mul_(-1)
    assert (moved(x) - net(x)).abs().max() > 1e-3
    rows = restore(net, x, ratio=0.5).report.set_index('layer')
    assert rows.kept['a'] == 4 and 'product of matrices' in rows.left_alone['w']
    layers = (
        nn.Conv2d(3, 6, 3),
        nn.GroupNorm(6, 6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.Conv2d(8, 2, 1),
    )
    net, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 9, 9)
    rows = restore(net, x, ratio=0.5).report.set_index('layer')
    assert rows.kept['0'] == 6 and 'leaves no choice' in rows.left_alone['0']
    assert rows.kept['3'] == 4 and rows.left_alone['3'] == ''
    layers[1].num_groups = 3
    rows = restore(net, x, ratio=0.5).report.set_index('layer')
    assert rows.kept['0'] == 3 and rows.left_alone['0'] == ''
