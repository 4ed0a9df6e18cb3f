"""Products, norms, activations and the MLP: the layers that treat every token alone.

Letters of shapes: see `dpojax.models`.
"""

from __future__ import annotations

import dataclasses
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


def _quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _squared_relu(x: Array) -> Array:
    return jnp.square(jax.nn.relu(x))


MATRICES = ("nd", "df", "nf")  # subscripts of a product of matrices: inputs, weight, result
# Names of activations, by which rematerialisation policies (`decoder.REMAT`) choose what is stored.
DENSE = "dense"  # products with weights
MIXED = "mixed"  # what an attention kernel saves for its backward pass

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "relu2": _squared_relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def product(subscripts: str, x: Array, y: Array, dtype=None) -> Array:
    """Compute an einsum of two arrays in the dtype of x, with sums in float32.

    Every matrix product of the model goes through here. y is rounded to the dtype of x, but the
    gradient of y is not: a float32 weight gets the float32 sum. The backward pass rounds the
    cotangent to the dtype of x first, so that all three products run at the speed of that dtype.

    Args:
      subscripts: as for einsum, with an arrow.
      x, y: the factors.
      dtype: of the result; by default that of x.
    """
    if x.dtype == jnp.float32:
        return jnp.einsum(subscripts, x, y.astype(x.dtype), preferred_element_type=jnp.float32)
    return _product(subscripts, jnp.dtype(dtype or x.dtype), x, y)


def _summed_in_float32(subscripts: str, x: Array, y: Array, dtype) -> Array:
    """Compute an einsum of two arrays of one low-precision dtype.

    Accelerators sum in float32, whatever the dtype of the result is. On a CPU, XLA takes its fast
    path only if the result is float32, so it is rounded afterwards there.
    """

    def float32_then_rounded(x, y):
        summed = jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)
        return summed.astype(dtype)

    def direct(x, y):
        return jnp.einsum(subscripts, x, y, preferred_element_type=dtype)

    return jax.lax.platform_dependent(x, y, cpu=float32_then_rounded, default=direct)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(subscripts: str, dtype, x: Array, y: Array) -> Array:
    return _summed_in_float32(subscripts, x, y.astype(x.dtype), dtype)


def _product_forward(subscripts, dtype, x, y):
    return _product(subscripts, dtype, x, y), (x, y)


def _product_backward(subscripts, dtype, saved, cotangent):
    x, y = saved
    cotangent = cotangent.astype(x.dtype)
    inputs, out_axes = subscripts.split("->")
    x_axes, y_axes = inputs.split(",")
    rounded_y = y.astype(x.dtype)
    dx = _summed_in_float32(f"{out_axes},{y_axes}->{x_axes}", cotangent, rounded_y, x.dtype)
    if (x_axes, y_axes, out_axes) == MATRICES:
        return dx, weight_gradient(x, cotangent).astype(y.dtype)
    return dx, _summed_in_float32(f"{x_axes},{out_axes}->{y_axes}", x, cotangent, y.dtype)


_product.defvjp(_product_forward, _product_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedKernel:
    """A frozen kernel and its low-rank change; it stands in `params` in the kernel's place.

    `models.lora.adapt` makes it. [L] leads in all arrays, and is gone in the scan over layers.

    Attributes:
      kernel: [L, *inward, *outward]; it gets no gradient.
      a: [L, inward, rank], each side flattened to one axis.
      b: [L, rank, outward].
      scale: of a @ b.
    """

    kernel: Array
    a: Array
    b: Array
    scale: float = dataclasses.field(metadata={"static": True})


class Dense(nnx.Module):
    """An affine map [R, T, *inward] -> [R, T, *outward] in the dtype of its input.

    The product is one of two matrices, [R * T, inward] and [inward, outward]. On a CPU, the
    gradient of an MLP took 2.3 times as long if the weight's gradient summed over two axes.
    """

    def __init__(self, inward: tuple, outward: tuple, *, bias: bool, std: float, rngs: nnx.Rngs):
        self.inward, self.outward = inward, outward
        shape = (*inward, *outward)  # such as [D, H, E] of the queries
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outward, jnp.float32)) if bias else None  # [*outward]

    def __call__(self, x: Array) -> Array:
        kernel, size = self.kernel.get_value(), math.prod(self.inward)
        inputs, change = x.reshape(-1, size), None  # [R * T, inward]
        if isinstance(kernel, AdaptedKernel):
            kernel, change = kernel.kernel, kernel
        y = _multiply(inputs, kernel.reshape(size, -1))  # [R * T, outward]
        if change is not None:
            # Beside the product, not added to the kernel: so no layer makes a second kernel, and
            # the backward pass no gradient of a kernel's size.
            low_rank = _multiply(_multiply(inputs, change.a), change.b, dtype=jnp.float32)
            y = (y.astype(jnp.float32) + change.scale * low_rank).astype(y.dtype)
        y = checkpoint_name(y, DENSE)
        y = y.reshape(*x.shape[:2], *self.outward)  # [R, T, *outward]
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[None, None]


def _multiply(x: Array, weight: Array, dtype=None) -> Array:
    """Compute the `product` of two matrices."""
    return product("{},{}->{}".format(*MATRICES), x, weight, dtype=dtype)


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the last axis, in float32; the result has the dtype of x."""

    def __init__(self, config: DecoderConfig, *, kind: str | None = None, size: int | None = None):
        """Make scale and bias.

        Args:
          config: gives epsilon and offset.
          kind: a name of NORMS; by default the config's.
          size: of the last axis; by default the config's width.
        """
        size = config.width if size is None else size
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.center = (kind or config.norm) == "layernorm"
        self.scale = nnx.Param(jnp.full(size, 1 - self.offset, jnp.float32))  # [D], or [E] of heads
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32)) if self.center else None

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)  # [R, T, D], or [R, T, H, E] of heads
        if self.center:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        leading = (None,) * (x.ndim - 1)
        y = y * (self.offset + self.scale[...].astype(jnp.float32))[leading]
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)[leading]
        return y.astype(x.dtype)


class Mlp(nnx.Module):
    """down(activation(up(x))), or if gated down(activation(gate(x)) * up(x)); x is [R, T, D]."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[config.activation]
        width, inner, std = (config.width,), (config.mlp_width,), config.initializer_range
        dense = functools.partial(Dense, bias=config.mlp_bias, rngs=rngs)
        self.gate = dense(width, inner, std=std) if config.gated_mlp else None
        self.up = dense(width, inner, std=std)
        self.down = dense(inner, width, std=residual_std(config))

    def __call__(self, x: Array) -> Array:
        if self.gate is None:
            hidden = self.activation(self.up(x))  # [R, T, mlp_width]
        else:
            hidden = self.activation(self.gate(x)) * self.up(x)  # [R, T, mlp_width]
        return self.down(constrain(hidden, ROWS, None, "tensor"))  # [R, T, D]


def residual_std(config: DecoderConfig) -> float:
    """The initial standard deviation of a projection into the residual stream.

    With `scaled_residual_init` it is that of GPT-2 (Radford et al. 2019, section 2.3).
    """
    scale = (2 * config.layers) ** -0.5 if config.scaled_residual_init else 1.0
    return scale * config.initializer_range
