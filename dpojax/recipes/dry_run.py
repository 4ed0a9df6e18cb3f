"""What a recipe would do: its programs from shapes alone, and its jobs with their commands."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.resolved import workdir_path
from dpojax.plans.dry_run import sampler_program, stage_program
from dpojax.recipes.configs import RecipeConfigs
from dpojax.recipes.make import check
from dpojax.recipes.plan import plan_recipe
from dpojax.recipes.recipe import Recipe, Training
from dpojax.stages.stage import RowSize


def dry_run(config: ConfigDict, recipe: Recipe, workdir: str | storage.Path) -> Iterator[str]:
    """A line for each program, once it is lowered, and for each job. Nothing is read or written.

    Weights and data need not be there; the config.json of a model does.

    Raises:
      ConfigError: a run that could not start. OSError, ValueError: a config.json is missing.
    """
    folder = workdir_path(workdir)
    check(config, recipe, folder, workers=1)
    configs, programs = RecipeConfigs(config, folder), set()
    yield "Programs:"
    for training in recipe.trainings:
        run = configs.config_of(training)
        program = training.stage, run[training.stage].get("loss")
        if program not in programs:
            programs.add(program)
            yield stage_program(_from_the_base(config, run), training.stage, _row(config))
    prompt = _row(config).prompt
    yield sampler_program(config, prompt=prompt, new_tokens=config.recipe.max_new_tokens, samples=1)
    jobs = plan_recipe(config, recipe, folder).jobs
    yield f"\nJobs ({len(jobs)}), in this order:"
    steps = {training.name: _steps(configs, training) for training in recipe.trainings}
    for job in jobs:
        yield f"{job.name}{steps.get(job.name, '')}: {shlex.join(job.command)}"


def _row(config: ConfigDict) -> RowSize:
    """The longest prompt and response together have `tokens.max_length`."""
    new = min(config.recipe.max_new_tokens, config.tokens.max_length // 2)
    prompt = config.tokens.max_prompt_length or config.tokens.max_length - new
    return RowSize(prompt, new, 2)


def _from_the_base(config: ConfigDict, run: ConfigDict) -> ConfigDict:
    """The run's config with the model of the recipe's own config in the place of an export."""
    run.tokenizer, run.model.path = config.tokenizer, config.model.path
    return run


def _steps(configs: RecipeConfigs, training: Training) -> str:
    """How long a training run is, in words."""
    stage = configs.config_of(training)[training.stage]
    batch = f"batches of {stage.batch_size}"
    if training.stage == "ppo":
        return f" ({stage.steps} iterations, {batch})"
    length = f"{stage.steps} steps" if stage.steps else f"{stage.epochs} epoch(s)"
    return f" ({length}, {batch})"
