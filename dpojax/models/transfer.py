"""Reading and writing of our arrays as the tensors of a Hugging Face folder."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from dpojax.models import safetensors_io
from dpojax.models.config import DecoderConfig
from dpojax.models.decoder import SHARDING_RULES, Params
from dpojax.models.encoder import EncoderConfig
from dpojax.models.families import Family
from dpojax.models.safetensors_io import Stored, Tensor
from dpojax.models.weights import Weight
from dpojax.sharding import tree_shardings
from dpojax.watchdog import beat

Config = DecoderConfig | EncoderConfig


class _Source(NamedTuple):
    """What one of our arrays, or a layer of it, is copied from.

    Attributes:
      view: a part of a tensor in our axes.
      name: of the tensor, as our tables call it.
      stored: the whole tensor.
    """

    view: np.ndarray
    name: str
    stored: Stored


def read_params(
    folder: pathlib.Path,
    family: Family,
    config: Config,
    init: Callable,
    mesh: Mesh | None,
    dtype,
) -> Params:
    """Read the arrays that `init` would make from the safetensors in a folder.

    Args:
      folder: with one or more safetensors files.
      family: names the tensors.
      config: of the model.
      init: `init` of the model; only shapes are taken from it.
      mesh: where the arrays are put, by `SHARDING_RULES`; None: this process's first device.
      dtype: of the arrays.

    Raises:
      FileNotFoundError: no safetensors there.
      ValueError: a tensor that is missing, unknown or of a wrong shape.
    """
    shapes = jax.eval_shape(init, jax.random.key(0))
    flat = traverse_util.flatten_dict(shapes, sep="/")
    tensors = _full_names(safetensors_io.read_folder(folder), family)
    sources = _sources(family, config, flat, tensors, folder)
    if mesh is None:
        shardings = dict.fromkeys(flat, SingleDeviceSharding(jax.local_devices()[0]))
    else:
        tree = tree_shardings(shapes, mesh, SHARDING_RULES)
        shardings = traverse_util.flatten_dict(tree, sep="/")
    arrays = {
        name: _array(sources[name], leaf.shape, jnp.dtype(dtype), shardings[name])
        for name, leaf in flat.items()
    }
    return traverse_util.unflatten_dict(arrays, sep="/")


def tensors_of(family: Family, config: Config, params: Params) -> Iterator[Tensor]:
    """Yield the tensors that a folder of this family holds for these arrays."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for weight, layer, name in _weights(family, config, flat):
        leaves = [flat[path] for path in weight.paths]
        shapes = [leaf.shape[layer is not None :] for leaf in leaves]
        yield Tensor(
            name,
            weight.their_shape(shapes),
            np.dtype(leaves[0].dtype),
            lambda weight=weight, leaves=leaves, layer=layer: _fetch(weight, leaves, layer),
        )


def _fetch(weight: Weight, leaves: list[jax.Array], layer: int | None) -> np.ndarray:
    """One of their tensors on this host, gathered from all processes if they share it."""
    arrays = leaves if layer is None else [leaf[layer] for leaf in leaves]
    on_host = []
    for array in arrays:
        if not array.is_fully_addressable:
            array = multihost_utils.process_allgather(array, tiled=True)
        on_host.append(np.asarray(array))
    return weight.join(on_host)


def _full_names(tensors: dict[str, Stored], family: Family) -> dict[str, Stored]:
    """Rename tensors as our tables name them; files of base models leave the prefix out."""
    for theirs, ours in family.renamed:
        tensors = {
            ours + name.removeprefix(theirs) if name.startswith(theirs) else name: stored
            for name, stored in tensors.items()
        }
    if any(name.startswith(family.prefix) for name in tensors):
        return tensors
    heads = tuple(weight.name for weight in family.weights if not _in_trunk(weight))
    return {
        name if name in heads else family.prefix + name: stored for name, stored in tensors.items()
    }


def _in_trunk(weight: Weight) -> bool:
    return not weight.paths[0].startswith(("head/", "score/", "pooler/", "classifier/"))


def _weights(family: Family, config: Config, paths):
    """Yield (weight, layer or None, name) for every tensor that a model with these paths has."""
    for weight in family.weights:
        if not all(path in paths for path in weight.paths):
            continue
        stacked = "{layer}" in weight.name
        for layer in range(config.layers) if stacked else [None]:
            yield weight, layer, weight.name.format(layer=layer)


def _sources(
    family: Family,
    config: Config,
    flat: dict[str, jax.ShapeDtypeStruct],
    tensors: dict[str, Stored],
    folder: pathlib.Path,
) -> dict[str, list[_Source]]:
    """Find, for each of our arrays, what it is made of: a view for each layer, or one."""
    sources: dict[str, list[_Source]] = {path: [] for path in flat}
    used = set()
    for weight, layer, name in _weights(family, config, flat):
        if name not in tensors:
            head = "" if _in_trunk(weight) else ", the head that config.json's architectures imply"
            raise ValueError(f"{folder}: tensor {name!r} is missing{head}")
        shapes = [flat[path].shape[layer is not None :] for path in weight.paths]
        stored, expected = tensors[name], weight.their_shape(shapes)
        if stored.view.shape != expected:
            raise ValueError(
                f"{stored.file}: tensor {name!r} has shape {stored.view.shape}, but config.json "
                f"makes it {expected}"
            )
        stored.require_float(name)
        used.add(name)
        for path, view in zip(weight.paths, weight.split(stored.view, shapes)):
            sources[path].append(_Source(view, name, stored))
    _check_unused(family, config, tensors, used)
    return sources


def _check_unused(
    family: Family, config: Config, tensors: dict[str, Stored], used: set[str]
) -> None:
    """Refuse a tensor that the model does not use, unless it is known to be harmless."""
    names = {path: weight.name for weight in family.weights for path in weight.paths}
    embedding, head = names["embed/tokens"], names.get("head/kernel")
    for name in sorted(set(tensors) - used):
        stored = tensors[name]
        if name == head and config.tied_head and not config.scalar_head:
            if not np.array_equal(stored.view, tensors[embedding].view):
                raise ValueError(
                    f"{stored.file}: tensor {name!r} differs from the embedding, but "
                    "config.json ties them; set tie_word_embeddings to false"
                )
        elif not re.search(family.harmless_tensors, name):
            raise ValueError(f"{stored.file}: tensor {name!r} is not one that config.json implies")


def _array(
    sources: list[_Source], shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding
) -> jax.Array:
    """Make a jax array, each shard of which is copied from the views, and found to be finite."""

    def copied(source: _Source, index: tuple[slice, ...], out: np.ndarray) -> None:
        with np.errstate(over="ignore"):  # `require_finite` tells which tensor it is
            out[...] = source.view[index]
        source.stored.require_finite(source.name, out)

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        stacked = len(shape) > sources[0].view.ndim
        parts = sources[index[0]] if stacked else sources
        index = index[1:] if stacked else index
        layers = np.empty((len(parts), *parts[0].view[index].shape), dtype)
        for source, out in zip(parts, layers):
            copied(source, index, out)
            beat("weights are read")
        return layers if stacked else layers[0]

    return jax.make_array_from_callback(shape, sharding, shard)
