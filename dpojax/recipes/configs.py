"""The config of every training run of a recipe, from the recipe's own, and where things lie."""

from __future__ import annotations

import copy
from typing import NamedTuple

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import ResolvedRun
from dpojax.recipes import data
from dpojax.recipes.recipe import (
    BASE,
    JUDGE,
    REFERENCES,
    REJECTED,
    REWARD,
    SFT,
    TRAINED,
    Evaluation,
    Side,
    Training,
)
from dpojax.runs import judging
from dpojax.stages import token_cache
from dpojax.stages.registry import resolve

DATA, RUNS, MODELS, EVALUATIONS = "data", "runs", "models", "evaluations"  # folders
RESPONSES, VERDICTS = "responses", "verdicts"


class RecipeConfigs(NamedTuple):
    """What the commands of a recipe's jobs are given.

    Attributes:
      config: of the recipe.
      folder: its workdir.
    """

    config: ConfigDict
    folder: storage.Path

    def config_of(self, training: Training) -> ConfigDict:
        """What scripts/train.py would be given for a training run.

        Raises:
          ConfigError: a change of a key that there is not.
        """
        config = copy.deepcopy(self.config)
        config.stages = (training.stage,)
        config.token_cache = config.token_cache or str(self.folder / token_cache.FOLDER)
        config.trackers = ()
        if training.start:
            config.model.path, config.tokenizer = str(self.model(training.start)), ""
        self._set_data(config, training)
        try:
            config.update_from_flattened_dict(dict(training.changes))
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"recipe(): {training.name}: {error.args[0]}") from error
        return config

    def resolve(self, training: Training) -> ResolvedRun:
        """A training run, checked.

        Raises:
          ConfigError: it could not start.
        """
        return resolve(self.config_of(training), self.run(training.name))

    def file(self, name: str) -> str:
        """A file of the recipe's data."""
        return str(self.folder / DATA / f"{name}.jsonl")

    def run(self, name: str) -> storage.Path:
        """The workdir of a training run."""
        return self.folder / RUNS / name

    def model(self, name: str, share: float = 1.0) -> storage.Path:
        """Where a training run's result is exported, or its checkpoint at a share of its steps."""
        return self.folder / MODELS / (name if share == 1 else f"{name}-at-{share:.3g}")

    @property
    def judge(self) -> str:
        """The judge, as scripts/judge.py takes it."""
        name = self.config.recipe.judge
        return f"reward_model:{self.model(JUDGE)}" if name == TRAINED else name

    @property
    def learned_reward(self) -> str:
        """The reward of PPO and of best-of-n."""
        return f"reward_model:{self.model(REWARD)}"

    def policy(self, side: Side) -> str:
        """What responses are drawn from."""
        if not side.training:
            return self.config.model.path
        return str(self.model(side.training, side.share))

    def opponent(self, evaluation: Evaluation) -> judging.Side:
        """What the sides of an evaluation are compared with."""
        name = evaluation.against
        if name == REFERENCES:
            return judging.Side(REFERENCES)
        if name == REJECTED:
            return judging.Side(self.file(REJECTED), name="rejected responses")
        labels = [side.name for side in evaluation.sides if side.training == name]
        return judging.Side(str(self.model(name)), name=labels[0] if labels else name)

    def judging_settings(self, evaluation: Evaluation) -> judging.Settings:
        """What `runs.judging` is given for an evaluation."""
        recipe = self.config.recipe
        sides = tuple(
            judging.Side(
                policy=self.policy(side),
                name=side.name,
                prompt_field=side.prompt,
                best_of=tuple(side.best_of),
            )
            for side in evaluation.sides
        )
        needs_reward = any(max(side.best_of) > 1 for side in evaluation.sides)
        return judging.Settings(
            out=str(self.folder / EVALUATIONS / evaluation.name),
            prompts=self.file(evaluation.prompts),
            judge=self.judge,
            a=sides,
            b=self.opponent(evaluation),
            temperatures=tuple(evaluation.temperatures),
            best_of_reward=self.learned_reward if needs_reward else "",
            max_new_tokens=recipe.max_new_tokens,
            stop_text=recipe.stop_text,
            template=recipe.judge_template,
            seed=self.config.seed,
            hang_minutes=self.config.hang_minutes,
            responses=str(self.folder / RESPONSES),
            verdicts=str(self.folder / VERDICTS),
        )

    def _set_data(self, config: ConfigDict, training: Training) -> None:
        """Name the files that a training run reads."""
        if training.stage == "ppo":
            config.ppo.reward = self.learned_reward
            config.ppo.prompts = self.file(data.DEMONSTRATIONS)
            config.samples.prompts = self.file(data.TESTS)
            return
        stage = config[training.stage]
        stage.data.update(split="", eval_split="", columns="", form="auto")
        if training.name == BASE:
            recipe = config.recipe
            stage.data.update(source=recipe.texts, split=recipe.texts_split, form="text")
            return
        if training.stage == SFT:
            names = data.DEMONSTRATIONS, data.HELD_OUT + data.DEMONSTRATIONS
        elif training.name == JUDGE:
            names = data.JUDGE_COMPARISONS, data.HELD_OUT + data.COMPARISONS
        else:
            names = data.COMPARISONS, data.HELD_OUT + data.COMPARISONS
        stage.data.source, stage.data.eval_source = map(self.file, names)
