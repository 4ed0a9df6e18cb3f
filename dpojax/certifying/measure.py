"""The first steps of a stage, and the numbers by which two ways of computing them are compared."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpojax import sharding
from dpojax.certifying.variants import HIGHEST
from dpojax.data.rows import Rows
from dpojax.stages import train
from dpojax.stages.example_stage import ExampleStage
from dpojax.stages.reference import NO_REFERENCE, Reference
from dpojax.stages.setup import initial_params, load_weights
from dpojax.training.forward import FrozenWeights, adapted
from dpojax.training.state import State, make_optimizer, new_state
from dpojax.training.step import build_gradient
from dpojax.watchdog import beat

KEPT_ENTRIES = 2**16  # of the gradient of each parameter: enough for a share, and small on disk


class Measurement(NamedTuple):
    """What the first N steps of a stage gave; NumPy arrays.

    Attributes:
      losses: [N] of the training batches, each before its step.
      first_batch: [2] the loss of the first training batch before the first and after the last
        step.
      before, after: [tokens] log-probs of the scored tokens of the first held-out batch, nats, by
        example, response and place.
      margins: [examples] by how much the steps have changed log p(best response) - log p(worst
        response) of these examples; of examples with one response, log p of it. Nats.
      gradient: [entries] of the first step's mean loss: up to about `KEPT_ENTRIES` of each
        parameter, from all over it.
      sizes: [parameters] how many of `gradient` belong to each.
      gradient_norm: [] of the whole gradient.
    """

    losses: np.ndarray
    first_batch: np.ndarray
    before: np.ndarray
    after: np.ndarray
    margins: np.ndarray
    gradient: np.ndarray
    sizes: np.ndarray
    gradient_norm: np.ndarray


class _Trainer(NamedTuple):
    """A stage with what its steps read besides their state."""

    stage: ExampleStage
    base: dict | None
    reference: Reference
    frozen: FrozenWeights

    def place(self, rows: Rows) -> Rows:
        return self.reference.to_device(rows, self.stage.setup.mesh)

    def score(self, state: State, rows: Rows):
        """Outputs of the policy on rows that lie on the mesh."""
        policy = self.stage.policy_params(self.base, state.params)
        return self.stage.programs.score(policy, rows, reference=self.reference.params)

    def loss(self, state: State, rows: Rows) -> float:
        """The loss of a batch, without a step."""
        outputs = self.score(state, rows)
        hyper = self.stage.hyper
        if self.stage.programs.objective.baseline is not None:
            hyper = hyper | {"delta": state.baseline.mean}
        return self.stage.programs.metrics(outputs, rows, hyper)["loss"].value


def measure(stage: ExampleStage, steps: int, precision: str = HIGHEST) -> Measurement:
    """Train the first steps of a stage, and measure.

    A stage with a reference model of its own (`reference.path`) has it in the large; in the small
    the reference is the policy that it starts from.

    Args:
      stage: with data and a shape.
      steps: how many.
      precision: of float32 products, `highest` or `default`.
    """
    mesh = stage.setup.mesh
    exact = jax.default_matmul_precision(HIGHEST)
    with jax.set_mesh(mesh), exact if precision == HIGHEST else contextlib.nullcontext():
        return _measure(stage, steps)


def _measure(stage: ExampleStage, steps: int) -> Measurement:
    optimizer = make_optimizer(stage.config.optimizer)
    trainer, state = _start(stage, optimizer)
    batches = list(itertools.islice(stage.batches.training(), steps))
    held_out = next(stage.batches.held_out())
    order = token_order(held_out)
    placed, first = trainer.place(held_out), trainer.place(batches[0])
    before = _tokens(trainer.score(state, placed), order)
    loss_before = trainer.loss(state, first)
    gradient, sizes, norm = _first_gradient(trainer, state, first)
    step = train.jitted_step(stage, optimizer, stage.steps)
    losses = []
    for rows in batches:
        beat("a certificate is made")
        state, report = step(state, trainer.place(rows), stage.hyper, trainer.frozen)
        losses.append(report.metrics["loss"].value)
    after = _tokens(trainer.score(state, placed), order)
    return Measurement(
        losses=np.array(losses),
        first_batch=np.array([loss_before, trainer.loss(state, first)]),
        before=before,
        after=after,
        margins=margins_of(held_out, after) - margins_of(held_out, before),
        gradient=gradient,
        sizes=sizes,
        gradient_norm=np.array(norm),
    )


def _start(stage: ExampleStage, optimizer) -> tuple[_Trainer, State]:
    """The stage's state at step 0, and what the steps read besides it."""
    setup = stage.setup
    params, base = initial_params(setup), None
    if stage.adapters is not None:
        base = stage.adapters.as_base(params)
        trained = stage.adapters.start(setup.config.seed)
    else:
        trained = params
    reference = NO_REFERENCE
    if stage.programs.objective.needs_reference:
        reference = _reference(stage, params if base is None else base)
    state = new_state(
        trained, optimizer, train.abstract_train_state(stage, optimizer), setup.config.seed
    )
    frozen = train.frozen_weights(base, reference)
    return _Trainer(stage, base, reference, frozen), state


