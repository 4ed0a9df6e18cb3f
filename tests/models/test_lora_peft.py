"""Adapters that peft wrote compute the same logits here, and those written here load in peft."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as checkpoints
from flax import traverse_util

from dpojax.models import decoder, huggingface, lora
from dpojax.models.attention import plain_rows
from dpojax.models.lora import LoraConfig
from dpojax.models.lora_peft import load_peft, save_peft
from tests import further

# peft reads a name of transformers' that has since been deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4}
NEOX = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
BASES = {
    "llama": LLAMA,
    "gpt2": GPT2,  # Conv1D, fused queries, keys and values
    "gptj": GPT2 | {"rotary_dim": 4},
    "gpt_neox": NEOX,  # fused head by head
    "phi3": LLAMA,  # also gate and up are fused
    "gemma2": LLAMA | {"head_dim": 8},
}
# What peft calls all linear maps of the blocks.
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "gptj": ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}
TARGETS["gemma2"] = TARGETS["llama"]
EVERY = pytest.mark.parametrize(
    ("model_type", "stabilised"),
    [
        *(("llama", False), ("gpt_neox", False), ("phi3", False), ("gpt2", True)),
        *further(("gpt2", False), ("gptj", False), ("gemma2", False)),
    ],
)
TOKENS = checkpoints.random_tokens(61, (2, 11))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{model_type: folder of a tiny random checkpoint}, made when asked for."""
    pytest.importorskip("torch", reason="transformers builds its models with torch")
    made = {}

    def base(model_type):
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            checkpoints.make(model_type, **BASES[model_type]).save_pretrained(made[model_type])
        return made[model_type]

    return base


def torch_base(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def write_with_peft(base, folder, **settings):
    """Adapters with every entry random, in peft's format; their logits."""
    peft = pytest.importorskip("peft", reason="the expected values come from peft")
    import torch

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 12, "fan_in_fan_out": "gpt2" in str(base)} | settings
    model = peft.get_peft_model(torch_base(base), peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return checkpoints.torch_logits(model, TOKENS)


def read_with_peft(base, folder):
    """The logits of a base with the adapters of a folder."""
    peft = pytest.importorskip("peft", reason="the expected values come from peft")
    model = peft.PeftModel.from_pretrained(torch_base(base), folder).eval()
    return checkpoints.torch_logits(model, TOKENS)


def our_logits(base, adapters, config):
    decoder_config, params, _ = huggingface.load(base)
    model = decoder.build(decoder_config)
    rows = plain_rows(jnp.asarray(TOKENS))
    return np.asarray(decoder.logits(model, lora.apply(params, adapters, config), rows))


def read_here(base, folder):
    decoder_config, raw = huggingface.read_config(base)
    adapters, config = load_peft(folder, decoder_config, raw)
    return our_logits(base, adapters, config)


def random_adapters(base, config, seed=3):
    decoder_config, params, raw = huggingface.load(base)
    rng = np.random.default_rng(seed)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32),
        lora.init(jax.random.key(0), params, config),
    )
    return adapters, decoder_config, raw


@EVERY
def test_adapters_that_peft_wrote_give_its_logits_here(bases, tmp_path, model_type, stabilised):
    base = bases(model_type)
    expected = write_with_peft(
        base, tmp_path, target_modules=TARGETS[model_type], use_rslora=stabilised
    )
    assert np.abs(expected - checkpoints.torch_logits(torch_base(base), TOKENS)).max() > 0.1
    np.testing.assert_allclose(read_here(base, tmp_path), expected, atol=1e-4)


@EVERY
def test_adapters_that_we_wrote_give_our_logits_in_peft(bases, tmp_path, model_type, stabilised):
    base, folder = bases(model_type), tmp_path / "out"
    config = LoraConfig(4, 12.0, rank_stabilised=stabilised)
    adapters, decoder_config, raw = random_adapters(base, config)
    save_peft(folder, adapters, config, decoder_config, raw)
    ours = our_logits(base, adapters, config)
    np.testing.assert_allclose(read_with_peft(base, folder), ours, atol=1e-4)
    again, loaded = load_peft(folder, decoder_config, raw)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    assert (loaded.rank, loaded.scale) == (4, config.scale)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "phi3"])
