"""Hugging Face model families as data: which key of config.json is which field of ours.

A key that a family does not list is an error: it may change the maths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from dpojax.models.config import GPT2, LLAMA, DecoderConfig
from dpojax.models.layers import ACTIVATIONS
from dpojax.models.rope_keys import read_rope, write_rope
from dpojax.models.weights import GPT2_WEIGHTS, LLAMA_WEIGHTS, Weight

REQUIRED = object()


class Family(NamedTuple):
    """One model_type.

    architecture: the transformers class. prefix: what base-model checkpoints leave out of names.
    base: fields of DecoderConfig that all members share. keys: their key -> (our field, its
    default or REQUIRED). fixed: key -> the only value that is supported. harmless: keys that do
    not change the maths. weights: where tensors go; harmless_tensors: a pattern of buffers that
    need no reading. special: keys that `read` (raw -> fields) and `write` (config -> keys)
    translate, being more than a new name.
    """

    architecture: str
    prefix: str
    base: dict
    keys: dict[str, tuple[str, object]]
    fixed: dict[str, object]
    harmless: frozenset[str]
    weights: tuple[Weight, ...]
    harmless_tensors: str
    special: frozenset[str]
    read: Callable[[dict], dict]
    write: Callable[[DecoderConfig], dict]


# Bookkeeping, generation defaults, dropout (never applied here) and output switches.
_HARMLESS = """
architectures model_type _name_or_path name_or_path transformers_version torch_dtype dtype
use_cache bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id
mask_token_id decoder_start_token_id tokenizer_class task_specific_params prefix
finetuning_task id2label label2id num_labels _num_labels problem_type output_attentions
output_hidden_states output_scores return_dict return_dict_in_generate use_return_dict
gradient_checkpointing attn_implementation _attn_implementation
_attn_implementation_autoset is_decoder torchscript use_bfloat16 tf_legacy_loss pruned_heads
chunk_size_feed_forward max_length min_length do_sample early_stopping num_beams
num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens pretraining_tp
attention_dropout resid_pdrop embd_pdrop attn_pdrop unsloth_version unsloth_fixed
"""
HARMLESS = frozenset(_HARMLESS.split())
COMMON_FIXED = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
}
ROPE = frozenset(
    ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
)


def _read_llama(raw: dict) -> dict:
    biased = bool(raw.get("attention_bias", False))
    return {"rope": read_rope(raw), "qkv_bias": biased, "out_bias": biased}


def _write_llama(config: DecoderConfig) -> dict:
    return {"attention_bias": config.qkv_bias} | _write_rope(config)


def _write_rope(config: DecoderConfig) -> dict:
    return {} if config.rope is None else {"rope_parameters": write_rope(config.rope)}


def _read_mistral(raw: dict) -> dict:
    window = raw.get("sliding_window", 4096)
    windows = (window,) * raw["num_hidden_layers"] if window else ()
    return {"rope": read_rope(raw), "windows": windows}


def _write_mistral(config: DecoderConfig) -> dict:
    return {"sliding_window": config.windows[0] if config.windows else None} | _write_rope(config)


def _read_qwen2(raw: dict) -> dict:
    layers, window = raw["num_hidden_layers"], raw.get("sliding_window", 4096)
    if not raw.get("use_sliding_window", False) or not window:
        window = None
    first = raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
    ]
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ValueError(f"layer_types: {sorted(unknown)[0]!r} is not supported")
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return {"rope": read_rope(raw), "windows": windows if any(windows) else ()}


def _write_qwen2(config: DecoderConfig) -> dict:
    kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
    return {
        "use_sliding_window": bool(config.windows),
        "sliding_window": max((window or 0 for window in config.windows), default=None),
        "layer_types": kinds or ["full_attention"] * config.layers,
    } | _write_rope(config)


def _read_gpt2(raw: dict) -> dict:
    return {
        "mlp_width": raw.get("n_inner") or 4 * raw["n_embd"],
        "attention_scale": None if raw.get("scale_attn_weights", True) else 1.0,
    }


def _write_gpt2(config: DecoderConfig) -> dict:
    return {"n_inner": config.mlp_width, "scale_attn_weights": config.attention_scale is None}


_LLAMA_KEYS = {
    "vocab_size": ("vocab_size", REQUIRED),
    "hidden_size": ("width", REQUIRED),
    "intermediate_size": ("mlp_width", REQUIRED),
    "num_hidden_layers": ("layers", REQUIRED),
    "num_attention_heads": ("heads", REQUIRED),
    "num_key_value_heads": ("kv_heads", None),
    "head_dim": ("head_dim", None),
    "max_position_embeddings": ("max_positions", 2048),
    "hidden_act": ("activation", "silu"),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "initializer_range": ("initializer_range", 0.02),
    "tie_word_embeddings": ("tied_head", False),
}

_LLAMA = Family(
    architecture="LlamaForCausalLM",
    prefix="model.",
    base=LLAMA,
    keys=_LLAMA_KEYS | {"mlp_bias": ("mlp_bias", False)},
    fixed=COMMON_FIXED,
    harmless=HARMLESS,
    weights=LLAMA_WEIGHTS,
    harmless_tensors=r"rotary_emb\.inv_freq$",
    special=ROPE | {"attention_bias"},
    read=_read_llama,
    write=_write_llama,
)

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA._replace(
        architecture="MistralForCausalLM",
        keys=_LLAMA_KEYS
        | {"max_position_embeddings": ("max_positions", 131_072)}
        | {"num_key_value_heads": ("kv_heads", 8)},
        special=ROPE | {"sliding_window"},
        read=_read_mistral,
        write=_write_mistral,
    ),
    "qwen2": _LLAMA._replace(
        architecture="Qwen2ForCausalLM",
        base=LLAMA | {"qkv_bias": True},
        keys=_LLAMA_KEYS
        | {"max_position_embeddings": ("max_positions", 32_768)}
        | {"num_key_value_heads": ("kv_heads", 32)},
        special=ROPE | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
        read=_read_qwen2,
        write=_write_qwen2,
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        base=GPT2,
        keys={
            "vocab_size": ("vocab_size", REQUIRED),
            "n_positions": ("max_positions", REQUIRED),
            "n_embd": ("width", REQUIRED),
            "n_layer": ("layers", REQUIRED),
            "n_head": ("heads", REQUIRED),
            "activation_function": ("activation", "gelu_new"),
            "layer_norm_epsilon": ("norm_eps", 1e-5),
            "initializer_range": ("initializer_range", 0.02),
            "scale_attn_by_inverse_layer_idx": ("attention_scale_by_layer", False),
            "tie_word_embeddings": ("tied_head", True),
        },
        fixed=COMMON_FIXED,
        # reorder_and_upcast_attn only asks for the float32 softmax that is always used here.
        harmless=HARMLESS
        | {"n_ctx", "reorder_and_upcast_attn", "summary_type", "summary_use_proj"}
        | {"summary_activation", "summary_proj_to_labels", "summary_first_dropout"},
        weights=GPT2_WEIGHTS,
        harmless_tensors=r"\.attn\.(bias|masked_bias)$",
        special=frozenset({"n_inner", "scale_attn_weights"}),
        read=_read_gpt2,
        write=_write_gpt2,
    ),
}


def config_from_raw(raw: dict) -> DecoderConfig:
    """The DecoderConfig that a config.json describes.

    Raises:
      ValueError: an unknown model_type; a key that is missing, unknown, or set to what is not
        supported.
    """
    family = family_of(raw)
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
    return DecoderConfig(**fields)


def family_of(raw: dict) -> Family:
    """The family that a config.json names.

    Raises:
      ValueError: its model_type is missing or not supported.
    """
    if raw.get("model_type") not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"model_type: {raw.get('model_type')!r} is not supported, only {known}")
    return FAMILIES[raw["model_type"]]


def config_to_raw(config: DecoderConfig) -> dict:
    """A config.json for a model that was made here, as the first family that can express it.

    Raises:
      ValueError: no family can, with the fields that stand in the way of each.
    """
    obstacles = []
    for model_type, family in FAMILIES.items():
        raw = {"model_type": model_type, "architectures": [family.architecture]}
        raw |= {key: getattr(config, field) for key, (field, _) in family.keys.items()}
        raw |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | family.write(
            config
        )
        try:
            differing = differences(config_from_raw(raw), config)
        except ValueError as error:
            differing = [str(error)]
        if not differing:
            return raw
        obstacles.append(f"{model_type} ({', '.join(differing)})")
    raise ValueError(f"no transformers family has these settings: {'; '.join(obstacles)}")


def differences(one: DecoderConfig, other: DecoderConfig) -> list[str]:
    """The names of fields that differ."""
    names = [field.name for field in dataclasses.fields(DecoderConfig)]
    return [name for name in names if getattr(one, name) != getattr(other, name)]
