"""Hugging Face checkpoints in and out, without torch.

`load` and `save` exchange decoders, with a language-model or a scalar head; `load_classifier` reads
BERT-type encoders.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpojax.models import encoder, safetensors_io
from dpojax.models.config import DecoderConfig
from dpojax.models.decoder import Params, build
from dpojax.models.encoder import EncoderConfig
from dpojax.models.families import (
    DECODERS,
    ENCODERS,
    Family,
    as_classifier,
    config_from_raw,
    config_to_raw,
    differences,
    family_of,
)
from dpojax.models.safetensors_io import Tensor
from dpojax.models.transfer import read_params, tensors_of

__all__ = ["config_to_raw", "load", "load_classifier", "read_centre", "read_config", "save"]

# Some repositories also hold the weights in other formats, or twice.
FILES = ["*.json", "model*.safetensors"]
CENTRE = "reward_centre.json"


def read_config(path: str | os.PathLike) -> tuple[DecoderConfig, dict]:
    """The configuration in a folder, or of a model on the hub, and config.json as it is.

    Raises:
      FileNotFoundError: the folder has no config.json.
      ValueError: a model_type, key or value that is not supported; it is named.
    """
    return _read_config(local_folder(path, ["config.json"]), DECODERS)


def read_classifier_config(path: str | os.PathLike) -> EncoderConfig:
    """The configuration of a BERT-type classifier; errors as of `read_config`."""
    return _read_config(local_folder(path, ["config.json"]), ENCODERS)[0]


def _read_config(folder: pathlib.Path, families: Mapping[str, Family]):
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not there; is this a Hugging Face model folder?")
    raw = json.loads(file.read_text())
    try:
        return config_from_raw(raw, families), raw
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_centre(path: str | os.PathLike) -> float:
    """The score that counts as 0 in a folder with a scalar head; 0 where it does not say."""
    file = local_folder(path, [CENTRE]) / CENTRE
    return float(json.loads(file.read_text())["score"]) if file.is_file() else 0.0


def load(
    path: str | os.PathLike, *, mesh: Mesh | None = None, dtype=jnp.float32
) -> tuple[DecoderConfig, Params, dict]:
    """A checkpoint's configuration, weights and config.json.

    With `config.scalar_head` where config.json names a `...ForSequenceClassification`, and with
    `config.labels` where that has several.

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
    folder = local_folder(path, FILES)
    config, raw = _read_config(folder, DECODERS)
    init = build(config).init
    return config, read_params(folder, family_of(raw), config, init, mesh, dtype), raw


def load_classifier(
    path: str | os.PathLike, *, mesh: Mesh | None = None, dtype=jnp.float32
) -> tuple[EncoderConfig, Params, dict]:
    """As `load`, of a `BertForSequenceClassification` or `RobertaForSequenceClassification`.

    `encoder.build(config).apply(params, tokens, lengths)` then gives its logits.
    """
    folder = local_folder(path, FILES)
    config, raw = _read_config(folder, ENCODERS)
    init = encoder.build(config).init
    return config, read_params(folder, family_of(raw, ENCODERS), config, init, mesh, dtype), raw


def save(
    folder: str | os.PathLike,
    config: DecoderConfig,
    params: Params,
    raw: dict | None = None,
    *,
    tokenizer=None,
    generation_config=None,
    centre: float | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """A folder that `from_pretrained` of transformers' AutoModelForCausalLM reads.

    Or of AutoModelForSequenceClassification where `config.scalar_head`; that class wants a padding
    token in config.json (from `raw` or `tokenizer`) for more than one text.

    Written beside its place and moved there when complete. Tensors have the dtypes of `params`.
    In a run of several processes all must call it; the first one writes.

    Args:
      raw: config.json as `load` returned it, whose keys are kept; None: `config_to_raw(config)`. It
        may be that of the language model whose trunk `config` has.
      tokenizer: anything with `save_pretrained`; without `raw` it also gives the ids of special
        tokens. generation_config: a dict, or anything with `save_pretrained`.
      centre: of a scalar head: see `read_centre`. transformers has no place for it.
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
    tensors = list(tensors_of(family_of(raw), config, params))
    if not first:
        for tensor in tensors:
            tensor.fetch()  # a gather that the first process takes part in
    else:
        partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
        partial.mkdir(parents=True)
        try:
            _write(partial, raw, tensors, tokenizer, generation_config, max_shard_bytes)
            if centre is not None:
                (partial / CENTRE).write_text(json.dumps({"score": centre}) + "\n")
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("dpojax.models.huggingface.save")


def local_folder(path: str | os.PathLike, patterns: list[str]) -> pathlib.Path:
    """The folder of a model: `path` itself, or a snapshot of the hub's files that match a pattern.

    Raises:
      FileNotFoundError: no such folder, and not a name of the hub.
    """
    if pathlib.Path(path).is_dir():
        return pathlib.Path(path)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(path)):
        raise FileNotFoundError(f"{path}: no such folder, and not a name like owner/model")
    from huggingface_hub import snapshot_download  # only a name of the hub needs it

    return pathlib.Path(snapshot_download(str(path), allow_patterns=patterns))


def _checked_raw(config: DecoderConfig, raw: dict | None, params: Params, tokenizer) -> dict:
    if raw is None:
        raw = config_to_raw(config)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            raw[key] = getattr(tokenizer, key, None)
    elif differences(config_from_raw(raw), config):
        headed = as_classifier(raw, config.labels) if config.scalar_head else raw
        if differing := differences(config_from_raw(headed), config):
            names = ", ".join(differing)
            raise ValueError(f"raw: does not describe config, which differs in {names}")
        raw = headed
        if raw.get("pad_token_id") is None:
            raw |= {"pad_token_id": getattr(tokenizer, "pad_token_id", None)}
    # transformers reads weights in the dtype that config.json names, whatever the files hold.
    dtype = str(jnp.result_type(*jax.tree.leaves(params)))
    return raw | {key: dtype for key in ("dtype", "torch_dtype") if key == "dtype" or key in raw}


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