def test_one_part_of_a_fused_module_can_be_adapted_alone(bases, tmp_path, model_type):
    base, folder = bases(model_type), tmp_path / "out"
    config = LoraConfig(3, 6.0, ("attention/value/",))
    adapters, decoder_config, raw = random_adapters(base, config)
    save_peft(folder, adapters, config, decoder_config, raw)
    ours = our_logits(base, adapters, config)
    np.testing.assert_allclose(read_with_peft(base, folder), ours, atol=1e-4)
    np.testing.assert_allclose(read_here(base, folder), ours, atol=1e-4)


def test_ranks_and_alphas_of_their_own_are_kept(bases, tmp_path):
    expected = write_with_peft(
        bases("llama"),
        tmp_path,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"self_attn.q_proj": 3.0},
    )
    np.testing.assert_allclose(read_here(bases("llama"), tmp_path), expected, atol=1e-4)


ONE_LAYER = r"model\.layers\.1\.self_attn\.q_proj"


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 50.0}},
        {"alpha_pattern": {ONE_LAYER: 50.0, "q_proj": 2.0}},  # the first that matches counts
        {"alpha_pattern": {r"layers\.[02]\..*": 30.0}, "use_rslora": True},
        {"rank_pattern": {"layers.2.self_attn.q_proj": 2}},
        {"rank_pattern": {"layers.0.mlp.down_proj": 7}, "use_rslora": True},
        {
            "rank_pattern": {ONE_LAYER: 1, "down_proj": 5},
            "alpha_pattern": {"layers.1.mlp.down_proj": 40.0},
        },
        {"layers_to_transform": [0, 2]},
        {"layers_to_transform": 1},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"exclude_modules": ["model.layers.0.mlp.down_proj"]},
        {"exclude_modules": r".*\.1\.self_attn\.q_proj"},
        {"target_modules": r"model\.layers\.[12]\.(self_attn\.q_proj|mlp\.up_proj)"},
        {"target_modules": ["model.layers.2.mlp.gate_proj", "q_proj"]},
        {"fan_in_fan_out": True},  # of a Linear layer: peft ignores it, and warns
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
def test_what_peft_sets_for_single_layers_holds_for_those_layers(bases, tmp_path, settings):
    settings = {"target_modules": ["q_proj", "down_proj"]} | settings
    expected = write_with_peft(bases("llama"), tmp_path, **settings)
    assert (
        np.abs(expected - checkpoints.torch_logits(torch_base(bases("llama")), TOKENS)).max() > 0.1
    )
    np.testing.assert_allclose(read_here(bases("llama"), tmp_path), expected, atol=1e-4)


def test_a_fused_module_whose_layers_differ_is_read_as_well(bases, tmp_path):
    expected = write_with_peft(
        bases("gpt2"),
        tmp_path,
        target_modules=["c_attn", "c_fc"],
        rank_pattern={"h.1.attn.c_attn": 12, "h.2.mlp.c_fc": 1},
        alpha_pattern={"h.0.attn.c_attn": 60.0},
    )
    np.testing.assert_allclose(read_here(bases("gpt2"), tmp_path), expected, atol=1e-4)


def test_the_loaded_config_targets_exactly_what_was_loaded(bases, tmp_path):
    write_with_peft(bases("llama"), tmp_path, target_modules=["q_proj", "up_proj"])
    decoder_config, params, raw = huggingface.load(bases("llama"))
    adapters, config = load_peft(tmp_path, decoder_config, raw)
    fresh = lora.init(jax.random.key(0), params, config)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, adapters)


