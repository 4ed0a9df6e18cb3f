"""Text classifiers: a decoder's logits at a text's last token, fitted to labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.data.rows import Rows
from dpojax.training.metrics import Metric
from dpojax.training.objective import Hyper, Objective, Terms


def objective(first_token: int = 0) -> Objective:
    """The mean cross-entropy of the labels over all texts of the optimiser batch, nats.

    The outputs that it reads are logits [..., R, T, labels], of `training.forward.classifier`; a
    text is one example of a row, prompt and response together.

    Args:
      first_token: 0: a label is read at its text's last token. n: a text's loss is the mean over
        its tokens from the n-th on and its last: that of the text and of all its beginnings, which
        a decoder sees as if the text had been cut there. The metrics read the last token alone.
    """

    def terms(logits: Array, rows: Rows, hyper: Hyper) -> Terms:
        del hyper
        inside, last = _places(rows)
        read = last
        if first_token:
            read = last | (inside & (rows.positions >= first_token - 1)[..., None])
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        right = jax.nn.one_hot(rows.category, logits.shape[-1])
        cost = -jnp.einsum("...tl,...el->...te", log_p, right)
        mean = lambda at: jnp.sum(cost * at, -2) / jnp.maximum(jnp.sum(at, -2), 1)
        there = jnp.any(rows.present, axis=-1)
        found = jnp.argmax(jnp.einsum("...tl,...te->...el", log_p, last.astype(jnp.float32)), -1)
        metrics = {
            "accuracy": Metric(there & (found == rows.category), there),
            "cross_entropy": Metric(mean(last), there),
        }
        return Terms(mean(read), there.astype(jnp.float32), metrics)

    return Objective(terms, needs_reference=False)


def _places(rows: Rows) -> tuple[Array, Array]:
    """Which column [..., R, T, E] belongs to which text, and which is its last."""
    example = jnp.arange(1, rows.present.shape[-2] + 1)
    inside = rows.segment[..., None] == example.reshape((1,) * rows.segment.ndim + (-1,))
    places = jnp.where(inside, rows.positions[..., None], -1)
    return inside, inside & (places == places.max(-2, keepdims=True))
