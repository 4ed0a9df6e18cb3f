"""Programs of a plan's jobs from shapes alone: no weights, no data, no tokenizer.

They are built at the largest size of a micro-batch, as the jobs would run them. A shape that does
not fit fails here, in minutes.
"""

from __future__ import annotations

import copy
import textwrap
import types
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dpojax import sharding, storage
from dpojax.config.contents import TRAINED_HERE
from dpojax.config.errors import config_errors
from dpojax.models import encoder, huggingface
from dpojax.models.published import PUBLISHED, published_config
from dpojax.sampling import Prompts, build_sampler
from dpojax.stages.registry import STAGES, resolve
from dpojax.stages.setup import Setup, build_model, open_model
from dpojax.stages.stage import RowSize
from dpojax.stages.tokenizers import load_tokenizer
from dpojax.stages.vocabulary import rows_for

NOWHERE = "nowhere"  # the workdir of jobs that write nothing
AT_ONCE = 64  # prompts or texts of a batch


def lines_of_names(names: Sequence[str]) -> list[str]:
    """Names of runs for a terminal of 100 columns; lines that go on are indented further."""
    return textwrap.wrap(
        ", ".join(names),
        width=100,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def stage_program(config: ConfigDict, name: str, size: RowSize) -> str:
    """The train step of a stage, for rows of a size.

    Raises:
      ConfigError: a run that could not start. OSError, ValueError: a config.json is missing.
    """
    stage = STAGES[name].open(setup_from_shapes(config, name))
    lowered = stage.lower(size)
    title = f"{name}, loss {stage.config.loss}" if name == "preference" else name
    return _line(title, stage.setup.abstract_params, lowered.rows, lowered.weight_copies)


def sampler_program(config: ConfigDict, *, prompt: int, new_tokens: int, samples: int) -> str:
    """The sampler of the policy that SFT trains.

    Args:
      prompt: tokens of the longest prompt.
      samples: responses to each prompt.
    """
    setup = setup_from_shapes(config, "sft")
    sampler = build_sampler(setup.model, max_new_tokens=new_tokens, stop=())
    prompts = Prompts(_ids(AT_ONCE, prompt), _ids(AT_ONCE), _ids(AT_ONCE))

    def draw(params: dict, prompts: Prompts) -> Any:
        return sampler(params, prompts, seed=0, samples=samples)

    with jax.set_mesh(setup.mesh):
        jax.jit(draw).lower(setup.abstract_params, prompts)
    rows = f"{AT_ONCE} prompts, {samples} x {new_tokens} new tokens"
    return _line("sampler", setup.abstract_params, rows, copies=1)


def encoder_program(folder: str, key: str) -> str:
    """A classifier of transformers that is a reward; `key` is the config's that names it."""
    with config_errors(f"{key} ({folder})"):
        config = published_config(folder) or huggingface.read_classifier_config(folder)
    model = encoder.build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    jax.jit(model.apply).lower(shapes, _ids(AT_ONCE, AT_ONCE), _ids(AT_ONCE))
    return _line("classifier", shapes, f"{AT_ONCE} texts of {AT_ONCE} tokens", copies=1)


def setup_from_shapes(
    config: ConfigDict, stage: str, devices: Sequence[jax.Device] | None = None
) -> Setup:
    """As `prepare_setup` for one stage, without tokenizer, data and weights.

    The config.json of a model is read, or taken from `models.published` if its name is there.

    Args:
      devices: of the mesh, which need not be there; None: those of this process.

    Raises:
      ConfigError: a run that could not start. OSError: a config.json is missing.
    """
    config = copy.deepcopy(config)
    config.stages = (stage,)
    config = with_sources(config)
    run = resolve(config, NOWHERE)
    with config_errors("mesh"):
        mesh = sharding.make_mesh(**config.mesh, devices=devices)
    if published := published_config(config.model.path):
        model, raw = build_model(run.config.model, published, mesh), PUBLISHED[config.model.path]
    else:
        model, raw = open_model(run.config, _vocabulary_of(config), mesh)
    tokenizer = types.SimpleNamespace(eos_token_id=0)  # nothing else of it is asked for
    return Setup(run, mesh, tokenizer, model, raw)


def with_sources(config: ConfigDict) -> ConfigDict:
    """A copy of a config whose stages all name data, for dry runs, which read none."""
    config = copy.deepcopy(config)
    for stage in config.stages:
        if "data" in config[stage]:
            config[stage].data.source = config[stage].data.source or NOWHERE
    return config


def _vocabulary_of(config: ConfigDict) -> int:
    """How many rows the table of a new model has; 0 for a model that is imported."""
    if config.model.path:
        return 0
    if config.tokenizer.startswith(TRAINED_HERE):
        return int(config.tokenizer.removeprefix(TRAINED_HERE))
    return rows_for(load_tokenizer(config, storage.as_path(NOWHERE)))


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _line(name: str, tree: Any, rows: str, copies: int) -> str:
    size = sum(x.size for x in jax.tree.leaves(tree))
    return (
        f"{name}: {size:,} parameters, {copies} float32 copies of them "
        f"{4 * copies * size / 2**30:.1f} GiB; {rows}: lowers"
    )
