"""Online DPO: sample, label, train, and again with the policy that came of it.

Round i draws completions for prompts of its own with the policy of round i - 1 (round 0: the SFT
policy), has the reward rank them, and trains a run of the stage `dpo` from that policy. Its
reference stays the SFT policy, so that beta means in every round what it means in DPO (Guo et al.
2024, arXiv:2402.04792, who draw anew in every step).
"""

from __future__ import annotations

import copy
import dataclasses
import pathlib

from ml_collections import ConfigDict

from dpojax.runs import run as runs
from dpojax.runs.export import export
from dpojax.runs.preferences import Settings, prefer

STAGE = "online"  # of a `frontier.Run`
PREFERENCES, TRAINED, EXPORTED = "preferences", "run", "policy"  # in a round's folder


def folders(workdir: pathlib.Path, rounds: int) -> list[pathlib.Path]:
    """Of all rounds, in order."""
    return [workdir / f"round-{i}" for i in range(rounds)]


def runs_of(workdir: pathlib.Path, rounds: int) -> list[pathlib.Path]:
    """The workdirs of the rounds' runs of scripts/train.py, in order."""
    return [folder / TRAINED for folder in folders(workdir, rounds)]


def settings_of(first: Settings, round: int, policy: pathlib.Path, out: pathlib.Path) -> Settings:
    """What a round draws: as `first`, with another policy and the prompts behind those before."""
    skip = first.skip + round * first.limit
    return dataclasses.replace(first, policy=str(policy), out=str(out), skip=skip)


def config_of(config: ConfigDict, workdir: pathlib.Path, round: int) -> ConfigDict:
    """What scripts/train.py would be given for a round; `config.model.path` is the SFT policy."""
    own = copy.deepcopy(config)
    own.dpo.reference.path = config.model.path
    folder = folders(workdir, round + 1)[round]
    if round:
        own.model.path = str(folders(workdir, round)[-1] / EXPORTED)
    own.dpo.data.source = str(folder / PREFERENCES)
    own.dpo.reference.cache = str(folder / "reference_logprobs")
    return own


def make(config: ConfigDict, first: Settings, workdir: pathlib.Path, rounds: int) -> None:
    """Do all rounds; what is done of them is not done again.

    Args:
      config: of a run of the stage `dpo` that starts from the SFT policy, which is its reference.
      first: what round 0 draws.

    Raises:
      what `prefer`, `run` and `export` raise, and `Preempted`: the same call goes on.
    """
    policy = pathlib.Path(first.policy)
    for round, folder in enumerate(folders(workdir, rounds)):
        if not (folder / EXPORTED).exists():
            own = config_of(config, workdir, round)
            if not (folder / TRAINED / runs.FINISHED).exists():
                prefer(settings_of(first, round, policy, folder / PREFERENCES), log=print)
            runs.run(own, str(folder / TRAINED))
            export(str(folder / TRAINED), str(folder / EXPORTED))
        policy = folder / EXPORTED
