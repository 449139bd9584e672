"What several threads and processes write into one file: all of it, and whole."

import multiprocessing
import threading

import numpy as np
import pytest

from lbyl_nb.bench import append, results, sweep, trial
from lbyl_nb.data import SETS, prepare
from lbyl_nb.files import locked, writing

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
