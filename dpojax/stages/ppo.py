"""PPO: a policy trained on the rewards of its own responses, under a KL penalty."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dpojax.data.rows import empty
from dpojax.methods import ppo
from dpojax.stages import ppo_train
from dpojax.stages.ppo_setup import PPOSetup
from dpojax.stages.ppo_summary import summarise
from dpojax.stages.samples import open_samples
from dpojax.stages.stage import Lowered, RowSize, Summarise, count, mesh_text
from dpojax.training.memory import Footprint
from dpojax.training.preemption import StopSignal
from dpojax.training.state import moment_copies


class PPO(PPOSetup):
    """Trains a policy with a value model of the same trunk."""

    def footprint(self) -> Footprint | None:
        return None

    def lower(self, row: RowSize) -> Lowered:
        config = self.config
        with jax.set_mesh(self.setup.mesh):
            step = lower_update(self, row.prompt)
        # Policy and value model with gradient and moments, and the reference.
        copies = 2 * (2 + moment_copies(config.optimizer)) + 1
        rows = f"{config.batch_size} prompts, {config.max_new_tokens} new tokens"
        return Lowered(step, rows, copies)

    def describe(self) -> str:
        config = self.config
        return (
            f"{self.name}: {count(self.setup.abstract_params)} parameters and a value model of the "
            f"same trunk on a mesh of {mesh_text(self.setup)}; {len(self.prompts.texts):,} "
            f"prompts; {self.steps:,} iterations of {config.batch_size} prompts with "
            f"{config.samples} response(s) each, in {config.epochs} epoch(s) of "
            f"{config.minibatches} minibatches; reward {self.reward.name}"
        )

    def train(self, start: Callable[[], dict], stop: StopSignal) -> dict:
        return ppo_train.train(self, start, stop)

    def evaluate(self, params: dict) -> dict[str, float]:
        """Reward and KL of samples to held-out prompts (`config.samples`)."""
        sample = open_samples(
            self.setup,
            self.reference_params(),
            self.programs.score,
            reward_name=self.evaluation_reward,
        )
        return sample(params).metrics()

    def open_summary(self) -> Summarise:
        return summarise


def lower_update(stage: PPO, prompt_length: int) -> jax.stages.Lowered:
    """The update for prompts of so many tokens, from shapes alone."""
    config, multiple = stage.config, stage.row_multiple
    responses, new = config.batch_size * config.samples, config.max_new_tokens
    shape = ppo.row_shape(prompt_length, new)
    shape = shape._replace(rows=-(-responses // multiple) * multiple)
    rows = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.asarray(x[0]), empty(shape)))
    packed = ppo.Responses(
        rows,
        jax.ShapeDtypeStruct((shape.rows, new), jnp.int32),
        jax.ShapeDtypeStruct((responses,), jnp.int32),
        jax.ShapeDtypeStruct((responses,), bool),
    )
    state, scores = stage.abstract_state(), jax.ShapeDtypeStruct((responses,), jnp.float32)
    return stage.programs.update.lower(state, state.policy.params, packed, scores, stage.hyper)
