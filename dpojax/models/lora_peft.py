"""LoRA adapters in the format of the peft library, both ways: `save_peft`, `load_peft`.

Their tensors are `base_model.model.MODULE.lora_A.weight` [rank, in] and `lora_B.weight`
[out, rank] for a torch Linear and for GPT-2's Conv1D alike; which MODULE holds which of our
kernels, and in which order, is read from the family's name map.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from dpojax.models import safetensors_io
from dpojax.models.config import DecoderConfig
from dpojax.models.decoder import build
from dpojax.models.families import Family, config_to_raw, family_of
from dpojax.models.lora import Adapters, LoraConfig, adaptable, inward_axes, pairs, sizes
from dpojax.models.safetensors_io import Stored, Tensor
from dpojax.models.weights import Weight
from dpojax.sharding import to_host

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

# What does not change the function that a saved adapter computes, or is read elsewhere here.
_HARMLESS = """
peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules exclude_modules
task_type auto_mapping peft_version base_model_name_or_path revision inference_mode lora_dropout
fan_in_fan_out megatron_core qalora_group_size eva_config runtime_config ensure_weight_tying
"""
HARMLESS = frozenset(_HARMLESS.split())
# Other ways to begin (PiSSA, OLoRA, ...) also change the base.
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
    """A folder that `peft.PeftModel.from_pretrained` reads; written beside its place, then moved.

    One module of theirs that holds several kernels (GPT-2's `c_attn`) gets the ranks of all of
    them, with zeros between: the same product, exactly, under `rank_pattern`. In a run of several
    processes all must call it; the first one writes.

    Args:
      raw: the base model's config.json; None: `config_to_raw(decoder_config)`.
      base: the folder or hub name of the base model, for `AutoPeftModel`.

    Raises:
      FileExistsError: `folder` exists and is not empty, or is a file.
      ValueError: adapters that are not of this model.
    """
    folder = pathlib.Path(folder)
    adapters = to_host(adapters)  # small, unlike the base
    family = family_of(config_to_raw(decoder_config) if raw is None else raw)
    tensors, ranks, conv1d = _outgoing(family, decoder_config, adapters)
    if jax.process_index() == 0:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise FileExistsError(f"{folder}: is already there and not empty; choose a new folder")
        partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
        partial.mkdir(parents=True)
        try:
            text = json.dumps(_peft_config(config, ranks, conv1d, base), indent=2) + "\n"
            (partial / CONFIG).write_text(text)
            safetensors_io.write_file(partial / TENSORS, tensors)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("dpojax.models.lora_peft.save_peft")


def load_peft(
    folder: str | os.PathLike, decoder_config: DecoderConfig, raw: dict | None = None
) -> tuple[Adapters, LoraConfig]:
    """Adapters that peft (or `save_peft`) wrote, float32, and their config.

    Where one adapter of theirs covers several kernels (`c_attn`), each of ours gets its own copy
    of `a`: the same function, but training moves the copies apart. A rank or alpha of its own
    (`rank_pattern`, `alpha_pattern`) is kept, its scale multiplied into `b`.

    Args:
      raw: the base model's config.json; None: `config_to_raw(decoder_config)`.

    Raises:
      FileNotFoundError: no adapter_config.json or adapter_model.safetensors.
      ValueError: a setting of peft's that changes the function and is not supported (DoRA, biases,
        `modules_to_save`, ...); a tensor that is missing, unknown or of a wrong shape. It is named.
    """
    folder = pathlib.Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: not there; is this a folder of peft's?")
    settings = json.loads((folder / CONFIG).read_text())
    _understood(settings, folder / CONFIG)
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


def _understood(settings: dict, file: pathlib.Path) -> None:
    """Raises ValueError, naming file and key, for what this module would compute otherwise."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type: {settings.get('peft_type')!r} is not 'LORA'")
    for key in ("r", "lora_alpha"):
        if not isinstance(settings.get(key), int | float):
            raise ValueError(f"{file}: {key}: expected a number, got {settings.get(key)!r}")
    for key, value in settings.items():
        if key in HARMLESS or (key not in FIXED and not value):
            continue
        if value not in FIXED.get(key, ()):
            raise ValueError(
                f"{file}: {key}: {value!r} is not supported; in peft, merge the adapter into its "
                "base (merge_and_unload), save that and load it as a model"
            )


