"""Rules for single config keys, and the ones that several stages share."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dpojax.config.errors import ConfigError, config_errors
from dpojax.data.records import FORMS, DataError, read_columns
from dpojax.training import keep_best, metric_names, stop_at, trackers
from dpojax.training.objective import OptionError
from dpojax.training.state import make_optimizer, make_schedule


class Rule(NamedTuple):
    """Which values a key may have.

    Attributes:
      key: dotted, below the part of the config that the rule is applied to.
      allows: value -> whether a run can use it.
      expected: the allowed values in words, for the error.
    """

    key: str
    allows: Callable[[Any], bool]
    expected: str


def at_least(key: str, least: float, expected: str = "") -> Rule:
    """The key is a number that is not below `least`; NaN is not allowed."""
    return Rule(key, lambda value: value >= least, expected or f"{least:g} or more")


def above(key: str, bound: float, unit: str = "") -> Rule:
    """The key is a number above `bound`."""
    return Rule(key, lambda value: value > bound, f"above {bound:g} {unit}".strip())


def between(key: str, low: float, high: float) -> Rule:
    """The key is a number from `low` to `high`, both included."""
    return Rule(key, lambda value: low <= value <= high, f"between {low:g} and {high:g}")


def one_of(key: str, values: Collection[str], expected: str = "") -> Rule:
    """The key is one of a few names."""
    return Rule(key, lambda value: value in values, expected or f"one of {', '.join(values)}")


def precision(key: str) -> Rule:
    return one_of(key, ("float32", "bfloat16"), "float32 or bfloat16")


def from_zero_below(key: str, bound: float) -> Rule:
    """The key is a number from 0, included, to `bound`, excluded."""
    return Rule(key, lambda value: 0 <= value < bound, f"0 or more, and below {bound:g}")


def _is_mapping(columns: str) -> bool:
    try:
        read_columns(columns)
    except DataError:
        return False
    return True


def _are_trackers(names: Sequence[str]) -> bool:
    return not trackers.why_not(names)


def _are_programs(names: str) -> bool:
    try:
        metric_names.parse_programs(names)
    except ValueError:
        return False
    return True


LARGEST_INTEGER = 2**31 - 1  # steps, seeds and ids are int32 on the devices
BEYOND_INT32 = ("max_logits",)  # counted on the host alone
DEFAULT_WARMUP = 20  # steps, where a stage sets neither warmup_steps nor warmup_ratio

SHARED_RULES = (
    at_least("seed", 0),
    precision("model.compute_dtype"),
    at_least("num_proc", 0, "0 (one for each core) or more processes"),
    at_least("row_length", 0, "0 (chosen from the data) or more"),
    at_least("micro_rows", 0, "0 (chosen from the data) or more"),
    at_least("max_buckets", 1),
    at_least("max_logits", 1),
    at_least("log_every", 0, "0 (only at the end) or more steps"),
    at_least("evaluate_every", 0, "0 (only at the end) or more steps"),
    at_least("checkpoint_every", 0, "0 (only at the end) or more steps"),
    at_least("hang_minutes", 0, "0 (never) or more minutes"),
    between("exit_code_when_stopped", 1, 255),
    Rule(
        "metric_names",
        _are_programs,
        f"names of {', '.join(metric_names.PROGRAMS)} with commas between, or nothing",
    ),
    Rule(
        "trackers",
        _are_trackers,
        f"names of {', '.join(trackers.KINDS)} that are installed (pip install wandb, pip install "
        "trackio); () is none",
    ),
    at_least("max_checkpoints", 1, "1 or more checkpoints"),
    at_least("plan.examples", 0, "0 (not known) or more examples"),
    at_least("plan.prompt", 0, "0 (not known) or more tokens"),
    at_least("plan.response", 0, "0 (not known) or more tokens"),
    at_least("sweep.at_once", 0, "0 (as many as memory holds) or more members"),
    at_least("sweep.axis", 0, "0 (as many as divide mesh.data) or more devices"),
    at_least("sweep.vmapped", 0, "0 (chosen for the device) or more members"),
    at_least("samples.count", 1, "1 or more prompts"),
    at_least("samples.per_prompt", 1, "1 or more responses"),
    at_least("samples.max_new_tokens", 1),
    at_least("samples.temperature", 0, "0 (greedy) or more"),
)
TRAINING_RULES = (
    at_least("batch_size", 1),
    at_least("epochs", 1),
    at_least("steps", 0, "0 (from epochs) or more"),
    at_least("warmup_steps", 0),
    between("warmup_ratio", 0, 1),
    at_least("learning_rate", 0),
    between("min_learning_rate_ratio", 0, 1),
    between("decay_share", 0, 1),
    at_least("patience", 0, "0 (never stops early) or more evaluations"),
    from_zero_below("optimizer.b1", 1),
    from_zero_below("optimizer.b2", 1),
    above("optimizer.eps", 0),
    from_zero_below("optimizer.rms_decay", 1),
    at_least("optimizer.weight_decay", 0),
    at_least("optimizer.clip_norm", 0, "0 (off) or more"),
)
DATA_RULES = (
    Rule("data.source", bool, "a file, folder or data set; it is empty"),
    at_least("data.limit", 0, "0 (all) or more records"),
    at_least("data.eval_limit", 0, "0 (all) or more examples"),
    Rule("data.eval_share", lambda share: 0 < share < 1, "between 0 and 1"),
    Rule(
        "data.columns",
        _is_mapping,
        "NAME=PATH,NAME=PATH,-NAME, such as prompt=question,chosen=answers[0].text,-id: NAME is a "
        "field of a form, PATH where the file has it, -NAME leaves a field out (docs/data.md)",
    ),
    one_of("data.form", ("auto", *FORMS)),
)
LORA_RULES = (
    at_least("lora.rank", 0, "0 (off: all weights are trained) or more"),
    precision("lora.base_dtype"),
)
FRONTIER_RULES = (
    at_least("count", 1, "1 or more prompts"),
    at_least("completions", 2, "2 or more, of which pairs are made"),
    at_least("reference_samples", 1, "1 or more responses"),
    Rule("best_of_n", lambda counts: all(n >= 1 for n in counts), "numbers of 1 or more"),
    at_least("online_rounds", 1, "1 or more rounds"),
    above("online_beta", 0),
)
RECIPE_RULES = (
    from_zero_below("test_share", 1),
    from_zero_below("judge_share", 1),
    at_least("test_prompts", 0, "0 (all) or more prompts"),
    at_least("shifted_prompts", 0, "0 (all) or more prompts"),
    at_least("max_words", 0, "0 (any number) or more"),
    at_least("max_reference_words", 0, "0 (any number) or more"),
    at_least("shots", 0),
    Rule("temperatures", lambda values: values and min(values) >= 0, "one or more, each from 0"),
    Rule("shifted_temperatures", lambda values: values and min(values) >= 0, "each from 0"),
    at_least("best_of", 1),
    at_least("max_new_tokens", 1),
    Rule("betas", lambda values: values and min(values) > 0, "one or more, each above 0"),
    at_least("checkpoints", 0, "0 (none) or more"),
)


def apply_rules(rules: Sequence[Rule], config: ConfigDict, prefix: str = "") -> None:
    """Check one part of a config; `prefix` is its name in errors, such as "sft.".

    A key that is left open (None) breaks no rule.

    Raises:
      ConfigError: naming the first key that breaks a rule.
    """
    for rule in rules:
        value = config
        for part in rule.key.split("."):
            value = value[part]
        if value is not None and not rule.allows(value):
            raise ConfigError(f"config.{prefix}{rule.key} = {value!r}: {rule.expected}")


def check_numbers(config: Mapping[str, Any], prefix: str = "") -> None:
    """Check that the devices can hold every number of a config, in whatever part it stands.

    Raises:
      ConfigError: naming a float that is NaN, infinite, or 0 or infinite in float32, or an integer
        beyond int32.
    """
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            check_numbers(value, f"{prefix}{key}.")
            continue
        for number in value if isinstance(value, list | tuple) else (value,):
            if reason := _reason_against(key, number):
                raise ConfigError(f"config.{prefix}{key} = {value!r}: {reason}")


def _reason_against(key: str, number: Any) -> str:
    """Why no device can hold a number; "" for one that it can, and for what is no number."""
    if isinstance(number, float):
        if not math.isfinite(number):
            return "a finite number"
        with np.errstate(over="ignore", under="ignore"):
            rounded = float(np.float32(number))
        if not math.isfinite(rounded) or bool(rounded) != bool(number):
            return f"a number that float32 can hold; there it is {rounded:g}"
    elif isinstance(number, int) and key not in BEYOND_INT32 and abs(number) > LARGEST_INTEGER:
        return f"at most {LARGEST_INTEGER:,} in size"
    return ""


def check_optimizer(stage: ConfigDict, name: str) -> None:
    """Check a stage's optimiser, schedule and early stops, and fill in a warm-up that is open.

    Raises:
      ConfigError: an optimiser or a schedule that does not exist; two warm-ups; a decay that turns
        weights around; a metric whose direction is not known; a `stop_at` that is no condition.
    """
    with config_errors(f"{name}.keep_best"):
        keep_best.parse(stage.keep_best, stage.patience)
    with config_errors(f"{name}.stop_at"):
        stop_at.parse(stage.stop_at)
    try:
        make_optimizer(stage.optimizer)
        make_schedule(stage.schedule, 0, 1)
    except OptionError as error:
        raise ConfigError(f"config.{name}.{error}") from error
    if stage.warmup_steps is not None and stage.warmup_ratio is not None:
        raise ConfigError(
            f"config.{name}.warmup_ratio = {stage.warmup_ratio!r}, and config.{name}.warmup_steps "
            f"= {stage.warmup_steps!r}: set one of them"
        )
    if stage.warmup_steps is None and stage.warmup_ratio is None:
        stage.warmup_steps = DEFAULT_WARMUP
    shrinking = stage.learning_rate * stage.optimizer.weight_decay
    if shrinking >= 1:
        raise ConfigError(
            f"config.{name}.optimizer.weight_decay = {stage.optimizer.weight_decay!r}: times the "
            f"learning rate {stage.learning_rate!r} it is {shrinking:g}, the share of each weight "
            "that a step takes away; it must be below 1"
        )
