#!/usr/bin/env python3
"""The website's icon and the picture that is shown where somebody links to it.

    python tools/pictures.py    write nbs/images/favicon.svg and nbs/images/card.png

Both show the channels of a layer: some kept, some removed, and what the kept ones carry for them.
"""

import sys
from configparser import ConfigParser
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parent.parent
BLUE, ORANGE, PALE = '#1f5fa8', '#e8842c', '#d5dee8'
HEIGHTS = 0.5, 0.42, 0.58, 0.46, 0.54  # of the channels
REMOVED = 1, 3
CARRIED = 0.16  # what a kept channel carries for the removed ones


def bars(ax):
    "Five channels as bars in the unit square: removed ones pale, kept ones with what they carry."
    width, gap = 0.13, 0.185
    for i, height in enumerate(HEIGHTS):
        x = 0.065 + i * gap
        color = PALE if i in REMOVED else BLUE
        ax.add_patch(Rectangle((x, 0.12), width, height, color=color, linewidth=0))
        if i not in REMOVED:
            carried = Rectangle((x, 0.12 + height), width, CARRIED, color=ORANGE, linewidth=0)
            ax.add_patch(carried)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.axis('off')


def favicon():
    "The icon, 64 by 64."
    fig = plt.figure(figsize=(0.64, 0.64))
    bars(fig.add_axes([0, 0, 1, 1]))
    return fig


def card(
    name,  # of the package
    description,  # what it is for, in a sentence
):
    "The picture for links, 1200 by 630 pixels at 100 dpi."
    fig = plt.figure(figsize=(12, 6.3), facecolor='white')
    bars(fig.add_axes([0.62, 0.12, 0.36, 0.76]))
    fig.text(0.06, 0.66, name, fontsize=60, fontweight='bold', color=BLUE)
    first, _, second = description.partition(', ')
    for k, line in enumerate((f'{first},', f'{second}.')):
        fig.text(0.06, 0.49 - 0.09 * k, line, fontsize=20, color='#222222')
    return fig


def draw(
    folder,  # where the two files go
):
    "Both pictures, the same bytes each time under one version of matplotlib."
    parser = ConfigParser(delimiters='=', interpolation=None)
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    settings = parser['DEFAULT']
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, 'svg.hashsalt': 'lbyl_nb'}):
        matplotlib.use('agg')
        small, large = favicon(), card(settings['lib_name'], settings['description'])
        small.savefig(folder / 'favicon.svg', transparent=True, metadata=dict(Date=None))
        large.savefig(folder / 'card.png', dpi=100)
    plt.close('all')


if __name__ == '__main__':
    if sys.argv[1:]:
        raise SystemExit(__doc__)
    target = ROOT / 'nbs' / 'images'
    target.mkdir(exist_ok=True)
    draw(target)
    print('Drawn:', *(p.relative_to(ROOT) for p in sorted(target.iterdir())))
