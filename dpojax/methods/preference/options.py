"""Which losses there are, and what each needs of the config and of the data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from dpojax import losses
from dpojax.losses import PRESETS, Pair, RunningMean
from dpojax.methods.preference.arguments import OPTIONS, FromBatch, source_of
from dpojax.methods.preference.running import log_beta_factor, mean_gap, mean_reward
from dpojax.training.objective import Hyper, OptionError


class Loss(NamedTuple):
    """A loss of the config, `preference.loss`.

    Attributes:
      function: its arguments have their sources in `arguments.py`.
      form: of the data: a key of `arguments.FORMS`.
      defaults: values of options besides `DEFAULTS`.
      margin_only: it depends on the margin between two implicit rewards alone. Then f-divergence
        scores may stand in place of log-ratios.
      sorts_batch: it sorts the batch along one axis, so it gets flat arrays.
      coupled: an example's loss depends on the batch's other examples.
      counts_ties: tied pairs have a loss, too.
      running: takes a batch into the mean that the loss keeps over the batches.
    """

    function: Callable[..., Array]
    form: str = "pairs"
    defaults: Mapping[str, Any] = {}
    margin_only: bool = False
    sorts_batch: bool = False
    coupled: bool = False
    counts_ties: bool = False
    running: Callable[[RunningMean, Any], RunningMean] | None = None


class _Required:
    """Stands where the user has to choose."""


def _sft(nll: Array) -> Array:
    """Maximum likelihood of the best response. `nll` is already a loss."""
    return losses.sft(-nll)


def _astar_po(
    policy: Array, reference: Array, scores: Array, values: Array, mask: Array, *, beta: Array
) -> Array:
    """The mean of A*-PO's loss over the responses to a prompt."""
    loss = losses.astar_po(policy, reference, scores, values, beta=beta)
    return jnp.where(mask, loss, 0.0).sum(-1) / jnp.maximum(mask.sum(-1), 1)


def _epsilon_dpo(
    policy: Pair,
    reference: Pair,
    steps: Array,
    beta_factor: Array,
    *,
    beta: Array,
    epsilon: Array,
) -> Array:
    """epsilon-DPO with the beta that the batches so far have made of the first one."""
    beta = beta * beta_factor
    return losses.epsilon_dpo(policy, reference, beta=beta, epsilon=epsilon, steps=steps)


