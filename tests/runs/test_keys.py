"""A config key that nothing reads is a bug: reads are recorded while tiny runs are made."""

import pytest
from ml_collections import ConfigDict

from dpojax.data import reviews
from dpojax.models import huggingface, lora, lora_peft
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.runs import run
from dpojax.stages import preference, registry, samples
from dpojax.stages.kept import new_keep_best
from dpojax.stages.registry import open_stage
from dpojax.stages.setup import initial_params, prepare_setup
from dpojax.stages.train import lower_step
from dpojax.training.state import schedule_of, warmup_steps

from .conftest import tiny_config

# Read only in a run of several processes (tests/runs/test_distributed.py), and by
# scripts/frontier.py, plan.py, recipe.py and sweep.py.
ELSEWHERE = ("distributed", "frontier.", "plan.", "recipe.", "sweep.")


class Reads:
    """Which keys of resolved configs are read.

    Attributes:
      keys: dotted, of every value that was read.
    """

    def __init__(self):
        self.keys: set[str] = set()
        # {id of a part of a config: (its dotted name, the part)}; while a part is in here it lives,
        # and no other object has its id.
        self._parts: dict[int, tuple[str, ConfigDict]] = {}

    def watch(self, config, prefix=""):
        self._parts[id(config)] = prefix, config
        for key, value in config._fields.items():
            if isinstance(value, ConfigDict):
                self.watch(value, f"{prefix}{key}.")

    def note(self, config, key):
        if id(config) in self._parts:
            self.keys.add(self._parts[id(config)][0] + key)


@pytest.fixture
def reads(monkeypatch):
    """The reads of every config that `run` or `resolve` below has resolved.

    To check a value is not to use it: reads while a config is resolved do not count, but for those
    of a loss's options, which are bound there.
    """
    reads, resolve, read_item = Reads(), registry.resolve, ConfigDict.__getitem__

    def read(self, key):  # `config.key` comes here, too
        reads.note(self, key)
        return read_item(self, key)

    def watched(config, workdir):
        resolved = resolve(config, workdir)
        reads.watch(resolved.config)
        if "preference" in resolved.config.stages:
            preference.bind_loss(resolved.config.preference)
        return resolved

    monkeypatch.setattr(ConfigDict, "__getitem__", read)
    for module in (run, registry):
        monkeypatch.setattr(module, "resolve", watched)
    monkeypatch.setattr(run, "compare_config", lambda run: None)
    monkeypatch.setattr(run, "write_or_compare_config", lambda run: None)
    return reads


def leaves(config, prefix=""):
    """The dotted names of all keys that hold a value."""
    for key, value in config._fields.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_a_key_that_nothing_reads_is_noticed(reads, tmp_path):
    """The recorder itself: of a resolved config it sees the keys that are read, and no others."""
    config = tiny_config()
    resolved = registry.resolve(config, tmp_path).config
    reads.keys.clear()  # of the loss's options
    assert config.ppo.steps == 40  # not a resolved config
    assert (resolved.sft.batch_size, resolved["sft"]["data"].limit) == (8, 60)
    assert reads.keys == {"sft", "sft.batch_size", "sft.data", "sft.data.limit"}
    assert dict(resolved.mesh) == {"data": -1, "fsdp": 1, "tensor": 1}
    assert reads.keys >= {"mesh.data", "mesh.fsdp", "mesh.tensor"}


def small_llama(folder):
    import jax

    from dpojax.models import decoder

    shape = dict(width=16, layers=1, heads=2, mlp_width=16, max_positions=128)
    tokenizer = reviews.tokenizer()
    config = DecoderConfig(**LLAMA, **shape, vocab_size=len(tokenizer))
    params = jax.jit(decoder.build(config).init)(jax.random.key(5))
    huggingface.save(folder, config, params, tokenizer=tokenizer)
    settings = lora.LoraConfig(2, 4.0)
    adapters = lora.init(jax.random.key(6), params, settings)
    lora_peft.save_peft(folder / "adapters", adapters, settings, config)
    return str(folder)


def prepare_a_reward_stage(config, workdir):
    """All that reads the config (test_other_stages.py trains one)."""
    config.stages = ("reward",)
    config.reward.data.update(limit=60, eval_limit=10)
    stage = open_stage(prepare_setup(registry.resolve(config, workdir)), "reward").prepare()
    read_what_training_reads(stage)
    assert new_keep_best(stage.config)


def prepare_a_classifier_stage(config, workdir):
    """The same (test_classifier_run.py trains one)."""
    texts = workdir.with_suffix(".jsonl")
    texts.write_text("\n".join(f'{{"text": "good {i}", "label": {i % 2}}}' for i in range(60)))
    config.stages = ("classifier",)
    config.classifier.data.source = str(texts)
    setup = prepare_setup(registry.resolve(config, workdir))
    read_what_training_reads(open_stage(setup, "classifier").prepare())


def read_what_training_reads(stage):
    lower_step(stage, stage.batches.shape)
    list(stage.batches.order)


def prepare_a_ppo_stage(config, workdir):
    """The same (test_ppo_run.py trains one), and one evaluation of its samples."""
    config.stages = ("ppo",)
    config.samples.update(reward="reviews", judge="exact", count=1, per_prompt=1)
    config.samples.max_new_tokens = 2
    stage = open_stage(prepare_setup(registry.resolve(config, workdir)), "ppo").prepare()
    stage.batch(0)
    assert stage.hyper
    schedule_of(stage.config, warmup_steps(stage.config, stage.steps), stage.steps)
    assert new_keep_best(stage.config) is None
    params = initial_params(stage.setup)
    score, reward_name = stage.programs.score, stage.evaluation_reward
    samples.open_judged_samples(stage.setup, params, score, reward_name=reward_name)(params)
    stage.new_state(params)


@pytest.mark.long
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
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        "\n".join(
            f'{{"prompt": "the film {i}", "chosen": " was good", "rejected": " was not good"}}'
            for i in range(60)
        )
    )
    other.preference.data.source = str(pairs)
    for number, config in enumerate((shipped, other)):
        run.run(config, str(tmp_path / f"run{number}"))
    prepare_a_reward_stage(shipped, tmp_path / "reward")
    prepare_a_classifier_stage(shipped, tmp_path / "classifier")
    prepare_a_ppo_stage(shipped, tmp_path / "ppo")
    unread = {key for key in leaves(shipped) if key not in reads.keys}
    unread = {key for key in unread if not key.startswith(ELSEWHERE)} - {"ppo.optimizer.rms_decay"}
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
