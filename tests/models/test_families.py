"""Every decoder family beside GPT-2, Llama, Mistral and Qwen 2 (test_parity.py) against torch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as checkpoints

from dpojax.models import huggingface
from dpojax.models.config import LLAMA, DecoderConfig, Rope
from dpojax.models.families import config_from_raw, config_to_raw
from tests import further

GPTJ = {"vocab_size": 53, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}
SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
SMALL = SIZES | {"hidden_size": 32}  # heads of eight
GEMMA = GROUPED | {"query_pre_attn_scalar": 6, "sliding_window": 5}
FULL, SLIDING = "full_attention", "sliding_attention"


def rope(**settings):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, **settings}}


CASES = {
    "gptj with half of a head rotated": ("gptj", GPTJ | {"rotary_dim": 4}),
    "gptj tied, all of a head rotated, n_inner": (
        "gptj",
        GPTJ | {"rotary_dim": 8, "tie_word_embeddings": True, "n_inner": 36, "n_layer": 1},
    ),
    "neox with parallel residuals and a quarter rotated": (
        "gpt_neox",
        SMALL | rope(partial_rotary_factor=0.25),
    ),
    "neox with an odd number of rotated dimensions": (
        "gpt_neox",
        SIZES | rope(partial_rotary_factor=0.5) | {"num_attention_heads": 4, "hidden_size": 24},
    ),
    "neox with sequential residuals, tied, without attention biases": (
        "gpt_neox",
        SMALL
        | rope(partial_rotary_factor=1.0, rope_type="linear", factor=3.0)
        | {"use_parallel_residual": False, "tie_word_embeddings": True, "attention_bias": False}
        | {"hidden_act": "gelu_new", "layer_norm_eps": 0.1},
    ),
    "qwen3 with grouped heads": ("qwen3", GROUPED),
    "qwen3 tied, with biases, windows and theta 100": (
        "qwen3",
        GROUPED
        | rope()
        | {"tie_word_embeddings": True, "attention_bias": True, "rms_norm_eps": 0.1}
        | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "gemma with one key head, biases and the name that published files give its activation": (
        "gemma",
        GROUPED | rope() | {"num_key_value_heads": 1, "hidden_act": "gelu", "attention_bias": True},
    ),
    "gemma2 with tight caps": (
        "gemma2",
        GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 4.0},
    ),
    "gemma2 untied, without caps, with biases, three layers": (
        "gemma2",
        GEMMA
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"tie_word_embeddings": False, "attention_bias": True, "query_pre_attn_scalar": 8}
        | {"num_hidden_layers": 3, "num_key_value_heads": 1, "rms_norm_eps": 0.1},
    ),
    "gemma3 with a layer type each and two thetas": (
        "gemma3_text",
        GEMMA
        | {"layer_types": [SLIDING, FULL], "final_logit_softcapping": 4.0}
        | {
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
                SLIDING: {"rope_type": "default", "rope_theta": 50.0},
            }
        },
    ),
    "gemma3 with its default ropes and window pattern": (
        "gemma3_text",
        GEMMA | {"num_hidden_layers": 6, "tie_word_embeddings": False, "hidden_size": 16},
    ),
    "phi3 with grouped heads and a window": (
        "phi3",
        SMALL | {"num_key_value_heads": 2, "sliding_window": 5},
    ),
    "phi3 tied, with half of a head rotated": (
        "phi3",
        SMALL | rope(partial_rotary_factor=0.5) | {"tie_word_embeddings": True},
    ),
}


# Settings of families that another case has already.
VARIANTS = (
    "gptj tied, all of a head rotated, n_inner",
    "neox with an odd number of rotated dimensions",
    "qwen3 with grouped heads",
    "gemma2 with tight caps",
    "gemma3 with its default ropes and window pattern",
    "phi3 with grouped heads and a window",
)


def tokens_of(settings):
    return checkpoints.random_tokens(settings["vocab_size"], (2, 20))


@pytest.mark.parametrize(
    "case", [*(name for name in CASES if name not in VARIANTS), *further(*VARIANTS)]
)
def test_logits_equal_those_of_transformers_and_exports_are_the_same_model(case, tmp_path):
    model_type, settings = CASES[case]
    theirs = checkpoints.make(model_type, **settings)
    theirs.save_pretrained(tmp_path / "in")
    tokens = tokens_of(settings)
    expected = checkpoints.torch_logits(theirs, tokens)
    assert expected.std() > 0.3  # else a mistake could hide below the tolerance
    ours = checkpoints.our_logits(tmp_path / "in", tokens)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)

    config, params, raw = huggingface.load(tmp_path / "in")
    huggingface.save(tmp_path / "saved", config, params, raw)
    again = checkpoints.from_pretrained(tmp_path / "saved")
    checkpoints.assert_same_tensors(again, theirs)
    # A config.json written from our config may name an earlier family that is the same model.
    huggingface.save(tmp_path / "new", config, params)
    again = checkpoints.from_pretrained(tmp_path / "new")
    np.testing.assert_allclose(checkpoints.torch_logits(again, tokens), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "phi3", *further("gptj", "gpt_neox")])
def test_sharded_bfloat16_files_come_in_and_go_out_bit_equal(family, tmp_path):
    torch = pytest.importorskip("torch")
    settings = next(settings for kind, settings in CASES.values() if kind == family)
    theirs = checkpoints.make(family, **settings).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="4KB")
    assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 2
    config, params, raw = huggingface.load(tmp_path / "in", dtype=jnp.bfloat16)
    huggingface.save(tmp_path / "out", config, params, raw)
    checkpoints.assert_same_tensors(checkpoints.from_pretrained(tmp_path / "out"), theirs)
    widened = huggingface.load(tmp_path / "in")[1]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(widened))
    same = jax.tree.map(lambda x, y: bool((x == y.astype(x.dtype)).all()), widened, params)
    assert all(jax.tree.leaves(same))


def test_published_names_of_pythia_and_gpt_j_load(tmp_path):
    """embed_out for the head, rotary_pct and rotary_emb_base, causal masks kept as buffers."""
    safetensors = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    theirs = checkpoints.make("gpt_neox", **SMALL, **rope(partial_rotary_factor=0.25))
    theirs.save_pretrained(tmp_path)
    tokens = tokens_of(SMALL)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["rope_parameters"]
    raw |= {"rotary_pct": 0.25, "rotary_emb_base": 100}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    expected = checkpoints.torch_logits(theirs, tokens)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    state["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    for head in ("lm_head.weight", "embed_out.weight"):
        state[head] = state.pop("lm_head.weight")
        safetensors.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        ours = checkpoints.our_logits(tmp_path, tokens)
        np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)


def test_gemma3_reads_the_same_in_its_older_spelling():
    model_type, settings = CASES["gemma3 with a layer type each and two thetas"]
    new = config_from_raw(settings | {"model_type": model_type})
    old = settings | {"model_type": model_type, "rope_theta": 5000.0, "rope_local_base_freq": 50.0}
    del old["rope_parameters"], old["layer_types"]
    old |= {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "sliding_window_pattern": 2}
    assert config_from_raw(old) == new
    assert new.rope == Rope("linear", 5000.0, factor=4.0)
    assert new.local_rope == Rope("default", 50.0)
    assert new.windows == (5, None)


@pytest.mark.parametrize("case", CASES)
def test_a_config_written_out_is_read_back(case):
    model_type, settings = CASES[case]
    config = config_from_raw({"model_type": model_type, "architectures": []} | settings)
    assert config_from_raw(config_to_raw(config)) == config


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1], "long_factor": [2]}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("phi3", {"rope_scaling": LONGROPE}, r"rope scaling 'longrope' is not supported \(only d"),
        ("phi3", {"rope_scaling": {"type": "su"}}, r"rope scaling 'su' .*longest sequence"),
        ("phi3", {"rope_scaling": {"type": "yarn"}}, r"rope scaling 'yarn' is not supported"),
        ("phi3", {"attention_bias": True}, r"attention_bias: True is not supported, only False"),
        ("qwen3", rope(partial_rotary_factor=0.5), r"partial_rotary_factor: only 1.0"),
        ("gptj", {"rotary_dim": 5}, r"rotary_dim: 5 is not supported, only an even"),
        ("gptj", {"rotary_dim": 10}, r"rope.dim: 10 is more than head_dim 8"),
        ("gptj", {"rotary_dim": None}, r"rotary_dim: None is not supported"),
        ("gptj", {"rotary": False}, r"rotary: False is not supported, only True"),
        (
            "gpt_neox",
            {"per_layer_config": [{}]},
            r"per_layer_config: .*transformers reads for gpt_n",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, r"use_bidirectional_attention: True"),
        ("gemma2", {"layer_types": ["chunked"] * 2}, r"layer_types: 'chunked' is not supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping: 50.0 is not"),
        ("gemma3_text", {"sliding_window": None}, r"sliding_window: missing"),
        ("gemma3_text", rope(), r"rope_parameters.rope_theta: gemma3_text has one set per layer"),
        ("gemma3_text", {"vision_config": {}}, r"vision_config: \{\} is a setting that"),
    ],
)
def test_what_is_not_understood_is_named(family, change, message):
    settings = next(settings for kind, settings in CASES.values() if kind == family)
    with pytest.raises(ValueError, match=message):
        config_from_raw({"model_type": family} | settings | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": "diagonal"}, "residual: 'diagonal' is not one of sequential, parallel"),
        ({"residual": "parallel", "post_norms": True}, "post_norms: residual is 'parallel'"),
        ({"local_rope": Rope(dim=2)}, "local_rope: it must rotate the same pairs as rope"),
        ({"rope": None, "positions": "learned", "local_rope": Rope()}, "local_rope: give it"),
    ],
)
def test_settings_that_do_not_fit_together_name_the_field(change, message):
    sizes = {"vocab_size": 5, "width": 8, "layers": 1, "heads": 2, "mlp_width": 8}
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**LLAMA | sizes | {"max_positions": 8} | change)
