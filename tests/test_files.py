"What is written into a file, by one or by several at once: all of it, and whole."

import multiprocessing
import sys
import threading

import numpy as np
import pytest
import torch

from lbyl_nb import files
from lbyl_nb.bench import append, results, sweep, trial
from lbyl_nb.cli import bench
from lbyl_nb.data import SETS, prepare
from lbyl_nb.expand import contract, expand
from lbyl_nb.files import (
    join_file,
    locked,
    read_safetensors,
    split_file,
    write_safetensors,
    writing,
)
from lbyl_nb.models import digits_net
from lbyl_nb.progress import progress
from lbyl_nb.recover import restore
from lbyl_nb.restorers import prune_only
from lbyl_nb.saved import load_restored, save_restored

WORKERS, ROWS = 3, 25
FORK = multiprocessing.get_context('fork')


def add_rows(path, who):
    for i in range(ROWS):
        append(path, dict(who=who, i=i))


def run(workers):
    "Start all and wait for all."
    for w in workers:
        w.start()
    for w in workers:
        w.join()


@pytest.mark.parametrize('kind', [FORK.Process, threading.Thread])
def test_every_row_of_everybody_is_there(kind, tmp_path):
    "Each writer's rows in its order, whoever starts the file."
    path = tmp_path / 'r.csv'
    run([kind(target=add_rows, args=(path, w)) for w in range(WORKERS)])
    rows = results(path)
    assert len(rows) == WORKERS * ROWS
    for _, part in rows.groupby('who'):
        assert part.i.tolist() == list(range(ROWS))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.r.csv.lock', 'r.csv']


def test_two_sweeps_share_a_file(tmp_path):
    "One goes through the settings forwards and one backwards."
    path, settings = tmp_path / 'new folder' / 'r.csv', [dict(ratio=r / 10) for r in range(8)]

    def work(order):
        sweep(path, order, lambda s: dict(double=2 * s['ratio']))

    run([threading.Thread(target=work, args=(order,)) for order in (settings, settings[::-1])])
    rows = results(path)
    assert sorted(rows.ratio) == [s['ratio'] for s in settings]
    assert (rows.double == 2 * rows.ratio).all()


def test_a_setting_that_two_measure_at_once_is_one_row(tmp_path):
    "Both are in the middle of measuring; both get the row that is in the file."
    both, rows = threading.Barrier(2, timeout=60), []

    def measure():
        return dict(who=both.wait())

    def work():
        rows.append(trial(tmp_path / 'r.csv', dict(seed=0), measure))

    run([threading.Thread(target=work) for _ in range(2)])
    [there] = results(tmp_path / 'r.csv').who
    assert [row['who'] for row in rows] == [there, there]


def test_two_threads_write_the_same_file(tmp_path):
    "Both have begun before one has ended; the file is what one of them wrote."
    path, both, done = tmp_path / 'note.txt', threading.Barrier(2, timeout=60), []

    def work(text):
        with writing(path) as t:
            t.write_text(text)
            both.wait()
            done.append(t.read_text() == text)

    texts = ['first', 'the second one']
    run([threading.Thread(target=work, args=(text,)) for text in texts])
    assert done == [True, True] and path.read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ['note.txt']


def test_a_failure_unlocks(tmp_path):
    path = tmp_path / 'r.csv'
    with pytest.raises(ZeroDivisionError):
        with locked(path):
            raise ZeroDivisionError
    append(path, dict(a=1))
    with pytest.raises(ValueError, match='another schema'):
        append(path, dict(b=1))
    append(path, dict(a=2))
    assert results(path).a.tolist() == [1, 2]


def test_images_are_downloaded_once(tmp_path, monkeypatch):
    "The second waits for the first, which gives it time to come in if it could."
    monkeypatch.setenv('LBYL_DATA', str(tmp_path))
    begun, second = [], threading.Event()

    def download(name, split, raw):
        begun.append(split)
        if len(begun) > 1:
            second.set()
        second.wait(1)
        n, (_, h, w) = SETS[name].counts[split], SETS[name].shape
        return np.zeros((n, h, w)), np.zeros(n)

    paths = []

    def work():
        paths.append(prepare('fashion_mnist', 'test', download))

    run([threading.Thread(target=work) for _ in range(2)])
    assert begun == ['test'] and paths == [tmp_path / 'fashion_mnist_test.npz'] * 2


