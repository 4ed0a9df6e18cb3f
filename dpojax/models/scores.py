"""Scalar heads: they make a reward model, a value model or a classifier of any decoder.

`Model.scores` gives one number per token, or one logit per token and class. A value model uses all
of them. A reward model uses the one at the last token of each response (`response_scores`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.models.config import DecoderConfig
from dpojax.models.decoder import Params


def with_scalar_head(
    config: DecoderConfig, params: Params, key: Array, labels: tuple[str, ...] = ()
) -> tuple[DecoderConfig, Params]:
    """Replace the head of a decoder by a new scalar head, or by a classifier's head.

    The new weight is normal with standard deviation `config.initializer_range`, in the dtype of the
    embedding. The other arrays are those of `params`, not copies.

    Args:
      config: of the decoder.
      params: its arrays.
      key: for the new weight.
      labels: names of classes; none for a single score.

    Returns:
      The new config, and params with `score/kernel` [1 or labels, D].
    """
    table = params["embed"]["tokens"]  # [V, D]
    shape = (max(1, len(labels)), config.width)
    kernel = config.initializer_range * jax.random.normal(key, shape, jnp.float32)  # [labels, D]
    trunk = {name: value for name, value in params.items() if name not in ("head", "score")}
    config = dataclasses.replace(config, scalar_head=True, labels=labels)
    return config, trunk | {"score": {"kernel": kernel.astype(table.dtype)}}


def response_scores(scores: Array, rows) -> Array:
    """Take the score at the last token of each response.

    Args:
      scores: [R, T], of `Model.scores`.
      rows: as `dpojax.data.rows.Rows`, one batch without leading dimensions.

    Returns:
      [R, examples, responses]; 0 where there is no response.
    """
    _, examples, responses = rows.present.shape
    example = jnp.arange(1, examples + 1)[None, :, None, None]
    response = jnp.arange(1, responses + 1)[None, None, :, None]
    inside = (rows.segment[:, None, None] == example) & (rows.branch[:, None, None] == response)
    # inside: [R, examples, responses, T]
    column = jnp.arange(scores.shape[1])[None, None, None]
    # last, last_scores: [R, examples, responses]
    last = jnp.max(jnp.where(inside, column, -1), axis=-1)  # -1 without any token
    last_scores = jnp.take_along_axis(scores[:, None], jnp.maximum(last, 0), axis=-1)
    return jnp.where(rows.present & (last >= 0), last_scores, 0)
