"""Preference optimisation on rows: every loss of `dpojax.losses`, by its name.

`resolve` fills in a loss's options from a config. `objective` turns them into what the train step
needs. `hyper` picks the numbers among them, which are traced.
"""

from dpojax.methods.preference.arguments import OPTIONS
from dpojax.methods.preference.objective import loss_reward, objective
from dpojax.methods.preference.options import (
    LABELLED,
    LOSSES,
    PAIRS,
    RANKED,
    LossRequirements,
    hyper,
    loss_requirements,
    resolve,
)
from dpojax.training.objective import OptionError

__all__ = [
    "LABELLED",
    "LOSSES",
    "OPTIONS",
    "PAIRS",
    "RANKED",
    "LossRequirements",
    "OptionError",
    "hyper",
    "loss_requirements",
    "loss_reward",
    "objective",
    "resolve",
]
