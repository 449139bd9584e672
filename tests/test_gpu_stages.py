"""The stages of benchmarks/gpu.py, on a processor and at a tiny size.

Interrupted again and again, they end with the rows of a run that never was.
"""

import sys
from dataclasses import replace
from functools import partial
from math import inf

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT
from test_gpu_cells import Clock, small_mobilenet
from torch import nn
from torchvision.models.resnet import BasicBlock

from lbyl_nb import data, models
from lbyl_nb import distilled as data_free
from lbyl_nb.bench import results
from lbyl_nb.files import join_file, read_safetensors
from lbyl_nb.finetune import Recipe

pytestmark = pytest.mark.usefixtures('one_thread')  # bits are compared
Accelerator(cpu=True)  # the first one decides for all
FEW = Recipe(epochs=2, lr=0.01, milestones=(1,), batch=32)


@pytest.fixture
def gpu(monkeypatch):
    "The script, with little images and networks."
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    monkeypatch.delitem(sys.modules, 'gpu', raising=False)
    import gpu

    small = gpu.Training(small_network, 'cifar10', 2, 0.1)
    monkeypatch.setattr(gpu, 'NETWORKS', dict.fromkeys(gpu.NETWORKS, small))
    monkeypatch.setattr(gpu, 'BATCH', 32)
    monkeypatch.setattr(data, 'load', load)
    monkeypatch.setattr(gpu, 'DEVICE', 'cpu')
    yield gpu
    sys.modules.pop('gpu')


def small_network():
    "A residual stream of eight channels in front of a linear layer."
    stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(*stem, BasicBlock(8, 8), *head)


def load(name, split):
    "A few handwritten digits as colour images."
    few = data.digits()[split == 'test'][:64]
    return data.Dataset(few.images.repeat(1, 3, 1, 1), few.labels)


def run(gpu, stage, folder, looks, monkeypatch):
    "Call a stage until it is done: its table, and how many calls it took."
    monkeypatch.setattr(gpu, 'RESULTS', folder)
    for calls in range(1, 200):
        monkeypatch.setattr(gpu, 'time', Clock(looks))
        for f in vars(gpu).values():
            getattr(f, 'cache_clear', lambda: None)()  # as in a new process
        table = gpu.call(stage, folder / 'weights', folder / 'out', 540)
        if table is not None:
            return table, calls
    raise AssertionError('it never ends')


def both(gpu, stage, tmp_path, monkeypatch, capsys, looks):
    "A stage at once and interrupted: the same rows. Its table, how many calls it took."
    tables = {}
    for part, n in dict(whole=inf, parts=looks).items():
        (tmp_path / part).mkdir(exist_ok=True)
        tables[part], calls = run(gpu, stage, tmp_path / part, n, monkeypatch)
    assert capsys.readouterr().out.count('run again to go on') == calls - 1
    whole, parts = (tmp_path / p / 'out' / f'gpu_{stage}.csv' for p in ('whole', 'parts'))
    assert whole.read_bytes() == parts.read_bytes()
    assert parts.read_bytes() == (tmp_path / 'parts' / f'gpu_{stage}.csv').read_bytes()
    return tables['parts'], calls


def test_train(gpu, tmp_path, monkeypatch, capsys):
    "Weights come in pieces, which are the weights that are saved, in half precision."
    monkeypatch.setattr(gpu, 'split_file', partial(gpu.split_file, most=2_000))
    table, calls = both(gpu, 'train', tmp_path, monkeypatch, capsys, 3)
    assert calls > 3 and list(table.network) == list(gpu.NETWORKS)
    for name in gpu.NETWORKS:
        files = [tmp_path / p / 'weights' / f'{name}.safetensors' for p in ('whole', 'parts')]
        assert files[0].read_bytes() == files[1].read_bytes()
        joined = tmp_path / files[0].name
        pieces = sorted((tmp_path / 'parts' / 'out').glob(f'{name}.safetensors.*'))
        assert len(pieces) > 2 and max(p.stat().st_size for p in pieces) <= 2_000
        saved = read_safetensors(files[0])[0]
        there = read_safetensors(join_file(tmp_path / 'parts' / 'out', joined))[0]
        assert all(torch.equal(saved[k], there[k]) for k in saved) and saved.keys() == there.keys()
        assert all((v.ndim > 1) == (v.dtype == torch.float16) for v in saved.values())
    # pieces alone serve as well
    gpu.network.cache_clear()
    loaded = gpu.network(name, tmp_path / 'parts' / 'out').state_dict()
    assert all(torch.equal(loaded[k], saved[k].to(loaded[k].dtype)) for k in saved)


