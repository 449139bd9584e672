"""What the website adds to the notebooks that nbdev has processed.

Titles with the notebook's number, links of names to the reference, an anchor before the code that
defines a public name, folded imports, copies of some notebooks for Colab with a link to them, the
reference itself, a list of papers, `llms.txt`, and in Quarto's settings the addresses from
settings.ini.
"""

import ast
import hashlib
import json
import os
import re
import shutil
from configparser import ConfigParser

import yaml
from reference import Module, defined, first_sentence, overview, page, public

REFERENCE, PAPERS = 'reference.qmd', 'papers.qmd'
COLAB_FOLDER = '_colab'  # Quarto leaves out what begins so; `make docs` puts it into the website
COLAB = re.compile(r'index|0[0-4]_')  # notebooks that need no images, weights or minutes
DIRECTIVE = re.compile(r'^#\|.*\n?', re.M)
EXPORTED = re.compile(r'^#\|\s*exports?\b', re.M)
# a name in backticks that nbdev has made a link to the page of a notebook
SYMBOL = re.compile(r'\[`([^`]+)`\]\(/[\w/]+\.html#[^)]*\)')


def addresses(
    settings,  # what settings.ini says
) -> tuple[str, str]:  # of the repository and of the website
    "On GitHub's runners OWNER, which settings.ini has in its place, is who owns the repository."
    owner = os.environ.get('GITHUB_REPOSITORY_OWNER', 'OWNER')
    return tuple(settings[k].replace('OWNER', owner) for k in ('git_url', 'doc_url'))


def is_setup(
    source: str,  # of a code cell
) -> bool:
    "Does a cell only import, or make a generator of random numbers beside that?"
    try:
        body = ast.parse(DIRECTIVE.sub('', source)).body
    except SyntaxError:  # a magic
        return False
    imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
    others = [n for n in body if n not in imports]
    seeds = all(isinstance(n, ast.Assign) and 'manual_seed' in ast.unparse(n) for n in others)
    return bool(imports) and seeds


def names_of(
    source: str,  # of a code cell
) -> list:  # names that it defines at its top level
    found = []
    for n in ast.parse(DIRECTIVE.sub('', source)).body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            found.append(n.name)
        elif isinstance(n, ast.Assign):
            targets = [x for t in n.targets for x in ast.walk(t)]
            found += [x.id for x in targets if isinstance(x, ast.Name)]
    return found


def to_reference(
    text: str,  # Markdown, with nbdev's links
    links: dict,  # name -> where the reference says what it is
) -> str:
    "Links of names lead to the reference; a name that it does not hold is none."

    def link(m):
        name = re.sub(r'^lbyl_nb\.\w+\.', '', m[1].removesuffix('()'))
        return f'[`{m[1]}`]({links[name]})' if name in links else f'`{m[1]}`'

    return SYMBOL.sub(link, text)


def cell(kind, source) -> dict:
    "A cell of text; its name follows from what it says."
    name = hashlib.sha1(source.encode()).hexdigest()[:8]
    return dict(cell_type=kind, id=name, metadata={}, source=source)


def write(nb, path):
    "A notebook as a file, sources as lists of lines."
    for c in nb['cells']:
        c['source'] = ''.join(c['source']).splitlines(keepends=True)
    text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
    path.write_text(text, encoding='utf-8')


def front(nb) -> dict:
    "What stands at the head of a processed notebook: title, description, name of its page."
    return yaml.safe_load(''.join(nb['cells'][0]['source']).strip().strip('-'))


def numbered(name, title) -> str:
    "A title with the number of its notebook, which links in the text have, too."
    number = re.match(r'\d+[a-z]?', name)
    return f'{number[0]} · {title}' if number else title


def finish(
    nb: dict,  # a processed notebook; changed
    name: str,  # its file
    links: dict,  # name -> where the reference says what it is
    exports: set,  # public names of its module
    colab: str,  # address of its copy for Colab, or nothing
):
    "The page of a notebook, from what nbdev made of it."
    head = front(nb)
    head['title'] = numbered(name, head['title'])
    head['output-file'] = name.replace('.ipynb', '.html')  # without numbers two have one name
    text = yaml.safe_dump(head, allow_unicode=True, sort_keys=False, width=1000)
    cells = [cell('raw', f'---\n{text}---')]
    if colab:
        cells.append(cell('markdown', f'[Open in Colab]({colab})'))
    for c in nb['cells'][1:]:
        source = c['source'] = ''.join(c['source'])
        if c['cell_type'] == 'markdown':
            c['source'] = to_reference(source, links)
        elif c['cell_type'] == 'code':
            if not DIRECTIVE.sub('', source).strip():
                continue
            if is_setup(source):
                whose = 'of the module' if EXPORTED.search(source) else 'of this page'
                c['source'] = f'#| code-fold: true\n#| code-summary: Imports {whose}\n{source}'
            if EXPORTED.search(source) and (made := exports.intersection(names_of(source))):
                places = [f'<div id="def-{n}"></div>' for n in sorted(made)]
                cells.append(cell('markdown', '\n'.join(places)))
        cells.append(c)
    nb['cells'] = cells


