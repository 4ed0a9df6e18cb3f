"""A stage of a run before it is trained: its data, shapes, objective and programs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.data.pipeline import fixed_batches, in_order, order, steps_in
from dpojax.data.rows import Rows, Shape, plan
from dpojax.launch import data as stage_data
from dpojax.launch.config import naming
from dpojax.launch.data import StageData
from dpojax.launch.setup import Setup
from dpojax.methods import dpo, sft
from dpojax.training.metrics import Window
from dpojax.training.objective import Hyper, Objective
from dpojax.training.step import build_evaluate, build_score

HYPER = ("learning_rate", "beta", "label_smoothing")


class Stage(NamedTuple):
    """A stage before it is trained: everything but weights."""

    name: str
    setup: Setup
    data: StageData
    shape: Shape
    steps: int
    objective: Objective
    hyper: Hyper
    score: Callable  # jitted: params, rows on the mesh -> token statistics
    metrics: Callable  # jitted: token statistics, rows on the mesh, hyper -> sums and weights

    @property
    def config(self):
        return self.setup.config[self.name]

    @property
    def folder(self) -> pathlib.Path:
        return self.setup.workdir / self.name

    @property
    def score_prompt(self) -> bool:
        return bool(self.config.get("score_prompt", False))

    @property
    def order(self):
        return order(
            self.data.train,
            batch_size=self.config.batch_size,
            steps=self.steps,
            seed=self.setup.config.seed,
        )

    def held_out(self, attach=None) -> Iterator[Rows]:
        """The held-out examples in order, as NumPy rows, with `attach` applied."""
        return self.rows(self.data.held_out, attach)

    def in_order(self, indices: range) -> list[range]:
        """`indices` as batches, without shuffling."""
        return in_order(indices, self.config.batch_size)

    def rows(self, indices: range, attach=None) -> Iterator[Rows]:
        """The examples at `indices` in order, as NumPy rows, with `attach` applied."""
        return fixed_batches(
            self.data.examples,
            self.in_order(indices),
            self.shape,
            score_prompt=self.score_prompt,
            attach=attach,
        )

    def evaluate(self, params, batches: Iterator[Rows]) -> dict[str, float]:
        """Metrics on batches that lie on the mesh: sums over all of them, divided once."""
        window = Window()
        for rows in batches:
            window.add(self.metrics(self.score(params, rows), rows, self.hyper))
        return window.flush()


def prepare(name: str, setup: Setup) -> Stage:
    """Load the stage's data, choose its shape, and build its programs (compiled at first use).

    Raises:
      DataError: see `launch.data.load` and `rows.plan`.
    """
    config = setup.config[name]
    objective = _objective(name, config)
    data = stage_data.load(
        config.data,
        setup.config.tokens,
        setup.tokenizer,
        best_only=name == "sft",
        seed=setup.config.seed,
    )
    stage = Stage(
        name=name,
        setup=setup,
        data=data,
        shape=None,
        steps=config.steps
        or steps_in(data.train, batch_size=config.batch_size, epochs=config.epochs),
        objective=objective,
        hyper={key: jnp.float32(config[key]) for key in HYPER if key in config},
        score=jax.jit(build_score(setup.model, max_logits=setup.max_logits)),
        metrics=jax.jit(build_evaluate(objective)),
    )
    return stage._replace(shape=_plan(stage))


def save_reports(stage: Stage) -> str:
    """Write data_report.json and .txt into the stage's folder; returns the text."""
    reports = stage.data.reports
    text = "\n\n".join(f"{stage.name} data: {name}\n{report}" for name, report in reports.items())
    stage.folder.mkdir(parents=True, exist_ok=True)
    as_json = {name: json.loads(report.to_json()) for name, report in reports.items()}
    (stage.folder / "data_report.json").write_text(json.dumps(as_json, indent=2) + "\n")
    (stage.folder / "data_report.txt").write_text(text + "\n")
    return text


def describe(stage: Stage) -> str:
    """One line: the model, the mesh, the data and the shape of a batch."""
    mesh = " x ".join(f"{name} {size}" for name, size in stage.setup.mesh.shape.items())
    parameters = sum(x.size for x in jax.tree.leaves(stage.setup.abstract_params))
    shape = stage.shape
    return (
        f"{stage.name}: {parameters:,} parameters on a mesh of {mesh}; {stage.data.train:,} "
        f"examples to train on and {len(stage.data.held_out):,} held out; {stage.steps:,} steps of "
        f"{stage.config.batch_size} examples in at most {shape.micro_batches} micro-batches of "
        f"{shape.rows} rows x {shape.length} tokens, {shape.scored} of them scored at most"
    )


def _objective(name: str, config: ConfigDict) -> Objective:
    if name == "sft":
        return sft.objective()
    return dpo.objective(config.loss, length_norm=config.length_norm or None)


def _plan(stage: Stage) -> Shape:
    config, examples = stage.setup.config, stage.data.examples
    training = [[int(i) for i in batch] for batch in stage.order]
    with naming("micro_rows"):
        return plan(
            examples,
            [*training, *stage.in_order(stage.data.training), *stage.in_order(stage.data.held_out)],
            length=config.row_length or None,
            micro_rows=config.micro_rows or None,
            multiple=sharding.row_shards(stage.setup.mesh),
            score_prompt=stage.score_prompt,
        )