def _reference(stage: ExampleStage, start: dict) -> Reference:
    """A reference that is scored with each batch; it has weights of its own under full training."""
    path = stage.config.reference.path
    weights = load_weights(stage.setup, path) if path else start
    if weights is start and stage.adapters is None:
        weights = jax.tree.map(jnp.copy, start)  # the step overwrites the policy's

    def score_on_mesh(rows: Rows) -> Rows:
        return rows._replace(reference=stage.programs.score(weights, rows).logprob)

    reads_weights = stage.programs.objective.reads_live_reference
    return Reference(score_on_mesh=score_on_mesh, params=weights if reads_weights else None)


def _first_gradient(
    trainer: _Trainer, state: State, rows: Rows
) -> tuple[np.ndarray, np.ndarray, float]:
    """Entries of the gradient of a batch's mean loss, how many of each parameter, and its norm."""
    stage = trainer.stage
    forward = stage.programs.forward
    if stage.adapters is not None:
        forward = adapted(forward, stage.adapters.config)
    gradient_of = build_gradient(forward, stage.programs.objective)

    def entries(state, rows, hyper, frozen):
        sums, _ = gradient_of(state, rows, hyper, frozen)
        weight = jnp.maximum(sums.metrics["loss"].weight, 1e-30)
        mean = jax.tree.map(lambda g: g / weight, sums.gradient)
        return [thinned(g) for g in jax.tree.leaves(mean)], optax.tree.norm(mean)

    kept, norm = sharding.to_host(jax.jit(entries)(state, rows, stage.hyper, trainer.frozen))
    flat = [np.ravel(part) for part in kept]
    return np.concatenate(flat), np.array([part.size for part in flat]), float(norm)


def thinned(x: jax.Array) -> jax.Array:
    """About `KEPT_ENTRIES` entries of an array, from all over its last two axes.

    A slice with strides costs no collective. Strides are odd, so that they do not fall on the same
    place in every head.
    """
    if x.size <= KEPT_ENTRIES or x.ndim < 2:
        return x
    stride = math.ceil(math.sqrt(x.size / KEPT_ENTRIES))
    stride += 1 - stride % 2
    return x[..., ::stride, ::stride]


def token_order(rows: Rows) -> tuple[np.ndarray, ...]:
    """Indices of the scored tokens of a batch, by example, response and place.

    The order is the same for rows of every shape.
    """
    m, r, s = np.nonzero(rows.response >= 0)
    example, response = _owners(rows, m, r, s)
    order = np.lexsort((s, response, example))
    return m[order], r[order], s[order]


def margins_of(rows: Rows, logprobs: np.ndarray) -> np.ndarray:
    """log p(best response) - log p(worst response) of each example, nats, [examples].

    Of examples with one response it is log p of that one.

    Args:
      rows: with responses in order, best first.
      logprobs: [tokens] in the order of `token_order`.
    """
    example, response = _owners(rows, *token_order(rows))
    names, row = np.unique(example, return_inverse=True)
    sums = np.zeros((len(names), rows.present.shape[-1]))
    np.add.at(sums, (row, response), logprobs)
    last = np.zeros(len(names), int)
    np.maximum.at(last, row, response)
    worst = np.where(last > 0, sums[np.arange(len(names)), last], 0)
    return sums[:, 0] - worst


def _owners(rows: Rows, m: np.ndarray, r: np.ndarray, s: np.ndarray) -> tuple:
    """The example, and the number of the response, that scored tokens belong to."""
    slot, responses = rows.response[m, r, s], rows.present.shape[-1]
    return rows.example[m, r, slot // responses], slot % responses


def _tokens(outputs, order: tuple[np.ndarray, ...]) -> np.ndarray:
    """The log-probs [tokens] of outputs [M, R, S]."""
    return np.asarray(sharding.to_host(outputs.logprob))[order]
