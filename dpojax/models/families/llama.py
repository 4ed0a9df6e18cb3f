"""Llama, and the families that differ little from it: Mistral, Qwen 2 and 3, Phi-3."""

from __future__ import annotations

from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.models.families.family import (
    COMMON_FIXED,
    HARMLESS,
    REQUIRED,
    ROPE,
    Family,
    layer_types,
    widest,
    windows_of,
)
from dpojax.models.rope_keys import read_rope, write_rope
from dpojax.models.weights import ATTENTION, GATE_UP, QKV, SCORE, affine, fused, norm, table

_L = "model.layers.{layer}"

# A table lists all tensors that a family may have. Those whose arrays a model lacks are left out.
EMBEDDING = table("model.embed_tokens.weight", "embed/tokens")
HEADS = (*norm("model.norm", "final_norm"), table("lm_head.weight", "head/kernel"), SCORE)
ATTENTION_WEIGHTS = (
    *affine(f"{_L}.self_attn.q_proj", f"{ATTENTION}/query", "dnh -> nh d", "nh -> nh"),
    *affine(f"{_L}.self_attn.k_proj", f"{ATTENTION}/key", "dnh -> nh d", "nh -> nh"),
    *affine(f"{_L}.self_attn.v_proj", f"{ATTENTION}/value", "dnh -> nh d", "nh -> nh"),
    *norm(f"{_L}.self_attn.q_norm", f"{ATTENTION}/query_norm"),
    *norm(f"{_L}.self_attn.k_norm", f"{ATTENTION}/key_norm"),
)
OUT = affine(f"{_L}.self_attn.o_proj", f"{ATTENTION}/out", "nhd -> d nh", "d -> d")
GATE_AND_UP = (
    *affine(f"{_L}.mlp.gate_proj", "blocks/mlp/gate", "df -> f d", "f -> f"),
    *affine(f"{_L}.mlp.up_proj", "blocks/mlp/up", "df -> f d", "f -> f"),
)
DOWN = affine(f"{_L}.mlp.down_proj", "blocks/mlp/down", "fd -> d f", "d -> d")
NORMS = (
    *norm(f"{_L}.input_layernorm", "blocks/attention_norm"),
    *norm(f"{_L}.post_attention_layernorm", "blocks/mlp_norm"),
)
LLAMA_WEIGHTS = (EMBEDDING, *NORMS, *ATTENTION_WEIGHTS, *OUT, *GATE_AND_UP, *DOWN, *HEADS)
PHI3_WEIGHTS = (
    EMBEDDING,
    *NORMS,
    fused(f"{_L}.self_attn.qkv_proj.weight", "kernel", QKV, "dnh -> *nh d"),
    *OUT,
    fused(f"{_L}.mlp.gate_up_proj.weight", "kernel", GATE_UP, "df -> *f d"),
    *DOWN,
    *HEADS,
)


def biases(raw: dict) -> dict:
    """Read `attention_bias`, which sets two fields of ours."""
    biased = bool(raw.get("attention_bias", False))
    return {"qkv_bias": biased, "out_bias": biased}


def _read_llama(raw: dict) -> dict:
    return {"rope": read_rope(raw)} | biases(raw)


def _write_llama(config: DecoderConfig) -> dict:
    return {"attention_bias": config.qkv_bias} | _write_rope(config)


def _write_rope(config: DecoderConfig) -> dict:
    return {} if config.rope is None else {"rope_parameters": write_rope(config.rope)}


def _read_mistral(raw: dict) -> dict:
    return {"rope": read_rope(raw), "windows": _one_window(raw, 4096)}


def _one_window(raw: dict, default: int | None) -> tuple[int, ...]:
    window = raw.get("sliding_window", default)
    return (window,) * raw["num_hidden_layers"] if window else ()


def _write_mistral(config: DecoderConfig) -> dict:
    return {"sliding_window": config.windows[0] if config.windows else None} | _write_rope(config)


def _read_qwen2(raw: dict) -> dict:
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
    first = 28 if raw.get("max_window_layers") is None else raw["max_window_layers"]
    kinds = raw.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention"
        for layer in range(raw["num_hidden_layers"])
    ]
    return {"rope": read_rope(raw), "windows": windows_of(kinds, window)}


def _write_qwen2(config: DecoderConfig) -> dict:
    return {
        "use_sliding_window": bool(config.windows),
        "sliding_window": widest(config),
        "layer_types": layer_types(config),
    } | _write_rope(config)


def _read_qwen3(raw: dict) -> dict:
    return _read_qwen2(raw) | biases(raw)


def _write_qwen3(config: DecoderConfig) -> dict:
    return {"attention_bias": config.qkv_bias} | _write_qwen2(config)


def _read_phi3(raw: dict) -> dict:
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    # No scaling: transformers reads "yarn" in a file of Phi-3 as longrope.
    rope = read_rope(raw, kinds=("default",), head_dim=head_dim)
    return {"rope": rope, "windows": _one_window(raw, None)}


def _write_phi3(config: DecoderConfig) -> dict:
    if config.rope is None:
        return {}
    return _write_mistral(config) | {"rope_parameters": write_rope(config.rope, config.head_dim)}


LLAMA_KEYS = {
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
_QWEN_KEYS = LLAMA_KEYS | {
    "max_position_embeddings": ("max_positions", 32_768),
    "num_key_value_heads": ("kv_heads", 32),
}
_QWEN_SPECIAL = ROPE | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}

LLAMA_FAMILY = Family(
    architecture="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    prefix="model.",
    base=LLAMA,
    keys=LLAMA_KEYS | {"mlp_bias": ("mlp_bias", False)},
    fixed=COMMON_FIXED,
    harmless=HARMLESS,
    weights=LLAMA_WEIGHTS,
    harmless_tensors=r"rotary_emb\.inv_freq$",
    special=ROPE | {"attention_bias"},
    read=_read_llama,
    write=_write_llama,
)
MISTRAL = LLAMA_FAMILY._replace(
    architecture="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    keys=LLAMA_KEYS
    | {"max_position_embeddings": ("max_positions", 131_072)}
    | {"num_key_value_heads": ("kv_heads", 8)},
    special=ROPE | {"sliding_window"},
    read=_read_mistral,
    write=_write_mistral,
)
QWEN2 = LLAMA_FAMILY._replace(
    architecture="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    base=LLAMA | {"qkv_bias": True},
    keys=_QWEN_KEYS,
    special=_QWEN_SPECIAL,
    read=_read_qwen2,
    write=_write_qwen2,
)
QWEN3 = LLAMA_FAMILY._replace(
    architecture="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    base=LLAMA | {"qk_norm": True},
    keys=_QWEN_KEYS | {"head_dim": ("head_dim", 128)},
    special=_QWEN_SPECIAL | {"attention_bias"},
    read=_read_qwen3,
    write=_write_qwen3,
)
PHI3 = LLAMA_FAMILY._replace(
    architecture="Phi3ForCausalLM",
    classifier="Phi3ForSequenceClassification",
    keys={key: value for key, value in LLAMA_KEYS.items() if key != "head_dim"}
    | {"max_position_embeddings": ("max_positions", 4096)}
    | {"rms_norm_eps": ("norm_eps", 1e-5)},
    fixed=COMMON_FIXED | {"attention_bias": False},
    weights=PHI3_WEIGHTS,
    special=ROPE | {"sliding_window"},
    read=_read_phi3,
    write=_write_phi3,
)
