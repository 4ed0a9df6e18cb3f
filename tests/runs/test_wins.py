"""The win rate against the reference at evaluations: what is asked, logged, and stopped by."""

import csv
import json
import types
from collections.abc import Sequence

import numpy as np
import pytest

from dpojax import storage
from dpojax.config.errors import ConfigError
from dpojax.data import reviews
from dpojax.evaluation.judging import open_judge
from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.open_judge import JudgeKind
from dpojax.evaluation.judging.verdicts import Choice, Question, Reply
from dpojax.evaluation.policies import PolicyEvaluation
from dpojax.runs.run import run
from dpojax.stages import train, wins
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import prepare_setup
from dpojax.sweeps.sweep import run_sweep
from dpojax.sweeps.table import add_differences

from .conftest import lines, tiny_config

RECORDS = [*{x["prompt"]: x for x in reviews.preferences("eval", 60, 3)}.values()][:40]
SAMPLED = {
    "stages": ("preference",),
    "samples.judge": "exact",
    "samples.count": 8,
    "samples.per_prompt": 2,
    "samples.max_new_tokens": 12,
    "checkpoint_every": 0,
}


class Picky:
    """Prefers the second response every third time, else the first, and counts what it is asked."""

    name, fingerprint, is_symmetric = "picky", "picky", False

    def __init__(self):
        self.asked, self.is_down = [], False

    def replies(self, questions: Sequence[Question]):
        for index, question in enumerate(questions):
            if self.is_down:
                raise JudgeError("picky: is away")
            self.asked.append(question)
            yield index, Reply(Choice.SECOND if len(self.asked) % 3 == 0 else Choice.FIRST)


@pytest.fixture
def picky(monkeypatch):
    judge = Picky()
    kind = JudgeKind("picky", lambda argument, options: judge, needs_argument=False)
    monkeypatch.setitem(open_judge.KINDS, "picky", kind)
    return judge


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """open(judge) -> what adds wins, where the reference said the rejected responses."""

    def opened(judge: str):
        samples = types.SimpleNamespace(judge=judge, judge_template="summary")
        config = types.SimpleNamespace(samples=samples)
        setup = types.SimpleNamespace(config=config, workdir=storage.as_path(tmp_path))
        monkeypatch.setattr(wins, "_reference_responses", lambda *a: said("rejected"))
        return wins.open_wins(setup, {}, [record["prompt"] for record in RECORDS], 1)

    return opened


def said(which):
    return [[record[which]] for record in RECORDS]


def evaluation(responses):
    unknown = dict.fromkeys(PolicyEvaluation._fields)
    return PolicyEvaluation(**unknown | {"responses": responses, "judged": {}, "win_scores": ()})


def test_the_exact_judge_counts_the_better_response_of_each_pair(opened):
    add = opened("exact")
    every = add(evaluation(said("chosen")))
    assert every.judged["samples/win_rate"] == 1.0
    # n wins of n: the lower end of Beta(n + 1, 1) is 0.025^(1 / (n + 1)). Of 2,000 resamples it has
    # a standard error of sqrt(0.025 * 0.975 / 2000) / density = 0.003.
    low = 0.025 ** (1 / (len(RECORDS) + 1))
    assert every.judged["samples/win_rate_low"] == pytest.approx(low, abs=4 * 0.003)
    half = [record["chosen" if i % 2 else "rejected"] for i, record in enumerate(RECORDS)]
    mixed = add(evaluation([[text] for text in half]))
    assert mixed.judged["samples/win_rate"] == pytest.approx(0.75)  # the same responses tie
    assert mixed.judged["samples/ties"] == pytest.approx(0.5)
    assert mixed.win_scores == [1.0 if i % 2 else 0.5 for i in range(len(RECORDS))]
    assert "samples/flip_rate" not in mixed.judged  # asked in one order


def test_a_judge_that_follows_the_position_has_its_bias_and_flips_logged(opened, picky):
    judged = opened("picky")(evaluation(said("chosen"))).judged
    # Both orders of 40 pairs are 80 questions in a row, wherever it begins: 54 times the first, 26
    # times the second. Both orders get "first" in 14 pairs, and A wins half of the other 26.
    assert judged["samples/position_bias"] == pytest.approx((54 - 26) / 80)
    assert judged["samples/flip_rate"] == pytest.approx(14 / 40)
    assert judged["samples/win_rate"] == pytest.approx(0.5)
    assert judged["samples/win_rate_low"] < 0.5 < judged["samples/win_rate_high"]


