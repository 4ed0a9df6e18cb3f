"""A stage of a run before it is trained: its data, shapes, objective and programs."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.config.checks import loss_options, naming
from dpojax.data.packing import Costs, Shape, plan
from dpojax.data.pipeline import fixed_batches, in_order, order, steps_in
from dpojax.data.rows import Rows, empty
from dpojax.logprobs import TokenStatistics
from dpojax.losses import RunningMean
from dpojax.methods import classifier, preference, reward, sft
from dpojax.stages import classified, token_cache
from dpojax.stages import data as stage_data
from dpojax.stages import setup as run_setup
from dpojax.stages.adapters import Lora
from dpojax.stages.data import DataRequirements, StageData
from dpojax.stages.setup import Setup
from dpojax.training import forward as forwards
from dpojax.training.costs import packing_costs
from dpojax.training.forward import (
    Forward,
    build_outputs,
    build_score,
    language_model,
    reward_model,
)
from dpojax.training.metrics import Window
from dpojax.training.objective import Hyper, Objective
from dpojax.training.step import build_evaluate

LABELS = "labels.json"  # of a classifier, in its stage's folder
SCORING = ("reward", "classifier")  # stages whose model has no language-model head


class Stage(NamedTuple):
    """A stage before it is trained: everything but weights."""

    name: str
    setup: Setup
    data: StageData
    shape: Shape
    steps: int
    objective: Objective
    hyper: Hyper
    forward: Forward  # to train with
    keep_best: str  # the evaluation's metric whose best checkpoint is the result; "": the last is
    score: Callable  # jitted: params, rows on the mesh, reference params -> outputs
    metrics: Callable  # jitted: outputs, rows on the mesh, hyper -> sums and weights

    @property
    def config(self):
        return self.setup.config[self.name]

    @property
    def folder(self) -> pathlib.Path:
        return self.setup.workdir / self.name

    @property
    def lora(self) -> Lora | None:
        return self.setup.lora[self.name]

    @property
    def starts_at_reference(self) -> bool:
        """Whether the policy of a preference stage is its reference at step 0."""
        return not (self.config.reference.path or self.config.lora.adapters)

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

    def evaluate(
        self,
        params,
        batches: Iterator[Rows],
        *,
        baseline: RunningMean | None = None,
        reference_params=None,
        first: TokenStatistics | None = None,
    ) -> dict[str, float]:
        """Metrics on batches that lie on the mesh: sums over all of them, divided once.

        Args:
          baseline: the state's, for the objectives that keep one.
          first: what `score` gives on the first batch, where that is known.
        """
        kept = baseline is not None and self.objective.baseline is not None
        hyper = self.hyper | ({"delta": baseline.mean} if kept else {})
        window = Window()
        for rows in batches:
            outputs = self.score(params, rows, reference_params) if first is None else first
            first = None
            window.add(self.metrics(outputs, rows, hyper))
        return window.flush()


def prepare(name: str, setup: Setup) -> Stage:
    """Load the stage's data, choose its shape, and build its programs (compiled at first use).

    Raises:
      DataError: see `load` and `packing.plan`.
    """
    stage = load(name, setup)
    return stage._replace(shape=shape_of(stage, [stage.order]))


def load(name: str, setup: Setup) -> Stage:
    """The stage with its data and programs, whose shape is still to be chosen.

    Raises:
      DataError: see `stages.data.load`.
    """
    config = setup.config[name]
    data = _load(name, setup, _method(name, config)[2])
    steps = config.steps or steps_in(data.train, batch_size=config.batch_size, epochs=config.epochs)
    return without_data(name, setup, data.labels)._replace(data=data, steps=steps)


def with_numbers(stage: Stage, config: ConfigDict, workdir: pathlib.Path) -> Stage:
    """The same stage, data and programs included, of a run that differs in traced numbers alone."""
    own, lora = config[stage.name], stage.lora
    if lora is not None:
        lora = lora._replace(base_folder=workdir / stage.name / lora.base_folder.name)
    setup = stage.setup._replace(
        config=config, workdir=workdir, lora=stage.setup.lora | {stage.name: lora}
    )
    steps = own.steps or steps_in(stage.data.train, batch_size=own.batch_size, epochs=own.epochs)
    return stage._replace(setup=setup, steps=steps, hyper=_hyper(stage.name, own))


def stepping_on(stage: Stage, mesh: Mesh) -> Stage:
    """The same stage for steps on another mesh; it still evaluates on its own."""
    setup = stage.setup._replace(mesh=mesh)
    return stage._replace(setup=setup, forward=_forward(setup, stage.objective))


def without_data(name: str, setup: Setup, labels: tuple[str, ...] = ()) -> Stage:
    """The stage with its programs alone: no data, no shape, no steps."""
    config = setup.config[name]
    setup = run_setup.scalar(setup, labels) if name in SCORING else setup
    objective = _method(name, config)[0]
    forward = _forward(setup, objective)
    return Stage(
        name=name,
        setup=setup,
        data=None,
        shape=None,
        steps=0,
        objective=objective,
        hyper=_hyper(name, config),
        forward=forward,
        keep_best=reward.ACCURACY if name == "reward" and config.keep_best else "",
        score=_scoring(_score(setup, forward)),
        metrics=jax.jit(build_evaluate(objective)),
    )


def report_of(stage: Stage) -> str:
    """What became of the records, for a person."""
    reports = stage.data.reports
    return "\n\n".join(f"{stage.name} data: {name}\n{report}" for name, report in reports.items())


def save_reports(stage: Stage) -> None:
    """Write data_report.json and .txt, and labels.json, into the stage's folder."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    if stage.data.labels:
        (stage.folder / LABELS).write_text(json.dumps(stage.data.labels) + "\n")
    as_json = {name: json.loads(x.to_json()) for name, x in stage.data.reports.items()}
    (stage.folder / "data_report.json").write_text(json.dumps(as_json, indent=2) + "\n")
    (stage.folder / "data_report.txt").write_text(report_of(stage) + "\n")


