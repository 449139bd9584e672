#!/usr/bin/env python3
"""README.md from the index notebook, and the website's pages as far as they need no Quarto.

    python tools/docs.py readme     write README.md            (make readme)
    python tools/docs.py pages      write _proc/, for Quarto   (first half of make docs)

nbdev does both only where Quarto is installed, and offers to install it otherwise. These two need
nbdev's processing alone; what the website has besides is added by website.py. They stand outside
the package, which knows nothing of nbdev, and outside nbs/, all of which becomes part of the
website.
"""

import json
import os
import posixpath
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the target of a Markdown link or image, or of an HTML one
LINK = re.compile(r'(\]\(|(?:src|href)=")([^)"\s#][^)"\s]*)')
FENCE = re.compile(r'(^```.*?^```)', re.M | re.S)


def relink(
    text,  # Markdown as it stands in a notebook in nbs/
    folder='nbs',  # the notebook's folder, seen from where the text will stand; may be an address
):
    "`text` with its relative links seen from elsewhere; code blocks stay as they are."
    host = re.match(r'(?:[a-z]+://[^/]+)?', folder)[0]

    def target(m):
        if re.match(r'[a-z]+:|/', m[2]):
            return m[0]
        return m[1] + host + posixpath.normpath(posixpath.join(folder[len(host) :], m[2]))

    parts = FENCE.split(text)
    return ''.join(p if p.startswith('```') else LINK.sub(target, p) for p in parts)


def shown(output):
    """A stored output as Markdown: its own Markdown or HTML, else its plain text as a code block.

    Warnings and progress bars are left out.
    """
    if output['output_type'] == 'stream':
        data = {'text/plain': output['text']} if output['name'] == 'stdout' else {}
    else:
        data = output.get('data', {})
    if any(kind.startswith('image/') for kind in data):
        raise ValueError(
            'index.ipynb stores a figure as an output, which a README cannot hold: '
            'show an image file by a Markdown link instead'
        )
    for kind in ('text/markdown', 'text/html', 'text/plain'):
        if kind not in data:
            continue
        text = ''.join(data[kind]).strip('\n')
        if kind == 'text/html':
            text = re.sub(r'<style.*?</style>\s*', '', text, flags=re.S)
        return f'```\n{text}\n```' if kind == 'text/plain' else text
    return ''


def cell_md(cell):
    "The blocks of Markdown that one cell contributes. A cell marked `#| hide` contributes none."
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
        return [relink(source.strip())]
    if cell['cell_type'] != 'code':
        return []
    marks = {m.replace(' ', '') for m in re.findall(r'^#\|(.*)$', source, re.M)}
    if 'hide' in marks:
        return []
    code = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
    blocks = []
    if code and 'echo:false' not in marks:
        blocks.append(f'```python\n{code}\n```')
    if 'output:false' not in marks:
        blocks += [shown(o) for o in cell['outputs']]
    return [b for b in blocks if b]


def readme(
    notebook,  # path of the index notebook
):
    "The README that the notebook holds: its text, its code and what the code showed."
    cells = json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']
    return '\n\n'.join(block for cell in cells for block in cell_md(cell)) + '\n'


def pages(
    root=ROOT,  # the project
):
    "Process every notebook for the website into `root`/_proc, running no notebook; its path."
    sys.path.insert(0, str(root))  # the package that the reference is about is the one here
    import website
    from nbdev.serve import proc_nbs

    os.chdir(root)
    made = proc_nbs(str(root / 'nbs'), force=True, n_workers=0)
    notebooks = sorted(p.name for p in (root / 'nbs').glob('*.ipynb'))
    missing = [n for n in notebooks if not (made / n).exists()]
    if missing:
        ignored = 'it ignores whatever lies below a folder whose name begins with a dot.'
        raise SystemExit(f'nbdev left out {", ".join(missing)}; {ignored}')
    website.complete(root, made, relink)
    return made


if __name__ == '__main__':
    job = sys.argv[1:]
    if job == ['readme']:
        (ROOT / 'README.md').write_text(readme(ROOT / 'nbs' / 'index.ipynb'), encoding='utf-8')
    elif job == ['pages']:
        print('Processed notebooks are in', pages().relative_to(ROOT))
    else:
        raise SystemExit(__doc__)
