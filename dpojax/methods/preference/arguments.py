"""Where every argument of a loss comes from: the batch, or an option of the config.

A loss names its arguments in its signature. The tables of this file give each one a source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpojax.methods.preference.views import LabelledView, PairView, RankedView, View


class FromBatch(NamedTuple):
    """An argument that is computed from the batch.

    Attributes:
      read: the view of the batch -> the argument.
      option: the option that says how, where there is a choice.
      needs_data: even where policy == reference it depends on the data.
      needs_scores: it is made of the data's scores, so that every record has to have some.
    """

    read: Callable[[Any], Any]
    option: str = ""
    needs_data: bool = False
    needs_scores: bool = False


def _from_scores(read: Callable[[Any], Any], option: str = "") -> FromBatch:
    return FromBatch(read, option, needs_data=True, needs_scores=True)


class FromOptions(NamedTuple):
    """An option of the config.

    Attributes:
      allowed: whether a value may be used.
      expected: what values may be used, in words.
      traced: it is a number that may be an array, so another value compiles nothing anew.
    """

    allowed: Callable[[Any], bool]
    expected: str
    traced: bool = True


class Form(NamedTuple):
    """A form of data: how losses see it, and what they can read from it."""

    view: type[View]
    arguments: Mapping[str, FromBatch]


FORMS = {
    "pairs": Form(
        PairView,
        {
            "policy": FromBatch(PairView.policy),
            "reference": FromBatch(PairView.reference),
            "lengths": FromBatch(PairView.lengths),
            "mask": FromBatch(PairView.mask),
            "tie": FromBatch(PairView.tie, needs_data=True),
            "kl": FromBatch(PairView.kl),
            "scores": _from_scores(PairView.scores),
            "nll": FromBatch(PairView.nll, option="nll_norm"),
            "offset": _from_scores(PairView.offset, option="alpha"),
            "score_gap": _from_scores(PairView.score_gap),
            "probability": _from_scores(PairView.probability, option="scale"),
            "delta": FromBatch(PairView.delta, option="baseline"),
            "batch_gap": FromBatch(PairView.batch_gap, needs_data=True),
            "running_gap": FromBatch(PairView.delta, option="momentum"),
            "gap_mean": FromBatch(PairView.gap_mean, needs_data=True),
            "gap_std": FromBatch(PairView.gap_std, needs_data=True),
            "steps": FromBatch(PairView.steps),
            "beta_factor": FromBatch(PairView.beta_factor),
        },
    ),
    "ranked": Form(
        RankedView,
        {
            "policy": FromBatch(RankedView.policy),
            "reference": FromBatch(RankedView.reference),
            "mask": FromBatch(RankedView.mask),
            "ranks": FromBatch(RankedView.ranks, needs_data=True),
            "scores": _from_scores(RankedView.scores),
            "targets": _from_scores(RankedView.targets, option="scale"),
            "values": _from_scores(RankedView.values, option="value_beta"),
        },
    ),
    "labelled": Form(
        LabelledView,
        {
            "policy": FromBatch(LabelledView.policy),
            "reference": FromBatch(LabelledView.reference),
            "desirable": FromBatch(LabelledView.desirable, needs_data=True),
            "mask": FromBatch(LabelledView.mask),
            "lengths": FromBatch(LabelledView.lengths),
            "nll": FromBatch(LabelledView.nll, option="nll_norm"),
            "kl": FromBatch(LabelledView.kl),
            "delta": FromBatch(LabelledView.delta, option="baseline"),
        },
    ),
}


def _positive(x: float) -> bool:
    return x > 0


def _not_negative(x: float) -> bool:
    return x >= 0


def _choice(*words: str) -> FromOptions:
    quoted = [repr(word) for word in words]
    expected = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
    return FromOptions(lambda x: x in words, expected, traced=False)


def _flag() -> FromOptions:
    return FromOptions(lambda x: isinstance(x, bool), "true or false", traced=False)


OPTIONS: dict[str, FromOptions] = {
    "beta": FromOptions(lambda x: 0 < x < math.inf, "greater than 0"),
    "label_smoothing": FromOptions(lambda x: 0 <= x < 0.5, "in [0, 0.5)"),
    "alpha": FromOptions(math.isfinite, "a number"),
    "gamma": FromOptions(_not_negative, "0 or more"),
    "tau": FromOptions(_positive, "greater than 0"),
    "penalty": FromOptions(_not_negative, "0 or more"),
    "margin": FromOptions(_not_negative, "0 or more"),
    "scale": FromOptions(_positive, "greater than 0"),
    "epsilon": FromOptions(lambda x: 0 < x < 1, "in (0, 1)"),
    "momentum": FromOptions(lambda x: 0 <= x < 1, "in [0, 1)"),
    "retain_weight": FromOptions(_not_negative, "0 or more"),
    "value_beta": FromOptions(_positive, "greater than 0"),
    "max_reward": FromOptions(_positive, "greater than 0"),
    "good_score": FromOptions(math.isfinite, "a number"),
    "threshold": FromOptions(lambda x: 0 < x <= 40, "in (0, 40]"),
    "desirable_weight": FromOptions(_not_negative, "0 or more"),
    "undesirable_weight": FromOptions(_not_negative, "0 or more"),
    "top": FromOptions(lambda x: x is None or x >= 1, "1 or more"),
    "length_norm": _choice("sum", "mean"),
    "nll_norm": _choice("sum", "mean"),
    "form": _choice("sq", "bwd_kl", "fwd_kl"),
    "convex": _choice("logistic", "hinge", "squared", "exponential", "truncated_quadratic"),
    "stop_chosen": _flag(),
    "baseline": _choice("running", "zero"),
    # These change what stands around a loss: f-divergence scores, LD-DPO, humanline, WPO.
    "divergence": _choice("reverse_kl", "forward_kl", "js", "alpha", "chi_squared"),
    "divergence_alpha": FromOptions(math.isfinite, "a number"),
    "ld_alpha": FromOptions(lambda x: 0 <= x <= 1, "in [0, 1]"),
    "ld_weight_reference": _flag(),
    "humanline_low": FromOptions(lambda x: -math.inf < x < 0, "less than 0"),
    "humanline_high": FromOptions(_positive, "greater than 0"),
    "sync_every": FromOptions(lambda x: x >= 1, "1 or more", traced=False),
    "wpo": _choice("corrected", "plain"),
    "wpo_clamp": FromOptions(_positive, "greater than 0"),
}


def source_of(loss: str, form: str, argument: str) -> FromBatch | FromOptions:
    """Look up where a loss's argument comes from.

    Raises:
      TypeError: no table has it; the message says what to add where.
    """
    from_batch = FORMS[form].arguments
    if argument in from_batch:
        return from_batch[argument]
    if argument in OPTIONS:
        return OPTIONS[argument]
    raise TypeError(
        f"the loss {loss!r} has an argument {argument!r} that comes from nowhere. If the batch "
        f"gives it, add it to FORMS[{form!r}] in dpojax/methods/preference/arguments.py; if the "
        "config does, add it to OPTIONS there"
    )


def read_argument(loss: str, form: str, argument: str, view: View) -> Any:
    """The value of a loss's argument for one batch."""
    source = source_of(loss, form, argument)
    if isinstance(source, FromBatch):
        return source.read(view)
    # A traced option that has no number, such as `top` = None, stays what it is.
    if source.traced and argument in view.hyper:
        return view.hyper[argument]
    return view.settings[argument]
