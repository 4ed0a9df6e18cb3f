"""A key of config.json is harmless where transformers ignores it, and named where it does not."""

import logging

import pytest
import tiny_checkpoints as checkpoints
from transformers import CONFIG_MAPPING

from dpojax.models.families import DECODERS, ENCODERS, config_from_raw
from tests import further

GPT = {"vocab_size": 11, "n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32}
SIZES = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
SETTINGS = dict.fromkeys(DECODERS, GROUPED) | {"gpt2": GPT, "gptj": GPT | {"rotary_dim": 4}}
SETTINGS |= {"gpt_neox": SIZES, "phi3": SIZES, "bert": SIZES, "roberta": SIZES}

# What published files hold, and keys that mean something for another family.
IGNORED = [
    ("gpt2", {"n_special": 0, "predict_special_tokens": True}),
    ("gpt2", {"use_sliding_window": True, "rope_theta": 5.0}),
    ("gptj", {"alibi": True, "mlp_bias": True}),
    ("qwen2", {"use_mrope": False}),
    ("qwen2", {"attention_bias": False, "model_max_length": 7}),
    ("llama", {"is_llama_config": True, "rope_interleaved": False}),
    ("llama", {"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}),
    ("llama", {"sliding_window": 4, "use_sliding_window": False, "max_window_layers": 2}),
    ("llama", {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 5.0, "clip_qkv": 8.0}),
    ("mistral", {"_flash_attn_2_enabled": True, "qk_layernorm": True}),
    ("gemma", {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4}),
    ("gemma2", {"logit_scale": 3.0, "rope_local_base_freq": 5.0}),
    ("gemma3_text", {"use_qk_norm": False, "embedding_multiplier": 2.0}),
    ("phi3", {"num_experts": 8, "residual_multiplier": 2.0}),
    ("gpt_neox", {"max_window_layers": 1, "rope_ratio": 2.0}),
    ("qwen3", {"mlp_bias": True, "tags": ["a"], "model": "b", "version": 3}),
    ("roberta", {"language": "english", "adapter_size": 3}),
    ("bert", {"language": "english", "gate": True}),
]
# Read by the class, but at a value that changes nothing.
WITHOUT_EFFECT = [
    ("llama", {"partial_rotary_factor": 1.0}),
    ("phi3", {"head_dim": 8}),
    ("gpt2", {"head_dim": 8, "num_key_value_heads": 2}),
    ("gpt2", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
    ("gemma3_text", {"attn_logit_softcapping": None, "is_causal": True}),
    ("qwen2", {"chunk_size_feed_forward": 0, "return_dict": True}),
]
READ = [
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0 is supported"),
    ("gemma3_text", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is a setting that"),
    ("phi3", {"head_dim": 4}, "head_dim: 4 is a setting that transformers reads for phi3"),
    ("gpt2", {"num_hidden_layers": 7}, "num_hidden_layers: 7 is a setting that transformers reads"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention: True is not supported"),
    ("llama", {"per_layer_config": [{}]}, r"per_layer_config: \[\{\}\] is a setting that"),
    ("llama", {"is_causal": False}, "is_causal: False is not supported, only True"),
    ("mistral", {"layer_types": ["chunked_attention"]}, "layer_types: .* is a setting that"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: True"),
    ("roberta", {"is_decoder": True}, "is_decoder: True is not supported, only False"),
    (
        "qwen2",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        r"quantization_config: .*'gptq'.* is not supported: .* take the repository with the orig",
    ),
]


def read(model_type, extra):
    families = ENCODERS if model_type in ENCODERS else DECODERS
    return config_from_raw({"model_type": model_type} | SETTINGS[model_type] | extra, families)


@pytest.mark.parametrize(("model_type", "extra"), [*IGNORED, *WITHOUT_EFFECT])
def test_a_key_that_transformers_ignores_changes_nothing_here_either(model_type, extra):
    assert read(model_type, extra) == read(model_type, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "extra"),
    [*WITHOUT_EFFECT, *IGNORED[::3], *further(*IGNORED[1::3], *IGNORED[2::3])],
)
def test_the_torch_model_has_the_same_logits_with_a_key_that_is_ignored(model_type, extra):
    kind = "AutoModelForSequenceClassification" if model_type in ENCODERS else checkpoints.LANGUAGE
    tokens = checkpoints.random_tokens(11, (1, 12), seed=1)
    plain, keyed = (
        checkpoints.torch_logits(
            checkpoints.make(model_type, kind=kind, **SETTINGS[model_type] | more), tokens
        )
        for more in ({}, extra)
    )
    assert plain.std() > 0
    assert (plain == keyed).all()


@pytest.mark.parametrize(("model_type", "extra", "message"), READ)
def test_a_key_that_transformers_reads_and_the_decoder_does_not_is_named(
    model_type, extra, message
):
    with pytest.raises(ValueError, match=message):
        read(model_type, extra)


@pytest.mark.parametrize("model_type", [*DECODERS, *ENCODERS])
def test_all_that_transformers_writes_of_a_default_model_is_read(model_type):
    raw = CONFIG_MAPPING[model_type]().to_dict()
    config_from_raw(raw, ENCODERS if model_type in ENCODERS else DECODERS)


def test_no_error_advises_to_remove_a_key():
    for model_type, extra, _ in READ:
        with pytest.raises(ValueError, match=":") as error:
            read(model_type, extra)
        assert "remove" not in str(error.value)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"transformers_version": "99.0.0"}, "transformers 99.0.0, which wrote it, may read them"),
        ({"auto_map": {"AutoModelForCausalLM": "mine.Mine"}}, "the model's own code, which never"),
        ({"transformers_version": "4.40.1"}, None),
        ({"transformers_version": ["odd"]}, None),
        ({}, None),
    ],
)
def test_ignored_keys_are_told_where_other_code_may_read_them(about, said, caplog):
    with caplog.at_level(logging.WARNING):
        read("llama", {"use_mrope": False} | about)
    told = [record.getMessage() for record in caplog.records]
    assert all("transformers ignores use_mrope for llama" in message for message in told)
    assert (said is None and not told) or said in told[0]


def test_a_key_with_line_breaks_and_control_codes_is_told_in_one_line(caplog):
    with caplog.at_level(logging.WARNING):
        read("llama", {"a\n\x1b[2Jb": 1, 10_000 * "c": 1, "transformers_version": "99.0.0"})
    (told,) = (record.getMessage() for record in caplog.records)
    assert told.isprintable()
    assert r"ignores a\n\x1b[2Jb, ccc" in told
    assert len(told) < 400
