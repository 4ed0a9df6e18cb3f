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
from dpojax.data.tokenise import Policy
from dpojax.methods import dpo as dpo_method
from dpojax.training.state import make_optimizer, make_schedule

STAGES = (("sft",), ("dpo",), ("sft", "dpo"))
# A resumed run may change these. With those of the second line sums come out in another order: the
# result is the same to rounding, no longer to the bit.
MAY_CHANGE = ("log_every", "evaluate_every", "checkpoint_every", "keep", "tensorboard")
MAY_CHANGE += ("distributed", "mesh", "micro_rows", "row_length", "max_logits", "model.remat")

Rule = tuple[str, Callable[[object], bool], str]
RULES: tuple[Rule, ...] = (
    ("stages", lambda x: tuple(x) in STAGES, "('sft',), ('dpo',) or ('sft', 'dpo')"),
    ("seed", lambda x: x >= 0, "0 or more"),
    ("model.compute_dtype", lambda x: x in ("float32", "bfloat16"), "float32 or bfloat16"),
    ("row_length", lambda x: x >= 0, "0 (chosen from the data) or more"),
    ("micro_rows", lambda x: x >= 0, "0 (chosen from the data) or more"),
    ("max_logits", lambda x: x >= 1, "1 or more"),
    ("log_every", lambda x: x >= 0, "0 (only at the end) or more steps"),
    ("evaluate_every", lambda x: x >= 0, "0 (only at the end) or more steps"),
    ("checkpoint_every", lambda x: x >= 0, "0 (only at the end) or more steps"),
    ("keep", lambda x: x >= 1, "1 or more checkpoints"),
)
STAGE_RULES: tuple[Rule, ...] = (
    ("batch_size", lambda x: x >= 1, "1 or more"),
    ("epochs", lambda x: x >= 1, "1 or more"),
    ("steps", lambda x: x >= 0, "0 (from epochs) or more"),
    ("warmup_steps", lambda x: x >= 0, "0 or more"),
    ("learning_rate", lambda x: x >= 0, "0 or more"),
    ("data.source", bool, "a file, folder or data set; it is empty"),
    ("data.limit", lambda x: x >= 0, "0 (all) or more records"),
    ("data.eval_limit", lambda x: x >= 0, "0 (all) or more examples"),
    ("data.eval_share", lambda x: 0 < x < 1, "between 0 and 1"),
)
DPO_RULES: tuple[Rule, ...] = (
    ("beta", lambda x: x > 0, "beta must be greater than 0"),
    ("label_smoothing", lambda x: 0 <= x < 0.5, "in [0, 0.5)"),
    ("reference.kind", lambda x: x in ("cached", "live"), "cached or live"),
    ("reference.dtype", lambda x: x in ("float32", "bfloat16"), "float32 or bfloat16"),
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


def tokens_policy(tokens: ConfigDict) -> Policy:
    """`config.tokens` as the tokeniser wants it."""
    with naming("tokens"):
        return Policy(**dict(tokens) | {"max_prompt_length": tokens.max_prompt_length or None})


def check(config: ConfigDict) -> None:
    """Raise ConfigError for a value that no run could use."""
    _apply(RULES, config, "")
    tokens_policy(config.tokens)
    for name in config.stages:
        stage = config[name]
        _apply(STAGE_RULES, stage, f"{name}.")
        with naming(name):
            make_optimizer(stage.optimizer)
            make_schedule(stage, 1)
    if "dpo" in config.stages:
        dpo = config.dpo
        _apply(DPO_RULES, dpo, "dpo.")
        with naming("dpo"):
            dpo_method.objective(dpo.loss, length_norm=dpo.length_norm or None)
        if dpo.loss not in dpo_method.SMOOTHED and dpo.label_smoothing:
            raise ConfigError(f"config.dpo.label_smoothing: {dpo.loss} has none; leave it at 0")
        if dpo.loss == "exo" and not dpo.label_smoothing:
            raise ConfigError("config.dpo.label_smoothing: exo is infinite at 0; 1e-3 is usual")
        if dpo.loss != "ipo" and dpo.length_norm:
            raise ConfigError(f"config.dpo.length_norm: {dpo.loss} has none; leave it empty")


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
        if changed := _changes(_flat(then), _flat(now)):
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


def _changes(old: dict, new: dict) -> list[str]:
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    free = tuple(f"{key}." for key in MAY_CHANGE)
    return [
        f"  {key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in changed
        if not f"{key}.".startswith(free)
    ]


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
