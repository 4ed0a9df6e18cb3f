"""The reward-KL frontier of Rafailov et al. 2023, figure 2 (left), from one config.

A plan is a list of jobs: the SFT policy, a classifier where that is the reward, preferences, a
reward model, one run per method and setting, and the reference's samples for best-of-n and the
optimum. Every run is one of scripts/train.py in a workdir of its own, so that each can be looked
at, exported and resumed alone; a job that is done is skipped when the same command is called again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dpojax.config.checks import ConfigError, changes, check, only_run
from dpojax.data.prompts import read_prompts
from dpojax.evaluation.policies import encode_prompts, response_texts
from dpojax.evaluation.rewards import open_reward
from dpojax.frontier import online
from dpojax.jobs import local_workers as workers
from dpojax.jobs.plan import Job, carry_out, do, stoppable, write_json
from dpojax.runs import run as runs
from dpojax.runs.export import export
from dpojax.runs.policy import load_policy
from dpojax.runs.preferences import Settings, prefer
from dpojax.runs.workdirs import FAILED, digest, say_failed
from dpojax.sampling import build_sampler, generate
from dpojax.stages import token_cache
from dpojax.stages.samples import SEED
from dpojax.stages.setup import compiled_once
from dpojax.sweeps.group import same_program, train_together
from dpojax.training.loop import NonFiniteLoss

POLICY, PREFERENCES, REWARD_MODEL = "policy", "preferences", "reward_model"
CLASSIFIER, TOGETHER = "classifier_model", "together"
SAMPLES, PLAN = "reference_samples.npz", "plan.json"


class Run(NamedTuple):
    """One run of a method: what it is called in the figure, and how it differs from the config."""

    method: str  # of `evaluation.frontier_points.NAMES`, or the name of a loss
    setting: str  # "beta=0.1"
    changes: Mapping[str, Any]  # config keys
    stage: str = "dpo"  # or ppo, or online: see `frontier.online`

    @property
    def name(self) -> str:
        return f"{self.method}-{self.setting}".replace("=", "-").replace("/", "_")


def paper_runs(
    *,
    beta: Sequence[float] = (0.05, 0.1, 1.0, 5.0),
    kl_target: Sequence[float] = (3.0, 6.0, 9.0, 12.0),
    alpha: Sequence[float] = (0.05, 0.1, 0.5, 1.0),
    seeds: Sequence[int] = range(6),
    common: Mapping[str, Any] | None = None,
) -> list[Run]:
    """The 22 runs of the paper's sweep (section 6.1): DPO over beta, PPO with the learned and with
    the true reward over the target KL, unlikelihood over alpha, preferred-FT over seeds.

    `common` are config keys of all of them.
    """
    every = dict(common or {})
    found = [Run("dpo", f"beta={b:g}", every | {"preference.beta": b}) for b in beta]
    for method in ("ppo", "ppo_gt"):
        found += [Run(method, f"kl={k:g}", every | {"ppo.kl_target": k}, "ppo") for k in kl_target]
    for a in alpha:
        own = {"preference.loss": "unlikelihood", "preference.alpha": a}
        found.append(Run("unlikelihood", f"alpha={a:g}", every | own))
    for seed in seeds:
        own = {"preference.loss": "sft", "seed": seed}
        found.append(Run("preferred_ft", f"seed={seed}", every | own))
    return found


def online_runs(
    *, beta: Sequence[float] = (0.1,), common: Mapping[str, Any] | None = None
) -> list[Run]:
    """Online DPO over beta, in `config.frontier.online_rounds` rounds; `common`: see above."""
    every = dict(common or {})
    of = lambda b: Run("online_dpo", f"beta={b:g}", every | {"preference.beta": b}, online.STAGE)
    return [of(b) for b in beta]


def of_loss(loss: str, common: Mapping[str, Any] | None = None, *, online_beta: float = 0.1) -> Run:
    """A run of any loss of the library, with its default options; or of "online_dpo"."""
    if loss == "online_dpo":
        return online_runs(beta=(online_beta,), common=common)[0]
    return Run(loss, "default", dict(common or {}) | {"preference.loss": loss})


def read_runs(path: str, config: ConfigDict) -> list[Run]:
    """What the function `frontier(config)` of a config file returns.

    Raises:
      ConfigError: the file has none.
    """
    spec = importlib.util.spec_from_file_location("frontier_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "frontier"):
        raise ConfigError(f"{path}: has no function frontier(config) that returns the runs")
    return module.frontier(config)


def make(
    config: ConfigDict,
    planned: Sequence[Run],
    workdir: str,
    *,
    at_once: int = 1,
    together: bool = False,
) -> pathlib.Path:
    """Do every job that is not done; returns the workdir, ready for `frontier.results`.

    A run whose loss is not finite ends there; the others go on.

    Args:
      at_once: jobs that are done at a time, each in a process of its own; 1 stays in this one.
      together: runs that differ in traced numbers alone are one job, see `sweeps.group`.

    Raises:
      ConfigError: a run that could not start, before anything is made; or the workdir holds the
        plan of another config.
      what `run` and `prefer` raise, and `Preempted`: the same command goes on.
    """
    folder = pathlib.Path(workdir).resolve()
    for planned_run in planned:
        check(_config_of(config, planned_run, folder))
    if config.frontier.reward == "classifier":
        check(_stage(config, folder, "classifier"))
    _check_samples(config)
    if at_once > 1 and not workers.on_cpu():
        raise ConfigError(f"{at_once} runs at once: only on a CPU, and in one process; take 1")
    folder.mkdir(parents=True, exist_ok=True)
    with only_run(folder):
        _record(config, planned, folder)
        todo = jobs(config, planned, folder, at_once, together)
        if at_once > 1:
            run = functools.partial(_do, config, planned, folder, at_once, together)
            workers.carry_out(todo, folder, "frontier", run=run, workers=at_once)
        else:
            with _compiled(config, folder):
                carry_out(todo, folder, "frontier")
    return folder


def _compiled(config: ConfigDict, folder: pathlib.Path) -> AbstractContextManager:
    """Runs that differ in traced numbers alone share their compiled programs."""
    return compiled_once(config.compilation_cache or folder / "compiled")


def _check_samples(config: ConfigDict) -> None:
    asked = config.frontier
    if (least := 4 * max(asked.best_of_n, default=0)) > asked.reference_samples:
        raise ConfigError(
            f"config.frontier.reference_samples = {asked.reference_samples}: best of "
            f"{max(asked.best_of_n)} is estimated from at least {least} of each prompt; raise it, "
            "or lower config.frontier.best_of_n"
        )


def _do(
    config: ConfigDict,
    planned: Sequence[Run],
    folder: pathlib.Path,
    at_once: int,
    together: bool,
    name: str,
) -> None:
    """The job of that name, in a process of its own."""
    logging.set_verbosity(logging.WARNING)
    (job,) = [job for job in jobs(config, planned, folder, at_once, together) if job.name == name]
    with _compiled(config, folder), stoppable("frontier"):
        do(job, folder)


def jobs(
    config: ConfigDict,
    planned: Sequence[Run],
    folder: pathlib.Path,
    at_once: int = 1,
    together: bool = False,
) -> list[Job]:
    """The whole plan, in order; preferences are made in as many parts as jobs are done at once."""
    sft, policy = folder / "sft", folder / POLICY
    reward_run, reward_model = folder / "reward", folder / REWARD_MODEL
    found = [
        Job("sft", sft / runs.FINISHED, lambda: _run(_stage(config, folder, "sft"), sft)),
        Job("policy", policy, lambda: export(str(sft), str(policy)), needs=("sft",)),
    ]
    rewarded = ("policy",)
    if config.frontier.reward == "classifier":
        found += _classifier_jobs(config, folder)
        rewarded = ("classifier_model",)
    parts = _preference_jobs(config, folder, at_once, rewarded)
    preferred = tuple(job.name for job in parts)
    found += parts
    samples = lambda: _sample(config, folder)
    found.append(Job("reference_samples", folder / SAMPLES, samples, needs=rewarded))
    if any(run.method == "ppo" for run in planned):
        of_reward = _from_policy(_stage(config, folder, "reward"), folder)
        of_reward.tokens.append_eos = True  # where the reward is read
        of_reward.reward.data.source = str(folder / PREFERENCES)
        found += [
            Job(
                "reward",
                reward_run / runs.FINISHED,
                lambda: _run(of_reward, reward_run),
                needs=preferred,
            ),
            Job(
                "reward_model",
                reward_model,
                lambda: export(str(reward_run), str(reward_model)),
                needs=("reward",),
            ),
        ]
    needs = {"ppo": ("reward_model",), "ppo_gt": rewarded, "online_dpo": rewarded}
    for runs_ in _groups(config, planned, folder) if together else [[run] for run in planned]:
        wanted = needs.get(runs_[0].method, preferred)
        found.append(_run_job(config, runs_, folder, wanted))
    return found


def _groups(config: ConfigDict, planned: Sequence[Run], folder: pathlib.Path) -> list[list[Run]]:
    """The runs, those of a method together that one program can train."""
    found = []
    for method in dict.fromkeys(run.method for run in planned):
        own = [run for run in planned if run.method == method]
        if any(run.stage == online.STAGE for run in own):
            found += [[run] for run in own]
        else:
            made = same_program([_config_of(config, run, folder) for run in own])
            found += [[own[i] for i in group] for group in made]
    return found


def _run_job(
    config: ConfigDict, own: Sequence[Run], folder: pathlib.Path, needs: tuple[str, ...]
) -> Job:
    """Of one run, or of several that are trained together."""
    run, workdirs = own[0], [folder / "runs" / run.name for run in own]
    if len(own) == 1:
        made = workdirs[0] / runs.FINISHED
        train = lambda: _run(_config_of(config, run, folder), workdirs[0])
        if run.stage == online.STAGE:
            made = online.folders(workdirs[0], config.frontier.online_rounds)[-1] / online.EXPORTED
            train = lambda: _online(config, run, folder)
        start, failed = lambda: _or_leave(train, workdirs[0]), workdirs[0] / FAILED
        return Job(run.name, made, start, run.method, needs, failed=failed)
    key = digest([one.name for one in own])
    name, done = f"{run.method}-{len(own)}-runs-{key[:4]}", folder / TOGETHER / f"{key}.done"

    def start():
        every = [_config_of(config, one, folder) for one in own]
        train_together(every, workdirs, folder / TOGETHER)
        done.parent.mkdir(exist_ok=True)
        done.touch()

    return Job(name, done, start, run.method, needs)


def configs(config: ConfigDict, planned: Sequence[Run], folder: pathlib.Path) -> list[ConfigDict]:
    """What scripts/train.py would be given for each run."""
    return [_config_of(config, run, folder) for run in planned]


def _classifier_jobs(config: ConfigDict, folder: pathlib.Path) -> list[Job]:
    """The true reward, from labelled texts."""
    workdir, exported = folder / "classifier", folder / CLASSIFIER
    own = _from_policy(_stage(config, folder, "classifier"), folder)
    train = lambda: _run(own, workdir)
    give = lambda: export(str(workdir), str(exported))
    return [
        Job("classifier", workdir / runs.FINISHED, train, needs=("policy",)),
        Job("classifier_model", exported, give, needs=("classifier",)),
    ]


def _preference_jobs(
    config: ConfigDict, folder: pathlib.Path, parts: int, needs: tuple[str, ...]
) -> list[Job]:
    """Shares of the preferences' shards; what another number of parts has made is kept."""
    if config.frontier.count:  # 0: however many a file has
        parts = min(parts, -(-config.frontier.count // Settings.shard_size))
    found = []
    for part in range(parts):
        name = PREFERENCES + (f"-{part + 1}of{parts}" if parts > 1 else "")
        made = folder / PREFERENCES / f"done-{part + 1}of{parts}"

        def make(part=part, made=made):
            prefer(_settings(config, folder), process=(part, parts), log=print)
            made.touch()

        found.append(Job(name, made, make, PREFERENCES, needs, part=True))
    return found


def _true_reward(config: ConfigDict, folder: pathlib.Path) -> str:
    reward = config.frontier.reward
    return f"classifier:{folder / CLASSIFIER}" if reward == "classifier" else reward


def _config_of(config: ConfigDict, run: Run, folder: pathlib.Path) -> ConfigDict:
    """What scripts/train.py would be given for this run."""
    stage = "dpo" if run.stage == online.STAGE else run.stage
    own = _from_policy(_stage(config, folder, stage), folder)
    own.samples.reward = _true_reward(config, folder)
    if run.stage == "ppo":
        learned = f"reward_model:{folder / REWARD_MODEL}"
        own.ppo.reward = learned if run.method == "ppo" else own.samples.reward
        own.ppo.update(prompts=config.frontier.prompts, limit=config.frontier.count)
    else:
        own.dpo.data.source = str(folder / PREFERENCES)
        own.dpo.reference.cache = str(folder / "reference_logprobs")
    own.update_from_flattened_dict(dict(run.changes))
    return own


def _stage(config: ConfigDict, folder: pathlib.Path, *stages: str) -> ConfigDict:
    own = copy.deepcopy(config)
    own.stages = stages
    own.token_cache = own.token_cache or str(folder / token_cache.FOLDER)
    own.tensorboard = False
    return own


def _from_policy(config: ConfigDict, folder: pathlib.Path) -> ConfigDict:
    config.model.path = str(folder / POLICY)
    config.tokenizer = ""
    return config


def _run(config: ConfigDict, workdir: pathlib.Path) -> None:
    runs.run(config, str(workdir))


def _or_leave(train: Callable[[], None], workdir: pathlib.Path) -> None:
    """A run whose loss becomes NaN or infinite leaves the others as they are, and says why."""
    try:
        train()
    except NonFiniteLoss as error:
        print(error)
        say_failed(workdir, str(error))


def _settings(config: ConfigDict, folder: pathlib.Path) -> Settings:
    asked, samples = config.frontier, config.samples
    return Settings(
        policy=str(folder / POLICY),
        prompts=asked.prompts,
        reward=_true_reward(config, folder),
        out=str(folder / PREFERENCES),
        limit=asked.count,
        completions=asked.completions,
        pairs=asked.pairs,
        labels=asked.labels,
        temperature=samples.temperature,
        max_new_tokens=samples.max_new_tokens,
        truncated=asked.truncated,
        fixed_length=asked.truncated == "keep",
        seed=config.seed,
    )


def _online(config: ConfigDict, run: Run, folder: pathlib.Path) -> None:
    """The rounds together draw as many completions as the preferences of the other runs have."""
    rounds, own = config.frontier.online_rounds, _config_of(config, run, folder)
    first = dataclasses.replace(
        _settings(config, folder), limit=-(-config.frontier.count // rounds), seed=own.seed
    )
    online.make(own, first, folder / "runs" / run.name, rounds)


def _sample(config: ConfigDict, folder: pathlib.Path) -> None:
    """Rewards and lengths of many samples of the reference to each held-out prompt: [P, m]."""
    asked = config.samples
    policy = load_policy(str(folder / POLICY))
    reward = open_reward(_true_reward(config, folder), mesh=policy.mesh)
    how = {"split": "eval", "limit": asked.count, "seed": SEED}
    prompts = read_prompts(asked.prompts, tokenizer=policy.tokenizer, **how)
    sampler = build_sampler(policy.model, max_new_tokens=asked.max_new_tokens, stop=policy.stop)
    count, chunk = config.frontier.reference_samples, 32
    ids = [p for p in encode_prompts(policy.tokenizer, prompts) for _ in range(-(-count // chunk))]
    with jax.set_mesh(policy.mesh):
        drawn = generate(
            sampler, policy.params, ids, batch_size=32, seed=SEED + 1, samples=chunk,
            temperature=asked.temperature,
        )  # fmt: skip
    texts, lengths, own = [], [], []
    for number, (prompt, samples) in enumerate(zip(ids, drawn)):
        texts += response_texts(policy.tokenizer, prompt, samples)
        lengths += [len(sample.tokens) - sample.stopped for sample in samples]
        own += [prompts[number * len(prompts) // len(ids)]] * len(samples)
    rewards = np.asarray(reward(own, texts)).reshape(len(prompts), -1)
    unfinished = folder / f".{SAMPLES}"
    with open(unfinished, "wb") as file:
        np.savez(file, rewards=rewards, lengths=np.reshape(lengths, rewards.shape))
    os.replace(unfinished, folder / SAMPLES)


def _record(config: ConfigDict, planned: Sequence[Run], folder: pathlib.Path) -> None:
    """Write plan.json, or compare with the one there.

    Raises:
      ConfigError: it is of another config; it names the keys.
    """
    plan = {"config": json.loads(config.to_json())}
    named = lambda run: {"name": run.name, "changes": dict(run.changes)}
    plan["runs"] = [run._asdict() | named(run) for run in planned]
    plan = json.loads(json.dumps(plan))
    path = folder / PLAN
    if not path.exists():
        write_json(path, plan)
        return
    then = json.loads(path.read_text())
    if changed := changes(then["config"], plan["config"]):
        raise ConfigError(
            f"{folder} holds a frontier of another config; give this one its own --workdir, or "
            "take back these changes:\n" + "\n".join(changed)
        )
    now = {run["name"]: run for run in plan["runs"]}
    if missing := ", ".join(run["name"] for run in then["runs"] if run["name"] not in now):
        raise ConfigError(f"{folder} holds runs that this plan has not: {missing}")
    for run in then["runs"]:
        if changed := changes(run["changes"], now[run["name"]]["changes"]):
            lines = "\n".join(changed)
            raise ConfigError(f"{folder} holds {run['name']} with other settings:\n{lines}")
    write_json(path, plan)  # runs may be added