@pytest.mark.parametrize('name', ['w.bin', 'w[1].bin', 'w*?.bin'])
@pytest.mark.parametrize('size', [0, 99, 100, 101, 250])
def test_what_is_split_is_joined_or_something_is_missing(name, size, tmp_path):
    file, folder, new = tmp_path / name, tmp_path / 'pieces', tmp_path / 'new'
    folder.mkdir(), new.mkdir()
    file.write_bytes(bytes(1000))
    split_file(file, folder, 100)  # an older, longer one
    whole = bytes(i % 251 for i in range(size))
    file.write_bytes(whole)
    pieces = split_file(file, folder, 100)
    assert sorted(folder.iterdir()) == sorted(pieces)
    assert b''.join(p.read_bytes() for p in sorted(folder.iterdir())) == whole  # as `cat` does
    assert join_file(folder, new / name).read_bytes() == whole
    for piece in pieces:
        (new / name).unlink(missing_ok=True)
        content = piece.read_bytes()
        piece.unlink()
        with pytest.raises(ValueError if len(pieces) > 1 else FileNotFoundError):
            join_file(folder, new / name)
        assert not (new / name).exists()
        piece.write_bytes(content)


def test_a_split_that_is_killed_leaves_no_mixture(tmp_path, monkeypatch):
    "Of two files with as many pieces, at any of them."
    file, folder, new = tmp_path / 'w.bin', tmp_path / 'pieces', tmp_path / 'new'
    folder.mkdir(), new.mkdir()
    for killed in range(3):
        file.write_bytes(b'a' * 250)
        split_file(file, folder, 100)
        file.write_bytes(b'b' * 250)
        with monkeypatch.context() as m:
            left = iter([writing] * killed)
            m.setattr(files, 'writing', lambda path: next(left)(path))
            with pytest.raises(StopIteration):
                split_file(file, folder, 100)
        with pytest.raises((ValueError, FileNotFoundError)):
            join_file(folder, new / 'w.bin')


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    real, link = tmp_path / 'far' / 'real.safetensors', tmp_path / 'link.safetensors'
    real.parent.mkdir()
    link.symlink_to(real)
    for value in (0.0, 1.0):  # where there is no file yet, and in place of one
        write_safetensors(dict(a=torch.full((2,), value)), link)
        assert link.is_symlink() and read_safetensors(real)[0]['a'].tolist() == [value] * 2
    rows = tmp_path / 'rows.csv'
    rows.symlink_to(tmp_path / 'far' / 'real.csv')
    append(rows, dict(a=1))
    append(tmp_path / 'far' / 'real.csv', dict(a=2))
    assert results(rows).a.tolist() == [1, 2] and rows.is_symlink()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]


class Writes:
    "What can write and no more."

    def write(self, text):
        pass

    def flush(self):
        pass


@pytest.mark.parametrize('there', [Writes(), None])
def test_a_bar_with_nowhere_to_be_shown(there, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', there)
    assert list(progress(range(3), delay=0, disable=False)) == [0, 1, 2]


def test_an_expanded_network_is_contracted_before_it_is_saved(tmp_path):
    net, image, file = digits_net(4).eval(), torch.zeros(1, 1, 8, 8), tmp_path / 'w.safetensors'
    r = restore(net, image, ratio=0.5, restorer=prune_only())
    with pytest.raises(ValueError, match='features.0 is expanded: contract the model first'):
        save_restored(expand(r.model), r.plan, file)
    assert not file.exists()
    with pytest.raises(ValueError, match='it is expanded: contract it first'):
        restore(expand(net), image, ratio=0.5)
    compact = contract(expand(r.model))
    save_restored(compact, r.plan, file)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(load_restored(digits_net(4), image, file).eval()(x), compact(x))


@pytest.mark.parametrize('device', ['gpu', 'cuda:99'])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(SystemExit, match=f'^lbyl-bench: device: {device}: .+'):
        bench('resnet20_cifar10', device=device)
