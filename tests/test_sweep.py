"""Sweeps side by side: the rows of one process, whatever runs the trials, and none lost but a
killer's."""

import os
import signal
import subprocess
import time

import joblib
import pytest
from conftest import command

from lbyl_nb.bench import environment, results, sweep

SETTINGS = [dict(n=n, kind=k) for n in range(4) for k in ('even', 'odd')]


def counting(folder, killer=None, failing=None):
    "A measurement that leaves a file for each of its calls, and the number of its process in it."

    def measure(s):
        name = f'{s["n"]}-{s["kind"]}'
        with open(folder / name, 'a') as f:
            f.write(f'{os.getpid()}\n')
        time.sleep(0.05)
        if name == killer:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == failing:
            raise ArithmeticError(f'{name} cannot be measured')
        return dict(product=s['n'] * (1 + (s['kind'] == 'odd')), third=s['n'] / 3)

    return measure


def calls(folder) -> dict:
    "How often each trial was measured, and by which processes."
    return {p.name: p.read_text().split() for p in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'calls').mkdir()
    return tmp_path


def by_hand():
    "The rows that every sweep of `SETTINGS` must have, worked out without it."
    products = [0, 0, 1, 2, 2, 4, 3, 6]
    return [(n // 2, ('even', 'odd')[n % 2], p, (n // 2) / 3) for n, p in enumerate(products)]


def rows(table):
    return list(table[['n', 'kind', 'product', 'third']].itertuples(index=False, name=None))


@pytest.mark.parametrize('parallel', [None, 1, 2])
def test_processes_give_the_same_rows(folder, parallel):
    path, measure = folder / 'r.csv', counting(folder / 'calls')
    table = sweep(path, SETTINGS, measure, parallel=parallel)
    assert rows(table) == by_hand()
    assert sorted(rows(results(path))) == by_hand()
    assert set(table.torch) == {environment()['torch']}
    done = calls(folder / 'calls')
    assert len(done) == 8 and all(len(pids) == 1 for pids in done.values())
    here = {pid == str(os.getpid()) for pids in done.values() for pid in pids}
    if parallel in (None, 1):
        assert here == {True}
    if parallel == 2:
        assert here == {False}


def test_a_dask_cluster_gives_the_same_rows(folder):
    distributed = pytest.importorskip('distributed', reason='dask.distributed is not installed')
    path, measure = folder / 'r.csv', counting(folder / 'calls')
    how = dict(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with distributed.LocalCluster(**how) as cluster, distributed.Client(cluster):
        with joblib.parallel_config('dask'):
            table = sweep(path, SETTINGS, measure, parallel=-1)
    assert rows(table) == by_hand() and sorted(rows(results(path))) == by_hand()
    processes = {pid for pids in calls(folder / 'calls').values() for pid in pids}
    assert str(os.getpid()) not in processes


def test_finished_rows_are_kept_and_the_rest_is_measured(folder):
    path, measure = folder / 'r.csv', counting(folder / 'calls')
    sweep(path, SETTINGS[2:5], measure)
    assert rows(sweep(path, SETTINGS, measure, parallel=2)) == by_hand()
    assert all(len(pids) == 1 for pids in calls(folder / 'calls').values())


@pytest.mark.parametrize('killer', ['0-even', '2-odd'])
def test_a_killed_worker_loses_its_own_trial_alone(folder, killer):
    path, measure = folder / 'r.csv', counting(folder / 'calls', killer)
    said = f'1 of 8 trials ended their process.*{killer[0]}.*{killer[2:]}'
    with pytest.raises(RuntimeError, match=said):
        sweep(path, SETTINGS, measure, parallel=2)
    lost = [r for r in by_hand() if f'{r[0]}-{r[1]}' == killer]
    assert sorted(rows(results(path)) + lost) == by_hand()
    again = sweep(path, SETTINGS, counting(folder / 'calls'))
    assert rows(again) == by_hand()


def test_all_killers_are_named_by_number(folder):
    measure = lambda s: os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match='3 of 3 trials'):
        sweep(folder / 'r.csv', SETTINGS[:3], measure, parallel=2)
    assert not (folder / 'r.csv').exists()


def test_an_error_in_a_process_is_the_error_of_the_sweep(folder):
    path, measure = folder / 'r.csv', counting(folder / 'calls', failing='1-odd')
    with pytest.raises(ArithmeticError, match='1-odd cannot be measured'):
        sweep(path, SETTINGS, measure, parallel=2)
    assert rows(sweep(path, SETTINGS, counting(folder / 'calls'))) == by_hand()


def test_a_relative_path_is_the_callers(folder, monkeypatch):
    monkeypatch.chdir(folder)
    table = sweep('r.csv', SETTINGS, counting(folder / 'calls'), parallel=2)
    assert rows(table) == by_hand() and sorted(rows(results(folder / 'r.csv'))) == by_hand()


def bench(*args):
    run = [command('lbyl-bench'), *map(str, args)]
    return subprocess.run(run, capture_output=True, text=True)


def test_jobs_on_the_command_line(folder, weights_dir, data_dir):
    "Two processes count what one counts."
    name = 'lenet_300_100_fashion_mnist'
    if not (weights_dir / f'{name}.safetensors').exists():
        pytest.skip(f'{name} is not at hand')
    how = ['--ratios', '0.5,0.7', '--images', 500]
    for jobs in (1, 2):
        run = bench(name, '--results', folder / f'{jobs}.csv', '--jobs', jobs, *how)
        assert run.returncode == 0, run.stderr
    one, two = (results(folder / f'{jobs}.csv') for jobs in (1, 2))
    keys = ['ratio', 'restorer', 'right']
    assert len(one) == 7
    assert sorted(map(str, one[keys].values)) == sorted(map(str, two[keys].values))


@pytest.mark.parametrize('jobs', [0, -2])
def test_a_number_of_jobs_that_is_none(jobs):
    run = bench('lenet_300_100_fashion_mnist', '--jobs', jobs)
    assert run.returncode == 1
    assert run.stderr.strip() == f'lbyl-bench: jobs: {jobs} is neither -1 nor a number of processes'


def consuming(s):
    "Takes a value out of what it is given, and changes another."
    s['n'] = 100 * s['n']
    return dict(size=s['n'] + len(s.pop('kind')))


def test_a_measurement_may_change_what_it_is_given(tmp_path):
    for path in (tmp_path / 'a.csv', tmp_path / 'a.csv'):
        rows = sweep(path, SETTINGS, consuming)
        assert rows[['n', 'kind']].to_dict('records') == SETTINGS
        assert rows['size'].tolist() == [100 * s['n'] + len(s['kind']) for s in SETTINGS]
