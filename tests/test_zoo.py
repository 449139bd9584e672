"""Networks of each family, random weights: pruned and restored as they come.

By weights all of them, from probes those that differ in what a layer reads. With LBYL_ZOO=1 all of
torchvision's up to 150 million parameters and 20 of timm's. Notebook 46 does the same for all of
them and keeps a table of what was reached.
"""

import os

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models

from lbyl_nb.layerwise import layerwise, probe
from lbyl_nb.probes import noise
from lbyl_nb.recover import restore
from lbyl_nb.restorers import lbyl, prune_only

SLOW = bool(os.environ.get('LBYL_ZOO'))
FAMILIES = [
    'convnext_tiny',
    'densenet121',
    'efficientnet_b0',
    'googlenet',
    'mnasnet0_5',
    'mobilenet_v2',
    'mobilenet_v3_small',
    'regnet_y_400mf',
    'resnet18',
    'shufflenet_v2_x0_5',
    'squeezenet1_1',
    'swin_t',
]
TIMM = ['ghostnet_100', 'skresnet18', 'repvgg_a0', 'deit_tiny_patch16_224', 'convnextv2_atto']
if SLOW:
    size = lambda n: next(iter(get_model_weights(n))).meta['num_params']
    FAMILIES = [n for n in list_models(module=torchvision.models) if size(n) <= 150e6]
    TIMM += [
        'resnet26d',
        'resnetv2_50',
        'res2net50_26w_4s',
        'dla34',
        'dpn68',
        'ese_vovnet19b_dw',
        'cspdarknet53',
        'mobilenetv3_small_100',
        'fbnetc_100',
        'tf_efficientnetv2_b0',
        'regnetx_002',
        'rexnet_100',
        'mixer_s32_224',
        'poolformer_s12',
        'hrnet_w18_small',
    ]
# pooling, concatenation, depthwise and shuffled convolutions, gates, tokens
PROBED = [
    'densenet121',
    'efficientnet_b0',
    'googlenet',
    'resnet18',
    'shufflenet_v2_x0_5',
    'deit_tiny_patch16_224',
]
# pixels where 64 are too few
LARGE = dict(inception=96, maxvit=224, vit=224, mixer=224, poolformer=224)
RESTORERS = dict(
    lbyl=lbyl(),
    probe=probe(noise(4), ridge=0.1),
    layerwise=layerwise(noise(4), ridge=0.1),
)


def made(name):
    torch.manual_seed(0)
    if name in TIMM:
        how = dict(img_size=64) if name.startswith('deit') else {}
        return pytest.importorskip('timm').create_model(name, **how).eval()
    slow_to_draw = name in ('googlenet', 'inception_v3')
    how = dict(init_weights=False) if slow_to_draw else {}
    return get_model(name, weights=None, **how).eval()


def pixels(name):
    return next((v for k, v in LARGE.items() if name.startswith(k)), 64)


TRIALS = [('lbyl', n) for n in FAMILIES + TIMM]
TRIALS += [
    (how, n) for how in ('probe', 'layerwise') for n in (FAMILIES + TIMM if SLOW else PROBED)
]


@pytest.mark.parametrize('how, name', TRIALS)
@pytest.mark.filterwarnings('ignore')  # of models about their own initialisation
def test_zoo(how, name):
    net = made(name)
    x = torch.randn(2, 3, pixels(name), pixels(name))
    r = restore(net, x, ratio=0.3, streams=True, restorer=RESTORERS[how])
    with torch.no_grad():
        y = r.model(x)
    assert y.shape == (2, 1000)
    assert y.isfinite().all()
    assert r.cost.params['after'] < r.cost.params['before']
    left = r.report[r.report.left_alone != '']
    assert len(left) < len(r.report)
    assert (left.kept == left.channels).all()


FREE_RIDGE = dict(lbyl=lbyl(), probe=probe(noise(4)), layerwise=layerwise(noise(4)))


class Shared(nn.Module):
    "Its hidden units are divided by their mean."

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.first(x).exp()
        return self.second(x / x.mean(1, keepdim=True))


@pytest.mark.parametrize('how', FREE_RIDGE)
def test_a_network_that_cannot_be_done(how):
    "One sentence says why, layer by layer."
    why = 'first: its channels go through mean, which is taken over all of them'
    with pytest.raises(ValueError, match=f'Shared has nothing to prune .*{why}'):
        x = torch.randn(2, 3, 4, 4)
        restore(Shared(), x, ratio=0.3, streams=True, restorer=FREE_RIDGE[how])


def test_hidden_units_that_are_normalised_by_each_other():
    "The MLP of ConvNeXt V2: the smaller one has the numbers of the units that stay."
    timm = pytest.importorskip('timm')
    net = timm.layers.GlobalResponseNormMlp(6, 12, use_conv=True).eval()
    x, stay = torch.randn(4, 6, 5, 5), [0, 1, 4, 6, 7, 9, 11]
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    small = restore(net, x, keep=dict(fc1=stay), restorer=prune_only()).model
    with torch.no_grad():
        h = net.act(F.conv2d(x, net.fc1.weight[stay], net.fc1.bias[stay]))
        size = h.square().sum((2, 3), keepdim=True).sqrt()
        size = size / (size.mean(1, keepdim=True) + 1e-6)
        weight, bias = (p[stay].view(1, -1, 1, 1) for p in (net.grn.weight, net.grn.bias))
        expected = F.conv2d(h + weight * h * size + bias, net.fc2.weight[:, stay], net.fc2.bias)
        torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)
        assert (small(x) - net(x)).abs().max() > 0.01
