"""Preference optimisation: `config.preference.loss` names any loss of `dpojax.losses`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.contents import NamedPath, draws_samples, sample_paths, weights_hash
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import ResolvedRun
from dpojax.config.rules import apply_rules, one_of, precision
from dpojax.data.rows import Rows
from dpojax.methods import preference
from dpojax.methods.preference import LossRequirements
from dpojax.sharding import put_rows
from dpojax.stages.adapters import open_adapters
from dpojax.stages.data import DataRequirements
from dpojax.stages.example_stage import EvaluateSamples
from dpojax.stages.held_out_kl import KL, open_held_out_kl
from dpojax.stages.preference_summary import open_summary
from dpojax.stages.reference import NO_REFERENCE, Reference
from dpojax.stages.references import (
    open_reference,
    policy_starts_at_reference,
    reference_weights,
    saved_weights,
    weights_folder,
)
from dpojax.stages.samples import sample_metric_names, sampled_metrics
from dpojax.stages.setup import Setup, load_weights
from dpojax.stages.stage import Summarise, require_language_model
from dpojax.stages.train import evaluate_batches
from dpojax.stages.trained_stage import LanguageStage
from dpojax.training.objective import Hyper, Objective, OptionError
from dpojax.training.preemption import StopSignal

RULES = (
    one_of("reference.kind", ("cached", "live"), "cached or live"),
    precision("reference.dtype"),
)


class BoundLoss(NamedTuple):
    """A loss with every option that it takes.

    Attributes:
      name: of a loss, or of several joined by +.
      options: by name. Numbers are traced in the step; text and truth values are not.
      requirements: what the loss needs of data and reference.
    """

    name: str
    options: dict[str, Any]
    requirements: LossRequirements


class Preference(LanguageStage):
    """Trains a policy on preferences, against a reference policy where the loss has one."""

    name = "preference"

    @classmethod
    def resolve(cls, config: ConfigDict) -> BoundLoss:
        super().resolve(config)
        stage = config.preference
        apply_rules(RULES, stage, "preference.")
        loss = bind_loss(stage)
        if loss.requirements.live and stage.reference.kind != "live":
            raise ConfigError(
                f"config.preference.reference.kind: {loss.name} needs the reference's whole "
                "distributions, which are not cached; set it to live"
            )
        if "sync_every" in loss.options:
            _check_synchronised_reference(stage)
        if stage.lora.rank:
            _check_reference_of_adapters(stage, loss)
        stage.update({key: loss.options[key] for key in preference.OPTIONS if key in loss.options})
        return loss

    @classmethod
    def paths(cls, config: ConfigDict) -> list[NamedPath]:
        reference = config.preference.reference.path
        path = NamedPath("preference.reference.path", reference, weights_hash)
        return [*super().paths(config), path, *sample_paths(config)]

    @classmethod
    def traced_options(cls, run: ResolvedRun) -> tuple[str, ...]:
        options = run.settings[cls.name].options
        return tuple(
            key
            for key, value in options.items()
            if type(value) in (int, float) and preference.OPTIONS[key].traced
        )

    @classmethod
    def open(cls, setup: Setup) -> Self:
        require_language_model(setup, cls.name)
        base_is_reference = not setup.config.preference.reference.path
        adapters = open_adapters(setup, cls.name, base_is_reference=base_is_reference)
        return cls(setup, cls.build_programs(setup), adapters)

    @classmethod
    def objective_of(cls, run: ResolvedRun) -> Objective:
        loss = run.settings[cls.name]
        return preference.objective(loss.name, loss.options)

    @property
    def loss(self) -> BoundLoss:
        return self.setup.run.settings[self.name]

    @property
    def requirements(self) -> DataRequirements:
        needs = self.loss.requirements
        labelled = needs.form == "labelled"
        return DataRequirements(
            "labelled" if labelled else "ranked",
            mismatched=labelled and "kl" in needs.inputs,
            scores=needs.scores,
            unit_gaps="score_gap" in needs.inputs,
            ties=bool(needs.inputs & {"tie", "ranks"}),
            best_only=needs.chosen,
            weights=needs.weights,
        )

    @cached_property
    def hyper(self) -> Hyper:
        return preference.hyper(self.loss.options | {"learning_rate": self.config.learning_rate})

    @property
    def starts_at_reference(self) -> bool:
        """Whether the loss has a reference that the policy equals at step 0."""
        return self.programs.objective.needs_reference and policy_starts_at_reference(self)

    def open_reference(
        self, params: dict | None, base: dict | None, stop: StopSignal, writing: ExitStack
    ) -> Reference:
        weights = reference_weights(self, params, base, writing)
        begin_kl = open_held_out_kl(self, weights.params).begin
        if not self.programs.objective.needs_reference:
            return NO_REFERENCE._replace(begin_kl=begin_kl)
        return open_reference(self, weights, params, base, stop)._replace(begin_kl=begin_kl)

    def kept_weights(self, start: Callable[[], dict]) -> dict[storage.Path, Callable[[], dict]]:
        path = self.config.reference.path
        make_again = partial(load_weights, self.setup, path) if path else start
        return {weights_folder(self): make_again} | super().kept_weights(start)

    def open_samples(self, base: dict | None) -> EvaluateSamples | None:
        if not draws_samples(self.setup.config):
            return None
        return sampled_metrics(
            self.setup,
            reference_weights(self, None, base).params,
            self.programs.score,
            starts_at_reference=policy_starts_at_reference(self),
        )

    def metric_names(self) -> list[str]:
        return sorted([*super().metric_names(), KL])

    def sample_metric_names(self) -> list[str]:
        if not draws_samples(self.setup.config):
            return []
        reward = self.setup.config.samples.reward
        return sample_metric_names(self.setup, reward_name=reward, with_ranks=bool(reward))

    def live_reference_shapes(self) -> dict | None:
        if self.config.reference.kind != "live" or self._reference_is_base:
            return None
        dtype = jnp.dtype(self.config.reference.dtype)
        return jax.tree.map(lambda x: x.update(dtype=dtype), self.setup.abstract_params)

    def sampled_reference_shapes(self) -> dict | None:
        if not draws_samples(self.setup.config) or self._reference_is_base:
            return None
        return self.setup.abstract_params

    @property
    def _reference_is_base(self) -> bool:
        return self.adapters is not None and not self.config.reference.path

    def evaluate(self, params: dict) -> dict[str, float]:
        """Metrics of parameters on the held-out examples, against the reference that was kept."""
        score, mesh, reference = self.programs.score, self.setup.mesh, saved_weights(self)
        live = reference if "kl" in self.programs.objective.statistics else None

        def with_reference(rows: Rows) -> Rows:
            placed = put_rows(rows, mesh)
            logprob = score(reference, placed, reference=live).logprob
            return placed._replace(reference=logprob)

        batches = map(with_reference, self.batches.held_out())
        begin_kl = open_held_out_kl(self, reference).begin
        return evaluate_batches(self, params, batches, reference=live, begin_kl=begin_kl)

    def open_summary(self) -> Summarise:
        return open_summary(self)


def bind_loss(stage: ConfigDict) -> BoundLoss:
    """The loss that `config.preference` names, with its options as set or by default.

    Raises:
      ConfigError: naming the key.
    """
    chosen = {key: stage[key] for key in preference.OPTIONS} | {"weights": stage.loss_weights}
    try:
        options = preference.resolve(stage.loss, chosen, stage.preset)
        return BoundLoss(stage.loss, options, preference.loss_requirements(stage.loss))
    except OptionError as error:
        raise ConfigError(f"config.preference.{error}") from error


def _check_synchronised_reference(stage: ConfigDict) -> None:
    """Raise ConfigError for a reference that is not the policy that the stage starts from."""
    if stage.reference.kind != "cached" or stage.reference.path:
        raise ConfigError(
            "config.preference.sync_every: training starts with the policy as its reference, and "
            "the step keeps and scores later ones by itself; leave reference.kind at cached and "
            "reference.path empty"
        )


def _check_reference_of_adapters(stage: ConfigDict, loss: BoundLoss) -> None:
    """Raise ConfigError for a second reference beside the adapters' frozen base."""
    reference = stage.reference
    if reference.path and loss.requirements.live:
        raise ConfigError(
            f"config.preference.reference.path = {reference.path!r}: under adapters {loss.name} "
            "compares with their base only; leave it empty, or set config.preference.lora.rank to 0"
        )
    is_base = reference.kind == "live" and not reference.path
    if is_base and reference.dtype == "bfloat16" and stage.lora.base_dtype == "float32":
        raise ConfigError(
            "config.preference.reference.dtype = 'bfloat16': the live reference of adapters is "
            "their base itself, without a copy; set config.preference.lora.base_dtype to bfloat16, "
            "or leave it"
        )
