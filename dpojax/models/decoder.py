"""The decoder. NNX describes the architecture; all other code sees a plain dict of arrays.

Letters of shapes: see `dpojax.models`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from dpojax.logprobs import Head, logits_of
from dpojax.models import cache
from dpojax.models.attention import (
    XLA,
    Attention,
    Context,
    Kernel,
    Layer,
    PlainRows,
    attend_causally,
    context,
    layer_constants,
)
from dpojax.models.cache import Branches, Prompts
from dpojax.models.config import DecoderConfig
from dpojax.models.layers import ACTIVATIONS, DENSE, MIXED, Mlp, Norm, product
from dpojax.sharding import ROWS, constrain, constrain_with_gradient

Params = dict

# Weights of layers are stacked. The axis of layers is never sharded, as the scan goes over it.
TABLE = ("tensor", "fsdp")  # of rows and columns of the tables of embeddings and of the head
SHARDING_RULES = (
    (r"(embed/tokens|embed/positions|head/kernel)$", P(*TABLE)),
    (r"attention/(query|key|value)/kernel$", P(None, "fsdp", "tensor", None)),
    (r"attention/(query|key|value)/bias$", P(None, "tensor", None)),
    (r"attention/out/kernel$", P(None, "tensor", None, "fsdp")),
    (r"mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"mlp/(gate|up)/bias$", P(None, "tensor")),
    (r"mlp/down/kernel$", P(None, "tensor", "fsdp")),
    (r".*", P()),
)

# What is stored for the backward pass of a layer; everything else is computed again.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(DENSE, MIXED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Model(NamedTuple):
    """Pure functions over `params`, a nested dict of arrays (float32 as `init` makes them).

    Attributes:
      init: (key) -> params, float32. Run it under jit with out_shardings for large models.
      apply: (params, rows) -> hidden states [R, T, D] in the compute dtype, after the final norm.
        `rows` is any object with the four arrays of `attention.PlainRows`. A token id or learned
        position outside its table makes its row NaN; it never reads another entry of the table.
      head: (params) -> Head. Its weight [V, D] is the embedding table if tied.
      scores: (params, hidden [..., D]) -> float32 [...], one number per token, for a model with
        `scalar_head`, which has no `head`. With `labels` it gives their logits, [..., labels].
      prefill: (params, tokens [B, P], lengths [B]) -> (hidden [B, D] at the last token of each
        prompt, cache.Prompts). Prompts are padded on the right. One of length 0 is a dummy, whose
        hidden state has no meaning.
      decode: (params, tokens [B, N], branches, slot) -> (hidden [B, N, D], branches). It reads one
        token in each branch and writes its keys and values into `slot`, an int32 scalar, 0 first.
      cast: (params) -> params with the weights of products in the compute dtype. The other
        functions cast in every call; with this it is done once. Their results do not change.
      kernel: how `apply` computes attention.
    """

    config: DecoderConfig
    init: Callable[[Array], Params]
    apply: Callable[..., Array]
    head: Callable[[Params], Head]
    scores: Callable[[Params, Array], Array] | None = None
    prefill: Callable[..., tuple[Array, Prompts]] | None = None
    decode: Callable[..., tuple[Array, Branches]] | None = None
    cast: Callable[[Params], Params] | None = None
    kernel: Kernel = XLA


def build(
    config: DecoderConfig,
    *,
    compute_dtype=jnp.float32,
    remat: str = "none",
    kernel: Kernel = XLA,
) -> Model:
    """Build the decoder that `config` describes.

    Args:
      config: the architecture.
      compute_dtype: of activations and products; norms and softmax stay in float32.
      remat: a name of REMAT. `none` stores everything that the backward pass needs; `dots` stores
        the products with weights and what an attention kernel saves; `full` stores only the input
        of each layer.
      kernel: of attention in `apply`, see `models.kernels`. `prefill` and `decode` use XLA.

    Raises:
      ValueError: an unknown remat policy or activation.
    """
    _require_one_of(REMAT, remat=remat)
    _require_one_of(ACTIVATIONS, activation=config.activation)

    def make(rngs: nnx.Rngs) -> Decoder:
        return Decoder(config, jnp.dtype(compute_dtype), remat, kernel, rngs)

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

    def apply(params: Params, rows) -> Array:
        return nnx.merge(graphdef, params)(rows)

    def head(params: Params) -> Head:
        if config.scalar_head:
            raise ValueError("scalar_head: this model scores tokens and cannot predict them")
        weight = params["embed"]["tokens"] if config.tied_head else params["head"]["kernel"]
        bias = params["head"]["bias"] if config.head_bias else None
        return Head(weight, bias, softcap=config.head_softcap)

    def scores(params: Params, hidden: Array) -> Array:
        if not config.scalar_head:
            raise ValueError("scalar_head: this model has none; see models.scores.with_scalar_head")
        weight = params["score"]["kernel"]  # [1 or labels, D]
        outputs = product("...d,od->...o", hidden, weight, dtype=jnp.float32)
        return outputs if config.labels else outputs[..., 0]

    def prefill(params: Params, tokens: Array, lengths: Array) -> tuple[Array, Prompts]:
        return nnx.merge(graphdef, params).prefill(tokens, lengths)

    def decode(
        params: Params, tokens: Array, branches: Branches, slot: Array
    ) -> tuple[Array, Branches]:
        return nnx.merge(graphdef, params).decode(tokens, branches, slot)

    cast = partial(_cast, compute_dtype)
    return Model(config, init, apply, head, scores, prefill, decode, cast, kernel)


def _require_one_of(known: Collection[str], **named: str) -> None:
    """Raise ValueError for a name that is not known."""
    for option, name in named.items():
        if name not in known:
            raise ValueError(f"{option}: {name!r} is not one of {', '.join(known)}")


def _cast(dtype, params: Params) -> Params:
    """Cast weights of products and embedding tables; biases and norms stay in float32."""

    def cast_leaf(keys, leaf):
        in_product = keys[-1].key in ("kernel", "tokens", "positions")
        return leaf.astype(dtype) if in_product else leaf

    return jax.tree_util.tree_map_with_path(cast_leaf, params)


def logits(model: Model, params: Params, rows) -> Array:
    """Compute all logits, float32 [R, T, V]: for tests and small inputs only.

    Training gets log-probs from `dpojax.logprobs`, which never builds this array.
    """
    return logits_of(model.apply(params, rows), model.head(params))


class Embed(nnx.Module):
    """Token embeddings, plus learned position embeddings if the family has them: [R, T, D]."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.scale = config.embedding_scale
        self.tokens = _table(config.vocab_size, config, rngs)
        learned = config.positions == "learned"
        self.positions = _table(config.max_positions, config, rngs) if learned else None

    def __call__(self, rows, dtype) -> Array:
        # The table is gathered over its width before the look-up. If its width were sharded, XLA
        # would gather the activations of all rows on every device. Its gradient is scattered.
        tokens = constrain_with_gradient(self.tokens[...], ("tensor", None), TABLE)  # [V, D]
        # mode="fill": an id outside the table gives NaN. The default would read another entry.
        x = jnp.take(tokens, rows.tokens, axis=0, mode="fill").astype(dtype)  # [R, T, D]
        x = x if self.scale is None else x * jnp.asarray(self.scale, dtype)
        if self.positions is not None:
            table = constrain_with_gradient(self.positions[...], (None, None), TABLE)
            positions = jnp.take(table, rows.positions, axis=0, mode="fill")
            x = x + positions.astype(dtype)
        return x


