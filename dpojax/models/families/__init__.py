"""Hugging Face model families as data: which key of config.json is which field of our config.

A key that a family does not list is an error, because it may change the model's maths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dpojax.models.config import DecoderConfig
from dpojax.models.families.bert import BERT, ROBERTA, labels_of
from dpojax.models.families.family import REQUIRED, Family
from dpojax.models.families.gemma import GEMMA2, GEMMA3
from dpojax.models.families.gpt import GPT2_FAMILY, GPTJ, NEOX
from dpojax.models.families.llama import LLAMA_FAMILY, MISTRAL, PHI3, QWEN2, QWEN3
from dpojax.models.layers import ACTIVATIONS

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
}
ENCODERS = {"bert": BERT, "roberta": ROBERTA}


def config_from_raw(raw: dict, families: Mapping[str, Family] = DECODERS):
    """Make our config from a config.json: a DecoderConfig, or an EncoderConfig for ENCODERS.

    Args:
      raw: config.json.
      families: model_type -> Family.

    Raises:
      ValueError: an unknown model_type; a key that is missing, unknown, or has a value that is not
        supported.
    """
    family = family_of(raw, families)
    missing = [key for key, (_, default) in family.keys.items() if default is REQUIRED]
    missing = [key for key in missing if raw.get(key) is None]
    if missing:
        raise ValueError(f"{missing[0]}: missing, and {raw['model_type']} needs it")
    for key, only in family.fixed.items():
        if raw.get(key, only) not in (only, None):
            raise ValueError(f"{key}: {raw[key]!r} is not supported, only {only!r}")
    known = family.harmless | family.special | set(family.keys) | set(family.fixed)
    for key in raw:
        if key not in known and raw[key] is not None:
            raise ValueError(
                f"{key}: {raw[key]!r} is not known to dpojax for {raw['model_type']}; remove the "
                "key if you are sure that it does not change the model's maths"
            )
    plain = {field: raw.get(key, default) for key, (field, default) in family.keys.items()}
    fields = family.base | plain | family.read(raw)
    if fields["activation"] not in ACTIVATIONS:
        raise ValueError(f"activation: {fields['activation']!r} is not in {list(ACTIVATIONS)}")
    if family.config is DecoderConfig:
        fields |= _head_of(raw)
    return family.config(**fields)


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
    if raw.get("model_type") not in families:
        known = ", ".join(sorted(families))
        raise ValueError(f"model_type: {raw.get('model_type')!r} is not supported, only {known}")
    return families[raw["model_type"]]


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
