"""How far a measurement is from that of float32: one number for each thing that can go wrong."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dpojax.certifying.measure import Measurement

FLOOR = 2**-8  # of a parameter's typical gradient: what bfloat16 resolves beside it


class Measures(NamedTuple):
    """A variant against float32.

    Attributes:
      logprob_max: the largest difference of a token's log-prob before the first step, nats.
      logprob_rms: the root mean square of these differences, nats.
      sign_agreement: the share of the first gradient, weighted by its size, whose sign agrees.
        Entries below `FLOOR` times their parameter's root mean square do not count.
      gradient_error: the length of the first gradient's difference over the length of the gradient.
      norm_ratio: the norm of the first gradient over that of float32.
      margin_noise: the standard deviation over examples of the difference in what the steps changed
        of their margins, over the standard deviation of that change: noise over signal.
      curve_distance: the largest distance of the loss curves, over what float32 learns.
      learned: how far the loss of the first batch fell, over how far it fell in float32.
    """

    logprob_max: float
    logprob_rms: float
    sign_agreement: float
    gradient_error: float
    norm_ratio: float
    margin_noise: float
    curve_distance: float
    learned: float


def compare(exact: Measurement, variant: Measurement) -> Measures:
    """The measures of a variant; NaN where float32 itself does nothing."""
    difference = np.abs(variant.before - exact.before)
    fall = exact.first_batch[0] - exact.first_batch[1]
    gradient_difference = np.linalg.norm(variant.gradient - exact.gradient)
    return Measures(
        logprob_max=float(difference.max()),
        logprob_rms=float(np.sqrt(np.mean(difference**2))),
        sign_agreement=sign_agreement(exact, variant),
        gradient_error=_ratio(gradient_difference, np.linalg.norm(exact.gradient)),
        norm_ratio=_ratio(variant.gradient_norm, exact.gradient_norm),
        margin_noise=_ratio(np.std(variant.margins - exact.margins), np.std(exact.margins)),
        curve_distance=_ratio(np.abs(variant.losses - exact.losses).max(), fall),
        learned=_ratio(variant.first_batch[0] - variant.first_batch[1], fall),
    )


def sign_agreement(exact: Measurement, variant: Measurement) -> float:
    """See `Measures.sign_agreement`; a zero agrees with nothing."""
    total = agreeing = 0.0
    ends = np.cumsum(exact.sizes)[:-1]
    for ours, theirs in zip(np.split(exact.gradient, ends), np.split(variant.gradient, ends)):
        size = np.abs(ours)
        size[size < FLOOR * np.sqrt(np.mean(ours**2))] = 0
        total += size.sum(dtype=np.float64)
        agreeing += size[ours * theirs > 0].sum(dtype=np.float64)
    return _ratio(agreeing, total)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")
