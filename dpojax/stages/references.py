"""A stage's reference policy: kept once per run, read as cached log-probs or as live weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dpojax import display, sharding, storage
from dpojax.data.rows import Rows
from dpojax.logprobs import TokenStatistics
from dpojax.stages.example_stage import ExampleStage
from dpojax.stages.kept_weights import FINGERPRINT
from dpojax.stages.reference import Reference
from dpojax.stages.setup import load_weights
from dpojax.stages.tokenizers import vocabulary_hash
from dpojax.training import checkpoints, reference
from dpojax.training.preemption import Preempted, StopSignal
from dpojax.training.reference import TOLERANCE, ReferenceMismatch, Store
from dpojax.watchdog import beat

EXACT = 1e-5  # nats: one program on one batch twice


class Weights(NamedTuple):
    """A reference's parameters, and their hash where saving them has made it."""

    params: dict
    fingerprint: str = ""


def open_reference(
    stage: ExampleStage, weights: Weights, start: dict | None, base: dict | None, stop: StopSignal
) -> Reference:
    """The reference of a stage, cached or live as the config says.

    Cached log-probs are looked up under their hash, or computed. Those of an earlier run are
    checked against a recomputation of two batches.

    Args:
      weights: of the reference, see `reference_weights`.
      start: the parameters that the stage starts from; None where it resumes.
      base: of adapters; None where all weights are trained.

    Raises:
      ReferenceMismatch: the check fails.
      Preempted: `stop` was asked for while log-probs were computed.
    """
    compute_dtype = stage.setup.config.model.compute_dtype
    is_base = weights.params is base
    if stage.config.reference.kind == "live":
        return _live(stage, weights.params, compute_dtype, is_base)
    store, first_scores = _store(stage, weights, stop)
    if first_scores is None:
        return Reference(attach=store.attach, tolerance=_tolerance(stage, compute_dtype, is_base))
    # Adapters change the policy, so the scores of the base are not those of the policy.
    first_scores = first_scores if weights.params is start else None
    return Reference(
        attach=store.attach, tolerance=TOLERANCE[compute_dtype], first_scores=first_scores
    )


def reference_weights(
    stage: ExampleStage, start: dict | None, base: dict | None, writing: ExitStack | None = None
) -> Weights:
    """The reference's weights: the adapters' base, where the config names no other model.

    Otherwise they are read back, or saved for the first time. They are saved also for a loss
    without a reference: the summary compares the policy with them.

    Args:
      start: the parameters that the stage starts from; None where it resumes.
      base: of adapters, or None. It is not copied.
      writing: once it is closed, the weights are complete on disk. None: when this returns.

    Raises:
      CheckpointError: the workdir holds the weights of another reference.
    """
    path = stage.config.reference.path
    if base is not None and not path:
        return Weights(base)
    if start is None:
        return Weights(saved_weights(stage))
    params = load_weights(stage.setup, path) if path else start
    fingerprint = reference.fingerprint(params)
    with ExitStack() as here:
        saving = checkpoints.saving_tree(weights_folder(stage), params, {FINGERPRINT: fingerprint})
        (here if writing is None else writing).enter_context(saving)
    return Weights(params, fingerprint)


def policy_starts_at_reference(stage: ExampleStage) -> bool:
    """Whether the policy at step 0 is the model that it is compared with at the end."""
    return not (stage.config.reference.path or stage.config.lora.adapters)


def weights_folder(stage: ExampleStage) -> storage.Path:
    """Where the run keeps the reference's weights."""
    return stage.folder / "reference"


def saved_weights(stage: ExampleStage) -> dict:
    """The reference's float32 parameters, read back."""
    return checkpoints.load_tree(weights_folder(stage), stage.setup.abstract_params)


def scores_at_start(stage: ExampleStage, params: dict, used: Reference) -> TokenStatistics:
    """What the policy at step 0 scores on the first held-out batch."""
    if used.first_scores is not None:
        return used.first_scores
    return stage.programs.score(params, _first_rows(stage, used), reference=used.params)