def give_weights(gpu, folder):
    "Networks with trained weights, as the first stage leaves them."
    folder.mkdir(parents=True)
    for name, how in gpu.NETWORKS.items():
        net = models.initialised(how.build, 1)
        gpu.write_safetensors(gpu.halved(net), folder / f'{name}.safetensors')


def test_tables(gpu, tmp_path, monkeypatch, capsys):
    "Every method, every way to choose channels."
    monkeypatch.setattr(gpu, 'IMAGE', torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr(gpu, 'distilled', lambda n: data_free(8, steps=2))
    monkeypatch.setattr(gpu, 'RATIOS', (0.25,))
    monkeypatch.setattr(gpu, 'TABLES', gpu.TABLES[:1])
    monkeypatch.setattr(gpu, 'FOLDING', (0.25,))
    monkeypatch.setattr(gpu, 'CRITERIA', {k: gpu.CRITERIA[k] for k in ('l2', 'random_1')})
    for part in ('whole', 'parts'):
        give_weights(gpu, tmp_path / part / 'weights')
    table, calls = both(gpu, 'tables', tmp_path, monkeypatch, capsys, 5)
    assert calls > 3 and len(table) == 1 + 6 + 1 + 7 + 6
    assert set(table.method) == {'unpruned', *gpu.METHODS}
    folded = table[table.streams]
    assert set(folded.criterion) == {'l2', 'least lost'}
    # all methods of a choice leave the same operations
    size = table.groupby(['network', 'streams', 'ratio', 'criterion'], dropna=False)
    assert (size.macs.nunique() == 1).all()
    assert table.divergence.nunique() > 10


def test_finetune(gpu, tmp_path, monkeypatch, capsys):
    "A row for each epoch, before the first one too."
    monkeypatch.setattr(gpu, 'IMAGE', torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr(gpu, 'RATIOS', (0.5, 0.25))
    recipes = dict(merging=FEW, pruned=FEW) | {gpu.SCRATCHED: FEW.scaled(2)}
    monkeypatch.setattr(gpu, 'BEGINNINGS', recipes)
    for part in ('whole', 'parts'):
        give_weights(gpu, tmp_path / part / 'weights')
    table, calls = both(gpu, 'finetune', tmp_path, monkeypatch, capsys, 8)
    assert calls > 3 and len(table) == 2 * (3 + 3 + 5)
    assert table.loss.isna().sum() == 6 and not table.accuracy.isna().any()
    first = table[table.epoch == 1].groupby('ratio').loss
    assert (first.nunique() == 3).all()


def test_boost(gpu, tmp_path, monkeypatch, capsys):
    "Learning rates first; an absurd one is never taken."
    exec_cells = gpu.boost_names

    def little(place):
        names = exec_cells(place)
        names['full_mobilenet'] = small_mobilenet
        return names

    few = dict(FINETUNING=FEW, SCRATCH=FEW, PRUNING=FEW)
    few = {k: replace(r, batch=24) for k, r in few.items()}
    monkeypatch.setattr(gpu, 'boost_names', little)
    monkeypatch.setattr(gpu, 'IMAGE', torch.zeros(1, 3, 8, 8))
    monkeypatch.setattr(gpu, 'HELD_OUT', 16)
    monkeypatch.setattr(gpu, 'SEEDS', range(2))
    monkeypatch.setattr(gpu, 'REMOVED', (60.0,))
    monkeypatch.setattr(gpu, 'BOOST', few)
    monkeypatch.setattr(gpu, 'CHOOSING', {k: r.scaled(0.5) for k, r in few.items()})
    lrs = {m: (1e30, 0.01) for m in ('vanilla fine-tuning', 'over-parameterized')}
    monkeypatch.setattr(gpu, 'LRS', lrs)
    table, calls = both(gpu, 'boost', tmp_path, monkeypatch, capsys, 6)
    assert calls > 3 and len(table) == 4 and (table.lr == 0.01).all() and (table.n == 64).all()
    rates = results(tmp_path / 'parts' / 'out' / 'gpu_boost_rates.csv')
    assert len(rates) == 4 and (rates.n.dropna() == 16).all()
