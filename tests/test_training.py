"What a checkpoint of `train` belongs to, and what training leaves of a network that it is refused."

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lbyl_nb.bench import accuracy, append, results, train, trial
from lbyl_nb.data import Dataset, crop_flip, digits, subset
from lbyl_nb.finetune import Recipe, finetune
from lbyl_nb.models import digits_net, initialised

IMAGES = subset(digits()[0], 128)
SHORT = Recipe(2, batch=64)


def net(seed=0, **options):
    return initialised(lambda: digits_net(4, **options), seed)


def trained(model, images=IMAGES, epochs=2, **how):
    return train(model, images, epochs, batch=64, **how)


def slow(parameters, lr, weight_decay):
    return torch.optim.SGD(parameters, lr, momentum=0.5, weight_decay=weight_decay)


def half_frozen():
    model = net()
    model.features.requires_grad_(False)
    return model


def gelu():
    "The same parameters, another function of them."
    model = net()
    for name, m in list(model.named_modules()):
        if isinstance(m, nn.ReLU):
            model.set_submodule(name, nn.GELU())
    return model


def in_other_modes():
    model = net()
    model.features[1].eval()
    return model


FLIPPED = Dataset(IMAGES.images.flip(-1), IMAGES.labels)
OTHERS = dict(
    start=lambda p: trained(net(1), checkpoint=p),
    labels=lambda p: trained(net(), Dataset(IMAGES.images, IMAGES.labels.flip(0)), checkpoint=p),
    images=lambda p: trained(net(), FLIPPED, checkpoint=p),
    augment=lambda p: trained(net(), checkpoint=p, augment=lambda x: -x),
    mean=lambda p: trained(net(), checkpoint=p, mean=(0.1,)),
    std=lambda p: trained(net(), checkpoint=p, std=(0.2,)),
    autocast=lambda p: trained(net(), checkpoint=p, autocast=torch.bfloat16),
    optimizer=lambda p: trained(net(), checkpoint=p, optimizer=slow),
    network=lambda p: trained(gelu(), checkpoint=p),
)


@pytest.mark.parametrize('differs', OTHERS)
def test_another_run_is_refused(differs, tmp_path):
    "Whatever it differs in is named; and it is a run that ends elsewhere."
    file = tmp_path / 'run.pt'
    first = trained(net(), checkpoint=file).state_dict()
    with pytest.raises(ValueError, match=f'run.pt is the checkpoint of another run.*{differs} '):
        OTHERS[differs](file)
    other = OTHERS[differs](None).state_dict()
    assert any(not torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize('build', [half_frozen, in_other_modes])
def test_frozen_parts_make_another_run(build, tmp_path):
    trained(net(), checkpoint=tmp_path / 'run.pt')
    with pytest.raises(ValueError, match='another run: network'):
        trained(build(), checkpoint=tmp_path / 'run.pt')


def test_arguments_of_an_augmentation_count(tmp_path):
    how = lambda pad: dict(checkpoint=tmp_path / 'run.pt', augment=partial(crop_flip, pad=pad))
    a = trained(net(), **how(1)).state_dict()
    b = trained(net(), **how(1)).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ValueError, match='another run: augment'):
        trained(net(), **how(3))


def break_off(at):
    "An augmentation that breaks off at a call, the first time it gets there."
    calls = iter(range(at + 1))

    def augment(x):
        if next(calls, None) == at:
            raise KeyboardInterrupt
        return x

    return augment


@pytest.mark.parametrize('mode', [True, False])
def test_the_same_call_with_the_same_network_goes_on(mode, tmp_path):
    "In a notebook the network is at hand that was interrupted in the middle of an epoch."
    model, how = net().train(mode), dict(checkpoint=tmp_path / 'run.pt', augment=break_off(3))
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        trained(model, **how)
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())
    assert torch.load(tmp_path / 'run.pt', weights_only=True)['epoch'] == 1
    assert all(m.training == mode for m in model.modules())
    whole = trained(net().train(mode)).state_dict()
    for _ in range(2):  # once more when it is complete
        ended = trained(model, **how).state_dict()
        assert all(torch.equal(v, whole[k]) for k, v in ended.items())


def test_without_a_checkpoint_what_was_learned_stays():
    model = net()
    with pytest.raises(KeyboardInterrupt):
        trained(model, augment=break_off(3))
    assert not torch.equal(model.classifier.weight, net().classifier.weight)


