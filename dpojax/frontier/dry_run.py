"""A frontier's programs from shapes alone: no weights, no data, no tokenizer.

What is built is what the jobs would run, at the largest size of a micro-batch: the train step of
every stage and loss, the sampler, the classifier that is the reward, and PPO's update. A shape that
does not fit fails here, in minutes.
"""

from __future__ import annotations

import math
import pathlib
import types
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.config.checks import check, naming
from dpojax.data.packing import Shape
from dpojax.data.prefixes import LONGEST
from dpojax.frontier.plan import Run, configs
from dpojax.models import encoder, huggingface
from dpojax.sampling import Prompts, build_sampler
from dpojax.stages import ppo, train
from dpojax.stages import setup as run_setup
from dpojax.stages import stage as stages
from dpojax.stages.setup import Setup
from dpojax.stages.tokenizers import TRAINED, load_tokenizer

PROMPT = 2 * LONGEST  # tokens of the widest prompt: twice those of the paper's
NOWHERE = pathlib.Path("nowhere")  # the workdir of jobs that write nothing


def dry_run(config: ConfigDict, planned: Sequence[Run]) -> Iterator[str]:
    """A line for each program, once it is lowered; runs that differ in numbers alone share one.

    Raises:
      ConfigError: a run that could not start. OSError, ValueError: a config.json is missing.
    """
    reward = config.frontier.reward
    responses = config.frontier.completions if config.frontier.pairs == "ranked" else 2
    yield _train(config, "sft")
    if reward == "classifier":
        yield _train(config, "classifier", labels=("neg", "pos"))
    elif reward.startswith("classifier:"):
        yield _encoder(reward.split(":")[1])
    yield _sampler(config)
    if any(run.method == "ppo" for run in planned):
        yield _train(config, "reward", responses)
    seen = set()
    for run, own in zip(planned, configs(config, planned, NOWHERE)):
        check(own)
        own.update(tokenizer=config.tokenizer)
        own.model.path = config.model.path  # in the place of the SFT policy
        program = own.dpo.loss if run.stage == "dpo" else run.stage
        if program not in seen:
            seen.add(program)
            yield _ppo(own) if run.stage == "ppo" else _train(own, "dpo", responses)


def _train(config: ConfigDict, name: str, responses: int = 1, labels: tuple[str, ...] = ()) -> str:
    """The train step of a stage, with a text or a prompt and its responses in each row."""
    setup = _setup(config)
    own, micro = setup.config[name], config.micro_rows or setup.config[name].batch_size
    length = own.max_tokens if name == "classifier" else config.tokens.max_length
    if responses > 1:
        length = PROMPT + responses * (config.samples.max_new_tokens + 1)
    shape = Shape(math.ceil(own.batch_size / micro), micro, length, length, 1, responses)
    stage = stages.without_data(name, setup, labels)._replace(shape=shape, steps=1)
    train.lower(stage)
    moments = 2 if own.optimizer.name == "adamw" else 1
    title = f"dpo, loss {own.loss}" if name == "dpo" else name
    rows = f"{shape.micro_batches} x {micro} rows of {length} tokens"
    return _line(title, stage.setup.abstract_params, rows, copies=2 + moments)


def _ppo(config: ConfigDict) -> str:
    setup = _setup(config)
    stage = ppo.programs(setup)
    with jax.set_mesh(setup.mesh):
        ppo.lower(stage, PROMPT)
    moments = 2 if stage.config.optimizer.name == "adamw" else 1
    rows = f"{stage.config.batch_size} prompts, {stage.config.max_new_tokens} new tokens"
    # Policy and value model with gradient and moments, and the reference.
    return _line("ppo", setup.abstract_params, rows, copies=2 * (2 + moments) + 1)


def _sampler(config: ConfigDict) -> str:
    setup, asked = _setup(config), config.samples
    sampler = build_sampler(setup.model, max_new_tokens=asked.max_new_tokens, stop=())
    ids = lambda *size: jax.ShapeDtypeStruct(size, jnp.int32)
    prompts, count = Prompts(ids(64, PROMPT), ids(64), ids(64)), config.frontier.completions
    with jax.set_mesh(setup.mesh):
        draw = lambda params, prompts: sampler(params, prompts, seed=0, samples=count)
        jax.jit(draw).lower(setup.abstract_params, prompts)
    rows = f"64 prompts, {count} x {asked.max_new_tokens} new tokens"
    return _line("sampler", setup.abstract_params, rows, copies=1)


def _encoder(folder: str) -> str:
    """The classifier of transformers that is the reward."""
    with naming(f"frontier.reward ({folder})"):
        config = huggingface.read_classifier_config(folder)
    model = encoder.build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    ids = lambda *size: jax.ShapeDtypeStruct(size, jnp.int32)
    jax.jit(model.apply).lower(shapes, ids(64, 64), ids(64))
    return _line("classifier", shapes, "64 texts of 64 tokens", copies=1)


def _setup(config: ConfigDict) -> Setup:
    """As `setup.prepare`; of its tokenizer only the number of ids is there, and an end."""
    vocabulary = 0
    if config.tokenizer.startswith(TRAINED):
        vocabulary = int(config.tokenizer.removeprefix(TRAINED))
    elif not config.model.path:
        vocabulary = len(load_tokenizer(config, NOWHERE))
    with naming("mesh"):
        mesh = sharding.make_mesh(**config.mesh)
    model, raw = run_setup.open_model(config, vocabulary, mesh)
    tokenizer = types.SimpleNamespace(eos_token_id=0)
    lora = dict.fromkeys(("sft", "preference", "reward", "classifier"))
    return Setup(config, NOWHERE, mesh, tokenizer, model, raw, lora)


def _line(name: str, tree, rows: str, copies: int) -> str:
    size = sum(x.size for x in jax.tree.leaves(tree))
    return (
        f"{name}: {size:,} parameters, {copies} float32 copies of them "
        f"{4 * copies * size / 2**30:.1f} GiB; {rows}: lowers"
    )
