"""GPT-2, GPT-J and GPT-NeoX (Pythia)."""

from __future__ import annotations

from dpojax.models.config import GPT2, DecoderConfig, Rope
from dpojax.models.families.family import COMMON_FIXED, HARMLESS, REQUIRED, ROPE, Family
from dpojax.models.rope_keys import read_rope, write_rope
from dpojax.models.weights import ATTENTION, QKV, SCORE, Weight, affine, fused, norm, table

_G, _N = "transformer.h.{layer}", "gpt_neox.layers.{layer}"

# A table lists all tensors that a family may have. Those whose arrays a model lacks are left out.
GPT2_WEIGHTS = (
    table("transformer.wte.weight", "embed/tokens"),
    table("transformer.wpe.weight", "embed/positions"),
    *norm(f"{_G}.ln_1", "blocks/attention_norm"),
    fused(f"{_G}.attn.c_attn.weight", "kernel", QKV, "dnh -> d *nh"),
    fused(f"{_G}.attn.c_attn.bias", "bias", QKV, "nh -> *nh"),
    *affine(f"{_G}.attn.c_proj", f"{ATTENTION}/out", "nhd -> nh d", "d -> d"),
    *norm(f"{_G}.ln_2", "blocks/mlp_norm"),
    *affine(f"{_G}.mlp.c_fc", "blocks/mlp/up", "df -> d f", "f -> f"),
    *affine(f"{_G}.mlp.c_proj", "blocks/mlp/down", "fd -> f d", "d -> d"),
    *norm("transformer.ln_f", "final_norm"),
    table("lm_head.weight", "head/kernel"),
    SCORE,
)
GPTJ_WEIGHTS = (
    table("transformer.wte.weight", "embed/tokens"),
    *norm(f"{_G}.ln_1", "blocks/attention_norm"),
    Weight(f"{_G}.attn.q_proj.weight", (f"{ATTENTION}/query/kernel",), "dnh -> nh d"),
    Weight(f"{_G}.attn.k_proj.weight", (f"{ATTENTION}/key/kernel",), "dnh -> nh d"),
    Weight(f"{_G}.attn.v_proj.weight", (f"{ATTENTION}/value/kernel",), "dnh -> nh d"),
    Weight(f"{_G}.attn.out_proj.weight", (f"{ATTENTION}/out/kernel",), "nhd -> d nh"),
    *affine(f"{_G}.mlp.fc_in", "blocks/mlp/up", "df -> f d", "f -> f"),
    *affine(f"{_G}.mlp.fc_out", "blocks/mlp/down", "fd -> d f", "d -> d"),
    *norm("transformer.ln_f", "final_norm"),
    *affine("lm_head", "head", "vd -> v d", "v -> v"),
    SCORE,
)
NEOX_WEIGHTS = (
    table("gpt_neox.embed_in.weight", "embed/tokens"),
    *norm(f"{_N}.input_layernorm", "blocks/attention_norm"),
    fused(f"{_N}.attention.query_key_value.weight", "kernel", QKV, "dnh -> n*h d"),
    fused(f"{_N}.attention.query_key_value.bias", "bias", QKV, "nh -> n*h"),
    *affine(f"{_N}.attention.dense", f"{ATTENTION}/out", "nhd -> d nh", "d -> d"),
    *norm(f"{_N}.post_attention_layernorm", "blocks/mlp_norm"),
    *affine(f"{_N}.mlp.dense_h_to_4h", "blocks/mlp/up", "df -> f d", "f -> f"),
    *affine(f"{_N}.mlp.dense_4h_to_h", "blocks/mlp/down", "fd -> d f", "d -> d"),
    *norm("gpt_neox.final_layer_norm", "final_norm"),
    table("embed_out.weight", "head/kernel"),
    SCORE,
)


def _read_gpt2(raw: dict) -> dict:
    return {
        "mlp_width": raw.get("n_inner") or 4 * raw["n_embd"],
        "attention_scale": None if raw.get("scale_attn_weights", True) else 1.0,
    }


def _write_gpt2(config: DecoderConfig) -> dict:
    return {"n_inner": config.mlp_width, "scale_attn_weights": config.attention_scale is None}


def _read_gptj(raw: dict) -> dict:
    head_dim, dim = raw["n_embd"] // raw["n_head"], raw.get("rotary_dim", 64)
    if dim is None or dim % 2:
        raise ValueError(f"rotary_dim: {dim} is not supported, only an even number")
    return {
        "mlp_width": raw.get("n_inner") or 4 * raw["n_embd"],
        "rope": Rope(dim=None if dim == head_dim else dim, interleaved=True),
    }


