"""The stages of benchmarks/gpu.py, on a processor and at a tiny size.

Interrupted again and again, they end with the rows of a run that never was.
"""

import sys
from functools import partial
from math import inf

import pytest
import torch
from conftest import ROOT

from lbyl_nb import data, models
from lbyl_nb.files import join_file, read_safetensors

pytestmark = pytest.mark.usefixtures('one_thread')  # bits are compared


@pytest.fixture
def gpu(monkeypatch):
    "The script, with little images and networks."
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    monkeypatch.delitem(sys.modules, 'gpu', raising=False)
    import gpu

    small = gpu.Training(partial(models.CifarResNet, 1), 'cifar10', 2, 0.1)
    monkeypatch.setattr(gpu, 'NETWORKS', dict.fromkeys(gpu.NETWORKS, small))
    monkeypatch.setattr(gpu, 'BATCH', 32)
    monkeypatch.setattr(data, 'load', load)
    monkeypatch.setattr(gpu, 'DEVICE', 'cpu')
    yield gpu
    sys.modules.pop('gpu')


def load(name, split):
    "A few handwritten digits as colour images."
    few = data.digits()[split == 'test'][:64]
    return data.Dataset(few.images.repeat(1, 3, 1, 1), few.labels)


class Clock:
    "As many looks as a call may last."

    def __init__(self, looks):
        self.now, self.tick = 0, 440 / (looks + 0.5)

    def monotonic(self):
        self.now += self.tick
        return self.now


def run(gpu, stage, folder, looks, monkeypatch):
    "Call a stage until it is done: its table, and how many calls it took."
    monkeypatch.setattr(gpu, 'RESULTS', folder)
    for calls in range(1, 200):
        monkeypatch.setattr(gpu, 'time', Clock(looks))
        for f in vars(gpu).values():
            getattr(f, 'cache_clear', lambda: None)()  # as in a new process
        table = gpu.call(stage, folder / 'weights', folder / 'out')
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
    monkeypatch.setattr(gpu, 'split_file', partial(gpu.split_file, most=50_000))
    table, calls = both(gpu, 'train', tmp_path, monkeypatch, capsys, 3)
    assert calls > 3 and list(table.network) == list(gpu.NETWORKS)
    for name in gpu.NETWORKS:
        files = [tmp_path / p / 'weights' / f'{name}.safetensors' for p in ('whole', 'parts')]
        assert files[0].read_bytes() == files[1].read_bytes()
        joined = tmp_path / files[0].name
        pieces = sorted((tmp_path / 'parts' / 'out').glob(f'{name}.safetensors.*'))
        assert len(pieces) > 2 and max(p.stat().st_size for p in pieces) <= 50_000
        saved = read_safetensors(files[0])[0]
        there = read_safetensors(join_file(tmp_path / 'parts' / 'out', joined))[0]
        assert all(torch.equal(saved[k], there[k]) for k in saved) and saved.keys() == there.keys()
        assert all((v.ndim > 1) == (v.dtype == torch.float16) for v in saved.values())
    # pieces alone serve as well
    gpu.network.cache_clear()
    loaded = gpu.network(name, tmp_path / 'parts' / 'out').state_dict()
    assert all(torch.equal(loaded[k], saved[k].to(loaded[k].dtype)) for k in saved)