class Output(nnx.Module):
    """The weights of a head, [outputs, D] and [outputs], for `Model.head` and `Model.scores`."""

    def __init__(self, size: int, config: DecoderConfig, rngs: nnx.Rngs, *, tied=False, bias=False):
        self.kernel = None if tied else _table(size, config, rngs)
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32)) if bias else None


def _table(size: int, config: DecoderConfig, rngs: nnx.Rngs) -> nnx.Param:
    values = jax.random.normal(rngs.params(), (size, config.width), jnp.float32)
    return nnx.Param(config.initializer_range * values)


class Block(nnx.Module):
    """One layer, [R, T, D] -> [R, T, D].

    Sequential: x + attention(norm(x)), then x + mlp(norm(x)). Parallel: x + attention(norm(x)) +
    mlp(norm(x)).
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.parallel = config.residual != "sequential"
        self.attention_norm = Norm(config)
        self.mlp_norm = None if config.residual == "parallel_one_norm" else Norm(config)
        self.attention_post_norm = Norm(config) if config.post_norms else None
        self.mlp_post_norm = Norm(config) if config.post_norms else None
        self.attention = Attention(config, rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(
        self, x: Array, context: Context, layer: Layer, attend: Callable
    ) -> tuple[Array, Any]:
        """Compute the new x; also return what `attend` returns besides its result."""
        normed = self.attention_norm(x)
        attended, more = self.attention.with_attend(normed, context, layer, attend)
        if self.parallel:
            normed = normed if self.mlp_norm is None else self.mlp_norm(x)
            return constrain(x + attended + self.mlp(normed), ROWS, None, None), more
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended)
        x = constrain(x + attended, ROWS, None, None)
        hidden = self.mlp(self.mlp_norm(x))
        if self.mlp_post_norm is not None:
            hidden = self.mlp_post_norm(hidden)
        return constrain(x + hidden, ROWS, None, None), more


class Decoder(nnx.Module):
    """Embedding, blocks and final norm. The blocks' weights are stacked, and a scan runs them."""

    def __init__(self, config: DecoderConfig, dtype, remat: str, kernel: Kernel, rngs: nnx.Rngs):
        def make_block(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.config, self.dtype, self.remat = config, dtype, remat
        self.make_mask, self.attend = kernel.mask, kernel.attend
        self.embed = Embed(config, rngs)
        self.blocks = nnx.vmap(make_block)(rngs.split(config.layers))
        self.final_norm = Norm(config)
        tied, bias = config.tied_head, config.head_bias
        has_head = not config.scalar_head and (bias or not tied)
        self.head = (
            Output(config.vocab_size, config, rngs, tied=tied, bias=bias) if has_head else None
        )
        outputs = max(1, len(config.labels))
        self.score = Output(outputs, config, rngs) if config.scalar_head else None

    def __call__(self, rows) -> Array:
        shared = context(self.config, rows.positions, partial(self.make_mask, rows))

        def attend(*args, **kwargs):
            return self.attend(*args, **kwargs), None

        def run_block(x, block_and_layer):
            block, layer = block_and_layer
            return block(x, shared, layer, attend)

        # prevent_cse is not needed inside a scan, which XLA does not merge with other code.
        run_block = jax.checkpoint(run_block, policy=REMAT[self.remat], prevent_cse=False)
        x = constrain(self.embed(rows, self.dtype), ROWS, None, None)
        x, _ = jax.lax.scan(run_block, x, (self.blocks, layer_constants(self.config)))
        return self.final_norm(x)

    def prefill(self, tokens: Array, lengths: Array) -> tuple[Array, Prompts]:
        """See `Model.prefill`."""
        column = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
        is_real = column < lengths[:, None]  # [B, P]
        # Padding becomes token 0 at position 0. Both are in their tables, so it is never NaN.
        rows = PlainRows(
            tokens=jnp.where(is_real, tokens, 0),
            positions=jnp.where(is_real, column, 0),
            segment=is_real.astype(jnp.int32),
            branch=jnp.zeros_like(tokens),
        )
        shared = context(self.config, rows.positions, partial(XLA.mask, rows))

        def attend(query, key, value, *args, **kwargs):
            return attend_causally(query, key, value, *args, **kwargs), (key, value)

        def run_block(x, block_and_layer):
            block, layer = block_and_layer
            x, (key, value) = block(x, shared, layer, attend)
            return x, (cache.by_head(key), cache.by_head(value))

        x = constrain(self.embed(rows, self.dtype), ROWS, None, None)
        x, (keys, values) = jax.lax.scan(run_block, x, (self.blocks, layer_constants(self.config)))
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        x = jnp.take_along_axis(x, last, axis=1)  # [B, 1, D]
        return self.final_norm(x)[:, 0], Prompts(keys, values, lengths)

    def decode(self, tokens: Array, branches: Branches, slot: Array) -> tuple[Array, Branches]:
        """See `Model.decode`."""
        lengths = branches.prompts.lengths
        positions = jnp.broadcast_to(lengths[:, None] + slot, tokens.shape)
        shared = context(self.config, positions, partial(cache.visible, branches, slot))

        def run_block(carry, block_and_layer):
            x, branches = carry
            block, layer, index = block_and_layer
            attend = partial(cache.attend_cached, branches, index, slot)
            return block(x, shared, layer, attend), None

        # The embedding reads tokens and positions only; a sample takes the place of a column.
        rows = PlainRows(tokens, positions, segment=tokens, branch=tokens)
        x = constrain(self.embed(rows, self.dtype), ROWS, None, None)  # [B, N, D]
        indices = jnp.arange(self.config.layers)
        layers = (self.blocks, layer_constants(self.config), indices)
        (x, branches), _ = jax.lax.scan(run_block, (x, branches), layers)
        return self.final_norm(x), branches
