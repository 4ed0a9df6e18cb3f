"""Online DPO: sample, label, train, and again with the policy that came of it.

Round i draws completions for prompts of its own with the policy of round i - 1 (round 0: the SFT
policy), the reward ranks them, and a run of the preference stage trains from that policy. The
reference stays the SFT policy, so that beta means in every round what it means in DPO. Guo et al.
2024, arXiv:2402.04792, draw anew in every step.
"""

from __future__ import annotations

import copy
import dataclasses

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.frontier.configs import RunConfigs
from dpojax.frontier.runs import Run
from dpojax.jobs.job import Job
from dpojax.plans.job_maker import JobMaker
from dpojax.runs.preferences import Settings
from dpojax.runs.workdirs import FAILED

PREFERENCES, TRAINED, EXPORTED = "preferences", "run", "policy"  # in a round's folder


def round_folder(workdir: storage.Path, number: int) -> storage.Path:
    """Where round `number` (from 0) keeps everything."""
    return workdir / f"round-{number}"


def trained_runs(workdir: storage.Path, rounds: int) -> list[storage.Path]:
    """The workdirs of the rounds' training runs, in order."""
    return [round_folder(workdir, number) / TRAINED for number in range(rounds)]


def policy_before(workdir: storage.Path, number: int, sft_policy: str) -> str:
    """The policy that round `number` draws from and trains."""
    return str(round_folder(workdir, number - 1) / EXPORTED) if number else sft_policy


def settings_of_round(first: Settings, workdir: storage.Path, number: int) -> Settings:
    """The settings of a round: those of `first`, but the policy, folder and prompts are its own."""
    return dataclasses.replace(
        first,
        policy=policy_before(workdir, number, first.policy),
        out=str(round_folder(workdir, number) / PREFERENCES),
        skip=first.skip + number * first.limit,
    )


def config_of_round(config: ConfigDict, workdir: storage.Path, number: int) -> ConfigDict:
    """The config of a round's training run.

    Args:
      config: of a run of the preference stage; `config.model.path` is the SFT policy.
    """
    round_config, folder = copy.deepcopy(config), round_folder(workdir, number)
    round_config.preference.reference.path = config.model.path
    round_config.model.path = policy_before(workdir, number, config.model.path)
    round_config.preference.data.source = str(folder / PREFERENCES)
    round_config.preference.reference.cache = str(folder / "reference_logprobs")
    return round_config


def online_jobs(
    configs: RunConfigs, maker: JobMaker, run: Run, needs: tuple[str, ...]
) -> list[Job]:
    """Preferences, training and export of each round, one after the other.

    The rounds together draw as many completions as the preferences of the other runs have. A round
    that fails ends the run.
    """
    frontier, config, workdir = (
        configs.config.frontier,
        configs.config_of(run),
        configs.workdir_of(run),
    )
    rounds, failure_file = frontier.online_rounds, str(workdir / FAILED)
    first = dataclasses.replace(
        configs.preference_settings(), limit=-(-frontier.count // rounds), seed=config.seed
    )
    jobs: list[Job] = []
    for number in range(rounds):
        name, folder = f"{run.name}-round-{number}", round_folder(workdir, number)
        jobs += [
            maker.preferences(
                f"{name}-{PREFERENCES}",
                settings_of_round(first, workdir, number),
                needs=needs,
                kind=f"{run.method}-{PREFERENCES}",
                failure_file=failure_file,
            ),
            maker.train(
                name,
                config_of_round(config, workdir, number),
                folder / TRAINED,
                needs=(f"{name}-{PREFERENCES}",),
                kind=run.method,
                failure_file=failure_file,
            ),
            maker.export(
                f"{name}-{EXPORTED}",
                folder / TRAINED,
                folder / EXPORTED,
                needs=(name,),
                failure_file=failure_file,
            ),
        ]
        needs = (jobs[-1].name,)
    return jobs
