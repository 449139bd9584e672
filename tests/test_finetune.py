"""Fine-tuning in two processes, killed for good, on the whole path.

And what its schedule and order of images promise for any numbers.
"""

import signal
import sys
from dataclasses import replace
from math import isclose

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, call
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from lbyl_nb.bench import accuracy
from lbyl_nb.data import digits, subset
from lbyl_nb.expand import expand
from lbyl_nb.files import read_safetensors
from lbyl_nb.finetune import (
    FINETUNING,
    Recipe,
    _batches,
    boost,
    finetune,
    fixed_norms,
    fresh,
    restore_and_boost,
    unchanged,
)
from lbyl_nb.models import digits_net, initialised
from lbyl_nb.restorers import prune_only
from lbyl_nb.saved import load_restored

pytestmark = pytest.mark.usefixtures('one_thread')  # bits are compared
# the first one decides for all: bits are compared here, and a GPU promises none
Accelerator(cpu=True)
SHORT = Recipe(epochs=3, lr=0.01, milestones=(2,), batch=64)
COMMON = """
import os, signal, sys, torch
from torch import nn
from lbyl_nb.data import crop_flip, digits, subset
from lbyl_nb.finetune import Recipe, boost, finetune, fixed_norms, synced_norms, unchanged
from lbyl_nb.models import digits_net, initialised, save_weights
data = subset(digits()[0], 256)
out = sys.argv[1]
short = Recipe(epochs=3, lr=.01, milestones=(2,), batch=64)
dense = initialised(lambda: digits_net(4), 1)
def two_layers():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
def linear():
    return initialised(two_layers, 0)
class Shift:
    "Images shifted at random; the process kills itself at a call."
    def __init__(self, killed_at=None):
        self.calls, self.killed_at = 0, killed_at
    def __call__(self, x):
        self.calls += 1
        if self.calls == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return crop_flip(x, 1)
"""
TWO = (
    COMMON
    + """
from accelerate import Accelerator, debug_launcher
teacher = initialised(lambda: digits_net(4), 2).double()
RUNS = dict(
    linear=(linear, unchanged, None),
    fixed=(lambda: dense, fixed_norms, None),
    own=(lambda: dense, unchanged, teacher),
)
WRONG = {
    'cannot be shared by 2': lambda: dict(recipe=Recipe(batch=63)),
    'step 2: the loss is nan': lambda: dict(recipe=short, augment=Nan()),
}
def main():
    for name, (net, norms, teacher) in RUNS.items():
        how = dict(recipe=short, batch_norms=norms, augment=Shift(), eval_set=data)
        taught = dict(teacher=teacher, sp_weight=3)
        done = finetune(net().double(), data, **taught, **how, checkpoint=f'{out}/{name}.c')
        rank = Accelerator().process_index
        save_weights(done.model, f'{out}/{name}{rank}.safetensors')
        done.history.to_csv(f'{out}/{name}{rank}.csv', index=False)
    for says, how in WRONG.items():
        try:
            finetune(dense, data, **how())
        except (ValueError, FloatingPointError) as e:
            assert says in str(e), e
        else:
            raise AssertionError(says)
class Nan:
    "An image that is not a number, at the second step, which only the second process trains on."
    def __init__(self):
        self.calls = 0
    def __call__(self, x):
        self.calls += 1
        if self.calls == 2:
            x[1] = float('nan')
        return x
debug_launcher(main)
"""
)
KILLED = (
    COMMON
    + """
how = dict(teacher=dense, recipe=short, sp_weight=30, augment=Shift(11), eval_set=data)
boost(dense, data, **how, checkpoint=f'{out}/c.safetensors', every=2)
"""
)
HALF = (
    COMMON
    + """
teacher = initialised(lambda: digits_net(4), 2)
done = finetune(dense, data, teacher=teacher, recipe=short, sp_weight=30)
done.history.to_csv(f'{out}/half.csv', index=False)
"""
)


class Shift:
    "The same shifts as in the scripts."

    def __call__(self, x):
        from lbyl_nb.data import crop_flip

        return crop_flip(x, 1)


