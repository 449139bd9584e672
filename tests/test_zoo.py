"One torchvision model of each family, random weights: pruned and restored as it comes, or refused in one sentence. With LBYL_ZOO=1 all up to 60 million parameters."
import os
import warnings

import pytest
import torch
import torchvision
from torchvision.models import get_model, get_model_weights, list_models

from lbyl_nb.layerwise import probe
from lbyl_nb.probe import noise
from lbyl_nb.recover import lbyl, restore

FAMILIES = ['convnext_tiny', 'densenet121', 'efficientnet_b0', 'googlenet', 'mnasnet0_5', 'mobilenet_v2', 'mobilenet_v3_small', 'regnet_y_400mf', 'resnet18', 'squeezenet1_1', 'swin_t']
FAILS = {'shufflenet_v2_x0_5', 'shufflenet_v2_x1_0', 'shufflenet_v2_x1_5', 'shufflenet_v2_x2_0', 'swin_s', 'swin_b'}    # Torch-Pruning stumbles
millions = lambda name: next(iter(get_model_weights(name))).meta['num_params'] / 1e6
ALL = [n for n in list_models(module=torchvision.models) if millions(n) <= 60 and n not in FAILS]


def pruned(name, restorer):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')    # of models about their own initialisation
        net = get_model(name, weights=None, **(dict(init_weights=False) if name in ('googlenet', 'inception_v3') else {})).eval()
    size = 299 if name.startswith('inception') else 224 if name.startswith(('swin', 'maxvit')) else 64
    x = torch.randn(2, 3, size, size)
    return net, x, restore(net, x, ratio=.3, restorer=restorer)


@pytest.mark.parametrize('name', ALL if os.environ.get('LBYL_ZOO') else FAMILIES)
@pytest.mark.parametrize('how', ['lbyl', 'probe'])
def test_zoo(name, how):
    net, x, r = pruned(name, dict(lbyl=lbyl(), probe=probe(noise(4)))[how])
    with torch.no_grad(): y = r.model(x)
    assert y.shape == (2, 1000) and y.isfinite().all()
    assert r.cost.params['after'] < r.cost.params['before'] and (r.report.left_alone == '').any()
    assert (r.report.kept[r.report.left_alone != ''] == r.report.channels[r.report.left_alone != '']).all()


def test_what_cannot_be_followed_says_so():
    with pytest.raises(ValueError, match='ShuffleNetV2: Torch-Pruning cannot follow this network'): pruned('shufflenet_v2_x0_5', lbyl())
