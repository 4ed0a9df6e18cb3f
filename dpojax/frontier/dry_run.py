"""A frontier's programs from shapes alone: no weights, no data, no tokenizer.

The programs are those that the jobs would run, at the largest size of a micro-batch: the train step
of every stage and loss, the sampler, the classifier that is the reward, and PPO's update. A shape
that does not fit fails here, in minutes.
"""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dpojax import sharding, storage
from dpojax.config.contents import TRAINED_HERE
from dpojax.config.errors import config_errors
from dpojax.data.packing import Shape
from dpojax.data.prefixes import LONGEST
from dpojax.frontier.configs import RunConfigs
from dpojax.frontier.runs import PPO, Run
from dpojax.models import encoder, huggingface
from dpojax.sampling import Prompts, build_sampler
from dpojax.stages.classifier import Classifier
from dpojax.stages.ppo import lower_update
from dpojax.stages.registry import STAGES, resolve
from dpojax.stages.setup import Setup, open_model
from dpojax.stages.tokenizers import load_tokenizer
from dpojax.stages.train import lower_step

PROMPT = 2 * LONGEST  # tokens of the widest prompt: twice those of the paper's
NOWHERE = "nowhere"  # the workdir of jobs that write nothing


def dry_run(config: ConfigDict, runs: Sequence[Run]) -> Iterator[str]:
    """A line for each program, once it is lowered; runs that differ in numbers alone share one.

    Raises:
      ConfigError: a run that could not start. OSError, ValueError: a config.json is missing.
    """
    reward = config.frontier.reward
    responses = config.frontier.completions if config.frontier.pairs == "ranked" else 2
    yield _train_step(config, "sft")
    if reward == "classifier":
        yield _classifier_step(config)
    elif reward.startswith("classifier:"):
        yield _encoder(reward.split(":")[1])
    yield _sampler(config)
    if any(run.method == "ppo" for run in runs):
        yield _train_step(config, "reward", responses)
    configs, programs = RunConfigs(config, storage.as_path(NOWHERE)), set()
    for run in runs:
        run_config = configs.config_of(run)
        resolve(run_config, NOWHERE)
        run_config.update(tokenizer=config.tokenizer)
        run_config.model.path = config.model.path  # in the place of the SFT policy
        program = run.stage if run.stage == PPO else run_config.preference.loss
        if program in programs:
            continue
        programs.add(program)
        yield (
            _ppo(run_config)
            if run.stage == PPO
            else _train_step(run_config, "preference", responses)
        )


def _train_step(config: ConfigDict, name: str, responses: int = 1) -> str:
    """The train step of a stage, with a text or a prompt and its responses in each row."""
    setup = _setup(config, name)
    length = config.tokens.max_length
    if responses > 1:
        length = PROMPT + responses * (config.samples.max_new_tokens + 1)
    return _lowered(STAGES[name].open(setup), length, responses)


def _classifier_step(config: ConfigDict) -> str:
    stage = Classifier.with_labels(_setup(config, Classifier.name), ("neg", "pos"))
    return _lowered(stage, config.classifier.max_tokens, 1)


def _lowered(stage: Any, length: int, responses: int) -> str:
    config = stage.config
    micro_rows = stage.setup.config.micro_rows or config.batch_size
    micro_batches = math.ceil(config.batch_size / micro_rows)
    lower_step(stage, Shape(micro_batches, micro_rows, length, length, 1, responses))
    title = f"{stage.name}, loss {config.loss}" if "loss" in config else stage.name
    rows = f"{micro_batches} x {micro_rows} rows of {length} tokens"
    return _line(title, stage.setup.abstract_params, rows, copies=2 + _moments(config))


def _ppo(config: ConfigDict) -> str:
    stage = STAGES[PPO].open(_setup(config, PPO))
    with jax.set_mesh(stage.setup.mesh):
        lower_update(stage, PROMPT)
    rows = f"{stage.config.batch_size} prompts, {stage.config.max_new_tokens} new tokens"
    # Policy and value model with gradient and moments, and the reference.
    copies = 2 * (2 + _moments(stage.config)) + 1
    return _line(PPO, stage.setup.abstract_params, rows, copies)


def _moments(config: ConfigDict) -> int:
    """Copies of the parameters that the optimiser keeps."""
    return 2 if config.optimizer.name == "adamw" else 1


def _sampler(config: ConfigDict) -> str:
    setup, samples = _setup(config, "sft"), config.samples
    sampler = build_sampler(setup.model, max_new_tokens=samples.max_new_tokens, stop=())
    prompts = Prompts(_ids(64, PROMPT), _ids(64), _ids(64))
    completions = config.frontier.completions

    def draw(params: dict, prompts: Prompts) -> Any:
        return sampler(params, prompts, seed=0, samples=completions)

    with jax.set_mesh(setup.mesh):
        jax.jit(draw).lower(setup.abstract_params, prompts)
    rows = f"64 prompts, {completions} x {samples.max_new_tokens} new tokens"
    return _line("sampler", setup.abstract_params, rows, copies=1)


def _encoder(folder: str) -> str:
    """The classifier of transformers that is the reward."""
    with config_errors(f"frontier.reward ({folder})"):
        config = huggingface.read_classifier_config(folder)
    model = encoder.build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    jax.jit(model.apply).lower(shapes, _ids(64, 64), _ids(64))
    return _line("classifier", shapes, "64 texts of 64 tokens", copies=1)


def _setup(config: ConfigDict, stage: str) -> Setup:
    """As `prepare_setup`; of its tokenizer only the number of ids is there, and an end."""
    config = copy.deepcopy(config)
    config.stages = (stage,)
    if stage != "sft" and "data" in config[stage]:
        config[stage].data.source = config[stage].data.source or NOWHERE
    run = resolve(config, NOWHERE)
    vocabulary = 0
    if config.tokenizer.startswith(TRAINED_HERE):
        vocabulary = int(config.tokenizer.removeprefix(TRAINED_HERE))
    elif not config.model.path:
        vocabulary = len(load_tokenizer(config, run.workdir))
    with config_errors("mesh"):
        mesh = sharding.make_mesh(**config.mesh)
    model, imported_config = open_model(config, vocabulary, mesh)
    tokenizer = types.SimpleNamespace(eos_token_id=0)
    return Setup(run, mesh, tokenizer, model, imported_config)


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _line(name: str, tree: Any, rows: str, copies: int) -> str:
    size = sum(x.size for x in jax.tree.leaves(tree))
    return (
        f"{name}: {size:,} parameters, {copies} float32 copies of them "
        f"{4 * copies * size / 2**30:.1f} GiB; {rows}: lowers"
    )
