"""What a run may start from: a model of the right kind, and not from what only looks like one."""

import json

import jax
import pytest

from dpojax.config.errors import ConfigError
from dpojax.data import reviews
from dpojax.evaluation.rewards import open_reward
from dpojax.models import decoder, huggingface, lora, lora_peft
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.runs.policy import load_policy
from dpojax.runs.run import random_start
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import prepare_setup

from .conftest import tiny_config

SHAPE = dict(width=8, layers=1, heads=1, mlp_width=8, max_positions=128)


def saved(folder, **fields):
    tokenizer = reviews.tokenizer()
    config = DecoderConfig(**LLAMA, **SHAPE, vocab_size=len(tokenizer), **fields)
    params = jax.jit(decoder.build(config).init)(jax.random.key(0))
    huggingface.save(folder, config, params, tokenizer=tokenizer)
    return config, params


def opened(path, stage, workdir):
    config = tiny_config(**{"stages": (stage,), "model.path": str(path)})
    return open_stage(prepare_setup(resolve(config, workdir)), stage)


def test_adapters_without_their_base_are_no_model(tmp_path):
    config, params = saved(tmp_path / "base")
    settings = lora.LoraConfig(2, 6.0)
    adapters = lora.init(jax.random.key(1), params, settings)
    folder = tmp_path / "adapters"
    lora_peft.save_peft(folder, adapters, settings, config, base="owner/model")
    reviews.tokenizer().save_pretrained(folder)
    said = (
        r"adapters: holds LoRA adapters of peft .* no model\. Set config\.model\.path to their "
        r"base \('owner/model'\), .*lora\.rank=2 and lora\.alpha=6\.0; or merge"
    )
    with pytest.raises(ConfigError, match=rf"^config\.model\.path: .*{said}") as error:
        opened(folder, "preference", tmp_path / "run")
    assert "\n" not in str(error.value)
    for use in (
        load_policy,
        lambda name: open_reward(f"reward_model:{name}"),
        lambda name: open_reward(f"classifier:{name}"),
    ):
        with pytest.raises(ValueError, match=said):
            use(str(folder))
    (folder / "config.json").write_text(json.dumps(huggingface.config_to_raw(config)))
    huggingface.require_model(folder)  # a whole folder that holds adapters as well


@pytest.mark.parametrize("stage", ["sft", "preference", "ppo"])
@pytest.mark.parametrize(
    ("labels", "kind"), [((), "a reward model"), (("bad", "good"), "a classifier of bad, good")]
)
def test_a_policy_does_not_start_from_a_reward_model_or_a_classifier(stage, labels, kind, tmp_path):
    saved(tmp_path / "scores", scalar_head=True, labels=labels)
    with pytest.raises(
        ConfigError, match=rf"config\.model\.path = .*scores' holds {kind}: .*{stage}"
    ):
        opened(tmp_path / "scores", stage, tmp_path / "run")


def test_a_policy_stage_from_random_weights_is_told(tmp_path):
    saved(tmp_path / "policy")
    for stage in ("preference", "ppo", "reward"):
        first = open_stage(prepare_setup(resolve(tiny_config(stages=(stage,)), tmp_path)), stage)
        assert f"{stage}: WARNING: config.model.path is empty" in random_start(first)
        assert random_start(opened(tmp_path / "policy", stage, tmp_path / "run")) == ""
    sft = open_stage(prepare_setup(resolve(tiny_config(), tmp_path)), "sft")
    assert random_start(sft) == ""
