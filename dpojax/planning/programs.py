"""The programs of one stage of a config, lowered for devices that need not be there."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.config.contents import draws_samples
from dpojax.config.errors import ConfigError
from dpojax.data.packing import bucket_of
from dpojax.data.pipeline import steps_in
from dpojax.data.rows import Rows, buckets_of, needs_of
from dpojax.planning.chips import Topology
from dpojax.planning.expected import HELD_OUT, expected_data
from dpojax.planning.roofline import Loop
from dpojax.plans.dry_run import setup_from_shapes
from dpojax.sampling import Prompts, build_sampler
from dpojax.sampling.sampler import FIRST_CACHE_TOKENS
from dpojax.sharding import longest_sweep_axis
from dpojax.stages import registry, train
from dpojax.stages.example_stage import ExampleStage
from dpojax.stages.setup import Setup, build_model
from dpojax.training.memory import Footprint
from dpojax.training.state import make_optimizer
from dpojax.training.throughput import model_flops, product_weights
from dpojax.training.vectorised_step import (
    MemberHyperparameters,
    MemberStates,
    abstract_member_states,
    build_vectorised_step,
)

SAMPLED_BATCHES = 16  # that stand for all batches of a run


class Work(NamedTuple):
    """What one run of a program does: FLOPs of the model alone, and tokens of the data."""

    model_flops: float
    tokens: float


class PlannedProgram(NamedTuple):
    """One program of a stage.

    Attributes:
      name: such as "step".
      lower: lowers it; devices need not be there.
      runs: how often it runs in the whole stage.
      work: of one run.
      loops: what its loops over data do.
      row_length: columns of a row.
      footprint: predicted memory; None where nothing predicts it.
      member_devices: of each place of a sweep axis; 0 for programs of a single run.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    runs: float
    work: Work
    loops: tuple[Loop, ...] = ()
    row_length: int = 0
    footprint: Footprint | None = None
    member_devices: int = 0


class PlannedStage(NamedTuple):
    """A stage with its shape, which has neither weights nor devices.

    steps: optimiser steps of the whole stage. rows: some of its batches, NumPy.
    """

    stage: ExampleStage
    steps: int
    rows: list[Rows]

    @property
    def batch(self) -> str:
        """The arrays of a batch, in words."""
        shape = self.stage.batches.shape
        return (
            f"{self.stage.config.batch_size} examples, in up to {shape.micro_batches} "
            f"micro-batches of {shape.rows} rows of {shape.length} tokens"
        )


def can_be_planned(name: str) -> bool:
    """Whether `plan_stage` knows a stage of this name: one that learns from examples."""
    return issubclass(registry.STAGES[name], ExampleStage)


def plan_stage(config: ConfigDict, name: str, topology: Topology) -> PlannedStage:
    """Open a stage of a config on a topology, and choose the shape of batches of expected data.

    Raises:
      ConfigError: a run that could not start; or config.plan does not say what data to expect.
    """
    setup = setup_from_shapes(config, name, topology.devices)
    stage = registry.open_stage(setup, name)
    if not isinstance(stage, ExampleStage):
        raise ConfigError(
            f"{name}: no plan can be made of it; leave it out, as in "
            "--config.stages=\"('sft','preference')\""
        )
    data = expected_data(setup.config, responses=1 if stage.requirements.form == "best" else 2)
    stage = stage.with_data(data)
    steps = stage.config.steps or steps_in(
        setup.config.plan.examples, batch_size=stage.config.batch_size, epochs=stage.config.epochs
    )
    stage = stage.with_shape(stage.shape_for([stage.batches]))
    rows = list(itertools.islice(iter(stage.batches.training()), SAMPLED_BATCHES))
    return PlannedStage(stage, steps, rows)


