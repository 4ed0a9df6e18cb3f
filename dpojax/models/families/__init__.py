"""Hugging Face model families as data: which key of config.json is which field of our config.

A key that a family does not list is an error where transformers reads it, because it may change the
model's maths. One that transformers ignores is ignored here, too.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from dpojax.models.config import DecoderConfig
from dpojax.models.config_values import KINDS, check_values, shown
from dpojax.models.families.bert import BERT, ROBERTA, labels_of
from dpojax.models.families.family import REQUIRED, Family
from dpojax.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from dpojax.models.families.gpt import GPT2_FAMILY, GPTJ, NEOX
from dpojax.models.families.llama import LLAMA_FAMILY, MISTRAL, PHI3, QWEN2, QWEN3
from dpojax.models.families.read_keys import has_effect, newer_version
from dpojax.models.layers import ACTIVATIONS
from dpojax.models.safetensors_io import QUANTIZED

_log = logging.getLogger(__name__)

DECODERS = {
    "llama": LLAMA_FAMILY,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gpt2": GPT2_FAMILY,
    "gptj": GPTJ,
    "gpt_neox": NEOX,
    "gemma": GEMMA,
}
ENCODERS = {"bert": BERT, "roberta": ROBERTA}


def config_from_raw(raw: dict, families: Mapping[str, Family] = DECODERS):
    """Make our config from a config.json: a DecoderConfig, or an EncoderConfig for ENCODERS.

    Args:
      raw: config.json.
      families: model_type -> Family.

    Raises:
      ValueError: an unknown model_type; a key that is missing, that transformers reads and dpojax
        does not, or whose value is impossible or not supported.
    """
    check_values(raw)
    family = family_of(raw, families)
    for key, only in family.fixed.items():
        if raw.get(key, only) not in (only, None):
            raise ValueError(f"{key}: {shown(raw[key])} is not supported, only {only!r}")
    plain = {field: _plain(raw, key, field, family) for key, (field, _) in family.keys.items()}
    kinds = raw.get("layer_types") if "layer_types" in family.special else None
    if kinds and len(kinds) != plain["layers"]:
        raise ValueError(f"layer_types: {len(kinds)} entries, but {plain['layers']} layers")
    fields = family.base | plain | family.read(raw)
    if family.config is DecoderConfig:
        fields |= _head_of(raw)
    keys = {field: key for key, (field, _) in family.keys.items()}
    if fields["activation"] not in ACTIVATIONS:
        raise ValueError(
            f"{keys.get('activation', 'hidden_act')}: {fields['activation']!r} is not in "
            f"{list(ACTIVATIONS)}"
        )
    try:
        config = family.config(**fields)
    except ValueError as error:
        field, colon, rest = str(error).partition(":")
        raise ValueError(f"{keys.get(field, field)}{colon}{rest}") from error
    _check_unknown(raw, family, config)
    return config


# Keys that say what follows from others, in families that lack them -> our field.
_IMPLIED = {"head_dim": "head_dim", "num_key_value_heads": "kv_heads"}


def _check_unknown(raw: dict, family: Family, config) -> None:
    """Raise a ValueError for a key that transformers reads and the family does not.

    It has no effect at the value that transformers has without it.
    """
    known = family.harmless | family.special | set(family.keys) | set(family.fixed)
    unknown = [key for key in raw if key not in known and raw[key] is not None]
    for key in unknown:
        if key in _IMPLIED and raw[key] == getattr(config, _IMPLIED[key], None):
            continue
        if has_effect(raw["model_type"], raw, key):
            raise ValueError(f"{key}: {shown(raw[key])} {_not_read_here(raw['model_type'], key)}")
    _tell_of_unread(raw, unknown)


def _plain(raw: dict, key: str, field: str, family: Family):
    """The value of a key that only has another name with us. Null is one where our field has it."""
    default = family.keys[key][1]
    if key in raw and (raw[key] is not None or "None" in family.config.__annotations__[field]):
        return raw[key]
    if default is REQUIRED:
        raise ValueError(f"{key}: missing, and {raw['model_type']} needs it")
    if key in raw:
        raise ValueError(f"{key}: must be {KINDS[key]}, not null")
    return default


def _not_read_here(model_type: str, key: str) -> str:
    if key == "quantization_config":
        return f"is not supported{QUANTIZED}"
    return (
        f"is a setting that transformers reads for {model_type}, and dpojax does not: the model "
        "would compute something else here; choose a model without it"
    )


def _tell_of_unread(raw: dict, unread: list[str]) -> None:
    """Warn of keys that may mean something to code that is newer or the model's own."""
    if not unread:
        return
    # As `repr` shows them: a file may hold any key, with line breaks and control codes, too.
    model_type, keys = raw["model_type"], ", ".join(repr(key)[1:-1][:100] for key in unread)
    message = f"config.json: transformers ignores {keys} for {model_type}, and so does dpojax"
    if raw.get("auto_map"):
        _log.warning("%s; the model's own code, which never runs here, may read them", message)
    elif newer := newer_version(raw):
        _log.warning("%s; transformers %s, which wrote it, may read them", message, newer)


