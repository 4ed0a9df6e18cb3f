"""Stages of policies: a model with a language-model head, all of it trained or adapters alone."""

from __future__ import annotations

import abc
from typing import Self

from dpojax import storage
from dpojax.config.resolved import ResolvedRun
from dpojax.models import lora_peft
from dpojax.stages.adapters import open_adapters
from dpojax.stages.programs import Programs, make_programs
from dpojax.stages.setup import Setup
from dpojax.stages.stage import require_language_model
from dpojax.stages.trained_stage import TrainedStage
from dpojax.training.forward import build_score, language_model
from dpojax.training.objective import Objective


class LanguageStage(TrainedStage):
    """A stage of examples that trains a policy."""

    @classmethod
    @abc.abstractmethod
    def objective_of(cls, run: ResolvedRun) -> Objective:
        """What the stage of this run minimises."""

    @classmethod
    def open(cls, setup: Setup) -> Self:
        require_language_model(setup, cls.name)
        return cls(setup, cls.build_programs(setup), open_adapters(setup, cls.name))

    @classmethod
    def build_programs(cls, setup: Setup) -> Programs:
        """The stage's programs for the setup's model, which has the stage's head."""
        objective = cls.objective_of(setup.run)
        forward = language_model(
            setup.model, statistics=objective.statistics, max_logits=setup.max_logits
        )
        score = build_score(setup.model, max_logits=setup.max_logits)
        return make_programs(objective, forward, score)

    def export(
        self, folder: storage.Path, *, step: int | None = None, adapters: bool = False
    ) -> None:
        if not adapters or self.adapters is None:
            super().export(folder, step=step, adapters=adapters)
            return
        is_first = self.name == self.setup.config.stages[0]
        lora_peft.save_peft(
            folder,
            self.adapters.trained(self.checkpoint_folder, step),
            self.adapters.config,
            self.setup.model.config,
            self.setup.imported_config,
            base=(self.setup.config.model.path or None) if is_first else None,
        )

    def trained_params(self, step: int | None = None) -> dict:
        if self.adapters is None:
            return super().trained_params(step)
        step = self.best_step if step is None else step
        return self.adapters.trained_params(self.checkpoint_folder, step)
