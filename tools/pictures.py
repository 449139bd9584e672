#!/usr/bin/env python3
"""Pictures that are files: the website's icon, its card for links, the figure of the front page.

    python tools/pictures.py    write favicon.svg, card.png and head_to_head.png into nbs/images

Icon and card show the channels of a layer: some kept, some removed, and what the kept ones carry
for them. The figure is drawn from nbs/results/head_to_head.csv.
"""

import sys
from configparser import ConfigParser
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.patches import Patch, Rectangle

ROOT = Path(__file__).resolve().parent.parent
BLUE, ORANGE, PALE = '#1f5fa8', '#e8842c', '#d5dee8'
HEIGHTS = 0.5, 0.42, 0.58, 0.46, 0.54  # of the channels
REMOVED = 1, 3
CARRIED = 0.16  # what a kept channel carries for the removed ones
# ways of head_to_head.csv as the figure names them: those of others, and those of this package
THEIRS = {
    'pruned': 'pruned, nothing done',
    'LBYL': 'LBYL',
    'merging': 'neuron merging',
    'folding': 'model folding',
    'channels': 'ridge for channels (as GRAIL)',
    'batch norms': 'batch norms re-estimated',
}
OURS = {
    'LBYL, mean': 'LBYL with a constant for the mean',
    'noise': 'layer by layer, noise',
    'default': 'layer by layer, the default',
    'distilled': 'layer by layer, distilled probes',
    'chosen, default': 'the default within a budget',
    'outputs': 'layer by layer, the images',
}
NEEDS = {'nothing': 'with nothing but the network', '128 images': 'with 128 images, no labels'}
COLOURS = {'nothing': (BLUE, '#a9c4e4'), '128 images': (ORANGE, '#f6cfa8')}  # ours, theirs


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


def measured(
    path=ROOT / 'nbs' / 'results' / 'head_to_head.csv',
) -> pd.DataFrame:  # accuracy in percent and needs, by method; the unpruned network is one of them
    "ResNet-20 without half of its channels: means over seeds."
    rows = pd.read_csv(path)
    rows['accuracy'] = 100 * rows.right / rows.n
    rows = rows[(rows.network == 'resnet20_cifar10') & rows.ratio.isin([0, 0.5])]
    return rows.groupby('method').agg(accuracy=('accuracy', 'mean'), needs=('needs', 'first'))


def head_to_head(
    table,  # from `measured`
):
    "Bars of accuracy, a panel for each kind of need, 1400 by 980 pixels at 200 dpi."
    names = THEIRS | OURS
    parts = {k: table[table.needs == k].filter(list(names), axis=0) for k in NEEDS}
    how = dict(sharex=True, layout='constrained', height_ratios=[len(p) for p in parts.values()])
    fig, axes = plt.subplots(len(parts), figsize=(7, 4.9), **how)
    unpruned = table.accuracy['unpruned']
    for ax, (need, part) in zip(axes, parts.items()):
        part = part.sort_values('accuracy')
        colours = [COLOURS[need][m in THEIRS] for m in part.index]
        bars = ax.barh([names[m] for m in part.index], part.accuracy, color=colours)
        ax.bar_label(bars, fmt='%.1f', padding=4)
        ax.axvline(unpruned, color='.3', linestyle=':')
        ax.set_title(NEEDS[need], loc='left', fontsize=11, color=COLOURS[need][0])
        ax.spines[['top', 'right']].set_visible(False)
    words = zip(COLOURS['nothing'], ('this package', 'published method, our code'))
    shades = [Patch(color=c, label=w) for c, w in words]
    axes[0].legend(handles=shades, loc='lower right', bbox_to_anchor=(0.91, 0), frameon=False)
    above = dict(ha='center', va='bottom', transform=axes[0].get_xaxis_transform())
    axes[0].text(unpruned, 1, f'unpruned {unpruned:.1f}', **above)
    axes[-1].set(xlabel='right of 10,000 test images (%)', xlim=(0, 100))
    return fig


def draw(
    folder,  # where the files go
):
    "All pictures, the same bytes each time under one version of matplotlib."
    parser = ConfigParser(delimiters='=', interpolation=None)
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    settings = parser['DEFAULT']
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, 'svg.hashsalt': 'lbyl_nb'}):
        matplotlib.use('agg')
        small, large = favicon(), card(settings['lib_name'], settings['description'])
        small.savefig(folder / 'favicon.svg', transparent=True, metadata=dict(Date=None))
        large.savefig(folder / 'card.png', dpi=100)
        table = measured()
        said = table.accuracy.round(1).to_json()  # what the figure shows, for whom it is too old
        figure = head_to_head(table)
        figure.savefig(folder / 'head_to_head.png', dpi=200, metadata=dict(Description=said))
    plt.close('all')


if __name__ == '__main__':
    if sys.argv[1:]:
        raise SystemExit(__doc__)
    target = ROOT / 'nbs' / 'images'
    target.mkdir(exist_ok=True)
    draw(target)
    print('Drawn:', *(p.relative_to(ROOT) for p in sorted(target.iterdir())))