def for_colab(
    nb: dict,  # a notebook as it is in nbs/; changed
    git_url: str,  # of the repository
    relink,  # function of text and a folder, that sees relative links from there
):
    "A notebook that installs the package first, and whose links lead to the repository."
    for c in nb['cells']:
        if c['cell_type'] == 'markdown':
            c['source'] = relink(''.join(c['source']), f'{git_url}/blob/main/nbs')
    folder = git_url.rpartition('/')[2]
    lines = (
        '# get the package and its results, and install it: about a minute',
        f'!git clone --quiet --depth 1 {git_url}',
        f'%cd {folder}/nbs',
        '%pip install --quiet ..',
    )
    install = dict(cell('code', '\n'.join(lines)), execution_count=None, outputs=[])
    nb['cells'].insert(0, install)


def write_page(path, head, text):
    "A page that is no notebook, and that no file of the repository is the source of."
    head |= {'repo-actions': False}
    front = yaml.safe_dump(head, allow_unicode=True, sort_keys=False, width=1000)
    path.write_text(f'---\n{front}---\n\n{text}', encoding='utf-8')


def llms(settings, doc_url, pages, modules, links) -> str:
    "The website for a language model: what there is, in one line each, with addresses."
    lib = settings['lib_path']
    address = lambda name: f'{doc_url}/{links[name].replace(".qmd", ".html")}'
    lines = [f'# {settings["lib_name"]}', '', f'> {settings["description"]}', '', '## Pages', '']
    lines += [f'- [{h["title"]}]({doc_url}/{h["output-file"]}): {h["description"]}' for h in pages]
    lines += ['', f'## What `{lib}` exports', '']
    lines += [f'- [{k}]({address(k)}): {first_sentence(f)}' for k, f in public_top(lib)]
    lines += ['', '## Modules', '']
    where = f'{doc_url}/reference'
    lines += [f'- [{lib}.{m.name}]({where}/{m.name}.html): {m.description}' for m in modules]
    return '\n'.join(lines) + '\n'


def public_top(lib) -> list:
    "What stands at the top of the package: pairs of name and function."
    top = __import__(lib)
    return [(k, getattr(top, k)) for k in top.__all__]


def read(path) -> dict:
    return json.loads(path.read_text(encoding='utf-8'))


def exporting(notebooks) -> list:
    "The `Module`s that processed notebooks, by their files' names, export."
    found = []
    for name, nb in notebooks.items():
        code = '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'code')
        if exported := re.search(r'^#\|\s*default_exp:?\s+(\w+)', code, re.M):
            found.append(Module(exported[1], name, front(nb)['description']))
    return found


def copy_for_colab(name, root, made, git_url, relink) -> str:
    "Write a notebook's copy for Colab; the address where Colab finds it, once it is published."
    copy = read(root / 'nbs' / name)
    for_colab(copy, git_url, relink)
    write(copy, made / COLAB_FOLDER / name)
    hosted = git_url.replace('github.com', 'colab.research.google.com/github')
    return f'{hosted}/blob/gh-pages/colab/{name}'


def set_addresses(path, git_url, doc_url, description, modules):
    "Put into Quarto's settings what settings.ini says, and the pages of the reference."
    quarto = yaml.safe_load(path.read_text(encoding='utf-8'))
    listed = [dict(text=m.name, href=f'reference/{m.name}.qmd') for m in modules]
    section = dict(section='Reference', contents=listed)
    quarto['website']['sidebar']['contents'].append(section)
    quarto['website'] |= {'repo-url': git_url, 'site-url': doc_url, 'description': description}
    path.write_text(yaml.safe_dump(quarto, allow_unicode=True, sort_keys=False), encoding='utf-8')


def complete(
    root,  # the project
    made,  # folder of the notebooks that nbdev has processed, all of which are changed
    relink,  # as in `for_colab`
):
    "Everything that this module is for."
    parser = ConfigParser(delimiters='=', interpolation=None)
    parser.read(root / 'settings.ini', encoding='utf-8')
    settings = parser['DEFAULT']
    lib = settings['lib_path']
    git_url, doc_url = addresses(settings)
    notebooks = {p.name: read(p) for p in sorted(made.glob('*.ipynb'))}
    modules = exporting(notebooks)
    anchors = defined(lib, modules)
    links = {k: f'reference/{home}.qmd#{k}' for k, home in anchors.items()}
    exports = {m.notebook: set(public(lib, m.name)) for m in modules}
    (made / COLAB_FOLDER).mkdir()
    for name, nb in notebooks.items():
        opened = COLAB.match(name)
        colab = copy_for_colab(name, root, made, git_url, relink) if opened else ''
        finish(nb, name, links, exports.get(name, set()), colab)
        write(nb, made / name)
    head = dict(title='Reference', description='Every public name, by module')
    write_page(made / REFERENCE, head, overview(lib, modules, links))
    (made / 'reference').mkdir()
    for m in modules:
        head = dict(title=f'{lib}.{m.name}', description=m.description)
        write_page(made / 'reference' / f'{m.name}.qmd', head, page(lib, m, anchors))
    shutil.copy(root / 'references.bib', made)
    head = dict(title='Papers', description='The works that the notebooks name')
    head |= dict(bibliography='references.bib', nocite='@*')
    write_page(made / PAPERS, head, '::: {#refs}\n:::\n')
    text = llms(settings, doc_url, [front(nb) for nb in notebooks.values()], modules, links)
    (made / 'llms.txt').write_text(text, encoding='utf-8')
    set_addresses(made / '_quarto.yml', git_url, doc_url, settings['description'], modules)
