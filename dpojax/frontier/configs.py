"""The config of every run of a frontier, from the frontier's own."""

from __future__ import annotations

import copy
from typing import NamedTuple

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.resolved import ResolvedRun
from dpojax.frontier.runs import ONLINE, PPO, PREFERENCE, Run
from dpojax.runs.preferences import Settings
from dpojax.stages import token_cache
from dpojax.stages.registry import resolve

# Names of jobs, and of the folders in the frontier's workdir that they make.
POLICY, PREFERENCES, REWARD_MODEL = "policy", "preferences", "reward_model"
CLASSIFIER = "classifier_model"


class RunConfigs(NamedTuple):
    """What scripts/train.py and scripts/prefer.py would be given for each run.

    Attributes:
      config: of the frontier.
      folder: its workdir.
    """

    config: ConfigDict
    folder: storage.Path

    def config_of(self, run: Run) -> ConfigDict:
        """What scripts/train.py would be given for a run."""
        config = self.from_policy(PREFERENCE if run.stage == ONLINE else run.stage)
        config.samples.reward = self.true_reward
        if run.stage == PPO:
            learned = f"reward_model:{self.folder / REWARD_MODEL}"
            config.ppo.reward = learned if run.method == "ppo" else self.true_reward
            config.ppo.update(
                prompts=self.config.frontier.prompts, limit=self.config.frontier.count
            )
        else:
            config.preference.data.source = str(self.folder / PREFERENCES)
            config.preference.reference.cache = str(self.folder / "reference_logprobs")
        config.update_from_flattened_dict(dict(run.changes))
        return config

    def resolve(self, run: Run) -> ResolvedRun:
        """A run, checked.

        Raises:
          ConfigError: it could not start.
        """
        return resolve(self.config_of(run), self.workdir_of(run))

    def workdir_of(self, run: Run) -> storage.Path:
        return self.folder / "runs" / run.name

    @property
    def true_reward(self) -> str:
        """The reward by which all policies are scored."""
        reward = self.config.frontier.reward
        return f"classifier:{self.folder / CLASSIFIER}" if reward == "classifier" else reward

    def preference_settings(self) -> Settings:
        """What the preferences of the SFT policy's completions are made of."""
        frontier, samples = self.config.frontier, self.config.samples
        return Settings(
            policy=str(self.folder / POLICY),
            prompts=frontier.prompts,
            reward=self.true_reward,
            out=str(self.folder / PREFERENCES),
            limit=frontier.count,
            completions=frontier.completions,
            pairs=frontier.pairs,
            labels=frontier.labels,
            temperature=samples.temperature,
            max_new_tokens=samples.max_new_tokens,
            truncated=frontier.truncated,
            fixed_length=frontier.truncated == "keep",
            seed=self.config.seed,
            hang_minutes=self.config.hang_minutes,
        )

    def stage_config(self, stage: str) -> ConfigDict:
        """The config of a run of one stage, which shares tokens with the others."""
        config = copy.deepcopy(self.config)
        config.stages = (stage,)
        config.token_cache = config.token_cache or str(self.folder / token_cache.FOLDER)
        config.trackers = ()
        return config

    def from_policy(self, stage: str) -> ConfigDict:
        """`stage_config` of a run that starts from the SFT policy."""
        config = self.stage_config(stage)
        config.model.path = str(self.folder / POLICY)
        config.tokenizer = ""
        return config
