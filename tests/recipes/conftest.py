"""Small data in the forms of the published sets, and a recipe that is small enough for a test."""

import json

import pytest

from dpojax.data import reviews
from dpojax.recipes.recipe import Evaluation, Recipe, Side, checkpoint_sides, usual_trainings

from ..runs.conftest import few_devices, tiny_config  # noqa: F401 (a fixture)

SMALL = {
    "sft.steps": 6,
    "preference.steps": 4,
    "reward.steps": 4,
    "reward.epochs": 1,
    "reward.batch_size": 8,
    "ppo.steps": 2,
    "ppo.batch_size": 8,
    "ppo.max_new_tokens": 12,
    "ppo.minibatches": 1,
    "ppo.limit": 16,
    "samples.count": 4,
    "samples.per_prompt": 2,
    "samples.max_new_tokens": 12,
    "sft.data.limit": 0,
    "preference.data.limit": 0,
    "reward.data.limit": 0,
    "reward.data.eval_limit": 10,
    "max_checkpoints": 9,
    "recipe.betas": (0.5,),
    "recipe.best_of": 4,
    "recipe.test_share": 0.2,
    "recipe.judge": "exact",
    "recipe.temperatures": (0.5, 1.0),
    "recipe.max_new_tokens": 12,
    "recipe.test_prompts": 8,
    "recipe.checkpoints": 2,
}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def comparisons(tmp_path_factory):
    """150 pairs of the embedded task in a file."""
    rows = reviews.preferences("train", 150, 3)
    fields = ("prompt", "chosen", "rejected")
    rows = [{name: row[name] for name in fields} for row in rows]
    return write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def small_config(comparisons, **changes):
    return tiny_config(**SMALL | {"recipe.comparisons": comparisons} | changes)


def small_recipe(config):
    sides = [Side("SFT", "sft", best_of=(1, 4)), Side("DPO", "dpo-beta-0.5"), Side("PPO", "ppo")]
    evaluations = [
        Evaluation("tests", "Tests", sides, config.recipe.temperatures),
        Evaluation("steps", "Steps", checkpoint_sides(config, sides[1:2]), (1.0,), against="sft"),
    ]
    trainings = usual_trainings(config, ppo=True)
    return Recipe("Small", trainings, evaluations, "It shows that it runs.", ["dpo-beta-0.5"])
