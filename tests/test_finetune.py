"""Fine-tuning in two processes, killed for good, on the whole path.

And what its schedule and order of images promise for any numbers.
"""

import copy
import signal
import sys
from dataclasses import replace
from functools import partial
from math import isclose

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, MoreState, call
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_similarity import Attentive
from torch import nn
from torch.nn.utils import prune

from lbyl_nb.bench import accuracy
from lbyl_nb.data import Dataset, crop_flip, digits, subset
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


SHUFFLED = torch.randperm(256, generator=torch.Generator().manual_seed(0))


def changed(net, change):
    net = copy.deepcopy(net)
    with torch.no_grad():
        change(net)
    return net


def times(factor):
    return lambda x: x * factor


ANOTHER = dict(  # what is told apart: the first call, the second
    augment=(dict(augment=lambda x: x), dict(augment=lambda x: -x)),
    enclosed=(dict(augment=times(1)), dict(augment=times(-1))),
    arguments=[dict(augment=partial(crop_flip, pad=p)) for p in (1, 3)],
    labels=({}, dict(data=lambda d: Dataset(d.images, d.labels[SHUFFLED]))),
    pixels=({}, dict(data=lambda d: Dataset(d.images.flip(-1), d.labels))),
    frozen=({}, dict(net=lambda n: n.features.requires_grad_(False))),
    modules=({}, dict(net=lambda n: setattr(n.features, '2', nn.GELU()))),
    precision=({}, dict(net=lambda n: n.double())),
    negated=({}, dict(net=lambda n: n.classifier.weight.neg_())),
    turned=({}, dict(net=lambda n: n.classifier.weight.copy_(n.classifier.weight.flip(0)))),
)


@pytest.mark.parametrize('what', ANOTHER)
def test_checkpoint_of_another_run(what, tmp_path, data, dense):
    "A second call that is not the first one is refused; the first one again gives what it gave."
    path = tmp_path / 'c.safetensors'

    def train(data=data, net=dense, **how):
        data = data if isinstance(data, Dataset) else data(TRAINING)
        net = net if isinstance(net, nn.Module) else changed(dense, net)
        short = replace(SHORT, epochs=0.5)
        return finetune(net, data, recipe=short, checkpoint=path, **how).model.state_dict()

    TRAINING = data
    first, second = ANOTHER[what]
    done = train(**first)
    with pytest.raises(ValueError, match='checkpoint of another run'):
        train(**second)
    again = train(**first)
    assert all(torch.equal(v, again[k]) for k, v in done.items())


class Running(nn.Module):
    "A network with a running mean of its scores that is not saved."

    def __init__(self):
        super().__init__()
        self.net = digits_net(4)
        self.register_buffer('mean', torch.zeros(10), persistent=False)
        self.register_buffer('steps', None, persistent=False)
        self.register_buffer(
            'one', torch.ones(1).expand(10), persistent=False
        )  # no room of its own
        self.twin = nn.Module()
        self.twin.register_buffer('mean', self.mean, persistent=False)

    def forward(self, x):
        y = self.net(x)
        if self.training:
            self.mean.lerp_(y.detach().mean(0), 0.1)
            self.steps = torch.ones(()) if self.steps is None else self.steps + 1
        return y - self.twin.mean * self.one


class Stop(Exception):
    pass


class Until:
    "Images as they are, up to a call."

    def __init__(self, calls):
        self.left = calls

    def __call__(self, x):
        self.left -= 1
        if self.left < 0:
            raise Stop
        return x


def test_buffers_that_are_not_saved(tmp_path, data):
    "They come back with the network, and with a checkpoint."
    net, path = initialised(Running, 0).eval(), tmp_path / 'c.safetensors'
    train = partial(finetune, net, data, recipe=replace(SHORT, lr=0.1), eval_set=data)
    whole = train(augment=Until(99))
    right, n = accuracy(whole.model, data)
    assert 100 * right / n == whole.history.eval_accuracy.iloc[-1]
    assert whole.model.mean.abs().max() > 0 and not net.mean.any()
    assert whole.model.twin.mean is whole.model.mean
    assert whole.model.steps == 12 and net.steps is None
    with pytest.raises(Stop):
        train(augment=Until(9), checkpoint=path)
    rest = train(augment=Until(4), checkpoint=path)
    assert rest.history.equals(whole.history)
    assert torch.equal(rest.model.mean, whole.model.mean) and rest.model.steps == 12


