#!/usr/bin/env python3
"""The versions of all dependencies that are installed, as constraints for pip.

    python tools/lock.py    write requirements.lock    (make lock)

What the project requires, with the tools of development, and what that requires in turn: no more.
"""

import re
import sys
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
HEAD = """\
# The versions under which the tests passed, with Python {python}. Made by `make lock`; used by
# pip install -c requirements.lock -e '.[dev]'
"""


def required() -> list:
    "What settings.ini requires, for running and for development."
    parser = ConfigParser(delimiters='=', interpolation=None)
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    settings = parser['DEFAULT']
    return (settings['requirements'] + ' ' + settings['dev_requirements']).split()


def closure(
    requirements,  # texts such as `numpy>=1.26`
) -> dict:  # normal name -> installed version
    "The distributions that are needed here, and what they need in turn."
    found, todo = {}, [Requirement(r) for r in requirements]
    seen = set()
    while todo:
        r = todo.pop()
        key = canonicalize_name(r.name), frozenset(r.extras)
        if key in seen:
            continue
        seen.add(key)
        dist = distribution(r.name)
        found[key[0]] = dist.version.partition('+')[0]
        for needed in map(Requirement, dist.requires or ()):
            extras = r.extras or {''}
            if not needed.marker or any(needed.marker.evaluate(dict(extra=e)) for e in extras):
                todo.append(needed)
    return found


def lock() -> str:
    "The text of requirements.lock."
    lines = [f'{name}=={version}' for name, version in sorted(closure(required()).items())]
    python = re.match(r'\d+\.\d+', sys.version)[0]
    return HEAD.format(python=python) + '\n'.join(lines) + '\n'


if __name__ == '__main__':
    if sys.argv[1:]:
        raise SystemExit(__doc__)
    (ROOT / 'requirements.lock').write_text(lock(), encoding='utf-8')
    print('requirements.lock has the versions that are installed.')
