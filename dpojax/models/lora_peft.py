"""Read and write LoRA adapters in the format of the peft library: `load_peft`, `save_peft`.

peft's tensors are `base_model.model.MODULE.lora_A.weight` [rank, in] and `lora_B.weight`
[out, rank], both for a torch Linear and for GPT-2's Conv1D. The family's name map says which MODULE
holds which of our kernels, and in which order.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from dpojax import storage
from dpojax.models import safetensors_io
from dpojax.models.config import DecoderConfig
from dpojax.models.config_values import NAME, NAMES, OBJECT, Real, Whole, shown
from dpojax.models.decoder import build
from dpojax.models.families import Family, config_to_raw, family_of
from dpojax.models.huggingface import require_new_folder
from dpojax.models.lora import Adapters, LoraConfig, adaptable, inward_axes, pairs, sizes
from dpojax.models.safetensors_io import Stored, Tensor
from dpojax.models.weights import Weight
from dpojax.sharding import to_host

CONFIG, TENSORS = FILES = ("adapter_config.json", "adapter_model.safetensors")

# Settings of peft that do not change what a saved adapter computes, or that are read below.
_HARMLESS = """
peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules
task_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout
fan_in_fan_out megatron_core qalora_group_size eva_config runtime_config ensure_weight_tying
layers_to_transform layers_pattern
"""
HARMLESS = frozenset(_HARMLESS.split())
ALPHA = Real(positive=False)  # of a single module
# Settings that are supported with these values only. Other initialisations (PiSSA, OLoRA, ...) also
# change the base.
FIXED = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva")}


def save_peft(
    folder: str | os.PathLike,
    adapters: Adapters,
    config: LoraConfig,
    decoder_config: DecoderConfig,
    raw: dict | None = None,
    *,
    base: str | None = None,
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` reads. It appears as a whole.

    If one module of peft's holds several of our kernels (GPT-2's `c_attn`), its rank is the sum of
    their ranks, set by `rank_pattern`. Zeros between them make the product exactly the same.

    With several processes, all of them make this call and the first one writes.

    Args:
      folder: a local folder or one on a bucket.
      raw: the base model's config.json; None is `config_to_raw(decoder_config)`.
      base: the folder or hub name of the base model, for `AutoPeftModel`.

    Raises:
      FileExistsError: `folder` exists and is not empty, or is a file.
      ValueError: the adapters do not fit this model.
    """
    adapters = to_host(adapters)  # small, unlike the base
    family = family_of(config_to_raw(decoder_config) if raw is None else raw)
    tensors, ranks, conv1d = _outgoing(family, decoder_config, adapters)
    if jax.process_index() == 0:
        require_new_folder(folder)
        with storage.replacing_folder(storage.as_path(folder)) as unfinished:
            safetensors_io.write_file(unfinished / TENSORS, tensors)
            storage.write_json(unfinished / CONFIG, _peft_config(config, ranks, conv1d, base))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("dpojax.models.lora_peft.save_peft")


def load_peft(
    folder: str | os.PathLike, decoder_config: DecoderConfig, raw: dict | None = None
) -> tuple[Adapters, LoraConfig]:
    """Load adapters that peft or `save_peft` wrote, in float32, and their config.

    If one adapter of peft's covers several of our kernels (`c_attn`), each kernel gets its own copy
    of `a`. The function is the same, but training moves the copies apart. A module's own rank or
    alpha (`rank_pattern`, `alpha_pattern`), which may differ from layer to layer, is kept: its
    scale is multiplied into `b`, and smaller ranks are filled with zeros. A layer that peft does
    not adapt (`layers_to_transform`, `exclude_modules`) gets zeros, which training does not move.

    Args:
      folder: a local folder or one on a bucket.
      raw: the base model's config.json; None is `config_to_raw(decoder_config)`.

    Raises:
      FileNotFoundError: there is no adapter_config.json or no adapter_model.safetensors.
      ValueError: a setting of peft's changes the function and is not supported (DoRA, biases,
        `modules_to_save`, ...); a tensor is missing, unknown or of a wrong shape. The message
        names it.
    """
    folder = storage.as_path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: not there; is this a folder of peft's?")
    folder = storage.local_copy(folder, (CONFIG, TENSORS))
    settings = safetensors_io.read_object(folder / CONFIG)
    _require_supported(settings, folder / CONFIG)
    config = LoraConfig(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        rank_stabilised=bool(settings.get("use_rslora")),
    )
    tensors = safetensors_io.read_file(folder / TENSORS)
    family = family_of(config_to_raw(decoder_config) if raw is None else raw)
    adapters = _incoming(family, decoder_config, tensors, settings, config)
    targets = tuple(f"^{path}$" for path in sorted(pairs(adapters)))
    return adapters, dataclasses.replace(config, targets=targets)


