"""LoRA (Hu et al. 2021) for any decoder, as functions of the parameter tree.

    adapters = lora.init(key, base, config)
    hidden = model.apply(lora.adapt(base, adapters, config), rows)   # the policy, to train it
    hidden = model.apply(lora.apply(base, adapters, config), rows)   # the policy, merged
    hidden = model.apply(base, rows)                                 # the reference: adapters off

`lora_peft` reads and writes adapters of the peft library.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import Array
from jax.sharding import PartitionSpec as P

from dpojax.models.decoder import Params
from dpojax.models.layers import AdaptedKernel

Adapters = dict

# a is sharded like the inward axes of its kernel, and b like the outward axes. So a @ b is sharded
# like the kernel without any communication. The rank is never sharded.
LORA_RULES = (
    (r"attention/(query|key|value)/kernel/a$", P(None, "fsdp", None)),
    (r"attention/(query|key|value)/kernel/b$", P(None, None, "tensor")),
    (r"attention/out/kernel/a$", P(None, "tensor", None)),
    (r"attention/out/kernel/b$", P(None, None, "fsdp")),
    (r"mlp/(gate|up)/kernel/a$", P(None, "fsdp", None)),
    (r"mlp/(gate|up)/kernel/b$", P(None, None, "tensor")),
    (r"mlp/down/kernel/a$", P(None, "tensor", None)),
    (r"mlp/down/kernel/b$", P(None, None, "fsdp")),
    (r".*", P()),
)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels are adapted, and how.

    Attributes:
      rank: columns of a, rows of b.
      alpha: a @ b is multiplied by alpha / rank, or by alpha / sqrt(rank) if `rank_stabilised`.
      targets: regular expressions. A kernel is adapted if one is found in its path, such as
        `blocks/mlp/up/kernel`. By default all kernels of the blocks are. Embeddings, norms, biases
        and the head cannot be adapted.
      rank_stabilised: see `alpha`; Kalajdzievski 2023.

    Raises:
      ValueError: a rank or alpha that is not positive, no target, a pattern that does not compile.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("attention/", "mlp/")
    rank_stabilised: bool = False

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"rank, alpha: must be positive, got {self.rank}, {self.alpha}")
        if not self.targets or isinstance(self.targets, str):
            raise ValueError(f"targets: expected one or more patterns, got {self.targets!r}")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"targets: {pattern!r} is not a pattern ({error})") from error

    @property
    def scale(self) -> float:
        """What a @ b is multiplied by."""
        return self.alpha / self.divisor(self.rank)

    def divisor(self, rank: int) -> float:
        """What alpha is divided by at this rank."""
        return math.sqrt(rank) if self.rank_stabilised else rank


def init(key: Array, params: Params, config: LoraConfig) -> Adapters:
    """Make new adapters, float32. They change nothing yet: a is random and b is zero.

    a is uniform within 1 / sqrt(inward), as in the authors' code and in peft. (Departure from the
    paper, where it is Gaussian.) Each kernel gets a key by its path, so the a of a kernel does not
    depend on the other targets.

    Args:
      key: for a.
      params: arrays or their ShapeDtypeStructs; only shapes are read.
      config: which kernels to adapt.

    Returns:
      A nested dict with the paths of the adapted kernels [L, *inward, *outward]. At each path it
      has `{"a": [L, inward, rank], "b": [L, rank, outward]}`, each side flattened to one axis.

    Raises:
      ValueError: a target that is found in no kernel's path; the paths are listed.
    """
    kernels = adaptable(params)
    for pattern in config.targets:
        if not any(re.search(pattern, path) for path in kernels):
            listed = "\n  ".join(kernels) or "(none: params has no blocks/.../kernel)"
            raise ValueError(
                f"targets: {pattern!r} is found in no path that can be adapted:\n  {listed}"
            )
    flat = {}
    for path, leaf in kernels.items():
        if any(re.search(pattern, path) for pattern in config.targets):
            layers, inward, outward = sizes(path, leaf.shape)
            path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            bound, shape = inward**-0.5, (layers, inward, config.rank)
            # a: [L, inward, rank], b: [L, rank, outward]
            flat[f"{path}/a"] = jax.random.uniform(path_key, shape, jnp.float32, -bound, bound)
            flat[f"{path}/b"] = jnp.zeros((layers, config.rank, outward), jnp.float32)
    return traverse_util.unflatten_dict(flat, sep="/")


def adapt(base: Params, adapters: Adapters, config: LoraConfig) -> Params:
    """Put the adapters beside their kernels: parameters for `Model.apply`, `prefill` and `decode`.

    The model computes x @ kernel + scale * (x @ a) @ b. Nothing of a kernel's size is made, neither
    merged weights nor their gradient, and gradients flow to `adapters` only. In float32 the numbers
    are those of `apply`. In bfloat16, a change that is smaller than the rounding of the kernel is
    kept here, where a merged kernel would lose it.

    Raises:
      ValueError: an adapter that fits no kernel of `base`; its path is named.
    """
    kernels = traverse_util.flatten_dict(jax.lax.stop_gradient(base), sep="/")
    for path, pair in pairs(adapters).items():
        _check_shapes(path, pair, kernels)
        kernels[path] = AdaptedKernel(kernels[path], pair["a"], pair["b"], config.scale)
    return traverse_util.unflatten_dict(kernels, sep="/")


def apply(base: Params, adapters: Adapters, config: LoraConfig) -> Params:
    """Compute kernel + scale * a @ b at every adapted path; all other arrays are those of `base`.

    Gradients flow to `adapters` only. The sum has the wider dtype of kernel and adapters, so that
    small changes of a bfloat16 base are not rounded away. The model casts it to its compute dtype
    layer by layer.

    Memory: the adapted kernels exist a second time, in that dtype, so training takes `adapt`.

    Raises:
      ValueError: an adapter that fits no kernel of `base`; its path is named.
    """
    kernels = traverse_util.flatten_dict(jax.lax.stop_gradient(base), sep="/")
    for path, pair in pairs(adapters).items():
        delta = config.scale * _product(path, pair, kernels)  # [L, inward, outward]
        kernels[path] = kernels[path] + delta.reshape(kernels[path].shape)  # [L, *inward, *outward]
    return traverse_util.unflatten_dict(kernels, sep="/")


def merge(base: Params, adapters: Adapters, config: LoraConfig) -> Params:
    """Compute `apply` and round to the dtypes of `base`: for `huggingface.save`."""
    return jax.tree.map(lambda x, old: x.astype(old.dtype), apply(base, adapters, config), base)


def adaptable(params: Params) -> dict:
    """Find the kernels that can be adapted: path -> leaf."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: leaf for path, leaf in flat.items() if re.match(r"blocks/.*/kernel$", path)}


