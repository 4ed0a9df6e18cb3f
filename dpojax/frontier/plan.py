"""The jobs of a frontier: every run of scripts/train.py and what goes before it, as commands.

The SFT policy, a classifier where that is the reward, preferences, a reward model, one run per
method and setting, and the reference's samples for best-of-n and the optimum. Each run has a
workdir of its own, which can be looked at, exported and resumed alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.resolved import as_json
from dpojax.frontier.configs import CLASSIFIER, POLICY, PREFERENCES, REWARD_MODEL, RunConfigs
from dpojax.frontier.online import online_jobs
from dpojax.frontier.runs import ONLINE, Run
from dpojax.jobs.job import Job, command
from dpojax.plans.folder import Plan
from dpojax.plans.job_maker import JobMaker
from dpojax.runs.workdirs import FAILED, FINISHED, short_hash
from dpojax.sweeps.members import same_program

VECTORISED = "vectorised"  # checkpoints of runs that train together, while they do
SAMPLES = "reference_samples.npz"


def plan_frontier(
    config: ConfigDict,
    runs: Sequence[Run],
    folder: storage.Path,
    *,
    parts: int = 1,
    vectorise: bool = False,
) -> Plan:
    """The whole plan of a frontier.

    Args:
      folder: its workdir.
      parts: how many parts preferences are made in.
      vectorise: runs that differ in traced numbers alone are one job, see `sweeps.group`.
    """
    configs, maker = RunConfigs(config, folder), JobMaker(folder)
    jobs = _policy_jobs(configs, maker)
    rewarded = (jobs[-1].name,)
    preferences = _preference_jobs(configs, maker, parts, rewarded)
    preferred = tuple(job.name for job in preferences)
    jobs += [*preferences, _reference_job(configs, maker, rewarded)]
    if any(run.method == "ppo" for run in runs):
        jobs += _reward_jobs(configs, maker, preferred)
    needs = {"ppo": (REWARD_MODEL,), "ppo_gt": rewarded, "online_dpo": rewarded}
    for group in _groups(configs, runs) if vectorise else [[run] for run in runs]:
        needed = needs.get(group[0].method, preferred)
        if len(group) > 1:
            jobs.append(_group_job(configs, maker, group, needed))
        elif group[0].stage == ONLINE:
            jobs += online_jobs(configs, maker, group[0], needed)
        else:
            jobs.append(_run_job(configs, maker, group[0], needed))
    return Plan(jobs, maker.files)


def _policy_jobs(configs: RunConfigs, maker: JobMaker) -> list[Job]:
    """The SFT policy; and the classifier that is the reward, where the config wants one."""
    folder = configs.folder
    jobs = [
        maker.train("sft", configs.stage_config("sft"), folder / "sft"),
        maker.export(POLICY, folder / "sft", folder / POLICY, needs=("sft",)),
    ]
    if configs.config.frontier.reward == "classifier":
        workdir, config = folder / "classifier", configs.from_policy("classifier")
        jobs += [
            maker.train("classifier", config, workdir, needs=(POLICY,)),
            maker.export(CLASSIFIER, workdir, folder / CLASSIFIER, needs=("classifier",)),
        ]
    return jobs


def _preference_jobs(
    configs: RunConfigs, maker: JobMaker, parts: int, needs: tuple[str, ...]
) -> list[Job]:
    """Shares of the preferences' shards; what another number of parts has made stays."""
    settings = configs.preference_settings()
    if settings.limit:  # 0: however many a file has
        parts = min(parts, -(-settings.limit // settings.shard_size))
    return [
        maker.preferences(PREFERENCES, settings, needs=needs, kind=PREFERENCES, part=(index, parts))
        for index in range(parts)
    ]


def _reference_job(configs: RunConfigs, maker: JobMaker, needs: tuple[str, ...]) -> Job:
    """Samples of the reference."""
    config = copy.deepcopy(configs.config)
    config.samples.reward = configs.true_reward
    out = configs.folder / SAMPLES
    return Job(
        "reference_samples",
        command(
            "dpojax.frontier.reference_samples",
            config=maker.file("reference_samples", as_json(config)),
            policy=configs.folder / POLICY,
            out=out,
        ),
        needs=needs,
        outputs=(str(out),),
    )


def _reward_jobs(configs: RunConfigs, maker: JobMaker, needs: tuple[str, ...]) -> list[Job]:
    """The learned reward of PPO."""
    config, workdir = configs.from_policy("reward"), configs.folder / "reward"
    config.tokens.append_eos = True  # where the reward is read
    config.reward.data.source = str(configs.folder / PREFERENCES)
    return [
        maker.train("reward", config, workdir, needs=needs),
        maker.export(REWARD_MODEL, workdir, configs.folder / REWARD_MODEL, needs=("reward",)),
    ]


def _run_job(configs: RunConfigs, maker: JobMaker, run: Run, needs: tuple[str, ...]) -> Job:
    workdir = configs.workdir_of(run)
    return maker.train(
        run.name,
        configs.config_of(run),
        workdir,
        needs=needs,
        kind=run.method,
        failure_file=str(workdir / FAILED),
    )


def _group_job(
    configs: RunConfigs, maker: JobMaker, runs: Sequence[Run], needs: tuple[str, ...]
) -> Job:
    """Runs that are trained together. Those that fail say so in their own workdirs."""
    key = short_hash([run.name for run in runs])
    name = f"{runs[0].method}-{len(runs)}-runs-{key[:4]}"
    workdirs = [configs.workdir_of(run) for run in runs]
    members = [
        {"config": as_json(configs.config_of(run)), "workdir": str(workdir)}
        for run, workdir in zip(runs, workdirs)
    ]
    return Job(
        name,
        command(
            "dpojax.sweeps.group",
            members=maker.file(name, members),
            folder=configs.folder / VECTORISED,
        ),
        needs=needs,
        outputs=tuple(str(workdir / FINISHED) for workdir in workdirs),
        failure_files=tuple(str(workdir / FAILED) for workdir in workdirs),
        kind=runs[0].method,
    )


def _groups(configs: RunConfigs, runs: Sequence[Run]) -> list[list[Run]]:
    """The runs, those of a method together that one program can train."""
    groups = []
    for method in dict.fromkeys(run.method for run in runs):
        of_method = [run for run in runs if run.method == method]
        if any(run.stage == ONLINE for run in of_method):
            groups += [[run] for run in of_method]
            continue
        resolved = [configs.resolve(run) for run in of_method]
        groups += [[of_method[i] for i in indices] for indices in same_program(resolved)]
    return groups
