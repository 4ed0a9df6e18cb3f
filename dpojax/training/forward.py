"""What a model says of rows: the forward passes that training, references and evaluation share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.data.rows import Rows
from dpojax.logprobs import (
    TokenStatistics,
    of_response,
    token_kl,
    token_logprobs,
    token_statistics,
)
from dpojax.models import lora
from dpojax.models.lora import LoraConfig
from dpojax.models.scores import response_scores
from dpojax.training.metrics import Metric
from dpojax.training.micro_batches import map_present

MAX_LOGITS = 2**25  # float32 logits that may exist at once: 128 MiB

# (params, rows [R, ...] of one micro-batch, the reference's params or None) -> outputs
Forward = Callable[[dict, Rows, dict | None], Any]


def row_logprobs(model, params, rows: Rows, *, max_logits: int = MAX_LOGITS) -> Array:
    """log-prob of every scored token of one micro-batch, nats, [R, S]; anything at padding."""
    hidden = _scored_hidden(model, params, rows)
    return token_logprobs(hidden, model.head(params), rows.target, max_logits=max_logits)


def language_model(
    model, *, statistics: tuple[str, ...] = (), max_logits: int = MAX_LOGITS
) -> Forward:
    """The forward pass to train with: `TokenStatistics` [R, S] of the scored tokens.

    The log-prob always, and of `statistics` what is named: `log_collision` without gradient, `kl`
    with one (the reference's params must then be given).
    """

    def forward(params, rows: Rows, reference_params=None) -> TokenStatistics:
        hidden, head = _scored_hidden(model, params, rows), model.head(params)
        given = {"max_logits": max_logits}
        found = {"logprob": token_logprobs(hidden, head, rows.target, **given)}
        if "log_collision" in statistics:
            frozen = jax.lax.stop_gradient((hidden, head))
            found["log_collision"] = token_statistics(*frozen, rows.target, **given).log_collision
        if "kl" in statistics:
            theirs = jax.lax.stop_gradient(_scored_hidden(model, reference_params, rows))
            their_head = jax.lax.stop_gradient(model.head(reference_params))
            found["kl"] = token_kl(theirs, their_head, hidden, head, **given)
        return TokenStatistics(**found)

    return forward


def adapted(forward: Forward, config: LoraConfig) -> Forward:
    """`forward` of trained adapters over a frozen base, (adapters, rows, base) -> outputs.

    The base is what `forward` gets as the reference's params: the adapters off.
    """

    def of_adapters(adapters, rows: Rows, base):
        return forward(lora.apply(base, adapters, config), rows, base)

    return of_adapters


def reward_model(model) -> Forward:
    """The forward pass of a model with a scalar head: the responses' scores [R, E, K]."""

    def forward(params, rows: Rows, reference_params=None) -> Array:
        del reference_params
        return response_scores(model.scores(params, model.apply(params, rows)), rows)

    return forward


def classifier(model) -> Forward:
    """The forward pass of a model with labels: the logits [R, T, labels] of every token."""

    def forward(params, rows: Rows, reference_params=None) -> Array:
        del reference_params
        return model.scores(params, model.apply(params, rows))

    return forward


def build_outputs(forward: Forward) -> Callable[[dict, Rows, dict | None], Any]:
    """`forward` of every micro-batch: (params, rows [M, R, ...]) -> outputs [M, ...]."""

    def outputs(params, rows: Rows, reference_params: dict | None = None):
        return map_present(lambda part: forward(params, part, reference_params), rows)

    return outputs


def build_score(
    model, *, max_logits: int = MAX_LOGITS
) -> Callable[[dict, Rows, dict | None], TokenStatistics]:
    """(params, rows [M, R, ...]) -> statistics [M, R, S] of all scored tokens, 0 at padding.

    The one program besides the step: the reference's log-probs, the identity check at step 0, a
    live reference and evaluation all come from it, so equal weights give equal numbers. Given the
    reference's params as well, `kl` is there too.
    """

    def score(params, rows: Rows, reference_params: dict | None = None) -> TokenStatistics:
        def one(part: Rows) -> TokenStatistics:
            hidden, head = _scored_hidden(model, params, part), model.head(params)
            found = token_statistics(hidden, head, part.target, max_logits=max_logits)
            if reference_params is None:
                return found
            theirs = _scored_hidden(model, reference_params, part)
            their_head = model.head(reference_params)
            kl = token_kl(theirs, their_head, hidden, head, max_logits=max_logits)
            return found._replace(kl=kl)

        tokens = map_present(one, rows)
        return jax.tree.map(lambda x: jnp.where(rows.response >= 0, x, 0.0), tokens)

    return score


def build_divergence(
    model, *, max_logits: int = MAX_LOGITS
) -> Callable[[dict, dict, Rows], Metric]:
    """(params, reference_params, rows [M, R, ...]) -> KL(policy || reference) per token, nats.

    Exact over the vocabulary, summed over the contexts of all scored tokens, with their number;
    mismatched responses do not count.
    """

    def divergence(params, reference_params, rows: Rows) -> Metric:
        def one(part):
            policy, reference = (_scored_hidden(model, p, part) for p in (params, reference_params))
            heads = model.head(params), model.head(reference_params)
            return token_kl(policy, heads[0], reference, heads[1], max_logits=max_logits)

        answers = (rows.rank >= 0).reshape(*rows.rank.shape[:-2], -1)
        scored = (rows.response >= 0) & of_response(answers, rows.response)
        total = jnp.sum(jnp.where(scored, map_present(one, rows), 0.0))
        return Metric(total, jnp.sum(scored))

    return divergence


def _scored_hidden(model, params, rows: Rows) -> Array:
    """Hidden states [R, S, D] at the columns that predict scored tokens."""
    hidden = model.apply(params, rows)
    return jnp.take_along_axis(hidden, rows.source[..., None], axis=1)
