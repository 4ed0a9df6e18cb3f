"""Carries out a recipe: every job of its plan that is not done, in order.

plan.json in the workdir holds the config, the recipe and the jobs. Each job can be run by hand with
the command that stands there.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.contents import Content, NamedPath, contents_of, judge_hash, shared_paths
from dpojax.config.errors import ConfigError, config_errors
from dpojax.config.resolved import as_json, workdir_path
from dpojax.data import sources
from dpojax.evaluation.judging.open_judge import folder_of
from dpojax.jobs.job import plan_as_json
from dpojax.plans.folder import (
    PLAN,
    Plan,
    carry_out,
    check_workers,
    read_plan_file,
    require_same_plan,
    write_plan,
)
from dpojax.recipes.configs import RecipeConfigs
from dpojax.recipes.plan import plan_recipe
from dpojax.recipes.recipe import TRAINED, Recipe, check_recipe
from dpojax.runs.judging import check_judge
from dpojax.runs.workdirs import require_writable, workdir_lock

WHAT = "recipe"
FIELDS = {"config": dict, "contents": dict, "recipe": dict, "jobs": list}
SOURCES = ("comparisons", "demonstrations", "texts", "tests", "shifted")


def make_recipe(
    config: ConfigDict, recipe: Recipe, workdir: str | storage.Path, *, workers: int = 1
) -> storage.Path:
    """Do every job that is not done; return the workdir, where the last job wrote report.md.

    Args:
      workers: jobs that are done at a time, each in a process of its own; 1 stays in this one.

    Raises:
      ConfigError: a run that could not start, before anything is made; or the workdir holds the
        plan of another config.
      what the jobs raise, and `Preempted`: the same call goes on.
    """
    folder = workdir_path(workdir)
    check(config, recipe, folder, workers)
    _check_judge(config, recipe, folder)
    require_writable(folder)
    with workdir_lock(folder):
        plan = plan_recipe(config, recipe, folder)
        write_or_compare_plan(config, recipe, plan, folder)
        cache = config.compilation_cache
        carry_out(plan.jobs, folder, WHAT, workers=workers, compilation_cache=cache)
    return folder


def check(config: ConfigDict, recipe: Recipe, folder: storage.Path, workers: int) -> None:
    """Raise ConfigError for a run that could not start."""
    check_recipe(recipe, "recipe")
    if not config.recipe.comparisons:
        raise ConfigError(
            "config.recipe.comparisons is empty: name a file, folder or data set of comparisons; "
            "the text at the top of the config file says which"
        )
    configs = RecipeConfigs(config, folder)
    with config_errors("recipe.judge"):
        folder_of(configs.judge)
    for training in recipe.trainings:
        configs.resolve(training)
    for evaluation in recipe.evaluations:
        configs.judging_settings(evaluation)
    check_workers(workers, WHAT, distributed=config.distributed)


def _check_judge(config: ConfigDict, recipe: Recipe, folder: storage.Path) -> None:
    """Raise ConfigError for a judge that could not be asked, hours before it is."""
    if config.recipe.judge != TRAINED and recipe.evaluations:
        with config_errors("recipe.judge"):
            check_judge(RecipeConfigs(config, folder).judging_settings(recipe.evaluations[0]))


def write_or_compare_plan(
    config: ConfigDict, recipe: Recipe, plan: Plan, folder: storage.Path
) -> None:
    """Write plan.json and the files that its jobs read, or compare it with the one there first.

    Raises:
      ConfigError: plan.json is of another config or recipe, or a file that it reads has changed.
    """
    path = folder / PLAN
    content = {
        "config": as_json(config),
        "contents": _contents(config),
        "recipe": _as_json(recipe),
        "jobs": plan_as_json(plan.jobs),
    }
    if path.exists():
        before = read_plan_file(path, WHAT, FIELDS)
        require_same_plan(folder, WHAT, before, content)
        if before["recipe"] != content["recipe"]:
            raise ConfigError(
                f"{folder} holds a recipe with other runs or evaluations (recipe() of the config "
                "file has changed); give this one its own --workdir"
            )
    write_plan(folder, plan, content)


def _contents(config: ConfigDict) -> dict[str, Content]:
    """The files that the recipe's first jobs read."""
    recipe = config.recipe
    paths = shared_paths(config) if not config.tokenizer.startswith("train:") else []
    paths += [
        NamedPath(f"recipe.{name}", recipe[name], _hash_of(recipe[f"{name}_split"]))
        for name in SOURCES
    ]
    paths.append(NamedPath("recipe.judge", recipe.judge, _judge_hash))
    return contents_of(paths)


def _judge_hash(judge: str) -> str:
    """A hash of the judge, where it is there before the recipe begins."""
    return judge if judge == TRAINED else judge_hash(judge)


def _hash_of(split: str):
    """path -> a hash of the sources there."""
    return lambda path: sources.fingerprint(sources.listed(path, split=split))


def _as_json(recipe: Recipe) -> dict[str, Any]:
    return {
        "title": recipe.title,
        "trainings": [t._asdict() | {"changes": dict(t.changes)} for t in recipe.trainings],
        "evaluations": [
            e._asdict()
            | {
                "sides": [s._asdict() | {"best_of": [*s.best_of]} for s in e.sides],
                "temperatures": [*e.temperatures],
            }
            for e in recipe.evaluations
        ],
    }
