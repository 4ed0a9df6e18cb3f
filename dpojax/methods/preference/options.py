"""Which losses there are, what each takes from a config, and what from the rows.

A loss's signature says both: arguments that are named in `FROM_ROWS` are computed from the batch,
all others are its options.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from dpojax import losses
from dpojax.losses import PRESETS
from dpojax.training.objective import Hyper

PAIRS = ("dpo", "dpo_norm", "dpo_soft", "dpo_ties", "robust", "exo", "ipo", "hinge", "discopop")
PAIRS += ("nca", "bco", "sppo", "apo_zero", "apo_down", "odpo", "dpop", "tdpo", "rpo")
PAIRS += ("aot", "aot_unpaired", "simpo", "alphapo", "cpo", "orpo", "slic", "unlikelihood", "sft")
RANKED = ("plackett_luce",)
LABELLED = ("kto", "bco_unpaired", "apo_zero_unpaired")
LOSSES = (*PAIRS, *RANKED, *LABELLED)

# Arguments that the batch answers, and the option that says how, where there is a choice.
FROM_ROWS = {
    "policy": "",
    "reference": "",
    "lengths": "",
    "mask": "",
    "ranks": "",
    "tie": "",
    "kl": "",
    "desirable": "",
    "scores": "",
    "nll": "nll_norm",
    "offset": "alpha",
    "probability": "scale",
    "delta": "baseline",
}
# What is done around any pair loss: f-divergence scores, LD-DPO, WPO.
AROUND = ("divergence", "divergence_alpha", "ld_alpha", "ld_weight_reference", "wpo", "wpo_clamp")
# With the divergence's scores in place of log-ratios a loss may look at the margin only.
MARGIN_LOSSES = ("dpo", "dpo_norm", "dpo_soft", "dpo_ties", "hinge", "robust", "exo", "ipo")
MARGIN_LOSSES += ("discopop", "odpo", "rpo")
SORTED = ("aot", "aot_unpaired")  # they sort a batch along one axis

_DEFAULTS: dict[str, dict[str, Any]] = {
    "": {"beta": 0.1, "label_smoothing": 0.0},
    "exo": {"label_smoothing": 1e-3},
    "dpo_norm": {"beta": 5.0},
    "discopop": {"tau": 0.05},
    "bco": {"baseline": "running"},
    "bco_unpaired": {"baseline": "running"},
    "tdpo": {"alpha": 0.5, "stop_chosen": True},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "cpo": {"alpha": 1.0, "nll_norm": "sum"},
    "orpo": {"nll_norm": "mean"},
    "slic": {"margin": 1.0, "alpha": 0.1, "nll_norm": "sum"},
    "sft": {"nll_norm": "mean"},
    "kto": {"desirable_weight": 1.0, "undesirable_weight": 1.0},
    "plackett_luce": {"top": None},  # None: all places
}

_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta": (lambda x: 0 < x < math.inf, "greater than 0"),
    "label_smoothing": (lambda x: 0 <= x < 0.5, "in [0, 0.5)"),
    "alpha": (math.isfinite, "a number"),
    "gamma": (lambda x: x >= 0, "0 or more"),
    "tau": (lambda x: x > 0, "greater than 0"),
    "penalty": (lambda x: x >= 0, "0 or more"),
    "margin": (lambda x: x >= 0, "0 or more"),
    "scale": (lambda x: x > 0, "greater than 0"),
    "threshold": (lambda x: 0 < x <= 40, "in (0, 40]"),
    "desirable_weight": (lambda x: x >= 0, "0 or more"),
    "undesirable_weight": (lambda x: x >= 0, "0 or more"),
    "top": (lambda x: x is None or x >= 1, "1 or more"),
    "length_norm": (lambda x: x in ("sum", "mean"), "'sum' or 'mean'"),
    "nll_norm": (lambda x: x in ("sum", "mean"), "'sum' or 'mean'"),
    "form": (lambda x: x in ("sq", "bwd_kl", "fwd_kl"), "'sq', 'bwd_kl' or 'fwd_kl'"),
    "stop_chosen": (lambda x: isinstance(x, bool), "true or false"),
    "baseline": (lambda x: x in ("running", "zero"), "'running' or 'zero'"),
    "divergence": (
        lambda x: x in ("reverse_kl", "forward_kl", "js", "alpha"),
        "'reverse_kl', 'forward_kl', 'js' or 'alpha'",
    ),
    "divergence_alpha": (math.isfinite, "a number"),
    "ld_alpha": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "ld_weight_reference": (lambda x: isinstance(x, bool), "true or false"),
    "wpo": (lambda x: x in ("corrected", "plain"), "'corrected' or 'plain'"),
    "wpo_clamp": (lambda x: x > 0, "greater than 0"),
}
OPTIONS = tuple(_VALUES)


class LossRequirements(NamedTuple):
    """What the losses of a config want of data and reference."""

    form: str  # pairs, ranked or labelled
    inputs: frozenset[str]  # keys of FROM_ROWS
    reference: bool
    live: bool  # the reference's whole distributions, which no cache holds
    chosen: bool  # it learns from the best response alone


def loss_requirements(loss: str) -> LossRequirements:
    """What `loss` takes from rows; several names, joined by +, are a mixture.

    Raises:
      ValueError: an unknown loss, or a mixture of losses that want different data.
    """
    names = loss.split("+")
    for name in names:
        if name not in LOSSES:
            raise ValueError(f"loss = {name!r}: must be one of {', '.join(LOSSES)}")
    forms = {"pairs": PAIRS, "ranked": RANKED, "labelled": LABELLED}
    found = {form for form, members in forms.items() for name in names if name in members}
    if len(found) > 1:
        raise ValueError(f"loss: {loss} mixes losses of {' and '.join(sorted(found))} data")
    (form,) = found
    inputs = frozenset(x for name in names for x in arguments(name) if x in FROM_ROWS)
    live = "kl" in inputs and form == "pairs"
    return LossRequirements(form, inputs, "reference" in inputs, live, inputs == {"nll"})


def resolve(loss: str, given: Mapping[str, Any], preset: str = "") -> dict[str, Any]:
    """Every option of `loss`, and of what is done around it, with its value.

    Args:
      loss: a name of `LOSSES`, or several joined by +, with one of `weights` each.
      given: options by name (see `OPTIONS`), and `weights`; None and "" are not given.
      preset: a key of `losses.PRESETS`, whose values come before our own defaults.

    Returns:
      A dict: numbers are traced when training (`hyper`), text and truth values are not.

    Raises:
      ValueError: naming the option: one that the loss does not have, or needs and has no default
        for, or a value that it cannot have.
    """
    names, form = loss.split("+"), loss_requirements(loss).form
    given = {key: value for key, value in given.items() if value not in (None, "", ())}
    weights = tuple(given.pop("weights", ()))
    if len(weights) != (len(names) if len(names) > 1 else 0) or not all(map(_usable, weights)):
        raise ValueError(
            f"loss_weights: {loss} takes a finite number for each loss joined by +, got {weights}"
        )
    own: dict[str, Any] = {}
    for name in names:
        for option, value in _own(name, preset).items():
            if option in own and option not in given and own[option] != value:
                raise ValueError(f"{option}: the losses of {loss} have different defaults; set it")
            own.setdefault(option, value)
    around = _around(given, preset) if form == "pairs" else {}
    _check_company(names, around)
    if unknown := sorted(given.keys() - own.keys() - around.keys()):
        takes = ", ".join(own) or "none"
        raise ValueError(f"{unknown[0]}: {loss} has no such option; it has: {takes}; leave it out")
    resolved = own | {key: value for key, value in given.items() if key in own} | around
    for option, value in resolved.items():
        _check(loss, option, value)
    if "exo" in names and not resolved["label_smoothing"]:
        raise ValueError("label_smoothing: exo is infinite at 0; 1e-3 is usual")
    return resolved | ({"weights": weights} if weights else {})


def _usable(number: float) -> bool:
    return math.isfinite(number) and number >= 0


def _check_company(names: list[str], around: Mapping[str, Any]) -> None:
    """Raise ValueError for losses that do not go together, or not with what is around them."""
    if len(set(names)) < len(names):
        raise ValueError("loss: a mixture names each loss once")
    if "dpo_ties" in names and len(names) > 1:
        raise ValueError("loss: dpo_ties counts tied pairs, so it mixes with no other")
    if around and names == ["sft"]:
        raise ValueError(f"{min(around)}: sft alone looks at no pair, only at the best response")
    if "divergence" in around and not set(names) <= {*MARGIN_LOSSES, "sft"}:
        raise ValueError(f"divergence: only for losses of the margin: {', '.join(MARGIN_LOSSES)}")
    for name in names:
        if "ld_alpha" in around and "reference" not in arguments(name):
            raise ValueError(f"ld_alpha: {name} has no reference; only for losses that have one")
        if "wpo" in around and name in SORTED:
            raise ValueError(f"wpo: {name} sorts the batch, so its terms belong to no one pair")


def hyper(resolved: Mapping[str, Any]) -> Hyper:
    """The numbers among resolved options, as the float32 arrays that a step takes."""
    numbers = {
        name: jnp.asarray(value, jnp.float32)
        for name, value in resolved.items()
        if isinstance(value, int | float | tuple) and not isinstance(value, bool)
    }
    return numbers | ({"delta": jnp.zeros(())} if "baseline" in resolved else {})


class _Required:
    """Stands where the user has to choose."""


def _own(name: str, preset: str) -> dict[str, Any]:
    """The options of one loss with preset or default, or `_Required`."""
    taken = arguments(name)
    options = [x for x in taken if x not in FROM_ROWS]
    options += [FROM_ROWS[x] for x in taken if FROM_ROWS.get(x)]
    if preset and preset not in PRESETS:
        raise ValueError(f"preset: there is no {preset!r}; there are {', '.join(sorted(PRESETS))}")
    theirs = PRESETS.get(preset, {}).get(name)
    if preset and theirs is None and name != "sft":
        raise ValueError(f"preset: {preset} has none for {name}")
    theirs = dict(theirs or {})
    if "delta" in theirs:
        theirs["baseline"] = "zero"
    known = _DEFAULTS[""] | _DEFAULTS.get(name, {}) | theirs
    if preset and "nll_norm" not in theirs:
        known.pop("nll_norm", None)  # systems divide likelihoods differently, and by other tokens
    return {option: known.get(option, _Required) for option in options}


def _around(given: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """The given options of `AROUND`, with those that they bring along."""
    around = {key: given[key] for key in AROUND if key in given}
    theirs = PRESETS.get(preset, {})
    for switch, extra in (
        ("divergence", "divergence_alpha"),
        ("ld_alpha", "ld_weight_reference"),
        ("wpo", "wpo_clamp"),
    ):
        if extra in around and switch not in around:
            raise ValueError(f"{extra}: means nothing without {switch}")
    if "ld_alpha" in around and "ld_weight_reference" not in around:
        chosen = theirs.get("ld_logprobs", {})
        around["ld_weight_reference"] = chosen.get("weight_reference", _Required)
    if "wpo" in around and "wpo_clamp" not in around:
        clamp = theirs.get("wpo_weights", {}).get("clamp")
        around |= {} if clamp is None else {"wpo_clamp": clamp}
    if (around.get("divergence") == "alpha") != ("divergence_alpha" in around):
        raise ValueError("divergence_alpha: divergence 'alpha' takes it, and no other does")
    return around


def _check(loss: str, option: str, value: Any) -> None:
    allowed, expected = _VALUES[option]
    if value is _Required:
        raise ValueError(f"{option}: {loss} needs it and has no default; it is {expected}")
    if not allowed(value):
        raise ValueError(f"{option} = {value!r}: must be {expected}")


def arguments(name: str) -> list[str]:
    """Names of a loss's arguments. `sft` beside pairs is a likelihood term, `nll`."""
    if name == "sft":
        return ["nll"]
    return list(inspect.signature(getattr(losses, name)).parameters)
