"""Checks of a config before anything is loaded, and its record in the workdir."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from dpojax.data.records import DataError
from dpojax.data.tokenise import TokenizeConfig
from dpojax.methods import preference, reward
from dpojax.models.lora import LoraConfig
from dpojax.training.state import make_optimizer, make_schedule

STAGES = (("sft",), ("preference",), ("sft", "preference"), ("reward",), ("sft", "reward"))
STAGES += (("ppo",), ("sft", "ppo"), ("classifier",), ("sft", "classifier"))
# A resumed run may change these. With those of the second line, and attention, sums come out in
# another order: the result is the same to rounding, no longer to the bit.
MAY_CHANGE = ("log_every", "evaluate_every", "checkpoint_every", "keep", "tensorboard")
MAY_CHANGE += ("distributed", "mesh", "micro_rows", "max_buckets", "row_length", "max_logits")
MAY_CHANGE += ("model.remat", "model.attention", "sweep", "check_memory", "profile", "token_cache")
MAY_CHANGE += ("compilation_cache",)

LARGEST_KL_ERROR = 0.2  # to which `rl.update_kl` holds the relative error of the KL

Rule = tuple[str, Callable[[object], bool], str]
RULES: tuple[Rule, ...] = (
    ("stages", lambda x: tuple(x) in STAGES, "one of " + ", ".join(map(str, STAGES))),
    ("seed", lambda x: x >= 0, "0 or more"),
    ("model.compute_dtype", lambda x: x in ("float32", "bfloat16"), "float32 or bfloat16"),
    ("row_length", lambda x: x >= 0, "0 (chosen from the data) or more"),
    ("micro_rows", lambda x: x >= 0, "0 (chosen from the data) or more"),
    ("max_buckets", lambda x: x >= 1, "1 or more"),
    ("max_logits", lambda x: x >= 1, "1 or more"),
    ("log_every", lambda x: x >= 0, "0 (only at the end) or more steps"),
    ("evaluate_every", lambda x: x >= 0, "0 (only at the end) or more steps"),
    ("checkpoint_every", lambda x: x >= 0, "0 (only at the end) or more steps"),
    ("keep", lambda x: x >= 1, "1 or more checkpoints"),
    ("sweep.at_once", lambda x: x >= 0, "0 (as many as memory holds) or more members"),
    ("sweep.axis", lambda x: x >= 0, "0 (as many as divide mesh.data) or more devices"),
    ("sweep.vmapped", lambda x: x >= 0, "0 (chosen for the device) or more members"),
    ("samples.count", lambda x: x >= 1, "1 or more prompts"),
    ("samples.per_prompt", lambda x: x >= 1, "1 or more responses"),
    ("samples.max_new_tokens", lambda x: x >= 1, "1 or more"),
    ("samples.temperature", lambda x: x >= 0, "0 (greedy) or more"),
)
STAGE_RULES: tuple[Rule, ...] = (
    ("batch_size", lambda x: x >= 1, "1 or more"),
    ("epochs", lambda x: x >= 1, "1 or more"),
    ("steps", lambda x: x >= 0, "0 (from epochs) or more"),
    ("warmup_steps", lambda x: x >= 0, "0 or more"),
    ("learning_rate", lambda x: x >= 0, "0 or more"),
)
DATA_RULES: tuple[Rule, ...] = (
    ("data.source", bool, "a file, folder or data set; it is empty"),
    ("data.limit", lambda x: x >= 0, "0 (all) or more records"),
    ("data.eval_limit", lambda x: x >= 0, "0 (all) or more examples"),
    ("data.eval_share", lambda x: 0 < x < 1, "between 0 and 1"),
)
LORA_RULES: tuple[Rule, ...] = (
    ("lora.rank", lambda x: x >= 0, "0 (off: all weights are trained) or more"),
    ("lora.base_dtype", lambda x: x in ("float32", "bfloat16"), "float32 or bfloat16"),
)
DPO_RULES: tuple[Rule, ...] = (
    ("reference.kind", lambda x: x in ("cached", "live"), "cached or live"),
    ("reference.dtype", lambda x: x in ("float32", "bfloat16"), "float32 or bfloat16"),
)

REWARD_RULES: tuple[Rule, ...] = (
    ("loss", lambda x: x in reward.LOSSES, f"one of {', '.join(reward.LOSSES)}"),
    ("margin_scale", lambda x: x >= 0, "0 or more"),
    ("centring", lambda x: x >= 0, "0 or more"),
)
CLASSIFIER_RULES: tuple[Rule, ...] = (
    ("max_tokens", lambda x: x >= 2, "2 or more"),
    ("first_token", lambda x: x >= 0, "0 (only the last) or more"),
    ("data.form", lambda x: x in ("auto", "classified"), "auto or classified: text and label"),
)
PPO_RULES: tuple[Rule, ...] = (
    ("limit", lambda x: x >= 0, "0 (all of a file) or more prompts"),
    ("steps", lambda x: x >= 1, "1 or more iterations"),
    ("samples", lambda x: x >= 1, "1 or more responses to a prompt"),
    ("minibatches", lambda x: x >= 1, "1 or more"),
    ("value_learning_rate", lambda x: x >= 0, "0 or more"),
    ("clip", lambda x: x > 0, "above 0"),
    ("value_clip", lambda x: x > 0, "above 0"),
    ("discount", lambda x: 0 <= x <= 1, "between 0 and 1"),
    ("gae_lambda", lambda x: 0 <= x <= 1, "between 0 and 1"),
    ("kl_coefficient", lambda x: x > 0, "above 0"),
    ("kl_target", lambda x: x > 0, "above 0 nats"),
    ("kl_horizon", lambda x: x >= 0, "0 (the coefficient stays) or more responses"),
    ("missing_eos_penalty", lambda x: x >= 0, "0 or more"),
    ("value_warmup", lambda x: x >= 0, "0 or more iterations"),
    ("max_kl", lambda x: x >= 0, "0 (off) or more nats per token"),
    ("entropy", lambda x: x >= 0, "0 (off) or more"),
    ("max_new_tokens", lambda x: x >= 1, "1 or more"),
)


class ConfigError(ValueError):
    """A config that cannot run; the message names the key."""


@contextlib.contextmanager
def naming(key: str):
    """Raises a ValueError or OSError from inside as a ConfigError that begins with the key."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.{key}: {error}") from error


