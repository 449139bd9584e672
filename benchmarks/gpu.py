"""What wants a GPU for minutes: training, tables, and training again after restoration.

    python benchmarks/gpu.py STAGE [--weights FOLDER] [--out FOLDER] [--seconds 440]

A call stops by itself when its seconds are over, says so, and the same call again goes on: every
row is kept in nbs/results/gpu_STAGE.csv, with device and versions, and trainings in files of the
weights' folder. Without a GPU all is computed on a processor, in days.

    train     VGG-16 and ResNet-18 on CIFAR-10, ResNet-50 on CIFAR-100
    tables    test accuracy after pruning and restoration: VGG-16 and ResNet-50 by criterion, ratio
              and method; ResNet-18 with its residual streams, as in papers on folding
    finetune  ResNet-50 trained after pruning and restoration, and as small from scratch: test
              accuracy after each epoch
    boost     a table of over-parameterization, MobileNetV2 by five methods, by the cells of
              nbs/45_boost.ipynb for a GPU, shorter; learning rates by held-out training images

It needs the images where `lbyl_nb.data` finds them ($LBYL_DATA) and a folder for weights
($LBYL_WEIGHTS, or --weights), best one in memory, as every epoch is kept there. Networks lie in
it as NAME.safetensors, matrices in half precision, and what is reported of them is of these
rounded weights; `train` comes first. --out ($OUT) takes what shall leave a machine: the rows, and
weights in pieces under 16 MiB, NAME.safetensors.0000-of-0007 and so on. In the folder of weights,
pieces serve as well as the whole: `network` joins and loads them. `cat` joins them, too.
"""

import argparse
import json
import os
import shutil
import time
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from lbyl_nb import data, models
from lbyl_nb.bench import accuracy, sweep, train
from lbyl_nb.cost import cost
from lbyl_nb.criteria import geometric_median, l1_norm, l2_norm, random_scores
from lbyl_nb.distilled import distilled
from lbyl_nb.files import join_file, read_safetensors, split_file, write_safetensors
from lbyl_nb.finetune import FINETUNING, SCRATCH, finetune, fresh
from lbyl_nb.layerwise import default_restorer, layerwise, probed_lbyl
from lbyl_nb.least_lost import least_lost
from lbyl_nb.probes import calibration
from lbyl_nb.recover import restore
from lbyl_nb.restorers import lbyl, merging, prune_only, with_mean
from lbyl_nb.saved import load_restored, save_restored

NBS = Path(__file__).resolve().parents[1] / 'nbs'
RESULTS = NBS / 'results'
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
BATCH = 256


class Training(NamedTuple):
    "How a network comes about."

    build: object  # () -> network
    images: str  # name of the set
    epochs: int
    lr: float


NETWORKS = dict(
    vgg16_bn_cifar10=Training(models.vgg16_bn, 'cifar10', 50, 0.1),
    resnet50_cifar100=Training(lambda: models.resnet50_cifar(100), 'cifar100', 45, 0.2),
    resnet18_cifar10=Training(models.resnet18_cifar, 'cifar10', 30, 0.2),
)
TABLES = 'vgg16_bn_cifar10', 'resnet50_cifar100'
RATIOS = 0.5, 0.3, 0.1, 0.4, 0.2
CRITERIA = dict(l2=l2_norm, l2_gm=geometric_median, l1=l1_norm)
CRITERIA |= {f'random_{s}': random_scores(s) for s in range(3)}
METHODS = {  # from a function that gives distilled probes
    'pruned': lambda _: prune_only(),
    'merging': lambda _: merging(),
    'lbyl, weights chosen': lambda _: probed_lbyl(),
    'lbyl, mean': lambda _: with_mean(lbyl()),
    'default': lambda _: default_restorer(),
    'distilled': lambda source: layerwise(source()),
}
# fractions of all channels, streams included; published for data-free folding: 90.97, 70.65 and
# 44.29 % of the test images, 94.57 unpruned
FOLDED, FOLDING = 'resnet18_cifar10', (0.25, 0.45, 0.55)
IMAGE = torch.zeros(1, 3, 32, 32)
SPLITS = 'train', 'test'
FINETUNED, SCRATCHED = 'resnet50_cifar100', 'from scratch'
BEGINNINGS = dict.fromkeys(
    ('lbyl, weights chosen', 'merging', 'pruned', 'default'), FINETUNING.scaled(20 / 150)
)
BEGINNINGS[SCRATCHED] = SCRATCH.scaled(80 / 280)
# percent of the weights, two columns of Table 1 of arXiv 2204.11444
REMOVED = 68.37, 94.8
SEEDS = range(3)
HELD_OUT = 5000
BOOST = dict(
    SCRATCH=SCRATCH.scaled(30 / 280),
    PRUNING=FINETUNING.scaled(10 / 150),
    FINETUNING=FINETUNING.scaled(30 / 150),
)
CHOOSING = dict(SCRATCH=SCRATCH.scaled(5 / 280), FINETUNING=FINETUNING.scaled(5 / 150))
LRS = {
    'from scratch': (0.03, 0.1, 0.3),
    'ExpandNets': (0.01, 0.03, 0.1),
    'vanilla distillation': (0.03, 0.1, 0.3),
    'vanilla fine-tuning': (0.003, 0.01, 0.03),
    'over-parameterized': (0.001, 0.003, 0.01),
}


