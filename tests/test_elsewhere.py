"Plans from masks: which filters they remove, and which masks say nothing of filters."

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lbyl_nb.pruned_elsewhere import from_masks
from lbyl_nb.recover import lbyl_restore
from lbyl_nb.restorers import prune_only

KINDS = dict(
    conv=(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3), (3, 8, 8)),
    linear=(nn.Linear(3, 6), nn.Linear(6, 4), (3,)),
    transposed=(nn.ConvTranspose2d(3, 6, 2), nn.ConvTranspose2d(6, 4, 2), (3, 5, 5)),
)
GONE = [1, 4]


def masked(kind, *params):
    "A network, and a copy with masks on parameters of its first layer that remove filters 1 and 4."
    torch.manual_seed(0)
    a, b, shape = KINDS[kind]
    net = nn.Sequential(a, nn.ReLU(), b).eval()
    net, x = copy.deepcopy(net), torch.randn(5, *shape)
    big = copy.deepcopy(net)
    for k in params:
        mask = torch.ones_like(getattr(big[0], k))
        by_filter = mask.transpose(0, 1) if kind == 'transposed' and k == 'weight' else mask
        by_filter[GONE] = 0
        prune.custom_from_mask(big[0], k, mask)
    return net, big, x


@pytest.mark.parametrize('params', [['weight'], ['weight', 'bias'], ['bias', 'weight']])
@pytest.mark.parametrize('kind', KINDS)
def test_masks_of_weight_and_bias(kind, params):
    "The plan removes what masks do, the network is the dense one, the masked one is not changed."
    net, big, x = masked(kind, *params)
    before = copy.deepcopy(big.state_dict())
    dense, kept = from_masks(big)
    assert kept == {'0': [0, 2, 3, 5]}
    assert dense.state_dict().keys() == net.state_dict().keys() and torch.equal(dense(x), net(x))
    assert all(torch.equal(v, before[k]) for k, v in big.state_dict().items())
    assert not dense[0]._forward_pre_hooks and len(big[0]._forward_pre_hooks) == len(params)
    small = lbyl_restore(dense, x, keep=kept, restorer=prune_only())
    if len(params) == 2:
        torch.testing.assert_close(small(x), big(x))


def test_masks_made_in_several_steps():
    "PyTorch keeps their product, and so does the plan."
    net, big, _ = masked('conv', 'weight', 'bias')
    mask = torch.ones_like(net[0].weight)
    mask[0] = 0
    prune.custom_from_mask(big[0], 'weight', mask)
    assert from_masks(big)[1] == {'0': [2, 3, 5]}


def test_a_bias_mask_that_removes_less():
    "Biases left to removed filters go with them; a mask of ones removes nothing."
    net, big, x = masked('conv', 'weight')
    prune.custom_from_mask(big[0], 'bias', torch.tensor([1.0, 0, 1, 1, 1, 1]))
    prune.identity(big[2], 'bias')
    dense, kept = from_masks(big)
    assert kept == {'0': [0, 2, 3, 5]} and torch.equal(dense(x), net(x))


class Own(nn.Module):
    "A parameter that is no filter."

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return x


OTHERS = [
    (nn.BatchNorm2d(4), 'weight'),
    (nn.BatchNorm2d(4), 'bias'),
    (Own(), 'scale'),
    (nn.Conv2d(4, 4, 1), 'bias'),
    (nn.Embedding(4, 4), 'weight'),
    (nn.GRU(4, 4), 'weight_ih_l0'),
]


def beside(module, what, gone):
    "A masked network with another module behind it, whose parameter has a mask that removes these."
    _, big, _ = masked('conv', 'weight')
    module = copy.deepcopy(module)
    mask = torch.ones_like(getattr(module, what))
    mask[gone] = 0
    prune.custom_from_mask(module, what, mask)
    return nn.Sequential(*big, module), nn.Sequential(module)


@pytest.mark.parametrize('module, what', OTHERS)
def test_masks_that_say_nothing_of_filters(module, what):
    "They are refused by name, alone or beside others; masks that remove nothing are not."
    both, alone = beside(module, what, [1])
    with pytest.raises(ValueError, match=f'^3.{what}: its mask removes something else'):
        from_masks(both)
    with pytest.raises(ValueError, match=f'^0.{what}: its mask removes something else'):
        from_masks(alone)
    both, alone = beside(module, what, [])
    assert from_masks(both)[1] == {'0': [0, 2, 3, 5]}
    with pytest.raises(ValueError, match='no mask on any weight'):
        from_masks(alone)


def test_a_bias_taken_from_a_kept_filter():
    _, big, _ = masked('conv', 'weight')
    prune.custom_from_mask(big[0], 'bias', torch.tensor([1.0, 0, 0, 1, 1, 1]))
    why = r'^0.bias: its mask removes the bias of kept filters \[2\]'
    with pytest.raises(ValueError, match=why):
        from_masks(big)
