"""The step that every objective shares: forward, objective, gradient, update."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from dpojax.data.rows import Rows
from dpojax.logprobs import TokenStatistics
from dpojax.losses import RunningMean
from dpojax.training.forward import NO_FROZEN_WEIGHTS, Forward, FrozenWeights
from dpojax.training.lost_updates import LOST_UPDATES, lost_updates
from dpojax.training.metrics import Metric
from dpojax.training.micro_batches import add_up, map_present, part_like
from dpojax.training.objective import Hyper, Objective, Terms, masked_metric, summed_metrics
from dpojax.training.responses import answer_tokens, best_response_tokens, token_weights
from dpojax.training.state import State, descend


class Report(NamedTuple):
    """What a step reports."""

    metrics: dict[str, Metric]  # sums and weights over the batch, scalars
    finite: Array  # bool: loss and gradient are finite; if not, the state was not changed
    bad: Array  # [M, R, E] bool: the examples whose own loss is not finite


class Sums(NamedTuple):
    """The gradient of a batch's summed loss, and the batch's metrics."""

    gradient: dict
    metrics: dict[str, Metric]
    bad: Array  # [M, R, E]


def build_step(
    forward: Forward,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
) -> Callable[..., tuple[State, Report]]:
    """Build one optimiser step on one batch.

    The gradient is that of sum(loss) / sum(weight) over the whole batch, whatever the number of
    micro-batches; empty ones are not computed. The step is not jitted: the caller adds donation,
    shardings or vmap.

    Args:
      forward: the model's forward pass.
      objective: what is minimised.
      optimizer: has to treat every number of a parameter by itself. The one exception is the
        gradient's global norm, which it is given as `norm` (see `training.state.make_optimizer`).
        Then XLA makes one pass each for a parameter and its moments. Clipping that computes the
        norm itself would undo this.
      schedule: the learning rate's factor at a step.

    Returns:
      (state, rows [M, R, ...], hyper, frozen=NO_FROZEN_WEIGHTS, active=True) -> (new state,
      report). `hyper` holds traced float32 numbers, `learning_rate` among them. The state changes
      only where the bool scalar `active` is True.
    """
    gradient_of = build_gradient(forward, objective)
    optimizer = optax.with_extra_args_support(optimizer)

    def step(
        state: State,
        rows: Rows,
        hyper: Hyper,
        frozen: FrozenWeights = NO_FROZEN_WEIGHTS,
        active: Array | bool = True,
    ) -> tuple[State, Report]:
        sums, baseline = gradient_of(state, rows, hyper, frozen)
        metrics, weight = sums.metrics, jnp.maximum(sums.metrics["loss"].weight, 1e-30)
        norm = optax.tree.norm(sums.gradient) / weight
        rate = hyper["learning_rate"] * schedule(state.step)
        finite = jnp.isfinite(metrics["loss"].total) & jnp.isfinite(norm)

        def direction(summed: dict, opt_state: Any, params: dict) -> tuple[dict, Any]:
            gradient = jax.tree.map(lambda g: g * (1 / weight), summed)
            return optimizer.update(gradient, opt_state, params, norm=norm)

        def updated(state: State) -> State:
            updates, opt_state = direction(sums.gradient, state.opt_state, state.params)
            params = jax.tree.map(partial(descend, rate=rate), state.params, updates)
            reference = next_reference(state, objective.sync_every)
            return State(state.step + 1, params, opt_state, state.rng, baseline, reference)

        taken = finite & active
        new = updated_if(taken, updated, state)
        lost = lost_updates(direction, optimizer, sums.gradient, new, rate=rate, taken=taken)
        one = jnp.ones((), jnp.float32)
        metrics |= {"grad_norm": Metric(norm, one), "learning_rate": Metric(rate, one)}
        return new, Report(metrics | {LOST_UPDATES: lost}, finite, sums.bad)

    return step


def next_reference(state: State, sync_every: int) -> dict | None:
    """The reference of the step after `state`: every `sync_every` steps the policy of `state`.

    So it lags by at least one update, as in the code of humanline's authors (HALOs). Were it the
    policy of the step itself, all log-ratios would be 0.
    """
    if sync_every < 2:
        return state.params if sync_every else state.reference
    is_due = (state.step + 1) % sync_every == 0
    return jax.tree.map(partial(jnp.where, is_due), state.params, state.reference)


def updated_if(taken: Array, updated: Callable[[State], State], state: State) -> State:
    """updated(state) if `taken`, else the state as it was.

    A CPU takes a branch, which updates in place. On other platforms the results of a branch would
    be a copy of the whole state; there, both are computed number by number, and one is selected.
    """

    def by_branch(state: State) -> State:
        return jax.lax.cond(taken, updated, lambda state: state, state)

    def by_selection(state: State) -> State:
        return jax.tree.map(partial(jnp.where, taken), updated(state), state)

    return jax.lax.platform_dependent(state, cpu=by_branch, default=by_selection)


def build_gradient(
    forward: Forward, objective: Objective
) -> Callable[..., tuple[Sums, RunningMean]]:
    """Build the gradient of a batch's summed loss.

    Returns:
      (state, rows [M, R, ...], hyper, frozen=NO_FROZEN_WEIGHTS) -> (sums, the new baseline).
    """
    sums_of = _coupled_sums if objective.coupled else _accumulated_sums

    def gradient(
        state: State, rows: Rows, hyper: Hyper, frozen: FrozenWeights = NO_FROZEN_WEIGHTS
    ) -> tuple[Sums, RunningMean]:
        def run(params: dict, part: Rows) -> Any:
            return forward(params, part, frozen, hyper)

        if objective.sync_every:
            outputs = map_present(partial(run, state.reference), rows)
            rows = rows._replace(reference=jnp.where(rows.response >= 0, outputs.logprob, 0.0))
        return sums_of(run, objective, state, rows, hyper)

    return gradient


def build_evaluate(objective: Objective) -> Callable[[Any, Rows, Hyper], dict[str, Metric]]:
    """Build the metrics of an objective on a model's outputs.

    Add them up over batches and divide once. The result is exact for any batch size and a ragged
    last batch, unless the objective is coupled.

    Returns:
      (outputs on `rows`, rows [M, R, ...], hyper) -> sums and weights, scalars.
    """

    def evaluate(outputs: Any, rows: Rows, hyper: Hyper) -> dict[str, Metric]:
        metrics = _metrics_of(objective.terms(outputs, rows, hyper))
        if isinstance(outputs, TokenStatistics):
            metrics |= summed_metrics(_token_metrics(outputs, rows))
        return metrics

    return evaluate


def _metrics_of(terms: Terms) -> dict[str, Metric]:
    """An objective's metrics and its loss, summed."""
    return summed_metrics(terms.metrics | {"loss": Metric(terms.loss, terms.weight)})


