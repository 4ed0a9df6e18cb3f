"""Scalar heads: reward and value models, and classifiers, out of any decoder.

`Model.scores` gives one number per token, or one logit per class. A value model reads all of them;
a reward model reads that of each response's last token (`response_scores`).
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
    """The same trunk with a new scalar head, or a classifier's, in the language-model head's place.

    Its weight [1 or labels, width] is normal with standard deviation `config.initializer_range`, in
    the dtype of the embedding. Arrays of the trunk are shared with `params`, not copied.
    """
    table = params["embed"]["tokens"]
    shape = (max(1, len(labels)), config.width)
    kernel = config.initializer_range * jax.random.normal(key, shape, jnp.float32)
    trunk = {name: value for name, value in params.items() if name not in ("head", "score")}
    config = dataclasses.replace(config, scalar_head=True, labels=labels)
    return config, trunk | {"score": {"kernel": kernel.astype(table.dtype)}}


def response_scores(scores: Array, rows) -> Array:
    """The score at the last token of each response, [R, E, K]; 0 where there is none.

    Args:
      scores: [R, T], of `Model.scores`.
      rows: as `dpojax.data.rows.Rows`, one batch without leading dimensions.
    """
    _, examples, responses = rows.present.shape
    example = jnp.arange(1, examples + 1)[None, :, None, None]
    response = jnp.arange(1, responses + 1)[None, None, :, None]
    inside = (rows.segment[:, None, None] == example) & (rows.branch[:, None, None] == response)
    column = jnp.arange(scores.shape[1])[None, None, None]
    last = jnp.max(jnp.where(inside, column, -1), axis=-1)
    read = jnp.take_along_axis(scores[:, None], jnp.maximum(last, 0), axis=-1)
    return jnp.where(rows.present & (last >= 0), read, 0)
