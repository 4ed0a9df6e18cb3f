"""Checkpoints come in and go out unchanged, and what is not understood is named."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as checkpoints

from dpojax.data import reviews
from dpojax.models import huggingface
from dpojax.models.config import GPT2, LLAMA, DecoderConfig, Rope
from dpojax.models.families import config_from_raw
from dpojax.models.safetensors_io import read_folder
from dpojax.sharding import make_mesh

SETTINGS = {
    "gpt2": {"vocab_size": 51, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3},
    "llama": {
        "vocab_size": 51,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "max_position_embeddings": 64,
    },
}
SETTINGS["qwen2"] = {k: v for k, v in SETTINGS["llama"].items() if k != "attention_bias"}
SETTINGS["mistral"] = SETTINGS["qwen2"] | {"sliding_window": 7, "head_dim": 8}


def edit(folder, **changes):
    """config.json with keys set, or removed where the value is ...; returns the folder."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in raw.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model_type", SETTINGS)
def test_import_then_export_is_bit_equal(model_type, dtype, tmp_path):
    torch = pytest.importorskip("torch")
    theirs = checkpoints.make(model_type, **SETTINGS[model_type]).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "in")
    config, params, raw = huggingface.load(tmp_path / "in", dtype=jnp.dtype(dtype))
    huggingface.save(tmp_path / "out", config, params, raw)
    checkpoints.assert_same_tensors(checkpoints.from_pretrained(tmp_path / "out"), theirs)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == raw | {"dtype": dtype}


