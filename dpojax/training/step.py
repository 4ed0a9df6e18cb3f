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
from dpojax.logprobs import TokenStatistics, of_response
from dpojax.losses import RunningMean
from dpojax.training.forward import NO_FROZEN_WEIGHTS, Forward, FrozenWeights
from dpojax.training.metrics import Metric
from dpojax.training.micro_batches import add_up, map_present, part_like
from dpojax.training.objective import Hyper, Objective, Terms
from dpojax.training.state import State

LOST = "updates/lost"  # the metric of updates that rounding swallows


class Report(NamedTuple):
    """What a step says of itself."""

    metrics: dict[str, Metric]  # sums and weights over the batch, scalars
    finite: Array  # bool: loss and gradient are finite; if not, the state was left as it was
    bad: Array  # [M, R, E] bool: the examples whose own loss is not finite


class Sums(NamedTuple):
    """Of a batch: the gradient of its summed loss, and what it reports."""

    gradient: dict
    metrics: dict[str, Metric]
    bad: Array  # [M, R, E]


def build_step(
    forward: Forward,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
) -> Callable[..., tuple[State, Report]]:
    """(state, rows [M, R, ...], hyper, frozen=NO_FROZEN_WEIGHTS) -> (new state, report).

    One optimiser step on one batch. The gradient is that of sum(loss) / sum(weight) over the whole
    batch, whatever the number of micro-batches; empty ones are not computed. `hyper` holds traced
    float32 numbers, `learning_rate` among them. Not jitted here: the caller adds donation,
    shardings or vmap.

    `optimizer` is to treat every number of a parameter by itself, but for the gradient's global
    norm, which it is given as `norm` (see `training.state.make_optimizer`). Then XLA makes one pass
    each for a parameter and its moments, which clipping that finds the norm itself would undo.
    """
    gradient_of = build_gradient(forward, objective)
    optimizer = optax.with_extra_args_support(optimizer)

    def step(
        state: State, rows: Rows, hyper: Hyper, frozen: FrozenWeights = NO_FROZEN_WEIGHTS
    ) -> tuple[State, Report]:
        sums, baseline = gradient_of(state, rows, hyper, frozen)
        metrics, weight = sums.metrics, jnp.maximum(sums.metrics["loss"].weight, 1e-30)
        norm = optax.tree.norm(sums.gradient) / weight
        rate = hyper["learning_rate"] * schedule(state.step)
        finite = jnp.isfinite(metrics["loss"].total) & jnp.isfinite(norm)

        def update(summed: dict, opt_state, params: dict):
            gradient = jax.tree.map(lambda g: g * (1 / weight), summed)
            return optimizer.update(gradient, opt_state, params, norm=norm)

        def updated(state: State) -> State:
            updates, opt_state = update(sums.gradient, state.opt_state, state.params)
            params = jax.tree.map(partial(_moved, rate), state.params, updates)
            return State(state.step + 1, params, opt_state, state.rng, baseline)

        # A branch: to choose between two states both would have to exist.
        new = jax.lax.cond(finite, updated, lambda state: state, state)
        again = _first((sums.gradient, new.params))
        moments = optax.tree.map_params(optimizer, _first, new.opt_state)
        lost = _lost(again[1], update(again[0], moments, again[1])[0], rate)
        lost = jax.tree.map(lambda x: jnp.where(finite, x, 0), lost)
        one = jnp.ones((), jnp.float32)
        metrics |= {"grad_norm": Metric(norm, one), "learning_rate": Metric(rate, one)}
        return new, Report(metrics | {LOST: lost}, finite, sums.bad)

    return step


def build_gradient(
    forward: Forward, objective: Objective
) -> Callable[..., tuple[Sums, RunningMean]]:
    """(state, rows [M, R, ...], hyper, frozen=NO_FROZEN_WEIGHTS) -> (sums, the new baseline)."""
    sums_of = _coupled_sums if objective.coupled else _summed

    def gradient(
        state: State, rows: Rows, hyper: Hyper, frozen: FrozenWeights = NO_FROZEN_WEIGHTS
    ) -> tuple[Sums, RunningMean]:
        run = lambda params, part: forward(params, part, frozen)
        return sums_of(run, objective, state, rows, hyper)

    return gradient


def _moved(rate: Array, param: Array, update: Array) -> Array:
    return (param - rate * update).astype(param.dtype)


