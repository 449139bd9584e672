"""What surrounds the text: works that are cited, how the package is cited, and how it is worked on.

Entries of references.bib are those that Pandoc reads, which makes the website's list of them.
"""

import importlib
import json
import re
import sys
from importlib.metadata import version

import pypandoc
import pytest
import yaml
from conftest import NBS, NOTEBOOKS, ROOT, cells, settings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ARXIV = re.compile(r'arxiv\S{0,25}?[\s:/](\d{4}\.\d{4,5})', re.I)
# "Kim et al., NeurIPS 2020", "Martens and Grosse, 2015", "Minoux 1978", "He et al. (2019)"
AUTHORS = r'\b([A-Z][\w-]+)(?: et al\.|(?:, [A-Z]\w+)*,? and [A-Z]\w+)?'
NAMED = re.compile(AUTHORS + r',? \(?(?:[A-Z]\w+ )?((?:19|20)\d\d)\b(?!\.\d)')
# a word before a year that is no author's name
NO_AUTHORS = {'NeurIPS', 'ICLR', 'ICML', 'CVPR', 'ICCV', 'ECCV', 'BMVC', 'CIFAR', 'EagleEye'}


def text(name):
    "What a notebook says, in words and in docstrings."
    return '\n'.join(c['source'] for c in cells(NBS / name) if c['cell_type'] != 'raw')


@pytest.fixture(scope='module')
def entries():
    "The entries of references.bib, as Pandoc understands them."
    source = (ROOT / 'references.bib').read_text(encoding='utf-8')
    return json.loads(pypandoc.convert_text(source, 'csljson', format='biblatex'))


@pytest.mark.parametrize('name', [*NOTEBOOKS, 'README.md'])
def test_numbers_of_arxiv_have_an_entry(name, entries):
    source = (ROOT / 'README.md').read_text(encoding='utf-8') if name == 'README.md' else text(name)
    bib = (ROOT / 'references.bib').read_text(encoding='utf-8')
    known = set(re.findall(r'eprint = \{(.+?)\}', bib))
    assert sorted(set(ARXIV.findall(source)) - known) == []


def test_numbers_of_arxiv_are_found():
    "As the notebooks write them, in words and in addresses."
    ways = 'arXiv 2502.08474, [x](https://arxiv.org/abs/2204.11444) and arXiv:1907.09682.'
    assert ARXIV.findall(ways) == ['2502.08474', '2204.11444', '1907.09682']
    found = {n for name in NOTEBOOKS for n in ARXIV.findall(text(name))}
    assert {'2502.08474', '2204.11444'} <= found


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_authors_have_an_entry(name, entries):
    "Whoever is named with a year is the author of an entry of that year, or of a year beside it."
    known = set()
    for e in entries:
        year = int(e['issued']['date-parts'][0][0])
        known |= {(a['family'], y) for a in e['author'] for y in (year - 1, year, year + 1)}
    named = {(who, int(year)) for who, year in NAMED.findall(text(name)) if who not in NO_AUTHORS}
    assert named - known == set()


def test_authors_are_found():
    ways = 'Kim et al., NeurIPS 2020; Martens and Grosse, 2015; Minoux 1978; He et al. (2019)'
    found = [('Kim', '2020'), ('Martens', '2015'), ('Minoux', '1978'), ('He', '2019')]
    assert NAMED.findall(ways) == found
    assert len({n for name in NOTEBOOKS for n in NAMED.findall(text(name))}) > 15


def test_entries_are_whole(entries):
    assert len({e['id'] for e in entries}) == len(entries)
    for e in entries:
        assert e['title'] and e['author'] and e['issued'], e['id']
        where = {'DOI', 'URL', 'container-title', 'publisher', 'event-title'}
        assert where & set(e), f'{e["id"]} does not say where it appeared'


def test_citation_is_of_this_version():
    cff = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    said = settings()
    assert {'cff-version', 'message', 'title', 'authors', 'version'} <= set(cff)
    assert cff['version'] == said['version'] and cff['license'] == said['license']
    assert cff['title'] == said['lib_name'] and cff['abstract'] == said['description']
    assert cff['repository-code'] == said['git_url']
    assert [a['name'] for a in cff['authors']] == [said['author']]
    papers = {r['identifiers'][0]['value'].partition(':')[2]: r for r in cff['references']}
    assert set(papers) == {'2502.08474', '2204.11444'}


def test_papers_of_the_citation_are_those_of_the_list(entries):
    "The two papers have one title and the same authors in CITATION.cff and in references.bib."
    cff = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    titles = {e['title'].lower(): [a['family'] for a in e['author']] for e in entries}
    for r in cff['references']:
        assert titles[r['title'].lower()] == [a['family-names'] for a in r['authors']]


