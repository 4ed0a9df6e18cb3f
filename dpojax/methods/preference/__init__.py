"""Preference optimisation on rows: every loss of `dpojax.losses`, by its name.

`resolve` turns what a config says into a loss's options, `objective` turns those into what the
train step wants, and `hyper` picks the numbers among them that are traced.
"""

from dpojax.methods.preference.objective import objective
from dpojax.methods.preference.options import (
    LABELLED,
    LOSSES,
    OPTIONS,
    PAIRS,
    RANKED,
    LossRequirements,
    hyper,
    loss_requirements,
    resolve,
)

__all__ = [
    "LABELLED",
    "LOSSES",
    "OPTIONS",
    "PAIRS",
    "RANKED",
    "LossRequirements",
    "hyper",
    "loss_requirements",
    "objective",
    "resolve",
]