def programs(planned: PlannedStage, *, members: int = 0) -> list[PlannedProgram]:
    """The step, the scoring of held-out data and of a reference, and the sampler of evaluations.

    Args:
      planned: the stage.
      members: of a sweep that trains together; 0 or 1 for a single run.
    """
    stage, config = planned.stage, planned.stage.setup.config
    shape, steps = stage.batches.shape, planned.steps
    step = PlannedProgram(
        "step",
        lambda: train.lower_step(stage, shape),
        steps,
        _work(planned, backward=True),
        _loops(planned),
        shape.length,
        train.footprint(stage),
    )
    evaluations = steps / max(1, config.evaluate_every or steps) + 1
    batches = math.ceil((stage.config.data.eval_limit or HELD_OUT) / stage.config.batch_size)
    score = step._replace(
        name="evaluation",
        lower=lambda: lower_score(stage),
        runs=evaluations * batches,
        work=_work(planned, backward=False),
        footprint=None,
    )
    result = [step, score]
    if members > 1:
        result.insert(1, _members_step(stage, step, members))
    if stage.programs.objective.needs_reference:
        # A cached reference scores each example once, a live one each batch.
        live = stage.live_reference_shapes() is not None
        runs = steps if live else min(steps, config.plan.examples / stage.config.batch_size)
        result.append(score._replace(name="reference", runs=runs))
    if draws_samples(config):
        result.append(_sampler(stage, evaluations))
    return result


def _members_step(stage: ExampleStage, step: PlannedProgram, members: int) -> PlannedProgram:
    work = step.work._replace(model_flops=members * step.work.model_flops)
    axis = longest_sweep_axis(stage.setup.mesh.shape["data"], members)
    devices = stage.setup.mesh.size // axis
    share = (
        f"each on {devices}" if axis >= members else f"{-(-members // axis)} of them on {devices}"
    )
    swept = sweep_of(stage, members, axis)
    return step._replace(
        name=f"step of {members} members, {share} device(s)",
        lower=swept.lower,
        work=work,
        footprint=swept.footprint,
        member_devices=devices,
    )


def lower_score(stage: ExampleStage) -> jax.stages.Lowered:
    """The scoring of a batch: of held-out data, and of a reference that is cached."""
    with jax.set_mesh(stage.setup.mesh):
        return jax.jit(stage.programs.score).lower(stage.setup.abstract_params, _spread_rows(stage))


def _spread_rows(stage: ExampleStage) -> Rows:
    """Shapes of a batch, whose rows lie spread over the stage's mesh."""
    spread = NamedSharding(stage.setup.mesh, PartitionSpec(None, sharding.ROWS))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread),
        train.abstract_rows(stage, stage.batches.shape),
    )


class PlannedSweep(NamedTuple):
    """Members that train together on a mesh with a sweep axis.

    stage: on that mesh. states: shapes of all members' states.
    """

    stage: ExampleStage
    states: MemberStates

    @property
    def members(self) -> int:
        return len(self.states.alive)

    @property
    def footprint(self) -> Footprint:
        """Predicted memory of a device."""
        each = self.members // self.stage.setup.mesh.shape[sharding.SWEEP]
        return train.footprint(self.stage, states=self.states, members=each)

    def lower(self) -> jax.stages.Lowered:
        """The step of all members."""
        stage, mesh = self.stage, self.stage.setup.mesh
        optimizer = make_optimizer(stage.config.optimizer)
        step = build_vectorised_step(train.make_step(stage, optimizer), self.states)
        by_member = NamedSharding(mesh, PartitionSpec(sharding.SWEEP))

        def stacked(dtype) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((self.members,), dtype, sharding=by_member)

        hyperparameters = MemberHyperparameters(
            hyper={name: stacked(jnp.float32) for name in stage.hyper},
            warmup_steps=stacked(jnp.int32),
            steps=stacked(jnp.int32),
            seed=stacked(jnp.int32),
        )
        frozen = train.abstract_frozen_weights(stage)
        with jax.set_mesh(mesh):
            return step.lower(self.states, _spread_rows(stage), hyperparameters, frozen)


