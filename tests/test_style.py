"How the code looks, and whether its public part is documented."

import ast
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fastcore.docments import docments

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p.stem for p in (ROOT / 'lbyl_nb').glob('[a-z]*.py'))


def ruff(*args):
    "Run ruff in the project's folder, with its settings."
    command = [sys.executable, '-m', 'ruff', *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize('args', [('format', '--check', '.'), ('check', '.')])
def test_ruff_would_change_nothing(args):
    run = ruff(*args)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def test_ruff_would_notice(tmp_path):
    "The settings reach notebooks and lines that are too long, and a line of 100 columns is fine."
    settings = ('--config', str(ROOT / 'pyproject.toml'), '--no-cache')
    for width, status in ((100, 0), (101, 1)):
        (tmp_path / 'a.py').write_text('x = 1  # ' + 'y' * (width - 9) + '\n')
        assert ruff('check', *settings, str(tmp_path)).returncode == status


def public_functions(name):
    "Functions and classes that a module defines for everybody, with their names."
    module = importlib.import_module(f'lbyl_nb.{name}')
    for k in module.__all__:
        f = getattr(module, k)
        if inspect.isroutine(f) or inspect.isclass(f):
            if f.__module__ == module.__name__:
                yield k, inspect.unwrap(f)


def unexplained(f) -> list:
    "Parameters of a function without words beside them."
    said = docments(f, returns=False, args_kwargs=True)
    return [p for p, words in said.items() if not words]


def raised(f) -> set:
    "Names of the errors that the body of a function raises itself."
    tree = ast.parse(textwrap.dedent(inspect.getsource(f)))
    calls = [n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and n.exc]
    names = [c.func if isinstance(c, ast.Call) else c for c in calls]
    return {n.id for n in names if isinstance(n, ast.Name) and n.id.endswith('Error')}


@pytest.mark.parametrize('name', MODULES)
def test_public_functions_say_what_they_take_and_raise(name):
    "Every parameter has words beside it, every function a docstring that names its errors."
    missing = []
    for k, f in public_functions(name):
        if not f.__doc__:
            missing.append(f'{k}: no docstring')
        if inspect.isfunction(f):
            missing += [f'{k}: {p} is not explained' for p in unexplained(f)]
            errors = [e for e in raised(f) if e not in (f.__doc__ or '')]
            missing += [f'{k}: raises {e} without a word' for e in errors]
    assert not missing, '\n'.join(missing)


def test_notebook_and_module_have_one_name():
    exported = {}
    for path in (ROOT / 'nbs').glob('*.ipynb'):
        found = re.search(r'#\| default_exp (\w+)', path.read_text(encoding='utf-8'))
        if found:
            exported[path.stem.partition('_')[2]] = found[1]
    assert all(k == v for k, v in exported.items()), exported
    assert sorted(exported.values()) == [m for m in MODULES if not m.startswith('_')]


def test_a_public_name_has_one_home():
    "No two modules define the same public name, and no function has the name of another module."
    homes = {}
    for name in MODULES:
        for k in importlib.import_module(f'lbyl_nb.{name}').__all__:
            homes.setdefault(k, []).append(name)
    assert not {k: v for k, v in homes.items() if len(v) > 1}
    assert {k: v for k, v in homes.items() if k in MODULES and v != [k]} == {
        'gaussian': ['restorers'],  # the restorer that the formulas of that module are for
        'bench': ['cli'],  # the command of that name
    }
