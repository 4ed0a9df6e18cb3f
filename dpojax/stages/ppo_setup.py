"""What PPO trains: its models, programs, prompts and reward."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dpojax import sharding, storage
from dpojax.config.contents import NamedPath, prompts_hash, reward_hash, sample_paths
from dpojax.config.errors import ConfigError, config_errors
from dpojax.config.rules import (
    TRAINING_RULES,
    above,
    apply_rules,
    at_least,
    between,
    check_optimizer,
)
from dpojax.data.pipeline import order
from dpojax.data.prompts import EMBEDDED, read_prompts
from dpojax.evaluation.policies import encode_prompts
from dpojax.evaluation.rewards import Reward, open_reward
from dpojax.methods import ppo
from dpojax.methods.ppo import PPOState
from dpojax.models.decoder import SHARDING_RULES
from dpojax.rl import AdaptiveKL
from dpojax.sampling import Prompts, Sampler, build_sampler
from dpojax.stages.data import DataRequirements
from dpojax.stages.kept import check_metrics
from dpojax.stages.samples import sample_metric_names
from dpojax.stages.setup import Setup, with_scalar_model
from dpojax.stages.stage import Stage, require_language_model
from dpojax.stages.vocabulary import require_rows_of_prompts
from dpojax.training import checkpoints
from dpojax.training.forward import build_score
from dpojax.training.objective import Hyper
from dpojax.training.state import abstract_state, make_optimizer

LARGEST_KL_ERROR = 0.2  # to which `rl.update_kl` holds the relative error of the KL
RULES = (
    at_least("limit", 0, "0 (all of a file) or more prompts"),
    at_least("steps", 1, "1 or more iterations"),
    at_least("samples", 1, "1 or more responses to a prompt"),
    at_least("minibatches", 1),
    at_least("value_learning_rate", 0),
    above("clip", 0),
    above("value_clip", 0),
    between("discount", 0, 1),
    between("gae_lambda", 0, 1),
    above("kl_coefficient", 0),
    above("kl_target", 0, "nats"),
    at_least("kl_horizon", 0, "0 (the coefficient stays) or more responses"),
    at_least("missing_eos_penalty", 0),
    at_least("value_warmup", 0, "0 or more iterations"),
    at_least("max_kl", 0, "0 (off) or more nats per token"),
    at_least("entropy", 0, "0 (off) or more"),
    at_least("max_new_tokens", 1),
)


class Programs(NamedTuple):
    """The functions of the stage that are compiled at first use.

    Attributes:
      settings: what shapes the update, and is not traced.
      optimizer: of policy and value model.
      sampler: draws responses.
      update: jitted `methods.ppo.build_update`; donates the state.
      score: jitted `training.forward.build_score`.
    """

    settings: ppo.PPO
    optimizer: optax.GradientTransformation
    sampler: Sampler
    update: Callable
    score: Callable


class TrainingPrompts(NamedTuple):
    """Prompts to train on, as texts and as token ids."""

    texts: list[str]
    tokens: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class PPOSetup(Stage):
    """Models, programs and prompts of PPO: a policy, and a value model of the same trunk.

    Attributes:
      setup: of the run.
      programs: compiled at first use.
      prompts, reward: None before `prepare`.
    """

    name = "ppo"

    setup: Setup
    programs: Programs
    prompts: TrainingPrompts | None = None
    reward: Reward | None = None

    @classmethod
    def resolve(cls, config: ConfigDict) -> str:
        """See `Stage`.

        Returns:
          the reward that evaluations use: that of training, where config.samples names none.
        """
        apply_rules((*TRAINING_RULES, *RULES), config.ppo, "ppo.")
        check_optimizer(config.ppo, "ppo")
        _check_responses(config.ppo)
        if config.ppo.prompts == EMBEDDED and not config.ppo.limit:
            raise ConfigError(
                "config.ppo.limit = 0: the prompts of reviews never end; say how many to use"
            )
        if config.samples.prompts == EMBEDDED != config.ppo.prompts:
            raise ConfigError(
                f"config.samples.prompts = 'reviews', but config.ppo.prompts = "
                f"{config.ppo.prompts!r}: set it to a file of held-out prompts of the same kind"
            )
        return config.samples.reward or config.ppo.reward

    @classmethod
    def paths(cls, config: ConfigDict) -> list[NamedPath]:
        return [
            NamedPath("ppo.prompts", config.ppo.prompts, prompts_hash),
            NamedPath("ppo.reward", config.ppo.reward, reward_hash),
            NamedPath("samples.prompts", config.samples.prompts, prompts_hash),
            *sample_paths(config),
        ]

    @classmethod
    def open(cls, setup: Setup) -> Self:
        require_language_model(setup, cls.name)
        config, model, max_logits = setup.config.ppo, setup.model, setup.max_logits
        settings, optimizer = _settings(setup), make_optimizer(config.optimizer)
        value_model = with_scalar_model(setup).model
        state_shardings = jax.tree.map(lambda x: x.sharding, _abstract_state(setup, optimizer))
        update = jax.jit(
            ppo.build_update(model, value_model, settings, optimizer, max_logits=max_logits),
            donate_argnums=0,
            out_shardings=(state_shardings, None),
        )
        sampler = build_sampler(model, max_new_tokens=config.max_new_tokens, stop=setup.stop_tokens)
        score = jax.jit(build_score(model, max_logits=max_logits))
        return cls(setup, Programs(settings, optimizer, sampler, update, score))

    @property
    def requirements(self) -> DataRequirements:
        return DataRequirements("prompts")

    def prepare(self) -> Self:
        """Open the reward and read the prompts.

        Raises:
          ConfigError: a reward that cannot be opened; fewer prompts than a batch; a prompt that
            leaves no room for its response; a metric that no evaluation has.
          DataError: see `read_prompts`.
        """
        check_metrics(self.name, self.setup.config, self.metric_names)
        with config_errors("ppo.reward"):
            reward = open_reward(self.config.reward, mesh=self.setup.mesh)
        return dataclasses.replace(self, prompts=_read_prompts(self.setup), reward=reward)

    def trained_params(self, step: int | None = None) -> dict:
        """See `Stage`. A checkpoint holds two models; this is the policy."""
        step = self.best_step if step is None else step
        shapes = self.setup.abstract_params
        return checkpoints.load_params(self.checkpoint_folder, shapes, step, within="policy")

    def metric_names(self) -> list[str]:
        """The names of an evaluation's metrics."""
        reward = self.evaluation_reward
        return sample_metric_names(self.setup, reward_name=reward, with_ranks=False)

    @property
    def reference_folder(self) -> storage.Path:
        return self.folder / "reference"

    def reference_params(self) -> dict:
        """The float32 parameters that the stage started from."""
        return checkpoints.load_tree(self.reference_folder, self.setup.abstract_params)

    def kept_weights(self, start: Callable[[], dict]) -> dict[storage.Path, Callable[[], dict]]:
        return {self.reference_folder: start}

    @property
    def steps(self) -> int:
        """Iterations of the whole stage."""
        return self.config.steps

    @property
    def evaluation_reward(self) -> str:
        """The name of the reward that evaluations use."""
        return self.setup.run.settings[self.name]

    @property
    def hyper(self) -> Hyper:
        """The numbers that are traced in the update."""
        config = self.config
        return ppo.hyper(
            learning_rate=config.learning_rate,
            value_learning_rate=config.value_learning_rate,
            clip=config.clip,
            value_clip=config.value_clip,
            discount=config.discount,
            gae_lambda=config.gae_lambda,
            kl_target=config.kl_target,
            kl_horizon=config.kl_horizon or math.inf,
            missing_eos_penalty=config.missing_eos_penalty,
            max_kl=config.max_kl or math.inf,
            value_warmup=config.value_warmup,
        )

    @property
    def row_multiple(self) -> int:
        """The rows of an update are a multiple of it."""
        settings = self.programs.settings
        return settings.minibatches * settings.micro_batches * sharding.row_shards(self.setup.mesh)

    def batch(self, iteration: int) -> tuple[list[str], Prompts]:
        """The prompts of an iteration: texts [B], and arrays of the one width of all batches."""
        size, every = self.config.batch_size, self.prompts
        batches = order(
            len(every.texts), batch_size=size, steps=self.steps, seed=self.setup.config.seed
        )
        indices = batches[iteration]
        tokens = np.zeros((size, max(map(len, every.tokens))), np.int32)
        lengths = np.zeros(size, np.int32)
        for row, index in enumerate(indices):
            prompt = every.tokens[index]
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        # Draws go by row, so that a prompt that is in a batch twice is answered twice.
        prompts = Prompts(tokens, lengths, np.arange(size, dtype=np.int32))
        return [every.texts[index] for index in indices], prompts

    def new_state(self, params: dict) -> PPOState:
        """The state before the first iteration; takes over the buffers of `params`."""
        _, value_params = ppo.with_value_head(self.setup.model.config, params)
        return ppo.new_ppo_state(
            params,
            value_params,
            self.programs.optimizer,
            self.setup.mesh,
            SHARDING_RULES,
            seed=self.setup.config.seed,
            kl_coefficient=self.config.kl_coefficient,
        )

    def abstract_state(self) -> PPOState:
        return _abstract_state(self.setup, self.programs.optimizer)


