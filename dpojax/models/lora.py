"""LoRA (Hu et al. 2021) on any decoder, as functions of the parameter tree.

    adapters = lora.init(key, base, config)
    hidden = model.apply(lora.apply(base, adapters, config), rows)   # the policy
    hidden = model.apply(base, rows)                                 # the reference: adapters off

The model knows nothing of it. `lora_peft` exchanges adapters with the peft library.
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

Adapters = dict

# a lies over the mesh as the kernel's inward axes do and b as its outward axes, so that a @ b
# comes out sharded like the kernel and nothing is communicated; the rank is never sharded.
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
    """Which kernels are adapted, and by how much.

    rank: columns of a, rows of b. alpha: a @ b is multiplied by alpha / rank, or with
    `rank_stabilised` by alpha / sqrt(rank) (Kalajdzievski 2023). targets: regular expressions that
    are searched for in the paths of the blocks' kernels, such as `blocks/mlp/up/kernel`; by
    default they find all of them. Embeddings, norms, biases and the head cannot be adapted.

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
    """New adapters, float32: a random, b zero, so that they change nothing yet.

    A dict with the paths of the targeted kernels [L, *inward, *outward]; at each stand
    `{"a": [L, inward, rank], "b": [L, rank, outward]}`, the axes of either side flattened to one.
    a is uniform within 1 / sqrt(inward), as in the authors' code and in peft (the paper: Gaussian).

    Args:
      params: arrays or their ShapeDtypeStructs; only shapes are read.

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
            own = jax.random.fold_in(key, zlib.crc32(path.encode()))
            bound, shape = inward**-0.5, (layers, inward, config.rank)
            flat[f"{path}/a"] = jax.random.uniform(own, shape, jnp.float32, -bound, bound)
            flat[f"{path}/b"] = jnp.zeros((layers, config.rank, outward), jnp.float32)
    return traverse_util.unflatten_dict(flat, sep="/")


def apply(base: Params, adapters: Adapters, config: LoraConfig) -> Params:
    """`base` with kernel + scale * a @ b at every adapted path; all else is `base` itself.

    Gradients reach `adapters` only. The sum is made, and left, in the wider dtype of kernel and
    adapters: a bfloat16 base keeps small deltas, and the model casts to its compute dtype layer by
    layer.

    Memory: the adapted kernels exist a second time, in that dtype, for as long as the forward and
    backward pass want them, and their gradient [L, inward, outward] exists until it is contracted
    to those of a and b. What LoRA spares here is the optimiser's state and checkpoints.

    Raises:
      ValueError: an adapter that fits no kernel of `base`; its path is named.
    """
    kernels = traverse_util.flatten_dict(jax.lax.stop_gradient(base), sep="/")
    for path, pair in pairs(adapters).items():
        delta = config.scale * _product(path, pair, kernels)
        kernels[path] = kernels[path] + delta.reshape(kernels[path].shape)
    return traverse_util.unflatten_dict(kernels, sep="/")


def merge(base: Params, adapters: Adapters, config: LoraConfig) -> Params:
    """`apply`, rounded to the dtypes of `base`: for `huggingface.save`."""
    return jax.tree.map(lambda x, old: x.astype(old.dtype), apply(base, adapters, config), base)


def adaptable(params: Params) -> dict:
    """path -> leaf of every kernel that can be adapted."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: leaf for path, leaf in flat.items() if re.match(r"blocks/.*/kernel$", path)}


def adapted(params: Params, adapters: Adapters) -> dict:
    """path -> leaf of the kernels that the adapters change."""
    kernels = adaptable(params)
    return {path: kernels[path] for path in pairs(adapters)}


def inward_axes(path: str) -> int:
    """How many axes of a kernel, after that of layers, are summed over: heads and their size."""
    return 2 if path.endswith("attention/out/kernel") else 1


def sizes(path: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(layers, inward, outward) of a stacked kernel."""
    middle = 1 + inward_axes(path)
    return shape[0], math.prod(shape[1:middle]), math.prod(shape[middle:])


def pairs(adapters: Adapters) -> dict[str, dict[str, Array]]:
    """path of a kernel -> its {"a": ..., "b": ...}."""
    found: dict[str, dict[str, Array]] = {}
    for path, leaf in traverse_util.flatten_dict(adapters, sep="/").items():
        kernel, _, name = path.rpartition("/")
        found.setdefault(kernel, {})[name] = leaf
    return found


def _product(path: str, pair: dict[str, Array], kernels: dict) -> Array:
    """a @ b, [L, inward, outward]."""
    if path not in kernels:
        raise ValueError(f"adapters: {path}: the model has no such kernel")
    layers, inward, outward = sizes(path, kernels[path].shape)
    found = {name: leaf.shape for name, leaf in sorted(pair.items())}
    rank = found.get("a", (0,))[-1]
    wanted = {"a": (layers, inward, rank), "b": (layers, rank, outward)}
    if found != wanted:
        raise ValueError(f"adapters: {path}: has the shapes {found}, but the kernel wants {wanted}")
    # A float32 product even where accelerators would round its inputs: it costs next to nothing.
    return jnp.einsum("lir,lro->lio", pair["a"], pair["b"], precision=jax.lax.Precision.HIGHEST)