class Extra(MoreState, nn.Conv2d):
    pass


def test_state_that_is_no_tensor(tmp_path, data, dense):
    "Training needs none of it; a checkpoint can't hold it."
    net = copy.deepcopy(dense)
    net.features[0] = Extra(1, 4, 3, padding=1, bias=False)
    net.features[0].load_state_dict(dense.features[0].state_dict(), strict=False)
    done, expected = (finetune(n, data, recipe=SHORT).history for n in (net, dense))
    assert done.equals(expected)
    with pytest.raises(ValueError, match='features.0._extra_state is no tensor but dict'):
        finetune(net, data, recipe=SHORT, checkpoint=tmp_path / 'c.safetensors')


def test_numbers_of_other_libraries(tmp_path, data, dense):
    "They are written to a checkpoint like Python's own, and are the same run."
    path = tmp_path / 'c.safetensors'
    short = replace(SHORT, lr=0.5)
    other = replace(SHORT, lr=np.float32(0.5), epochs=np.int64(3), milestones=np.array([2]))
    how = dict(mean=torch.tensor([0.5]), std=np.array([0.5]), seed=np.int64(3), every=np.int64(2))
    done = finetune(dense, data, recipe=other, checkpoint=path, **how)
    again = finetune(dense, data, recipe=short, checkpoint=path, seed=3, every=2)
    own = finetune(dense, data, recipe=short, seed=3, every=2)
    assert again.history.equals(done.history) and own.history.equals(done.history)


NO_SETS = {
    'eval_set: there are no images': lambda d: (d, dict(eval_set=d[:0])),
    'train_set: there are no images': lambda d: (d[:0], {}),
    'train_set: 512 images and 256': lambda d: (Dataset(d.images.repeat(2, 1, 1, 1), d.labels), {}),
    'train_set: must be a': lambda d: (torch.utils.data.DataLoader(d), {}),
    'eval_set: must be a': lambda d: (
        d,
        dict(eval_set=torch.utils.data.TensorDataset(d.images, d.labels)),
    ),
    'mean: one number for each colour': lambda d: (d, dict(mean=0.5)),
    'std: one number for each colour': lambda d: (d, dict(std=torch.tensor(0.5))),
}


@pytest.mark.parametrize('says', NO_SETS)
def test_wrong_arguments_before_training(says, data, dense):
    train_set, how = NO_SETS[says](data)
    with pytest.raises((TypeError, ValueError), match=says):
        finetune(dense, train_set, recipe=SHORT, augment=Until(0), **how)


def test_no_folder_is_noticed_before_training(tmp_path, data, dense):
    how = dict(restoring=dict(ratio=0.5), recipe=SHORT, augment=Until(0))
    with pytest.raises(FileNotFoundError, match='there is no folder'):
        restore_and_boost(dense, torch.zeros(1, 1, 8, 8), data, path=tmp_path / 'no/s', **how)


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_fresh_leaves_nothing_alone(dense):
    "Layers whose weight is computed from other parameters are refused."
    kinds = {
        'weight_orig': lambda m: prune.l1_unstructured(m, 'weight', 0.5),
        'weight_[gv]': nn.utils.weight_norm,
    }
    for k, change in kinds.items():
        net = copy.deepcopy(dense)
        net.classifier = change(net.classifier)
        with torch.no_grad():
            net(torch.zeros(1, 1, 8, 8))  # from now on its weight can be copied
        with pytest.raises(ValueError, match=f'classifier.{k}: reset_parameters of Linear'):
            fresh(net)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype, data, dense):
    "An expanded layer keeps its factors in float32, and computes in its own precision."
    net = dense.to(dtype)
    assert accuracy(expand(net), data) == accuracy(net, data)
    done = boost(net, data, teacher=dense, recipe=SHORT, sp_weight=3)
    assert {p.dtype for p in done.model.parameters()} == {dtype}
    assert done.history.loss.iloc[-1] < done.history.loss.iloc[0]


class Rows(Attentive):
    "An attention layer on rows of pixels."

    def forward(self, x):
        return super().forward(x[:, 0])


def test_attention_on_the_whole_path(data):
    net, image = initialised(Rows, 0).eval(), torch.zeros(2, 1, 8, 8)
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