@pytest.fixture(scope='module')
def data():
    return subset(digits()[0], 256)


@pytest.fixture
def dense():
    return initialised(lambda: digits_net(4), 1)


def two_layers():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def linear():
    return initialised(two_layers, 0)


def script(text, *args, **env):
    "Run a script on the CPU, with the project's modules."
    on_cpu = dict(TQDM_DISABLE='1', CUDA_VISIBLE_DEVICES='', ACCELERATE_USE_CPU='true')
    return call(sys.executable, '-c', text, *args, cwd=ROOT, timeout=120, **on_cpu, **env)


def apart(a, b):
    "Largest distance of two states, relative to the largest number."
    far = lambda u, v: ((u - v).abs().max() / v.abs().max().clamp(min=1)).item()
    return max(far(a[k], b[k]) for k in b if b[k].is_floating_point())


def test_two_processes(tmp_path, data, dense):
    """Two processes are one with the whole batch where images have nothing to do with each other.

    Both end alike whatever the batch norms do.
    """
    run = script(TWO, tmp_path)
    assert run.returncode == 0, run.stdout
    other = initialised(lambda: digits_net(4), 2).double()
    cases = dict(
        linear=(linear(), unchanged, None),
        fixed=(dense, fixed_norms, None),
        own=(dense, unchanged, other),
    )
    for name, (net, norms, teacher) in cases.items():
        both = [load_file(tmp_path / f'{name}{i}.safetensors') for i in (0, 1)]
        assert all(torch.equal(both[0][k], both[1][k]) for k in both[0])
        how = dict(recipe=SHORT, batch_norms=norms, augment=Shift(), eval_set=data)
        one = finetune(net.double(), data, teacher=teacher, sp_weight=3, **how)
        moved = apart(net.state_dict(), one.model.state_dict())
        if name == 'own':  # shares have statistics of their own
            assert 1e-4 < apart(both[0], one.model.state_dict()) < moved
        else:
            assert apart(both[0], one.model.state_dict()) < 1e-12
            assert moved > 0.01
        rows = [pd.read_csv(tmp_path / f'{name}{i}.csv') for i in (0, 1)]
        pd.testing.assert_frame_equal(*rows)
        if name == 'own':
            assert rows[0].similarity.gt(0).all()  # of images within a share
        else:
            pd.testing.assert_frame_equal(rows[0], one.history, rtol=1e-6)


def test_killed(tmp_path, data, dense):
    """A process that ends by SIGKILL in the middle of a step.

    The same call in another process goes on to the same bits.
    """
    run = script(KILLED, tmp_path)
    assert run.returncode == -signal.SIGKILL, run.stdout
    path = tmp_path / 'c.safetensors'
    assert read_safetensors(path)[1]['step'] == '10'
    how = dict(teacher=dense, recipe=SHORT, sp_weight=30, augment=Shift(), every=2, eval_set=data)
    rest = boost(dense, data, checkpoint=path, **how)
    whole = boost(dense, data, **how)
    assert len(rest.history) == 6 and rest.history.equals(whole.history)
    state = whole.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in rest.model.state_dict().items())


def test_precision_that_accelerate_is_configured_with(tmp_path, data, dense):
    """`accelerate launch --mixed_precision bf16` sets a variable.

    Teacher and student obey it as they obey the argument.
    """
    run = script(HALF, tmp_path, ACCELERATE_MIXED_PRECISION='bf16')
    assert run.returncode == 0, run.stdout
    how = dict(teacher=initialised(lambda: digits_net(4), 2), recipe=SHORT, sp_weight=30)
    configured = pd.read_csv(tmp_path / 'half.csv')
    asked = finetune(dense, data, autocast=torch.bfloat16, **how).history
    full = finetune(dense, data, autocast=None, **how).history
    pd.testing.assert_frame_equal(configured, asked, rtol=1e-3)
    assert (asked.similarity != full.similarity).all()


