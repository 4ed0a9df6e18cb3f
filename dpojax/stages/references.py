"""A stage's reference policy: kept once per run, cached as log-probs or live on the mesh."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dpojax import sharding
from dpojax.data.rows import Rows
from dpojax.logprobs import TokenStatistics
from dpojax.stages.setup import load_weights
from dpojax.stages.stage import Stage
from dpojax.training import checkpoints, reference
from dpojax.training.loop import Preempted, StopSignal
from dpojax.training.metrics import progress
from dpojax.training.reference import TOLERANCE, ReferenceMismatch, Store

EXACT = 1e-5  # nats: one program on one batch twice


class Weights(NamedTuple):
    """A reference's parameters, and their hash where keeping them has made it."""

    params: dict
    fingerprint: str = ""


class Reference(NamedTuple):
    """How rows come to their reference log-probs.

    attach: on NumPy rows, from the cache; None for a live reference.
    on_mesh: on rows that lie on the mesh, by computing them; None for a cached one.
    params: the live reference, for an objective that needs more of it than log-probs.
    tolerance: by how many nats a token's log-prob may differ from what the same weights give now.
    first: what the policy that the stage starts from scores on the first held-out batch, where the
      check of the cache has found it out.
    """

    attach: Callable[[Rows], Rows] | None = None
    on_mesh: Callable[[Rows], Rows] | None = None
    params: dict | None = None
    tolerance: float = 0.0
    first: TokenStatistics | None = None

    def to_device(self, rows: Rows, mesh) -> Rows:
        """NumPy rows (attached already) on the mesh, with reference log-probs."""
        placed = sharding.put_rows(rows, mesh)
        return placed if self.on_mesh is None else self.on_mesh(placed)


def folder_of(stage: Stage) -> str:
    """Where the run keeps the reference's weights."""
    return str(stage.folder / "reference")


def open_reference(
    stage: Stage,
    start: dict | None,
    stop: StopSignal,
    base: dict | None = None,
    writing: ExitStack | None = None,
) -> Reference:
    """The reference of a stage that starts from `start`, or resumes (`start` is None).

    A new run saves the reference's weights once; those of adapters are their `base`, which is not
    copied. Cached log-probs are looked up under their hash or computed; those that were found are
    checked against a recomputation of two batches.

    Args:
      writing: when it is left, the weights are complete on disk; None: when this returns.

    Raises:
      ReferenceMismatch: the check fails.
      CheckpointError: the workdir holds the weights of another reference.
      Preempted: `stop` was asked for while log-probs were computed.
    """
    config, compute = stage.config.reference, stage.setup.config.model.compute_dtype
    weights, tolerance = weights_of(stage, start, base, writing), EXACT
    params = weights.params
    if params is base and stage.config.lora.base_dtype != "float32":
        tolerance = TOLERANCE[compute]  # the merged policy's equal weights are float32
    if config.kind == "live":
        if params is not base:
            params = jax.tree.map(lambda x: jnp.array(x, config.dtype, copy=True), params)
            tolerance = EXACT if config.dtype == "float32" else TOLERANCE[config.dtype]
        return Reference(
            on_mesh=lambda rows: rows._replace(reference=stage.score(params, rows).logprob),
            params=params if "kl" in stage.objective.statistics else None,
            tolerance=tolerance,
        )
    store, first = _store(stage, weights, stop)
    if first is None:
        return Reference(attach=store.attach, tolerance=tolerance)
    # Of adapters the policy is another than the base, and is scored for itself.
    first = first if params is start else None
    return Reference(attach=store.attach, tolerance=TOLERANCE[compute], first=first)


def first_scores(stage: Stage, params: dict, used: Reference) -> TokenStatistics:
    """What the policy at step 0 scores on the first held-out batch."""
    if used.first is not None:
        return used.first
    return stage.score(params, _first_rows(stage, used), used.params)


