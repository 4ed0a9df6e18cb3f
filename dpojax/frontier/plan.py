"""The jobs of a frontier: every run of scripts/train.py and what goes before it, as commands.

The SFT policy, a classifier where that is the reward, preferences, a reward model, one run per
method and setting, and the reference's samples for best-of-n and the optimum. Each run has a
workdir of its own, which can be looked at, exported and resumed alone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.resolved import as_json
from dpojax.frontier import online
from dpojax.frontier.configs import CLASSIFIER, POLICY, PREFERENCES, REWARD_MODEL, RunConfigs
from dpojax.frontier.runs import ONLINE, Run
from dpojax.jobs.job import Job, command
from dpojax.runs.workdirs import FAILED, FINISHED, digest
from dpojax.sweeps.members import same_program

TOGETHER, JOBS = "together", "jobs"  # folders of the frontier's workdir
SAMPLES = "reference_samples.npz"


class Plan(NamedTuple):
    """Jobs in order, and the JSON files that their commands read, by path."""

    jobs: list[Job]
    files: dict[str, Any]


class Planner:
    """Makes the plan of a frontier.

    Args:
      config: of the frontier.
      folder: its workdir.
      parts: how many parts preferences are made in.
    """

    def __init__(self, config: ConfigDict, folder: storage.Path, parts: int = 1):
        self.configs = RunConfigs(config, folder)
        self.config, self.folder, self.parts = config, folder, parts
        self.files: dict[str, Any] = {}

    def plan(self, runs: Sequence[Run], *, together: bool = False) -> Plan:
        """The whole plan.

        Args:
          together: runs that differ in traced numbers alone are one job, see `sweeps.group`.
        """
        self.files = {}
        jobs = self._policy_jobs()
        rewarded = (jobs[-1].name,)
        preferences = self._preference_jobs(rewarded)
        preferred = tuple(job.name for job in preferences)
        jobs += [*preferences, self._reference_job(rewarded)]
        if any(run.method == "ppo" for run in runs):
            jobs += self._reward_jobs(preferred)
        needs = {"ppo": (REWARD_MODEL,), "ppo_gt": rewarded, "online_dpo": rewarded}
        groups = self._groups(runs) if together else [[run] for run in runs]
        for group in groups:
            needed = needs.get(group[0].method, preferred)
            if len(group) > 1:
                jobs.append(self._group_job(group, needed))
            elif group[0].stage == ONLINE:
                jobs += self._online_jobs(group[0], needed)
            else:
                jobs.append(self._run_job(group[0], needed))
        return Plan(jobs, self.files)

    def _policy_jobs(self) -> list[Job]:
        """The SFT policy; and the classifier that is the reward, where the config wants one."""
        jobs = [
            self._train_job("sft", self.configs.stage_config("sft"), self.folder / "sft"),
            self._export_job("policy", self.folder / "sft", self.folder / POLICY, needs=("sft",)),
        ]
        if self.config.frontier.reward == "classifier":
            workdir, config = self.folder / "classifier", self.configs.from_policy("classifier")
            jobs += [
                self._train_job("classifier", config, workdir, needs=("policy",)),
                self._export_job(
                    CLASSIFIER, workdir, self.folder / CLASSIFIER, needs=("classifier",)
                ),
            ]
        return jobs

    def _preference_jobs(self, needs: tuple[str, ...]) -> list[Job]:
        """Shares of the preferences' shards; what another number of parts has made stays."""
        settings, parts = self.configs.preference_settings(), self.parts
        if settings.limit:  # 0: however many a file has
            parts = min(parts, -(-settings.limit // settings.shard_size))
        file = self._file(PREFERENCES, dataclasses.asdict(settings))
        jobs = []
        for part in range(parts):
            done = self.folder / PREFERENCES / f"done-{part + 1}of{parts}"
            jobs.append(
                Job(
                    PREFERENCES + (f"-{part + 1}of{parts}" if parts > 1 else ""),
                    command(
                        "dpojax.runs.preferences",
                        settings=file,
                        process=f"{part}/{parts}",
                        done=done,
                    ),
                    needs=needs,
                    outputs=(str(done),),
                    kind=PREFERENCES,
                    is_part=True,
                )
            )
        return jobs

    def _reference_job(self, needs: tuple[str, ...]) -> Job:
        """Samples of the reference."""
        config = copy.deepcopy(self.config)
        config.samples.reward = self.configs.true_reward
        file = self._file("reference_samples", as_json(config))
        out = self.folder / SAMPLES
        return Job(
            "reference_samples",
            command(
                "dpojax.frontier.reference_samples",
                config=file,
                policy=self.folder / POLICY,
                out=out,
            ),
            needs=needs,
            outputs=(str(out),),
        )

    def _reward_jobs(self, needs: tuple[str, ...]) -> list[Job]:
        """The learned reward of PPO."""
        config, workdir = self.configs.from_policy("reward"), self.folder / "reward"
        config.tokens.append_eos = True  # where the reward is read
        config.reward.data.source = str(self.folder / PREFERENCES)
        return [
            self._train_job("reward", config, workdir, needs=needs),
            self._export_job(REWARD_MODEL, workdir, self.folder / REWARD_MODEL, needs=("reward",)),
        ]

    def _run_job(self, run: Run, needs: tuple[str, ...]) -> Job:
        workdir = self.configs.workdir_of(run)
        return self._train_job(
            run.name,
            self.configs.config_of(run),
            workdir,
            needs=needs,
            kind=run.method,
            failure_file=str(workdir / FAILED),
        )

    def _group_job(self, runs: Sequence[Run], needs: tuple[str, ...]) -> Job:
        """Runs that are trained together."""
        key = digest([run.name for run in runs])
        name, done = f"{runs[0].method}-{len(runs)}-runs-{key[:4]}", self.folder / TOGETHER / key
        done = done.with_suffix(".done")
        members = [
            {
                "config": as_json(self.configs.config_of(run)),
                "workdir": str(self.configs.workdir_of(run)),
            }
            for run in runs
        ]
        return Job(
            name,
            command(
                "dpojax.sweeps.group",
                members=self._file(name, members),
                folder=self.folder / TOGETHER,
                done=done,
            ),
            needs=needs,
            outputs=(str(done),),
            kind=runs[0].method,
        )

    def _online_jobs(self, run: Run, needs: tuple[str, ...]) -> list[Job]:
        """Preferences, training and export of each round.

        The rounds together draw as many completions as the preferences of the other runs have.
        """
        rounds, workdir, config = (
            self.config.frontier.online_rounds,
            self.configs.workdir_of(run),
            self.configs.config_of(run),
        )
        first = dataclasses.replace(
            self.configs.preference_settings(),
            limit=-(-self.config.frontier.count // rounds),
            seed=config.seed,
        )
        failure_file, jobs = str(workdir / FAILED), []
        for number in range(rounds):
            name, folder = f"{run.name}-round-{number}", online.round_folder(workdir, number)
            settings = online.settings_of_round(first, workdir, number)
            done = str(folder / online.PREFERENCES / "done")
            jobs += [
                Job(
                    f"{name}-{PREFERENCES}",
                    command(
                        "dpojax.runs.preferences",
                        settings=self._file(f"{name}-{PREFERENCES}", dataclasses.asdict(settings)),
                        done=done,
                    ),
                    needs=needs,
                    outputs=(done,),
                    failure_file=failure_file,
                    kind=f"{run.method}-{PREFERENCES}",
                ),
                self._train_job(
                    name,
                    online.config_of_round(config, workdir, number),
                    folder / online.TRAINED,
                    needs=(f"{name}-{PREFERENCES}",),
                    kind=run.method,
                    failure_file=failure_file,
                ),
                self._export_job(
                    f"{name}-policy",
                    folder / online.TRAINED,
                    folder / online.EXPORTED,
                    needs=(name,),
                )._replace(failure_file=failure_file),
            ]
            needs = (jobs[-1].name,)
        return jobs

    def _train_job(
        self,
        name: str,
        config: ConfigDict,
        workdir: storage.Path,
        *,
        needs: tuple[str, ...] = (),
        kind: str = "",
        failure_file: str = "",
    ) -> Job:
        return Job(
            name,
            command(
                "dpojax.runs.run",
                config=self._file(name, as_json(config)),
                workdir=workdir,
                failure_file=failure_file,
            ),
            needs=needs,
            outputs=(str(workdir / FINISHED),),
            kind=kind,
            failure_file=failure_file,
        )

    def _export_job(
        self, name: str, workdir: storage.Path, out: storage.Path, needs: tuple[str, ...]
    ) -> Job:
        return Job(
            name,
            command("dpojax.runs.export", workdir=workdir, out=out),
            needs=needs,
            outputs=(str(out),),
            kind="export",
        )

    def _groups(self, runs: Sequence[Run]) -> list[list[Run]]:
        """The runs, those of a method together that one program can train."""
        groups = []
        for method in dict.fromkeys(run.method for run in runs):
            of_method = [run for run in runs if run.method == method]
            if any(run.stage == ONLINE for run in of_method):
                groups += [[run] for run in of_method]
                continue
            resolved = [self.configs.resolve(run) for run in of_method]
            groups += [[of_method[i] for i in indices] for indices in same_program(resolved)]
        return groups

    def _file(self, name: str, content: Any) -> str:
        """The path of a JSON file that a command reads."""
        path = str(self.folder / JOBS / f"{name}.json")
        self.files[path] = content
        return path