def describe(stage: Stage) -> str:
    """One line: the model, the mesh, the data and the shape of a batch."""
    mesh = " x ".join(f"{name} {size}" for name, size in stage.setup.mesh.shape.items())
    size = lambda tree: f"{sum(x.size for x in jax.tree.leaves(tree)):,}"
    parameters = f"{size(stage.setup.abstract_params)} parameters"
    if stage.lora is not None:
        parameters += f" under adapters of {size(stage.lora.abstract)}"
    shape = stage.shape
    sizes = ", ".join(f"{bucket.rows} x {bucket.length}" for bucket in shape.buckets[:-1])
    smaller = f", the less full ones of {sizes}" if sizes else ""
    return (
        f"{stage.name}: {parameters} on a mesh of {mesh}; {stage.data.train:,} "
        f"examples to train on and {len(stage.data.held_out):,} held out; {stage.steps:,} steps of "
        f"{stage.config.batch_size} examples in at most {shape.micro_batches} micro-batches of "
        f"{shape.rows} rows x {shape.length} tokens, {shape.scored} of them scored at most"
        + smaller
    )


def _load(name: str, setup: Setup, wants: DataRequirements) -> StageData:
    """From the cache of tokens, or made."""
    config, shared, tokenizer = setup.config[name], setup.config, setup.tokenizer
    data, seed = config.data, shared.seed
    if name == "classifier":
        own = {"max_tokens": config.max_tokens}
        load = partial(classified.load, data, tokenizer, **own, seed=seed)
        drawn = bool(data.limit or data.eval_limit)
    else:
        own = {"wants": wants._asdict(), "tokens": dict(shared.tokens)}
        load = partial(stage_data.load, data, shared.tokens, tokenizer, wants=wants, seed=seed)
        drawn = stage_data.EMBEDDED in (data.source, data.eval_source)
    if drawn:
        own["seed"] = seed
    key = partial(token_cache.key_of, data, tokenizer, own)
    return token_cache.cached(shared.token_cache or setup.workdir / token_cache.FOLDER, key, load)


