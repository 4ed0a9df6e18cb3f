"""The step that every objective shares: forward, log-probs, objective, gradient, update."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from dpojax.data.rows import Rows
from dpojax.logprobs import TokenStatistics, token_kl, token_logprobs, token_statistics
from dpojax.training.metrics import Metric
from dpojax.training.objective import Hyper, Objective
from dpojax.training.state import State

MAX_LOGITS = 2**25  # float32 logits that may exist at once: 128 MiB


class Report(NamedTuple):
    """What a step says of itself."""

    metrics: dict[str, Metric]  # sums and weights over the batch, scalars
    finite: Array  # bool: loss and gradient are finite; if not, the state was left as it was
    bad: Array  # [M, R, E] bool: the examples whose own loss is not finite


def row_logprobs(model, params, rows: Rows, *, max_logits: int = MAX_LOGITS) -> Array:
    """log-prob of every scored token of one micro-batch, nats, [R, S]; anything at padding."""
    hidden = _scored_hidden(model, params, rows)
    return token_logprobs(hidden, model.head(params), rows.target, max_logits=max_logits)


def build_step(
    model,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
    *,
    max_logits: int = MAX_LOGITS,
) -> Callable[[State, Rows, Hyper], tuple[State, Report]]:
    """(state, rows [M, R, ...], hyper) -> (new state, report): one optimiser step on one batch.

    The gradient is that of sum(loss) / sum(weight) over the whole batch, whatever the number of
    micro-batches; empty ones are not computed. `hyper` holds float32 scalars, `learning_rate`
    among them. Not jitted here: the caller adds donation, shardings or vmap.
    """

    def micro_loss(params, rows, hyper):
        terms = objective.terms(
            row_logprobs(model, params, rows, max_logits=max_logits), rows, hyper
        )
        metrics = terms.metrics | {"loss": Metric(terms.loss, terms.weight)}
        metrics = jax.tree.map(lambda x: jnp.sum(x, dtype=jnp.float32), metrics)
        return metrics["loss"].total, (metrics, ~jnp.isfinite(terms.loss))

    def step(state: State, rows: Rows, hyper: Hyper) -> tuple[State, Report]:
        gradient_of = jax.grad(partial(micro_loss, hyper=hyper), has_aux=True)
        gradient, (metrics, bad) = _accumulate(gradient_of, state.params, rows)
        weight = jnp.maximum(metrics["loss"].weight, 1e-30)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        norm = optax.tree.norm(gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        rate = hyper["learning_rate"] * schedule(state.step)
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), state.params, updates)
        finite = jnp.isfinite(metrics["loss"].total) & jnp.isfinite(norm)
        new = State(state.step + 1, params, opt_state, state.rng)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        one = jnp.ones((), jnp.float32)
        metrics |= {"grad_norm": Metric(norm, one), "learning_rate": Metric(rate, one)}
        return new, Report(metrics, finite, bad)

    return step


def build_score(model, *, max_logits: int = MAX_LOGITS) -> Callable[[dict, Rows], TokenStatistics]:
    """(params, rows [M, R, ...]) -> statistics [M, R, S] of all scored tokens, 0 at padding.

    The one forward program besides the step: the reference's log-probs, the identity check at
    step 0, a live reference and evaluation all come from it, so equal weights give equal numbers.
    """

    def score(params, rows: Rows) -> TokenStatistics:
        def one(part: Rows) -> TokenStatistics:
            hidden = _scored_hidden(model, params, part)
            return token_statistics(hidden, model.head(params), part.target, max_logits=max_logits)

        def one_or_nothing(part: Rows) -> TokenStatistics:
            zeros = TokenStatistics(*(jnp.zeros(part.target.shape, jnp.float32),) * 4)
            return jax.lax.cond(jnp.any(part.present), one, lambda _: zeros, part)

        tokens = _map(one_or_nothing if len(rows.tokens) > 1 else one, rows)
        return jax.tree.map(lambda x: jnp.where(rows.response >= 0, x, 0.0), tokens)

    return score


def build_evaluate(
    objective: Objective,
) -> Callable[[TokenStatistics, Rows, Hyper], dict[str, Metric]]:
    """(scores of `rows`, rows [M, R, ...], hyper) -> sums and weights, of objective and tokens.

    Add them up over batches and divide once: exact for any batch size and a ragged last batch.
    """

    def evaluate(tokens: TokenStatistics, rows: Rows, hyper: Hyper) -> dict[str, Metric]:
        terms = jax.vmap(objective.terms, in_axes=(0, 0, None))(tokens.logprob, rows, hyper)
        metrics = terms.metrics | {"loss": Metric(terms.loss, terms.weight)}
        metrics |= _token_metrics(tokens, rows)
        return jax.tree.map(lambda x: jnp.sum(x, dtype=jnp.float32), metrics)

    return evaluate


def build_divergence(
    model, *, max_logits: int = MAX_LOGITS
) -> Callable[[dict, dict, Rows], Metric]:
    """(params, reference_params, rows [M, R, ...]) -> KL(policy || reference) per token, nats.

    Exact over the vocabulary, summed over the contexts of all scored tokens, with their number.
    """

    def divergence(params, reference_params, rows: Rows) -> Metric:
        def one(part):
            policy, reference = (_scored_hidden(model, p, part) for p in (params, reference_params))
            heads = model.head(params), model.head(reference_params)
            return token_kl(policy, heads[0], reference, heads[1], max_logits=max_logits)

        scored = rows.response >= 0
        return Metric(jnp.sum(jnp.where(scored, _map(one, rows), 0.0)), jnp.sum(scored))

    return divergence


def _scored_hidden(model, params, rows: Rows) -> Array:
    """Hidden states [R, S, D] at the columns that predict scored tokens."""
    hidden = model.apply(params, rows)
    return jnp.take_along_axis(hidden, rows.source[..., None], axis=1)


def _token_metrics(tokens: TokenStatistics, rows: Rows) -> dict[str, Metric]:
    scored = rows.response >= 0
    rank = rows.response % rows.present.shape[-1]
    chosen, rejected = scored & (rank == 0), scored & (rank > 0)
    metric = lambda values, mask: Metric(jnp.where(mask, values, 0), mask)
    metrics = {
        "entropy": metric(tokens.entropy, scored),
        "mean_token_accuracy": metric(tokens.correct, chosen),
        "logits/chosen": metric(tokens.mean_logit, chosen),
    }
    if rows.present.shape[-1] > 1:
        metrics["logits/rejected"] = metric(tokens.mean_logit, rejected)
    return metrics


def _map(function, rows: Rows):
    """`function` of every micro-batch, stacked; without a loop around a single one."""
    if len(rows.tokens) > 1:
        return jax.lax.map(function, rows)
    return jax.tree.map(lambda x: x[None], function(jax.tree.map(lambda x: x[0], rows)))


def _accumulate(gradient_of, params, rows: Rows):
    """Sums of gradient and metrics over the micro-batches that hold anything; `bad` is stacked."""
    part = lambda i: jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), rows
    )
    if len(rows.tokens) == 1:
        gradient, (metrics, bad) = gradient_of(params, part(0))
        return gradient, (metrics, bad[None])

    def body(i, sums):
        gradient, metrics, bad = sums
        new_gradient, (new_metrics, new_bad) = gradient_of(params, part(i))
        gradient, metrics = jax.tree.map(jnp.add, (gradient, metrics), (new_gradient, new_metrics))
        return gradient, metrics, bad.at[i].set(new_bad)

    gradient, (metrics, bad) = jax.eval_shape(gradient_of, params, part(0))
    bad = jax.ShapeDtypeStruct((len(rows.tokens), *bad.shape), bad.dtype)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (gradient, metrics, bad))
    used = jnp.sum(jnp.any(rows.present, axis=(1, 2, 3)))  # they are filled from the front
    gradient, metrics, bad = jax.lax.fori_loop(0, used, body, zeros)
    return gradient, (metrics, bad)
