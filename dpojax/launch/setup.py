"""What all stages of a run share: the mesh, the tokenizer, and the model."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import AutoTokenizer

from dpojax import sharding
from dpojax.data import reviews
from dpojax.launch.config import ConfigError, naming
from dpojax.models import decoder, huggingface
from dpojax.models.config import GPT2, LLAMA, DecoderConfig
from dpojax.models.decoder import SHARDING_RULES, Model

VOCABULARY_PADDING = 1024  # rows that a model may have beyond its tokenizer's ids


class Setup(NamedTuple):
    """Shared by the stages of one run."""

    config: ConfigDict
    workdir: pathlib.Path
    mesh: Mesh
    tokenizer: Any
    model: Model
    raw: dict | None  # config.json of the imported model

    @property
    def abstract_params(self):
        """Shapes, float32, and shardings of the parameters."""
        shapes = jax.eval_shape(self.model.init, jax.random.key(0))
        shardings = sharding.tree_shardings(shapes, self.mesh, SHARDING_RULES)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=s), shapes, shardings
        )

    @property
    def max_logits(self) -> int:
        """Float32 logits that may exist at once on all devices together."""
        return self.config.max_logits * self.mesh.size

    @property
    def tokenizer_hash(self) -> str:
        """Of the vocabulary with its ids."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def prepare(config: ConfigDict, workdir: pathlib.Path) -> Setup:
    """Mesh, tokenizer and model from the config; no weights are read yet.

    Raises:
      ConfigError: tokenizer and model do not fit each other, or the lengths do not fit the model.
    """
    with naming("mesh"):
        mesh = sharding.make_mesh(**config.mesh)
    tokenizer = load_tokenizer(config)
    if config.model.path:
        with naming("model.path"):
            model_config, raw = huggingface.read_config(config.model.path)
    else:
        with naming("model"):
            model_config, raw = _fresh_config(config.model, tokenizer), None
    _check_fit(config, model_config, tokenizer)
    with naming("model"):
        model = decoder.build(
            model_config,
            compute_dtype=jnp.dtype(config.model.compute_dtype),
            remat=config.model.remat,
        )
    return Setup(config, workdir, mesh, tokenizer, model, raw)


def load_tokenizer(config: ConfigDict):
    """config.tokenizer, else the model's own, else the embedded task's."""
    path = config.tokenizer or config.model.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(path) if path else reviews.tokenizer()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no tokenizer in {path!r} ({error}); set config.tokenizer to a folder or hub name"
        ) from error
    if config.chat_template:
        with naming("chat_template"):
            tokenizer.chat_template = pathlib.Path(config.chat_template).read_text()
    return tokenizer


def initial_params(setup: Setup) -> dict:
    """The parameters that the first stage starts from: imported, or drawn from the seed."""
    if setup.config.model.path:
        return load_weights(setup, setup.config.model.path)
    shardings = jax.tree.map(lambda x: x.sharding, setup.abstract_params)
    key = jax.random.key(setup.config.seed)
    return jax.jit(setup.model.init, out_shardings=shardings)(key)


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


def _fresh_config(model: ConfigDict, tokenizer) -> DecoderConfig:
    families = {"llama": LLAMA, "gpt2": GPT2}
    if model.family not in families:
        raise ConfigError(f"config.model.family = {model.family!r}: llama or gpt2")
    sizes = ("width", "layers", "heads", "kv_heads", "mlp_width", "max_positions")
    shape = {name: model[name] for name in sizes}
    return DecoderConfig(**families[model.family], **shape, vocab_size=len(tokenizer))


def _check_fit(config: ConfigDict, model: DecoderConfig, tokenizer) -> None:
    ids = len(tokenizer)
    if not ids <= model.vocab_size <= ids + VOCABULARY_PADDING:
        raise ConfigError(
            f"the tokenizer has {ids} ids and the model {model.vocab_size} rows: they do not "
            "belong together; set config.tokenizer and config.model.path to a pair that fits"
        )
    if config.tokens.max_length > model.max_positions:
        raise ConfigError(
            f"config.tokens.max_length = {config.tokens.max_length}, but the model knows "
            f"{model.max_positions} positions; lower it"
        )