def _method(name: str, config: ConfigDict) -> tuple[Objective, dict, DataRequirements]:
    """What a stage minimises, the numbers that are traced in it, and the data that it wants."""
    if name == "sft":
        return sft.objective(), {}, DataRequirements("best")
    if name == "classifier":
        return classifier.objective(config.first_token), {}, DataRequirements()
    if name == "reward":
        numbers = {key: config[key] for key in ("margin_scale", "centring")}
        wants = DataRequirements(
            scores=config.margin_scale > 0, ties=config.loss == "plackett_luce_scores"
        )
        return reward.objective(config.loss), numbers, wants
    options = loss_options(config)
    return preference.objective(config.loss, options), options, _wants(config.loss)


def _hyper(name: str, config: ConfigDict) -> Hyper:
    """The numbers that are traced in the stage's step."""
    return preference.hyper(_method(name, config)[1] | {"learning_rate": config.learning_rate})


def _forward(setup: Setup, objective: Objective) -> Forward:
    """The forward pass to train with."""
    if setup.model.config.scalar_head:
        labelled = setup.model.config.labels
        return (forwards.classifier if labelled else reward_model)(setup.model)
    given = {"statistics": objective.statistics, "max_logits": setup.max_logits}
    return language_model(setup.model, **given)


def _score(setup: Setup, forward: Forward) -> Callable:
    """What scores whole batches."""
    if setup.model.config.scalar_head:
        return build_outputs(forward)
    return build_score(setup.model, max_logits=setup.max_logits)


def _scoring(score: Callable) -> Callable:
    """`score` jitted: one program for rows with and without the reference's log-probs."""
    program = jax.jit(score)

    def run(params, rows: Rows, reference_params=None):
        return program(params, rows._replace(reference=None), reference_params)

    return run


def _wants(loss: str) -> DataRequirements:
    """The data that a preference loss learns from."""
    wanted = preference.loss_requirements(loss)
    return DataRequirements(
        "labelled" if wanted.form == "labelled" else "ranked",
        mismatched=wanted.form == "labelled" and "kl" in wanted.inputs,
        scores=bool(wanted.inputs & {"scores", "offset", "probability"}),
        ties=bool(wanted.inputs & {"tie", "ranks"}),
        chosen=wanted.chosen,
    )


def shape_of(stage: Stage, orders: Sequence, *, mesh: Mesh | None = None) -> Shape:
    """The shape that all batches fit into: of training in these orders, and of evaluation.

    Args:
      mesh: of the steps, which decides costs. By default the stage's own; evaluation always runs
        on that, and micro-batches have a multiple of its row shards.

    Raises:
      DataError, ConfigError: see `packing.plan`.
    """
    config, examples = stage.setup.config, stage.data.examples
    training = [[int(i) for i in batch] for order in orders for batch in order]
    best = partial(
        plan,
        examples,
        [*training, *stage.in_order(stage.data.training), *stage.in_order(stage.data.held_out)],
        length=config.row_length or None,
        micro_rows=config.micro_rows or None,
        multiple=sharding.row_shards(stage.setup.mesh),
        score_prompt=stage.score_prompt,
        costs=costs_of(stage.setup._replace(mesh=mesh or stage.setup.mesh), stage.lora),
    )
    with naming("micro_rows"):
        if stage.objective.coupled:  # one micro-batch takes one pass, several take two
            whole = best(max_buckets=1)
            if whole.micro_batches == 1:
                return whole
        return best(max_buckets=config.max_buckets)


def costs_of(setup: Setup, lora: Lora | None = None) -> Costs:
    """What decides how examples are packed for the model, its adapters and the device."""
    return packing_costs(
        setup.model.config,
        setup.abstract_params,
        setup.mesh,
        trained=None if lora is None else lora.abstract,
        remat=setup.config.model.remat,
        dtype=setup.config.model.compute_dtype,
        kernel=setup.model.kernel,
    )


def abstract_rows(stage: Stage) -> Rows:
    """A batch of the stage's shape, of padding, with reference log-probs where they are wanted."""
    rows = empty(stage.shape)
    if stage.objective.needs_reference:
        rows = rows._replace(reference=np.zeros(rows.target.shape, np.float32))
    return rows