class TimeUp(Exception):
    "The seconds of a call are over; the same call again goes on."


class Place:
    "Folders and time of one call."

    def __init__(self, weights, out, seconds):
        self.weights, self.out = weights, out
        self.end = time.monotonic() + seconds

    def look(self):
        "TimeUp if the time is over."
        if time.monotonic() > self.end:
            raise TimeUp('The time is up: run again to go on.')

    def augment(self, x):
        "Images shifted and mirrored, as long as there is time."
        self.look()
        return data.crop_flip(x)

    def rows(self, name, settings, measure):
        "A sweep on the device, as long as there is time."

        def timely(s):
            self.look()
            return measure(s)

        return sweep(RESULTS / f'gpu_{name}.csv', settings, timely, device=DEVICE)


@cache
def images(name, split):
    "An image set on the device, with the numbers that normalise it."
    return data.load(name, split).to(DEVICE), data.STATS[name]


def on_device(net):
    "A network where and how it computes fastest."
    return net.to(DEVICE, memory_format=torch.channels_last)


def halved(net):
    "Tensors of a network, matrices and filters in half precision."
    return {k: v.half() if v.ndim > 1 else v for k, v in net.state_dict().items()}


@cache
def network(name, folder):
    "A trained network from its file, or from its pieces, in evaluation mode."
    file = folder / f'{name}.safetensors'
    if not file.exists():
        join_file(folder, file)
    return on_device(models.load_weights(NETWORKS[name].build(), file).eval())


def known_network(name, folder):
    "Is there a file of a network, or are there pieces?"
    return any(folder.glob(f'{name}.safetensors*'))


def trained(name, place):
    "Train a network, in as many calls as it takes, and write its weights."
    how, checkpoint = NETWORKS[name], place.weights / f'{name}.checkpoint'
    train_set, stats = images(how.images, 'train')
    net = train(
        on_device(models.initialised(how.build, 0)),
        train_set,
        how.epochs,
        how.lr,
        **stats._asdict(),
        batch=BATCH,
        augment=place.augment,
        autocast=torch.bfloat16,
        checkpoint=checkpoint,
        label=name,
    )
    write_safetensors(halved(net), place.weights / f'{name}.safetensors')
    checkpoint.unlink(missing_ok=True)


def counted(net, name):
    "Right answers of a network to the test images of its set."
    test_set, stats = images(NETWORKS[name].images, 'test')
    right, n = accuracy(net, test_set, *stats)
    return dict(right=right, n=n, accuracy=100 * right / n)


def train_stage(place):
    "Networks, and how many test images they get right."

    def measure(s):
        return counted(network(s['network'], place.weights), s['network'])

    settings = []
    for name, how in NETWORKS.items():
        if not known_network(name, place.weights):
            trained(name, place)
        network(name, place.weights)  # its file, where there were pieces alone
        if place.out:
            split_file(place.weights / f'{name}.safetensors', place.out)
        settings.append(dict(network=name, epochs=how.epochs, lr=how.lr, batch=BATCH, seed=0))
        table = place.rows('train', settings, measure)
    return table