class _Module(NamedTuple):
    """One of their modules: its weight in the family's map, and our kernels' shapes in a layer."""

    weight: Weight
    shapes: list[tuple[int, ...]]

    @property
    def short(self) -> str:
        """Its name within a layer, as peft's target_modules has it: `self_attn.q_proj`."""
        return self.weight.name.partition("{layer}.")[2].removesuffix(".weight")

    @property
    def is_conv1d(self) -> bool:
        """Whether the kernel is [in, out] (transformers' Conv1D), not torch's [out, in]."""
        ours, theirs = self.weight.layout.split(" -> ")
        return theirs[0] == ours[0]

    @property
    def inward(self) -> int:
        return sizes(self.weight.paths[0], (1, *self.shapes[0]))[1]

    @property
    def outward(self) -> list[int]:
        """Of each of our kernels."""
        return [sizes(p, (1, *s))[2] for p, s in zip(self.weight.paths, self.shapes)]

    def full(self, layer: int) -> str:
        """Its name in the base model."""
        return self.weight.name.format(layer=layer).removesuffix(".weight")

    def from_rank(self, rank: int) -> list[tuple[int, ...]]:
        """The shapes of our kernels, did they map from `rank` numbers: those of b."""
        axes = inward_axes(self.weight.paths[0])
        return [(rank, *(1,) * (axes - 1), *shape[axes:]) for shape in self.shapes]

    def join(self, parts: list[np.ndarray]) -> np.ndarray:
        """lora_B [out, rank] of one layer, from b [rank, outward] of each kernel."""
        shapes = self.from_rank(len(parts[0]))
        joined = self.weight.join([b.reshape(shape) for b, shape in zip(parts, shapes)])
        return joined.T if self.is_conv1d else joined

    def split(self, lora_b: np.ndarray) -> list[np.ndarray]:
        """The inverse of `join`."""
        rank = lora_b.shape[1]
        kernel = lora_b.T if self.is_conv1d else lora_b
        return [b.reshape(rank, -1) for b in self.weight.split(kernel, self.from_rank(rank))]


def _modules(family: Family, decoder_config: DecoderConfig) -> Iterator[_Module]:
    """Their modules whose kernels this model has."""
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
    """peft's tensors, {module: rank}, and whether the base's kernels are Conv1D's."""
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
    """(lora_A, lora_B) of one layer: each part has `rank` ranks of its own; zeros elsewhere."""
    lora_a = np.zeros((rank * len(parts), module.inward), np.float32)
    wide = [np.zeros((rank * len(parts), size), np.float32) for size in module.outward]
    for number, part in enumerate(parts):
        if part:
            start, own = number * rank, part["a"].shape[-1]
            lora_a[start : start + own] = part["a"][layer].T
            wide[number][start : start + own] = part["b"][layer]
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
        lora_a, lora_b = zip(*[_layer_pair(module, layer, tensors, unread) for layer in layers])
        if len(ranks := {len(a) for a in lora_a}) > 1:
            raise ValueError(f"{module.short}: layers differ in rank, {sorted(ranks)}")
        rank = ranks.pop()
        ratio = _alpha(settings, module.full(0)) / config.divisor(rank) / config.scale
        for path, a, b in _parts(module, lora_a, lora_b, config.rank):
            flat[f"{path}/a"] = jnp.asarray(a, jnp.float32)
            flat[f"{path}/b"] = jnp.asarray(b if math.isclose(ratio, 1.0) else ratio * b)
    for name, stored in sorted(unread.items()):
        raise ValueError(f"{stored.file}: tensor {name!r} is not an adapter of this model's blocks")
    return traverse_util.unflatten_dict(flat, sep="/")


def _layer_pair(
    module: _Module, layer: int, tensors: dict[str, Stored], unread: dict[str, Stored]
) -> list[np.ndarray]:
    """Checked (lora_A, lora_B) of one layer, float32, taken out of `unread`."""
    file, found = next(iter(tensors.values())).file, []
    for name in _names(module, layer):
        if name not in tensors:
            raise ValueError(f"{file}: tensor {name!r} is missing; every layer needs its adapter")
        found.append(np.asarray(unread.pop(name).view, np.float32))
        shape, rank = found[-1].shape, found[0].shape[0]
        wanted = (rank, module.inward) if len(found) == 1 else (sum(module.outward), rank)
        if shape != wanted:
            raise ValueError(f"{file}: tensor {name!r} has shape {shape}, the model wants {wanted}")
    return found


def _alpha(settings: dict, module: str) -> float:
    """lora_alpha of a module; peft takes the first pattern that matches the end of its name."""
    for pattern, alpha in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return alpha
    return settings["lora_alpha"]


def _parts(module: _Module, lora_a, lora_b, rank: int) -> Iterator[tuple]:
    """(path, a [L, inward, rank], b [L, rank, outward]) of each of our kernels in their module."""
    paths, total = module.weight.paths, len(lora_a[0])
    a = np.stack([one.T for one in lora_a])
    bs = [np.stack(layers) for layers in zip(*map(module.split, lora_b))]
    own = [slice(number * rank, (number + 1) * rank) for number in range(len(paths))]
    # As `save_peft` writes a fused module: every part has ranks of its own, and zeros elsewhere.
    apart = total == rank * len(paths) and not any(
        np.delete(b, ranks, axis=1).any() for b, ranks in zip(bs, own)
    )
    for path, b, ranks in zip(paths, bs, own):
        yield (path, a[:, :, ranks], b[:, ranks]) if apart else (path, a, b)
