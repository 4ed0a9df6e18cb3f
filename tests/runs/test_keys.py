"""A config key that nothing reads is a bug: reads are recorded while tiny runs are made."""

import pytest
from ml_collections import ConfigDict

from dpojax.data import reviews
from dpojax.stages import ppo
from dpojax.runs import run
from dpojax.stages import samples
from dpojax.stages import setup
from dpojax.stages import stage as stages
from dpojax.models import huggingface, lora, lora_peft
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.training.state import make_optimizer, make_schedule

from .conftest import tiny_config

# Read only in a run of several processes (tests/runs/test_distributed.py), and by
# scripts/frontier.py and sweep.py.
ELSEWHERE = ("distributed", "frontier.", "sweep.")


@pytest.fixture
def reads(monkeypatch):
    """{(id of a ConfigDict, key)} of every value that is read."""
    found = set()

    def recording(original):
        def read(self, key):
            found.add((id(self), key))
            return original(self, key)

        return read

    for method in ("__getattr__", "__getitem__"):
        monkeypatch.setattr(ConfigDict, method, recording(getattr(ConfigDict, method)))
    monkeypatch.setattr(run, "check", lambda config: None)
    monkeypatch.setattr(run, "record", lambda config, folder: folder.mkdir(exist_ok=True))
    return found


def leaves(config, prefix=""):
    for key, value in config._fields.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, (id(config), key)


def small_llama(folder):
    import jax

    from dpojax.models import decoder

    shape = dict(width=16, layers=1, heads=2, mlp_width=16, max_positions=128)
    tokenizer = reviews.tokenizer()
    config = DecoderConfig(**LLAMA, **shape, vocab_size=len(tokenizer))
    params = jax.jit(decoder.build(config).init)(jax.random.key(5))
    huggingface.save(folder, config, params, tokenizer=tokenizer)
    wanted = lora.LoraConfig(2, 4.0)
    adapters = lora.init(jax.random.key(6), params, wanted)
    lora_peft.save_peft(folder / "adapters", adapters, wanted, config)
    return str(folder)


def prepare_a_reward_stage(config, workdir):
    """All that reads the config (test_other_stages.py trains one)."""
    config.stages = ("reward",)
    stage = stages.prepare("reward", setup.prepare(config, workdir))
    make_optimizer(stage.config.optimizer)
    make_schedule(stage.config.schedule, stage.config.warmup_steps, stage.steps)
    list(stage.order)


def prepare_a_classifier_stage(config, workdir):
    """The same (test_classifier_run.py trains one)."""
    texts = workdir.with_suffix(".jsonl")
    texts.write_text("\n".join(f'{{"text": "good {i}", "label": {i % 2}}}' for i in range(60)))
    config.stages = ("classifier",)
    config.classifier.data.source = str(texts)
    stage = stages.prepare("classifier", setup.prepare(config, workdir))
    make_optimizer(stage.config.optimizer)
    make_schedule(stage.config.schedule, stage.config.warmup_steps, stage.steps)
    list(stage.order)


def prepare_a_ppo_stage(config, workdir):
    """The same (test_ppo_run.py trains one), and one evaluation of its samples."""
    config.stages = ("ppo",)
    config.samples.update(reward="reviews", count=1, per_prompt=1, max_new_tokens=2)
    stage = ppo.prepare(setup.prepare(config, workdir))
    stage.batch(0)
    make_schedule(stage.config.schedule, stage.config.warmup_steps, stage.steps)
    params = setup.initial_params(stage.setup)
    samples.open_samples(stage.setup, params, stage.score)(params)
    ppo._new_state(stage, params)


def test_every_key_is_read_by_some_run(reads, tmp_path):
    """One run as shipped, and one with each of the other choices: an imported model in bfloat16, a
    live reference of another policy, given adapters, IPO, RMSprop and a cosine."""
    folder = small_llama(tmp_path / "llama")
    shipped = tiny_config(**{"sft.steps": 0})
    other = tiny_config(
        **{
            "model.path": folder,
            "model.compute_dtype": "bfloat16",
            "preference.loss": "ipo",
            "preference.length_norm": "mean",
            "preference.reference.kind": "live",
            "preference.reference.path": folder,
            "preference.lora.rank": 2,
            "preference.lora.alpha": 4.0,
            "preference.lora.base_dtype": "bfloat16",
            "preference.lora.adapters": f"{folder}/adapters",
            "preference.optimizer.name": "rmsprop",
            "preference.optimizer.weight_decay": 0.1,
            "preference.schedule": "cosine",
            "preference.steps": 0,
            "tokens.max_prompt_length": 50,
        }
    )
    other.stages = ("preference",)
    kept = [(config, dict(leaves(config))) for config in (shipped, other)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "\n".join(
            f'{{"prompt": "the film {i}", "chosen": " was good", "rejected": " was not good"}}'
            for i in range(60)
        )
    )
    other.preference.data.source = str(pairs)
    for number, (config, _) in enumerate(kept):
        run.run(config, str(tmp_path / f"run{number}"))
    prepare_a_reward_stage(shipped, tmp_path / "reward")
    prepare_a_classifier_stage(shipped, tmp_path / "classifier")
    prepare_a_ppo_stage(shipped, tmp_path / "ppo")
    read = {path for _, paths in kept for path, key in paths.items() if key in reads}
    unread = {key for key in set(kept[0][1]) - read if not key.startswith(ELSEWHERE)}
    unread -= {"ppo.optimizer.rms_decay"}
    others = ("sft.", "reward.", "classifier.")
    assert {key for key in unread if not key.startswith(others)} == set()
    optional = {
        *(f"{stage}.optimizer.rms_decay" for stage in ("sft", "reward", "classifier")),
        *(
            f"{stage}.data.{key}"
            for stage in ("sft", "reward", "classifier")
            for key in ("form", "columns", "eval_share")
        ),
        *(f"sft.lora.{key}" for key in ("alpha", "targets", "rank_stabilised", "base_dtype")),
        "sft.lora.adapters",
        "classifier.data.eval_split",
    }
    assert {key for key in unread if key.startswith(others)} <= optional
