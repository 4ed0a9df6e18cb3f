"""A whole run: the stages of a config in one workdir, resumed where they stopped."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Sequence
from functools import partial

import jax
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.data.records import DataError
from dpojax.evaluation.policies import NothingStopped
from dpojax.evaluation.rewards import RewardError
from dpojax.stages import ppo
from dpojax.stages import stage as stages
from dpojax.stages import token_cache
from dpojax.stages import setup as run_setup
from dpojax.config.checks import ConfigError, check, fill_in, only_run, record
from dpojax.stages.ppo import PPOStage
from dpojax.stages.setup import Setup
from dpojax.stages.summary import open_summary, summarise_classifier, summarise_reward
from dpojax.stages.train import footprint, require_memory, train_stage
from dpojax.training.checkpoints import CheckpointError
from dpojax.training.loop import NonFiniteLoss, StopSignal
from dpojax.training.metrics import read_metrics
from dpojax.training.reference import ReferenceMismatch

# What a user can mend; anything else is a bug of ours, and shows its traceback.
FAILURES = (ConfigError, DataError, CheckpointError, ReferenceMismatch, NonFiniteLoss, OSError)
FAILURES += (RewardError, NothingStopped)
FINISHED = "finished.json"


def run(config: ConfigDict, workdir: str) -> None:
    """Train the stages that `config` names, print and save what came of it.

    The same call in the same workdir resumes; a finished run only prints its summary again.

    Raises:
      ConfigError, DataError: before anything is trained; everything on disk is left as it was.
      Preempted: after a SIGTERM, once the state is saved.
    """
    check(config)
    fill_in(config)
    if "://" in workdir:
        raise ConfigError(f"--workdir={workdir}: has to be a folder of a (shared) file system")
    folder = pathlib.Path(workdir).resolve()
    if config.distributed:
        sharding.start_distributed()
    if sharding.agreed((folder / FINISHED).exists()):
        record(config, folder)
        _show(folder)
        return
    with run_setup.compiled_once(config.compilation_cache):
        _run(config, folder)
    _show(folder)


def _run(config: ConfigDict, folder: pathlib.Path) -> None:
    setup = run_setup.prepare(config, folder)
    prepared = [prepare(name, setup) for name in config.stages]
    require_memory_of(prepared)
    record(config, folder)
    with only_run(folder), jax.set_mesh(setup.mesh), StopSignal() as stop:
        announce(prepared)
        params = train(prepared, partial(run_setup.initial_params, setup), stop)()
        finish(prepared[-1], params)


def prepare(name: str, setup: Setup) -> stages.Stage | PPOStage:
    """A stage before it is trained."""
    return ppo.prepare(setup) if name == ppo.NAME else stages.prepare(name, setup)


def require_memory_of(prepared: Sequence[stages.Stage | PPOStage]) -> None:
    """Raise ConfigError if a stage will not fit into memory; PPO's is not predicted."""
    for stage in prepared:
        if not isinstance(stage, PPOStage):
            require_memory(stage)


def announce(prepared: Sequence[stages.Stage | PPOStage]) -> None:
    """Say, and keep, what every stage is about to do."""
    for stage in prepared:
        if isinstance(stage, PPOStage):
            said = f"\n{ppo.describe(stage)}"
        else:
            wanted = footprint(stage)
            said = f"\n{stages.report_of(stage)}\n{stages.describe(stage)}\n"
            said += f"{stage.name}: about {wanted} of each device\n{stage.name}: tokens "
        if jax.process_index() == 0:
            if not isinstance(stage, PPOStage):
                stages.save_reports(stage)
                said += token_cache.save(stage.data)
            print(said, flush=True)


def train(
    prepared: Sequence[stages.Stage | PPOStage], start: Callable[[], dict], stop: StopSignal
) -> Callable[[], dict]:
    """Train stage after stage from the parameters start(); returns what gives the last one's."""
    for stage in prepared:
        train_one = ppo.train if isinstance(stage, PPOStage) else train_stage
        params = train_one(stage, start, stop)
        start = partial(lambda finished: finished, params)
    return start


def summariser(last: stages.Stage | PPOStage) -> Callable[..., dict]:
    """(stage, its parameters) -> what is said of them in the end: of this stage, or of others that
    share its model, reference and data."""
    judges = {"reward": summarise_reward, "classifier": summarise_classifier}
    judges[ppo.NAME] = ppo.summarise
    return open_summary(last) if last.name == "dpo" else judges.get(last.name, lambda *_: None)


def finish(
    last: stages.Stage | PPOStage, params: dict, summarise: Callable[..., dict] | None = None
) -> None:
    """Evaluator the parameters of a run's last stage, draw its curves, and write finished.json.

    Args:
      summarise: of `summariser`, where several stages share one.
    """
    found = (summarise or summariser(last))(last, params)
    summaries = {} if found is None else {last.name: found}
    if jax.process_index() == 0:
        from dpojax.evaluation import plots  # matplotlib, which only a run's end wants

        workdir = last.setup.workdir
        curves = {name: read_metrics(workdir / name) for name in last.setup.config.stages}
        plots.training_curves(curves, workdir / "training_curves.png")
        unfinished = workdir / f"{FINISHED}.unfinished"
        unfinished.write_text(json.dumps(summaries, indent=2) + "\n")
        os.replace(unfinished, workdir / FINISHED)


def _show(folder: pathlib.Path) -> None:
    """Print what a finished run found and where its figure is."""
    if jax.process_index() == 0:
        for summary in sorted(folder.glob("*/summary.txt")):
            print(f"\n{summary.read_text()}")
        print(f"curves: {folder / 'training_curves.png'}")
