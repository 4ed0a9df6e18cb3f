"""The jobs of a recipe: data, training runs and their exports, judging, and the report."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.resolved import as_json
from dpojax.jobs.job import Job, command
from dpojax.plans.folder import Plan
from dpojax.plans.job_maker import JobMaker
from dpojax.recipes.configs import DATA, EVALUATIONS, RecipeConfigs
from dpojax.recipes.data import COUNTS
from dpojax.recipes.recipe import (
    JUDGE,
    PPO,
    REWARD,
    TEXTS,
    TRAINED,
    Evaluation,
    Recipe,
    Side,
    Training,
)

SETTINGS = "report"  # of the last job
CHECKPOINT = "checkpoint.json"  # beside an exported checkpoint: which step it is
REPORT = "report.md"  # of the recipe, and of each evaluation; written last


def plan_recipe(config: ConfigDict, recipe: Recipe, folder: storage.Path) -> Plan:
    """The whole plan of a recipe.

    Args:
      folder: its workdir.
    """
    configs, maker = RecipeConfigs(config, folder), JobMaker(folder)
    jobs = [_data_job(configs, maker)]
    for training in recipe.trainings:
        jobs += _training_jobs(configs, maker, training)
    jobs += _checkpoint_jobs(configs, recipe)
    jobs += [_judging_job(configs, maker, evaluation) for evaluation in recipe.evaluations]
    jobs.append(_report_job(configs, maker, recipe))
    return Plan(jobs, maker.files)


def _data_job(configs: RecipeConfigs, maker: JobMaker) -> Job:
    out = configs.folder / DATA
    return Job(
        DATA,
        command("dpojax.recipes.data", config=maker.file(DATA, as_json(configs.config)), out=out),
        outputs=(str(out / COUNTS),),
    )


def _training_jobs(configs: RecipeConfigs, maker: JobMaker, training: Training) -> list[Job]:
    """A training run, and the export of what came of it."""
    needs = [DATA]
    needs += [_exported(training.start)] if training.start else []
    needs += [_exported(REWARD)] if training.name == PPO else []
    run = maker.train(
        training.name,
        configs.config_of(training),
        configs.run(training.name),
        needs=tuple(needs),
        kind=training.stage,
    )
    export = maker.export(
        _exported(training.name),
        configs.run(training.name),
        configs.model(training.name),
        needs=(training.name,),
    )
    return [run, export]


def _checkpoint_jobs(configs: RecipeConfigs, recipe: Recipe) -> list[Job]:
    """Exports of checkpoints before the last."""
    sides = [side for evaluation in recipe.evaluations for side in evaluation.sides]
    jobs = {}
    for side in sides:
        if side.share < 1:
            out = configs.model(side.training, side.share)
            jobs[out] = Job(
                _name_of(side),
                command(
                    "dpojax.recipes.checkpoint",
                    workdir=configs.run(side.training),
                    share=f"{side.share:.3g}",
                    out=out,
                ),
                needs=(side.training,),
                outputs=(str(out / CHECKPOINT),),
                kind="export",
            )
    return [*jobs.values()]


def _judging_job(configs: RecipeConfigs, maker: JobMaker, evaluation: Evaluation) -> Job:
    settings = configs.judging_settings(evaluation)
    needs = [_name_of(side) for side in evaluation.sides if side.training]
    needs += [] if evaluation.against in TEXTS else [_exported(evaluation.against)]
    needs += [_exported(JUDGE)] if configs.config.recipe.judge == TRAINED else []
    needs += [_exported(REWARD)] if settings.best_of_reward else []
    name = f"judge-{evaluation.name}"
    return Job(
        name,
        command("dpojax.runs.judging", settings=maker.file(name, dataclasses.asdict(settings))),
        needs=(DATA, *dict.fromkeys(needs)),
        outputs=(str(storage.as_path(settings.out) / REPORT),),
    )


def _report_job(configs: RecipeConfigs, maker: JobMaker, recipe: Recipe) -> Job:
    settings = {
        "folder": str(configs.folder),
        "title": recipe.title,
        "shows": recipe.shows,
        "judge": configs.judge,
        "evaluations": [
            {
                "name": evaluation.name,
                "title": evaluation.title,
                "folder": str(configs.folder / EVALUATIONS / evaluation.name),
                "checkpoints": [_checkpoint(configs, side) for side in evaluation.sides]
                if any(side.share < 1 for side in evaluation.sides)
                else [],
            }
            for evaluation in recipe.evaluations
        ],
        "curves": [
            _training(configs, t) | {"label": _label(recipe, t)}
            for t in recipe.trainings
            if t.name in recipe.curves
        ],
        "trainings": [_training(configs, t) for t in recipe.trainings],
    }
    needs = [f"judge-{evaluation.name}" for evaluation in recipe.evaluations]
    return Job(
        "report",
        command("dpojax.recipes.report", settings=maker.file(SETTINGS, settings)),
        needs=(*needs, *(training.name for training in recipe.trainings)),
        outputs=(str(configs.folder / REPORT),),
    )


def _training(configs: RecipeConfigs, training: Training) -> dict:
    """Where a training run is."""
    workdir = str(configs.run(training.name))
    return {"name": training.name, "stage": training.stage, "workdir": workdir}


def _label(recipe: Recipe, training: Training) -> str:
    """A training run's name in figures: that of the side which is its result."""
    sides = [side for evaluation in recipe.evaluations for side in evaluation.sides]
    names = [side.name for side in sides if side.training == training.name and side.share == 1]
    return names[0] if names else training.name


def _checkpoint(configs: RecipeConfigs, side: Side) -> dict:
    """A side of an evaluation over training steps: the figure's curve and its place there."""
    return {
        "side": side.name,
        "curve": side.name.rpartition(" at ")[0],
        "workdir": str(configs.run(side.training)),
        "model": str(configs.model(side.training, side.share)),
    }


def _exported(name: str) -> str:
    """The job that exports what came of a training run."""
    return f"{name}-model"


def _name_of(side: Side) -> str:
    """The job that exports what a side draws from."""
    if side.share == 1:
        return _exported(side.training)
    return f"{side.training}-model-at-{side.share:.3g}"
