"""Every number of a config has a rule; what no run can use is refused by its key."""

import math
import re

import pytest
from ml_collections import ConfigDict

from dpojax.config.defaults import default_config
from dpojax.config.errors import ConfigError
from dpojax.stages.registry import STAGES, resolve

from .conftest import tiny_config

# Numbers that may be below zero: mesh sizes of -1, and weights of a loss's terms.
SIGNED = ("mesh.", "preference.alpha", "preference.divergence_alpha", "ppo.reward")
SIGNED += ("preference.humanline_",)  # bounds of log-ratios
# `preference` has options that its loss must have, so their values are looked at there alone.
OF_LOSSES = tuple(
    f"preference.{name}"
    for name in (
        *("beta", "label_smoothing", "alpha", "gamma", "tau", "penalty", "margin", "scale"),
        *("threshold", "desirable_weight", "undesirable_weight", "top", "divergence_alpha"),
        *("ld_alpha", "wpo_clamp"),
    )
)
# The data of a model's shape and of the tokens are refused where they are used.
SHAPES = ("model.",)


def numbers(config, kind, prefix=""):
    """The dotted names of all keys of this kind: float or int."""
    for key in config:
        value, name = config.get_oneway_ref(key).get(), prefix + key
        if isinstance(value, ConfigDict):
            yield from numbers(value, kind, f"{name}.")
        elif config.get_type(key) is kind:
            yield name


FLOATS = list(numbers(default_config(), float))
INTEGERS = list(numbers(default_config(), int))


def resolved(**changes):
    """The config with these changes, of a run that has the stage which they are of."""
    config = default_config()
    config.classifier.data.source = "texts.jsonl"
    config.update_from_flattened_dict(changes)
    stage = next(iter(changes)).split(".")[0]
    config.stages = (stage if stage in STAGES else "sft",)
    return resolve(config, "unused").config


def test_the_config_has_numbers_of_both_kinds():
    assert {"sft.learning_rate", "preference.beta", "ppo.clip"} <= set(FLOATS)
    assert {"seed", "sft.warmup_steps", "reward.patience"} <= set(INTEGERS)


@pytest.mark.parametrize("key", FLOATS)
def test_a_number_that_no_device_can_hold_is_refused_by_its_key(key):
    for value in (math.nan, math.inf, -math.inf, 1e39, 1e-50):
        with pytest.raises(
            ConfigError, match=rf"^config\.{key} = {re.escape(repr(value))}: ."
        ) as error:
            resolved(**{key: value})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", INTEGERS)
def test_an_integer_beyond_int32_is_refused_by_its_key(key):
    if key == "max_logits":
        assert resolved(max_logits=2**33).max_logits == 2**33
        return
    with pytest.raises(ConfigError, match=rf"^config\.{key} = 4294967296: at most 2,147,483,647"):
        resolved(**{key: 2**32})


@pytest.mark.parametrize(
    "key", [key for key in FLOATS + INTEGERS if not key.startswith((*SIGNED, *OF_LOSSES, *SHAPES))]
)
def test_a_negative_number_is_refused_by_its_key(key):
    value = -3 if key in INTEGERS else -0.5
    part, _, short = key.rpartition(".")
    needs = {f"{part.removesuffix('.lora')}.lora.rank": 4} if part.endswith(".lora") else {}
    if short == "rank":
        needs = {}
    # Those of the tokens name the part and the key.
    named = rf"config\.{key}|config\.{part}: {short}|config\.{part}: rank, alpha"
    with pytest.raises(ConfigError, match=named):
        resolved(**{key: value} | needs)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.b1", 1.0),
        ("optimizer.b1", 1.5),
        ("optimizer.b2", 1.0),
        ("optimizer.eps", 0.0),
        ("optimizer.rms_decay", 1.0),
        ("warmup_ratio", 1.5),
        ("min_learning_rate_ratio", 2.0),
        ("decay_share", 1.01),
        ("batch_size", 0),
        ("epochs", 0),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_what_an_optimiser_or_a_schedule_cannot_do_is_refused_in_every_stage(stage, key, value):
    with pytest.raises(ConfigError, match=rf"config\.{stage}\.{key} = {value}: "):
        resolved(**{f"{stage}.{key}": value})


def test_a_decay_that_turns_the_weights_around_is_refused():
    with pytest.raises(ConfigError, match=r"config\.sft\.optimizer\.weight_decay = 20\.0: .* 2, "):
        resolved(**{"sft.learning_rate": 0.1, "sft.optimizer.weight_decay": 20.0})


def test_a_warm_up_is_set_by_its_steps_or_its_share_and_is_twenty_steps_by_itself():
    assert resolved(**{"sft.epochs": 1}).sft.warmup_steps == 20
    assert resolved(**{"sft.warmup_steps": 0}).sft.warmup_steps == 0
    shared = resolved(**{"sft.warmup_ratio": 0.1}).sft
    assert (shared.warmup_steps, shared.warmup_ratio) == (None, 0.1)
    assert resolve(ConfigDict(tiny_config()), "unused").config.ppo.warmup_steps == 0
    with pytest.raises(ConfigError, match=r"config\.sft\.warmup_ratio = 0\.1, and .* set one"):
        resolved(**{"sft.warmup_ratio": 0.1, "sft.warmup_steps": 5})


@pytest.mark.parametrize("stage", STAGES)
def test_a_metric_without_a_known_direction_is_refused_before_anything_is_read(stage):
    with pytest.raises(ConfigError, match=rf"config\.{stage}\.keep_best: .*'eval/samples/kl'"):
        resolved(**{f"{stage}.keep_best": "eval/samples/kl"})
