"""Products, norms, activations and the MLP: the parts that know nothing of tokens."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from dpojax.models.config import DecoderConfig
from dpojax.sharding import ROWS, constrain


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def product(subscripts: str, x: Array, y: Array, dtype=None) -> Array:
    """Every matrix product of the model: einsum of two arrays of one dtype.

    The result has `dtype`, by default x's. Accelerators sum bfloat16 products in float32 whatever
    the result's dtype; asking for float32 only saves the last rounding (attention logits), and
    makes the backward pass multiply float32 cotangents, which is slower.
    """
    return jnp.einsum(subscripts, x, y, preferred_element_type=dtype or x.dtype)


class Dense(nnx.Module):
    """An affine map [R, T, *inward] -> [R, T, *outward]; weights are cast to x's dtype.

    The product is one of two matrices, [R T, inward] and [inward, outward]: on a CPU the gradient
    of an MLP took 2.3 times as long when the weight's gradient summed over two axes, R and T.
    """

    def __init__(self, inward: tuple, outward: tuple, *, bias: bool, std: float, rngs: nnx.Rngs):
        self.inward, self.outward = inward, outward
        shape = (*inward, *outward)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outward, jnp.float32)) if bias else None

    def __call__(self, x: Array) -> Array:
        size = math.prod(self.inward)
        kernel = self.kernel[...].astype(x.dtype).reshape(size, -1)
        y = product("nd,df->nf", x.reshape(-1, size), kernel)
        y = y.reshape(*x.shape[:2], *self.outward)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None, None]


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axis, in float32; x's dtype comes out."""

    def __init__(self, config: DecoderConfig, *, kind: str | None = None, size: int | None = None):
        """kind: a name of NORMS, by default the config's. size: of that axis, by default width."""
        size = config.width if size is None else size
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.center = (kind or config.norm) == "layernorm"
        self.scale = nnx.Param(jnp.full(size, 1 - self.offset, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32)) if self.center else None

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        if self.center:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        leading = (None,) * (x.ndim - 1)
        y = y * (self.offset + self.scale[...].astype(jnp.float32))[leading]
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)[leading]
        return y.astype(x.dtype)


class Mlp(nnx.Module):
    """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[config.activation]
        width, inner, std = (config.width,), (config.mlp_width,), config.initializer_range
        dense = functools.partial(Dense, bias=config.mlp_bias, rngs=rngs)
        self.gate = dense(width, inner, std=std) if config.gated_mlp else None
        self.up = dense(width, inner, std=std)
        self.down = dense(inner, width, std=residual_std(config))

    def __call__(self, x: Array) -> Array:
        if self.gate is None:
            hidden = self.activation(self.up(x))
        else:
            hidden = self.activation(self.gate(x)) * self.up(x)
        return self.down(constrain(hidden, ROWS, None, "tensor"))


def residual_std(config: DecoderConfig) -> float:
    """Initial standard deviation of a projection into the residual stream (GPT-2, section 2.3)."""
    scale = (2 * config.layers) ** -0.5 if config.scaled_residual_init else 1.0
    return scale * config.initializer_range