def text_part(raw: dict) -> dict:
    """The config.json of the language model inside one that sees images, too; others as they are.

    Raises:
      ValueError: it describes no language model.
    """
    if raw.get("model_type") != "gemma3":
        return raw
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ValueError("text_config: missing; it must describe the language model of gemma3")
    _log.warning("config.json: of this gemma3, only the language model is read; no images")
    shared = ("torch_dtype", "dtype", "transformers_version", "eos_token_id", "bos_token_id")
    shared += ("pad_token_id", "tie_word_embeddings", "quantization_config")
    outer = {key: raw[key] for key in shared if key in raw}
    return outer | text | {"model_type": "gemma3_text", "architectures": [GEMMA3.architecture]}


def _head_of(raw: dict) -> dict:
    """Our fields for the head of a sequence classifier.

    With a single label it gives a score, and the name of the label is lost.
    """
    names = raw.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in names):
        return {"scalar_head": False}
    labels = labels_of(raw)
    return {"scalar_head": True, "labels": labels if len(labels) > 1 else ()}


def as_classifier(raw: dict, labels: tuple[str, ...]) -> dict:
    """Make a config.json of a sequence classifier with the same trunk; no labels: one score."""
    names = labels or ("LABEL_0",)
    return raw | {
        "architectures": [family_of(raw).classifier],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def family_of(raw: dict, families: Mapping[str, Family] = DECODERS) -> Family:
    """Look up the family that a config.json names.

    Raises:
      ValueError: its model_type is missing or not supported.
    """
    model_type = raw.get("model_type")
    if model_type not in families:
        known, note = ", ".join(sorted(families)), ""
        if raw.get("auto_map"):
            note = "; the folder's own code (auto_map) never runs here"
        raise ValueError(f"model_type: {shown(model_type)} is not supported, only {known}{note}")
    return families[model_type]


def config_to_raw(config: DecoderConfig) -> dict:
    """Make a config.json for a model of ours, as the first family that can express it.

    Raises:
      ValueError: no family can; the message lists the fields that prevent it for each.
    """
    obstacles = []
    for model_type, family in DECODERS.items():
        raw = {"model_type": model_type, "architectures": [family.architecture]}
        if config.scalar_head:
            raw = as_classifier(raw, config.labels)
        raw |= {key: getattr(config, field) for key, (field, _) in family.keys.items()}
        raw |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        raw |= family.write(config)
        try:
            differing = differences(config_from_raw(raw), config)
        except ValueError as error:
            differing = [str(error)]
        if not differing:
            return raw
        obstacles.append(f"{model_type} ({', '.join(differing)})")
    raise ValueError(f"no transformers family has these settings: {'; '.join(obstacles)}")


def differences(one, other) -> list[str]:
    """List the names of the fields that differ between two configs of one class."""
    names = [field.name for field in dataclasses.fields(one)]
    return [name for name in names if getattr(one, name) != getattr(other, name)]
