"What people write stands at the top of the package, and importing it is light."

import subprocess
import sys

import pytest

HEAVY = ('accelerate', 'matplotlib', 'seaborn', 'torchvision', 'scipy', 'sklearn', 'transformers')
IN_A_FRESH_PROCESS = """
import importlib, inspect, sys
importlib.import_module(sys.argv[1])
import lbyl_nb
heavy = [m for m in sys.argv[2].split(',') if m in sys.modules]
assert not heavy, heavy
for name in lbyl_nb.__all__:
    f = getattr(lbyl_nb, name)
    assert inspect.isfunction(f) and f.__name__ == name, name
    assert getattr(sys.modules[f.__module__], name) is f, name
"""


FIRST = ['lbyl_nb', 'lbyl_nb.gaussian', 'lbyl_nb.recover', 'lbyl_nb.trace']


@pytest.mark.parametrize('first', FIRST)
def test_what_people_write_is_at_the_top_and_light(first):
    "Functions, and not the modules of the same names, whichever module is imported first."
    command = [sys.executable, '-c', IN_A_FRESH_PROCESS, first, ','.join(HEAVY)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_front_page_imports():
    from lbyl_nb import lbyl_restore as at_the_top
    from lbyl_nb.recover import lbyl_restore

    assert at_the_top is lbyl_restore
