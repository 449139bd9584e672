"""Restoring language models: CPU time of SmolLM2-135M, peak memory of a Llama of a billion weights.

Both are built from their configurations, with random weights: they decide nothing about cost. A
fifth of the hidden units of all MLPs goes. SmolLM2, in float32, sees 128 sequences of 128 tokens,
and its time is a multiple of one forward pass of them. The Llama, in bfloat16, sees 16 of 32, and
its memory is a multiple of its own size: all that is held beyond the model that is passed in,
less the Gram matrices of the layer that is being solved (double precision, two halves and what
the factorisation takes). Every measurement runs in a process of its own, so that its peak memory
can be read. The tokens on which `restore` tells afterwards how far the output moved are not
counted. Rows go into nbs/results/language_cost.csv; the same call goes on where it stopped (half an
hour, and 10 GB of memory).
"""

import os
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from zoo import grams

from _process import against, each, footer, peak, run, time_and_memory
from lbyl_nb import calibration, layerwise, prune_only
from lbyl_nb.bench import sweep
from lbyl_nb.criteria import l2_norm
from lbyl_nb.plans import Limits, by_ratio
from lbyl_nb.recover import verified

RESULTS = Path(__file__).resolve().parents[1] / 'nbs' / 'results' / 'language_cost.csv'
RATIO = 0.2
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
BILLION = dict(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
)
# configuration, precision, sequences and their length
MODELS = dict(
    smollm2=(SMOLLM2, torch.float32, (128, 128)),
    llama_1b=(BILLION, torch.bfloat16, (16, 32)),
)
LIMITS = Limits(ignore=['*self_attn*'])


def build(config, precision):
    "A Llama with random weights, made in its own precision."
    torch.set_default_dtype(precision)
    made = LlamaForCausalLM(LlamaConfig(**config))
    torch.set_default_dtype(torch.float32)
    return made.eval()


def size(net):
    "Memory of the weights, in GB."
    return sum(p.numel() * p.element_size() for p in net.parameters()) / 1e9


def one(network, what):
    "CPU time and memory of one measurement, as a dict."
    torch.manual_seed(0)
    config, precision, shape = MODELS[network]
    net, done = build(config, precision), []
    tokens = dict(input_ids=torch.randint(config['vocab_size'], shape), use_cache=False)
    example = dict(tokens, input_ids=tokens['input_ids'][:2, :16])
    restorers = dict(pruned=prune_only, layerwise=lambda: layerwise(calibration(tokens)))

    def work():
        if what == 'forward':
            with torch.inference_mode():
                for part in tokens['input_ids'].split(32):
                    net.model(input_ids=part, use_cache=False)
        else:
            choose = by_ratio(RATIO, l2_norm, limits=LIMITS)
            done.append(verified(net, example, restorers[what](), choose))

    before = peak()
    row = time_and_memory(network, what, work, before, time.process_time)
    held = grams(net, example, done[0].plan, what) if what == 'layerwise' else 0.0
    return row | dict(gram=held, model=size(net))


def main():
    os.environ['MALLOC_MMAP_THRESHOLD_'] = '131072'  # glibc gives back what is freed
    ways = 'forward', 'pruned', 'layerwise'
    settings = [dict(network=n, what=w) for n in MODELS for w in ways]

    def measure(s):
        row = each(__file__, [(s['network'], s['what'])])[0]
        return {k: row[k] for k in ('seconds', 'gigabytes', 'gram', 'model')}

    t = sweep(RESULTS, settings, measure).set_index(['network', 'what'])
    t['CPU time / forward pass'] = against(t, 'forward')
    t['memory beyond the model / model'] = t.gigabytes / t.model
    t['beyond Gram matrices, too'] = (t.gigabytes - t.gram) / t.model
    shown = [k for k in t if '/' in k or 'Gram' in k]
    print(t[['gigabytes', 'gram', 'model', *shown]].round(2).to_string())
    print(footer())


if __name__ == '__main__':
    run(one, main)