def tokens_policy(tokens: ConfigDict) -> TokenizeConfig:
    """`config.tokens` as the tokeniser wants it."""
    with naming("tokens"):
        return TokenizeConfig(
            **dict(tokens) | {"max_prompt_length": tokens.max_prompt_length or None}
        )


def check(config: ConfigDict) -> None:
    """Raise ConfigError for a value that no run could use."""
    _apply(RULES, config, "")
    tokens_policy(config.tokens)
    for name in config.stages:
        stage = config[name]
        _apply(STAGE_RULES, stage, f"{name}.")
        if name != "ppo":
            _apply(DATA_RULES, stage, f"{name}.")
        with naming(name):
            make_optimizer(stage.optimizer)
            make_schedule(stage.schedule, 0, 1)
        if "lora" in stage:
            _apply(LORA_RULES, stage, f"{name}.")
            with naming(f"{name}.lora"):
                lora_config(stage.lora)
    if "reward" in config.stages:
        _apply(REWARD_RULES, config.reward, "reward.")
        if config.reward.margin_scale and config.reward.loss != "bradley_terry":
            raise ConfigError("config.reward.margin_scale: only bradley_terry has margins")
    if "classifier" in config.stages:
        _apply(CLASSIFIER_RULES, config.classifier, "classifier.")
    if "ppo" in config.stages:
        _check_ppo(config)
    if "dpo" in config.stages:
        dpo = config.preference
        _apply(DPO_RULES, dpo, "dpo.")
        loss_options(dpo)
        if (
            preference.loss_requirements(preference.loss).live
            and preference.reference.kind != "live"
        ):
            raise ConfigError(
                f"config.preference.reference.kind: {preference.loss} needs the reference's whole distributions, "
                "which are not cached; set it to live"
            )
        if preference.lora.rank:
            _check_lora_reference(dpo)


def lora_config(lora: ConfigDict) -> LoraConfig | None:
    """A stage's `lora` as the model wants it; None where it is off.

    Raises:
      ValueError: see `LoraConfig`; `adapters` while the rank is 0.
    """
    if not lora.rank:
        if lora.adapters:
            raise ValueError(f"adapters = {lora.adapters!r}, but rank = 0 trains none; set rank")
        return None
    return LoraConfig(lora.rank, lora.alpha, tuple(lora.targets), lora.rank_stabilised)


