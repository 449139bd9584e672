"""The reference: every public name of the package, a page of Markdown for each module.

What it says stands in the code: signatures, the words beside parameters, docstrings. Each name has
a heading of its own, whose anchor is the name, so that links lead there. It is of the second level,
for the website's search finds pages, and in them the sections of that level.
"""

import ast
import importlib
import inspect
import re
import textwrap
from dataclasses import dataclass

from fastcore.docments import docments

SENTENCE = re.compile(r'(?<=[.!?])\s+(?=[A-Z`|])')
# what follows a semicolon and begins with an error: "…; otherwise a `ValueError` that …"
CLAUSE = re.compile(r';\s+(?=(?:otherwise an? )?`?[A-Z]\w*Error\b)')
RAISES = re.compile(r'\b[A-Z]\w*Error\b|^Errors as in |^Raises ')
CODE = re.compile(r'(`[^`]+`)')
WIDTH = 80


@dataclass
class Module:
    "A module and the notebook that it is exported from."

    name: str  # without the package
    notebook: str  # file name
    description: str  # what it is about, in a sentence


def stem(notebook) -> str:
    "A notebook's file name as the text has it in links."
    return notebook.removesuffix('.ipynb')


def plain(
    text: str,  # words of a docstring or comment, with code in backticks
) -> str:  # Markdown that shows just these words
    "Words as they are: whatever Markdown would take for a sign of its own is escaped."
    parts = CODE.split(text)
    escaped = [re.sub(r'([\\*_\[\]<>$|#~^@{}])', r'\\\1', p) for p in parts[::2]]
    parts[::2] = escaped
    return ''.join(parts)


def linked(
    text: str,  # Markdown
    links: dict,  # name -> where the reference says what it is, seen from this page
    here=(),  # names that mean something else here: the parameters of the function
) -> str:  # Markdown
    "Names in backticks as links to where the reference says what they are."

    def link(m):
        name = m[0].strip('`').removesuffix('()')
        return f'[{m[0]}]({links[name]})' if name in links and name not in here else m[0]

    return CODE.sub(link, text)


def sentences(
    doc: str,  # a docstring
) -> tuple[list, list]:  # paragraphs on what it does, sentences on what it raises
    "A docstring in two parts."
    does, raises = [], []
    for paragraph in re.split(r'\n\s*\n', inspect.cleandoc(doc)):
        parts = [c for s in SENTENCE.split(' '.join(paragraph.split())) for c in CLAUSE.split(s)]
        raises += [p for p in parts if RAISES.search(p)]
        if rest := [p for p in parts if not RAISES.search(p)]:
            does.append(' '.join(rest))
    ends = [re.sub('^Raises ', '', p).rstrip('.') for p in raises]
    return does, [p[:1].upper() + p[1:] + '.' for p in ends]


def tree(f) -> ast.AST:
    "Syntax of a function or class."
    return ast.parse(textwrap.dedent(inspect.getsource(f))).body[0]


