"""What CONTRIBUTING.md says about adding a model family is enough: one is added here."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import random_params, random_tokens

from dpojax.logprobs import token_logprobs
from dpojax.models import decoder, families, huggingface
from dpojax.models.attention import plain_rows
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.models.families.llama import LLAMA_FAMILY, LLAMA_KEYS, LLAMA_WEIGHTS
from dpojax.models.weights import affine

CONFIG = DecoderConfig(
    **LLAMA,
    vocab_size=53,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp_width=24,
    max_positions=32,
    norm_eps=1e-3,
)
THEIR_DOWN, OUR_DOWN = "model.layers.{layer}.mlp.w2", "blocks/mlp/down"

# Step 1: what `families/hare.py` would hold. Its config.json has `ffn_dim` in place of Llama's
# `intermediate_size`, and its down projection is called `w2`.
HARE = LLAMA_FAMILY._replace(
    architecture="HareForCausalLM",
    classifier="HareForSequenceClassification",
    keys={key: field for key, field in LLAMA_KEYS.items() if key != "intermediate_size"}
    | {"ffn_dim": LLAMA_KEYS["intermediate_size"]},
    fixed=LLAMA_FAMILY.fixed | {"mlp_bias": False},
    weights=(
        *(weight for weight in LLAMA_WEIGHTS if "down_proj" not in weight.name),
        *affine(THEIR_DOWN, OUR_DOWN, "fd -> d f", "d -> d"),
    ),
)


@pytest.fixture
def hare(monkeypatch):
    """Step 2: its model_type in `DECODERS`."""
    monkeypatch.setitem(families.DECODERS, "hare", HARE)


@pytest.fixture
def folders(tmp_path):
    """A Llama, and a Hare with the same weights whose files are written by hand."""
    llama, hare = tmp_path / "llama", tmp_path / "hare"
    huggingface.save(llama, CONFIG, random_params(CONFIG))
    raw = json.loads((llama / "config.json").read_text())
    raw |= {"model_type": "hare", "architectures": ["HareForCausalLM"]}
    raw["ffn_dim"] = raw.pop("intermediate_size")
    tensors = load_file(llama / "model.safetensors")
    hare.mkdir()
    (hare / "config.json").write_text(json.dumps(raw))
    save_file(
        {name.replace("mlp.down_proj", "mlp.w2"): tensor for name, tensor in tensors.items()},
        hare / "model.safetensors",
    )
    return llama, hare


def logprobs(folder):
    """Log-probs of random tokens [2, 11] under the model in a folder."""
    config, params, _ = huggingface.load(folder)
    model = decoder.build(config)
    tokens = random_tokens(CONFIG.vocab_size, (2, 12))

    @jax.jit
    def score(params):
        hidden = model.apply(params, plain_rows(tokens))[:, :-1]
        return token_logprobs(hidden, model.head(params), tokens[:, 1:])

    return np.asarray(score(params))


def test_a_family_that_renames_a_key_and_a_tensor_has_the_log_probs_of_the_one_it_came_from(
    hare, folders
):
    llama, renamed = (logprobs(folder) for folder in folders)
    assert llama.std() > 0.3
    np.testing.assert_array_equal(renamed, llama)


def test_a_model_of_the_new_family_is_saved_under_its_own_names(hare, folders, tmp_path):
    _, folder = folders
    config, params, raw = huggingface.load(folder)
    assert config == CONFIG
    huggingface.save(tmp_path / "saved", config, params, raw)
    saved, original = (load_file(x / "model.safetensors") for x in (tmp_path / "saved", folder))
    assert saved.keys() == original.keys()
    assert THEIR_DOWN.format(layer=1) + ".weight" in saved
    for name, tensor in original.items():
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["ffn_dim"] == 24


def test_a_model_without_a_config_json_is_still_written_as_the_family_that_was_there_first(hare):
    """`config_to_raw` takes the first family that fits, so a new one goes below the others."""
    assert families.config_to_raw(CONFIG)["model_type"] == "llama"


def test_a_family_that_nobody_added_is_refused_by_its_model_type(folders):
    with pytest.raises(ValueError, match=r"model_type: 'hare' is not supported, only .*llama"):
        huggingface.load(folders[1])


def test_a_tensor_that_the_new_family_does_not_list_is_named(hare, folders):
    llama, folder = folders
    save_file(load_file(llama / "model.safetensors"), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"mlp\.(w2|down_proj)\.weight"):
        huggingface.load(folder)
