"""Model folding (Wang et al., ICLR 2025), written from its published description.

Channels are clustered by what writes and what reads them: their filters and the columns of the
layers behind, with batch norms folded in. One channel with the mean filter stands for a cluster,
and the layers behind read it with the sum of the columns. The mean of several channels varies less
than each of them. `fold` corrects for that from the weights alone (approximate REPAIR);
`lbyl_nb.strategies.adaptive_bn` does it with images. Notebook 48_head_to_head explains the formula.
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor, nn

from lbyl_nb import prune_only, restore
from lbyl_nb.graph import channels, find_groups
from lbyl_nb.layers import by_output, conv_groups
from lbyl_nb.recover import Restoration
from lbyl_nb.trace import trace


def weights_of(
    model: nn.Module,  # the dense network
    g,  # a group of its channels
) -> Tensor:  # (m, d)
    "All weights that write or read each channel, in a row; batch norms are folded into them."
    ch = channels(model, g)
    parts = [ch.rows * ch.a[:, None]]
    for c in g.consumers:
        W = by_output(model.get_submodule(c.name)).detach()[:, c.columns].double()
        of_output = W.transpose(0, 1).flatten(2)  # (m, outputs, span and taps)
        parts.append((of_output * _scale(model, c.norm)).flatten(1))
    return torch.cat(parts, 1)


def _scale(model, norm):
    "What a batch norm multiplies each channel by, as a column; 1 without one."
    if norm is None:
        return 1
    bn = model.get_submodule(norm)
    return (bn.weight / (bn.running_var + bn.eps).sqrt()).detach().double()[:, None]


def clusters(
    rows: Tensor,  # (m, d) weights of each channel
    k: int,  # how many clusters, at most
    seed: int = 0,
) -> Tensor:  # (k, m): 1 where a channel is in a cluster
    "K-means with ten starts. Every cluster has a member; rows that repeat may make fewer of them."
    means = KMeans(min(k, len(rows.unique(dim=0))), n_init=10, random_state=seed)
    label = torch.from_numpy(means.fit_predict(rows.numpy())).long()
    return F.one_hot(label).T.to(rows)


def variance_of_means(
    U: Tensor,  # (m, d) filters as rows, the batch norm folded into them
    gamma: Tensor,  # (m,) deviation of each channel's pre-activation
    member: Tensor,  # (k, m) from `clusters`
) -> Tensor:  # (k,)
    "Variance of each cluster's mean channel; cosines of filters stand in for correlations."
    unit = F.normalize(U, dim=1)
    covariance = gamma.abs()[:, None] * (unit @ unit.T) * gamma.abs()
    of_sums = torch.einsum('ki,ij,kj->k', member, covariance, member)
    return of_sums / member.sum(1).square()


def _producer_and_norm(model: nn.Module, g) -> tuple:
    "The layer that writes a group, and the batch norm behind it or None. ValueError for others."
    simple = g.norm is None or g.branches == (((g.producers[0], g.norm),),)
    read_alone = all(
        conv_groups(model.get_submodule(c.name)) == 1 and c.scale is None for c in g.consumers
    )
    if len(g.producers) > 1 or not simple or not read_alone:
        raise ValueError(f'{g.name}: only a layer with its batch norm and plain readers is folded')
    return model.get_submodule(g.producers[0]), g.norm and model.get_submodule(g.norm)


@torch.no_grad()
def _write_means(layer, norm, ch, member, at, repair):
    "The means of clusters in place of the filters `at`, and their statistics."
    mean = member / member.sum(1, keepdim=True)
    U = ch.a[:, None] * ch.W  # a copy: what is written below changes `ch.W`
    offset = mean @ ch.b
    by_output(layer)[at] = (mean @ U).view(-1, *by_output(layer).shape[1:]).to(layer.weight)
    if layer.bias is not None:
        layer.bias[at] = offset.to(layer.bias) if norm is None else 0
    if norm is None:
        return
    beta, target = mean @ ch.beta, mean @ ch.gamma.square()
    variance = variance_of_means(U, ch.gamma, member) if repair else target
    norm.weight[at], norm.bias[at] = target.sqrt().to(norm.weight), beta.to(norm.bias)
    norm.running_mean[at] = (beta - offset).to(norm.running_mean)
    norm.running_var[at] = (variance - norm.eps).clamp_min(0).to(norm.running_var)


@torch.no_grad()
def _write_sums(layer, columns, member, at):
    "Columns of a reader added up within clusters."
    columns = columns.to(layer.weight.device)
    W = by_output(layer)
    sums = torch.einsum('km,oms...->oks...', member.to(W), W[:, columns])
    W[:, columns[at]] = sums


def fold(
    model: nn.Module,  # the dense network; not changed
    example_inputs,  # as for `restore`
    sizes: dict,  # {group: how many channels stay}
    repair: bool = True,  # correct the variance from the weights; False: as if nothing was averaged
    seed: int = 0,  # of k-means
) -> Restoration:
    "Fold channels together. ValueError for groups with several writers or scaled readers."
    net = copy.deepcopy(model).eval()
    keep = {}
    for g in find_groups(trace(net, example_inputs)):
        if g.name not in sizes:
            continue
        layer, norm = _producer_and_norm(net, g)
        ch, rows = channels(net, g), weights_of(model, g)
        member = clusters(rows, sizes[g.name], seed)
        at = member.argmax(1)  # the first member of each cluster stands for it
        _write_means(layer, norm, ch, member, at, repair)
        for c in g.consumers:
            _write_sums(net.get_submodule(c.name), c.columns, member, at)
        keep[g.name] = sorted(at.tolist())
    return restore(net, example_inputs, keep=keep, restorer=prune_only())
