"""What stand-ins for images are worth: noise, dead leaves, fractals, photographs, distilled probes.

    python benchmarks/trials/sources.py FOLDER LITE0

Plans are those that the default chooses for the networks in `photographs.py`; 32 probes of a source
restore them. All is measured on the 100 photographs that serve to choose. Rows go into
nbs/results/sources.csv; the same call goes on where it stopped. Half an hour on one core.
"""

import sys
from functools import cache
from pathlib import Path

import torch
from photographs import RESULTS, SHARES, X
from probes import moved, restored

from lbyl_nb import distilled, noise
from lbyl_nb.bench import sweep
from lbyl_nb.distilled import dead_leaves
from lbyl_nb.photographs import input_range, photographs, stand_ins
from lbyl_nb.probes import Probes, pinned

N = 32


def one_fractal(size, generator):
    "What two to four random contractions of the plane leave of a point that they move in turn."
    k = int(torch.randint(2, 5, (), generator=generator))
    maps = torch.rand(k, 2, 3, generator=generator) * 2 - 1
    lengths = torch.linalg.matrix_norm(maps[:, :, :2], ord=2)
    maps[:, :, :2] *= (0.8 / lengths.clamp(min=0.8)).view(-1, 1, 1)
    points = torch.rand(4000, 2, generator=generator)
    visits = torch.zeros(size * size)
    for step in range(60):
        turn = maps[torch.randint(k, (len(points),), generator=generator)]
        points = (turn[:, :, :2] @ points[..., None])[..., 0] + turn[:, :, 2]
        if step >= 20:
            low, high = points.quantile(0.01, 0), points.quantile(0.99, 0)
            cell = ((points - low) / (high - low).clamp(min=1e-6) * size).long().clamp(0, size - 1)
            visits += torch.bincount(cell[:, 0] * size + cell[:, 1], minlength=size * size)
    return visits.log1p().view(size, size)


def fractals(shape, generator):
    "Fractals in three colours each, of mean zero and deviation one."
    n, channels, size, _ = shape
    layers = [one_fractal(size, generator) for _ in range(3 * n)]
    x = torch.stack(layers).view(n, 3, size, size)
    colours = torch.randn(n, channels, 3, generator=generator)
    x = torch.einsum('nck,nkhw->nchw', colours, x)
    return (x - x.mean()) / x.std()


@cache
def pictures(draw, seed):
    "Images (n, channels, h, w) of one kind."
    return draw((N, *X.shape[1:]), torch.Generator().manual_seed(seed))


def drawn(draw, seed):
    "A source of such images, in the range of the network's inputs."

    def source(model, args):
        x = pictures(draw, seed)
        scale, offset = input_range(model, (x,))
        return pinned(Probes(model, (scale * x + offset,)))

    return source


SOURCES = {
    'noise': lambda seed: noise(N, seed),
    'dead leaves': lambda seed: drawn(dead_leaves, seed),
    'fractals': lambda seed: drawn(fractals, seed),
    'photographs': lambda seed: photographs(N, seed),
    'photographs and noise': lambda seed: stand_ins(N, seed),
    'distilled': lambda seed: distilled(N, seed, photographs=True),
}


def measure(s, folder, file):
    "One restoration with probes of a source."
    small, _ = restored(s, SOURCES[s['source']](s['seed']), folder, file)
    return moved(s, small, folder, file)


def settings():
    "Trials, source by source."
    for seed in range(2):
        for source in SOURCES:
            for name, shares in SHARES.items():
                for share in shares:
                    yield dict(network=name, share=share, source=source, probes=N, seed=seed)


if __name__ == '__main__':
    folder, file = (Path(v).resolve() for v in sys.argv[1:])
    rows = sweep(RESULTS.with_name('sources.csv'), settings(), lambda s: measure(s, folder, file))
    print(rows.to_string())