def check_identity(stage: Stage, tokens: TokenStatistics, used: Reference) -> dict[str, float]:
    """Step 0: the policy scores as the reference does, and the loss has its value there.

    Args:
      tokens: see `first_scores`.

    Returns:
      drift/reference_identity: the largest difference of a token's log-prob, nats;
      loss: of the first held-out batch, and loss/at_reference, its closed form, for the losses
        that have one.

    Raises:
      ReferenceMismatch: a log-prob differs by more than `used.tolerance`, or the objective of the
        reference's own log-probs is not its closed form.
    """
    rows = _first_rows(stage, used)
    drift = float(_drift(tokens.logprob, rows))
    loss = stage.metrics(tokens, rows, stage.hyper)["loss"].value
    same = stage.metrics(tokens._replace(logprob=rows.reference), rows, stage.hyper)["loss"].value
    closed = stage.objective.at_reference
    expected = float(same if closed is None else jax.jit(closed)(stage.hyper))
    if not (drift <= used.tolerance and abs(same - expected) <= EXACT * max(1.0, expected)):
        raise ReferenceMismatch(
            f"{stage.name}: at step 0 the policy is not the reference: a token's log-prob differs "
            f"by {drift:.3g} nats (allowed {used.tolerance}), the loss is {loss:.6f}, that of the "
            f"reference itself {same:.6f} (expected {expected:.6f}). Another dtype, other weights "
            "or randomness on one side do this"
        )
    found = {"drift/reference_identity": drift, "loss": loss}
    return found if closed is None else found | {"loss/at_reference": expected}


def _first_rows(stage: Stage, used: Reference) -> Rows:
    return used.to_device(next(stage.held_out(used.attach)), stage.setup.mesh)


@jax.jit
def _drift(logprob: Array, rows: Rows) -> Array:
    """How far a scored token's log-prob is from the reference's, at most; nats."""
    return jnp.max(jnp.where(rows.response >= 0, jnp.abs(logprob - rows.reference), 0))


def weights_of(
    stage: Stage, start: dict | None, base: dict | None, writing: ExitStack | None = None
) -> Weights:
    """The reference's weights: of adapters their base, where the config names no other model."""
    if base is not None and not stage.config.reference.path:
        return Weights(base)
    return keep_weights(stage, start, writing)


def keep_weights(stage: Stage, start: dict | None, writing: ExitStack | None = None) -> Weights:
    """The reference's float32 weights, read back or saved for the first time (see `folder_of`).

    A loss without a reference has them, too: its policy is compared with them at the end.
    """
    folder = folder_of(stage)
    if start is None:
        return Weights(checkpoints.load_tree(folder, stage.setup.abstract_params))
    path = stage.config.reference.path
    params = load_weights(stage.setup, path) if path else start
    fingerprint = reference.fingerprint(params)
    with ExitStack() as here:
        saving = checkpoints.saving_tree(folder, params, {"fingerprint": fingerprint})
        (here if writing is None else writing).enter_context(saving)
    return Weights(params, fingerprint)


def _store(
    stage: Stage, weights: Weights, stop: StopSignal
) -> tuple[Store, TokenStatistics | None]:
    """The cached log-probs; where an earlier run had computed them, also what the weights score now
    on the first held-out batch."""
    config, setup = stage.config.reference, stage.setup
    dtype = setup.config.model.compute_dtype
    examples = stage.data.examples

    def scores(rows: Rows) -> TokenStatistics:
        return stage.score(weights.params, sharding.put_rows(rows, setup.mesh))

    def batches() -> Iterator[Rows]:
        """Held-out ones as evaluation has them: at step 0 it then finds exact zeros."""
        count = len(stage.in_order(stage.data.training)) + len(stage.in_order(stage.data.held_out))
        with progress(count, desc="reference log-probs") as bar:
            for rows in itertools.chain(stage.rows(stage.data.training), stage.held_out()):
                if stop.agreed():
                    raise Preempted(f"{stage.name}: stopped while the reference was computed")
                yield rows
                bar.update()

    key = reference.key_of(
        weights.fingerprint or reference.fingerprint(weights.params),
        examples,
        model=repr(setup.model.config),
        dtype=dtype,
        tokenizer=setup.tokenizer_hash,
    )
    folder = config.cache or stage.folder / "reference_logprobs"
    store, found = reference.cached(
        folder,
        key,
        examples,
        lambda: reference.compute(lambda rows: scores(rows).logprob, examples, batches()),
    )
    if not found:
        return store, None
    for rows in (next(stage.rows(stage.data.training)), next(stage.held_out())):
        now = scores(rows)
        reference.verify(store, now.logprob, rows, examples, dtype)
    return store, now
