"""Read and write Hugging Face checkpoints, without torch.

`load` and `save` handle decoders with a language-model head or a scalar head. `load_classifier`
and `load_trunk` read BERT-type encoders.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpojax import storage
from dpojax.models import encoder, safetensors_io, special_tokens
from dpojax.models.config import DecoderConfig
from dpojax.models.config_values import shown
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
    text_part,
)
from dpojax.models.safetensors_io import Tensor
from dpojax.models.transfer import read_params, tensors_of
from dpojax.sharding import to_host
from dpojax.watchdog import unwatched

__all__ = [
    "config_to_raw",
    "load",
    "load_classifier",
    "load_trunk",
    "local_folder",
    "pretrained_name",
    "read_centre",
    "read_config",
    "require_known",
    "require_model",
    "require_new_folder",
    "save",
]

# Only these files are fetched: some repositories also hold the weights in other formats, or twice.
FILES = ["*.json", "model*.safetensors"]
TEXT_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # of tokenizers and configs
CENTRE = "reward_centre.json"
ENCODER_HEADS = r"^(bert\.pooler|classifier|cls|lm_head)\."  # which a trunk does not have
ADAPTERS = "adapter_config.json"  # of a folder of peft's


def read_config(path: str | os.PathLike) -> tuple[DecoderConfig, dict]:
    """Return the configuration of a model, and its config.json as it is.

    Raises:
      FileNotFoundError: the folder has no config.json.
      ValueError: a model_type, key or value is not supported; the message names it.
    """
    return _read_config(local_folder(path, ["config.json"]), DECODERS)


def read_classifier_config(path: str | os.PathLike) -> EncoderConfig:
    """Return the configuration of a BERT-type classifier. Raises as `read_config` does."""
    return _read_config(local_folder(path, ["config.json"]), ENCODERS)[0]


def require_known(path: str | os.PathLike) -> None:
    """Raise as `read_config` does if a model is of no family that is known, classifiers included.

    Its configuration may still be refused. See also `require_model`.
    """
    require_model(path)
    folder = local_folder(path, ["config.json"])
    raw = _read_raw(folder)
    with _named(folder):
        family_of(raw, DECODERS | ENCODERS)


def require_model(path: str | os.PathLike) -> None:
    """Raise ValueError where a folder holds LoRA adapters of peft, and no model."""
    folder = local_folder(path, ["config.json", ADAPTERS])
    if (folder / "config.json").is_file() or not (folder / ADAPTERS).is_file():
        return
    settings = safetensors_io.read_object(folder / ADAPTERS)
    base = settings.get("base_model_name_or_path")
    raise ValueError(
        f"{path}: holds LoRA adapters of peft ({ADAPTERS}) and no model. Set config.model.path to "
        f"their base ({base!r}), and for a stage that trains adapters config.STAGE.lora.adapters "
        f"to this folder, with lora.rank={settings.get('r')} and "
        f"lora.alpha={settings.get('lora_alpha')}; or merge them into the base with peft "
        "(merge_and_unload, save_pretrained), and give the folder of that"
    )


def _read_config(folder: pathlib.Path, families: Mapping[str, Family]):
    raw = _read_raw(folder)
    with _named(folder):
        return config_from_raw(raw, families), raw


def _read_raw(folder: pathlib.Path) -> dict:
    """config.json, or what it says of the language model inside."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not there; is this a Hugging Face model folder?")
    raw = safetensors_io.read_object(file)
    with _named(folder):
        return text_part(raw)


