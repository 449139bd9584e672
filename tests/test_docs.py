"""The website up to Quarto's boundary.

Pages are processed, convert, and point at each other; the README is the index notebook.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pypandoc
import pytest
import yaml
from conftest import BUILT, NBS, NOTEBOOKS, ROOT, call, cells, settings

from lbyl_nb import _modidx

QUARTO = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs = load(ROOT / 'tools' / 'docs.py')


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
        text = json.dumps(notebook)
        html = pypandoc.convert_text(text, 'html', format='ipynb', extra_args=options)
        warnings = [m for m in json.loads(log.read_text()) if m['verbosity'] == 'WARNING']
        made[name] = html, Page(html), warnings
    return made


def number_results(notebook):
    """Give each result of a notebook a number.

    Pandoc's own reader of notebooks wants one, where a clean notebook, and the format, have null.
    """
    for cell in notebook['cells']:
        for output in cell.get('outputs', []):
            if output['output_type'] == 'execute_result':
                output['execution_count'] = 0


def output_file(page):
    "Name that nbdev gives a page on the website: the notebook's, without its number."
    front = [c for c in cells(page, 'raw') if c['source'].startswith('---')]
    if not front:
        return page.with_suffix('.html').name
    return yaml.safe_load(front[0]['source'].strip().strip('-'))['output-file']


def test_sidebar_is_the_notebooks():
    listed = list(sidebar(QUARTO['website']['sidebar']['contents']))
    assert [n for n in listed if not (NBS / n).exists()] == []
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


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_links_resolve(name, pages, processed):
    """Links between pages, to headings and to files lead somewhere, as do pictures.

    A link that nbdev makes of a symbol in backticks leads to the page that documents it; the
    symbol is no heading there.
    """
    names = {n: n for n in NOTEBOOKS}
    names.update({output_file(processed / n): n for n in NOTEBOOKS})
    documented = [where for module in _modidx.d['syms'].values() for where, _ in module.values()]
    symbols = {where.partition('#')[2] for where in documented}
    _, page, _ = pages[name]

    def leads_somewhere(link):
        target, _, anchor = unquote(link).lstrip('/').partition('#')
        if target and target not in names:
            return (NBS / target).resolve().exists()
        _, there, _ = pages[names[target] if target else name]
        return not anchor or anchor in symbols or anchor in there.ids

    links = [link for link in page.links if not re.match(r'(https?|mailto):', link)]
    assert [link for link in links if not leads_somewhere(link)] == []
    images = [src for src in page.images if not re.match(r'https?:|data:', src)]
    assert [src for src in images if not (NBS / unquote(src)).exists()] == []


def test_make_docs_says_that_quarto_is_missing(project):
    """Without Quarto, `make docs` processes the pages and then fails with one sentence.

    It installs nothing.
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
    tools = project / 'bin'  # a PATH with make's needs and no quarto
    tools.mkdir()
    for name in ('sh', 'make', 'sed', 'cat', 'test', 'env'):
        (tools / name).symlink_to(shutil.which(name))
    run = call(tools / 'make', '-s', 'docs', cwd=project, PATH=str(tools))
    assert run.returncode
    assert (project / '_proc' / 'index.ipynb').exists()
    assert not (project / '_docs').exists()
    [sentence] = [line for line in run.stdout.splitlines() if 'quarto' in line]
    assert 'not on the PATH' in sentence
    assert 'Traceback' not in run.stdout and 'sudo' not in run.stdout


def test_readme_is_the_index():
    stored = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert stored == docs.readme(NBS / 'index.ipynb'), 'make readme writes it anew'


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