def adapted(params: Params, adapters: Adapters) -> dict:
    """Find the kernels that these adapters change: path -> leaf."""
    kernels = adaptable(params)
    return {path: kernels[path] for path in pairs(adapters)}


def inward_axes(path: str) -> int:
    """Count the axes of a kernel, after that of layers, that a product sums over.

    The attention's output projection has two, heads and their size; all other kernels have one.
    """
    return 2 if path.endswith("attention/out/kernel") else 1


def sizes(path: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Compute (layers, inward, outward) of a stacked kernel, each side flattened to one axis."""
    middle = 1 + inward_axes(path)
    return shape[0], math.prod(shape[1:middle]), math.prod(shape[middle:])


def pairs(adapters: Adapters) -> dict[str, dict[str, Array]]:
    """Group the arrays of adapters by kernel: path of the kernel -> {"a": ..., "b": ...}."""
    by_kernel: dict[str, dict[str, Array]] = {}
    for path, leaf in traverse_util.flatten_dict(adapters, sep="/").items():
        kernel, _, name = path.rpartition("/")
        by_kernel.setdefault(kernel, {})[name] = leaf
    return by_kernel


def _product(path: str, pair: dict[str, Array], kernels: dict) -> Array:
    """Compute a @ b, [L, inward, outward]."""
    _check_shapes(path, pair, kernels)
    # In full float32, where accelerators would round the inputs by default: it costs little.
    return jnp.einsum("lir,lro->lio", pair["a"], pair["b"], precision=jax.lax.Precision.HIGHEST)


def _check_shapes(path: str, pair: dict[str, Array], kernels: dict) -> None:
    """Raise ValueError if a pair of adapters does not fit the kernel at its path."""
    if path not in kernels:
        raise ValueError(f"adapters: {path}: the model has no such kernel")
    layers, inward, outward = sizes(path, kernels[path].shape)
    shapes = {name: leaf.shape for name, leaf in sorted(pair.items())}
    rank = shapes.get("a", (0,))[-1]
    expected = {"a": (layers, inward, rank), "b": (layers, rank, outward)}
    if shapes != expected:
        raise ValueError(
            f"adapters: {path}: has the shapes {shapes}, but the kernel needs {expected}"
        )
