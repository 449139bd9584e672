"""LBYL's solver, all removed channels at once against one at a time.

On the layers of ResNet-101, of whose channels 30 % are removed. Prints ratios of times measured
in one run, double precision. Weights are random: they decide nothing about time.
"""

import time
from collections import Counter

import pandas as pd
import torch
import torchvision
from tqdm.auto import tqdm

from _process import footer
from lbyl_nb.closed_form import lbyl_delivery
from lbyl_nb.delivery import split

LAM1 = LAM2 = 0.1


def shapes():
    "How often each filter matrix (m, d) occurs among the convolutions inside ResNet-101's blocks."
    with torch.device('meta'):
        net = torchvision.models.resnet101()
    inside = [m for k, m in net.named_modules() if k.endswith(('.conv1', '.conv2'))]
    return Counter((m.out_channels, m.weight[0].numel()) for m in inside)


def per_channel(W, a, b, keep):
    "Theorem 2 as it stands: one system a removed channel, built and solved from scratch."
    K, R = split(keep, len(W))
    S = W.new_empty(len(R), len(K))
    for i, j in enumerate(tqdm(R.tolist(), 'one channel at a time', delay=2, leave=False)):
        P = (a[K] / a[j])[:, None] * W[K]
        A = P @ P.T + LAM1 * torch.outer(b[K], b[K]) + LAM2 * torch.eye(len(K), dtype=W.dtype)
        S[i] = torch.linalg.solve(A, P @ W[j] + LAM1 * b[j] * b[K])
    return S


def shared_gram(W, a, b, keep):
    "One system a removed channel, but the Gram matrix of the folded filters computed only once."
    K, R = split(keep, len(W))
    U = a[:, None] * W
    S = W.new_empty(len(R), len(K))
    G = U[K] @ U[K].T
    C = U[K] @ U[R].T
    eye = torch.eye(len(K), dtype=W.dtype)
    bb = torch.outer(b[K], b[K])
    for i, j in enumerate(R.tolist()):
        A = G + a[j] ** 2 * (LAM1 * bb + LAM2 * eye)
        S[i] = torch.linalg.solve(A, C[:, i] + a[j] ** 2 * LAM1 * b[j] * b[K])
    return S


def factor(W, a, b, keep):
    "Nothing but the Gram matrix and its factorisation."
    U = (a[:, None] * W)[keep]
    return torch.linalg.eigh(U @ U.T)


def seconds(f, *args, repeat=1):
    "Least time of a few runs, and the result."
    best = float('inf')
    for _ in range(repeat):
        start = time.perf_counter()
        out = f(*args)
        best = min(best, time.perf_counter() - start)
    return best, out


def compare(m, d, gen):
    "Times of all ways for one random layer, checked against each other."
    W = torch.randn(m, d, generator=gen, dtype=torch.float64) / d**0.5
    a = torch.rand(m, generator=gen, dtype=torch.float64) + 0.5
    b = torch.randn(m, generator=gen, dtype=torch.float64)
    keep = torch.randperm(m, generator=gen)[: round(0.7 * m)].sort().values
    batched, S = seconds(lambda *v: lbyl_delivery(*v, LAM1, LAM2), W, a, b, keep, repeat=3)
    shared, S1 = seconds(shared_gram, W, a, b, keep)
    naive, S2 = seconds(per_channel, W, a, b, keep)
    torch.testing.assert_close(S, S1)
    torch.testing.assert_close(S, S2)
    factored, _ = seconds(factor, W, a, b, keep, repeat=3)
    return dict(batched=batched, shared=shared, naive=naive, factor=factored)


def ratios(v):
    "What is printed, from times."
    return pd.Series(
        {
            'one at a time / batched': v.naive / v.batched,
            'one at a time, shared Gram / batched': v.shared / v.batched,
            'batched / Gram and factorisation alone': v.batched / v.factor,
        }
    )


def main():
    gen = torch.Generator().manual_seed(0)
    rows = [
        dict(filters=m, weights=d, layers=n, **compare(m, d, gen))
        for (m, d), n in sorted(shapes().items())
    ]
    t = pd.DataFrame(rows)
    sizes = t[['filters', 'weights', 'layers']]
    shown = pd.concat([sizes, t.apply(ratios, axis=1).round(2)], axis=1)
    print(shown.to_string(index=False))
    total = t[['batched', 'shared', 'naive', 'factor']].mul(t.layers, axis=0).sum()
    print('\nwhole network:')
    print(ratios(total).round(2).to_string())
    print(footer())


if __name__ == '__main__':
    main()