def _check_responses(config: ConfigDict) -> None:
    """Raise ConfigError where the responses of an iteration cannot be divided as asked."""
    responses = config.batch_size * config.samples
    if responses % config.minibatches:
        raise ConfigError(
            f"config.ppo.minibatches = {config.minibatches}: does not divide the {responses} "
            f"responses of an iteration (batch_size {config.batch_size} x samples {config.samples})"
        )
    if config.kl_horizon and config.kl_horizon <= LARGEST_KL_ERROR * responses:
        raise ConfigError(
            f"config.ppo.kl_horizon = {config.kl_horizon}: with {responses} responses in an "
            f"iteration it has to be above {LARGEST_KL_ERROR * responses:g}, or the coefficient "
            "could turn negative; 0 keeps the coefficient as it is"
        )


def _settings(setup: Setup) -> ppo.PPO:
    config, micro_rows = setup.config.ppo, setup.config.micro_rows
    rows = config.batch_size * config.samples // config.minibatches
    if micro_rows and rows % micro_rows:
        raise ConfigError(
            f"config.micro_rows = {micro_rows}: does not divide the {rows} responses of a "
            "minibatch of PPO; 0 takes them at once"
        )
    return ppo.PPO(
        epochs=config.epochs,
        minibatches=config.minibatches,
        micro_batches=rows // (micro_rows or rows),
        entropy=config.entropy,
    )


