"""What a variant may differ from float32, with the reason for each bound, and the verdict."""

from __future__ import annotations

import math
from typing import NamedTuple

from dpojax.certifying.compare import Measures, compare
from dpojax.certifying.measure import Measurement

STUCK = 0.1  # of what float32 learns: below it, a variant does not learn
LEAST_FALL = 1e-6  # nats that float32 has to learn; below it, rounding decides what follows


class Bound(NamedTuple):
    """What a measure may be.

    Attributes:
      measure: a field of `Measures`.
      exact: the bound where all is computed in float32.
      rounded: the bound where products are computed with fewer bits.
      at_least: the measure has to be at least the bound; else at most.
      training: it is a measure of the steps, which says nothing where float32 learns nothing.
      meaning: what is wrong where it is broken.
      reason: why the bound lies there.
    """

    measure: str
    exact: float
    rounded: float
    meaning: str
    reason: str
    at_least: bool = False
    training: bool = False

    def limit(self, is_exact: bool) -> float:
        return self.exact if is_exact else self.rounded

    def holds(self, value: float, is_exact: bool) -> bool:
        """Whether a value keeps the bound; NaN does not."""
        limit = self.limit(is_exact)
        return value >= limit if self.at_least else value <= limit


# In the order in which a fault is named: what comes first explains what comes after it.
BOUNDS = (
    Bound(
        "logprob_max",
        1e-3,
        0.1,
        "the forward pass gives other log-probs",
        "what the check of a cached reference allows a token (training.reference.TOLERANCE)",
    ),
    Bound(
        "logprob_rms",
        1e-4,
        0.03,
        "the forward pass gives other log-probs",
        "a tenth of that in float32, and a third in bfloat16: few tokens are at the worst",
    ),
    Bound(
        "norm_ratio",
        1e-3,
        0.1,
        "the gradient has another length, as if a sum over devices were left out or done twice",
        "a sum that is left out on one of two devices changes it by 30 % and more",
    ),
    Bound(
        "sign_agreement",
        0.999,
        0.9,
        "the gradient points elsewhere",
        "Adam's first step is a sign: where one in ten is wrong, four fifths of it are left, "
        "and a gradient on the wrong device agrees in one of two",
        at_least=True,
    ),
    Bound(
        "gradient_error",
        1e-3,
        0.3,
        "the gradient is another one",
        "at 0.3 the gradient keeps 95 % of its direction; float32 keeps all but rounding, "
        "which was 3e-7 for two layers (docs/numerics.md)",
    ),
    Bound(
        "learned",
        0.99,
        0.5,
        "it learns less than float32 does from the same batches",
        "half of what float32 learns is still a run, though a slow one",
        at_least=True,
        training=True,
    ),
    Bound(
        "curve_distance",
        0.01,
        0.5,
        "the loss takes another course",
        "as for what is learned: the other half of it",
        training=True,
    ),
    Bound(
        "margin_noise",
        0.05,
        0.5,
        "what the steps teach about single examples is noise",
        "at 0.5 a fifth of the variance of margins is noise",
        training=True,
    ),
)


class Verdict(NamedTuple):
    """Whether a variant may be used.

    Attributes:
      passes: all bounds hold.
      why: the first bound that does not, in a sentence; or what could not be judged; or "".
      measures: None where there is no measurement.
    """

    passes: bool
    why: str
    measures: Measures | None = None


def judge(exact: Measurement, variant: Measurement, *, is_exact: bool) -> Verdict:
    """The verdict on a variant.

    Args:
      exact: what float32 gave.
      variant: what the variant gave.
      is_exact: whether the variant computes all in float32, so that it is held to tight bounds.
    """
    measures = compare(exact, variant)
    if why := _not_finite(variant):
        return Verdict(False, why, measures)
    fall = float(exact.first_batch[0] - exact.first_batch[1])
    learns = fall > LEAST_FALL
    if learns and measures.learned < STUCK and not _gradient_is_wrong(measures, is_exact):
        return Verdict(False, _stuck(exact, variant), measures)
    for bound in BOUNDS:
        if bound.training and not learns:
            continue
        value = _of_bound(measures, bound)
        if not bound.holds(value, is_exact):
            return Verdict(False, _broken(bound, value, is_exact), measures)
    if not learns:
        why = (
            f"in float32 the loss of the first batch did not fall in {len(exact.losses)} steps: "
            "only the first step is judged"
        )
        return Verdict(True, why, measures)
    return Verdict(True, "", measures)


def _gradient_is_wrong(measures: Measures, is_exact: bool) -> bool:
    """Whether a bound before the training's is broken, which then is the better explanation."""
    return not all(
        bound.holds(_of_bound(measures, bound), is_exact) for bound in BOUNDS if not bound.training
    )


def _of_bound(measures: Measures, bound: Bound) -> float:
    value = getattr(measures, bound.measure)
    return abs(value - 1) if bound.measure == "norm_ratio" else value


def _not_finite(variant: Measurement) -> str:
    for step, loss in enumerate(variant.losses, 1):
        if not math.isfinite(loss):
            return f"the loss of step {step} is {loss}"
    for name in ("before", "after", "gradient_norm"):
        if not all(map(math.isfinite, getattr(variant, name).ravel())):
            return f"{name} holds numbers that are not finite"
    return ""


def _stuck(exact: Measurement, variant: Measurement) -> str:
    (begin, end), fall = variant.first_batch, exact.first_batch[0] - exact.first_batch[1]
    where = f"at ln 2 = {math.log(2):.4f}" if abs(begin - math.log(2)) < 1e-3 else f"at {begin:.4f}"
    return (
        f"stuck {where}: in {len(exact.losses)} steps the loss of the first batch went from "
        f"{begin:.6f} to {end:.6f}, and in float32 it fell by {fall:.2g}"
    )


def _broken(bound: Bound, value: float, is_exact: bool) -> str:
    relation = "below" if bound.at_least else "above"
    name = bound.measure.replace("_", " ")
    if bound.measure == "norm_ratio":
        name = "norm ratio's distance from 1"
    return f"{bound.meaning}: {name} {value:.3g} is {relation} {bound.limit(is_exact):g}"
