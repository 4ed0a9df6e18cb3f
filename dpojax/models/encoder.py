"""Encoders of the BERT type (Devlin et al. 2018; RoBERTa, Liu et al. 2019).

`build` makes a sequence classifier, `build_trunk` what is below its head.

Letters of shapes: see `dpojax.models`; here B texts, T columns of a text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dpojax.models.attention import Attention, Context, Layer, layer_constants
from dpojax.models.config import DecoderConfig
from dpojax.models.layers import ACTIVATIONS, Dense, Mlp, Norm

Params = dict


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional transformer with norms after its attention and its MLP, and a classifier.

    Attributes:
      labels: names, in the order of the logits.
      types: size of the token-type table; a single text uses its first entry.
      first_position: the entry of the position table for a text's first token (RoBERTa: 2).
      Others as in `DecoderConfig`.

    Raises:
      ValueError: sizes that are not positive or do not fit together, an unknown activation.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    max_positions: int
    labels: tuple[str, ...]
    types: int = 2
    first_position: int = 0
    activation: str = "gelu"
    norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self):
        if not self.labels or self.types < 1 or not 0 <= self.first_position < self.max_positions:
            raise ValueError(f"labels, types, first_position: not those of a classifier in {self}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: {self.activation!r} is not in {list(ACTIVATIONS)}")
        _ = self.block  # making it checks the sizes

    @property
    def block(self) -> DecoderConfig:
        """The config of attention, MLP and norms, which decoders have as well."""
        return DecoderConfig(
            self.vocab_size,
            self.width,
            self.layers,
            self.heads,
            self.mlp_width,
            self.max_positions,
            activation=self.activation,
            norm_eps=self.norm_eps,
            initializer_range=self.initializer_range,
        )


class EncoderModel(NamedTuple):
    """Pure functions over `params`, a nested dict of arrays.

    Attributes:
      config: the architecture.
      init: (key) -> params, float32.
      apply: (params, tokens, lengths) -> logits, float32 [B, labels], of a classifier; hidden
        states [B, T, D] of a trunk. `tokens` is int [B, T] and `lengths` int [B]. Tokens after the
        length of a text change nothing before it. A token id outside the table makes its row NaN.
    """

    config: EncoderConfig
    init: Callable[[Array], Params]
    apply: Callable[[Params, Array, Array], Array]


def build(config: EncoderConfig, *, compute_dtype=jnp.float32) -> EncoderModel:
    """Build the classifier that `config` describes; norms and softmax stay in float32."""
    return _functions_of(Classifier, config, compute_dtype)


def build_trunk(config: EncoderConfig, *, compute_dtype=jnp.float32) -> EncoderModel:
    """Build what is below the classifier: its params are those of `build` without the head's."""
    return _functions_of(Trunk, config, compute_dtype)


def _functions_of(kind: type[Trunk], config: EncoderConfig, compute_dtype) -> EncoderModel:
    def make(rngs: nnx.Rngs) -> Trunk:
        return kind(config, jnp.dtype(compute_dtype), rngs)

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key: Array) -> Params:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

    def apply(params: Params, tokens: Array, lengths: Array) -> Array:
        longest = config.max_positions - config.first_position
        if tokens.shape[1] > longest:
            raise ValueError(f"tokens: {tokens.shape[1]} columns, but the model has {longest}")
        return nnx.merge(graphdef, params)(tokens, lengths)

    return EncoderModel(config, init, apply)


class Embed(nnx.Module):
    """norm(tokens + positions + the first token type): [B, T] -> [B, T, D]."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        def table(size: int) -> nnx.Param:
            values = jax.random.normal(rngs.params(), (size, config.width), jnp.float32)
            return nnx.Param(config.initializer_range * values)

        self.first_position = config.first_position
        self.tokens = table(config.vocab_size)
        self.positions, self.types = table(config.max_positions), table(config.types)
        self.norm = Norm(config.block)

    def __call__(self, tokens: Array, dtype) -> Array:
        positions = self.positions[...][self.first_position :][: tokens.shape[1]]  # [T, D]
        x = jnp.take(self.tokens[...], tokens, axis=0, mode="fill")  # [B, T, D]
        x = x + (positions + self.types[...][:1])[None]
        return self.norm(x.astype(dtype))


class Block(nnx.Module):
    """One layer, [B, T, D] -> [B, T, D]: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention, self.mlp = Attention(config, rngs), Mlp(config, rngs)
        self.attention_norm, self.mlp_norm = Norm(config), Norm(config)

    def __call__(self, x: Array, context: Context, layer: Layer) -> Array:
        x = self.attention_norm(x + self.attention(x, context, layer))
        return self.mlp_norm(x + self.mlp(x))


class Trunk(nnx.Module):
    """Embedding and stacked blocks: [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: EncoderConfig, dtype, rngs: nnx.Rngs):
        def make_block(rngs: nnx.Rngs) -> Block:
            return Block(config.block, rngs)

        self.block, self.dtype = config.block, dtype
        self.embed = Embed(config, rngs)
        self.blocks = nnx.vmap(make_block)(rngs.split(config.layers))

    def __call__(self, tokens: Array, lengths: Array) -> Array:
        batch, columns = tokens.shape
        is_real = jnp.arange(columns)[None] < lengths[:, None]  # [B, T]
        mask = jnp.broadcast_to(is_real[:, None], (batch, columns, columns))
        shared = Context(masks=(mask,), angles=())

        def run_block(x, block_and_layer):
            block, layer = block_and_layer
            return block(x, shared, layer), None

        # Padding becomes token 0, so that an id outside the table cannot make it NaN.
        x = self.embed(jnp.where(is_real, tokens, 0), self.dtype)
        x, _ = jax.lax.scan(run_block, x, (self.blocks, layer_constants(self.block)))
        return x


class Classifier(Trunk):
    """A trunk, and a classifier on the first token's hidden state: [B, T] -> [B, labels]."""

    def __init__(self, config: EncoderConfig, dtype, rngs: nnx.Rngs):
        super().__init__(config, dtype, rngs)
        width, std = (config.width,), config.initializer_range
        self.pooler = Dense(width, width, bias=True, std=std, rngs=rngs)
        self.classifier = Dense(width, (len(config.labels),), bias=True, std=std, rngs=rngs)

    def __call__(self, tokens: Array, lengths: Array) -> Array:
        hidden_BxTxD = super().__call__(tokens, lengths)
        pooled_Bx1xD = jnp.tanh(self.pooler(hidden_BxTxD[:, :1]))
        return self.classifier(pooled_Bx1xD)[:, 0].astype(jnp.float32)