@cache
def probes(name, folder):
    "A source of 256 distilled probes, and mirrored; kept in a file."
    file = folder / f'{name}_probes.safetensors'
    if not file.exists():
        made = distilled(256)(network(name, folder), (IMAGE.to(DEVICE),)).args[0]
        write_safetensors(dict(probes=made), file)
    return calibration(read_safetensors(file)[0]['probes'].to(DEVICE), reflect=True)


def restored(s, folder):
    "A network pruned and restored as a setting says."
    net, name = network(s['network'], folder), s['criterion']
    source = lambda: probes(s['network'], folder)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of networks that are lost: some shall be
        return restore(
            net,
            IMAGE.to(DEVICE),
            ratio=s['ratio'],
            criterion=least_lost(source()) if name == 'least lost' else CRITERIA[name],
            restorer=METHODS[s['method']](source),
            streams=s['streams'],
        )


def setting(network, method, ratio, criterion='l2', streams=False):
    "What distinguishes one trial from another."
    row = dict(network=network, criterion=criterion, streams=streams)
    return row | dict(ratio=ratio, method=method)


def trials():
    "Trials of the tables, the most telling first."
    unpruned = lambda n: [setting(n, 'unpruned', 0.0, None)]
    out = []
    for n in TABLES:
        out += unpruned(n) + [setting(n, m, r) for r in RATIOS for m in METHODS]
    out += unpruned(FOLDED)
    for r in FOLDING:
        out += [setting(FOLDED, m, r, streams=True) for m in METHODS]
        out += [setting(FOLDED, 'distilled', r, 'least lost', streams=True)]
    for c in [c for c in CRITERIA if c != 'l2']:
        out += [setting(n, m, r, c) for n in TABLES for r in RATIOS for m in METHODS]
    return out


def tables(place):
    "Accuracy by network, criterion, ratio and method."

    def measure(s):
        if s['method'] == 'unpruned':
            told = dict(agreement=1.0, divergence=0.0)
            net = network(s['network'], place.weights)
            return counted(net, s['network']) | told | cost(net, IMAGE.to(DEVICE))
        r = restored(s, place.weights)
        told = dict(agreement=r.agreement, divergence=r.divergence)
        return counted(on_device(r.model), s['network']) | told | r.cost.loc['after'].to_dict()

    return place.rows('tables', trials(), measure)


def start(place, method, ratio):
    "A pruned network to begin with, kept in a file."
    dense, file = network(FINETUNED, place.weights), run_file(place, method, ratio, 'start')
    if not file.exists():
        r = restored(setting(FINETUNED, method, ratio), place.weights)
        save_restored(r.model, r.plan, file)
    return on_device(load_restored(dense, IMAGE.to(DEVICE), file))


def run_file(place, begin, ratio, suffix):
    "A file of a training after restoration."
    words = begin.replace(',', '').replace(' ', '_')
    return place.weights / f'{FINETUNED}_{words}_{round(100 * ratio)}.{suffix}'


@cache
def curve(place, begin, ratio):
    "What a training tells after each epoch, from before the first one."
    (train_set, stats), (test_set, _) = (images(NETWORKS[FINETUNED].images, s) for s in SPLITS)
    small = start(place, 'pruned' if begin == SCRATCHED else begin, ratio)
    if begin == SCRATCHED:
        small = fresh(small)
    before = counted(small, FINETUNED)['accuracy']
    history = finetune(
        small,
        train_set,
        recipe=BEGINNINGS[begin],
        **stats._asdict(),
        augment=place.augment,
        autocast=torch.bfloat16,
        eval_set=test_set,
        checkpoint=run_file(place, begin, ratio, 'checkpoint'),
        label=f'{begin}, {ratio:.0%}',
    ).history
    seen = [(None, None, before), *zip(history.loss, history.accuracy, history.eval_accuracy)]
    n = len(test_set)
    return [dict(loss=a, train_accuracy=b, accuracy=c, n=n) for a, b, c in seen]