def check_identity(
    stage: ExampleStage, tokens: TokenStatistics, used: Reference
) -> dict[str, float]:
    """Check at step 0 that the policy scores as the reference does, and that the loss fits.

    Args:
      tokens: of `scores_at_start`.

    Returns:
      drift/reference_identity: the largest difference of a token's log-prob, nats;
      loss: of the first held-out batch, and loss/at_reference, its closed form, for the losses
        that have one.

    Raises:
      ReferenceMismatch: a log-prob differs by more than `used.tolerance`, or the objective of the
        reference's own log-probs is not its closed form.
    """
    rows, metrics = _first_rows(stage, used), stage.programs.metrics
    drift = float(_largest_drift(tokens.logprob, rows))
    loss = metrics(tokens, rows, stage.hyper)["loss"].value
    as_reference = tokens._replace(logprob=rows.reference)
    loss_of_reference = metrics(as_reference, rows, stage.hyper)["loss"].value
    closed_form = stage.programs.objective.at_reference
    expected = loss_of_reference
    if closed_form is not None:
        expected = float(jax.jit(closed_form)(stage.hyper))
    fits = abs(loss_of_reference - expected) <= EXACT * max(1.0, expected)
    if not (drift <= used.tolerance and fits):
        raise ReferenceMismatch(
            f"{stage.name}: at step 0 the policy is not the reference: a token's log-prob differs "
            f"by {drift:.3g} nats (allowed {used.tolerance}), the loss is {loss:.6f}, that of the "
            f"reference itself {loss_of_reference:.6f} (expected {expected:.6f}). Another dtype, "
            "other weights or randomness on one side do this"
        )
    values = {"drift/reference_identity": drift, "loss": loss}
    return values if closed_form is None else values | {"loss/at_reference": expected}


def _live(stage: ExampleStage, params: dict, compute_dtype: str, is_base: bool) -> Reference:
    tolerance, dtype = _tolerance(stage, compute_dtype, is_base), stage.config.reference.dtype
    if not is_base:
        params = jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params)
        tolerance = EXACT if dtype == "float32" else TOLERANCE[dtype]
    reads_weights = stage.programs.objective.reads_live_reference

    def score_on_mesh(rows: Rows) -> Rows:
        return rows._replace(reference=stage.programs.score(params, rows).logprob)

    return Reference(
        score_on_mesh=score_on_mesh,
        params=params if reads_weights else None,
        tolerance=tolerance,
    )


def _tolerance(stage: ExampleStage, compute_dtype: str, is_base: bool) -> float:
    """Nats between the policy at step 0 and its reference, which the same program scores."""
    if is_base and stage.config.lora.base_dtype != "float32":
        return TOLERANCE[compute_dtype]  # the merged policy's equal weights are float32
    return EXACT


def _first_rows(stage: ExampleStage, used: Reference) -> Rows:
    return used.to_device(next(stage.batches.held_out(used.attach)), stage.setup.mesh)


@jax.jit
def _largest_drift(logprob: Array, rows: Rows) -> Array:
    """How far a scored token's log-prob [M, R, S] is from the reference's, at most; nats."""
    return jnp.max(jnp.where(rows.response >= 0, jnp.abs(logprob - rows.reference), 0))


def _store(
    stage: ExampleStage, weights: Weights, stop: StopSignal
) -> tuple[Store, TokenStatistics | None]:
    """The cached log-probs of all examples.

    Where an earlier run had computed them, also what the weights score now on the first held-out
    batch.
    """
    setup, batches = stage.setup, stage.batches
    dtype, examples = setup.config.model.compute_dtype, batches.data.examples

    def score(rows: Rows) -> TokenStatistics:
        return stage.programs.score(weights.params, sharding.put_rows(rows, setup.mesh))

    key = reference.key_of(
        weights.fingerprint or reference.fingerprint(weights.params),
        examples,
        model=repr(setup.model.config),
        dtype=dtype,
        tokenizer=vocabulary_hash(setup.tokenizer),
    )
    folder = stage.folder / "reference_logprobs"
    if stage.config.reference.cache:
        folder = storage.as_path(stage.config.reference.cache)
    store, was_cached = reference.cached(
        folder,
        key,
        examples,
        lambda: reference.compute(
            lambda rows: score(rows).logprob, examples, _all_batches(stage, stop)
        ),
    )
    if not was_cached:
        return store, None
    for rows in (next(batches.rows(batches.data.training)), next(batches.held_out())):
        now = score(rows)
        reference.verify(store, now.logprob, rows, examples, dtype)
    return store, now


def _all_batches(stage: ExampleStage, stop: StopSignal) -> Iterator[Rows]:
    """Every example once. Held-out batches are those of evaluation, so that step 0 finds zeros."""
    batches = stage.batches
    data = batches.data
    count = len(batches.split(data.training)) + len(batches.held_out_batches)
    beat("the reference's log-probs are computed")
    with display.bar("reference log-probs", count, unit="batches") as bar:
        for rows in itertools.chain(batches.rows(data.training), batches.held_out()):
            if stop.agreed():
                raise Preempted(f"{stage.name}: stopped while the reference was computed")
            yield rows
            bar.update()