def _peft_config(config: LoraConfig, ranks: dict[str, int], conv1d: bool, base: str | None) -> dict:
    other = {module: rank for module, rank in ranks.items() if rank != config.rank}
    alphas = {module: config.scale * config.divisor(rank) for module, rank in other.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rank_stabilised,
        "target_modules": sorted(ranks),
        # peft reads these keys as patterns.
        "rank_pattern": {re.escape(module): rank for module, rank in other.items()},
        "alpha_pattern": {re.escape(module): alpha for module, alpha in alphas.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": conv1d,
    }


def _require_supported(settings: dict, file: pathlib.Path) -> None:
    """Raise ValueError, naming file and key, for a setting that this module would ignore."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type: {settings.get('peft_type')!r} is not 'LORA'")
    for key, kind in {"r": Whole(1, 100_000), "lora_alpha": Real(positive=True)}.items():
        if not kind.allows(settings.get(key)):
            raise ValueError(f"{file}: {key}: must be {kind}, not {shown(settings.get(key))}")
    for key, value in settings.items():
        if key in HARMLESS or (key not in FIXED and not value):
            continue
        if value not in FIXED.get(key, ()):
            raise ValueError(
                f"{file}: {key}: {value!r} is not supported; in peft, merge the adapter into its "
                "base (merge_and_unload), save that and load it as a model"
            )
    for key in ("alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"):
        if settings.get(key):
            _require_patterns(settings[key], f"{file}: {key}", alphas=key == "alpha_pattern")


def _require_patterns(value: Any, name: str, *, alphas: bool) -> None:
    """Raise ValueError, which begins with `name`, unless a setting names modules by patterns."""
    if not alphas and not NAME.allows(value) and not NAMES.allows(value):
        raise ValueError(f"{name}: must be a string or {NAMES}, not {shown(value)}")
    if alphas and not (OBJECT.allows(value) and all(map(ALPHA.allows, value.values()))):
        raise ValueError(f"{name}: must map each module to {ALPHA}, not {shown(value)}")
    try:
        for pattern in [value] if isinstance(value, str) else value:
            re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {shown(pattern)} is no pattern ({error})") from error


class _Module(NamedTuple):
    """A module of peft's: its weight in the family's map, and our kernels' shapes in a layer."""

    weight: Weight
    shapes: list[tuple[int, ...]]

    @property
    def short(self) -> str:
        """The name within a layer, as in peft's target_modules: `self_attn.q_proj`."""
        return self.weight.name.partition("{layer}.")[2].removesuffix(".weight")

    @property
    def is_conv1d(self) -> bool:
        """Whether the kernel is [in, out] (transformers' Conv1D), not torch's [out, in]."""
        ours, theirs = self.weight.layout.split(" -> ")
        return theirs[0] == ours[0]

    @property
    def inward(self) -> int:
        """The number of inputs."""
        return sizes(self.weight.paths[0], (1, *self.shapes[0]))[1]

    @property
    def outward(self) -> list[int]:
        """The number of outputs of each of our kernels."""
        return [sizes(p, (1, *s))[2] for p, s in zip(self.weight.paths, self.shapes)]

    def full(self, layer: int) -> str:
        """Return the name in the base model."""
        return self.weight.name.format(layer=layer).removesuffix(".weight")

    def from_rank(self, rank: int) -> list[tuple[int, ...]]:
        """Return the shapes of b for each kernel: the kernel's shape with `rank` inputs."""
        axes = inward_axes(self.weight.paths[0])
        return [(rank, *(1,) * (axes - 1), *shape[axes:]) for shape in self.shapes]

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """Return lora_B [out, rank] of one layer, made from b [rank, outward] of each kernel."""
        shapes = self.from_rank(len(parts[0]))
        joined = self.weight.join([b.reshape(shape) for b, shape in zip(parts, shapes)])
        return joined.T if self.is_conv1d else joined

    def split(self, lora_b: np.ndarray) -> list[np.ndarray]:
        """Return b [rank, outward] of each kernel: the inverse of `join`."""
        rank = lora_b.shape[1]
        kernel = lora_b.T if self.is_conv1d else lora_b
        return [b.reshape(rank, -1) for b in self.weight.split(kernel, self.from_rank(rank))]


def _modules(family: Family, decoder_config: DecoderConfig) -> Iterator[_Module]:
    """Yield the modules of peft's whose kernels this model has."""
    kernels = adaptable(jax.eval_shape(build(decoder_config).init, jax.random.key(0)))
    for weight in family.weights:
        if all(path in kernels for path in weight.paths):
            yield _Module(weight, [kernels[path].shape[1:] for path in weight.paths])


def _names(module: _Module, layer: int) -> tuple[str, str]:
    stem = f"base_model.model.{module.full(layer)}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _outgoing(
    family: Family, decoder_config: DecoderConfig, adapters: Adapters
) -> tuple[list[Tensor], dict[str, int], bool]:
    """Return peft's tensors, {module: rank}, and whether the base's kernels are Conv1D's."""
    ours, tensors, ranks, conv1d = pairs(adapters), [], {}, False
    for module in _modules(family, decoder_config):
        parts = [ours.pop(path, None) for path in module.weight.paths]
        if not any(parts):
            continue
        rank = max(part["a"].shape[-1] for part in parts if part)
        for layer in range(decoder_config.layers):
            made = _module_pair(module, parts, rank, layer)
            for name, value in zip(_names(module, layer), made):
                fetch = lambda value=value: value
                tensors.append(Tensor(name, value.shape, value.dtype, fetch))
        ranks[module.short] = rank * len(parts)
        conv1d |= module.is_conv1d
    if ours:
        raise ValueError(f"adapters: {min(ours)}: this model has no such kernel")
    return tensors, ranks, conv1d