def finetune_stage(place):
    "Test accuracy by ratio, start and epoch."
    settings = []
    for ratio in RATIOS:
        for begin, recipe in BEGINNINGS.items():
            base = dict(network=FINETUNED, start=begin, ratio=ratio, epochs=recipe.epochs)
            base |= dict(lr=recipe.lr, batch=recipe.batch, seed=0)
            settings += [base | dict(epoch=i) for i in range(round(recipe.epochs) + 1)]
    measure = lambda s: curve(place, s['start'], s['ratio'])[s['epoch']]
    return place.rows('finetune', settings, measure)


def gpu_cells(notebook):
    "Imports of a notebook, and its cells for a GPU but for the last, which runs what they define."
    text = (NBS / f'{notebook}.ipynb').read_text(encoding='utf-8')
    code = [''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'code']
    imports = next(s for s in code if s.startswith('import'))
    return [imports, *(s for s in code if s.startswith('#| cuda'))][:-1]


@cache
def boost_names(place):
    "What the cells of 45_boost define, with settings of ours."
    names = dict(PUBLISHED=REMOVED)
    for source in gpu_cells('45_boost'):
        exec(source, names)
    build = names['full_mobilenet']
    names.update(
        full_mobilenet=lambda: on_device(build()),
        IMAGE=IMAGE.to(DEVICE),
        DEVICE=DEVICE,
        FOLDER=place.weights / 'boost',
        augment=place.augment,
    )
    return names


def boosted(place, held_out, recipes):
    """What trains as a row says: 45,000 images to train on.

    Right answers are counted among the other 5,000 if they are held out, else among test images.
    """
    every, _ = images('cifar10', 'train')
    every = data.subset(every, len(every))
    test_set = every[:HELD_OUT] if held_out else images('cifar10', 'test')[0]
    sets = dict(train=every[HELD_OUT:], test=test_set)
    names = boost_names(place)

    def measure(s):
        names.update(BOOST, data=SimpleNamespace(load=lambda _, split: sets[split]))
        names['pruned'](s['removed'])  # where all begin, whatever the recipes
        names.update(recipes)
        return names['full'](s)

    return measure


def boost_row(method, removed, lr, seed, recipes):
    "What distinguishes one training from another."
    row = dict(network='mobilenet_v2', method=method, removed=removed, lr=lr, seed=seed)
    return row | dict(epochs=recipes['FINETUNING'].epochs)


def boost(place):
    """Accuracy by share of the weights removed and method.

    Before it, at the first share, the learning rate of each method.
    """
    tried = [boost_row(m, REMOVED[0], lr, 100, CHOOSING) for m in LRS for lr in LRS[m]]
    rows = place.rows('boost_rates', tried, boosted(place, True, CHOOSING))
    best = rows.loc[rows.groupby('method').accuracy.idxmax()].set_index('method').lr
    settings = [
        boost_row(m, r, best[m], seed, BOOST) for seed in SEEDS for r in REMOVED for m in LRS
    ]
    return place.rows('boost', settings, boosted(place, False, BOOST))


STAGES = dict(train=train_stage, tables=tables, finetune=finetune_stage, boost=boost)


def call(stage, weights, out=None, seconds=440):
    "One call of a stage: its table, or None if there is more to do."
    weights.mkdir(parents=True, exist_ok=True)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    # convolutions in full single precision, but where bfloat16 is asked for
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = stage != 'tables'  # the same shapes again and again
    try:
        return STAGES[stage](Place(weights, out, seconds))
    except TimeUp as e:
        print(e)
    finally:
        for file in RESULTS.glob(f'gpu_{stage}*.csv') if out else ():
            shutil.copy(file, out)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument('stage', nargs='?', choices=list(STAGES))
    p.add_argument('--weights', type=Path, default=models.weights_dir())
    p.add_argument('--out', type=Path, default=os.environ.get('OUT') or None)
    p.add_argument('--seconds', type=float, default=440)
    a = p.parse_args()
    if not a.stage:
        return print(__doc__)
    if not a.weights:
        p.error('a folder for weights: set LBYL_WEIGHTS, or give --weights')
    table = call(a.stage, a.weights, a.out, a.seconds)
    if table is not None:
        print(table.to_string())


if __name__ == '__main__':
    main()
