"""Hugging Face checkpoints in and out, without torch: `load`, `save`, `read_config`."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from dpojax.models import safetensors_io
from dpojax.models.config import DecoderConfig
from dpojax.models.decoder import SHARDING_RULES, Params, build
from dpojax.models.families import (
    Family,
    config_from_raw,
    config_to_raw,
    differences,
    family_of,
)
from dpojax.models.safetensors_io import Stored, Tensor
from dpojax.models.weights import Weight
from dpojax.sharding import tree_shardings

__all__ = ["config_to_raw", "load", "read_config", "save"]

# Some repositories also hold the weights in other formats, or twice.
FILES = ["*.json", "model*.safetensors"]


def read_config(path: str | os.PathLike) -> tuple[DecoderConfig, dict]:
    """The configuration in a folder, or of a model on the hub, and config.json as it is.

    Raises:
      FileNotFoundError: the folder has no config.json.
      ValueError: a model_type, key or value that is not supported; it is named.
    """
    file = _folder(path, ["config.json"]) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not there; is this a Hugging Face model folder?")
    raw = json.loads(file.read_text())
    try:
        return config_from_raw(raw), raw
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load(
    path: str | os.PathLike, *, mesh: Mesh | None = None, dtype=jnp.float32
) -> tuple[DecoderConfig, Params, dict]:
    """A checkpoint's configuration, weights and config.json.

    Files are mapped, not read: every device's shard is copied out of them layer by layer, so the
    host holds the shards of one array at a time and never the model.

    Args:
      path: a folder with safetensors, or the name of a model on the hub.
      mesh: where to put the weights (by SHARDING_RULES); None: whole, on the first device.
      dtype: of the arrays that come out, whatever the files hold.

    Raises:
      FileNotFoundError: no config.json or safetensors.
      ValueError: what `read_config` rejects; a tensor that is missing, unknown or of a wrong
        shape; a head that is stored beside the embedding it should be tied to, and differs.
    """
    folder = _folder(path, FILES)
    config, raw = read_config(folder)
    family = family_of(raw)
    shapes = jax.eval_shape(build(config).init, jax.random.key(0))
    flat = traverse_util.flatten_dict(shapes, sep="/")
    tensors = _full_names(safetensors_io.read_folder(folder), family)
    sources = _sources(family, config, flat, tensors, folder)
    if mesh is None:
        shardings = dict.fromkeys(flat, SingleDeviceSharding(jax.devices()[0]))
    else:
        tree = tree_shardings(shapes, mesh, SHARDING_RULES)
        shardings = traverse_util.flatten_dict(tree, sep="/")
    arrays = {
        name: _array(sources[name], leaf.shape, dtype, shardings[name])
        for name, leaf in flat.items()
    }
    return config, traverse_util.unflatten_dict(arrays, sep="/"), raw


def save(
    folder: str | os.PathLike,
    config: DecoderConfig,
    params: Params,
    raw: dict | None = None,
    *,
    tokenizer=None,
    generation_config=None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """A folder that `transformers.AutoModelForCausalLM.from_pretrained` reads.

    Written beside its place and moved there when complete. Tensors have the dtypes of `params`.
    In a run of several processes all must call it; the first one writes.

    Args:
      raw: config.json as `load` returned it, whose keys are kept; None: `config_to_raw(config)`.
      tokenizer: anything with `save_pretrained`; without `raw` it also gives the ids of special
        tokens. generation_config: a dict, or anything with `save_pretrained`.
      max_shard_bytes: a file is not filled beyond this, unless by a single tensor.

    Raises:
      FileExistsError: `folder` exists and is not empty, or is a file.
      ValueError: `raw` describes another model than `config`.
    """
    folder = pathlib.Path(folder)
    first = jax.process_index() == 0
    if first and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder}: is already there and not empty; choose a new folder")
    raw = _checked_raw(config, raw, params, tokenizer)
    tensors = list(_tensors(family_of(raw), config, params))
    if not first:
        for tensor in tensors:
            tensor.fetch()  # a gather that the first process takes part in
    else:
        partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
        partial.mkdir(parents=True)
        try:
            _write(partial, raw, tensors, tokenizer, generation_config, max_shard_bytes)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("dpojax.models.huggingface.save")


def _folder(path: str | os.PathLike, patterns: list[str]) -> pathlib.Path:
    if pathlib.Path(path).is_dir():
        return pathlib.Path(path)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(path)):
        raise FileNotFoundError(f"{path}: no such folder, and not a name like owner/model")
    from huggingface_hub import snapshot_download  # only a name of the hub needs it

    return pathlib.Path(snapshot_download(str(path), allow_patterns=patterns))


def _full_names(tensors: dict[str, Stored], family: Family) -> dict[str, Stored]:
    """Names as the language-model class writes them; base-model files leave the prefix out."""
    if any(name.startswith(family.prefix) for name in tensors):
        return tensors
    return {
        name if name.startswith("lm_head.") else family.prefix + name: stored
        for name, stored in tensors.items()
    }


def _weights(family: Family, config: DecoderConfig, paths):
    """(weight, layer or None, name) for every tensor that a model with these paths has."""
    for weight in family.weights:
        if not all(path in paths for path in weight.paths):
            continue
        stacked = "{layer}" in weight.name
        for layer in range(config.layers) if stacked else [None]:
            yield weight, layer, weight.name.format(layer=layer)


def _sources(
    family: Family,
    config: DecoderConfig,
    flat: dict[str, jax.ShapeDtypeStruct],
    tensors: dict[str, Stored],
    folder: pathlib.Path,
) -> dict[str, list[np.ndarray]]:
    """For each of our arrays the views it is made of: one per layer, or just one."""
    sources: dict[str, list[np.ndarray]] = {path: [] for path in flat}
    used = set()
    for weight, layer, name in _weights(family, config, flat):
        if name not in tensors:
            raise ValueError(f"{folder}: tensor {name!r} is missing")
        shapes = [flat[path].shape[layer is not None :] for path in weight.paths]
        stored, expected = tensors[name], weight.their_shape(shapes)
        if stored.view.shape != expected:
            raise ValueError(
                f"{stored.file}: tensor {name!r} has shape {stored.view.shape}, but config.json "
                f"makes it {expected}"
            )
        used.add(name)
        for path, view in zip(weight.paths, weight.split(stored.view, shapes)):
            sources[path].append(view)
    _nothing_left(family, config, tensors, used)
    return sources


def _nothing_left(
    family: Family, config: DecoderConfig, tensors: dict[str, Stored], used: set[str]
) -> None:
    for name in sorted(set(tensors) - used):
        stored = tensors[name]
        if name == "lm_head.weight" and config.tied_head:
            if not np.array_equal(stored.view, tensors[family.weights[0].name].view):
                raise ValueError(
                    f"{stored.file}: tensor 'lm_head.weight' differs from the embedding, but "
                    "config.json ties them; set tie_word_embeddings to false"
                )
        elif not re.search(family.harmless_tensors, name):
            raise ValueError(f"{stored.file}: tensor {name!r} is not one that config.json implies")


def _array(views: list[np.ndarray], shape: tuple[int, ...], dtype, sharding: Sharding) -> jax.Array:
    """A jax array whose every shard is copied from the views."""

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        if len(shape) == views[0].ndim:
            return views[0][index].astype(dtype)
        layers = [view[index[1:]] for view in views[index[0]]]
        out = np.empty((len(layers), *layers[0].shape), dtype)
        for place, layer in zip(out, layers):
            place[...] = layer
        return out

    return jax.make_array_from_callback(shape, sharding, shard)


def _checked_raw(config: DecoderConfig, raw: dict | None, params: Params, tokenizer) -> dict:
    if raw is None:
        raw = config_to_raw(config)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            raw[key] = getattr(tokenizer, key, None)
    elif differing := differences(config_from_raw(raw), config):
        raise ValueError(f"raw: does not describe config, which differs in {', '.join(differing)}")
    # transformers reads weights in the dtype that config.json names, whatever the files hold.
    dtype = str(jnp.result_type(*jax.tree.leaves(params)))
    return raw | {key: dtype for key in ("dtype", "torch_dtype") if key == "dtype" or key in raw}


def _tensors(family: Family, config: DecoderConfig, params: Params):
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
    """One of their tensors on this host, gathered from all processes where it must be."""
    arrays = leaves if layer is None else [leaf[layer] for leaf in leaves]
    return weight.join(
        [
            np.asarray(
                array
                if array.is_fully_addressable
                else multihost_utils.process_allgather(array, tiled=True)
            )
            for array in arrays
        ]
    )


def _write(
    folder: pathlib.Path,
    raw: dict,
    tensors: list[Tensor],
    tokenizer,
    generation_config,
    max_shard_bytes: int,
) -> None:
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    if hasattr(generation_config, "save_pretrained"):
        generation_config.save_pretrained(folder)
    elif generation_config is not None:
        text = json.dumps(generation_config, indent=2) + "\n"
        (folder / "generation_config.json").write_text(text)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    safetensors_io.write_folder(folder, tensors, max_shard_bytes)
