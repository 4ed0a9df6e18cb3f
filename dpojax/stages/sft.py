"""SFT: maximum likelihood of the best responses."""

from __future__ import annotations

from dpojax.config.resolved import ResolvedRun
from dpojax.methods import sft
from dpojax.stages import train
from dpojax.stages.data import DataRequirements
from dpojax.stages.stage import Lowered, RowSize
from dpojax.stages.trained_stage import LanguageStage
from dpojax.training.objective import Objective


class SFT(LanguageStage):
    """Trains a policy on the best response of each record, or on plain texts."""

    name = "sft"

    @classmethod
    def objective_of(cls, run: ResolvedRun) -> Objective:
        return sft.objective()

    @property
    def requirements(self) -> DataRequirements:
        return DataRequirements("best")

    def lower(self, row: RowSize) -> Lowered:
        return train.lower(self, self.setup.config.tokens.max_length, 1)

    @property
    def score_prompt(self) -> bool:
        return self.config.score_prompt