def test_float32_weights_from_a_bfloat16_folder_are_its_values_and_export_as_float32(tmp_path):
    torch = pytest.importorskip("torch")
    theirs = checkpoints.make("llama", **SETTINGS["llama"]).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "in")
    config, params, raw = huggingface.load(edit(tmp_path / "in", torch_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    huggingface.save(tmp_path / "out", config, params, raw)
    checkpoints.assert_same_tensors(checkpoints.from_pretrained(tmp_path / "out"), theirs.float())


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_sharded_files_load_into_shards_and_are_written_as_shards(model_type, tmp_path):
    theirs = checkpoints.make(model_type, **SETTINGS[model_type])
    theirs.save_pretrained(tmp_path / "in", max_shard_size="10KB")
    assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 2
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    config, params, raw = huggingface.load(tmp_path / "in", mesh=mesh)
    up = params["blocks"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size * 8 == up.size
    huggingface.save(tmp_path / "out", config, params, raw, max_shard_bytes=10_000)
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    assert max(file.stat().st_size for file in files) < 14_000
    checkpoints.assert_same_tensors(checkpoints.from_pretrained(tmp_path / "out"), theirs)


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    config = config_from_raw({"model_type": "gpt2"} | SETTINGS["gpt2"])
    params = checkpoints.random_params(config)
    huggingface.save(tmp_path / "out", config, params)
    tensors = numpy_files.load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(tensors["transformer.wte.weight"], params["embed"]["tokens"])
    ours = read_folder(tmp_path / "out")
    assert ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(ours[name].view, tensor)


def test_base_model_files_without_the_prefix_and_with_old_buffers_load(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    theirs = checkpoints.make("gpt2", **SETTINGS["gpt2"])
    theirs.save_pretrained(tmp_path)
    expected = jax.tree.map(np.asarray, huggingface.load(tmp_path)[1])
    tensors = {name: value.clone() for name, value in theirs.transformer.state_dict().items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    got = huggingface.load(tmp_path)[1]
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    tensors["lm_head.weight"][3, 3] += 1
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"'lm_head.weight' differs from the embedding"):
        huggingface.load(tmp_path)


SIZES = {"vocab_size": 51, "width": 24, "layers": 2, "heads": 4, "mlp_width": 40}
SIZES |= {"max_positions": 64}
FROM_SCRATCH = {
    "gpt2": DecoderConfig(**GPT2, **SIZES, attention_scale=1.0, attention_scale_by_layer=True),
    "llama": DecoderConfig(**LLAMA, **SIZES, kv_heads=1, head_dim=8),
    "yarn": DecoderConfig(
        **LLAMA | {"rope": Rope("yarn", factor=4.0, original_max_positions=16, beta_fast=4.0)},
        **SIZES,
    ),
    "mistral": DecoderConfig(**LLAMA, **SIZES, windows=(5, 5)),
    "qwen2": DecoderConfig(**LLAMA | {"qkv_bias": True}, **SIZES, windows=(None, 5)),
}


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_a_model_made_here_is_the_same_model_in_transformers(name, tmp_path):
    config = FROM_SCRATCH[name]
    params = checkpoints.random_params(config)
    huggingface.save(tmp_path / "out", config, params)
    assert huggingface.read_config(tmp_path / "out")[0] == config
    tokens = checkpoints.random_tokens(51, (2, 20))
    theirs = checkpoints.torch_logits(checkpoints.from_pretrained(tmp_path / "out"), tokens)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(
        checkpoints.our_logits(tmp_path / "out", tokens), theirs, atol=1e-4, rtol=1e-4
    )


def test_a_config_that_no_family_has_names_what_stands_in_the_way():
    with pytest.raises(ValueError, match=r"llama \(.*norm.*gpt2 \(gated_mlp"):
        huggingface.config_to_raw(DecoderConfig(**GPT2 | {"gated_mlp": True}, **SIZES))


def test_tokenizer_and_generation_config_are_written_beside_the_weights(shared, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = shared / "data" / "stories260k"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    config, params, _ = huggingface.load(source)
    generation = {"eos_token_id": [1, 2], "max_new_tokens": 7}
    huggingface.save(
        tmp_path / "out", config, params, tokenizer=tokenizer, generation_config=generation
    )
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("Once upon a time").input_ids == tokenizer("Once upon a time").input_ids
    model = checkpoints.from_pretrained(tmp_path / "out")
    assert model.generation_config.max_new_tokens == 7
    assert model.config.bos_token_id == tokenizer.bos_token_id


def test_an_existing_folder_is_refused_and_a_failed_export_leaves_nothing(tmp_path):
    config = FROM_SCRATCH["llama"]
    params = checkpoints.random_params(config)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="full: is already there and not empty"):
        huggingface.save(tmp_path / "full", config, params)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["notes.txt"]

    class BrokenTokenizer:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        huggingface.save(tmp_path / "out", config, params, tokenizer=BrokenTokenizer())
    assert [entry.name for entry in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    huggingface.save(tmp_path / "empty", config, params)
    assert huggingface.read_config(tmp_path / "empty")[0] == config


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk without room")
def test_a_tokenizer_that_the_disk_does_not_take_is_an_oserror(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot be written: .*No space left"):
        huggingface.save_tokenizer(reviews.tokenizer(), tmp_path)


def test_a_raw_config_of_another_model_is_refused(tmp_path):
    config = FROM_SCRATCH["llama"]
    raw = huggingface.config_to_raw(config) | {"rms_norm_eps": 0.5}
    params = checkpoints.random_params(config)
    with pytest.raises(ValueError, match=r"raw: does not describe config.*norm_eps"):
        huggingface.save(tmp_path / "out", config, params, raw)
    assert not list(tmp_path.iterdir())


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
ODD_YARN = {"rope_type": "yarn", "factor": 2.0, "gamma": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mamba"},
            r"config.json: model_type: 'mamba' is not supported, only gemma, ",
        ),
        ({"model_type": ...}, r"model_type: None is not supported"),
        ({"hidden_size": ...}, r"hidden_size: missing"),
        ({"hidden_act": "xielu"}, r"hidden_act: 'xielu' is not in"),
        (
            {"quantization_config": {"bits": 4}},
            r"quantization_config: .*'bits': 4.* is not supported.*dequantize",
        ),
        ({"is_encoder_decoder": True}, r"is_encoder_decoder: True is not supported"),
        ({"rope_parameters": DYNAMIC}, r"rope scaling 'dynamic' is not supported"),
        ({"rope_parameters": ODD_YARN}, r"rope_parameters.gamma: not a setting of 'yarn'"),
        (
            {"rope_parameters": {"rope_type": "linear"}},
            r"rope_parameters.factor: 'linear' .* needs",
        ),
        ({"mlp_bias": True}, r"tensor 'model.layers.0.mlp.gate_proj.bias' is missing"),
        ({"attention_bias": False}, r"tensor 'model.layers.0.self_attn.k_proj.bias' is not one"),
        ({"num_hidden_layers": 1}, r"tensor 'model.layers.1.* is not one that config.json implies"),
        (
            {"vocab_size": 52},
            r"model.safetensors: tensor 'model.embed_tokens.weight' has shape \(51, 24\), but "
            r"config.json makes it \(52, 24\)",
        ),
    ],
)
def test_what_is_not_understood_is_named(change, message, tmp_path):
    checkpoints.make("llama", **SETTINGS["llama"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        huggingface.load(edit(tmp_path, **change))


def test_folders_without_safetensors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json: not there"):
        huggingface.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"} | SETTINGS["gpt2"]))
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        huggingface.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"only pytorch_model.bin, a pickle, which dpojax never"
    ):
        huggingface.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder, and not a name like owner/model"):
        huggingface.load(tmp_path / "typo")


def test_a_file_that_is_cut_short_is_an_error_that_names_it(tmp_path):
    config = FROM_SCRATCH["llama"]
    huggingface.save(tmp_path / "out", config, checkpoints.random_params(config))
    file = tmp_path / "out" / "model.safetensors"
    whole = file.read_bytes()
    for length in (5, 100, len(whole) - 4):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model.safetensors: .*cut short"):
            huggingface.load(tmp_path / "out")
