"""Logits equal those of transformers' torch models, from checkpoints that transformers wrote."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as checkpoints

from dpojax.models import decoder, huggingface
from dpojax.models.attention import plain_rows

GPT2 = {"vocab_size": 97, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}
LLAMA = {
    "vocab_size": 89,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

# With these the ramp covers several of the eight pairs, and truncation moves both of its ends.
YARN_SIZES = {"head_dim": 16, "max_position_embeddings": 256}


def rope(kind, **settings):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **settings}}


CASES = {
    "gpt2 as it is": ("gpt2", GPT2),
    "gpt2 with one layer and a prime vocabulary": (
        "gpt2",
        GPT2 | {"n_layer": 1, "vocab_size": 503},
    ),
    "gpt2 scaled by layer": (
        "gpt2",
        GPT2 | {"n_layer": 3, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt2 without attention scale": ("gpt2", GPT2 | {"scale_attn_weights": False}),
    "gpt2 with n_inner and exact gelu": (
        "gpt2",
        GPT2 | {"n_inner": 36, "activation_function": "gelu"},
    ),
    "gpt2 with relu and a large eps": (
        "gpt2",
        GPT2 | {"activation_function": "relu", "layer_norm_epsilon": 0.1},
    ),
    "gpt2 with an untied head": (
        "gpt2",
        GPT2 | {"tie_word_embeddings": False, "activation_function": "quick_gelu"},
    ),
    "gpt2 with one head": ("gpt2", GPT2 | {"n_head": 1, "reorder_and_upcast_attn": True}),
    "llama as it is": ("llama", LLAMA),
    "llama with grouped heads": ("llama", LLAMA | {"num_key_value_heads": 2}),
    "llama with one kv head, tied": (
        "llama",
        LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True, "num_hidden_layers": 1},
    ),
    "llama with all biases": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama with wide heads": ("llama", LLAMA | {"head_dim": 16, "num_key_value_heads": 2}),
    "llama with theta 500000 and gelu": (
        "llama",
        LLAMA
        | rope("default", rope_theta=500_000.0)
        | {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 0.1, "num_hidden_layers": 3},
    ),
    "llama with linear scaling": ("llama", LLAMA | rope("linear", factor=4.0)),
    "llama with llama3 scaling": (
        "llama",
        LLAMA
        | {"head_dim": 16}
        | rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "llama with yarn scaling": (
        "llama",
        LLAMA
        | YARN_SIZES
        | rope(
            "yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=64, beta_fast=4.0
        ),
    ),
    "llama with yarn, mscale and no truncation": (
        "llama",
        LLAMA
        | YARN_SIZES
        | rope(
            "yarn",
            rope_theta=100.0,
            factor=4.0,
            original_max_position_embeddings=64,
            beta_fast=4.0,
            mscale=1.0,
            mscale_all_dim=0.5,
            truncate=False,
        ),
    ),
    "mistral with a window": (
        "mistral",
        LLAMA | {"num_key_value_heads": 2, "sliding_window": 5},
    ),
    "mistral without a window": (
        "mistral",
        LLAMA | {"num_key_value_heads": 2, "sliding_window": None},
    ),
    "qwen2 with windows in its upper layers": (
        "qwen2",
        LLAMA
        | {"num_key_value_heads": 2, "num_hidden_layers": 3, "use_sliding_window": True}
        | {"sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2 as it is": ("qwen2", LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, tmp_path):
    model_type, settings = CASES[case]
    theirs = checkpoints.make(model_type, **settings)
    theirs.save_pretrained(tmp_path)
    tokens = checkpoints.random_tokens(settings["vocab_size"], (2, 24))
    expected = checkpoints.torch_logits(theirs, tokens)
    assert expected.std() > 0.3  # else a mistake could hide below the tolerance
    np.testing.assert_allclose(
        checkpoints.our_logits(tmp_path, tokens), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("spelling", ["rope_type", "type"])
def test_rope_scaling_reads_the_same_in_the_older_spelling(spelling, tmp_path):
    theirs = checkpoints.make("llama", **LLAMA, **rope("linear", factor=4.0))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    del raw["rope_parameters"]
    raw |= {"rope_theta": 10_000.0, "rope_scaling": {spelling: "linear", "factor": 4.0}}
    file.write_text(json.dumps(raw))
    tokens = checkpoints.random_tokens(LLAMA["vocab_size"], (1, 24))
    np.testing.assert_allclose(
        checkpoints.our_logits(tmp_path, tokens),
        checkpoints.torch_logits(theirs, tokens),
        atol=1e-4,
        rtol=1e-4,
    )


def test_stories260k_continues_as_recorded(shared):
    folder = shared / "data" / "stories260k"
    recorded = json.loads((folder / "expected.json").read_text())
    config, params, _ = huggingface.load(folder)
    prompt, new = recorded["prompt_ids"], recorded["greedy_new_ids_60"]
    model = decoder.build(config)
    ids = np.array([prompt + new])
    logits = jax.jit(lambda p, rows: decoder.logits(model, p, rows))(params, plain_rows(ids))
    # Greedy decoding is its own teacher-forced argmax, one column earlier.
    assert np.asarray(logits[0].argmax(-1))[len(prompt) - 1 : -1].tolist() == new
    logps = np.asarray(jax.nn.log_softmax(logits[0]))[np.arange(ids.size - 1), ids[0, 1:]]
    expected = recorded["token_logps_float64_of_greedy_sequence"]
    np.testing.assert_allclose(logps, expected, atol=1e-4)
    first = np.asarray(logits[0, len(prompt) - 1, :8])
    recorded_first = recorded["prompt_last_position_logits_float64_first8"]
    np.testing.assert_allclose(first, recorded_first, atol=1e-4)


def test_stories260k_from_bos_continues_for_256_tokens_as_recorded(shared):
    folder = shared / "data" / "stories260k"
    recorded = json.loads((folder / "expected.json").read_text())
    config, params, _ = huggingface.load(folder)
    new = recorded["from_bos_greedy_new_ids_256"]
    model = decoder.build(config)
    rows = plain_rows(jnp.array([[1, *new]]))
    logits = jax.jit(lambda p, rows: decoder.logits(model, p, rows))(params, rows)
    assert np.asarray(logits[0].argmax(-1))[:-1].tolist() == new
