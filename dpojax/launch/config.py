"""Checks of a config before anything is loaded, and its record in the workdir."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib

from ml_collections import ConfigDict

from dpojax.data.tokenise import Policy
from dpojax.methods import dpo as dpo_method
from dpojax.training.state import make_optimizer, make_schedule

MAY_CHANGE = (
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "keep",
    "tensorboard",
    "distributed",
)


class ConfigError(ValueError):
    """A config that cannot run; the message names the key."""


@contextlib.contextmanager
def naming(key: str):
    """Raises a ValueError from inside as a ConfigError that begins with the key."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"config.{key}: {error}") from error


def tokens_policy(tokens: ConfigDict) -> Policy:
    """`config.tokens` as the tokeniser wants it."""
    with naming("tokens"):
        return Policy(**dict(tokens) | {"max_prompt_length": tokens.max_prompt_length or None})


def check(config: ConfigDict) -> None:
    """Raise ConfigError for a value that no run could use."""
    stages = tuple(config.stages)
    if not stages or any(stage not in ("sft", "dpo") for stage in stages):
        raise ConfigError(f"config.stages = {stages}: name sft, dpo, or both")
    if config.model.compute_dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            f"config.model.compute_dtype = {config.model.compute_dtype!r}: float32 or bfloat16"
        )
    tokens_policy(config.tokens)
    for stage in stages:
        _check_stage(stage, config[stage])
    if "dpo" in stages:
        _check_dpo(config.dpo)
    for key in ("log_every", "evaluate_every", "checkpoint_every"):
        if config[key] < 0:
            raise ConfigError(f"config.{key} = {config[key]}: 0 (only at the end) or more steps")


def record(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Write config.json, or compare with the one there.

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
        old, new = _flat(then), _flat(now)
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        changed = [key for key in changed if key not in MAY_CHANGE]
        if changed:
            lines = "\n".join(f"  {key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed)
            raise ConfigError(
                f"{workdir} holds a run of another config; give this one its own --workdir, or "
                f"take back these changes:\n{lines}"
            )
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(now, indent=2) + "\n")
    os.replace(unfinished, path)


def _check_stage(name: str, stage: ConfigDict) -> None:
    for key in ("batch_size", "epochs"):
        if stage[key] < 1:
            raise ConfigError(f"config.{name}.{key} = {stage[key]}: at least 1")
    for key in ("steps", "warmup_steps", "learning_rate"):
        if stage[key] < 0:
            raise ConfigError(f"config.{name}.{key} = {stage[key]}: 0 or more")
    if not 0 < stage.data.eval_share < 1:
        raise ConfigError(
            f"config.{name}.data.eval_share = {stage.data.eval_share}: between 0 and 1"
        )
    with naming(name):
        make_optimizer(stage.optimizer)
        make_schedule(stage, 1)
    if not stage.data.source:
        raise ConfigError(f"config.{name}.data.source is empty: name a file, folder or data set")


def _check_dpo(dpo: ConfigDict) -> None:
    if not dpo.beta > 0:
        raise ConfigError(f"config.dpo.beta = {dpo.beta}: beta must be greater than 0")
    if not 0 <= dpo.label_smoothing < 0.5:
        raise ConfigError(f"config.dpo.label_smoothing = {dpo.label_smoothing}: in [0, 0.5)")
    with naming("dpo"):
        dpo_method.objective(dpo.loss, length_norm=dpo.length_norm or None)
    if dpo.loss == "ipo" and dpo.label_smoothing:
        raise ConfigError("config.dpo.label_smoothing: ipo has none; leave it at 0")
    if dpo.loss != "ipo" and dpo.length_norm:
        raise ConfigError(f"config.dpo.length_norm: {dpo.loss} has none; leave it empty")
    if dpo.reference.kind not in ("cached", "live"):
        raise ConfigError(f"config.dpo.reference.kind = {dpo.reference.kind!r}: cached or live")


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        inner = (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
        flat |= inner
    return flat
