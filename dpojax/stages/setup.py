"""What all stages of a run share: the mesh, the tokenizer, and the model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.config.checks import ConfigError, naming
from dpojax.models import decoder, huggingface, kernels
from dpojax.models.config import GPT2, LLAMA, DecoderConfig
from dpojax.models.decoder import SHARDING_RULES, Model
from dpojax.models.scores import with_scalar_head
from dpojax.stages import adapters
from dpojax.stages.adapters import Lora
from dpojax.stages.tokenizers import load_tokenizer
from dpojax.training import checkpoints

VOCABULARY_PADDING = 1024  # rows that a model may have beyond its tokenizer's ids
LEAST_COMPILE_SECONDS = 0.05  # of a program that is kept: to read one back takes a tenth of that


class Setup(NamedTuple):
    """Shared by the stages of one run."""

    config: ConfigDict
    workdir: pathlib.Path
    mesh: Mesh
    tokenizer: Any
    model: Model
    raw: dict | None  # config.json of the imported model
    lora: dict[str, Lora | None]  # by stage
    vmapped: bool = False  # whether steps may run under vmap, as those of a sweep

    @property
    def abstract_params(self):
        """Shapes, float32, and shardings of the parameters."""
        # Of the function itself, which JAX then traces once: runs ask often.
        shapes = jax.eval_shape(self.model.init, jax.eval_shape(lambda: jax.random.key(0)))
        shardings = sharding.tree_shardings(shapes, self.mesh, SHARDING_RULES)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s), shapes, shardings
        )

    @property
    def max_logits(self) -> int:
        """Float32 logits of a model that may exist at once, on all devices that compute it."""
        return self.config.max_logits * self.mesh.size // self.mesh.shape.get(sharding.SWEEP, 1)

    @property
    def tokenizer_hash(self) -> str:
        """Of the vocabulary with its ids."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


@contextlib.contextmanager
def compiled_once(folder: str | os.PathLike) -> Iterator[None]:
    """What is compiled meanwhile is kept in a folder, and read from there by any later run.

    "" changes nothing: JAX keeps programs where JAX_COMPILATION_CACHE_DIR says.
    """
    if not folder:
        yield
        return
    directory, least = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in (directory, least)}
    _use_cache(
        {directory: os.path.expanduser(folder), least: min(LEAST_COMPILE_SECONDS, before[least])}
    )
    try:
        yield
    finally:
        _use_cache(before)


