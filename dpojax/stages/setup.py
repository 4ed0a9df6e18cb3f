"""What all stages of a run share: the mesh, the tokenizer and the model."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dpojax import sharding, storage
from dpojax.config.errors import ConfigError, config_errors
from dpojax.config.resolved import ResolvedRun
from dpojax.models import decoder, huggingface, kernels
from dpojax.models.config import GPT2, LLAMA, DecoderConfig
from dpojax.models.decoder import SHARDING_RULES, Model
from dpojax.models.scores import with_scalar_head
from dpojax.stages.tokenizers import load_tokenizer, stop_tokens
from dpojax.stages.vocabulary import rows_for, tell_of_mismatch
from dpojax.watchdog import beat


class Setup(NamedTuple):
    """What the stages of one run share.

    Attributes:
      run: the resolved config.
      mesh: all devices of the run.
      tokenizer: of transformers.
      model: a decoder, without weights.
      imported_config: config.json of the model that was imported; None for a new model.
      vmapped: whether train steps may run under `vmap`, as those of a vectorised sweep do.
    """

    run: ResolvedRun
    mesh: Mesh
    tokenizer: Any
    model: Model
    imported_config: dict | None
    vmapped: bool = False

    @property
    def config(self) -> ConfigDict:
        return self.run.config

    @property
    def workdir(self) -> storage.Path:
        return self.run.workdir

    @property
    def abstract_params(self) -> dict:
        """Shapes, float32, and shardings of the parameters."""
        # The bound method itself goes to `eval_shape`, so that JAX traces it once: runs ask often.
        shapes = jax.eval_shape(self.model.init, jax.eval_shape(lambda: jax.random.key(0)))
        shardings = sharding.tree_shardings(shapes, self.mesh, SHARDING_RULES)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s), shapes, shardings
        )

    @property
    def max_logits(self) -> int:
        """Float32 logits of one model that may exist at once, on all devices that compute it."""
        return self.config.max_logits * self.mesh.size // self.mesh.shape.get(sharding.SWEEP, 1)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end a sampled response. Those beyond the model's table are never drawn."""
        stops = stop_tokens(self.tokenizer, self.config.model.path)
        return tuple(token for token in stops if token < self.model.config.vocab_size)


def prepare_setup(run: ResolvedRun, *, mesh: Mesh | None = None, vmapped: bool = False) -> Setup:
    """Open mesh, tokenizer and model of a run; no weights are read yet.

    Args:
      mesh: in place of the one that the config describes.
      vmapped: whether members of a sweep will train in one program.

    Raises:
      ConfigError: there is no such tokenizer or model, or the lengths do not fit the model.
    """
    beat("tokenizer and model are opened")
    config = run.config
    if mesh is None:
        with config_errors("mesh"):
            mesh = sharding.make_mesh(**config.mesh)
    if config.model.path:  # before its tokenizer, which may be there where no model is
        with config_errors("model.path"):
            huggingface.require_model(config.model.path)
    tokenizer = load_tokenizer(config, run.workdir)
    model, imported_config = open_model(config, rows_for(tokenizer), mesh, vmapped=vmapped)
    tell_of_mismatch(tokenizer, model.config.vocab_size, chosen=bool(config.tokenizer))
    _require_room(config, model.config)
    return Setup(run, mesh, tokenizer, model, imported_config, vmapped)


def open_model(
    config: ConfigDict, vocabulary: int, mesh: Mesh, *, vmapped: bool = False
) -> tuple[Model, dict | None]:
    """The model without weights, and config.json of an imported model (None for a new one).

    Args:
      vocabulary: how many rows a new model's table has.

    Raises:
      ConfigError: a shape that is impossible; a config.json that cannot be read; an attention
        kernel that the mesh's devices do not have.
    """
    if config.model.path:
        with config_errors("model.path"):
            model_config, imported_config = huggingface.read_config(config.model.path)
    else:
        with config_errors("model"):
            model_config, imported_config = _new_model_config(config.model, vocabulary), None
    with config_errors("model"):
        return build_model(config.model, model_config, mesh, vmapped), imported_config


def with_scalar_model(setup: Setup, labels: tuple[str, ...] = ()) -> Setup:
    """The same setup, whose model has a scalar head (a reward model), or one output per label."""
    config = dataclasses.replace(setup.model.config, scalar_head=True, labels=labels)
    return setup._replace(model=build_model(setup.config.model, config, setup.mesh, setup.vmapped))


def with_scalar_params(setup: Setup, params: dict) -> dict:
    """`params` with a scalar head in place of their language-model head.

    The head is drawn from the seed. Parameters that have a scalar head already stay as they are.

    Args:
      setup: of `with_scalar_model`.
    """
    if "score" in params:
        return params
    key = jax.random.fold_in(jax.random.key(setup.config.seed), zlib.crc32(b"score"))
    config = setup.model.config

    def with_head(trunk: dict) -> dict:
        return with_scalar_head(config, trunk, key, config.labels)[1]

    shardings = jax.tree.map(lambda x: x.sharding, setup.abstract_params)
    return jax.jit(with_head, out_shardings=shardings)(params)


def build_model(
    model: ConfigDict, config: DecoderConfig, mesh: Mesh, vmapped: bool = False
) -> Model:
    """The model of a configuration, with the kernel and precision that `config.model` asks for.

    Raises:
      ConfigError: an attention kernel that the mesh's devices do not have.
    """
    dtype, device = jnp.dtype(model.compute_dtype), mesh.devices.flat[0]
    with config_errors("model.attention"):
        kernel = kernels.choose(model.attention, config, dtype, device, vmapped=vmapped)
    return decoder.build(config, compute_dtype=dtype, remat=model.remat, kernel=kernel)


def initial_params(setup: Setup) -> dict:
    """The parameters that the first stage starts from: imported, or drawn from the seed."""
    if setup.config.model.path:
        return load_weights(setup, setup.config.model.path)
    beat("the first weights are drawn")
    shardings = jax.tree.map(lambda x: x.sharding, setup.abstract_params)
    key = jax.random.key(setup.config.seed)
    return jax.jit(setup.model.init, out_shardings=shardings)(key)


def load_weights(setup: Setup, path: str) -> dict:
    """Float32 parameters of a Hugging Face folder of the same shape, on the mesh.

    Raises:
      ConfigError: the folder holds a model of another shape, or no complete one.
    """
    beat("weights are loaded")
    with config_errors(f"model.path ({path})"):
        loaded_config, params, _ = huggingface.load(path, mesh=setup.mesh)
    if loaded_config != setup.model.config:
        raise ConfigError(f"{path}: its config differs from the policy's: {loaded_config}")
    return params


def _new_model_config(model: ConfigDict, vocabulary: int) -> DecoderConfig:
    families = {"llama": LLAMA, "gpt2": GPT2}
    if model.family not in families:
        raise ConfigError(f"config.model.family = {model.family!r}: llama or gpt2")
    sizes = ("width", "layers", "heads", "kv_heads", "mlp_width", "max_positions")
    shape = {name: model[name] for name in sizes}
    return DecoderConfig(**families[model.family], **shape, vocab_size=vocabulary)


def _require_room(config: ConfigDict, model: DecoderConfig) -> None:
    lengths = {"tokens.max_length": config.tokens.max_length}
    if "classifier" in config.stages:
        lengths["classifier.max_tokens"] = config.classifier.max_tokens
    for key, length in lengths.items():
        if length > model.max_positions:
            raise ConfigError(
                f"config.{key} = {length}, but the model knows {model.max_positions} positions; "
                "lower it"
            )