def sweep_of(stage: ExampleStage, members: int, axis: int) -> PlannedSweep:
    """Members of a stage's sweep, on a sweep axis of so many places.

    Where they do not fill the axis evenly, spare members are computed too, as in a sweep.
    """
    mesh = sharding.sweep_mesh(stage.setup.mesh, axis)
    members = axis * -(-members // axis)
    optimizer = make_optimizer(stage.config.optimizer)
    states = abstract_member_states(train.abstract_train_state(stage, optimizer), members, mesh)
    # Members run under `vmap`, for which some attention kernels are not made.
    setup = stage.setup._replace(vmapped=True)
    model = build_model(setup.config.model, setup.model.config, setup.mesh, vmapped=True)
    stage = dataclasses.replace(stage, setup=setup._replace(model=model))
    return PlannedSweep(stage.stepping_on(mesh), states)


def _loops(planned: PlannedStage) -> tuple[Loop, ...]:
    """How many micro-batches a batch has of each bucket, on average."""
    counts: list[np.ndarray] = []
    for rows in planned.rows:
        buckets, needs = buckets_of(rows), needs_of(rows)
        used = bucket_of(needs[needs[:, 0] > 0], buckets)
        counts.append(np.bincount(used, minlength=len(buckets)))
    lengths = [bucket.length for bucket in buckets_of(planned.rows[0])]
    return tuple(Loop(float(n), length) for n, length in zip(np.mean(counts, axis=0), lengths))


def _work(planned: PlannedStage, *, backward: bool) -> Work:
    body, head = product_weights(planned.stage.setup.abstract_params)
    tokens = np.mean([(rows.segment > 0).sum() for rows in planned.rows])
    scored = np.mean([(rows.response >= 0).sum() for rows in planned.rows])
    frozen = planned.stage.adapters is not None
    flops = model_flops(body, head, tokens, scored, backward=backward, frozen=frozen)
    return Work(flops, float(tokens))


def _sampler(stage: ExampleStage, evaluations: float) -> PlannedProgram:
    """The sampler of evaluations: `samples.count` prompts, `samples.per_prompt` responses each."""
    samples, setup = stage.setup.config.samples, stage.setup
    prompts, each, new = samples.count, samples.per_prompt, samples.max_new_tokens
    length = max(1, int(setup.config.plan.prompt))
    body, head = product_weights(setup.abstract_params)
    tokens = prompts * (length + each * new)
    flops = model_flops(body, head, tokens, prompts * each * new, backward=False)
    return PlannedProgram(
        "sampler",
        lambda: lower_sampler(setup, prompts, length, new, each),
        evaluations,
        Work(flops, tokens),
        tuple(Loop(n, length + new) for n in _decoding_loops(new)),
        length,
    )


def lower_sampler(
    setup: Setup, prompts: int, length: int, new_tokens: int, samples: int
) -> jax.stages.Lowered:
    """The sampler of a policy, for so many prompts of a length in tokens."""
    sampler = build_sampler(setup.model, max_new_tokens=new_tokens, stop=())
    spread = NamedSharding(
        setup.mesh, sharding.fit_spec(PartitionSpec(sharding.ROWS), (prompts,), setup.mesh)
    )

    def ids(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=spread)

    def draw(params: dict, prompts: Prompts):
        return sampler(params, prompts, seed=0, samples=samples)

    with jax.set_mesh(setup.mesh):
        return jax.jit(draw).lower(
            setup.abstract_params, Prompts(ids(prompts, length), ids(prompts), ids(prompts))
        )


def _decoding_loops(new_tokens: int) -> list[int]:
    """Steps of each loop of decoding: the cache doubles from one to the next."""
    loops, size, done = [], FIRST_CACHE_TOKENS, 0
    while done < new_tokens:
        size = min(size, new_tokens)
        loops.append(size - done)
        done, size = size, 2 * size
    return loops
