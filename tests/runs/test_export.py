"""Exports: from a workdir alone, in other dtypes, of merged weights and of adapters."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.config.errors import ConfigError
from dpojax.data import reviews
from dpojax.models import decoder, huggingface, lora, lora_peft
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.models.lora import LoraConfig
from dpojax.runs.export import export
from dpojax.runs.policy import load_policy
from dpojax.runs.run import run
from dpojax.stages import train
from dpojax.stages.exported import in_dtype

from .conftest import tiny_config

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def moved_run(tmp_path_factory, monkeypatch_module):
    """The export of a finished run from adapters, and the run, whose base has moved since.

    Its evaluations find the lowest loss at step 2 of 4.
    """
    folder = tmp_path_factory.mktemp("moved")
    base, template = folder / "base", folder / "chatml.jinja"
    tokenizer = reviews.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    shape = dict(width=16, layers=1, heads=2, mlp_width=16, max_positions=128)
    config = DecoderConfig(**LLAMA, **shape, vocab_size=len(tokenizer))
    params = jax.jit(decoder.build(config).init)(jax.random.key(5))
    raw = huggingface.config_to_raw(config)
    raw |= {"eos_token_id": 7, "auto_map": {"AutoModelForCausalLM": "modelling.Model"}}
    generation = {"eos_token_id": 7, "max_new_tokens": 3}
    huggingface.save(base, config, params, raw, tokenizer=tokenizer, generation_config=generation)
    settings = LoraConfig(2, 4.0)
    adapters = lora.init(jax.random.key(6), params, settings)
    lora_peft.save_peft(base / "adapters", adapters, settings, config)
    template.write_text(CHATML)
    losses, evaluate = {0: 1.0, 2: 0.5, 4: 0.9}, train.Evaluator.__call__

    def with_loss(self, stage, state):
        return evaluate(self, stage, state) | {"loss": losses[int(state.step)]}

    monkeypatch_module.setattr(train.Evaluator, "__call__", with_loss)
    run(
        tiny_config(
            **{
                "stages": ("preference",),
                "model.path": str(base),
                "chat_template": str(template),
                "evaluate_every": 2,
                "preference.keep_best": "eval/loss",
                "preference.steps": 4,
                "preference.lora.rank": 2,
                "preference.lora.alpha": 4.0,
                "preference.lora.adapters": str(base / "adapters"),
            }
        ),
        str(folder / "run"),
    )
    before = export(folder / "run", folder / "before")
    base.rename(folder / "elsewhere")
    template.unlink()
    return before, folder / "run", base


@pytest.mark.long
def test_a_run_is_exported_from_its_workdir_after_its_base_has_moved(moved_run, tmp_path):
    before, workdir, _ = moved_run
    after = export(workdir, tmp_path / "after")
    for file in sorted(path.name for path in before.iterdir()):
        assert (after / file).read_bytes() == (before / file).read_bytes(), file
    raw = json.loads((after / "config.json").read_text())
    assert "auto_map" not in raw
    assert raw["eos_token_id"] == [2, 372]  # </s>, <|im_end|>
    generation = json.loads((after / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 372, 7]
    assert generation["max_new_tokens"] == 3
    policy = load_policy(str(workdir))
    assert policy.stop == (2, 7, 372)
    _, params, _ = huggingface.load(after)
    jax.tree.map(np.testing.assert_array_equal, policy.params, params)


@pytest.mark.long
def test_adapters_name_the_base_of_the_config_or_where_it_is_now(moved_run, tmp_path):
    _, workdir, base = moved_run
    for number, (given, named) in enumerate((("", str(base)), ("owner/model", "owner/model"))):
        out = export(workdir, tmp_path / str(number), adapters=True, base=given)
        settings = json.loads((out / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == named
    with pytest.raises(ConfigError, match="adapters are kept in float32"):
        export(workdir, tmp_path / "half", adapters=True, dtype="bfloat16")


@pytest.mark.long
def test_adapters_of_the_kept_step_are_exported(moved_run, tmp_path):
    _, workdir, _ = moved_run
    files = [
        export(workdir, tmp_path / str(step), adapters=True, step=step)
        / "adapter_model.safetensors"
        for step in (None, 2, 4)
    ]
    best, second, last = (file.read_bytes() for file in files)
    assert best == second != last


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_to_the_dtype_that_is_asked_for(moved_run, dtype, tmp_path):
    torch = pytest.importorskip("torch", reason="rounds as torch does")
    import transformers

    before, workdir, _ = moved_run
    out = export(workdir, tmp_path / "out", dtype=dtype)
    whole = transformers.AutoModelForCausalLM.from_pretrained(before).state_dict()
    halved = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in whole.items():
        assert halved[name].dtype == getattr(torch, dtype)
        assert torch.equal(halved[name], tensor.to(getattr(torch, dtype))), name


def test_a_weight_that_float16_cannot_hold_is_named():
    params = {"blocks": {"mlp": {"kernel": jnp.array([1.0, -65520.0])}}}  # 65504 is its largest
    with pytest.raises(ConfigError, match=r"blocks/mlp/kernel: float16 cannot hold .* 65520"):
        in_dtype(params, "float16")
    assert in_dtype(params, "bfloat16")["blocks"]["mlp"]["kernel"].dtype == jnp.bfloat16
    with pytest.raises(ConfigError, match="--dtype=float8"):
        export("unused", "unused", dtype="float8")
