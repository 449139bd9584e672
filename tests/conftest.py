"""What all tests share.

Where things are, a throw-away copy of the project, and data and weights where there are any.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from configparser import ConfigParser
from pathlib import Path

import pytest

# beside other programs, threads that wait for each other take ten times as long
os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
LIB = ROOT / 'lbyl_nb'
# data and weights may lie beside the project; without them the tests that need them are skipped
SHARED = ROOT.parent / 'shared'
NOTEBOOKS = sorted(p.name for p in NBS.glob('*.ipynb'))
BUILT = shutil.ignore_patterns(
    '.git',
    '.venv',
    '_proc',
    '_docs',
    'build',
    'dist',
    '*.egg-info',
    '__pycache__',
    '.ipynb_checkpoints',
    '.pytest_cache',
    '.hypothesis',
    'demo.png',
)


# files whose tests together take two minutes; `-k fast` runs them
FAST = 'bad_models cost elsewhere files graph kinds layerwise papers project prose reach'
FAST += ' similarity style'


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix('test_') in FAST.split():
            item.add_marker('fast')


def settings():
    "What settings.ini says, as a mapping."
    parser = ConfigParser(delimiters='=', interpolation=None)
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def cells(notebook, kind=None):
    "Cells of a notebook (a path), all or of one kind, each with its source joined to one string."
    found = json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']
    return [dict(c, source=''.join(c['source'])) for c in found if kind in (None, c['cell_type'])]


class MoreState:
    "Part of a layer that keeps more in its state than tensors."

    def get_extra_state(self):
        return dict(version=1)

    def set_extra_state(self, state):
        pass


def command(name):
    "Path of a console script of the environment that the tests run in."
    return str(Path(sysconfig.get_path('scripts')) / name)


# What a command run by a test must not inherit: nbdev's sign that a notebook is running, which
# nbdev-export obeys, and what `make test` was told.
NOT_INHERITED = {
    'IN_TEST',
    'MAKEFLAGS',
    'MFLAGS',
    'MAKEOVERRIDES',
    'MAKELEVEL',
    'PYTHON',
    'ARGS',
    'PYTHONPATH',
}


# glibc hands large tensors back to the system and faults their pages in again: half of the time. A
# process that is not short would fill the memory with pieces this way.
KEEPING = dict(MALLOC_MMAP_THRESHOLD_='4294967296', MALLOC_TRIM_THRESHOLD_='4294967296')


def environment(**env):
    "Variables of a process with one thread: what it inherits, and on top what is given."
    inherited = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    env = {**inherited, 'OMP_NUM_THREADS': '1', **KEEPING, **env}
    return {k: v for k, v in env.items() if v is not None}


def call(*args, cwd, timeout=600, **env):
    """Run a command with one thread; its completed process, output and errors in one text.

    `env` is put on top of the environment; None takes a variable away.
    """
    return subprocess.run(
        [str(a) for a in args],
        cwd=cwd,
        env=environment(**env),
        timeout=timeout,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture
def project(tmp_path):
    "A copy of the working tree, without what was built, for a test to change."
    return Path(shutil.copytree(ROOT, tmp_path / 'project', ignore=BUILT, symlinks=True))


@pytest.fixture(scope='session')
def data_dir():
    """Folder with NAME_{train,test}.npz, named in $LBYL_DATA for as long as the tests run.

    It is what $LBYL_DATA names already, else the package's own cache folder, filled from the
    images beside the project.
    """
    unpack = SHARED / 'data' / 'unpack.py'
    if os.environ.get('LBYL_DATA'):
        folder = Path(os.environ['LBYL_DATA']).expanduser()
    elif unpack.exists():
        folder = Path.home() / '.cache' / 'lbyl_nb'
        command = [sys.executable, str(unpack), str(folder), 'cifar10', 'fashion_mnist']
        subprocess.run(command, check=True)
    else:
        pytest.skip('no images: $LBYL_DATA is not set and ../shared/data/unpack.py does not exist')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LBYL_DATA', str(folder))
        yield folder


@pytest.fixture(scope='session')
def weights_dir():
    """Folder with the trained networks, named in $LBYL_WEIGHTS for as long as the tests run.

    It is what $LBYL_WEIGHTS names already, else the one beside the project.
    """
    folder = Path(os.environ.get('LBYL_WEIGHTS') or SHARED / 'weights').expanduser()
    if not list(folder.glob('*.safetensors')):
        none = 'no trained networks: $LBYL_WEIGHTS is not set and ../shared/weights holds none'
        pytest.skip(none)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LBYL_WEIGHTS', str(folder))
        yield folder


@pytest.fixture
def one_thread():
    "One thread, as scripts run by tests have: sums depend on their number in their last digits."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