def test_a_judge_that_may_cost_something_is_not_asked_again_after_a_resume(opened, picky):
    first = opened("picky")(evaluation(said("chosen")))
    asked = len(picky.asked)
    assert asked == 2 * len(RECORDS)
    assert opened("picky")(evaluation(said("chosen"))).judged == first.judged
    assert len(picky.asked) == asked


def test_an_evaluation_whose_judge_is_away_has_no_win_rate_and_training_goes_on(
    opened, picky, capsys
):
    picky.is_down = True
    judged = opened("picky")(evaluation(said("chosen"))).judged
    assert list(judged) == [f"samples/win_rate{end}" for end in ("", "_low", "_high")]
    assert np.isnan(list(judged.values())).all()
    assert "WARNING: no win rate at this evaluation: picky: is away" in capsys.readouterr().out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run without a reward, and how often the reference was drawn from."""
    workdir, draws = tmp_path_factory.mktemp("wins") / "run", []
    original = wins.generate

    def counted(*arguments, **how):
        draws.append(how["seed"])
        return original(*arguments, **how)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(wins, "generate", counted)
        run(tiny_config(**SAMPLED), str(workdir))
    return workdir, draws


@pytest.mark.long
def test_every_evaluation_of_a_run_logs_the_win_rate_and_its_interval(trained):
    workdir, draws = trained
    evaluations = [x for x in lines(workdir, "preference") if x["split"] == "eval"]
    assert [line["step"] for line in evaluations] == [0, 3, 6]
    for line in evaluations:
        assert line["samples/win_rate_low"] <= line["samples/win_rate"]
        assert line["samples/win_rate"] <= line["samples/win_rate_high"]
        assert "samples/reward" not in line
        assert np.isfinite(line["samples/kl"])
    assert draws == [1]  # the reference, once


def test_the_metrics_of_samples_are_known_before_any_are_drawn(trained):
    """So that keep_best and stop_at can be refused: of an exact judge, without a reward."""
    stage = open_stage(prepare_setup(resolve(tiny_config(**SAMPLED), trained[0])), "preference")
    first = next(x for x in lines(trained[0], "preference") if x["split"] == "eval")
    logged = {name for name in first if name.startswith("samples/")}
    both_orders = {"samples/flip_rate", "samples/position_bias"}  # which the exact judge has not
    assert {*stage.sample_metric_names()} - both_orders == logged


def test_the_win_scores_of_prompts_average_to_the_win_rate(trained):
    folder = trained[0] / "preference"
    last = [x for x in lines(trained[0], "preference") if x["split"] == "eval"][-1]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    scores = {x["prompt"]: x["win_score"] for x in samples if x["step"] == last["step"]}
    assert np.mean(list(scores.values())) == pytest.approx(last["samples/win_rate"])
    assert "reward" not in samples[0]


@pytest.mark.long
def test_training_stops_by_the_win_rate_and_keeps_the_best(tmp_path, monkeypatch):
    rates = {0: 0.5, 2: 0.61, 4: 0.7, 6: 0.69, 8: 0.7}
    evaluate = train.Evaluator.__call__

    def with_rate(self, stage, state):
        return evaluate(self, stage, state) | {"samples/win_rate": rates[int(state.step)]}

    monkeypatch.setattr(train.Evaluator, "__call__", with_rate)
    keep = {"preference.keep_best": "eval/samples/win_rate", "preference.patience": 2}
    steps = {"preference.steps": 20, "evaluate_every": 2}
    run(tiny_config(**SAMPLED | keep | steps), str(tmp_path / "run"))
    kept = json.loads((tmp_path / "run/preference/summary.json").read_text())["kept"]
    assert (kept["step"], kept["stopped_at"]) == (4, 8)


def prepare(folder, **changes):
    resolved = resolve(tiny_config(**SAMPLED | changes), folder)
    return open_stage(prepare_setup(resolved), resolved.config.stages[0]).prepare()


@pytest.mark.parametrize(
    "changes",
    [
        {"preference.keep_best": "eval/samples/win_rate"},
        {"preference.stop_at": "eval/samples/win_rate_low>=0.5"},
    ],
)
def test_stopping_by_the_win_rate_needs_a_judge(changes, tmp_path):
    said = rf"config\.{next(iter(changes))} = .* name one in config\.samples\.judge"
    with pytest.raises(ConfigError, match=said):
        prepare(tmp_path, **changes, **{"samples.judge": "", "samples.reward": "reviews"})


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"preference.stop_at": "eval/samples/winrate>=1"}, "samples/win_rate, eval/samples/win"),
        ({"preference.keep_best": "+samples/reward"}, "eval/samples/repetition, eval/samples/stop"),
        ({"stages": ("sft",), "sft.stop_at": "samples/kl>=1"}, "they have eval/entropy"),
        ({"stages": ("ppo",), "ppo.stop_at": "loss<=1"}, "samples/reward, eval/samples/reward_err"),
    ],
)
def test_a_metric_that_no_evaluation_has_is_refused_with_its_neighbours(changes, known, tmp_path):
    with pytest.raises(ConfigError, match=rf"evaluations have no eval/.*{known}"):
        prepare(tmp_path, **changes)


def test_a_judge_that_there_is_not_is_named_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.samples\.judge: judge 'oracle': is"):
        run(tiny_config(**SAMPLED | {"samples.judge": "oracle"}), str(tmp_path / "run"))


@pytest.mark.long
def test_a_sweep_shows_win_rates_and_how_far_members_are_behind_the_best(tmp_path, capsys):
    changes = SAMPLED | {"samples.reward": "", "preference.steps": 3}
    members = [{"preference.beta": 0.1}, {"preference.beta": 1.0}]
    assert run_sweep(tiny_config(**changes), members, str(tmp_path / "sweep")) == {}
    with open(tmp_path / "sweep" / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["samples/win_rate"]) for row in rows]
    behind = [float(row["samples/behind_best"]) for row in rows]
    assert behind == pytest.approx([max(rates) - rate for rate in rates])
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000
    assert "win rate, %" in capsys.readouterr().out


def test_the_difference_between_members_is_paired_by_prompt(tmp_path):
    easy = np.arange(40) / 40  # of every prompt, which differ much
    folders = {}
    for name, score in (("best", easy), ("second", easy - 0.1)):
        folders[name] = storage.as_path(tmp_path / name)
        with storage.LineWriter(folders[name] / "samples.jsonl") as out:
            for prompt, value in enumerate(score.tolist()):
                out.write(json.dumps({"step": 3, "prompt": str(prompt), "win_score": value}))
    evaluations = {
        name: {"step": 3, "samples/win_rate": rate}
        for name, rate in (("best", 0.5), ("second", 0.4))
    }
    add_differences(evaluations, folders)
    second = evaluations["second"]
    assert second["samples/behind_best"] == pytest.approx(0.1)
    # Each prompt differs by the same, so that the two pseudo-prompts alone make the interval. Each
    # weighs half a prompt: their difference has the density K0(|x|) / pi, 95 % of it within 2.18,
    # which 2,000 resamples tell to 0.12. All 41 prompts weigh 41. Unpaired it would be +-0.13.
    half = 2.18 / 41
    assert second["samples/behind_best_low"] == pytest.approx(0.1 - half, abs=4 * 0.12 / 41)
    assert second["samples/behind_best_high"] == pytest.approx(0.1 + half, abs=4 * 0.12 / 41)
    assert evaluations["best"]["samples/behind_best"] == 0


@pytest.mark.long
def test_evaluations_of_ppo_have_the_win_rate_beside_the_reward(tmp_path):
    changes = SAMPLED | {"stages": ("ppo",), "ppo.limit": 16, "ppo.steps": 2, "ppo.batch_size": 8}
    changes |= {"ppo.minibatches": 1, "ppo.max_new_tokens": 12, "evaluate_every": 1}
    run(tiny_config(**changes), str(tmp_path / "run"))
    evaluations = [x for x in lines(tmp_path / "run", "ppo") if x["split"] == "eval"]
    assert [line["step"] for line in evaluations] == [0, 1, 2]
    for line in evaluations:
        assert 0 <= line["samples/win_rate"] <= 1
        assert np.isfinite(line["samples/reward"])
