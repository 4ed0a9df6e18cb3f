"""Gemma, Gemma 2 and the text model of Gemma 3."""

from __future__ import annotations

from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.models.families.family import COMMON_FIXED, ROPE, layer_types, widest, windows_of
from dpojax.models.families.llama import (
    ATTENTION_WEIGHTS,
    DOWN,
    EMBEDDING,
    GATE_AND_UP,
    HEADS,
    LLAMA_FAMILY,
    LLAMA_KEYS,
    OUT,
    biases,
)
from dpojax.models.rope_keys import read_rope, write_rope
from dpojax.models.weights import norm

_L = "model.layers.{layer}"

GEMMA_WEIGHTS = (
    EMBEDDING,
    *norm(f"{_L}.input_layernorm", "blocks/attention_norm"),
    *ATTENTION_WEIGHTS,
    *OUT,
    *norm(f"{_L}.post_attention_layernorm", "blocks/attention_post_norm"),
    *norm(f"{_L}.pre_feedforward_layernorm", "blocks/mlp_norm"),
    *GATE_AND_UP,
    *DOWN,
    *norm(f"{_L}.post_feedforward_layernorm", "blocks/mlp_post_norm"),
    *HEADS,
)


def _read(raw: dict, pattern: int) -> dict:
    """Read the keys that both families share.

    Without layer_types, each `pattern`-th layer has no window, and the others have one.
    """
    kinds = raw.get("layer_types") or [
        "sliding_attention" if (layer + 1) % pattern else "full_attention"
        for layer in range(raw["num_hidden_layers"])
    ]
    window = raw.get("sliding_window", 4096)
    if "sliding_attention" in kinds and not window:
        raise ValueError("sliding_window: missing, but layer_types has layers with a window")
    scalar, head_dim = raw.get("query_pre_attn_scalar") or 256, raw.get("head_dim") or 256
    return {
        "windows": windows_of(kinds, window),
        "embedding_scale": raw["hidden_size"] ** 0.5,
        "attention_scale": None if scalar == head_dim else scalar**-0.5,
    } | biases(raw)


def _write(config: DecoderConfig) -> dict:
    scale = config.attention_scale
    return {
        "attention_bias": config.qkv_bias,
        "layer_types": layer_types(config),
        "sliding_window": widest(config),
        "query_pre_attn_scalar": config.head_dim if scale is None else round(scale**-2),
    }


def _read_gemma(raw: dict) -> dict:
    # "gelu" of the published files means the approximation that the models were trained with.
    activation = raw.get("hidden_act") or "gelu_pytorch_tanh"
    return {
        "activation": "gelu_pytorch_tanh" if activation == "gelu" else activation,
        "embedding_scale": raw["hidden_size"] ** 0.5,
        "rope": read_rope(raw),
    } | biases(raw)


def _write_gemma(config: DecoderConfig) -> dict:
    rope = {} if config.rope is None else {"rope_parameters": write_rope(config.rope)}
    return {"attention_bias": config.qkv_bias, "hidden_act": config.activation} | rope


def _read_gemma2(raw: dict) -> dict:
    return {"rope": read_rope(raw)} | _read(raw, pattern=2)


def _write_gemma2(config: DecoderConfig) -> dict:
    rope = {} if config.rope is None else {"rope_parameters": write_rope(config.rope)}
    return _write(config) | rope


def _read_gemma3(raw: dict) -> dict:
    nested = raw.get("rope_parameters") or {}
    if unknown := sorted(set(nested) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"rope_parameters.{unknown[0]}: gemma3_text has one set per layer type")
    # In older files, rope_theta and rope_scaling belong to the layers without a window.
    context = {"max_position_embeddings": raw.get("max_position_embeddings", 131_072)}
    old = {key: raw.get(key) for key in ("rope_theta", "rope_scaling")}
    global_keys = context | old | {"rope_parameters": nested.get("full_attention")}
    local_keys = context | {"rope_parameters": nested.get("sliding_attention")}
    local_theta = raw.get("rope_local_base_freq") or 10_000.0
    fields = _read(raw, raw.get("sliding_window_pattern") or 6)
    rope = read_rope(global_keys, theta=1_000_000.0)
    local = read_rope(local_keys, theta=float(local_theta)) if fields["windows"] else None
    return fields | {"rope": rope, "local_rope": None if local == rope else local}


def _write_gemma3(config: DecoderConfig) -> dict:
    if config.rope is None:
        return _write(config)
    ropes = {"full_attention": config.rope, "sliding_attention": config.local_rope or config.rope}
    return _write(config) | {
        "rope_parameters": {kind: write_rope(rope) for kind, rope in ropes.items()}
    }


_KEYS = {key: value for key, value in LLAMA_KEYS.items() if key != "hidden_act"} | {
    "head_dim": ("head_dim", 256),
    "num_key_value_heads": ("kv_heads", 4),
    "hidden_activation": ("activation", "gelu_pytorch_tanh"),
    "tie_word_embeddings": ("tied_head", True),
}
_SPECIAL = frozenset(("attention_bias", "layer_types", "sliding_window", "query_pre_attn_scalar"))

GEMMA = LLAMA_FAMILY._replace(
    architecture="GemmaForCausalLM",
    classifier="GemmaForSequenceClassification",
    base=LLAMA | {"norm_offset": 1.0},
    keys={key: value for key, value in _KEYS.items() if key != "hidden_activation"}
    | {"max_position_embeddings": ("max_positions", 8192)}
    | {"num_key_value_heads": ("kv_heads", 16)},
    fixed=COMMON_FIXED | {"use_bidirectional_attention": False},
    special=ROPE | {"attention_bias", "hidden_act"},
    read=_read_gemma,
    write=_write_gemma,
)
GEMMA2 = LLAMA_FAMILY._replace(
    architecture="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    base=LLAMA | {"norm_offset": 1.0, "post_norms": True},
    keys=_KEYS
    | {"max_position_embeddings": ("max_positions", 8192)}
    | {"final_logit_softcapping": ("head_softcap", 30.0)}
    | {"attn_logit_softcapping": ("attention_softcap", 50.0)},
    fixed=COMMON_FIXED | {"use_bidirectional_attention": False},
    # Old files have hidden_act as well; transformers reads only hidden_activation.
    harmless=LLAMA_FAMILY.harmless | {"hidden_act"},
    weights=GEMMA_WEIGHTS,
    special=ROPE | _SPECIAL,
    read=_read_gemma2,
    write=_write_gemma2,
)
GEMMA3 = GEMMA2._replace(
    architecture="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    base=GEMMA2.base | {"qk_norm": True},
    # A config.json of the whole Gemma 3, images included, leaves out what is as in transformers.
    keys=_KEYS
    | {"vocab_size": ("vocab_size", 262_208), "num_attention_heads": ("heads", 8)}
    | {"max_position_embeddings": ("max_positions", 131_072)}
    | {"final_logit_softcapping": ("head_softcap", None)},
    # transformers has the key of Gemma 2's attention cap here, too, but never applies it.
    fixed=COMMON_FIXED | {"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    special=(ROPE | _SPECIAL) - {"partial_rotary_factor"}
    | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"},
    read=_read_gemma3,
    write=_write_gemma3,
    # Of the whole Gemma 3, saved by older and by newer versions of transformers.
    renamed=(
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    ),
    harmless_tensors=GEMMA2.harmless_tensors
    + r"|^(model\.)?(vision_tower|multi_modal_projector)\.",
)
