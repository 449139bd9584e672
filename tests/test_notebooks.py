"""The notebooks are the source.

Modules are what they export, they run, they are clean, and they show what their code prints.
"""

import ast
import base64
import io
import json
import multiprocessing
import os
import re
import shutil
from multiprocessing import forkserver
from unittest.mock import patch

import numpy as np
import pytest
from conftest import BUILT, LIB, NBS, NOTEBOOKS, ROOT, call, cells, command, environment
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from run_notebook import run_notebook

# matplotlib reads the settings of figures where it is imported first
PRELOADED = 'torch torchvision pandas sklearn.datasets tqdm.auto nbdev.test'.split()
THEORY = [n for n in NOTEBOOKS if n[:2].isdigit() and int(n[:2]) < 10]
# mean absolute difference, of 255, that drawings of one figure may have; other figures have 28
SAME_VERSION, OTHER_VERSION = 0.5, 6.0
FIELDS = 16, 10  # what figures are reduced to where versions differ
EXPORT = re.compile(r'^#\|\s*exports?i?\b', re.M)
CHECK = re.compile(r'\bassert|\btest_\w+\(|\braises\b|ExceptionExpected')


def code_lines(source):
    "Number of lines of a cell, directives and blank lines aside."
    return sum(1 for line in source.splitlines() if line.strip() and not line.startswith('#|'))


def python_files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_text(encoding='utf-8')
        for p in folder.rglob('*.py')
    }


def outputs(notebook):
    "Outputs of every code cell, as {mime type: text} or {stream name: text}."

    def kinds(o):
        if o['output_type'] == 'stream':
            return {o['name']: ''.join(o['text'])}
        joined = lambda v: ''.join(v) if isinstance(v, (str, list)) else v
        return {kind: joined(v) for kind, v in o.get('data', {}).items()}

    return [(c['source'], [kinds(o) for o in c['outputs']]) for c in cells(notebook, 'code')]


def picture(png):
    "A stored figure on white, and the program that drew it, with its version."
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    drawn_by, image = image.info.get('Software'), image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    white.alpha_composite(image)
    return white.convert('RGB'), drawn_by


def check_same_figure(stored, printed, where):
    """Fail unless two figures are the same, pixel by pixel.

    Where another version of matplotlib drew the stored one, in the large. Versions differ in the
    shapes and places of letters. What a figure says is still there when it is reduced to a few
    fields.
    """
    (a, drawn_by), (b, drawn_now_by) = picture(stored), picture(printed)
    size = f'{where} stores a figure of {a.size} pixels and draws one of {b.size}'
    if drawn_by == drawn_now_by:
        assert a.size == b.size, size
    else:
        assert abs(a.width / b.width - 1) < 0.02 and abs(a.height / b.height - 1) < 0.02, size
        a, b = a.resize(FIELDS, Image.Resampling.BOX), b.resize(FIELDS, Image.Resampling.BOX)
    apart = abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).mean()
    bound = SAME_VERSION if drawn_by == drawn_now_by else OTHER_VERSION
    differ = f'they differ by {apart:.1f} of 255 on average, {bound} is allowed'
    assert apart <= bound, f'{where} stores another figure than it draws: {differ}'


def check_same(stored, printed, where):
    "Fail unless two outputs of a cell are the same: text exactly, figures as said above."
    says = f'{where} stores {sorted(stored)} and prints {sorted(printed)}'
    assert stored.keys() == printed.keys(), says
    for kind in stored:
        if kind == 'image/png':
            check_same_figure(stored[kind], printed[kind], where)
        else:
            assert stored[kind] == printed[kind], f'{where} stores another {kind} than it prints'


@pytest.fixture(scope='session')
def runner(tmp_path_factory):
    """Runs a notebook, a path, under nbdev's runner: its exit status, and what it said.

    Notebooks draw from results/; none may need images or weights that a reader may not have.
    Each runs in a process of its own, forked from one that has imported the large libraries,
    which takes seconds.
    """
    no_data, log = str(tmp_path_factory.mktemp('no-data')), tmp_path_factory.mktemp('log') / 'said'
    env = environment(LBYL_DATA=no_data, LBYL_WEIGHTS=None, TQDM_DISABLE='1')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    with patch.dict(os.environ, env, clear=True):
        forkserver.ensure_running()

    def run(notebook):
        log.write_text('')
        process = context.Process(target=run_notebook, args=(notebook, log))
        process.start()
        process.join()
        return process.exitcode, log.read_text()

    return run


@pytest.fixture(scope='session')
def executed(tmp_path_factory, runner):
    "Runs a notebook once, in a copy of the project: status, what it said, outputs before, path."
    copy = tmp_path_factory.mktemp('run') / 'project'
    shutil.copytree(ROOT, copy, ignore=BUILT, symlinks=True)
    done = {}

    def run(name):
        notebook = copy / 'nbs' / name
        if name not in done:
            stored = outputs(notebook)
            done[name] = *runner(notebook), stored, notebook
        return done[name]

    return run


