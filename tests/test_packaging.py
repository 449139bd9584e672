"What settings.ini promises is what is built, what is installed, and what the modules import."

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from conftest import BUILT, LIB, ROOT, call, settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# where a distribution's name is not its module's
IMPORTED_AS = {'scikit-learn': 'sklearn', 'torch-pruning': 'torch_pruning', 'pillow': 'PIL'}
SMALL = """
import torch, lbyl_nb
from torch import nn
from lbyl_nb.recover import lbyl_restore
net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
small = lbyl_restore(net, torch.randn(2, 8), ratio=.5)
assert small(torch.randn(5, 8)).shape == (5, 3)
assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
print(lbyl_nb.__file__)
"""


def named(requirements):
    return {canonicalize_name(Requirement(r).name) for r in requirements.split()}


def parsed(requirements, extra=None):
    "Requirements in a normal form, to compare those of settings.ini with those of a package."
    found = []
    for r in map(Requirement, requirements):
        if extra:
            assert str(r.marker) == f'extra == "{extra}"'
        found.append((canonicalize_name(r.name), str(r.specifier)))
    return sorted(found)


def imports(path):
    "Top-level names of the modules, other than its own, that a Python file imports anywhere in it."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (a.name.split('.')[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split('.')[0]


def third_party():
    imported = {m for p in LIB.rglob('*.py') for m in imports(p)}
    return imported - set(sys.stdlib_module_names) - {LIB.name}


def test_requirements_are_what_the_modules_import():
    """Nothing is imported that a plain installation would lack.

    And nothing is installed that no module imports.
    """
    required = named(settings()['requirements'])
    assert {IMPORTED_AS.get(n, n.replace('-', '_')) for n in required} == third_party()


def test_tools_of_development_are_extra():
    run, dev = named(settings()['requirements']), named(settings()['dev_requirements'])
    assert {'nbdev', 'jupyterlab', 'pytest'} <= dev
    assert not run & dev


def test_one_version():
    import lbyl_nb

    assert lbyl_nb.__version__ == settings()['version']


def test_pyproject_repeats_nothing():
    "A [project] table would state the package a second time."
    tables = re.findall(r'^\[(.+)\]', (ROOT / 'pyproject.toml').read_text(encoding='utf-8'), re.M)
    assert 'tool.nbdev' in tables and 'project' not in tables


@pytest.mark.parametrize('line', settings()['console_scripts'].split())
def test_command_is_a_function(line):
    module, function = line.split('=')[1].split(':')
    assert callable(getattr(import_module(module), function))


@pytest.fixture(scope='session')
def built(tmp_path_factory):
    """Folder with the sdist and the wheel made from it.

    By the setuptools that is installed here: nothing is fetched.
    """
    copy = tmp_path_factory.mktemp('build') / 'project'
    shutil.copytree(ROOT, copy, ignore=BUILT, symlinks=True)
    dist = copy / 'dist'
    build = '-m', 'build', '--no-isolation', '--outdir', dist
    run = call(sys.executable, *build, copy, cwd=copy.parent)
    assert run.returncode == 0, run.stdout
    return dist


@pytest.fixture(scope='session')
def wheel(built):
    [path] = built.glob('*.whl')
    return path


def test_sdist_holds_what_it_is_built_from(built):
    [path] = built.glob('*.tar.gz')
    with tarfile.open(path) as tar:
        names = {n.partition('/')[2] for n in tar.getnames()}
    assert {'settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'} <= names
    assert {f'{LIB.name}/{p.name}' for p in LIB.glob('*.py')} <= names


def test_wheel_holds_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = [n for n in z.namelist() if '.dist-info/' not in n]
    assert sorted(names) == sorted(p.relative_to(ROOT).as_posix() for p in LIB.rglob('*.py'))


FIELDS = dict(
    lib_name='Name',
    version='Version',
    description='Summary',
    license='License',
    author='Author',
)


def test_wheel_says_what_settings_say(wheel):
    with zipfile.ZipFile(wheel) as z:
        [info] = {n.split('/')[0] for n in z.namelist() if '.dist-info/' in n}
        meta = email.message_from_bytes(z.read(f'{info}/METADATA'))
        entries = z.read(f'{info}/entry_points.txt').decode()
        assert any(n.endswith('/LICENSE') for n in z.namelist())
    said = settings()
    for key, field in FIELDS.items():
        assert meta[field] == said[key]
    assert meta['Requires-Python'] == f'>={said["min_python"]}'
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert meta.get_payload(decode=True).decode().strip() == readme.strip()
    run = [r for r in meta.get_all('Requires-Dist') if 'extra ==' not in r]
    dev = [r for r in meta.get_all('Requires-Dist') if 'extra ==' in r]
    assert parsed(run) == parsed(said['requirements'].split())
    assert parsed(dev, 'dev') == parsed(said['dev_requirements'].split())
    for line in said['console_scripts'].split():
        assert line.replace('=', ' = ') in entries
    assert f'{LIB.name} = {LIB.name}._modidx:d' in entries


def fresh(folder):
    "A new virtual environment; its Python."
    subprocess.run([sys.executable, '-m', 'venv', str(folder)], check=True)
    return folder / 'bin' / 'python'


def lies_in(folder, printed):
    return Path(printed.strip().splitlines()[-1]).resolve().is_relative_to(folder.resolve())


def test_wheel_works_where_the_project_is_not(wheel, tmp_path):
    """Installed alone into a new environment, the package restores a network.

    The environment borrows only the dependencies.
    """
    python = fresh(tmp_path / 'env')
    run = call(python, '-m', 'pip', 'install', '--no-deps', '--no-index', wheel, cwd=tmp_path)
    assert run.returncode == 0, run.stdout
    site = next((tmp_path / 'env').glob('lib/python*/site-packages'))
    borrowed = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}
    (site / 'borrowed.pth').write_text('\n'.join(borrowed))
    run = call(python, '-I', '-c', SMALL, cwd=tmp_path)
    assert run.returncode == 0, run.stdout
    assert lies_in(tmp_path / 'env', run.stdout), f'the package was imported from {run.stdout}'
    for line in settings()['console_scripts'].split():
        assert (python.parent / line.split('=')[0]).exists()


SKIPPED = 'fetches PyTorch (gigabytes, minutes): set LBYL_FULL_INSTALL=1 to run it'


@pytest.mark.skipif(not os.environ.get('LBYL_FULL_INSTALL'), reason=SKIPPED)
def test_wheel_brings_all_it_needs(wheel, tmp_path):
    """In an environment with nothing in it, `pip install` of the wheel is enough.

    Dependencies come from the index.
    """
    python = fresh(tmp_path / 'env')
    run = call(python, '-m', 'pip', 'install', wheel, cwd=tmp_path, timeout=3600)
    assert run.returncode == 0, run.stdout
    run = call(python, '-I', '-c', SMALL, cwd=tmp_path)
    assert run.returncode == 0, run.stdout
    assert lies_in(tmp_path / 'env', run.stdout)
    says = 'nbdev is a tool of development and must not come with the package'
    assert call(python, '-c', 'import nbdev', cwd=tmp_path).returncode, says
