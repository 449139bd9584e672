"The project as a whole: its commands, and that it speaks of itself alone."

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from conftest import BUILT, NOTEBOOKS, ROOT, call, settings

# folders that only one machine has
USERS = re.compile(r'(?<![\w.$~}-])/(?:home|root|Users|tmp|mnt)/[\w.-]|[A-Z]:\\\\?Users')
WRITTEN = '.py', '.ipynb', '.md', '.ini', '.toml', '.yml', '.csv'
# what make and the scripts call
SYSTEM = 'sh make sed cat test env tail tee mktemp rm dirname bash expand'.split()


def committed():
    "Files of the project: those that git knows, or in a copy without git all that were not built."
    if (ROOT / '.git').exists():
        command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        return [ROOT / n for n in listed.split('\0') if n and (ROOT / n).is_file()]
    found = []
    for folder, folders, files in os.walk(ROOT):
        left_out = BUILT(folder, folders + files)
        folders[:] = [f for f in folders if f not in left_out]
        found += [Path(folder) / f for f in files if f not in left_out]
    return found


def texts():
    for p in committed():
        try:
            yield p, p.read_text(encoding='utf-8')
        except UnicodeDecodeError:
            pass


def test_no_path_of_one_machine():
    "No file, and no output stored in a notebook, tells where somebody's files lie."
    here = {str(d) + '/' for d in (ROOT, ROOT.parent, Path.home()) if len(d.parts) > 1}
    assert [(p.name, h) for p, text in texts() for h in here if h in text] == []
    written = [(p, text) for p, text in texts() if p.suffix in WRITTEN and p != Path(__file__)]
    assert [(p.name, m[0]) for p, text in written for m in USERS.finditer(text)] == []


def test_notebooks_are_numbered_once():
    "Numbers order the notebooks and are given once; the front page and the map have none."
    numbered = [n for n in NOTEBOOKS if n not in ('index.ipynb', 'map.ipynb')]
    assert all(re.fullmatch(r'\d\d[a-z]?_[a-z0-9_]+\.ipynb', n) for n in numbered)
    assert len(numbered) == len({n.partition('_')[0] for n in numbered})


def test_help_lists_every_target():
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    phony = set(re.search(r'^\.PHONY: (.*)', makefile, re.M)[1].split()) - {'moved'}
    run = call('make', '-s', 'help', cwd=ROOT)
    assert run.returncode == 0
    assert {line.split()[1] for line in run.stdout.splitlines()} == phony
    assert phony >= {'demo', 'test', 'lab', 'docs', 'bench', 'clean', 'help'}


@pytest.fixture
def tools(tmp_path):
    "A folder for PATH with what make and the shell need, and stand-ins that a test puts there."
    folder = tmp_path / 'tools'
    folder.mkdir()
    for name in SYSTEM:
        (folder / name).symlink_to(shutil.which(name))
    return folder


def stand_in(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('#!/bin/sh\n' + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def dressed(project, tools):
    """A copy of the project whose Pythons only note what they are asked to do, in calls.txt.

    These are `python3` and that of .venv. Making a virtual environment puts such a Python into
    .venv; asking for a module that the file `fails` names makes it fail.
    """
    log = project / 'calls.txt'
    log.touch()
    fails = f'[ -e {project}/fails ] && echo "$@" | grep -q "$(cat {project}/fails)"'
    copies = 'cp inner .venv/bin/python; cp inner .venv/bin/lbyl-demo'
    noted = f'echo "$@" >> {log}'
    stand_in(project / 'inner', f'{noted}\nif {fails}; then exit 7; fi\n')
    makes = f'if [ "$2" = venv ]; then mkdir -p .venv/bin; {copies}; fi'
    stand_in(tools / 'python3', f'{noted}\n{makes}\n')
    for name in ('mkdir', 'cp', 'touch', 'grep'):
        (tools / name).symlink_to(shutil.which(name))

    def make(*args):
        log.write_text('')
        run = call(tools / 'make', *args, cwd=project, PATH=str(tools))
        return run, log.read_text()

    make.project = project
    return make


def test_demo_installs_without_tools_and_only_once(dressed):
    run, calls = dressed('demo')
    assert run.returncode == 0, run.stdout
    assert '-m venv' in calls and 'install --editable .\n' in calls and '[dev]' not in calls
    assert 'Making a virtual environment' in run.stdout and 'Installing' in run.stdout
    run, calls = dressed('demo')
    assert run.returncode == 0 and 'venv' not in calls and 'install' not in calls


def test_what_make_was_told_stays_outside(dressed, monkeypatch):
    """`make test PYTHON=... ARGS=...` hands both on to everything below it.

    So the commands that tests run must not hear of them.
    """
    monkeypatch.setenv('PYTHON', 'nowhere')
    monkeypatch.setenv('ARGS', '-k x')
    monkeypatch.setenv('MAKEFLAGS', ' -- PYTHON=nowhere')
    run, calls = dressed('test')
    assert run.returncode == 0 and '-m pytest\n' in calls


def test_tests_add_the_tools_and_only_once(dressed):
    dressed('demo')
    run, calls = dressed('test')
    assert run.returncode == 0
    assert 'venv' not in calls
    assert 'install --editable .[dev]' in calls
    assert '-m pytest' in calls
    for target in ('test', 'demo'):
        run, calls = dressed(target)
        assert run.returncode == 0 and 'install' not in calls


def test_changed_settings_install_again(dressed):
    dressed('test')
    after = (dressed.project / '.venv' / '.installed-dev').stat().st_mtime + 5
    os.utime(dressed.project / 'settings.ini', (after, after))
    _, calls = dressed('test')
    assert 'install --editable .[dev]' in calls and 'venv' not in calls


def test_interrupted_installation_is_taken_up_again(dressed):
    (dressed.project / 'fails').write_text('install')
    run, _ = dressed('test')
    assert run.returncode
    (dressed.project / 'fails').unlink()
    run, calls = dressed('test')
    assert run.returncode == 0 and 'install --editable .[dev]' in calls


def test_moved_environment_is_made_anew(dressed):
    dressed('test')
    (dressed.project / '.venv' / '.place').write_text('elsewhere\n')
    _, calls = dressed('test')
    assert '-m venv --clear' in calls and 'install --editable .[dev]' in calls


def test_failing_tests_fail_make_and_ci(dressed, tools):
    assert call('.ci/run', cwd=dressed.project, PATH=str(tools)).returncode == 0
    (dressed.project / 'fails').write_text('pytest')
    run, _ = dressed('test')
    assert run.returncode
    run = call('.ci/run', cwd=dressed.project, PATH=str(tools))
    assert run.returncode
    # the closing lines stand at the end once more
    assert run.stdout.count('Running all tests') == 2


def test_old_python_is_refused(dressed, tools):
    stand_in(tools / 'python3', 'case "$1" in --version) echo Python 3.8.1;; *) exit 1;; esac\n')
    run, calls = dressed('test')
    assert run.returncode and calls == ''
    assert f'needs Python {settings()["min_python"]} or newer' in run.stdout
    assert 'Python 3.8.1' in run.stdout
    run, _ = dressed('test', 'PYTHON=nowhere')
    assert run.returncode and 'There is no nowhere on the PATH' in run.stdout
