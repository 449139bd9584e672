"Trained networks on real images: published numbers to the digit, and unpruned accuracies."

import pytest
import torch

from lbyl_nb import bench, data, models
from lbyl_nb.recover import lbyl_restore
from lbyl_nb.restorers import lbyl, merging, prune_only

# ratio: lambda2 and the published accuracies of LBYL, merging and pruning alone, in percent
LENET = {
    0.5: (0.3, 88.83, 88.38, 87.86),
    0.6: (0.6, 87.75, 88.07, 83.03),
    0.7: (0.3, 83.92, 83.27, 71.21),
    0.8: (1e-6, 78.05, 77.11, 63.90),
}


@pytest.fixture(scope='module')
def lenet(data_dir, weights_dir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LBYL_WEIGHTS', str(weights_dir))
        yield models.pretrained('lenet_300_100_fashion_mnist'), data.load('fashion_mnist', 'test')


def percent(net, images, stats):
    right, n = bench.accuracy(net, images, *data.STATS[stats])
    assert n == 10_000
    return round(100 * right / n, 2)


def test_lenet_unpruned(lenet):
    assert percent(*lenet, 'half') == 89.80


@pytest.mark.parametrize('ratio', LENET)
def test_lenet_table(lenet, ratio):
    net, images = lenet
    lam2, *published = LENET[ratio]
    ours = []
    for restorer in (lbyl(lam2=lam2), merging(cos_weight=1.0, threshold=0.45), prune_only()):
        small = lbyl_restore(net, torch.zeros(1, 784), ratio=ratio, restorer=restorer)
        ours.append(percent(small, images, 'half'))
    assert ours == published


@pytest.fixture
def cifar(data_dir, weights_dir, monkeypatch):
    monkeypatch.setenv('LBYL_WEIGHTS', str(weights_dir))
    return data.load('cifar10', 'test')


def test_resnet20_unpruned(cifar):
    net = models.pretrained('resnet20_cifar10').to(memory_format=torch.channels_last)
    assert percent(net, cifar, 'imagenet') == 91.73


def test_resnet56_unpruned(cifar):
    "Of 2,000 images, the standard error is half a point; all 10,000 take half a minute."
    net = models.pretrained('resnet56_cifar10').to(memory_format=torch.channels_last)
    right, n = bench.accuracy(net, data.subset(cifar, 2000), *data.STATS['imagenet'])
    assert 100 * right / n == pytest.approx(93.39, abs=1.5)