def test_a_folder_that_is_there_is_not_overwritten_and_nothing_is_half_written(bases, tmp_path):
    config = LoraConfig(2, 4.0, ("query/",))
    adapters, decoder_config, raw = random_adapters(bases("llama"), config)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(FileExistsError, match="choose a new folder"):
        save_peft(tmp_path / "full", adapters, config, decoder_config, raw)
    unknown = traverse_util.unflatten_dict(
        {"blocks/mlp/gates/kernel": {"a": jnp.zeros((3, 24, 2)), "b": jnp.zeros((3, 2, 40))}},
        sep="/",
    )
    with pytest.raises(ValueError, match="blocks/mlp/gates/kernel: this model has no such kernel"):
        save_peft(tmp_path / "new", unknown, config, decoder_config, raw)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("r", "8", "must be a whole number from 1 to 100000, not '8'"),
        ("r", 0, "must be a whole number from 1 to 100000, not 0"),
        ("lora_alpha", float("nan"), "must be a number from 0 to 1e.12, and not 0, not nan"),
        ("lora_alpha", True, "must be a number from 0 to 1e.12, and not 0, not True"),
        ("lora_alpha", 0, "must be a number from 0 to 1e.12, and not 0, not 0"),
        ("alpha_pattern", [1], r"must map each module to a number .*, not \[1\]"),
        ("alpha_pattern", {"q_proj": "8"}, "must map each module to a number .*, not {'q_proj"),
        ("alpha_pattern", {"q_proj": float("nan")}, "must map each module to a number"),
        ("alpha_pattern", {"q_proj": -4}, "must map each module to a number"),
        ("alpha_pattern", {"(q_proj": 4}, r"'\(q_proj' is no pattern \(missing"),
        ("target_modules", 5, "must be a string or a list of strings, not 5"),
        ("target_modules", ".*[", r"'\.\*\[' is no pattern"),
        ("exclude_modules", [5], r"must be a string or a list of strings, not \[5\]"),
        ("layers_pattern", "(", "is no pattern"),
        ("use_dora", True, "True is not supported"),
        ("bias", "all", "not supported"),
        ("modules_to_save", ["lm_head"], "not supported"),
        ("modules_to_save", ["score"], "not supported"),
        ("trainable_token_indices", [3], "not supported"),
        ("layer_replication", [[0, 2]], "not supported"),
        ("target_parameters", ["q_proj.weight"], "not supported"),
        ("init_lora_weights", "pissa", "not supported"),
        ("lora_bias", True, "not supported"),
        ("a_key_of_next_year", 7, "not supported"),
    ],
)
def test_a_setting_that_is_not_understood_is_named(bases, tmp_path, key, value, said):
    config = LoraConfig(2, 4.0, ("query/",))
    adapters, decoder_config, raw = random_adapters(bases("llama"), config)
    save_peft(tmp_path / "out", adapters, config, decoder_config, raw)
    file = tmp_path / "out" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"adapter_config.json: {key}: .*{said}"):
        load_peft(tmp_path / "out", decoder_config, raw)


def set_first(value):
    """Tensors with their first one, a lora_A, replaced."""
    return lambda tensors: tensors.update({min(tensors): np.asarray(value)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(min(tensors)), "layers.0.*lora_A.weight' is missing"),
        (lambda tensors: tensors.update({"x.y": np.zeros(3, np.float32)}), "'x.y' is not an adapt"),
        (
            lambda tensors: tensors.update({min(tensors): np.zeros((2, 7), np.float32)}),
            r"lora_A.weight' has shape \(2, 7\), the model wants \(2, 24\)",
        ),
        (set_first(np.full((2, 24), np.nan, np.float32)), r"holds 48 values of 48 that are NaN"),
        (set_first(np.ones((2, 24), np.int8)), "lora_A.weight' holds I8, not floats"),
        (set_first(np.float32(1)), r"lora_A.weight' has shape \(\), the model wants"),
    ],
)
def test_tensors_that_do_not_fit_are_named(bases, tmp_path, change, said):
    numpy_files = pytest.importorskip("safetensors.numpy")
    config = LoraConfig(2, 4.0, ("query/",))
    adapters, decoder_config, raw = random_adapters(bases("llama"), config)
    save_peft(tmp_path / "out", adapters, config, decoder_config, raw)
    file = tmp_path / "out" / "adapter_model.safetensors"
    tensors = numpy_files.load_file(file)
    change(tensors)
    numpy_files.save_file(tensors, file)
    with pytest.raises(ValueError, match=said):
        load_peft(tmp_path / "out", decoder_config, raw)


def test_a_folder_without_adapters_is_named(bases, tmp_path):
    decoder_config, raw = huggingface.read_config(bases("llama"))
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: not there"):
        load_peft(tmp_path, decoder_config, raw)
