"""Stages that learn from examples in rows: data, shapes and programs that all of them share."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.contents import NamedPath, adapters_hash, data_paths
from dpojax.config.resolved import ResolvedRun
from dpojax.config.rules import DATA_RULES, TRAINING_RULES, apply_rules, check_optimizer
from dpojax.data.examples import Store
from dpojax.data.packing import Shape
from dpojax.data.pipeline import steps_in
from dpojax.data.prompts import EMBEDDED
from dpojax.data.rows import Rows
from dpojax.stages import data as stage_data
from dpojax.stages import token_cache
from dpojax.stages.adapters import StageAdapters, check_lora
from dpojax.stages.batches import Batches, choose_shape
from dpojax.stages.data import NewStore, StageData
from dpojax.stages.kept import check_metrics
from dpojax.stages.reference import NO_REFERENCE, Reference
from dpojax.stages.setup import Setup
from dpojax.stages.stage import POLICY, Stage
from dpojax.stages.vocabulary import require_rows
from dpojax.training.forward import Forward, build_outputs
from dpojax.training.objective import Hyper, Objective
from dpojax.training.preemption import StopSignal
from dpojax.training.step import build_evaluate
from dpojax.watchdog import beat

# (parameters, step, the stage's folder) -> metrics of sampled responses
EvaluateSamples = Callable[[dict, int, storage.Path], dict[str, float]]

PACE_KEYS = ("learning_rate", "warmup_steps", "warmup_ratio", "steps", "epochs")


class Programs(NamedTuple):
    """The functions of a stage that are compiled at first use.

    Attributes:
      objective: what the stage minimises.
      forward: the forward pass to train with.
      score: jitted (params, rows on the mesh, reference=None) -> outputs of whole batches.
      metrics: jitted (outputs, rows on the mesh, hyper) -> sums and weights.
    """

    objective: Objective
    forward: Forward
    score: Callable[..., Any]
    metrics: Callable[[Any, Rows, Hyper], dict]


@dataclasses.dataclass(frozen=True)
class ExampleStage(Stage):
    """A stage whose train step reads rows of examples; `TrainedStage` trains it.

    Attributes:
      setup: of the run; its model has the head that the stage trains.
      programs: compiled at first use.
      adapters: None where all weights are trained.
      batches: None before `prepare`, which reads the data.
    """

    setup: Setup
    programs: Programs
    adapters: StageAdapters | None = None
    batches: Batches | None = None

    # What a stage defines.

    score_prompt = False  # whether the prompt's tokens are trained on
    starts_at_reference = False  # whether the policy is its reference at step 0

    @classmethod
    def resolve(cls, config: ConfigDict) -> Any:
        stage, name = config[cls.name], cls.name
        apply_rules((*TRAINING_RULES, *DATA_RULES), stage, f"{name}.")
        check_optimizer(stage, name)
        if "lora" in stage:
            check_lora(stage, name)
        return None

    @classmethod
    def paths(cls, config: ConfigDict) -> list[NamedPath]:
        paths, name = data_paths(config, cls.name), cls.name
        if "lora" in config[name]:
            adapters = config[name].lora.adapters
            paths.append(NamedPath(f"{name}.lora.adapters", adapters, adapters_hash))
        return paths

    @classmethod
    def traced_keys(cls, run: ResolvedRun) -> frozenset[str]:
        return _traced_keys(cls, run)

    @classmethod
    def traced_options(cls, run: ResolvedRun) -> Sequence[str]:
        """Keys of the stage's objective whose numbers are traced."""
        del run
        return ()

    @classmethod
    @abc.abstractmethod
    def build_programs(cls, setup: Setup) -> Programs:
        """The stage's programs for the setup's model, which has the stage's head."""

    def options(self) -> dict[str, Any]:
        """The objective's numbers that are traced in the step, besides the learning rate."""
        return {}

    def open_reference(
        self, params: dict | None, base: dict | None, stop: StopSignal, writing: ExitStack
    ) -> Reference:
        """What gives rows their reference log-probs; this stage needs none.

        Args:
          params: that the stage starts from; None where it resumes.
          base: of adapters, or None.
          stop: ends the scoring of the data.
          writing: once it is closed, the reference's weights are complete on disk.
        """
        return NO_REFERENCE

    def open_samples(self, base: dict | None) -> EvaluateSamples | None:
        """Metrics of sampled responses at evaluations; None where there are none."""
        return None

    def kept_weights(self, start: Callable[[], dict]) -> dict[storage.Path, Callable[[], dict]]:
        if self.adapters is None:
            return {}
        return {self.adapters.base_folder: lambda: self.adapters.as_base(start())}

    def live_reference_shapes(self) -> dict | None:
        """Shapes of the weights of a reference that is scored in every step."""
        return None

    def sampled_reference_shapes(self) -> dict | None:
        """Shapes of the weights of a reference that samples are compared with."""
        return None

    # From here on every such stage is alike.

    def prepare(self) -> Self:
        loaded = self.load()
        return loaded.with_shape(loaded.shape_for([loaded.batches]))

    def load(self) -> Self:
        """The stage with its data, whose shape is still to be chosen.

        Raises:
          ConfigError: no evaluation will have the metric of `keep_best` or of `stop_at`.
          DataError: see `stages.data.load`.
        """
        check_metrics(self.name, self.setup.config, self.metric_names, self.sample_metric_names)
        return self.with_data(_load_data(self))

    def with_data(self, data: StageData) -> Self:
        """The same stage with examples, whose shape is still to be chosen."""
        config = self.config
        steps = config.steps or steps_in(
            data.epoch, batch_size=config.batch_size, epochs=config.epochs
        )
        seed = self.setup.config.seed
        batches = Batches(data, config.batch_size, steps, seed, score_prompt=self.score_prompt)
        return dataclasses.replace(self, batches=batches)

    @abc.abstractmethod
    def metric_names(self) -> list[str]:
        """The names of an evaluation's metrics, without those of samples."""

    def sample_metric_names(self) -> list[str]:
        """The names of what `open_samples` measures."""
        return []

    def read_data(self, new_store: NewStore = Store) -> StageData:
        """Read and tokenise the stage's data; the cache of tokens is not looked at.

        Args:
          new_store: makes what the examples are put into, see `stages.data.load`.
        """
        beat("data are read")
        config = self.setup.config
        return stage_data.load(
            self.config.data,
            config.tokens,
            self.setup.tokenizer,
            requirements=self.requirements,
            seed=config.seed,
            num_proc=config.num_proc,
            new_store=new_store,
        )

    def data_settings(self) -> dict[str, Any]:
        """What the examples depend on besides data and tokenizer."""
        tokens = dict(self.setup.config.tokens)
        return {"requirements": self.requirements._asdict(), "tokens": tokens}

    @property
    def draws_records(self) -> bool:
        """Whether the run's seed decides which records there are."""
        return EMBEDDED in (self.config.data.source, self.config.data.eval_source)

    def policy_params(self, base: dict | None, trained: dict) -> dict:
        """The whole model's parameters, from those that are trained and the adapters' base."""
        return trained if base is None else self.adapters.merge(base, trained)

    @cached_property
    def hyper(self) -> Hyper:
        """The numbers that are traced in the stage's step, float32."""
        numbers = self.options() | {"learning_rate": self.config.learning_rate}
        return {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()}

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole stage."""
        return self.batches.steps

    def with_shape(self, shape: Shape) -> Self:
        return dataclasses.replace(self, batches=self.batches.with_shape(shape))

    def batches_with_seed(self, seed: int) -> Batches:
        """The same examples in the order of another seed."""
        return dataclasses.replace(self.batches, seed=seed)

    def shape_for(self, every: Sequence[Batches], *, mesh: Mesh | None = None) -> Shape:
        """See `choose_shape`."""
        return choose_shape(
            self.setup,
            every,
            adapters=None if self.adapters is None else self.adapters.abstract,
            coupled=self.programs.objective.coupled,
            mesh=mesh,
        )

    def stepping_on(self, mesh: Mesh) -> Self:
        """The same stage for steps on another mesh; it still evaluates on its own."""
        setup = self.setup._replace(mesh=mesh)
        programs = self.programs._replace(forward=self.build_programs(setup).forward)
        return dataclasses.replace(self, setup=setup, programs=programs)

    def for_member(self, run: ResolvedRun) -> Self:
        """The same stage, data and programs included, of a run with other traced numbers."""
        adapters, name = self.adapters, self.name
        if adapters is not None:
            base_folder = run.workdir / name / adapters.base_folder.name
            adapters = adapters._replace(base_folder=base_folder)
        setup = self.setup._replace(run=run)
        member = dataclasses.replace(self, setup=setup, adapters=adapters)
        return member.with_data(self.batches.data)


def make_programs(objective: Objective, forward: Forward, score: Callable) -> Programs:
    """Jit what a stage computes besides its step.

    Scoring is one program for rows with and without the reference's log-probs.
    """
    jitted = jax.jit(score)

    def score_rows(params: dict, rows: Rows, reference: dict | None = None) -> Any:
        return jitted(params, rows._replace(reference=None), reference=reference)

    return Programs(objective, forward, score_rows, jax.jit(build_evaluate(objective)))


def scores_of(forward: Forward) -> Callable[..., Any]:
    """`build_outputs(forward)` with the signature of `build_score`; there is no reference."""
    outputs = build_outputs(forward)

    def score(params: dict, rows: Rows, *, reference: dict | None = None) -> Any:
        del reference
        return outputs(params, rows)

    return score


def _traced_keys(stage_class: type[ExampleStage], run: ResolvedRun) -> frozenset[str]:
    """See `Stage.traced_keys`.

    The seed is among them where it only orders the data. Otherwise weights, adapters or the
    embedded task's records are drawn from it, and members would not share them.
    """
    config, name = run.config, stage_class.name
    stage = config[name]
    if stage.keep_best:  # the best checkpoint of each member would have to be kept apart
        return frozenset()
    keys = {f"{name}.{key}" for key in (*PACE_KEYS, *stage_class.traced_options(run))}
    draws_weights = len(config.stages) > 1 or not config.model.path or stage_class.makes != POLICY
    draws_records = EMBEDDED in (stage.data.source, stage.data.eval_source)
    draws_adapters = "lora" in stage and stage.lora.rank > 0
    if not (draws_weights or draws_records or draws_adapters):
        keys.add("seed")
    return frozenset(keys)


def _load_data(stage: ExampleStage) -> StageData:
    """The stage's examples from the cache of tokens, or read; the model has a row for every id."""
    config, settings = stage.setup.config, stage.data_settings()
    if stage.draws_records:
        settings["seed"] = config.seed
    key = partial(token_cache.key_of, stage.config.data, stage.setup.tokenizer, settings)
    folder = stage.setup.workdir / token_cache.FOLDER
    if config.token_cache:
        folder = storage.as_path(config.token_cache)
    data = token_cache.cached(folder, key, stage.read_data)
    require_rows(data.examples, stage.setup.model.config.vocab_size, stage.setup.tokenizer)
    return data