def _token_metrics(tokens: TokenStatistics, rows: Rows) -> dict[str, Metric]:
    """Metrics of the scored tokens, arrays [M, R, S]."""
    answers, best = answer_tokens(rows), best_response_tokens(rows)
    scored = answers * token_weights(rows)
    chosen, rejected = scored * best, scored * ~best
    metrics = {
        "entropy": masked_metric(tokens.entropy, scored),
        "mean_token_accuracy": masked_metric(tokens.correct, chosen),
        "logits/chosen": masked_metric(tokens.mean_logit, chosen),
    }
    if rows.present.shape[-1] > 1:
        metrics["logits/rejected"] = masked_metric(tokens.mean_logit, rejected)
    return metrics


def _accumulated_sums(
    run: Callable, objective: Objective, state: State, rows: Rows, hyper: Hyper
) -> tuple[Sums, RunningMean]:
    """Gradient accumulation in one pass: the loss is a sum over micro-batches."""

    def micro_loss(params: dict, part: Rows):
        terms = objective.terms(run(params, part), part, hyper)
        metrics = _metrics_of(terms)
        return metrics["loss"].total, (metrics, ~jnp.isfinite(terms.loss))

    def micro_sums(part: Rows, _):
        gradient, (metrics, bad) = jax.grad(micro_loss, has_aux=True)(state.params, part)
        return (gradient, metrics), bad

    (gradient, metrics), bad = add_up(micro_sums, rows)
    return Sums(gradient, metrics, bad), state.baseline


def _coupled_sums(
    run: Callable, objective: Objective, state: State, rows: Rows, hyper: Hyper
) -> tuple[Sums, RunningMean]:
    """Gradient accumulation in two passes, for an objective that needs the whole batch.

    The first pass computes all outputs. The second one takes d loss / d outputs as its cotangent.
    A batch of one micro-batch needs one pass.
    """
    single = len(rows.tokens) == 1
    if single:
        outputs, pull = jax.vjp(
            lambda params: map_present(partial(run, params), rows), state.params
        )
    else:
        outputs = map_present(partial(run, state.params), rows)
    baseline = state.baseline
    if objective.baseline is not None:
        baseline = objective.baseline(baseline, outputs, rows, hyper)
        hyper = hyper | {"delta": baseline.mean}

    def batch_loss(outputs):
        terms = objective.terms(outputs, rows, hyper)
        metrics = _metrics_of(terms)
        return metrics["loss"].total, (metrics, ~jnp.isfinite(terms.loss))

    cotangent, (metrics, bad) = jax.grad(batch_loss, has_aux=True)(outputs)
    if single:
        return Sums(pull(cotangent)[0], metrics, bad), baseline

    def micro_gradient(part: Rows, index: Array):
        part_outputs, pull = jax.vjp(lambda params: run(params, part), state.params)
        return pull(part_like(cotangent, index, part_outputs))[0], ()

    gradient, _ = add_up(micro_gradient, rows)
    return Sums(gradient, metrics, bad), baseline
