"""Reward models: preferences and rankings fitted by a scalar head."""

from __future__ import annotations

from typing import Any, Self

from ml_collections import ConfigDict

from dpojax.config.errors import ConfigError
from dpojax.config.resolved import ResolvedRun
from dpojax.config.rules import apply_rules, at_least, one_of
from dpojax.intervals import wilson_interval
from dpojax.methods import reward
from dpojax.stages.data import DataRequirements
from dpojax.stages.example_stage import Programs, make_programs, scores_of
from dpojax.stages.setup import Setup, with_scalar_model
from dpojax.stages.stage import REWARD_MODEL, Stage, Summarise, Summary
from dpojax.stages.trained_stage import TrainedStage
from dpojax.training import checkpoints
from dpojax.training.forward import reward_model

RULES = (
    one_of("loss", reward.LOSSES),
    at_least("margin_scale", 0),
    at_least("centring", 0),
)


class Reward(TrainedStage):
    """Trains the model it starts from, with a scalar head, to score responses."""

    name = "reward"
    makes = REWARD_MODEL

    @classmethod
    def resolve(cls, config: ConfigDict) -> None:
        super().resolve(config)
        apply_rules(RULES, config.reward, "reward.")
        if config.reward.margin_scale and config.reward.loss != "bradley_terry":
            raise ConfigError("config.reward.margin_scale: only bradley_terry has margins")

    @classmethod
    def traced_options(cls, run: ResolvedRun) -> tuple[str, ...]:
        return ("centring",)

    @classmethod
    def open(cls, setup: Setup) -> Self:
        setup = with_scalar_model(setup)
        return cls(setup, cls.build_programs(setup))

    @classmethod
    def build_programs(cls, setup: Setup) -> Programs:
        forward = reward_model(setup.model)
        objective = reward.objective(setup.config.reward.loss)
        return make_programs(objective, forward, scores_of(forward))

    @property
    def requirements(self) -> DataRequirements:
        config = self.config
        return DataRequirements(
            scores=config.margin_scale > 0, ties=config.loss == "plackett_luce_scores"
        )

    def options(self) -> dict[str, Any]:
        return {key: self.config[key] for key in ("margin_scale", "centring")}

    def open_summary(self) -> Summarise:
        return summarise

    def score_centre(self, step: int | None) -> float | None:
        """The mean score of the held-out responses; None at a checkpoint that was not evaluated."""
        step = self.best_step if step is None else step
        metadata = checkpoints.metadata_of(self.checkpoint_folder, step)
        return metadata.get("evaluation", {}).get(reward.MEAN)


def summarise(stage: Stage, params: dict) -> Summary:
    """How often a reward model ranks held-out pairs rightly; saved for a person.

    Where the evaluation of the best accuracy is kept (`keep_best`), that accuracy is a little too
    high for new data.
    """
    values, pairs = stage.evaluate(params), stage.batches.data.count_held_out_pairs()
    step = stage.best_step or stage.steps
    low, high = wilson_interval(round(values["rewards/accuracies"] * pairs), pairs)
    accuracy = f"{100 * values['rewards/accuracies']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    spread = (values["rewards/squares"] - values["rewards/mean"] ** 2) ** 0.5
    lines = [
        f"reward model, {stage.config.loss}: {pairs} held-out pairs (95 % interval)",
        f"kept                     step {step} of {stage.steps}",
        f"ranks the pair rightly   {accuracy}",
        f"mean gap of a pair       {values['rewards/margins']:+.3f}",
        f"scores, mean and spread  {values['rewards/mean']:+.3f} ± {spread:.3f} (an export "
        "subtracts the mean)",
        f"loss (nats)              {values['loss']:.4f}",
    ]
    summary = {"pairs": pairs, "step": step, "values": {"after": values}}
    stage.save_summary(summary, "\n".join(lines))
    return summary