LOSS_TABLE = {
    "dpo": Loss(losses.dpo, margin_only=True),
    "dpo_norm": Loss(losses.dpo_norm, defaults={"beta": 5.0}, margin_only=True),
    "dpo_soft": Loss(losses.dpo_soft, margin_only=True),
    "dpo_ties": Loss(losses.dpo_ties, margin_only=True, counts_ties=True),
    "robust": Loss(losses.robust, margin_only=True),
    "exo": Loss(losses.exo, defaults={"label_smoothing": 1e-3}, margin_only=True),
    "ipo": Loss(losses.ipo, margin_only=True),
    "hinge": Loss(losses.hinge, margin_only=True),
    "discopop": Loss(losses.discopop, defaults={"tau": 0.05}, margin_only=True),
    "nca": Loss(losses.nca),
    "bco": Loss(losses.bco, defaults={"baseline": "running"}, running=mean_reward),
    "sppo": Loss(losses.sppo),
    "apo_zero": Loss(losses.apo_zero),
    "apo_down": Loss(losses.apo_down),
    "gpo": Loss(losses.gpo, margin_only=True),
    "chipo": Loss(losses.chipo),
    "beta_dpo": Loss(losses.beta_dpo, defaults={"momentum": 0.9}, coupled=True, running=mean_gap),
    "alpha_dpo": Loss(losses.alpha_dpo, defaults={"beta": _Required}, coupled=True),
    "epsilon_dpo": Loss(_epsilon_dpo, defaults={"epsilon": 0.01}, running=log_beta_factor),
    "odpo": Loss(losses.odpo, margin_only=True),
    "dpop": Loss(losses.dpop),
    "tdpo": Loss(losses.tdpo, defaults={"alpha": 0.5, "stop_chosen": True}),
    "rpo": Loss(losses.rpo, margin_only=True),
    "mappo": Loss(losses.mappo),
    "uni_dpo": Loss(
        losses.uni_dpo, defaults={"beta": 2.0, "margin": 0.8, "gamma": 1.0, "alpha": 0.01}
    ),
    "aot": Loss(losses.aot, sorts_batch=True, coupled=True),
    "aot_unpaired": Loss(losses.aot_unpaired, sorts_batch=True, coupled=True),
    "simpo": Loss(losses.simpo, defaults={"beta": 2.0, "gamma": 1.0}),
    "alphapo": Loss(losses.alphapo),
    "tpo_l": Loss(losses.tpo_l, defaults={"beta": _Required, "nll_norm": "mean"}),
    "simper": Loss(losses.simper),
    "cpo": Loss(losses.cpo, defaults={"alpha": 1.0, "nll_norm": "sum"}),
    "orpo": Loss(losses.orpo, defaults={"nll_norm": "mean"}),
    "slic": Loss(losses.slic, defaults={"margin": 1.0, "alpha": 0.1, "nll_norm": "sum"}),
    "unlikelihood": Loss(losses.unlikelihood),
    "sft": Loss(_sft, defaults={"nll_norm": "mean"}),
    "plackett_luce": Loss(losses.plackett_luce, "ranked", {"top": None}),  # None: all places
    "lambda_dpo": Loss(losses.lambda_dpo, "ranked", {"scale": 1.0}),
    "astar_po": Loss(_astar_po, "ranked", {"beta": 1e-3, "value_beta": 0.5}),
    "kto": Loss(
        losses.kto,
        "labelled",
        {"desirable_weight": 1.0, "undesirable_weight": 1.0},
        coupled=True,
    ),
    "bco_unpaired": Loss(
        losses.bco_unpaired, "labelled", {"baseline": "running"}, running=mean_reward
    ),
    "apo_zero_unpaired": Loss(losses.apo_zero_unpaired, "labelled"),
    "npo": Loss(losses.npo, "labelled", {"nll_norm": "mean"}),
    "simnpo": Loss(losses.simnpo, "labelled", {"beta": _Required, "nll_norm": "mean"}),
}
LOSSES = tuple(LOSS_TABLE)
PAIRS, RANKED, LABELLED = (
    tuple(name for name, loss in LOSS_TABLE.items() if loss.form == form)
    for form in ("pairs", "ranked", "labelled")
)
DEFAULTS = {"beta": 0.1, "label_smoothing": 0.0}  # of every loss that has these options

# Options that change the inputs or the weights of any loss of a form of data. The value is the
# option that means nothing without its key; "" is none.
OF_TOKENS = {"humanline_low": "humanline_high", "sync_every": ""}
WRAPPERS = {
    "pairs": {
        "divergence": "divergence_alpha",
        "ld_alpha": "ld_weight_reference",
        "wpo": "wpo_clamp",
    }
    | OF_TOKENS,
    "ranked": OF_TOKENS,
    "labelled": OF_TOKENS,
}


class LossRequirements(NamedTuple):
    """What a loss or a mixture needs of data and reference."""

    form: str  # pairs, ranked or labelled
    inputs: frozenset[str]  # the arguments that come from the batch
    reference: bool
    live: bool  # the reference's whole distributions, which no cache holds
    scores: bool  # the data's scores of the responses
    chosen: bool  # it learns from the best response alone
    weights: bool  # it can weigh one example: it does not sort the batch


def loss_requirements(loss: str) -> LossRequirements:
    """What `loss` needs; several names, joined by +, are a mixture.

    Raises:
      OptionError: an unknown loss, or a mixture of losses that need different data.
    """
    names = loss.split("+")
    for name in names:
        if name not in LOSS_TABLE:
            known = ", ".join(LOSS_TABLE)
            raise OptionError("loss", f"there is no {name!r}; it must be one of {known}")
    forms = sorted({LOSS_TABLE[name].form for name in names})
    if len(forms) > 1:
        raise OptionError("loss", f"{loss} mixes losses of {' and '.join(forms)} data")
    sources = {x: source for name in names for x, source in from_batch(name).items()}
    inputs = frozenset(sources)
    return LossRequirements(
        form=forms[0],
        inputs=inputs,
        reference="reference" in inputs,
        live=bool({"kl", "steps"} & inputs) and forms[0] == "pairs",
        scores=any(source.needs_scores for source in sources.values()),
        chosen=inputs == {"nll"},
        weights=not any(LOSS_TABLE[name].sorts_batch for name in names),
    )


