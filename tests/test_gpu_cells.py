"""The cells of 44_kinds_on_images and 45_boost that want a GPU, on a processor and at a tiny size.

They run as they stand. Interrupted again and again, they end with the rows of a run that never
was.
"""

from collections import Counter
from math import inf
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import NBS, cells
from torch import nn
from torchvision.models import MobileNetV2
from torchvision.ops import Conv2dNormActivation

from lbyl_nb import data, models
from lbyl_nb.files import read_safetensors
from lbyl_nb.finetune import Recipe

pytestmark = pytest.mark.usefixtures('one_thread')  # bits are compared
Accelerator(cpu=True)  # the first one decides for all
CODE = [c['source'] for c in cells(NBS / '45_boost.ipynb', 'code')]
IMPORTS = next(s for s in CODE if s.startswith('import'))
GPU = [s for s in CODE if s.startswith('#| cuda')]
TABLE = next(s for s in CODE if s.startswith('def beside_published'))
FINETUNING = Recipe(epochs=2, lr=0.01, milestones=(1,), batch=32)
SCRATCH = Recipe(epochs=3, lr=0.1, milestones=(2,), batch=32)
PRUNING = Recipe(epochs=4, lr=0.01, milestones=(3,), batch=32)
METHODS = [
    'from scratch',
    'ExpandNets',
    'vanilla distillation',
    'vanilla fine-tuning',
    'over-parameterized',
]


def small_mobilenet():
    "Two inverted residuals, one of them with a depthwise convolution between two others."
    net = MobileNetV2(10, 1.0, [[1, 8, 1, 1], [2, 8, 2, 1]], dropout=0.0)
    net.features[-1] = Conv2dNormActivation(8, 16, 1, activation_layer=nn.ReLU6)
    net.classifier = nn.Linear(16, 10)
    return net


def load(name, split):
    "A few handwritten digits as colour images of 16 x 16 pixels."
    few = data.digits()[split == 'test'][:64]
    images = few.images.repeat(1, 3, 1, 1)
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return data.Dataset(images, few.labels)


class Clock:
    "As many looks as a call of nine minutes may last."

    def __init__(self, looks):
        self.now, self.tick = 0, 540 / (looks + 0.5)

    def monotonic(self):
        self.now += self.tick
        return self.now


def notebook(folder, looks):
    "What the cells define, but for the last one, with other names for what is large."
    few = dict(load=load, crop_flip=data.crop_flip, STATS=data.STATS, data_dir=lambda: folder)
    tiny = dict(
        DEVICE='cpu',
        ON_GPU=folder / 'rows.csv',
        IMAGE=torch.zeros(1, 3, 16, 16),
        PUBLISHED=pd.DataFrame({60.0: range(5)}, METHODS),
        data=SimpleNamespace(**few),
        time=Clock(looks),
        full_mobilenet=small_mobilenet,
        FINETUNING=FINETUNING,
        SCRATCH=SCRATCH,
        PRUNING=PRUNING,
    )
    names = {}
    for source in (IMPORTS, *GPU[:-1]):
        exec(source, names)
        names.update(tiny)
    first, *others = names['FULL']
    # all methods, a rate that is too large, another seed
    too_large = dict(first, method='ExpandNets', lr=1e30)
    seed_1 = next(s for s in others if s['seed'] == 1)
    names['FULL'] = [first, too_large, *others[:6], seed_1]
    return names


def steps(path):
    "How many steps the run of a checkpoint has done."
    return int(read_safetensors(path)[1]['step']) if path.exists() else 0


def piece(folder):
    "What a call that was stopped was about."
    folder = folder / 'boost_cuda'
    if steps(folder / 'dense.safetensors') < SCRATCH.steps(64):
        return 'dense'
    if steps(folder / 'admm_60.0.safetensors') < PRUNING.steps(64):
        return 'ADMM'
    return 'methods'