def _use_cache(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # what has compiled before has opened another, or none


def prepare(config: ConfigDict, workdir: pathlib.Path, *, vmapped: bool = False) -> Setup:
    """Mesh, tokenizer and model from the config; no weights but given adapters are read yet.

    Args:
      vmapped: whether members of a sweep are trained together.

    Raises:
      ConfigError: tokenizer and model do not fit each other, the lengths do not fit the model, or
        adapters do not.
    """
    with naming("mesh"):
        mesh = sharding.make_mesh(**config.mesh)
    tokenizer = load_tokenizer(config, workdir)
    model, raw = open_model(config, len(tokenizer), mesh, vmapped=vmapped)
    model_config = model.config
    _check_fit(config, model_config, tokenizer)
    setup = Setup(config, workdir, mesh, tokenizer, model, raw, lora={}, vmapped=vmapped)
    for name in config.stages:
        setup.lora[name] = adapters.prepare(
            name,
            config[name],
            workdir / name,
            mesh=mesh,
            decoder=model_config,
            raw=raw,
            abstract_params=setup.abstract_params,
        )
    return setup


def open_model(
    config: ConfigDict, vocabulary: int, mesh: Mesh, *, vmapped: bool = False
) -> tuple[Model, dict | None]:
    """The model, without weights, and config.json of an imported one; a new one has as many ids as
    `vocabulary` says.

    Raises:
      ConfigError: a shape that cannot be; a config.json that cannot be read; an attention that the
        mesh's devices do not have.
    """
    if config.model.path:
        with naming("model.path"):
            model_config, raw = huggingface.read_config(config.model.path)
    else:
        with naming("model"):
            model_config, raw = _fresh_config(config.model, vocabulary), None
    with naming("model"):
        return _build(config.model, model_config, mesh, vmapped), raw


def scalar(setup: Setup, labels: tuple[str, ...] = ()) -> Setup:
    """The same with a scalar head on the model, for reward models; with labels, a classifier's."""
    config = dataclasses.replace(setup.model.config, scalar_head=True, labels=labels)
    return setup._replace(model=_build(setup.config.model, config, setup.mesh, setup.vmapped))


def scored(setup: Setup, params: dict) -> dict:
    """`params` with a new scalar head, drawn from the seed, in place of their language-model head;
    `setup` is of `scalar`."""
    if "score" in params:
        return params
    key = jax.random.fold_in(jax.random.key(setup.config.seed), zlib.crc32(b"score"))
    config = setup.model.config
    with_head = lambda trunk: with_scalar_head(config, trunk, key, config.labels)[1]
    shardings = jax.tree.map(lambda x: x.sharding, setup.abstract_params)
    return jax.jit(with_head, out_shardings=shardings)(params)


def _build(model: ConfigDict, config: DecoderConfig, mesh: Mesh, vmapped: bool) -> Model:
    dtype, device = jnp.dtype(model.compute_dtype), mesh.devices.flat[0]
    with naming("model.attention"):
        kernel = kernels.choose(model.attention, config, dtype, device, vmapped=vmapped)
    return decoder.build(config, compute_dtype=dtype, remat=model.remat, kernel=kernel)


def initial_params(setup: Setup) -> dict:
    """The parameters that the first stage starts from: imported, or drawn from the seed."""
    if setup.config.model.path:
        return load_weights(setup, setup.config.model.path)
    shardings = jax.tree.map(lambda x: x.sharding, setup.abstract_params)
    key = jax.random.key(setup.config.seed)
    return jax.jit(setup.model.init, out_shardings=shardings)(key)


def trained_params(setup: Setup, stage: str, step: int | None = None) -> dict:
    """Float32 parameters of a stage's checkpoint; adapters are merged.

    Args:
      step: None is the best of a stage that keeps it, else the newest.

    Raises:
      CheckpointError: there is none.
    """
    folder, lora = setup.workdir / stage / "checkpoints", setup.lora[stage]
    step = kept_step(setup, stage) if step is None else step
    if lora is None:
        within = "policy" if stage == "ppo" else ""  # a state of PPO's has two models
        return checkpoints.load_params(folder, setup.abstract_params, step, within=within)
    trained = checkpoints.load_params(folder, lora.abstract, step)
    return lora.merge(lora.keep_base(None), trained)


def kept_step(setup: Setup, stage: str) -> int | None:
    """The step whose parameters are a stage's result so far; None is the newest on disk."""
    best = checkpoints.best(setup.workdir / stage / "checkpoints")
    return None if best is None else best.step


def load_weights(setup: Setup, path: str) -> dict:
    """Float32 parameters of a Hugging Face folder of the same shape, on the mesh.

    Raises:
      ConfigError: the folder holds a model of another shape, or no complete one.
    """
    with naming(f"model.path ({path})"):
        found, params, _ = huggingface.load(path, mesh=setup.mesh)
    if found != setup.model.config:
        raise ConfigError(f"{path}: its config differs from the policy's: {found}")
    return params


def _fresh_config(model: ConfigDict, vocabulary: int) -> DecoderConfig:
    families = {"llama": LLAMA, "gpt2": GPT2}
    if model.family not in families:
        raise ConfigError(f"config.model.family = {model.family!r}: llama or gpt2")
    sizes = ("width", "layers", "heads", "kv_heads", "mlp_width", "max_positions")
    shape = {name: model[name] for name in sizes}
    return DecoderConfig(**families[model.family], **shape, vocab_size=vocabulary)


def _check_fit(config: ConfigDict, model: DecoderConfig, tokenizer) -> None:
    ids = len(tokenizer)
    if not ids <= model.vocab_size <= ids + VOCABULARY_PADDING:
        raise ConfigError(
            f"the tokenizer has {ids} ids and the model {model.vocab_size} rows: they do not "
            "belong together; set config.tokenizer and config.model.path to a pair that fits"
        )
    lengths = {"tokens.max_length": config.tokens.max_length}
    if "classifier" in config.stages:
        lengths["classifier.max_tokens"] = config.classifier.max_tokens
    for key, length in lengths.items():
        if length > model.max_positions:
            raise ConfigError(
                f"config.{key} = {length}, but the model knows {model.max_positions} positions; "
                "lower it"
            )