def arguments(name: str) -> list[str]:
    """Names of a loss's arguments; not `axis_name`, as the step has no shards of its own."""
    names = inspect.signature(LOSS_TABLE[name].function).parameters
    return [x for x in names if x != "axis_name"]


def from_batch(name: str) -> dict[str, FromBatch]:
    """Those arguments of a loss that come from the batch."""
    sources = {x: source_of(name, LOSS_TABLE[name].form, x) for x in arguments(name)}
    return {x: source for x, source in sources.items() if isinstance(source, FromBatch)}


def options_of(name: str) -> list[str]:
    """The options of a loss: arguments, and choices of how an argument is computed."""
    computed = from_batch(name)
    options = [x for x in arguments(name) if x not in computed]
    return options + [source.option for source in computed.values() if source.option]


def resolve(loss: str, options: Mapping[str, Any], preset: str = "") -> dict[str, Any]:
    """Fill in every option of `loss`, and of what stands around it.

    Args:
      loss: a name of `LOSSES`, or several joined by +, with one of `weights` each.
      options: values by name (see `arguments.OPTIONS`), and `weights`. None and "" mean: not set.
      preset: a key of `losses.PRESETS`, whose values come before our own defaults.

    Returns:
      A dict: numbers are traced when training (`hyper`), text and truth values are not.

    Raises:
      OptionError: the loss does not have an option, or needs one that has no default, or a value
        is not allowed.
    """
    names, form = loss.split("+"), loss_requirements(loss).form
    chosen = {key: value for key, value in options.items() if value not in (None, "", ())}
    weights = _take_weights(loss, chosen)
    defaults = _defaults_of_mixture(loss, chosen, preset)
    around = _around(chosen, preset, WRAPPERS[form])
    _check_combination(names, around)
    if unknown := sorted(chosen.keys() - defaults.keys() - around.keys()):
        takes = ", ".join(defaults) or "none"
        raise OptionError(
            unknown[0], f"{loss} has no such option; it has: {takes}; leave this one out"
        )
    resolved = defaults | {key: chosen[key] for key in chosen if key in defaults} | around
    for option, value in resolved.items():
        _check_value(loss, option, value)
    if "exo" in names and not resolved["label_smoothing"]:
        raise OptionError("label_smoothing", "exo is infinite at 0; 1e-3 is usual")
    return resolved | ({"weights": weights} if weights else {})


def hyper(resolved: Mapping[str, Any]) -> Hyper:
    """The numbers among resolved options, as the float32 arrays that a step takes."""
    numbers = {
        name: jnp.asarray(value, jnp.float32)
        for name, value in resolved.items()
        if isinstance(value, int | float | tuple) and not isinstance(value, bool)
        if name not in OPTIONS or OPTIONS[name].traced
    }
    keeps_mean = bool({"baseline", "momentum", "epsilon"} & resolved.keys())
    return numbers | ({"delta": jnp.zeros(())} if keeps_mean else {})


def running_mean(names: Sequence[str], options: Mapping[str, Any]) -> Callable | None:
    """The mean over batches that the losses keep: (mean so far, view) -> new mean; None: none."""
    if options.get("baseline") == "zero":
        return None
    return next((LOSS_TABLE[name].running for name in names if LOSS_TABLE[name].running), None)


def _take_weights(loss: str, chosen: dict[str, Any]) -> tuple[float, ...]:
    """Remove `weights` from the options and check them; () for a single loss."""
    weights, count = tuple(chosen.pop("weights", ())), len(loss.split("+"))
    usable = all(math.isfinite(weight) and weight >= 0 for weight in weights)
    if len(weights) != (count if count > 1 else 0) or not usable:
        raise OptionError(
            "loss_weights",
            f"{loss} takes a finite number for each loss joined by +, got {weights}",
        )
    return weights