def _first(tree):
    """Of stacked matrices the first layer's, of all else nothing: see `_lost`."""
    return jax.tree.map(lambda x: x[0] if x.ndim > 2 else jnp.zeros(0, x.dtype), tree)


def _lost(params: dict, updates: dict, rate: Array) -> Metric:
    """How many updates are too small for the weight that they are added to, of all that are not 0.

    Counted in the matrices of the first layer, which stand for all: its slice of a stacked array
    costs nothing, however the array is sharded. And of the update that the same gradient would make
    from the new state: to look at the old one after it was overwritten, XLA would copy all of it.
    """
    count = lambda found: jnp.sum(found, dtype=jnp.float32)
    wanted = jax.tree.map(lambda u: u != 0, updates)
    stuck = jax.tree.map(lambda w, p, u: w & (_moved(rate, p, u) == p), wanted, params, updates)
    total = lambda tree: sum(map(count, jax.tree.leaves(tree)))
    return Metric(total(stuck), total(wanted))


def build_evaluate(objective: Objective) -> Callable[[Any, Rows, Hyper], dict[str, Metric]]:
    """(outputs on `rows`, rows [M, R, ...], hyper) -> sums and weights, of objective and tokens.

    Add them up over batches and divide once: exact for any batch size and a ragged last batch
    (where the objective couples no batch).
    """

    def evaluate(outputs, rows: Rows, hyper: Hyper) -> dict[str, Metric]:
        metrics = _totals(objective.terms(outputs, rows, hyper))
        if isinstance(outputs, TokenStatistics):
            metrics |= _token_metrics(outputs, rows)
        return jax.tree.map(lambda x: jnp.sum(x, dtype=jnp.float32), metrics)

    return evaluate


def _totals(terms: Terms) -> dict[str, Metric]:
    metrics = terms.metrics | {"loss": Metric(terms.loss, terms.weight)}
    return jax.tree.map(lambda x: jnp.sum(x, dtype=jnp.float32), metrics)


def _token_metrics(tokens: TokenStatistics, rows: Rows) -> dict[str, Metric]:
    first = jnp.zeros(rows.present.shape, bool).at[..., 0].set(True)
    best = first & rows.desirable[..., None]
    by_token = lambda x: of_response(x.reshape(*x.shape[:-2], -1), rows.response)
    scored = (rows.response >= 0) & by_token(rows.rank >= 0)
    chosen, rejected = scored & by_token(best), scored & ~by_token(best)
    metric = lambda values, mask: Metric(jnp.where(mask, values, 0), mask)
    metrics = {
        "entropy": metric(tokens.entropy, scored),
        "mean_token_accuracy": metric(tokens.correct, chosen),
        "logits/chosen": metric(tokens.mean_logit, chosen),
    }
    if rows.present.shape[-1] > 1:
        metrics["logits/rejected"] = metric(tokens.mean_logit, rejected)
    return metrics


def _summed(run, objective, state: State, rows: Rows, hyper: Hyper) -> tuple[Sums, RunningMean]:
    """One pass: the loss is a sum over micro-batches, and so is its gradient."""

    def micro_loss(params, part):
        terms = objective.terms(run(params, part), part, hyper)
        metrics = _totals(terms)
        return metrics["loss"].total, (metrics, ~jnp.isfinite(terms.loss))

    def micro_sums(part, _):
        gradient, (metrics, bad) = jax.grad(micro_loss, has_aux=True)(state.params, part)
        return (gradient, metrics), bad

    (gradient, metrics), bad = add_up(micro_sums, rows)
    return Sums(gradient, metrics, bad), state.baseline


def _coupled_sums(run, objective, state: State, rows: Rows, hyper: Hyper):
    """Two passes: all outputs first, then d loss / d outputs as the cotangent of the second.

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
        metrics = _totals(terms)
        return metrics["loss"].total, (metrics, ~jnp.isfinite(terms.loss))

    cotangent, (metrics, bad) = jax.grad(batch_loss, has_aux=True)(outputs)
    if single:
        return Sums(pull(cotangent)[0], metrics, bad), baseline

    def micro_gradient(part, index):
        own, pull = jax.vjp(lambda params: run(params, part), state.params)
        return pull(part_like(cotangent, index, own))[0], ()

    gradient, _ = add_up(micro_gradient, rows)
    return Sums(gradient, metrics, bad), baseline
