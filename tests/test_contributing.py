"""What CONTRIBUTING.md says about adding something is enough: each addition here follows it."""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.config.command_line import UsageError
from dpojax.config.defaults import default_config
from dpojax.data import records, reviews
from dpojax.data.records import Record
from dpojax.evaluation import rewards
from dpojax.evaluation.judging import open_judge as open_judges
from dpojax.evaluation.judging.asking import judge_comparisons
from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.open_judge import JudgeKind
from dpojax.evaluation.judging.verdicts import Choice, Comparison, Outcome, Reply
from dpojax.evaluation.rewards import Reward, RewardKind, open_reward
from dpojax.jobs.job import Job, pending
from dpojax.launching import engines, launch
from dpojax.methods import sft
from dpojax.methods.preference import options
from dpojax.runs import run as runs
from dpojax.stages import registry
from dpojax.stages.data import DataRequirements
from dpojax.stages.trained_stage import LanguageStage
from dpojax.training.metrics import read_metrics

from .jobs.small_jobs import job as small_job

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = {
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.mlp_width": 16,
    "model.max_positions": 128,
    "tokens.max_length": 96,
    "preference.data.limit": 24,
    "preference.data.eval_limit": 6,
    "preference.batch_size": 8,
    "preference.steps": 2,
    "max_buckets": 1,
    "log_every": 1,
    "trackers": (),
}


def tiny(**changes):
    config = default_config()
    config.update_from_flattened_dict(TINY | changes)
    return config


def test_every_file_that_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = {
        word.strip("`,:;.()")
        for word in text.split()
        if "/" in word and word.strip("`,:;.()").endswith((".py", ".md"))
    }
    there = [name for name in named if "<" not in name and "**" not in name]
    assert len(there) > 8
    for name in there:
        assert (ROOT / name).exists() or (ROOT / "dpojax" / name).exists(), name


def test_the_table_of_packages_is_the_order_that_the_layout_test_checks():
    from .test_layout import ORDER

    table = (ROOT / "CONTRIBUTING.md").read_text().split("| 1 |")[1].split("\n\n")[0]
    lines = ("| 1 |" + table).splitlines()
    packages = [
        {word.strip("`/") for word in line.split("|")[2].split() if word.startswith("`")}
        for line in lines
        if line.startswith("| ") and line.split("|")[1].strip().isdigit()
    ]
    assert packages == ORDER


# A loss.


def squared_margin(policy, reference, *, beta):
    """(r_chosen - r_rejected - 1)^2 with implicit rewards; 1 at the reference."""
    ratio = jax.tree.map(jnp.subtract, policy, reference)
    return (beta * (ratio.chosen - ratio.rejected) - 1.0) ** 2


@pytest.mark.long
def test_a_loss_trains_by_its_name(tmp_path, monkeypatch):
    entry = options.Loss(squared_margin, margin_only=True)
    monkeypatch.setitem(options.LOSS_TABLE, "squared_margin", entry)
    changes = {"stages": ("preference",), "preference.loss": "squared_margin"}
    runs.run(tiny(**changes), str(tmp_path / "run"))
    identity, first = read_metrics(tmp_path / "run" / "preference")[:2]
    assert identity["loss/at_reference"] == 1.0  # its closed form, found from the function
    assert first["loss"] == pytest.approx(1.0, abs=1e-5)


def test_a_loss_with_an_argument_from_nowhere_says_where_to_add_it(monkeypatch):
    def strange(policy, *, moonlight):
        return policy.chosen * moonlight

    monkeypatch.setitem(options.LOSS_TABLE, "strange", options.Loss(strange))
    with pytest.raises(TypeError, match=r"'moonlight' .*FORMS.*arguments\.py.*OPTIONS"):
        options.resolve("strange", {})


# A stage.


class Imitation(LanguageStage):
    """Imitates the chosen responses: SFT on preference data, as a stage of its own."""

    name = "imitation"

    @classmethod
    def objective_of(cls, run):
        return sft.objective()

    @property
    def requirements(self):
        return DataRequirements("best")


@pytest.mark.long
def test_a_stage_runs_beside_the_others(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.STAGES, "imitation", Imitation)
    config = tiny(**{"sft.data.limit": 24, "sft.data.eval_limit": 6, "sft.batch_size": 8})
    with config.unlocked():
        config.imitation = config.sft.copy_and_resolve_references()
    config.stages, config.imitation.steps, config.preference.steps = (
        ("imitation", "preference"),
        2,
        1,
    )
    config.imitation.learning_rate = 1e-2
    runs.run(config, str(tmp_path / "run"))
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "imitation", "eval")]
    vocabulary = len(reviews.tokenizer())  # a new model predicts each token alike
    assert losses[0] == pytest.approx(np.log(vocabulary), rel=0.01)
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "finished.json").exists()


# A form of data.


