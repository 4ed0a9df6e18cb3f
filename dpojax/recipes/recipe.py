"""What a recipe is: training runs, and the policies that are judged. Config files return one.

def recipe(config):
    sides = [*prompted_sides(config), Side("SFT", SFT), *dpo_sides(config)]
    evaluation = Evaluation("tests", "Posts", sides, config.recipe.temperatures)
    return Recipe("DPO against SFT", usual_trainings(config), [evaluation])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dpojax.config.errors import ConfigError
from dpojax.config.files import failing_at_its_line, load_config_file, split_variant

# Names of training runs that mean something to the plan.
BASE, SFT, REWARD, JUDGE, PPO = "base", "sft", "reward", "judge", "ppo"
TRAINED = "trained"  # value of recipe.judge
TESTS, SHIFTED = "tests", "shifted"  # the prompts of an evaluation
REFERENCES, REJECTED = "references", "rejected"  # what policies are compared with
TEXTS = (REFERENCES, REJECTED)
ZERO_SHOT, FEW_SHOT = "zero_shot", "few_shot"  # fields of the prompts' records


class Training(NamedTuple):
    """One training run.

    Attributes:
      name: of the run; unique in a recipe.
      stage: that it trains.
      changes: config keys, with values that differ from the config.
      start: the run whose policy it starts from; "" is the config's model.
    """

    name: str
    stage: str
    changes: Mapping[str, Any] = {}
    start: str = SFT


class Side(NamedTuple):
    """A policy that is judged.

    Attributes:
      name: in tables and figures.
      training: the run that trained it; "" is the config's model as it is.
      prompt: the field of the prompts' records that it reads; "" is the prompt.
      best_of: of so many responses the one with the highest learned reward is judged, for each n.
      share: of the training run's steps, at which the checkpoint is taken; 1 is its result.
    """

    name: str
    training: str
    prompt: str = ""
    best_of: tuple[int, ...] = (1,)
    share: float = 1.0


class Evaluation(NamedTuple):
    """Policies judged on the same prompts against one opponent.

    Attributes:
      name: of its folder; unique in a recipe.
      title: in the report.
      sides: the policies.
      temperatures: of sampling.
      prompts: TESTS or SHIFTED.
      against: REFERENCES; REJECTED, the worse response of each comparison; or a training run, which
        is drawn from at the same temperature.
    """

    name: str
    title: str
    sides: Sequence[Side]
    temperatures: tuple[float, ...]
    prompts: str = TESTS
    against: str = REFERENCES


class Recipe(NamedTuple):
    """Training runs in order, and what is judged.

    Attributes:
      title: of the report.
      shows: a paragraph for the report: what the result means, and what not.
      curves: training runs whose loss and KL by epoch are drawn.
    """

    title: str
    trainings: Sequence[Training]
    evaluations: Sequence[Evaluation]
    shows: str = ""
    curves: Sequence[str] = ()


def usual_trainings(config: ConfigDict, *, ppo: bool = False) -> list[Training]:
    """SFT, DPO for each beta, and what these and the evaluations need.

    A new model where config.recipe.texts names texts; a reward model where PPO or best-of-n wants
    one; another one where it is the judge.
    """
    recipe = config.recipe
    trainings = [Training(BASE, SFT, start="")] if recipe.texts else []
    trainings.append(Training(SFT, SFT, start=BASE if recipe.texts else ""))
    trainings += [
        Training(dpo_name(beta), "preference", {"preference.beta": beta}) for beta in recipe.betas
    ]
    if ppo or recipe.best_of > 1:
        trainings.append(Training(REWARD, REWARD))
    if ppo:
        trainings.append(Training(PPO, PPO))
    if recipe.judge == TRAINED:
        trainings.append(Training(JUDGE, REWARD))
    return trainings


def dpo_name(beta: float) -> str:
    """The name of a DPO run."""
    return f"dpo-beta-{beta:g}"


def dpo_sides(config: ConfigDict) -> list[Side]:
    """DPO for each beta."""
    betas = config.recipe.betas
    label = "DPO" if len(betas) == 1 else "DPO, β = {:g}"
    return [Side(label.format(beta), dpo_name(beta)) for beta in betas]


def prompted_sides(config: ConfigDict) -> list[Side]:
    """The model before SFT, asked without and with examples."""
    base = BASE if config.recipe.texts else ""
    sides = [Side("Zero-shot", base, ZERO_SHOT)]
    return sides + ([Side("Few-shot", base, FEW_SHOT)] if config.recipe.shots else [])


def checkpoint_sides(config: ConfigDict, sides: Sequence[Side]) -> list[Side]:
    """Each side at `config.recipe.checkpoints` points of its training, the last one its end."""
    count = config.recipe.checkpoints
    return [
        side._replace(name=f"{side.name} at {index}/{count}", share=index / count, best_of=(1,))
        for side in sides
        for index in range(1, count + 1)
    ]


def read_recipe(path: str, config: ConfigDict) -> Recipe:
    """What the function `recipe(config)` of a config file returns.

    Raises:
      ConfigError: the file has no such function, or its runs and sides do not fit together.
    """
    module = load_config_file(path)
    if not hasattr(module, "recipe"):
        raise ConfigError(f"{path}: has no function recipe(config) that returns a Recipe")
    with failing_at_its_line(split_variant(path)[0]):
        recipe = module.recipe(config)
    check_recipe(recipe, path)
    return recipe


def check_recipe(recipe: Recipe, where: str) -> None:
    """Raise ConfigError where a name is there twice, or names nothing."""
    trained = [training.name for training in recipe.trainings]
    for names in (trained, [evaluation.name for evaluation in recipe.evaluations]):
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{where}: recipe(): {name!r} is there {names.count(name)} times")
    sides = [side for evaluation in recipe.evaluations for side in evaluation.sides]
    starts = [(training.name, training.start) for training in recipe.trainings]
    uses = [*starts, *((side.name, side.training) for side in sides)]
    uses += [("curves", name) for name in recipe.curves]
    uses += [(x.name, x.against) for x in recipe.evaluations if x.against not in TEXTS]
    for user, name in uses:
        if name and name not in trained:
            raise ConfigError(f"{where}: recipe(): {user} needs a training run {name!r}")
    if REWARD not in trained and any(max(side.best_of) > 1 for side in sides):
        raise ConfigError(f"{where}: recipe(): best-of-n needs a training run {REWARD!r}")