def _defaults_of_mixture(loss: str, chosen: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """The options of all losses with their defaults, or `_Required`."""
    defaults: dict[str, Any] = {}
    for name in loss.split("+"):
        for option, value in _defaults(name, preset).items():
            differs = option in defaults and defaults[option] != value
            if differs and option not in chosen:
                raise OptionError(
                    option, f"the losses of {loss} have different defaults; set a value"
                )
            defaults.setdefault(option, value)
    return defaults


def _defaults(name: str, preset: str) -> dict[str, Any]:
    """The options of one loss with their defaults, or `_Required`."""
    if preset and preset not in PRESETS:
        known = ", ".join(sorted(PRESETS))
        raise OptionError("preset", f"there is no {preset!r}; there are {known}")
    of_preset = PRESETS.get(preset, {}).get(name)
    if preset and of_preset is None and name != "sft":
        raise OptionError("preset", f"{preset} has none for {name}")
    of_preset = dict(of_preset or {})
    if "delta" in of_preset:
        of_preset["baseline"] = "zero"
    values = DEFAULTS | LOSS_TABLE[name].defaults | of_preset
    if preset and "nll_norm" not in of_preset:
        values.pop("nll_norm", None)  # systems divide likelihoods differently, and by other tokens
    return {option: values.get(option, _Required) for option in options_of(name)}


def _around(chosen: Mapping[str, Any], preset: str, wrappers: Mapping[str, str]) -> dict[str, Any]:
    """The chosen options of `WRAPPERS` of the form, with those that they bring along."""
    names = {*wrappers, *wrappers.values()}
    around = {option: value for option, value in chosen.items() if option in names}
    of_preset = PRESETS.get(preset, {})
    for switch, extra in wrappers.items():
        if extra in around and switch not in around:
            raise OptionError(extra, f"means nothing without {switch}")
    if "ld_alpha" in around and "ld_weight_reference" not in around:
        choice = of_preset.get("ld_logprobs", {})
        around["ld_weight_reference"] = choice.get("weight_reference", _Required)
    if "humanline_low" in around and "humanline_high" not in around:
        around["humanline_high"] = _Required
    if "wpo" in around and "wpo_clamp" not in around:
        clamp = of_preset.get("wpo_weights", {}).get("clamp")
        around |= {} if clamp is None else {"wpo_clamp": clamp}
    if (around.get("divergence") == "alpha") != ("divergence_alpha" in around):
        raise OptionError("divergence_alpha", "divergence 'alpha' takes it, and no other does")
    return around


def _check_combination(names: Sequence[str], around: Mapping[str, Any]) -> None:
    """Refuse losses that do not go together, or not with what stands around them."""
    if len(set(names)) < len(names):
        raise OptionError("loss", "a mixture names each loss once")
    if around and list(names) == ["sft"]:
        raise OptionError(min(around), "sft alone looks at no pair, only at the best response")
    if len({LOSS_TABLE[name].running for name in names} - {None}) > 1:
        raise OptionError("loss", f"{'+'.join(names)}: only one mean over batches can be kept")
    for name in names:
        loss, inputs = LOSS_TABLE[name], from_batch(name)
        if loss.counts_ties and len(names) > 1:
            raise OptionError("loss", f"{name} counts tied pairs, so it mixes with no other")
        if "divergence" in around and "policy" in inputs and not loss.margin_only:
            fitting = ", ".join(x for x, entry in LOSS_TABLE.items() if entry.margin_only)
            raise OptionError("divergence", f"only for losses of the margin: {fitting}")
        for option in {"ld_alpha", "humanline_low", "sync_every"} & around.keys():
            if "reference" not in inputs:
                raise OptionError(option, f"{name} has no reference; only for losses with one")
        if "sync_every" in around and loss_requirements(name).live:
            raise OptionError("sync_every", f"{name} reads all of a reference that stays the same")
        if "wpo" in around and loss.sorts_batch:
            raise OptionError("wpo", f"{name} sorts the batch, so its terms belong to no one pair")


def _check_value(loss: str, option: str, value: Any) -> None:
    source = OPTIONS[option]
    if value is _Required:
        raise OptionError(option, f"{loss} needs it and has no default; it is {source.expected}")
    if not source.allowed(value):
        raise OptionError(option, f"must be {source.expected}, got {value!r}")
