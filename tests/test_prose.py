"""What the text has in backticks exists: in the package, in the notebook's own code, or in Python.

Names that are none of these stand in EXCUSED, with what they are. And what the text of an
experiment has with a decimal point stands in what its cells show or assert.
"""

import ast
import builtins
import importlib
import inspect
import keyword
import pydoc
import re

import pytest
from conftest import LIB, NBS, NOTEBOOKS, ROOT, cells
from torch import Tensor

EXCUSED = {
    'CUDA_VISIBLE_DEVICES': 'a variable of the environment, of CUDA',
    'OMP_NUM_THREADS': 'a variable of the environment, of OpenMP',
    'KilledWorker': 'an exception of distributed',
    'TQDM_DISABLE': 'a variable of the environment, of tqdm',
    'cat': 'a command',
    'dask_jobqueue.SLURMCluster': 'a class of a package that is not required',
    'device_map': 'an argument of transformers, for Accelerate',
    'flock': 'a call of the operating system',
    'register_ray': 'a function of a package that is not required',
    'torchrun': 'a command of PyTorch',
    'weight_orig': 'an attribute that torch.nn.utils.prune gives to a module',
}
FENCE = re.compile(r'^```.*?^```', re.M | re.S)
QUOTED = re.compile(r'(?<!`)`([^`\n]+)`(?!`)')
FILE = re.compile(r'[\w/.*{}-]+\.(?:md|py|npz|csv|ipynb|yml|ini|toml|safetensors|png|sh)')


def introduced(n) -> set:
    "The name that a node of the tree introduces: of a function, a class or a parameter."
    if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
        return {n.name}
    return {n.arg} if isinstance(n, ast.arg) else set()


def said(tree) -> set:
    "All names in code: what it defines, calls and reads, keywords, and texts such as columns."
    found = set()
    for n in ast.walk(tree):
        found |= introduced(n)
        if isinstance(n, ast.keyword):
            found.add(n.arg)
        elif isinstance(n, ast.Name):
            found.add(n.id)
        elif isinstance(n, ast.Attribute):
            found.add(n.attr)
        elif isinstance(n, ast.Constant) and isinstance(n.value, str):
            found.add(n.value)
        elif isinstance(n, (ast.Import, ast.ImportFrom)):
            found.update(part for a in n.names for part in a.name.split('.'))
            found.update(a.asname for a in n.names)
    return found


def defined(tree) -> set:
    "Names that a module has for others: functions, classes, values, methods, fields, parameters."
    found = set()
    for n in ast.walk(tree):
        found |= introduced(n)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store):
            found.add(n.attr)
        if isinstance(n, (ast.Module, ast.ClassDef)):
            own = [x for x in n.body if isinstance(x, (ast.Assign, ast.AnnAssign))]
            found |= {x.id for o in own for x in ast.walk(o) if isinstance(x, ast.Name)}
    return found


def parsed(source):
    "The tree of a cell, magics aside."
    try:
        return ast.parse(re.sub(r'^[%!].*$', '', source, flags=re.M))
    except SyntaxError:
        return ast.parse('')


MODULES = {p.stem for p in LIB.glob('[a-z]*.py')}
OURS = {
    name for p in LIB.glob('*.py') for name in defined(ast.parse(p.read_text(encoding='utf-8')))
}
KNOWN = OURS | MODULES | {'lbyl_nb'} | set(dir(builtins)) | set(keyword.kwlist)


def functions() -> dict:
    "Public functions and classes of the package by their names."
    found = {}
    for m in sorted(MODULES):
        loaded = importlib.import_module(f'lbyl_nb.{m}')
        found |= {k: getattr(loaded, k) for k in loaded.__all__}
    return {k: f for k, f in found.items() if callable(f)}


FUNCTIONS = functions()


def exists(
    dotted,  # a name, perhaps with dots
    here,  # names of the notebook's code
) -> bool:
    "Is it known, part for part, can it be imported, or is it a method of a tensor?"
    if dotted in EXCUSED:
        return True
    parts = dotted.split('.')
    if all(p in KNOWN or p in here for p in parts):
        return True
    return pydoc.locate(dotted) is not None or (len(parts) == 2 and hasattr(Tensor, parts[1]))


def wrong_arguments(call) -> list:
    "Keywords in a call of a public function that it does not take."
    f = FUNCTIONS.get(call.func.id) if isinstance(call.func, ast.Name) else None
    if f is None:
        return []
    try:
        taken = inspect.signature(f).parameters.values()
    except ValueError:
        return []
    if any(p.kind is p.VAR_KEYWORD for p in taken):
        return []
    return [k.arg for k in call.keywords if k.arg and k.arg not in {p.name for p in taken}]