def test_a_notebook_that_fails_is_told(project, runner):
    notebook = project / 'nbs' / '36_files.ipynb'
    whole = json.loads(notebook.read_text())
    code = [c for c in whole['cells'] if c['cell_type'] == 'code']
    code[-1]['source'] = 'assert 1 + 1 == 3'
    notebook.write_text(json.dumps(whole))
    status, said = runner(notebook)
    assert status == 1
    assert 'AssertionError' in said and '36_files.ipynb' in said


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_runs(name, executed):
    status, said, *_ = executed(name)
    assert status == 0, said


@pytest.mark.parametrize('name', THEORY)
def test_stored_outputs_are_printed_again(name, executed):
    status, _, before, saved = executed(name)
    if status:
        pytest.skip('the notebook does not run, see test_runs')
    assert call(command('nbdev-clean'), '--fname', saved, cwd=saved.parent).returncode == 0
    after = outputs(saved)
    assert [s for s, _ in before] == [s for s, _ in after]
    for (source, stored), (_, printed) in zip(before, after):
        where = f'{name}, the cell that begins {source.splitlines()[0]!r},' if source else name
        says = f'{where} stores {len(stored)} outputs and prints {len(printed)}'
        assert len(stored) == len(printed), says
        for s, p in zip(stored, printed):
            check_same(s, p, where)


def test_difference_in_outputs_is_found():
    """The comparison above notices another number, kind of output, size or drawing.

    By the same program or by another.
    """

    def figure(shade, width=200, by='matplotlib 1'):
        f, info = io.BytesIO(), PngInfo()
        info.add_text('Software', by)
        Image.new('RGB', (width, 200), (shade,) * 3).save(f, 'png', pnginfo=info)
        return {'image/png': base64.b64encode(f.getvalue()).decode()}

    text, other = {'text/plain': '1'}, 'matplotlib 2'
    stored = figure(100)
    for printed in (figure(100), figure(104, 201, by=other)):
        check_same(stored, printed, 'cell')
    check_same(text, text, 'cell')
    different = [
        (text, {'text/plain': '2'}),
        (text, {'text/html': '1'}),
        (stored, figure(102)),
        (stored, figure(100, 201)),
        (stored, figure(110, by=other)),
        (stored, figure(100, 220, by=other)),
    ]
    for a, b in different:
        with pytest.raises(AssertionError):
            check_same(a, b, 'cell')


def test_modules_are_what_notebooks_export(project):
    """Modules are written anew, and nothing differs.

    A module changed by hand, a notebook not exported, a module whose notebook is gone: each shows
    as a difference.
    """
    lib = project / 'lbyl_nb'
    for p in lib.rglob('*.py'):
        if p.name != '__init__.py':
            p.unlink()
    run = call(command('nbdev-export'), cwd=project)
    assert run.returncode == 0, run.stdout
    exported, committed = python_files(lib), python_files(LIB)
    assert sorted(exported) == sorted(committed)
    assert [name for name in exported if exported[name] != committed[name]] == []


def test_every_module_says_where_it_comes_from():
    for p in LIB.rglob('*.py'):
        if p.name in ('__init__.py', '_modidx.py'):
            continue
        origin = re.search(r'File to edit: \.\./nbs/(\S+\.ipynb)', p.read_text(encoding='utf-8'))
        says = f'{p.name} names no notebook that it was exported from'
        assert origin and origin[1] in NOTEBOOKS, says


def test_notebooks_are_clean(project):
    """nbdev-clean, run twice, changes nothing.

    There are no metadata, execution counts or addresses in what is committed.
    """
    changed = lambda n: (project / 'nbs' / n).read_bytes() != (NBS / n).read_bytes()
    for _ in range(2):
        run = call(command('nbdev-clean'), cwd=project)
        assert run.returncode == 0, run.stdout
        assert [n for n in NOTEBOOKS if changed(n)] == []


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_shape(name):
    "Short export cells, a check for every two of them, text, not too large."
    code = [c['source'] for c in cells(NBS / name, 'code') if c['source'].strip()]
    exported = [source for source in code if EXPORT.search(source)]
    for source in exported:
        body = ast.parse(source).body
        things = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        limit = 60 if len(things) <= 1 else 40
        assert code_lines(source) <= limit, f'a long cell with {things}'
        assert 'import *' not in source
    checks = [source for source in code if not EXPORT.search(source) and CHECK.search(source)]
    says = f'{len(exported)} export cells and {len(checks)} cells that check something'
    assert 2 * len(checks) >= len(exported), says
    texts = cells(NBS / name, 'markdown')
    assert 2 * len(texts) >= len(code), 'more than two code cells for each cell of text'
    assert (NBS / name).stat().st_size < 600_000


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_kept_outputs(name):
    "Something is shown, and neither errors nor progress bars, whose times nobody prints again."
    kept = [o for c in cells(NBS / name, 'code') if c['source'].strip() for o in c['outputs']]
    assert kept, 'no stored output: run nbdev-test --save'
    assert not [o for o in kept if o['output_type'] == 'error'], 'an error is stored as an output'
    text = json.dumps(kept)
    assert 'Traceback (most recent call last)' not in text
    assert '\\r' not in text, 'a progress bar is stored: run with TQDM_DISABLE=1'