def _check_lora_reference(dpo: ConfigDict) -> None:
    """Of adapters: the frozen base is in the step, and no other reference is."""
    reference = preference.reference
    if reference.path and preference.loss_requirements(preference.loss).live:
        raise ConfigError(
            f"config.preference.reference.path = {reference.path!r}: under adapters {preference.loss} compares "
            "with their base only; leave it empty, or set config.preference.lora.rank to 0"
        )
    is_base = reference.kind == "live" and not reference.path
    if is_base and reference.dtype == "bfloat16" and preference.lora.base_dtype == "float32":
        raise ConfigError(
            "config.preference.reference.dtype = 'bfloat16': the live reference of adapters is their base "
            "itself, without a copy; set config.preference.lora.base_dtype to bfloat16, or leave it"
        )


def _check_ppo(config: ConfigDict) -> None:
    ppo = config.ppo
    _apply(PPO_RULES, ppo, "ppo.")
    responses = ppo.batch_size * ppo.samples
    if responses % ppo.minibatches:
        raise ConfigError(
            f"config.ppo.minibatches = {ppo.minibatches}: does not divide the {responses} "
            f"responses of an iteration (batch_size {ppo.batch_size} x samples {ppo.samples})"
        )
    if ppo.kl_horizon and ppo.kl_horizon <= LARGEST_KL_ERROR * responses:
        raise ConfigError(
            f"config.ppo.kl_horizon = {ppo.kl_horizon}: with {responses} responses in an iteration "
            f"it has to be above {LARGEST_KL_ERROR * responses:g}, or the coefficient could turn "
            "negative; 0 keeps the coefficient as it is"
        )
    if ppo.prompts == "reviews" and not ppo.limit:
        raise ConfigError(
            "config.ppo.limit = 0: the prompts of reviews never end; say how many to use"
        )
    if config.samples.prompts == "reviews" != ppo.prompts:
        raise ConfigError(
            f"config.samples.prompts = 'reviews', but config.ppo.prompts = {ppo.prompts!r}: set it "
            "to a file of held-out prompts of the same kind"
        )


def loss_options(dpo: ConfigDict) -> dict:
    """The options of the loss that `config.preference` names, given or by default.

    Raises:
      ConfigError: naming the key.
    """
    given = {key: dpo[key] for key in preference.OPTIONS} | {"weights": preference.loss_weights}
    try:
        return preference.resolve(preference.loss, given, preference.preset)
    except ValueError as error:  # it begins with the option's name
        raise ConfigError(f"config.preference.{error}") from error


def fill_in(config: ConfigDict) -> None:
    """Set what the config leaves open (options of the loss, the reward that judges PPO) to what it
    is, so that it says so."""
    if "ppo" in config.stages:
        config.samples.reward = config.samples.reward or config.ppo.reward
    if "dpo" in config.stages:
        options = loss_options(config.preference)
        config.preference.update(
            {key: options[key] for key in preference.OPTIONS if key in options}
        )


def record(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Write config.json, or compare with the one there; all processes do, the first one writes.

    Raises:
      ConfigError: the workdir belongs to a run with another config; it names the keys.
    """
    path = workdir / "config.json"
    now = json.loads(config.to_json())
    if path.exists():
        try:
            then = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not JSON ({error}); use another --workdir") from error
        if changed := changes(then, now):
            raise ConfigError(
                f"{workdir} holds a run of another config; give this one its own --workdir, or "
                "take back these changes:\n" + "\n".join(changed)
            )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(now, indent=2) + "\n")
        os.replace(unfinished, path)


@contextlib.contextmanager
def only_run(workdir: pathlib.Path):
    """Keeps a second run out of the workdir as long as this one lives, on this host's processes.

    Raises:
      ConfigError: another run is at work there; it names its host and process.
    """
    if jax.process_index() != 0:
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ConfigError(
                f"{workdir}: {owner} is running in this workdir; wait for it"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _apply(rules: tuple[Rule, ...], config: ConfigDict, prefix: str) -> None:
    for key, allowed, expected in rules:
        value = config
        for part in key.split("."):
            value = value[part]
        if not allowed(value):
            raise ConfigError(f"config.{prefix}{key} = {value!r}: {expected}")


def changes(old: dict, new: dict) -> list[str]:
    """What a resumed run must not change, a line each, between two configs as JSON has them."""
    old, new = flat(old), flat(new)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    free = tuple(f"{key}." for key in MAY_CHANGE)
    return [
        f"  {key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in changed
        if not f"{key}.".startswith(free)
    ]


def flat(tree: dict, prefix: str = "") -> dict:
    """A config as JSON has it, by whole keys: {"preference.beta": 0.1, ...}."""
    found = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found