def test_a_form_is_found_from_its_fields(monkeypatch):
    def parse(fields):
        better, worse = fields["good"], fields["bad"]
        return Record(fields.id, fields.text("question"), (better, worse))

    form = records.Form("question, good, bad", lambda row: {"good", "bad"} <= row.keys(), parse)
    monkeypatch.setitem(records.FORMS, "good_bad", form)
    row = {"question": "why?", "good": " because", "bad": " no"}
    assert records.detect(row) == "good_bad"
    record = records.parse(row, "file:1")
    assert (record.prompt, record.responses) == ("why?", (" because", " no"))
    assert records.detect({"prompt": "a", "chosen": "b", "rejected": "c"}) == "pair"


# A reward.


def test_a_reward_is_opened_by_its_name(monkeypatch):
    def open_length(argument, mesh, batch_size):
        def length(prompts, responses):
            return [len(text) for text in responses]

        return Reward("length", length, "length")

    kind = RewardKind("length", open_length, lambda argument: "", needs_argument=False)
    monkeypatch.setitem(rewards.KINDS, "length", kind)
    assert open_reward("length")(["p", "p"], ["a", "abc"]).tolist() == [1.0, 3.0]
    with pytest.raises(rewards.RewardError, match=r"'height'.*reviews.*length"):
        open_reward("height")


# A judge.


class FirstLetter:
    """Prefers the response whose first letter comes earlier. It never calls a tie."""

    name, is_symmetric = "first_letter", False

    def __init__(self, alphabet):
        self.alphabet, self.fingerprint = alphabet, f"first_letter {alphabet}"

    def replies(self, questions):
        for index, (_, first, second, _) in enumerate(questions):
            comes_later = self.alphabet.index(first[0]) > self.alphabet.index(second[0])
            yield index, Reply(Choice.SECOND if comes_later else Choice.FIRST)


def test_a_judge_is_opened_by_its_name_and_asked_in_both_orders(monkeypatch):
    kind = JudgeKind("first_letter:ALPHABET", lambda alphabet, options: FirstLetter(alphabet))
    monkeypatch.setitem(open_judges.KINDS, "first_letter", kind)
    pairs = [("an apple", "a bee"), ("a bee", "bees"), ("cats", "bees")]
    comparisons = [Comparison(f"p{i}", "p", *pair) for i, pair in enumerate(pairs)]
    judged = judge_comparisons(open_judges.open_judge("first_letter:abc"), comparisons)
    outcomes = [judgement.outcome for judgement in judged.judgements]
    assert outcomes == [Outcome.INCONSISTENT, Outcome.WIN, Outcome.LOSS]
    with pytest.raises(JudgeError, match=r"'last_letter'.*exact.*first_letter:ALPHABET"):
        open_judges.open_judge("last_letter")


# A launcher.

PRINTER = """
import shlex
from dpojax.launching.engine import Engine

class Printer(Engine):
    name, about, submits_with = "printer", "a list of commands", "lpr"

    def add_options(self, parser):
        parser.add_argument("--colour", default="black")

    def is_distributed(self, options):
        return False

    def text(self, launch, options):
        lines = [shlex.join(launch.words(job)) for job in launch.jobs]
        return "\\n".join([options.colour, *lines])

ENGINE = Printer()
"""


def test_a_launcher_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "printer.py").write_text(PRINTER)
    monkeypatch.setattr(engines, "__path__", [*engines.__path__, str(tmp_path)])
    file, config = tmp_path / "file", ROOT / "configs" / "reviews.py"
    words = [f"--config={config}", "--workdir=gs://b/r", f"--out={file}", "--colour=red"]
    monkeypatch.setattr(Job, "is_done", False)  # nobody looks into the bucket
    assert launch.launch(["printer", *words, "--config.preference.beta=2"]) == 0
    colour, line = file.read_text().splitlines()
    assert colour == "red"
    assert line.endswith(" --workdir=gs://b/r --config.preference.beta=2")
    sys.modules.pop("dpojax.launching.engines.printer")
    with pytest.raises(UsageError, match=r"begin with one of .*printer"):
        launch.launch(["plotter", *words])


# An executor.


def run_in_subprocesses(jobs):
    """The smallest executor: each command in a process of its own, when its needs are met."""
    while to_do := pending(jobs):
        names = {job.name for job in to_do}
        job = next(job for job in to_do if names.isdisjoint(job.needs))
        subprocess.run([sys.executable, *job.command[1:]], check=True, cwd=ROOT)


@pytest.mark.slow
def test_an_executor_needs_the_commands_alone(tmp_path):
    second = small_job(tmp_path, "second", needs=("first",))
    run_in_subprocesses([second, small_job(tmp_path, "first")])
    first, second = ((tmp_path / name).stat().st_mtime_ns for name in ("first", "second"))
    assert first < second
