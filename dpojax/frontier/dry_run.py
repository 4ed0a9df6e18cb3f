"""A frontier's programs from shapes alone: no weights, no data, no tokenizer.

The programs are those that the jobs would run, at the largest size of a micro-batch: the train step
of every stage and loss, the sampler, the classifier that is the reward, and PPO's update. A shape
that does not fit fails here, in minutes.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dpojax import sharding, storage
from dpojax.config.contents import TRAINED_HERE
from dpojax.config.errors import config_errors
from dpojax.data.prefixes import LONGEST
from dpojax.frontier.configs import RunConfigs
from dpojax.frontier.runs import Run
from dpojax.models import encoder, huggingface
from dpojax.sampling import Prompts, build_sampler
from dpojax.stages.registry import STAGES, resolve
from dpojax.stages.setup import Setup, open_model
from dpojax.stages.stage import RowSize
from dpojax.stages.tokenizers import load_tokenizer
from dpojax.stages.vocabulary import rows_for

PROMPT = 2 * LONGEST  # tokens of the widest prompt: twice those of the paper's
NOWHERE = "nowhere"  # the workdir of jobs that write nothing


def dry_run(config: ConfigDict, runs: Sequence[Run]) -> Iterator[str]:
    """A line for each program, once it is lowered; runs that differ in numbers alone share one.

    Raises:
      ConfigError: a run that could not start. OSError, ValueError: a config.json is missing.
    """
    reward = config.frontier.reward
    yield _stage(config, "sft")
    if reward == "classifier":
        yield _stage(config, "classifier")
    elif reward.startswith("classifier:"):
        yield _encoder(reward.split(":")[1])
    yield _sampler(config)
    if any(run.method == "ppo" for run in runs):
        yield _stage(config, "reward")
    configs, programs = RunConfigs(config, storage.as_path(NOWHERE)), set()
    for run in runs:
        configs.resolve(run)
        run_config = configs.config_of(run)
        run_config.update(tokenizer=config.tokenizer)
        run_config.model.path = config.model.path  # in the place of the SFT policy
        (stage,) = run_config.stages
        program = stage, run_config[stage].get("loss")
        if program not in programs:
            programs.add(program)
            yield _stage(run_config, stage)


def _stage(config: ConfigDict, name: str) -> str:
    """The train step of a stage."""
    stage = STAGES[name].open(_setup(config, name))
    responses = config.frontier.completions if config.frontier.pairs == "ranked" else 2
    lowered = stage.lower(RowSize(PROMPT, config.samples.max_new_tokens, responses))
    title = f"{name}, loss {stage.config.loss}" if name == "preference" else name
    return _line(title, stage.setup.abstract_params, lowered.rows, lowered.weight_copies)


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
        vocabulary = rows_for(load_tokenizer(config, run.workdir))
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