def _write_gptj(config: DecoderConfig) -> dict:
    dim = None if config.rope is None else config.rope.dim or config.head_dim
    return {"n_inner": config.mlp_width, "rotary_dim": dim}


def _read_neox(raw: dict) -> dict:
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    theta, partial = raw.get("rotary_emb_base"), raw.get("rotary_pct")
    biased = bool(raw.get("attention_bias", True))
    return {
        "rope": read_rope(
            raw,
            theta=10_000.0 if theta is None else float(theta),
            head_dim=head_dim,
            partial=0.25 if partial is None else partial,
        ),
        "residual": "parallel" if raw.get("use_parallel_residual", True) else "sequential",
        "qkv_bias": biased,
        "out_bias": biased,
    }


def _write_neox(config: DecoderConfig) -> dict:
    rope = {} if config.rope is None else write_rope(config.rope, config.head_dim)
    return {
        "rope_parameters": rope,
        "use_parallel_residual": config.residual == "parallel",
        "attention_bias": config.qkv_bias,
    }


_SUMMARY = {f"summary_{key}" for key in ("type", "use_proj", "activation", "first_dropout")}
_GPT_HARMLESS = HARMLESS | _SUMMARY | {"summary_proj_to_labels", "n_ctx"}
_GPT_KEYS = {
    "vocab_size": ("vocab_size", REQUIRED),
    "n_positions": ("max_positions", REQUIRED),
    "n_embd": ("width", REQUIRED),
    "n_layer": ("layers", REQUIRED),
    "n_head": ("heads", REQUIRED),
    "activation_function": ("activation", "gelu_new"),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "initializer_range": ("initializer_range", 0.02),
}

GPT2_FAMILY = Family(
    architecture="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    prefix="transformer.",
    base=GPT2,
    keys=_GPT_KEYS
    | {"scale_attn_by_inverse_layer_idx": ("attention_scale_by_layer", False)}
    | {"tie_word_embeddings": ("tied_head", True)},
    fixed=COMMON_FIXED,
    # reorder_and_upcast_attn means a float32 softmax, which is always used here.
    harmless=_GPT_HARMLESS | {"reorder_and_upcast_attn"},
    weights=GPT2_WEIGHTS,
    harmless_tensors=r"\.attn\.(bias|masked_bias)$",
    special=frozenset({"n_inner", "scale_attn_weights"}),
    read=_read_gpt2,
    write=_write_gpt2,
)
GPTJ = GPT2_FAMILY._replace(
    architecture="GPTJForCausalLM",
    classifier="GPTJForSequenceClassification",
    base={
        "positions": "rope",
        "residual": "parallel_one_norm",
        "qkv_bias": False,
        "out_bias": False,
        "head_bias": True,
    },
    keys=_GPT_KEYS | {"tie_word_embeddings": ("tied_head", False)},
    fixed=COMMON_FIXED | {"rotary": True, "scale_attn_weights": True},
    harmless=_GPT_HARMLESS,
    weights=GPTJ_WEIGHTS,
    special=frozenset({"n_inner", "rotary_dim"}),
    read=_read_gptj,
    write=_write_gptj,
)
NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    classifier="GPTNeoXForSequenceClassification",
    prefix="gpt_neox.",
    base={"positions": "rope"},
    keys={
        "vocab_size": ("vocab_size", REQUIRED),
        "hidden_size": ("width", REQUIRED),
        "intermediate_size": ("mlp_width", REQUIRED),
        "num_hidden_layers": ("layers", REQUIRED),
        "num_attention_heads": ("heads", REQUIRED),
        "max_position_embeddings": ("max_positions", 2048),
        "hidden_act": ("activation", "gelu"),
        "layer_norm_eps": ("norm_eps", 1e-5),
        "initializer_range": ("initializer_range", 0.02),
        "tie_word_embeddings": ("tied_head", False),
    },
    fixed=COMMON_FIXED,
    harmless=HARMLESS | {"hidden_dropout"},
    weights=NEOX_WEIGHTS,
    harmless_tensors=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
    special=(ROPE - {"partial_rotary_factor"})
    | {"rotary_pct", "rotary_emb_base", "use_parallel_residual", "attention_bias"},
    read=_read_neox,
    write=_write_neox,
    renamed=(("lm_head.", "embed_out."),),
)