@contextlib.contextmanager
def _named(folder: pathlib.Path) -> Iterator[None]:
    """Begin the message of a ValueError with the name of the config.json."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error


def read_centre(path: str | os.PathLike) -> float:
    """Return the score of a scalar head that counts as 0; 0.0 if its folder names none."""
    file = local_folder(path, [CENTRE]) / CENTRE
    if not file.is_file():
        return 0.0
    score = safetensors_io.read_object(file).get("score")
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"{file}: score: must be a finite number, not {shown(score)}")
    return float(score)


def load(
    path: str | os.PathLike, *, mesh: Mesh | None = None, dtype=jnp.float32
) -> tuple[DecoderConfig, Params, dict]:
    """Load a checkpoint: its configuration, weights and config.json.

    If config.json names a `...ForSequenceClassification`, `config.scalar_head` is set, and
    `config.labels` if it has several labels.

    Files are memory-mapped. Each device's shard is copied out of them layer by layer, so the host
    holds the shards of one array at a time and never the whole model.

    Args:
      path: a folder with safetensors (local or on a bucket), or the name of a model on the hub.
      mesh: where to put the weights, by SHARDING_RULES; None puts them on the first device.
      dtype: dtype of the returned arrays, whatever the files hold.

    Raises:
      FileNotFoundError: there is no config.json, or there are no safetensors.
      ValueError: `read_config` rejects it; a file is damaged; a tensor is missing, unknown, of a
        wrong shape or dtype, or not finite; a stored head differs from the embedding that it should
        be tied to.
    """
    folder = local_folder(path, FILES)
    config, raw = _read_config(folder, DECODERS)
    init = build(config).init
    return config, read_params(folder, family_of(raw), config, init, mesh, dtype), raw


def load_classifier(
    path: str | os.PathLike, *, mesh: Mesh | None = None, dtype=jnp.float32
) -> tuple[EncoderConfig, Params, dict]:
    """Load a `BertForSequenceClassification` or `RobertaForSequenceClassification`; see `load`.

    `encoder.build(config).apply(params, tokens, lengths)` returns its logits.
    """
    folder = local_folder(path, FILES)
    config, raw = _read_config(folder, ENCODERS)
    init = encoder.build(config).init
    return config, read_params(folder, family_of(raw, ENCODERS), config, init, mesh, dtype), raw


def load_trunk(
    path: str | os.PathLike, *, mesh: Mesh | None = None, dtype=jnp.float32
) -> tuple[EncoderConfig, Params, dict]:
    """Load a `BertModel` or `RobertaModel`, which has no classifier; see `load`.

    Weights of a pooler or of another head in the folder are not read.
    `encoder.build_trunk(config).apply(params, tokens, lengths)` returns hidden states.
    """
    folder = local_folder(path, FILES)
    config, raw = _read_config(folder, ENCODERS)
    family = family_of(raw, ENCODERS)
    family = family._replace(harmless_tensors=f"{family.harmless_tensors}|{ENCODER_HEADS}")
    init = encoder.build_trunk(config).init
    return config, read_params(folder, family, config, init, mesh, dtype), raw


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
    """Write a folder that `AutoModelForCausalLM.from_pretrained` of transformers reads.

    With `config.scalar_head` it is read by AutoModelForSequenceClassification, which needs a
    padding token in config.json (from `raw` or `tokenizer`) for more than one text. A reward model
    gets a padding token that is not its EOS (`special_tokens.with_own_padding`), and for a new one
    an embedding of zeros, so that it is scored at EOS there as well.

    The folder appears as a whole; on a bucket config.json is written last. Tensors have the dtypes
    of `params`. With several processes, all of them make this call and the first one writes.

    Args:
      folder: a local folder or one on a bucket.
      raw: config.json as `load` returned it, whose keys are kept; None is `config_to_raw(config)`.
        It may describe the language model from which a scalar-head model was made.
      tokenizer: of transformers. Its ids of special tokens stand in config.json and in the
        generation config, in place of those of `raw`. The end of the turns of its chat template is
        one of the ends there.
      generation_config: a dict, or transformers' GenerationConfig. It is not changed.
      centre: the score of a scalar head that counts as 0, see `read_centre`. It gets a file of its
        own, since transformers has no place for it.
      max_shard_bytes: the largest size of a file, unless a single tensor is larger.

    Raises:
      FileExistsError: `folder` exists and is not empty, or is a file.
      ValueError: `raw` describes another model than `config`.
    """
    first = jax.process_index() == 0
    if first:
        require_new_folder(folder)
    raw = _checked_raw(config, raw, params)
    if tokenizer is not None:
        if config.scalar_head and not config.labels:
            tokenizer = special_tokens.with_own_padding(tokenizer)
            config, params = _with_row_of(tokenizer.pad_token_id, config, params)
            raw |= {"vocab_size": config.vocab_size}
        ids = special_tokens.token_ids(tokenizer, config.vocab_size)
        raw |= ids
        generation_config = _generation_config(generation_config, ids)
    tensors = list(tensors_of(family_of(raw), config, params))
    if not first:
        for tensor in tensors:
            tensor.fetch()  # takes part in the first process's gather
    else:
        with storage.replacing_folder(storage.as_path(folder)) as unfinished:
            if centre is not None:
                storage.write_json(unfinished / CENTRE, {"score": centre})
            _write(unfinished, raw, tensors, tokenizer, generation_config, max_shard_bytes)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("dpojax.models.huggingface.save")


def local_folder(path: str | os.PathLike, patterns: list[str]) -> pathlib.Path:
    """Return a local folder of a model: `path` itself, or a copy of a bucket's or the hub's files.

    Args:
      patterns: names of the files that are needed from a bucket or the hub.

    Raises:
      FileNotFoundError: no such folder, and not a name of the hub.
    """
    folder = storage.as_path(path, "the name of a model")
    if folder.is_dir():
        return storage.local_copy(folder, patterns)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(path)):
        raise FileNotFoundError(f"{path}: no such folder, and not a name like owner/model")
    from huggingface_hub import snapshot_download  # only a name of the hub needs it

    with unwatched():
        return pathlib.Path(snapshot_download(str(path), allow_patterns=patterns))


def pretrained_name(path: str | os.PathLike) -> str:
    """Return what `from_pretrained` of transformers accepts: a local folder, or a name of the hub.

    Of a folder on a bucket, everything but the weights is copied: the tokenizer and the configs.
    """
    folder = storage.as_path(path, "the name of a model")
    if not folder.is_dir():
        return os.fspath(path)
    return str(storage.local_copy(folder, TEXT_FILES))


def require_new_folder(folder: str | os.PathLike) -> None:
    """Raise FileExistsError unless a folder is not there, or is empty."""
    folder = storage.as_path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder}: is already there and not empty; choose a new folder")


def _checked_raw(config: DecoderConfig, raw: dict | None, params: Params) -> dict:
    if raw is None:
        raw = config_to_raw(config)
    elif differences(config_from_raw(raw), config):
        headed = as_classifier(raw, config.labels) if config.scalar_head else raw
        if differing := differences(config_from_raw(headed), config):
            names = ", ".join(differing)
            raise ValueError(f"raw: does not describe config, which differs in {names}")
        raw = headed
    # transformers reads weights in the dtype that config.json names, whatever the files hold.
    dtype = str(jnp.result_type(*jax.tree.leaves(params)))
    raw |= {key: dtype for key in ("dtype", "torch_dtype") if key == "dtype" or key in raw}
    # The Python files that `auto_map` names stay with the base.
    return {key: value for key, value in raw.items() if key != "auto_map"}


def _with_row_of(token: int, config: DecoderConfig, params: Params) -> tuple[DecoderConfig, Params]:
    """A model whose embedding has a row for a token: a new one is of zeros, and never read."""
    new = token + 1 - config.vocab_size
    if new <= 0:
        return config, params
    table = np.asarray(to_host(params["embed"]["tokens"]))
    rows = np.zeros((new, config.width), table.dtype)
    embed = params["embed"] | {"tokens": jnp.asarray(np.concatenate([table, rows]))}
    return dataclasses.replace(config, vocab_size=token + 1), params | {"embed": embed}


def _generation_config(generation_config, ids: dict):
    """A copy that names these special tokens, and all ends that were named before."""
    if generation_config is None:
        return None
    is_dict = isinstance(generation_config, dict)
    before = generation_config if is_dict else generation_config.to_dict()
    ends: list[int] = []
    for end in (ids.get("eos_token_id"), before.get("eos_token_id")):
        ends += end if isinstance(end, list) else [] if end is None else [end]
    ends = list(dict.fromkeys(ends))
    if ends:
        ids = ids | {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    if is_dict:
        return generation_config | ids
    changed = copy.deepcopy(generation_config)
    changed.update(**ids)
    return changed


def _write(
    folder: pathlib.Path,
    raw: dict,
    tensors: list[Tensor],
    tokenizer,
    generation_config,
    max_shard_bytes: int,
) -> None:
    if hasattr(generation_config, "save_pretrained"):
        generation_config.save_pretrained(folder)
    elif generation_config is not None:
        storage.write_json(folder / "generation_config.json", generation_config)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    safetensors_io.write_folder(folder, tensors, max_shard_bytes)
    # Last: on a bucket, whose files appear one by one, it tells that the others are there.
    storage.write_json(folder / "config.json", raw)


def save_tokenizer(tokenizer, folder: pathlib.Path) -> None:
    """Write a tokenizer into a folder.

    Raises:
      OSError: the disk does not take it. The tokenizers library raises a plain Exception there.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(f"{folder}: the tokenizer cannot be written: {error}") from error
