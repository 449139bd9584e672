"""Give a pruned network its accuracy back, without data and without training

What people write is here: `from lbyl_nb import lbyl_restore, layerwise, noise`. Everything else
lies in the modules, each of them exported from the notebook of the same name."""

__version__ = '0.1.0'

from .budget import budget
from .distilled import distilled
from .expand import contract, expand
from .finetune import boost, finetune, restore_and_boost
from .layerwise import default_restorer, layerwise, probe
from .least_lost import fluctuation
from .photographs import photographs
from .probes import calibration, noise
from .pruned_elsewhere import from_masks, from_pruned
from .recover import lbyl_restore, plan, restore
from .restorers import gaussian, lbyl, merging, prune_only, with_mean
from .saved import load_restored, save_restored
from .sensitivity import output_loss, sensitivity
from .written import written

__all__ = [
    'lbyl_restore', 'restore', 'plan', 'budget', 'fluctuation', 'output_loss', 'sensitivity',
    'from_masks', 'from_pruned',
    'prune_only', 'merging', 'lbyl', 'gaussian', 'with_mean',
    'probe', 'layerwise', 'default_restorer',
    'noise', 'photographs', 'distilled', 'written', 'calibration',
    'expand', 'contract', 'finetune', 'boost', 'restore_and_boost',
    'save_restored', 'load_restored',
]  # fmt: skip