def _abstract_state(setup: Setup, optimizer: optax.GradientTransformation) -> PPOState:
    policy, value = (
        abstract_state(x.abstract_params, optimizer, setup.mesh, SHARDING_RULES)
        for x in (setup, with_scalar_model(setup))
    )
    replicated = sharding.replicated(setup.mesh)
    coefficient = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    iteration = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return PPOState(policy, value, AdaptiveKL(coefficient), iteration)


def _read_prompts(setup: Setup) -> TrainingPrompts:
    config = setup.config.ppo
    texts = read_prompts(
        config.prompts,
        split="train",
        limit=config.limit,
        seed=setup.config.seed,
        tokenizer=setup.tokenizer,
    )
    if len(texts) < config.batch_size:
        raise ConfigError(
            f"config.ppo.batch_size = {config.batch_size}: {config.prompts} has only {len(texts)} "
            "prompts; lower it"
        )
    prompts = encode_prompts(setup.tokenizer, texts)
    _require_room(prompts, config, setup.model.config.max_positions)
    rows = setup.model.config.vocab_size
    require_rows_of_prompts(config.prompts, prompts, rows, setup.tokenizer)
    return TrainingPrompts(texts, prompts)


def _require_room(prompts: Sequence[np.ndarray], config: ConfigDict, positions: int) -> None:
    """Raise ConfigError for a prompt that is empty, or leaves no room for its response."""
    new = config.max_new_tokens
    for number, prompt in enumerate(prompts):
        if not len(prompt) or len(prompt) + new > positions:
            raise ConfigError(
                f"config.ppo.prompts ({config.prompts}), prompt {number}: {len(prompt)} tokens and "
                f"max_new_tokens = {new} new ones, but the model has {positions} positions, and a "
                "prompt at least one token; cut the prompt or lower max_new_tokens"
            )
