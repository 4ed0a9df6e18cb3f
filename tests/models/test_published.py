"""Published config.json files: shrunk, with every field kept, they load, agree and export."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as checkpoints

from dpojax.models import decoder, huggingface
from dpojax.models.attention import plain_rows

# What is said of models that cannot be computed here.
REFUSED = {
    "phi35": "rope scaling 'longrope' is not supported .*longest sequence of its batch",
    "ministral3": "model_type: 'ministral3' is not supported, only gemma, ",
}
# Those with keys that transformers ignores, and one of each family that others do not test.
QUICK = ("gpt2_medium", "qwen25_base", "smollm2", "gemma1", "gemma3_1b", "mistral03", "phi4")
LONG = (
    *("deepseek_coder", "deepseek_llm", "distilgpt2", "falcon3", "gemma2", "gemma3_270m"),
    *("gemma3_4b_text", "gpt2", "gptj", "llama2", "llama31", "llama32", "ministral8b"),
    *("mistral01", "mistral_small3", "nemo", "phi3_4k", "pythia", "qwen25_instruct"),
    *("qwen25_yarn", "qwen3", "qwen3_yarn", "r1_llama", "r1_qwen", "tinyllama", "yi", "zephyr"),
)
CASES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)]

TOKENS = checkpoints.random_tokens(61, (2, 20))
TINY = {"vocab_size": 61, "hidden_size": 32, "n_embd": 32, "intermediate_size": 48}
TINY |= {"num_attention_heads": 4, "n_head": 4, "n_layer": 2, "head_dim": 16}
TINY |= {"max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "rotary_dim": 4}
TINY |= {"sliding_window": 5, "original_max_position_embeddings": 16}
TINY |= {"query_pre_attn_scalar": 16, "sliding_window_pattern": 2, "_sliding_window_pattern": 2}
TINY |= {"bos_token_id": 1, "pad_token_id": 0, "image_token_index": 60}


def shrunk(raw):
    """The same keys, none added and none left out, with small sizes; ratios stay what they were."""
    small = {key: TINY[key] if raw[key] is not None and key in TINY else raw[key] for key in raw}
    if "num_hidden_layers" in raw:
        small["num_hidden_layers"] = 2
    if "eos_token_id" in raw:
        small["eos_token_id"] = [2, 3] if isinstance(raw["eos_token_id"], list) else 2
    if "num_key_value_heads" in raw:
        ratio = raw["num_attention_heads"] // raw["num_key_value_heads"]
        small["num_key_value_heads"] = 4 // min(ratio, 4)
    if "max_window_layers" in raw:
        all_plain = raw["max_window_layers"] >= raw["num_hidden_layers"]
        small["max_window_layers"] = 2 if all_plain else 1
    if "layer_types" in raw:
        small["layer_types"] = raw["layer_types"][4:6]
    for nested in ("rope_scaling", "text_config", "vision_config"):
        if raw.get(nested):
            small[nested] = shrunk(raw[nested])
    if raw.get("model_type") == "siglip_vision_model":  # with large defaults
        small |= {"num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 4}
    return small


def torch_model(folder):
    """A random torch model, float32, of the config.json in a folder, which gets its weights."""
    torch = pytest.importorskip("torch", reason="the expected values come from torch")
    transformers = pytest.importorskip("transformers")
    published = (folder / "config.json").read_text()
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(published)
    return model.eval()


@functools.cache
def logits_of(config):
    """One compiled program for every file that describes the same model."""
    model = decoder.build(config)
    return jax.jit(lambda params, rows: decoder.logits(model, params, rows))


def written(shared, name, folder):
    """Make a folder with a shrunk config.json in it; returns what is in there."""
    raw = shrunk(json.loads((shared / "cases" / "models" / f"{name}.json").read_text()))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    return raw


def read_and_compared(folder, theirs):
    """Load a folder and compare its logits with those of a torch model; returns what was loaded."""
    expected = checkpoints.torch_logits(theirs, TOKENS)
    assert expected.std() > 0.1  # else a mistake could hide below the tolerance
    config, params, raw = huggingface.load(folder)
    ours = logits_of(config)(params, plain_rows(jnp.asarray(TOKENS)))
    np.testing.assert_allclose(ours, expected, atol=2.4e-5, rtol=0)
    return config, params, raw


@pytest.mark.parametrize("name", CASES)
def test_a_published_model_has_the_logits_of_transformers_and_exports_bit_equal(
    name, shared, tmp_path
):
    raw = written(shared, name, tmp_path / "in")
    theirs = torch_model(tmp_path / "in")
    config, params, read = read_and_compared(tmp_path / "in", theirs)
    assert read == raw
    huggingface.save(tmp_path / "out", config, params, read)
    checkpoints.assert_same_tensors(checkpoints.from_pretrained(tmp_path / "out"), theirs)
    kept = raw.keys() - {"auto_map"}  # names code that is not in the folder
    assert kept <= json.loads((tmp_path / "out" / "config.json").read_text()).keys()


@pytest.mark.slow  # the table of tokens has its full size, which the file leaves to the class
def test_of_a_model_that_sees_images_the_language_model_is_read_and_exported(shared, tmp_path):
    written(shared, "gemma3_4b", tmp_path / "in")
    theirs = torch_model(tmp_path / "in")
    config, params, read = read_and_compared(tmp_path / "in", theirs)
    huggingface.save(tmp_path / "out", config, params, read)
    again = checkpoints.from_pretrained(tmp_path / "out")
    assert type(again).__name__ == "Gemma3ForCausalLM"
    checkpoints.assert_same_tensors(again.model, theirs.model.language_model)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_computed_here_is_refused_by_its_name(name, shared, tmp_path):
    written(shared, name, tmp_path / "in")
    with pytest.raises(ValueError, match=f"in/config.json: {REFUSED[name]}"):
        huggingface.read_config(tmp_path / "in")


def test_every_published_file_has_a_case(shared):
    files = {file.stem for file in (shared / "cases" / "models").glob("*.json")}
    assert files == {*QUICK, *LONG, *REFUSED, "gemma3_4b"}