def faults(
    quoted,  # text in backticks
    here,  # names of the notebook's code
) -> list:  # what does not exist of it
    "Names, calls with their keywords, and keywords alone such as `ratio=0.3`; other text passes."
    if FILE.fullmatch(quoted):
        return []
    if re.fullmatch(r'[A-Za-z_][\w.]*(\(\))?', quoted):
        name = quoted.removesuffix('()').rstrip('.')
        return [] if exists(name, here) else [name]
    if m := re.fullmatch(r'([A-Za-z_]\w*)=\S*', quoted):
        return [] if exists(m[1], here) else [m[1]]
    try:
        tree = ast.parse(quoted, mode='eval')
    except SyntaxError:
        return []
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names = [ast.unparse(c.func) for c in calls if isinstance(c.func, (ast.Name, ast.Attribute))]
    dotted = [n for n in names if re.fullmatch(r'[\w.]+', n)]
    missing = [n for n in dotted if not exists(n, here)]
    return missing + [f'{k}=' for c in calls for k in wrong_arguments(c)]


def quotes(name) -> list:
    "Everything in backticks in the text of a notebook, and in tables that it stores as text."
    texts = [FENCE.sub('', c['source']) for c in cells(NBS / name, 'markdown')]
    stored = [o.get('data', {}) for c in cells(NBS / name, 'code') for o in c['outputs']]
    texts += [''.join(data['text/markdown']) for data in stored if 'text/markdown' in data]
    return [q for t in texts for q in QUOTED.findall(t)]


def names_in(name) -> set:
    "Names in the code of a notebook."
    code = [re.sub(r'^#\|.*$', '', c['source'], flags=re.M) for c in cells(NBS / name, 'code')]
    return set().union(*(said(parsed(source)) for source in code))


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_what_the_text_names_exists(name):
    here = names_in(name)
    wrong = {q: f for q in quotes(name) if (f := faults(q, here))}
    assert not wrong, f'{name} names what is not there: {wrong}'


def test_excuses_are_needed_and_few():
    used = set()
    for name in NOTEBOOKS:
        here = names_in(name)
        for q in quotes(name):
            stem = re.sub(r'(\(\)|=\S*)$', '', q)
            if stem in EXCUSED and stem not in KNOWN and stem not in here:
                used.add(stem)
    assert used == set(EXCUSED)
    assert len(EXCUSED) < 12


def test_files_that_the_text_names_exist():
    "Files with a folder, such as `results/demo.csv` and `benchmarks/zoo.py`."
    missing = []
    for name in NOTEBOOKS:
        for q in quotes(name):
            if FILE.fullmatch(q) and '/' in q and '*' not in q and '{' not in q:
                if not ((ROOT / q).exists() or (NBS / q).exists()):
                    missing.append((name, q))
    assert missing == []


def test_faults_are_found():
    "A name of nobody, a method of nobody, a keyword that a function does not take."
    assert faults('lbyl_restore', set()) == []
    assert faults('torch.nn.utils.prune', set()) == []
    assert faults('lbyl_restored', set()) == ['lbyl_restored']
    assert faults('lbyl_restored()', {'lbyl_restored'}) == []
    assert faults('torch.nn.utils.prunes', set()) == ['torch.nn.utils.prunes']
    assert faults('noise(n=8)', set()) == []
    assert faults('noise(samples=8)', set()) == ['samples=']
    assert faults('noises(8)', set()) == ['noises']
    assert faults('ratio=0.3', set()) == []
    assert faults('ratios_of=0.3', set()) == ['ratios_of']
    assert faults('W @ x + b', set()) == []


DECIMAL = re.compile(r'(?<![\w.,/])(?:\d[\d,]*)?\.\d+(?![\d.]*\w)')
NUMBER = re.compile(r'(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?')
NO_PROSE = re.compile(r'`[^`\n]*`|\$[^$]*\$|\]\([^)]*\)|arXiv:? ?[\d.]+')


def unfounded(
    text,  # of a cell
    known,  # numbers of the notebook's code and outputs
) -> list:  # what is not among them
    "Decimal numbers that are no rounded number of the notebook; formulas and links aside."
    found = DECIMAL.findall(NO_PROSE.sub('', FENCE.sub('', text)))

    def is_known(n):
        half = 0.5001 * 10 ** -len(n.partition('.')[2])
        return any(abs(float(n.replace(',', '')) - k) <= half for k in known)

    return [n for n in found if not is_known(n)]


def numbers_in(name) -> set:
    "Numbers that stand in the code of a notebook and in what it shows, without their signs."
    found = set()
    for c in cells(NBS / name, 'code'):
        shown = [o.get('data', {}) for o in c['outputs']]
        texts = [''.join(d.get(k, '')) for d in shown for k in ('text/html', 'text/plain')]
        found.update(float(n) for t in (c['source'], *texts) for n in NUMBER.findall(t))
    return found


@pytest.mark.parametrize('name', [n for n in NOTEBOOKS if n.startswith('4')])
def test_numbers_of_experiments_are_measured(name):
    known = numbers_in(name)
    wrong = [n for c in cells(NBS / name, 'markdown') for n in unfounded(c['source'], known)]
    assert not wrong, f'{name} says {wrong}, which no cell of it shows or asserts'


def test_unfounded_numbers_are_found():
    known = {83.24, 1000.5, 0.92}
    assert unfounded('83.2 % of 1,000.5, [a](b_1.5.html), `x=0.7`, $1.5$ and .92', known) == []
    assert unfounded('It keeps 83.3 and 0.93, see arXiv 2204.11444.', known) == ['83.3', '0.93']
