"""Rules for single config keys, and the ones that several stages share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpojax.config.errors import ConfigError, config_errors
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


SHARED_RULES = (
    at_least("seed", 0),
    precision("model.compute_dtype"),
    at_least("row_length", 0, "0 (chosen from the data) or more"),
    at_least("micro_rows", 0, "0 (chosen from the data) or more"),
    at_least("max_buckets", 1),
    at_least("max_logits", 1),
    at_least("log_every", 0, "0 (only at the end) or more steps"),
    at_least("evaluate_every", 0, "0 (only at the end) or more steps"),
    at_least("checkpoint_every", 0, "0 (only at the end) or more steps"),
    at_least("max_checkpoints", 1, "1 or more checkpoints"),
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
    at_least("learning_rate", 0),
)
DATA_RULES = (
    Rule("data.source", bool, "a file, folder or data set; it is empty"),
    at_least("data.limit", 0, "0 (all) or more records"),
    at_least("data.eval_limit", 0, "0 (all) or more examples"),
    Rule("data.eval_share", lambda share: 0 < share < 1, "between 0 and 1"),
)
LORA_RULES = (
    at_least("lora.rank", 0, "0 (off: all weights are trained) or more"),
    precision("lora.base_dtype"),
)


def apply_rules(rules: Sequence[Rule], config: ConfigDict, prefix: str = "") -> None:
    """Check one part of a config; `prefix` is its name in errors, such as "sft.".

    Raises:
      ConfigError: naming the first key that breaks a rule.
    """
    for rule in rules:
        value = config
        for part in rule.key.split("."):
            value = value[part]
        if not rule.allows(value):
            raise ConfigError(f"config.{prefix}{rule.key} = {value!r}: {rule.expected}")


def check_optimizer(stage: ConfigDict, name: str) -> None:
    """Raise ConfigError for an optimiser or a schedule that does not exist."""
    with config_errors(name):
        make_optimizer(stage.optimizer)
        make_schedule(stage.schedule, 0, 1)
