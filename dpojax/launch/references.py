"""A stage's reference policy: kept once per run, cached as log-probs or live on the mesh."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpojax import sharding
from dpojax.data.rows import Rows
from dpojax.launch.setup import load_weights
from dpojax.launch.stages import Stage
from dpojax.training import checkpoints, reference
from dpojax.training.reference import TOLERANCE, ReferenceMismatch, Store


class Reference(NamedTuple):
    """How rows come to their reference log-probs.

    attach: on NumPy rows, from the cache; None for a live reference.
    on_mesh: on rows that lie on the mesh, by computing them; None for a cached one.
    """

    attach: Callable[[Rows], Rows] | None = None
    on_mesh: Callable[[Rows], Rows] | None = None

    def to_device(self, rows: Rows, mesh) -> Rows:
        """NumPy rows (attached already) on the mesh, with reference log-probs."""
        placed = sharding.put_rows(rows, mesh)
        return placed if self.on_mesh is None else self.on_mesh(placed)


def folder_of(stage: Stage) -> str:
    """Where the run keeps the reference's weights."""
    return str(stage.folder / "reference")


def open_reference(stage: Stage, start: dict | None) -> Reference:
    """The reference of a stage that starts from `start`, or resumes (`start` is None).

    A new run saves the reference's weights once. Cached log-probs are looked up under their hash
    or computed, and in either case checked against a recomputation of one batch.

    Raises:
      ReferenceMismatch: the check fails.
    """
    params = _weights(stage, start)
    config = stage.config.reference
    if config.kind == "live":
        kept = jax.jit(lambda p: jax.tree.map(lambda x: x.astype(config.dtype), p))(params)
        return Reference(
            on_mesh=lambda rows: rows._replace(reference=stage.score(kept, rows).logprob)
        )
    store = _store(stage, params)
    return Reference(attach=store.attach)


def check_identity(stage: Stage, params: dict, used: Reference) -> dict[str, float]:
    """Step 0: the policy scores as the reference does, and the loss has its value there.

    Returns:
      drift/reference_identity: the largest difference of a token's log-prob, nats;
      loss and loss/at_reference: of the first held-out batch, and in closed form.

    Raises:
      ReferenceMismatch: either differs by more than the compute dtype explains.
    """
    rows = used.to_device(next(stage.held_out(used.attach)), stage.setup.mesh)
    scored = stage.score(params, rows).logprob
    drift = float(jnp.max(jnp.where(rows.response >= 0, jnp.abs(scored - rows.reference), 0)))
    loss = stage.evaluate(params, iter([rows]))["loss"]
    expected = float(stage.objective.at_reference(stage.hyper))
    tolerance = _tolerance(stage)
    if not (drift <= tolerance and abs(loss - expected) <= 10 * tolerance * max(1.0, expected)):
        raise ReferenceMismatch(
            f"{stage.name}: at step 0 the policy is not the reference: a token's log-prob differs "
            f"by {drift:.3g} nats (allowed {tolerance}), the loss is {loss:.6f} and not "
            f"{expected:.6f}. Dropout, another dtype or other weights on one side do this"
        )
    return {"drift/reference_identity": drift, "loss": loss, "loss/at_reference": expected}


def _weights(stage: Stage, start: dict | None) -> dict:
    """The reference's float32 weights, read back or saved for the first time."""
    folder = folder_of(stage)
    if start is None:
        return checkpoints.load_tree(folder, stage.setup.abstract_params)
    path = stage.config.reference.path
    params = load_weights(stage.setup, path) if path else start
    checkpoints.save_tree(folder, params, {"path": path or "the policy at step 0"})
    return params


def _store(stage: Stage, params: dict) -> Store:
    config, setup = stage.config.reference, stage.setup
    dtype = setup.config.model.compute_dtype
    examples = stage.data.examples

    def score(rows: Rows):
        return stage.score(params, sharding.put_rows(rows, setup.mesh)).logprob

    def make() -> Store:  # held-out batches as evaluation has them: at step 0 it finds exact zeros
        batches = itertools.chain(stage.rows(stage.data.training), stage.held_out())
        return reference.compute(score, examples, batches)

    key = reference.key_of(params, examples, dtype=dtype, tokenizer=setup.tokenizer_hash)
    folder = config.cache or stage.folder / "reference_logprobs"
    store, found = reference.cached(folder, key, examples, make)
    if found:
        reference.verify(store, score, next(stage.held_out()), examples, dtype)
    return store


def _tolerance(stage: Stage) -> float:
    dtypes = {stage.setup.config.model.compute_dtype}
    if stage.config.reference.kind == "live":
        dtypes.add(stage.config.reference.dtype)
    return max(TOLERANCE[dtype] for dtype in dtypes)
