"""Products, norms, activations and the MLP: the parts that know nothing of tokens."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from dpojax.logprobs import weight_gradient
from dpojax.models.config import DecoderConfig
from dpojax.sharding import ROWS, constrain


def _gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


MATRICES = ("nd", "df", "nf")  # of a product of two: rows of numbers, a weight, what they give
DENSE = "dense"  # what a product with a weight gives, to rematerialisation policies
MIXED = "mixed"  # what a kernel of attention keeps for its backward pass, to the same

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
    """Every matrix product of the model: einsum in x's dtype, summed in float32.

    The result has `dtype`, by default x's. y is rounded to x's dtype, but its gradient is not: a
    float32 weight gets the float32 sum. Backward, the cotangent is rounded to x's dtype first, so
    that all three products run at its speed.
    """
    if x.dtype == jnp.float32:
        return jnp.einsum(subscripts, x, y.astype(x.dtype), preferred_element_type=jnp.float32)
    return _product(subscripts, jnp.dtype(dtype or x.dtype), x, y)


def _summed_in_float32(subscripts: str, x: Array, y: Array, dtype) -> Array:
    """einsum of two arrays of one low-precision dtype.

    Accelerators sum in float32 whatever the result's dtype. XLA's products on a CPU take their fast
    path only where float32 is asked for.
    """

    def rounded_after(x, y):
        summed = jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)
        return summed.astype(dtype)

    def asked_for(x, y):
        return jnp.einsum(subscripts, x, y, preferred_element_type=dtype)

    return jax.lax.platform_dependent(x, y, cpu=rounded_after, default=asked_for)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(subscripts: str, dtype, x: Array, y: Array) -> Array:
    return _summed_in_float32(subscripts, x, y.astype(x.dtype), dtype)


def _product_forward(subscripts, dtype, x, y):
    return _product(subscripts, dtype, x, y), (x, y)


def _product_backward(subscripts, dtype, saved, cotangent):
    (x, y), cotangent = saved, cotangent.astype(saved[0].dtype)
    inputs, out = subscripts.split("->")
    of_x, of_y = inputs.split(",")
    rounded = y.astype(x.dtype)
    dx = _summed_in_float32(f"{out},{of_y}->{of_x}", cotangent, rounded, x.dtype)
    if (of_x, of_y, out) == MATRICES:
        return dx, weight_gradient(x, cotangent).astype(y.dtype)
    return dx, _summed_in_float32(f"{of_x},{out}->{of_y}", x, cotangent, y.dtype)


_product.defvjp(_product_forward, _product_backward)


class Dense(nnx.Module):
    """An affine map [R, T, *inward] -> [R, T, *outward]; weights are rounded to x's dtype.

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
        kernel = self.kernel[...].reshape(size, -1)
        y = product("{},{}->{}".format(*MATRICES), x.reshape(-1, size), kernel)
        y = checkpoint_name(y, DENSE)
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