def test_cells_go_on(tmp_path, capsys):
    """Three steps a call, an epoch of two of which a checkpoint keeps.

    Now and then in a new process, as far as its names are concerned.
    """
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    for folder in (whole, parts):
        folder.mkdir()
    once, names, stopped = notebook(whole, inf), notebook(parts, 3), Counter()
    exec(GPU[-1], once)
    assert not capsys.readouterr().out
    for call in range(100):
        exec(GPU[-1], names)
        if not capsys.readouterr().out:
            break
        stopped[piece(parts)] += 1
        if call % 7 == 6:
            names = notebook(parts, 3)
    assert stopped['dense'] == 2 and stopped['ADMM'] > 2 and stopped['methods'] > 20
    rows = pd.read_csv(parts / 'rows.csv')
    assert (parts / 'rows.csv').read_bytes() == (whole / 'rows.csv').read_bytes()
    assert len(rows) == 9
    assert rows.method.nunique() == 5
    assert rows.params.nunique() == 1
    assert rows.accuracy.isna().tolist() == [False, True] + [False] * 7
    files = lambda folder: sorted(p.name for p in (folder / 'boost_cuda').iterdir())
    assert files(whole) == files(parts)
    for name in files(whole):
        a, told = read_safetensors(whole / 'boost_cuda' / name)
        b, told_again = read_safetensors(parts / 'boost_cuda' / name)
        assert told == told_again, name
        assert a.keys() == b.keys(), name
        assert all(torch.equal(a[k], b[k]) for k in a), name
    exec(TABLE, names)
    assert 'nan' in names['beside_published'](parts / 'rows.csv').loc['ExpandNets', 1e30].item()


def kinds(folder, looks):
    "What 44_kinds_on_images defines up to its last cell for a GPU, and that cell."
    code = [c['source'] for c in cells(NBS / '44_kinds_on_images.ipynb', 'code')]
    gpu = [s for s in code if s.startswith('#| cuda')]
    classes = 'from functools', 'class ProjectionResNet', 'def densenet'
    wanted = (*classes, 'NETWORKS = dict', '@cache\ndef network_of', 'def measure')
    digits = SimpleNamespace(
        load=load,
        crop_flip=data.crop_flip,
        STATS=data.STATS,
        normalise=data.normalise,
        subset=lambda part, n, seed=0: data.subset(part, 32, seed),
    )
    tiny = dict(
        DEVICE='cpu',
        ON_GPU=folder / 'rows.csv',
        IMAGE=torch.zeros(1, 3, 16, 16),
        data=digits,
        time=Clock(looks),
        RECIPE=SCRATCH,
        models=SimpleNamespace(**dict(vars(models), weights_dir=lambda: folder)),
    )
    names = {}
    for source in [s for s in code if s.startswith(wanted)] + gpu[:-1]:
        exec(source, names)
        names.update(tiny)
    trials, net = names['trials'], names['ProjectionResNet']

    def few(network):
        return [s for s in trials(network) if s['ratio'] in (0.0, 0.25, 0.5)][:9]

    names['models'].resnet18_cifar = lambda: net((4, 8, 8))
    names['NETWORKS']['resnet18'] = names['models'].resnet18_cifar
    names['trials'] = few
    return names, gpu[-1]


def test_kinds_go_on(tmp_path, capsys):
    """Training and measuring, four looks at the clock a call.

    Now and then in a new process, as far as its names are concerned.
    """
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    for folder in (whole, parts):
        folder.mkdir()
    once, cell = kinds(whole, inf)
    exec(cell, once)
    assert not capsys.readouterr().out
    names, calls = kinds(parts, 4)[0], 0
    while exec(cell, names) or capsys.readouterr().out:
        calls += 1
        if calls == 1:
            assert steps(parts / 'resnet18_cifar10.checkpoint') == 4
            assert not (parts / 'rows.csv').exists()
        if calls % 2:
            names = kinds(parts, 4)[0]
    assert 3 <= calls < 10
    assert (parts / 'rows.csv').read_bytes() == (whole / 'rows.csv').read_bytes()
    rows = pd.read_csv(parts / 'rows.csv')
    assert len(rows) == 9 and {*rows.method} >= {'unpruned', 'pruned', 'lbyl', 'every layer'}