def arguments(node) -> list:
    "Parameters of a function as tuples: name with stars, name, annotation, default, as written."
    a = node.args
    said = lambda x: ast.unparse(x) if x is not None else ''
    row = lambda p, stars='', default=None: (
        stars + p.arg,
        p.arg,
        said(p.annotation),
        said(default),
    )
    positional = a.posonlyargs + a.args
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    rows = [row(p, default=d) for p, d in zip(positional, defaults)]
    if a.vararg:
        rows.append(row(a.vararg, '*'))
    elif a.kwonlyargs:
        rows.append(('*', '', '', ''))
    rows += [row(p, default=d) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    return rows + ([row(a.kwarg, '**')] if a.kwarg else [])


def fields(node) -> list:
    "Fields of a data class or named tuple, as `arguments` gives parameters."
    found = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    default = lambda n: ast.unparse(n.value) if n.value is not None else ''
    return [(n.target.id, n.target.id, ast.unparse(n.annotation), default(n)) for n in found]


def call(name, rows) -> str:
    "A call with all parameters and defaults, on one line or one line for each."
    said = [shown + (f'={default}' if default else '') for shown, _, _, default in rows]
    line = f'{name}({", ".join(said)})'
    if len(line) <= WIDTH:
        return line
    return f'{name}(\n' + ''.join(f'    {s},\n' for s in said) + ')'


def parameters(rows, words, links) -> str:
    "What each parameter is: a list of terms and their words."
    blocks = []
    for shown, name, annotation, default in rows:
        if not name:
            continue
        said = plain(words.get(name) or '')
        here = {n for _, n, _, _ in rows}
        kind = ': ' + linked(f'`{annotation}`', links, here) if annotation else ''
        default = f', by default `{default}`' if default else ''
        blocks.append(f'**`{shown}`**{kind}{default}\n:   {linked(said, links, here) or "–"}')
    return '\n\n'.join(blocks)


def definition(f, name, links, origin='', level=2) -> str:
    """The part of the page on a function or a class: heading, call, words, parameters, errors.

    `origin` is the notebook whose code defines it; its page has an anchor there.
    """
    f = inspect.unwrap(f)
    node = tree(f)
    words = docments(f, args_kwargs=True)
    given = node
    if isinstance(node, ast.ClassDef):
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__']
        given = made[0] if made else None
        rows = arguments(given)[1:] if made else fields(node)
    else:
        rows = [r for r in arguments(node) if r[1] not in ('self', 'cls')]
    here = {n for _, n, _, _ in rows}
    does, raises = sentences(f.__doc__ or '')
    blocks = [f'{"#" * level} {plain(name)} {{#{name}}}', f'```python\n{call(name, rows)}\n```']
    blocks += [linked(plain(p), links, here) for p in does]
    blocks += [defined_in(origin, name)] if origin else []
    if any(words.get(n) for n in here):
        blocks += ['**Parameters**', parameters(rows, words, links)]
    returns = getattr(given, 'returns', None)
    if isinstance(node, ast.FunctionDef) and (returns is not None or words.get('return')):
        kind = linked(f'`{ast.unparse(returns)}`', links) if returns is not None else ''
        said = linked(plain(words.get('return') or ''), links, here)
        blocks.append(f'**Returns** {": ".join(x for x in (kind, said) if x)}')
    if raises:
        blocks.append(f'**Raises** {linked(plain(" ".join(raises)), links, here)}')
    return '\n\n'.join(blocks)


def defined_in(notebook, name) -> str:
    "A link to the code that defines a name."
    return f'[code in {stem(notebook)}](../{notebook}#def-{name}){{.origin}}'


def methods(cls) -> list:
    "Public functions that a class defines itself, with what their names are in the reference."
    found = []
    for k, v in vars(cls).items():
        f = v.__func__ if isinstance(v, (classmethod, staticmethod)) else v
        f = f.fget if isinstance(f, property) else getattr(f, 'func', f)
        own = inspect.isfunction(f) and f.__qualname__ == f'{cls.__qualname__}.{k}'
        if own and not k.startswith('_'):
            found.append((f'{cls.__name__}.{k}', f))
    return found


def constant(module, name, origin) -> str:
    "The part of the page on a value that has a name: its heading and how it is written."
    source = ast.parse(inspect.getsource(module))
    for n in source.body:
        targets = n.targets if isinstance(n, ast.Assign) else [getattr(n, 'target', None)]
        names = {x.id for t in targets if t for x in ast.walk(t) if isinstance(x, ast.Name)}
        if name in names:
            code = textwrap.shorten(ast.unparse(n), 4 * WIDTH, placeholder=' …')
            head = f'## {plain(name)} {{#{name}}}\n\n```python\n{code}\n```'
            return f'{head}\n\n{defined_in(origin, name)}'
    raise ValueError(f'{module.__name__} has {name} in __all__ and assigns it nowhere')


def public(lib, name) -> dict:
    "What a module defines for everybody, by name: functions, classes and values."
    module = importlib.import_module(f'{lib}.{name}')
    return {k: getattr(module, k) for k in module.__all__}


def defined(lib, modules) -> dict:
    "All anchors of the reference: public names and public methods of classes -> their module."
    found = {}
    for m in modules:
        for k, v in public(lib, m.name).items():
            names = [k, *(n for n, _ in methods(v))] if inspect.isclass(v) else [k]
            found |= dict.fromkeys(names, m.name)
    return found


def page(lib, m, anchors) -> str:
    "The page on one module."
    module = importlib.import_module(f'{lib}.{m.name}')
    links = {k: f'{"" if home == m.name else home + ".qmd"}#{k}' for k, home in anchors.items()}
    origin = f'[{stem(m.notebook)}](../{m.notebook})'
    blocks = [f'Derived and checked in {origin}; other modules: [Reference](../reference.qmd).']
    for k, v in public(lib, m.name).items():
        if not (inspect.isclass(v) or inspect.isroutine(v)):
            blocks.append(constant(module, k, m.notebook))
            continue
        blocks.append(definition(v, k, links, m.notebook))
        if inspect.isclass(v):
            blocks += [definition(f, n, links, level=3) for n, f in methods(v)]
    return '\n\n'.join(blocks) + '\n'


def first_sentence(f) -> str:
    "What a function does, in one sentence."
    does, _ = sentences(f.__doc__ or '')
    return SENTENCE.split(does[0])[0].rstrip('.') if does else ''


def overview(
    lib: str,  # the package
    modules: list,  # `Module`s in the order of their notebooks
    links: dict,  # name -> where the reference says what it is
) -> str:  # Markdown, without a title
    "The first page of the reference: what stands at the top of the package, and all modules."
    top = importlib.import_module(lib)
    short = []
    for k in top.__all__:
        said = linked(plain(first_sentence(getattr(top, k))), links, {k})
        short.append(f'[`{k}`]({links[k]})\n:   {said}')
    listed = []
    for m in modules:
        names = ', '.join(f'[`{k}`]({links[k]})' for k in public(lib, m.name))
        says = plain(m.description.rstrip('.'))
        listed.append(f'[{lib}.{m.name}](reference/{m.name}.qmd)\n:   {says}: {names}')
    head = [
        'Every public name, as its signature and docstring have it. Each module names the notebook '
        'where its content is derived and checked.',
        f'## At the top of the package\n\nThese are imported from `{lib}` itself.',
    ]
    return '\n\n'.join([*head, *short, '## Modules', *listed]) + '\n'
