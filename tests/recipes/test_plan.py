"""The plans of the three recipes: their jobs, what these need, and that each can be run by hand."""

import importlib
import json
import pathlib

import pytest

from dpojax import storage
from dpojax.config.errors import ConfigError
from dpojax.config.files import read_config
from dpojax.recipes.checkpoint import nearest_step
from dpojax.recipes.make import check, make_recipe
from dpojax.recipes.plan import plan_recipe
from dpojax.recipes.recipe import Evaluation, Recipe, Side, Training, check_recipe, read_recipe

from .conftest import small_config, small_recipe

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = ("tldr", "hh", "instructions")
PATHS = [f"{ROOT}/configs/{name}.py{end}" for name in NAMES for end in ("", ":small", ":paper")]
# What the paper has: a name of a side's policy and how it is asked, at which temperatures.
POLICIES = {
    "tldr": {"zero_shot", "few_shot", "sft", "dpo-beta-0.5", "ppo", "best of 128"},
    "hh": {"zero_shot", "few_shot", "sft", "dpo-beta-0.1", "best of 128"},
    "instructions": {"sft", *(f"dpo-beta-{beta}" for beta in ("0.1", "0.3", "0.7", "1"))},
}


def shipped(path):
    config = read_config(path)
    with config.unlocked():
        config.recipe.comparisons = config.recipe.comparisons or "pairs.json"
    return config, read_recipe(path, config)


@pytest.mark.parametrize("path", PATHS)
def test_a_shipped_recipe_has_the_papers_policies_and_could_start(path):
    config, recipe = shipped(path)
    check(config, recipe, storage.as_path("folder"), workers=1)
    sides = recipe.evaluations[0].sides
    policies = {side.prompt or side.training for side in sides}
    policies |= {f"best of {n}" for side in sides for n in side.best_of if n > 1}
    name = pathlib.Path(path.partition(":")[0]).stem
    assert policies == POLICIES[name]
    by_name = {evaluation.name: evaluation for evaluation in recipe.evaluations}
    if name == "tldr":
        assert by_name["tldr"].temperatures == (0.0, 0.25, 0.5, 0.75, 1.0)
        assert by_name["news"].temperatures == (0.0, 0.25)
        assert config.preference.beta == 0.5
    if name == "hh":
        assert [side.share for side in by_name["steps"].sides] == [0.25, 0.5, 0.75, 1.0] * 2
    if name == "instructions":
        assert [*recipe.curves] == [t.name for t in recipe.trainings if t.stage == "preference"]


@pytest.mark.parametrize("path", PATHS)
def test_every_job_needs_jobs_before_it_and_reads_files_that_the_plan_writes_or_they_make(path):
    plan = plan_recipe(*shipped(path), storage.as_path("/folder"))
    names = [job.name for job in plan.jobs]
    assert len(set(names)) == len(names)
    outputs = [output for job in plan.jobs for output in job.outputs]
    assert len(set(outputs)) == len(outputs)
    assert (names[0], names[-1]) == ("data", "report")
    made = set()
    for job in plan.jobs:
        assert set(job.needs) <= made, job.name
        made.add(job.name)
        python, flag, module, *arguments = job.command
        assert (python, flag) == ("python", "-m")
        assert callable(importlib.import_module(module).main)
        flags = dict(argument.split("=", 1) for argument in arguments)
        for name in ("--config", "--settings"):
            assert name not in flags or flags[name] in plan.files
        json.dumps(plan.files)


@pytest.mark.parametrize("path", PATHS)
def test_what_a_job_reads_is_made_by_jobs_that_it_needs(path):
    """Wherever the folder of a run, a model or the data stands in a job's file."""
    folder = "/folder"
    plan = plan_recipe(*shipped(path), storage.as_path(folder))
    maker = {str(pathlib.Path(output).parent): job for job in plan.jobs for output in job.outputs}
    by_name = {job.name: job for job in plan.jobs}

    def needed(job):
        return {job.name}.union(*(needed(by_name[name]) for name in job.needs))

    def texts(value):
        if isinstance(value, dict | list | tuple):
            for one in value.values() if isinstance(value, dict) else value:
                yield from texts(one)
        elif isinstance(value, str):
            yield value

    for job in plan.jobs:
        read = [plan.files[word.split("=")[1]] for word in job.command if word.endswith(".json")]
        for text in texts([*read, [word for word in job.command if "--workdir" in word]]):
            at = text.find(f"{folder}/")
            place = text[at:] if at >= 0 else ""
            for made, other in maker.items():
                if place == made or place.startswith(f"{made}/"):
                    assert other.name in needed(job) or made == folder, (job.name, text)


def test_a_judge_or_a_recipe_that_cannot_be_is_refused_before_anything_is_made(
    tmp_path, comparisons
):
    config = small_config(comparisons, **{"recipe.judge": "oracle"})
    with pytest.raises(ConfigError, match=r"recipe\.judge.*'oracle': is not one of"):
        make_recipe(config, small_recipe(config), tmp_path / "none")
    config = small_config(comparisons, **{"recipe.judge": "local:nowhere"})
    with pytest.raises(ConfigError, match=r"config\.recipe\.judge: judge 'local:nowhere': "):
        make_recipe(config, small_recipe(config), tmp_path / "none")
    poem = {"recipe.judge": "openai:m@http://localhost/v1", "recipe.judge_template": "poem"}
    config = small_config(comparisons, **poem)
    with pytest.raises(ConfigError, match=r"config\.recipe\.judge: template 'poem': is not one"):
        make_recipe(config, small_recipe(config), tmp_path / "none")
    config = small_config("")
    with pytest.raises(ConfigError, match=r"config\.recipe\.comparisons is empty"):
        make_recipe(config, small_recipe(config), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("share", "step"), [(0.25, 312), (0.5, 1248), (0.75, 1872), (1, 2513)])
def test_the_checkpoint_nearest_to_a_share_of_the_run_is_taken(share, step):
    assert nearest_step([312, 1248, 1872, 2513], share) == step


SFT = Training("sft", "sft", start="")


@pytest.mark.parametrize(
    ("trainings", "side", "against", "message"),
    [
        ([SFT, SFT], Side("A", "sft"), "references", "'sft' is there 2 times"),
        ([SFT], Side("A", "dpo"), "references", "A needs a training run 'dpo'"),
        ([SFT], Side("A", "sft", best_of=(8,)), "references", "best-of-n needs .* 'reward'"),
        ([SFT], Side("A", "sft"), "gpt", "test needs a training run 'gpt'"),
        ([Training("dpo", "preference")], Side("A", "dpo"), "references", "needs .* 'sft'"),
    ],
)
def test_a_recipe_that_names_what_is_not_there_is_refused(trainings, side, against, message):
    evaluation = Evaluation("test", "Test", [side], (1.0,), against=against)
    with pytest.raises(ConfigError, match=message):
        check_recipe(Recipe("title", trainings, [evaluation]), "file.py")


def test_a_change_of_a_key_that_there_is_not_names_the_run(comparisons):
    config = small_config(comparisons)
    recipe = Recipe("title", [SFT._replace(changes={"sft.stepps": 3})], [])
    with pytest.raises(ConfigError, match=r"recipe\(\): sft: .*stepps"):
        check(config, recipe, storage.as_path("folder"), workers=1)
