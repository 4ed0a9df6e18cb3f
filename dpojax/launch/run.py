"""A whole run: the stages of a config in one workdir, resumed where they stopped."""

from __future__ import annotations

import pathlib
from functools import partial

import jax
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.data.records import DataError
from dpojax.evaluation import plots
from dpojax.launch import setup as run_setup
from dpojax.launch import stages
from dpojax.launch.config import ConfigError, check, record
from dpojax.launch.summary import summarise
from dpojax.launch.train import train_stage
from dpojax.training.checkpoints import CheckpointError
from dpojax.training.loop import NonFiniteLoss, StopSignal
from dpojax.training.metrics import read_metrics
from dpojax.training.reference import ReferenceMismatch

# What a user can mend; anything else is a bug of ours, and shows its traceback.
FAILURES = (ConfigError, DataError, CheckpointError, ReferenceMismatch, NonFiniteLoss)


def run(config: ConfigDict, workdir: str) -> None:
    """Train the stages that `config` names, print and save what came of it.

    The same call in the same workdir resumes; a finished run only prints its summary again.

    Raises:
      ConfigError, DataError: before anything is trained; everything on disk is left as it was.
      Preempted: after a SIGTERM, once the state is saved.
    """
    check(config)
    folder = pathlib.Path(workdir).resolve()
    if config.distributed:
        sharding.start_distributed()
    setup = run_setup.prepare(config, folder)
    prepared = [stages.prepare(name, setup) for name in config.stages]
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        record(config, folder)
        for stage in prepared:
            print(f"\n{stages.save_reports(stage)}\n{_describe(stage)}", flush=True)
    with jax.set_mesh(setup.mesh), StopSignal() as stop:
        start = partial(run_setup.initial_params, setup)
        for stage in prepared:
            params = train_stage(stage, start, stop)
            start = partial(lambda finished: finished, params)
        if jax.process_index() == 0:
            _draw(folder, config.stages)
        for stage in prepared:
            if stage.objective.needs_reference:
                summarise(stage, params)


def _describe(stage: stages.Stage) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in stage.setup.mesh.shape.items())
    shape = stage.shape
    shapes = jax.tree.leaves(stage.setup.abstract_params)
    return (
        f"{stage.name}: {sum(x.size for x in shapes):,} parameters on a mesh of {mesh}; "
        f"{stage.data.train:,} examples to train on and {len(stage.data.held_out):,} held out; "
        f"{stage.steps:,} steps of {stage.config.batch_size} examples in {shape.micro_batches} "
        f"micro-batch(es) of {shape.rows} rows x {shape.length} tokens, "
        f"{shape.scored} of them scored at most"
    )


def _draw(folder: pathlib.Path, names) -> None:
    curves = {name: read_metrics(folder / name) for name in names}
    plots.training_curves(curves, folder / "training_curves.png")
    print(f"figure: {folder / 'training_curves.png'}")
