"Convolutions that pad their input by themselves, against networks with their padding written out."

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lbyl_nb.layerwise import layerwise, probe, probed_lbyl
from lbyl_nb.least_lost import least_lost
from lbyl_nb.probes import noise
from lbyl_nb.recover import restore
from lbyl_nb.restorers import lbyl, merging, prune_only

torch.manual_seed(0)
image = torch.randn(2, 3, 29, 29)
few = noise(24)


def sides(x, layer):
    "Zeros left, right, above and below with which an image of n pixels gives ceil(n / stride)."
    pad, how = [], (layer.kernel_size, layer.stride, layer.dilation)
    for n, k, s, d in zip(x.shape[:1:-1], *(v[::-1] for v in how)):
        total = max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pad += [total // 2, total - total // 2]
    return pad


class Same(nn.Conv2d):
    "As TensorFlow pads: by the size of the image."

    def forward(self, x):
        how = self.stride, self.padding, self.dilation, self.groups
        return F.conv2d(F.pad(x, sides(x, self)), self.weight, self.bias, *how)


class Static(nn.Conv2d):
    "The padding is a module, made once; the number that stands in the layer is not used."

    def __init__(self, *args, pad, **kwargs):
        super().__init__(*args, **kwargs)
        self.zeros = nn.ZeroPad2d(pad)

    def forward(self, x):
        how = self.stride, 0, self.dilation, self.groups
        return F.conv2d(self.zeros(x), self.weight, self.bias, *how)


class Reflected(nn.Conv2d):
    "Something else than zeros, and by `super`."

    def forward(self, x):
        return super().forward(F.pad(x, (1, 2, 0, 1), 'reflect'))


def static(*args, **kwargs):
    return Static(*args, pad=(0, 1, 1, 0), padding=1, **kwargs)


def written_same(size, layer):
    return nn.ZeroPad2d(sides(torch.zeros(1, 1, *size), layer))


# a layer that pads by itself; the module that pads so; a kernel that keeps the size
PADS = {
    'same': (Same, written_same, 3),
    'static': (static, lambda *_: nn.ZeroPad2d((0, 1, 1, 0)), 2),
    'reflected': (Reflected, lambda *_: nn.ReflectionPad2d((1, 2, 0, 1)), (2, 4)),
}


class Net(nn.Module):
    "Strides, dilation, a depthwise and a grouped layer, a shortcut; `pads` go in front of layers."

    def __init__(self, conv, size):
        super().__init__()
        self.a = conv(3, 8, 3, stride=2, bias=False)
        self.b = conv(8, 8, 3, groups=8)
        self.c = conv(8, 12, (3, 2), groups=2, stride=(1, 2))
        self.d = conv(12, 8, 3, dilation=2, bias=False)
        self.e = conv(8, 8, size)
        self.o = nn.Linear(8, 4)
        self.norms = nn.ModuleDict(dict(a=nn.BatchNorm2d(8), c=nn.BatchNorm2d(12)))
        self.pads = nn.ModuleDict()

    def conv(self, k, x):
        return getattr(self, k)(self.pads[k](x) if k in self.pads else x)

    def forward(self, x):
        x = self.conv('b', self.norms.a(self.conv('a', x)).relu()).relu()
        x = self.norms.c(self.conv('c', x)).relu()
        x = self.conv('d', x).relu()
        x = x + self.conv('e', x)
        return self.o(x.relu().mean((2, 3)))


def sizes_read(net):
    "{layer: height and width of the images that it reads}."
    size = {}
    see = lambda k: lambda m, inputs: size.update({k: inputs[0].shape[2:]})
    hooks = [getattr(net, k).register_forward_pre_hook(see(k)) for k in 'abcde']
    net(image)
    for h in hooks:
        h.remove()
    return size


def pair(kind):
    "A network whose layers pad by themselves, and the same with its padding written out."
    own, written, keeps = PADS[kind]
    torch.manual_seed(1)
    net = Net(own, keeps).eval()
    for m in net.norms.values():
        m.running_mean.normal_()
        m.running_var.uniform_(0.5, 2)
        nn.init.normal_(m.weight)
        nn.init.normal_(m.bias)
    same = Net(nn.Conv2d, keeps).eval()
    same.load_state_dict(net.state_dict())
    for k, size in sizes_read(net).items():
        same.pads[k] = written(size, getattr(same, k))
    torch.testing.assert_close(net(image), same(image))
    return net, same


RESTORERS = dict(
    prune_only=prune_only(),
    merging=merging(),
    lbyl=lbyl(),
    probe=probe(few),
    channels=probe(few, taps=False),
    probed=probed_lbyl(few),
    layerwise=layerwise(few),
    consumers=layerwise(few, refit=False),
)


@pytest.mark.parametrize('name', RESTORERS)
@pytest.mark.parametrize('kind', PADS)
@pytest.mark.filterwarnings('error:.*one after the other')
def test_padding_of_its_own_is_padding_written_out(kind, name):
    "The same plan and the same weights, layer by layer."
    net, same = pair(kind)
    r, expected = (restore(n, image, ratio=0.5, restorer=RESTORERS[name]) for n in (net, same))
    assert r.plan == expected.plan and r.plan.keys() == {'a', 'c'}
    assert type(r.model.a) is type(net.a) and r.model.a.weight.shape[0] == 4
    found, wanted = r.model.state_dict(), expected.model.state_dict()
    assert found.keys() == wanted.keys()
    for k, v in found.items():
        torch.testing.assert_close(v, wanted[k], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(r.model(image), expected.model(image), rtol=1e-3, atol=1e-4)


def test_channels_are_chosen_as_with_padding_written_out():
    net, same = pair('same')
    choices = [restore(n, image, ratio=0.5, criterion=least_lost(few)).plan for n in (net, same)]
    assert choices[0] == choices[1]


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), w, self.bias)


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Conv2d):
    def forward(self, x):
        return sum(super(Twice, self).forward(F.pad(x, p)) for p in ((1, 1, 1, 1), (2, 0, 1, 1)))


class Biasless(nn.Conv2d):
    "Whatever bias it is given is lost."

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight)


@pytest.mark.parametrize('kind', [Standardised, Doubled, Twice, Biasless])
def test_layers_that_are_no_convolution_of_a_padded_input(kind):
    "Their weights mean something else: they are named."
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        kind(6, 6, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )
    with pytest.raises(ValueError, match=r'keep: 2 cannot be pruned: 2 is (a|called|used)'):
        restore(net, image, keep={'2': [0, 1, 2]})
    assert restore(net, image, ratio=0.5).plan.keys() == {'4'}


@pytest.mark.parametrize('name', ['lbyl', 'merging', 'probe', 'layerwise'])
def test_a_network_that_came_from_tensorflow(name):
    "timm's port of EfficientNet-Lite: every layer that pads by itself is cut."
    timm = pytest.importorskip('timm', reason='timm is not installed')
    torch.manual_seed(0)
    net = timm.create_model('tf_efficientnet_lite0', num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    weight = lambda m, k: m.get_submodule(k).weight.shape
    r = restore(net, x, ratio=0.3, restorer=RESTORERS[name])
    own = [k for k, m in net.named_modules() if type(m).__name__ == 'Conv2dSame']
    assert own and r.model(x).shape == net(x).shape and r.model(x).isfinite().all()
    assert all(weight(r.model, k) != weight(net, k) for k in own)
    assert r.cost.macs['after'] < 0.8 * r.cost.macs['before']