def test_front_page_cites_both_papers():
    "With the entries of references.bib, letter for letter."
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    [cited] = re.findall(r'^```bibtex\n(.*?)^```', readme, re.M | re.S)
    bib = (ROOT / 'references.bib').read_text(encoding='utf-8')
    found = re.findall(r'^@\w+\{.*?^\}', cited, re.M | re.S)
    assert [re.search(r'eprint = \{(.+?)\}', e)[1] for e in found] == ['2502.08474', '2204.11444']
    assert [e for e in found if e not in bib] == []


def test_changes_begin_with_this_version():
    changes = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.findall(r'^## (\S+)', changes, re.M)[0] == settings()['version']
    import lbyl_nb

    named = {n for n in re.findall(r'`(\w+)`', changes) if hasattr(lbyl_nb, n)}
    assert {'lbyl_restore', 'restore', 'expand', 'contract', 'finetune', 'boost'} <= named


def contributing():
    return (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')


def test_examples_of_contributing_run():
    "A restorer and a criterion, as they are shown there, prune a network."
    blocks = re.findall(r'^```python\n(.*?)^```', contributing(), re.M | re.S)
    assert len(blocks) == 2
    space = {}
    for block in blocks:
        exec(block, space)
        assert space['small'][0].out_channels == 4
    restorer, criterion = space['mean_of_kept'](), space['largest_weight']
    assert callable(restorer) and callable(criterion)


def test_contributing_names_what_is_there():
    "Commands of make, notebooks and files."
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    targets = set(re.findall(r'^([a-z]+):.*##', makefile, re.M))
    assert set(re.findall(r'make ([a-z]+)', contributing())) <= targets
    quoted = re.findall(r'`([^`\n]+)`', contributing())
    for name in (q for q in quoted if re.fullmatch(r'\d\d[a-z]?_\w+', q)):
        assert f'{name}.ipynb' in NOTEBOOKS, name
    for name in (q for q in quoted if re.fullmatch(r'[\w/.]+\.(py|ini|cff|bib|lock|yml)', q)):
        assert (ROOT / name).exists(), name


def pinned():
    lines = (ROOT / 'requirements.lock').read_text(encoding='utf-8').splitlines()
    return dict(line.split('==') for line in lines if not line.startswith('#'))


@pytest.mark.parametrize('which', ['requirements', 'dev_requirements'])
def test_lock_has_a_fitting_version_of_all_that_is_required(which):
    versions = pinned()
    for r in map(Requirement, settings()[which].split()):
        assert r.specifier.contains(versions[canonicalize_name(r.name)]), r


def lock_tool():
    sys.path.insert(0, str(ROOT / 'tools'))
    try:
        return importlib.import_module('lock')
    finally:
        sys.path.remove(str(ROOT / 'tools'))


def test_lock_has_what_is_required_in_turn():
    "Each package once; and where just these versions are installed, nothing is missing."
    versions, tool = pinned(), lock_tool()
    assert list(versions) == sorted(versions)
    found = tool.closure(tool.required())
    other = {k for k, v in found.items() if versions.get(k, v) != v}
    assert other or set(found) <= set(versions)


def test_closure_follows_requirements_and_markers():
    found = lock_tool().closure(['pandas>=2.2'])
    assert found['numpy'] == version('numpy').partition('+')[0]
    assert {'pandas', 'python-dateutil'} <= set(found) and 'torch' not in found
    assert 'pytest' not in found  # an extra that nobody asked for


def test_workflow_runs_the_commands_of_the_project():
    "With Quarto, before the tests, so that the test of the real program is not skipped."
    path = ROOT / '.github' / 'workflows' / 'ci.yml'
    workflow = yaml.safe_load(path.read_text(encoding='utf-8'))
    steps = workflow['jobs']['test']['steps']
    kinds = [s.get('run') or s['uses'].partition('@')[0] for s in steps]
    assert kinds.index('quarto-dev/quarto-actions/setup') < kinds.index('make test')
    assert kinds.index('make test') < kinds.index('make docs')
    publishing = steps[-1]
    assert publishing['if'] == "github.event_name == 'push'" and 'gh-pages' in publishing['run']
    assert workflow[True]['push'] == {'branches': ['main']}  # YAML reads `on` as true
    [python] = [s['with']['python-version'] for s in steps if 'setup-python' in s.get('uses', '')]
    assert f'Python {python}.' in (ROOT / 'requirements.lock').read_text(encoding='utf-8')
    assert [int(x) for x in python.split('.')] >= [
        int(x) for x in settings()['min_python'].split('.')
    ]
