"""Text classifiers: a decoder's logits at a text's last token, fitted to labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.data.rows import Rows
from dpojax.training.objective import Hyper, Objective, Terms, masked_metric


def objective(first_token: int = 0) -> Objective:
    """The mean cross-entropy of the labels over all texts of the optimiser batch, nats.

    The outputs that it reads are logits [..., R, T, labels], of `training.forward.classifier`. A
    text is one example of a row, prompt and response together.

    Args:
      first_token: 0: the label is predicted at the text's last token. n: a text's loss is the mean
        over its tokens from the n-th on, and its last. Because the decoder is causal, that trains
        on the text and on all its beginnings. The metrics are of the last token alone.
    """

    def terms(logits: Array, rows: Rows, hyper: Hyper) -> Terms:
        del hyper
        inside, last = _places(rows)
        scored = last
        if first_token:
            scored = last | (inside & (rows.positions >= first_token - 1)[..., None])
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))  # [..., R, T, L]
        label = jax.nn.one_hot(rows.category, logits.shape[-1])  # [..., R, E, L]
        cost = -jnp.einsum("...tl,...el->...te", log_p, label)  # [..., R, T, E]

        def mean(at: Array) -> Array:
            return jnp.sum(cost * at, -2) / jnp.maximum(jnp.sum(at, -2), 1)

        weight = jnp.any(rows.present, axis=-1) * rows.weight  # [..., R, E]
        at_last = jnp.einsum("...tl,...te->...el", log_p, last.astype(jnp.float32))
        predicted = jnp.argmax(at_last, -1)  # [..., R, E]
        metrics = {
            "accuracy": masked_metric(predicted == rows.category, weight),
            "cross_entropy": masked_metric(mean(last), weight),
        }
        return Terms(mean(scored) * rows.weight, weight, metrics)

    return Objective(terms, needs_reference=False)


def _places(rows: Rows) -> tuple[Array, Array]:
    """Which columns belong to each text, and which is its last; both bool [..., R, T, E]."""
    example = jnp.arange(1, rows.present.shape[-2] + 1)
    inside = rows.segment[..., None] == example.reshape((1,) * rows.segment.ndim + (-1,))
    places = jnp.where(inside, rows.positions[..., None], -1)
    last = inside & (places == jnp.max(places, axis=-2, keepdims=True))
    return inside, last