@pytest.mark.parametrize('mode', [True, False])
def test_a_refused_checkpoint_changes_nothing(mode, tmp_path):
    "Of another architecture, cut off anywhere, of weights alone, no checkpoint at all."
    file = tmp_path / 'run.pt'
    trained(net(), checkpoint=file)
    whole, other = file.read_bytes(), digits_net(4, num_classes=7).train(mode)
    before = copy.deepcopy(other.state_dict())
    seven = Dataset(IMAGES.images, IMAGES.labels % 7)
    with pytest.raises(ValueError, match='another run.*network'):
        trained(other, seven, checkpoint=file)
    torch.save(net().state_dict(), tmp_path / 'weights.pt')
    torch.save([1, 2], tmp_path / 'list.pt')
    bad = [whole[:n] for n in (0, 5, len(whole) // 2, len(whole) - 1)]
    bad += [b'no checkpoint', *((tmp_path / f).read_bytes() for f in ('weights.pt', 'list.pt'))]
    for content in bad:
        file.write_bytes(content)
        with pytest.raises(ValueError, match='run.pt: truncated, or not a checkpoint'):
            trained(other, seven, checkpoint=file)
        assert file.read_bytes() == content
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    assert all(m.training == mode for m in other.modules())


def test_frozen_norms_stay_as_they_are():
    "As with the layer that a batch norm in evaluation mode is: a product and a sum."
    model = net()
    frozen = model.features[1].eval()
    frozen.running_mean.uniform_(-1, 1)
    frozen.requires_grad_(False)
    scale = frozen.weight / (frozen.running_var + frozen.eps).sqrt()
    by_hand = nn.Conv2d(4, 4, 1, groups=4)
    by_hand.weight.data[:, 0, 0, 0] = scale
    by_hand.bias.data[:] = frozen.bias - frozen.running_mean * scale
    same = copy.deepcopy(model)
    same.features[1] = by_hand.requires_grad_(False)
    mean = frozen.running_mean.clone()
    trained(model, lr=0.01), trained(same, lr=0.01)
    assert torch.equal(frozen.running_mean, mean) and not frozen.training and model.training
    torch.testing.assert_close(model.classifier.weight, same.classifier.weight)


def test_a_network_in_evaluation_mode_is_trained_in_all_its_parts():
    model = net().eval()
    model.features[3].train()
    modes = [m.training for m in model.modules()]
    mean = model.features[1].running_mean.clone()
    trained(model)
    assert not torch.equal(model.features[1].running_mean, mean)
    with pytest.raises(ZeroDivisionError):
        trained(model, augment=lambda x: 1 / 0)
    assert [m.training for m in model.modules()] == modes


def test_what_an_argument_must_be():
    for how, error, says in (
        (dict(mean=0.5), TypeError, 'mean: 0.5 is no tuple'),
        (dict(std=None), TypeError, 'std: None is no tuple'),
        (dict(mean=(0.1, 0.2)), ValueError, '2 and 1 numbers for 1 channels'),
        (dict(epochs=1.5), TypeError, 'epochs: 1.5 is no whole number'),
        (dict(epochs=-1), ValueError, 'epochs: -1'),
    ):
        with pytest.raises(error, match=says):
            trained(net(), **how)


class Tabled(nn.Module):
    "It makes a table at its first call and keeps it."

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.table = nn.Conv2d(1, 4, 3), nn.Linear(4, 10), None

    def forward(self, x):
        x = self.conv(x)
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1])
        return self.fc((x * self.table).relu().mean((2, 3)))


def test_what_is_measured_can_be_trained():
    model = Tabled()
    accuracy(model, IMAGES)
    F.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.arange(4)).backward()
    assert model.conv.weight.grad is not None


TEXTS = ['50%\r100%', 'a\r\nb', 'a\nb', '"', ',', '12e4567', '1_000', 'nan', '١٢', ' 1', '2.15.0']


def test_a_text_is_read_as_it_was_written(tmp_path):
    file = tmp_path / 'r.csv'
    for i, text in enumerate(TEXTS):
        assert append(file, dict(i=i, note=text)) == dict(i=i, note=text)
        assert results(file).note.tolist() == TEXTS[: i + 1]


@pytest.mark.parametrize('text', ['1', '0.5', '1e5', '007', 'True', 'inf'])
def test_a_setting_that_reads_as_another_is_refused(text, tmp_path):
    "Before it is measured; nothing is written."
    with pytest.raises(ValueError, match=f"setting a: the text '{text}' would be read back as"):
        trial(tmp_path / 'r.csv', dict(a=text), lambda: pytest.fail('measured'))
    assert not list(tmp_path.iterdir())


class Mixed:
    "Draws with NumPy and Python, as mixing two images does; fails at a call."

    def __init__(self, fails=None):
        self.calls, self.fails = 0, fails

    def __repr__(self):
        return 'Mixed()'

    def __call__(self, x):
        self.calls += 1
        if self.calls == self.fails:
            raise KeyboardInterrupt
        return x * np.random.uniform(0.5, 1.5) + random.random()


@pytest.mark.parametrize(
    'run', [trained, lambda net, **how: finetune(net, IMAGES, recipe=SHORT, **how)]
)
def test_every_generator_follows_the_seed(run, tmp_path):
    "The same call twice, and one that was interrupted, give the same; the caller's are left alone."
    state = np.random.get_state()[1].copy(), random.getstate()
    weights = lambda done: [*getattr(done, 'model', done).parameters()]
    once, twice = (weights(run(net(), augment=Mixed())) for _ in range(2))
    path = tmp_path / 'run.pt'
    with pytest.raises(KeyboardInterrupt):
        run(net(), augment=Mixed(fails=4), checkpoint=path)
    resumed = weights(run(net(), augment=Mixed(), checkpoint=path))
    assert all(map(torch.equal, once, twice)) and all(map(torch.equal, once, resumed))
    assert (np.random.get_state()[1] == state[0]).all() and random.getstate() == state[1]


def test_numbers_of_numpy_are_written_as_they_are_read(tmp_path):
    how = dict(lr=np.float32(0.05), weight_decay=np.float64(1e-4), seed=np.int64(3))
    path = tmp_path / 'run.pt'
    first = trained(net(), epochs=np.int64(2), checkpoint=path, **how)
    again = trained(net(), epochs=2, checkpoint=path, **how)
    assert all(map(torch.equal, first.parameters(), again.parameters()))


def test_a_folder_that_is_not_there_is_found_before_training(tmp_path):
    augment = Mixed()
    with pytest.raises(FileNotFoundError, match='there is no folder'):
        trained(net(), augment=augment, checkpoint=tmp_path / 'none' / 'run.pt')
    assert not augment.calls