def _module_pair(
    module: _Module, parts: list[dict | None], rank: int, layer: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (lora_A, lora_B) of one layer. Each part fills `rank` ranks; the others are zero."""
    lora_a = np.zeros((rank * len(parts), module.inward), np.float32)
    wide = [np.zeros((rank * len(parts), size), np.float32) for size in module.outward]
    for number, part in enumerate(parts):
        if part:
            start = number * rank
            end = start + part["a"].shape[-1]
            lora_a[start:end] = part["a"][layer].T
            wide[number][start:end] = part["b"][layer]
    return lora_a, module.join(wide)


def _incoming(
    family: Family,
    decoder_config: DecoderConfig,
    tensors: dict[str, Stored],
    settings: dict,
    config: LoraConfig,
) -> Adapters:
    flat, unread = {}, dict(tensors)
    for module in _modules(family, decoder_config):
        layers = range(decoder_config.layers)
        if not any(name in tensors for layer in layers for name in _names(module, layer)):
            continue
        layer_pairs = [_layer_pair(module, layer, tensors, unread, settings) for layer in layers]
        for layer, pair in enumerate(layer_pairs):
            divisor = config.divisor(max(1, len(pair[0]))) * config.scale
            ratio = _alpha(settings, module.full(layer)) / divisor
            if not math.isclose(ratio, 1.0):
                pair[1] = ratio * pair[1]
        for path, a, b in _parts(module, *_of_one_rank(layer_pairs), config.rank):
            flat[f"{path}/a"] = jnp.asarray(a, jnp.float32)
            flat[f"{path}/b"] = jnp.asarray(b, jnp.float32)
    for name, stored in sorted(unread.items()):
        raise ValueError(f"{stored.file}: tensor {name!r} is not an adapter of this model's blocks")
    return traverse_util.unflatten_dict(flat, sep="/")


def _layer_pair(
    module: _Module,
    layer: int,
    tensors: dict[str, Stored],
    unread: dict[str, Stored],
    settings: dict,
) -> list[np.ndarray]:
    """Take (lora_A, lora_B) of one layer out of `unread`, as float32, and check their shapes.

    Both have no rank where peft does not adapt the layer.
    """
    file, pair = next(iter(tensors.values())).file, []
    names, outward = _names(module, layer), sum(module.outward)
    if not any(name in tensors for name in names) and not _adapts(settings, module.full(layer)):
        return [np.zeros((0, module.inward), np.float32), np.zeros((outward, 0), np.float32)]
    for name in names:
        if name not in tensors:
            raise ValueError(
                f"{file}: tensor {name!r} is missing; the settings adapt its layer as well"
            )
        stored = unread.pop(name)
        stored.require_float(name)
        pair.append(np.asarray(stored.view, np.float32))
        stored.require_finite(name, pair[-1])
        shape, rank = pair[-1].shape, len(np.atleast_1d(pair[0]))
        expected = (rank, module.inward) if len(pair) == 1 else (outward, rank)
        if shape != expected:
            raise ValueError(
                f"{file}: tensor {name!r} has shape {shape}, the model wants {expected}"
            )
    return pair


def _of_one_rank(layer_pairs: list[list[np.ndarray]]) -> tuple[list, list]:
    """Return all lora_A and all lora_B, filled with zeros to the largest rank of a layer."""
    most = max(len(a) for a, _ in layer_pairs)
    lora_a = [np.pad(a, ((0, most - len(a)), (0, 0))) for a, _ in layer_pairs]
    return lora_a, [np.pad(b, ((0, 0), (0, most - b.shape[1]))) for _, b in layer_pairs]


def _adapts(settings: dict, module: str) -> bool:
    """Whether peft adapts a module: `check_target_module_exists` of its tuners."""
    if _is_among(settings.get("exclude_modules"), module):
        return False
    targets, layers = settings.get("target_modules"), settings.get("layers_to_transform")
    if layers in (None, []) or isinstance(targets, str) or module in (targets or ()):
        return _is_among(targets, module)
    patterns = settings.get("layers_pattern") or r"[^.]*"
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            adapted_layers = layers if isinstance(layers, list) else [layers]
            return int(match[1]) in adapted_layers and _is_among(targets, module)
    return False


def _is_among(names: str | list[str] | None, module: str) -> bool:
    """Whether a pattern is a module's whole name, or one of several names is the end of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _alpha(settings: dict, module: str) -> float:
    """Return a module's lora_alpha: peft takes the first pattern that matches the name's end."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return alpha
    return settings["lora_alpha"]


def _parts(module: _Module, lora_a, lora_b, rank: int) -> Iterator[tuple]:
    """Yield (path, a [L, inward, rank], b [L, rank, outward]) of each kernel in a module."""
    paths, total = module.weight.paths, len(lora_a[0])
    a = np.stack([one.T for one in lora_a])
    bs = [np.stack(layers) for layers in zip(*map(module.split, lora_b))]
    rank_slices = [slice(number * rank, (number + 1) * rank) for number in range(len(paths))]
    # `save_peft` writes a fused module so that each part has its own ranks, and zeros elsewhere.
    apart = total == rank * len(paths) and not any(
        np.delete(b, ranks, axis=1).any() for b, ranks in zip(bs, rank_slices)
    )
    for path, b, ranks in zip(paths, bs, rank_slices):
        yield (path, a[:, :, ranks], b[:, ranks]) if apart else (path, a, b)