def test_truncated_anywhere(tmp_path, data, dense):
    path = tmp_path / 'c.safetensors'
    finetune(dense, data, recipe=replace(SHORT, epochs=0.25), checkpoint=path)
    whole = path.read_bytes()
    for n in (0, 1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='truncated'):
            finetune(dense, data, recipe=replace(SHORT, epochs=0.25), checkpoint=path)
        assert path.read_bytes() == whole[:n]


def test_whole_path(tmp_path, data):
    "Networks passed in keep every bit; what is saved is what is returned."
    dense, image = initialised(lambda: digits_net(4), 0).eval(), torch.zeros(1, 1, 8, 8)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    path = tmp_path / 's.safetensors'
    how = dict(ratio=0.5, restorer=prune_only())
    done = restore_and_boost(dense, image, data, restoring=how, path=path, recipe=SHORT)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert not dense.training
    loaded = load_restored(digits_net(4), image, path)
    state = done.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    assert done.plan and done.history.similarity.gt(0).all()
    assert type(done.model) is type(dense) and not done.model.training


def test_callers_generator_goes_on(data, dense):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finetune(fresh(dense), data, recipe=replace(SHORT, epochs=0.5), augment=Shift())
    assert torch.equal(torch.rand(3), expected)


def test_gradients_that_a_caller_accumulates(data, dense, monkeypatch):
    "Training is the same whatever Accelerate was told, and its state is the caller's afterwards."
    expected = finetune(dense, data, recipe=SHORT)
    try:
        caller = Accelerator(cpu=True, gradient_accumulation_steps=4)
        net = caller.prepare(nn.Linear(3, 3))
        with caller.accumulate(net):
            caller.backward(net(torch.randn(2, 3)).sum())
        monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '8')
        done = finetune(dense, data, recipe=SHORT)
        assert caller.gradient_accumulation_steps == 4 and not caller.sync_gradients
    finally:
        monkeypatch.delenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', raising=False)
        Accelerator(cpu=True).gradient_state._set_sync_gradients(True)
    assert done.history.equals(expected.history)
    state = expected.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in done.model.state_dict().items())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype, data, dense):
    "An expanded layer keeps its factors in float32, and computes in its own precision."
    net = dense.to(dtype)
    assert accuracy(expand(net), data) == accuracy(net, data)
    done = boost(net, data, teacher=dense, recipe=SHORT, sp_weight=3)
    assert {p.dtype for p in done.model.parameters()} == {dtype}
    assert done.history.loss.iloc[-1] < done.history.loss.iloc[0]


class Attentive(nn.Module):
    "An attention layer on rows of pixels."

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(8, 16)
        self.block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.out = nn.Linear(16, 10)

    def forward(self, x):
        return self.out(self.block(self.into(x[:, 0])).mean(1))


def test_attention_on_the_whole_path(data):
    net, image = initialised(Attentive, 0).eval(), torch.zeros(2, 1, 8, 8)
    done = restore_and_boost(net, image, data, restoring=dict(ratio=0.5), recipe=SHORT)
    assert done.history.similarity.gt(0).all()


@settings(max_examples=100, deadline=None)
@given(
    images=st.integers(1, 50),
    batch=st.integers(1, 12),
    seed=st.integers(0, 9),
    first=st.integers(0, 30),
    more=st.integers(0, 20),
)
def test_order(images, batch, seed, first, more):
    """Any stretch of steps sees the images it would see in the whole run.

    No image comes twice in an epoch.
    """
    if batch > images:
        return
    between = lambda a, b: [p.tolist() for _, p in _batches(images, batch, seed, a, b)]
    whole = between(0, first + more)
    assert between(first, first + more) == whole[first:]
    per = images // batch
    for start in range(0, len(whole), per):
        epoch = whole[start : start + per]
        seen = [i for p in epoch for i in p]
        assert len(set(seen)) == len(seen)
        assert all(len(p) == batch for p in epoch)


@given(st.floats(1e-3, 10), st.floats(0, 149))
def test_scaled_schedule(factor, epoch):
    "At the same fraction of the way the rate is the same."
    if any(isclose(epoch, m, rel_tol=1e-9) for m in FINETUNING.milestones):
        return
    assert FINETUNING.scaled(factor).rate(epoch * factor) == FINETUNING.rate(epoch)
