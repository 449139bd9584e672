"""The website up to Quarto's boundary.

Pages are processed, convert, and point at each other; the README is the index notebook.
"""

import ast
import importlib
import inspect
import json
import os
import posixpath
import re
import shutil
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import nbformat
import numpy as np
import pypandoc
import pytest
import yaml
from conftest import BUILT, LIB, NBS, NOTEBOOKS, ROOT, call, cells, settings
from PIL import Image

from lbyl_nb import _modidx

MODULES = sorted(p.stem for p in LIB.glob('[a-z]*.py'))
REFERENCE = ['reference.qmd', *(f'reference/{m}.qmd' for m in MODULES)]
QUARTO = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))


def load_tool(name):
    "A module of tools/, which import each other by their names."
    sys.path.insert(0, str(ROOT / 'tools'))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / 'tools'))


docs = load_tool('docs')


def sidebar(entries):
    "Files that a sidebar's entries name, sections and all."
    for e in entries:
        if isinstance(e, str):
            yield e
        elif 'contents' in e:
            yield from sidebar(e['contents'])
        else:
            yield e['href']


class Page(HTMLParser):
    "What a page of HTML refers to and what it holds."

    def __init__(self, html):
        super().__init__()
        self.ids, self.links, self.images, self.tags = set(), [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if 'id' in attrs:
            self.ids.add(attrs['id'])
        if tag == 'a' and attrs.get('href'):
            self.links.append(attrs['href'])
        if tag == 'img':
            self.images.append(attrs.get('src', ''))


@pytest.fixture(scope='session')
def processed(tmp_path_factory):
    "The folder of processed notebooks, made as `make docs` makes it, in a copy of the project."
    copy = tmp_path_factory.mktemp('docs') / 'project'
    shutil.copytree(ROOT, copy, ignore=BUILT, symlinks=True)
    run = call(sys.executable, 'tools/docs.py', 'pages', cwd=copy)
    assert run.returncode == 0, run.stdout
    return copy / '_proc'


@pytest.fixture(scope='session')
def pages(processed, tmp_path_factory):
    """Every processed notebook as HTML, as a `Page`, and with Pandoc's warnings about it.

    By the Pandoc that Quarto is built on.
    """
    media, made = tmp_path_factory.mktemp('media'), {}
    for name in NOTEBOOKS:
        notebook = json.loads((processed / name).read_text(encoding='utf-8'))
        log = media / f'{name}.json'
        number_results(notebook)
        options = ['--mathml', f'--extract-media={media / name}', f'--log={log}']
        options.append(f'--resource-path={processed}')
        text = json.dumps(notebook)
        html = pypandoc.convert_text(text, 'html', format='ipynb', extra_args=options)
        warnings = [m for m in json.loads(log.read_text()) if m['verbosity'] == 'WARNING']
        made[name] = html, Page(html), warnings
    for name in REFERENCE:  # each heading in a section of its own, as on the website
        text = (processed / name).read_text(encoding='utf-8')
        html = pypandoc.convert_text(text, 'html', format='markdown', extra_args=['--section-divs'])
        made[name] = html, Page(html), []
    return made


def number_results(notebook):
    """Give each result of a notebook a number.

    Pandoc's own reader of notebooks wants one, where a clean notebook, and the format, have null.
    """
    for cell in notebook['cells']:
        for output in cell.get('outputs', []):
            if output['output_type'] == 'execute_result':
                output['execution_count'] = 0


def front(page):
    "What stands at the head of a processed notebook: title, description, name of its page."
    [head] = cells(page, 'raw')[:1]
    return yaml.safe_load(head['source'].strip().strip('-'))


def test_sidebar_is_the_notebooks():
    listed = list(sidebar(QUARTO['website']['sidebar']['contents']))
    assert [n for n in listed if not (NBS / n).exists()] == ['reference.qmd', 'papers.qmd']
    assert [n for n in NOTEBOOKS if n not in listed] == []
    assert len(listed) == len(set(listed))


def test_nbdev_finds_the_same_configuration():
    """nbdev looks for _quarto.yml in nbs/ only.

    It moves what Quarto made from the folder that its own settings name.
    """
    from nbdev.config import get_config

    link = NBS / '_quarto.yml'
    assert link.is_symlink()
    assert link.resolve() == ROOT / '_quarto.yml'
    assert get_config(ROOT).doc_path.name == QUARTO['project']['output-dir']
    assert list(QUARTO['format']) == ['html']
    assert QUARTO['website']['title'] == get_config(ROOT).title == settings()['lib_name']


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_page_is_the_notebook(name, processed):
    "Processing leaves out nothing but hidden cells: code, outputs and text are all there."
    hides = re.compile(r'^#\|\s*(hide|default_exp|include:\s*false)\b', re.M)
    code = lambda c: re.sub(r'^#\|.*\n?', '', c['source'], flags=re.M).strip()
    outputs = lambda found: sum(len(c['outputs']) for c in found)
    visible = [c for c in cells(NBS / name, 'code') if not hides.search(c['source'])]
    page = cells(processed / name, 'code')
    shown = {code(c) for c in page}
    assert [c['source'] for c in visible if code(c) not in shown] == []
    assert outputs(page) >= outputs(visible)


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_page_converts(name, pages):
    "Pandoc reads every formula, quotation and figure of the notebook."
    html, page, warnings = pages[name]
    assert warnings == []
    texts = [c['source'] for c in cells(NBS / name, 'markdown')]
    in_code = re.compile(r'```.*?```|`[^`\n]*`', re.S)
    text = '\n\n'.join(in_code.sub('', t) for t in texts)
    displayed = len(re.findall(r'\$\$.+?\$\$', text, re.S))
    assert page.tags.count('math') >= displayed
    assert html.count('display="block"') == displayed
    quotes = any(re.search(r'^> ', t, re.M) for t in texts if not t.startswith('# '))
    assert ('blockquote' in page.tags) >= quotes
    outputs = [o for c in cells(NBS / name, 'code') for o in c['outputs']]
    figures = [o for o in outputs if 'image/png' in o.get('data', {})]
    assert len(page.images) >= len(figures)
    assert '$$' not in re.sub(r'<(pre|code|annotation)\b.*?</\1>', '', html, flags=re.S)


@pytest.mark.parametrize('name', [*NOTEBOOKS, *REFERENCE])
def test_links_resolve(name, pages, processed):
    "Links between pages, to headings, names and files lead somewhere, as do pictures: all of them."
    files = {n: n for n in (*NOTEBOOKS, *REFERENCE)}
    files.update({front(processed / n)['output-file']: n for n in NOTEBOOKS})
    _, page, _ = pages[name]

    def leads_somewhere(link):
        target, _, anchor = unquote(link).partition('#')
        if target:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        if target and target not in files:
            return (NBS / target).resolve().exists()
        _, there, _ = pages[files[target] if target else name]
        return not anchor or anchor in there.ids

    links = [link for link in page.links if not re.match(r'(https?|mailto):', link)]
    assert links
    assert [link for link in links if not leads_somewhere(link)] == []
    images = [src for src in page.images if not re.match(r'https?:|data:', src)]
    assert [src for src in images if not (NBS / unquote(src)).exists()] == []


def public(module):
    "Public names of a module, and those of the public methods that its classes define."
    loaded = importlib.import_module(f'lbyl_nb.{module}')
    for k in loaded.__all__:
        yield k
        v = getattr(loaded, k)
        if inspect.isclass(v) and v.__module__ == loaded.__name__:
            mine = [n for n in vars(v) if f'lbyl_nb.{module}.{k}.{n}' in symbols(module)]
            yield from (f'{k}.{n}' for n in mine if not n.startswith('_'))


def symbols(module):
    return _modidx.d['syms'][f'lbyl_nb.{module}']


@pytest.mark.parametrize('module', MODULES)
def test_reference_has_every_name(module, pages):
    "Each function in a section of the second level, which is what the website's search finds."
    html, page, _ = pages[f'reference/{module}.qmd']
    sections = re.findall(r'<section id="([^"]+)"\s+class="level2"', html)
    names = list(public(module))
    assert sorted(sections) == sorted(k for k in names if '.' not in k)
    assert [k for k in names if k not in page.ids] == []
    _, overview, _ = pages['reference.qmd']
    assert {f'reference/{module}.qmd#{k}' for k in sections} <= set(overview.links)


def test_reference_says_what_the_code_says(pages):
    "Parameters with their words and defaults, what comes back, what is raised."
    from lbyl_nb import plan

    html, _, _ = pages['reference/recover.qmd']
    part = re.search(r'<section id="plan".*?</section>', html, re.S)[0]
    text = re.sub(r'\s+', ' ', re.sub(r'<[^>]+>', '', part))
    assert inspect.getdoc(plan).splitlines()[0] in text
    for name in inspect.signature(plan).parameters:
        assert name in text
    for words in ('fraction to remove of each group', 'by default l2_norm', 'Raises', 'Returns'):
        assert words in text
    assert re.search(r'Raises</strong> ValueError for bad inputs', part)


def test_reference_leads_to_the_code(pages):
    "From every function to the cell that defines it, and back to the reference from the text."
    found = [link for n in REFERENCE for link in pages[n][1].links]
    told = {link.partition('#def-')[2] for link in found if '#def-' in link}
    assert told == {k for m in MODULES for k in public(m) if '.' not in k}
    links = [link for n in NOTEBOOKS for link in pages[n][1].links]
    assert sum(link.startswith('reference/') for link in links) > 200
    assert not [link for link in links if link.startswith('/')]


def test_papers_are_listed(processed):
    "The page has all works of references.bib, as Pandoc's citations make it."
    text = (processed / 'papers.qmd').read_text(encoding='utf-8')
    options = ['--citeproc', f'--resource-path={processed}', '--standalone', '--metadata=lang:en']
    html = pypandoc.convert_text(text, 'html', format='markdown', extra_args=options)
    ids = re.findall(r'^@\w+\{(\w+),', (ROOT / 'references.bib').read_text(encoding='utf-8'), re.M)
    assert len(ids) > 30
    assert {f'ref-{i}' for i in ids} <= Page(html).ids


def test_docstrings_are_taken_apart():
    "What a function does stands apart from what it raises; signs of Markdown are shown as such."
    tool = load_tool('reference')
    doc = """Cut a file; `ValueError` if it is empty.

    The pieces are |a| long. Raises as `b` does. TypeError for x; y is left.
    """
    does, raises = tool.sentences(doc)
    assert does == ['Cut a file', 'The pieces are |a| long.']
    assert raises == ['`ValueError` if it is empty.', 'As `b` does.', 'TypeError for x; y is left.']
    assert tool.plain('[0, 1) and `a_b` * c_d') == r'\[0, 1) and `a_b` \* c\_d'
    assert tool.linked('`f` and `g`', dict(f='m.qmd#f', g='#g'), {'g'}) == '[`f`](m.qmd#f) and `g`'


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_page_is_a_valid_notebook(name, processed):
    "By Jupyter's own check of the format, so are the copies for Colab."
    for path in (processed / name, processed / '_colab' / name):
        if path.exists():
            nbformat.validate(json.loads(path.read_text(encoding='utf-8')))


def test_titles_have_the_numbers_that_links_have(processed):
    heads = {n: front(processed / n) for n in NOTEBOOKS}
    for name, head in heads.items():
        number = re.match(r'\d+[a-z]?', name)
        assert head['output-file'] == name.replace('.ipynb', '.html')
        assert not number or head['title'].startswith(f'{number[0]} · ')


def test_imports_are_folded():
    tool = load_tool('website')
    assert tool.is_setup('#| export\nimport a\nfrom b import c')
    assert tool.is_setup('import torch\n\ngen = torch.Generator().manual_seed(0)')
    for source in ('import a\n\nf(a)', 'gen = torch.Generator().manual_seed(0)', '%pip x', 'x = 1'):
        assert not tool.is_setup(source)


def without_directives(source):
    return re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_folded_cells_are_imports(name, processed):
    """Imports are folded, and what a notebook says itself; no cell is left without code.

    A cell that a notebook folds says what is in it.
    """
    code = cells(processed / name, 'code')
    assert [c for c in code if not without_directives(c['source'])] == []
    own = [c for c in cells(NBS / name, 'code') if '#| code-fold: true\n' in c['source']]
    assert [c for c in own if '\n#| code-summary: ' not in c['source']] == []
    own = {without_directives(c['source']) for c in own}
    folded = [c for c in code if '#| code-fold: true' in c['source']]
    assert own <= {without_directives(c['source']) for c in folded}
    imports = [c for c in folded if without_directives(c['source']) not in own]
    assert imports
    nodes = [n for c in imports for n in ast.parse(c['source']).body]
    assert {type(n) for n in nodes} <= {ast.Import, ast.ImportFrom, ast.Assign}


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_figures_have_words(name, processed):
    "Every figure is at least 700 pixels wide and has a text in its place, on the page as well."
    drawn = lambda c: [o for o in c['outputs'] if 'image/png' in o.get('data', {})]
    figures = [c for c in cells(NBS / name, 'code') if drawn(c)]
    page = {without_directives(c['source']): c['source'] for c in cells(processed / name, 'code')}
    for c in figures:
        alt = re.search(r'^#\| fig-alt: .{20,}', c['source'], re.M)
        assert alt, c['source'][:200]
        assert alt[0] in page[without_directives(c['source'])]
        assert all(o['metadata']['image/png']['width'] >= 700 for o in drawn(c))


def test_colab_copies_install_the_package(processed):
    "The first notebooks, with one cell more, whose links lead to the repository."
    names = sorted(p.name for p in (processed / '_colab').iterdir())
    assert names == [n for n in NOTEBOOKS if re.match(r'index|0[0-4]_', n)]
    git_url = settings()['git_url']
    for name in names:
        first, *rest = cells(processed / '_colab' / name)
        assert f'git clone --quiet --depth 1 {git_url}\n' in first['source']
        assert '%pip install' in first['source']
        own = cells(NBS / name)
        assert [c['cell_type'] for c in rest] == [c['cell_type'] for c in own]
        assert [c['source'] for c in rest if c['cell_type'] == 'code'] == [
            c['source'] for c in own if c['cell_type'] == 'code'
        ]
        text = '\n'.join(c['source'] for c in rest if c['cell_type'] == 'markdown')
        assert not re.search(r'\]\((?!https?:|#)', text)
        page = '\n'.join(c['source'] for c in cells(processed / name, 'markdown'))
        hosted = git_url.replace('github.com', 'colab.research.google.com/github')
        assert f'({hosted}/blob/gh-pages/colab/{name})' in page


def test_addresses_are_those_of_the_owner(monkeypatch):
    tool, said = load_tool('website'), settings()
    monkeypatch.setenv('GITHUB_REPOSITORY_OWNER', 'somebody')
    assert tool.addresses(said) == (
        said['git_url'].replace('OWNER', 'somebody'),
        said['doc_url'].replace('OWNER', 'somebody'),
    )
    monkeypatch.delenv('GITHUB_REPOSITORY_OWNER')
    assert tool.addresses(said) == (said['git_url'], said['doc_url'])


def test_settings_of_quarto_have_what_they_name(processed):
    "Addresses are filled in, and pictures and styles are there."
    quarto = yaml.safe_load((processed / '_quarto.yml').read_text(encoding='utf-8'))
    site = quarto['website']
    assert site['repo-url'] == settings()['git_url'] and site['site-url'] == settings()['doc_url']
    shown = site['favicon'], site['open-graph']['image'], quarto['format']['html']['css']
    assert [f for f in shown if not (processed / f).exists()] == []
    assert set(quarto['format']['html']['theme']) == {'light', 'dark'}
    source = NBS.relative_to(ROOT).as_posix()
    assert site['repo-actions'] == ['source'] and site['repo-subdir'] == source
    listed = list(sidebar(site['sidebar']['contents']))
    assert sorted(listed) == sorted([*NOTEBOOKS, *REFERENCE, 'papers.qmd'])
    assert [f for f in listed if not (processed / f).exists()] == []


def test_pictures_are_what_the_script_draws(tmp_path):
    load_tool('pictures').draw(tmp_path)
    for name in ('card.png', 'favicon.svg', 'head_to_head.png'):
        drawn, stored = tmp_path / name, NBS / 'images' / name
        if name.endswith('png'):
            a, b = (np.asarray(Image.open(p).convert('RGB'), dtype=float) for p in (drawn, stored))
            assert a.shape == b.shape and a.shape[1] > 1000
            assert abs(a - b).mean() < 6  # letters of another version of matplotlib may differ
        else:
            shapes = [re.findall(r'fill: (#\w+)', p.read_text()) for p in (drawn, stored)]
            assert shapes[0] == shapes[1] and len(shapes[0]) == 8


def test_figure_of_the_front_page_is_of_these_results(tmp_path):
    "The numbers that it shows are stored with it."
    tool = load_tool('pictures')
    tool.draw(tmp_path)
    drawn, stored = (Image.open(d / 'head_to_head.png') for d in (tmp_path, NBS / 'images'))
    shown = json.loads(stored.info['Description'])
    assert shown == json.loads(drawn.info['Description'])
    assert {*tool.THEIRS, *tool.OURS, 'unpruned'} <= set(shown)


def test_llms_txt_lists_every_page(processed):
    text = (processed / 'llms.txt').read_text(encoding='utf-8')
    doc_url = settings()['doc_url']
    for n in NOTEBOOKS:
        assert f']({doc_url}/{n.replace(".ipynb", ".html")}): ' in text
    for m in MODULES:
        assert f']({doc_url}/reference/{m}.html): ' in text


@pytest.mark.skipif(not shutil.which('quarto'), reason='needs Quarto, which is no Python package')
def test_quarto_makes_the_website(processed, tmp_path):
    "The real program reads the settings, and search finds a definition."
    site = shutil.copytree(processed, tmp_path / 'site')
    run = call('quarto', 'render', cwd=site, timeout=1800)
    assert run.returncode == 0, run.stdout[-3000:]
    made = site / '_docs'
    for name in NOTEBOOKS:
        assert (made / name.replace('.ipynb', '.html')).exists()
    found = json.loads((made / 'search.json').read_text(encoding='utf-8'))
    assert 'reference/recover.html#lbyl_restore' in {entry['href'] for entry in found}
    page = Page((made / '13_recover.html').read_text(encoding='utf-8'))
    there = Page((made / 'reference' / 'recover.html').read_text(encoding='utf-8'))
    assert 'def-lbyl_restore' in page.ids and 'lbyl_restore' in there.ids
    assert any(link.endswith('reference/recover.html#lbyl_restore') for link in page.links)


@pytest.fixture
def make_docs(project):
    """Runs `make docs` in a copy of the project that borrows this environment.

    On its PATH is what make needs, and no quarto but what a test puts into the folder `bin`.
    """
    if sys.prefix == sys.base_prefix:
        pytest.skip('the tests run outside a virtual environment: there is none to lend')
    env = project / '.venv'
    env.mkdir()
    for p in os.scandir(sys.prefix):
        (env / p.name).symlink_to(p.path)
    for stamp in ('.place', '.installed', '.installed-dev'):
        (env / stamp).unlink(missing_ok=True)
        (env / stamp).write_text(f'{project}\n')
    tools = project / 'bin'
    tools.mkdir()
    for name in ('sh', 'make', 'sed', 'cat', 'test', 'env', 'rm', 'mv', 'mkdir'):
        (tools / name).symlink_to(shutil.which(name))
    run = lambda: call(tools / 'make', '-s', 'docs', cwd=project, PATH=str(tools))
    return project, run


def test_make_docs_says_that_quarto_is_missing(make_docs):
    """Without Quarto, `make docs` processes the pages and then fails with one sentence.

    It installs nothing.
    """
    project, run = make_docs
    run = run()
    assert run.returncode
    assert (project / '_proc' / 'index.ipynb').exists()
    assert not (project / '_docs').exists()
    [sentence] = [line for line in run.stdout.splitlines() if 'quarto' in line]
    assert 'not on the PATH' in sentence
    assert 'Traceback' not in run.stdout and 'sudo' not in run.stdout


def test_make_docs_renders_and_fails_with_quarto(make_docs):
    "What Quarto renders becomes _docs, with the copies for Colab; if it fails, so does make."
    project, run = make_docs
    stand_in = project / 'bin' / 'quarto'
    stand_in.write_text(
        '#!/bin/sh\n[ "$1" = render ] && mkdir _docs && cat index.ipynb > _docs/i\n'
    )
    stand_in.chmod(0o755)
    (project / '_docs').mkdir()
    (project / '_docs' / 'old').touch()
    assert run().returncode == 0
    assert sorted(p.name for p in (project / '_docs').iterdir()) == ['colab', 'i']
    assert (project / '_docs' / 'colab' / '01_delivery.ipynb').exists()
    stand_in.write_text('#!/bin/sh\nexit 3\n')
    assert run().returncode


def test_readme_is_the_index():
    stored = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert stored == docs.readme(NBS / 'index.ipynb'), 'make readme writes it anew'


def test_readme_is_a_front_page():
    "Short, without HTML, every notebook one link away, parts in the order that readers need."
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert text.count('\n') <= 150
    prose = re.sub(r'^```.*?^```|`[^`\n]+`', '', text, flags=re.M | re.S)
    assert not re.search(r'<\w+[ />]', prose)
    assert [n for n in NOTEBOOKS if n != 'index.ipynb' and f'(nbs/{n})' not in text] == []
    parts = (
        'head_to_head.png',
        'pip install',
        '```python',
        '| situation',
        'cannot do',
        'make demo',
    )
    parts += ('map.ipynb', '```bibtex', '(LICENSE)')
    places = [text.index(p) for p in parts]
    assert places == sorted(places)


def test_readme_links_resolve():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    page = Page(pypandoc.convert_text(text, 'html', format='gfm'))

    def leads_somewhere(link):
        if link.startswith('#') and link[1:] in page.ids:
            return True
        return (ROOT / link.partition('#')[0]).exists()

    links = page.links + page.images
    local = [unquote(link) for link in links if not re.match(r'(https?|mailto):', link)]
    assert [link for link in local if not leads_somewhere(link)] == []


def test_readme_writer(tmp_path):
    """Links move with the text, code keeps its brackets, directives vanish.

    Outputs become Markdown, hidden cells are left out.
    """

    def code(source, *outputs):
        return dict(cell_type='code', source=source, outputs=list(outputs))

    def data(kind, text):
        return dict(output_type='execute_result', data={kind: text})

    web = '[w](https://x.org) [h](#here)\n\n```sh\n[k](v)\n```'
    text = f'# T\n\n[a](00_a.ipynb#x) ![i](images/i.png) [l](../LICENSE) {web}'
    printed = dict(output_type='stream', name='stdout', text=['out\n'])
    cells = [
        dict(cell_type='markdown', source=text),
        code('#| eval: false\nf[0](x)', data('text/plain', '3')),
        code('#| hide\nsecret'),
        code('', data('text/html', '<style>p</style><b>1</b>')),
        code('#| echo: false\ng()', printed),
    ]
    nb = tmp_path / 'index.ipynb'
    nb.write_text(json.dumps(dict(cells=cells)))
    assert docs.readme(nb) == (
        f'# T\n\n[a](nbs/00_a.ipynb#x) ![i](nbs/images/i.png) [l](LICENSE) {web}\n\n'
        '```python\nf[0](x)\n```\n\n```\n3\n```\n\n<b>1</b>\n\n```\nout\n```\n'
    )
    nb.write_text(json.dumps(dict(cells=[code('plot()', data('image/png', ''))])))
    with pytest.raises(ValueError, match='figure'):
        docs.readme(nb)
