"""A grid on a command line is what its author means, or is refused with the candidates."""

import csv
import io
import json
import math
import shlex

import pytest

from dpojax.config.command_line import UsageError, gather
from dpojax.config.defaults import default_config
from dpojax.intervals import mean_interval
from dpojax.sweeps.best import Criterion, choose_best, describe_best, parse_best
from dpojax.sweeps.grid import describe, full_key, grid_members, split_values, sweep_members
from dpojax.sweeps.members import member_names
from dpojax.sweeps.seeds import SHARES, mean_line, seeds_csv, settings_of
from tests import metrics_page


def test_a_flag_that_takes_several_words_stands_before_each_of_them():
    for words in (
        ["--grid", "a=1,2", "b=3", "--seeds=3"],
        ["--grid=a=1,2", "b=3", "--seeds=3"],
        ["--grid=a=1,2", "--grid=b=3", "--seeds=3"],
    ):
        assert gather(words, ("grid",)) == ["--grid=a=1,2", "--grid=b=3", "--seeds=3"]
    assert gather(["--seeds", "3", "stray"], ("grid",)) == ["--seeds", "3", "stray"]
    assert gather(["--grid"], ("grid",)) == ["--grid"]


def test_every_combination_is_a_member_with_values_of_the_keys_types():
    grid = ("preference.beta=0.05,1", "preference.loss=dpo,ipo", "preference.lora.rank=8")
    members = grid_members(default_config(), grid)
    assert members == [
        {"preference.beta": beta, "preference.loss": loss, "preference.lora.rank": 8}
        for beta in (0.05, 1.0)
        for loss in ("dpo", "ipo")
    ]
    assert isinstance(members[0]["preference.beta"], float)


def test_commas_in_quotes_and_brackets_separate_no_values():
    assert split_values("1,2") == ["1", "2"]
    assert split_values("(1,2),(3,4)") == ["(1,2)", "(3,4)"]
    assert split_values("'a.jsonl,b.jsonl',c.jsonl") == ["a.jsonl,b.jsonl", "c.jsonl"]
    assert split_values("('a','b'),()") == ["('a','b')", "()"]
    members = grid_members(default_config(), ["preference.loss_weights=(0.5,0.5),(0.9,0.1)"])
    assert [changes["preference.loss_weights"] for changes in members] == [(0.5, 0.5), (0.9, 0.1)]


def test_a_key_without_its_group_is_one_of_the_last_stage_else_the_only_one():
    config = default_config()
    assert config.stages == ("sft", "preference")
    for name, key in {
        "beta": "preference.beta",
        "learning_rate": "preference.learning_rate",
        "optimizer.clip_norm": "preference.optimizer.clip_norm",
        "max_length": "tokens.max_length",
        "sft.learning_rate": "sft.learning_rate",
        "lora.rank": "preference.lora.rank",
        "seed": "seed",
    }.items():
        assert full_key(config, name) == key
    config.stages = ("sft",)
    assert full_key(config, "learning_rate") == "sft.learning_rate"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["path=a,b"], r"path: may be model\.path or preference\.reference\.path; write"),
        (["kl_targt=1"], "no such key; did you mean ppo.kl_target"),
        (["preference.betta=1"], "did you mean preference.beta?"),
        (["beta=0.1", "preference.beta=1"], "preference.beta is there twice"),
        (["beta=0.1,0.1"], "0.1 is there twice"),
        (["beta=0.1,,1"], "a number is expected"),
        (["beta=0.1,x"], "--grid preference.beta=x: a number is expected"),
        (["0.3"], "write KEY=VALUE,VALUE without spaces"),
        (["preference=1"], "no such key"),
        (["model.path='a,b"], "' is missing at the end"),
        (["preference.loss_weights=(0.5,0.5"], r"\) is missing at the end"),
        (
            [f"{key}={','.join(map(str, range(1, 102)))}" for key in ("beta", "steps")],
            "10,201 members",
        ),
    ],
)
def test_a_grid_that_means_nothing_is_refused(grid, message):
    with pytest.raises(UsageError, match=message):
        grid_members(default_config(), grid)


def test_an_ambiguous_key_lists_its_candidates():
    with pytest.raises(
        UsageError, match=r"rank: may be sft\.lora\.rank or preference\.lora\.rank;"
    ):
        full_key(default_config(), "rank")


def test_seeds_multiply_the_members_from_the_seed_of_the_config_on():
    config = default_config()
    config.seed = 5
    members = sweep_members("", config, ["beta=0.1,1"], seeds=2)
    assert [(x["preference.beta"], x["seed"]) for x in members] == [
        (0.1, 5),
        (0.1, 6),
        (1.0, 5),
        (1.0, 6),
    ]
    with pytest.raises(UsageError, match="set their seed already"):
        sweep_members("", config, ["seed=1,2"], seeds=2)
    with pytest.raises(UsageError, match="20,000 members; 10,000 are the most"):
        sweep_members("", config, ["beta=0.1,1"], seeds=10_000)


def test_members_are_called_combinations_only_where_they_are_all_of_them():
    both = [{"beta": b, "seed": s} for b in (0.1, 1.0) for s in (0, 1)]
    assert describe(both) == "4 members: beta (2 values) x seed (2 values)"
    assert describe(both[:3]) == "3 members: beta (2 values), seed (2 values)"
    assert describe(both[:2]) == "2 members: seed (2 values); beta = 0.1"
    assert describe([{}]) == "1 member"


def members_of(values):
    """{member: changes} for {(beta, seed): accuracy}, and their evaluations."""
    members = {f"b{b}-s{s}": {"preference.beta": b, "seed": s} for b, s in values}
    lines = {f"b{b}-s{s}": {"step": 9, "rewards/accuracies": x} for (b, s), x in values.items()}
    return members, lines


def test_means_over_seeds_have_students_interval():
    """n = 2: the quantile is 12.706, and the ends are mean ± 12.706 |a - b| / 2."""
    low, high = mean_interval([0.6, 0.7])
    assert (low, high) == (
        pytest.approx(0.65 - 12.7062 * 0.05, abs=1e-4),
        pytest.approx(0.65 + 12.7062 * 0.05, abs=1e-4),
    )
    assert all(map(math.isnan, mean_interval([0.6])))
    line = mean_line([{"step": 9, "loss": 1.0, "split": "eval"}, {"step": 9, "loss": 3.0}])
    assert (line["loss"], line["step"]) == (2.0, 9)
    assert line["loss_low"] == pytest.approx(2 - 12.7062, abs=1e-3)


def test_intervals_of_shares_end_at_0_and_1_and_those_of_other_means_do_not():
    names = ("rewards/accuracies", "b.jsonl/rewards/accuracies", "rewards/margins")
    high = mean_line([dict.fromkeys(names, 0.9), dict.fromkeys(names, 1.0)])
    low = mean_line([dict.fromkeys(names, 0.1), dict.fromkeys(names, 0.0)])
    for name in names[:2]:
        assert high[f"{name}_high"] == 1.0
        assert high[f"{name}_low"] == pytest.approx(0.95 - 12.7062 * 0.05, abs=1e-4)
        assert low[f"{name}_low"] == 0.0
    assert high["rewards/margins_high"] == pytest.approx(0.95 + 12.7062 * 0.05, abs=1e-4)
    assert low["rewards/margins_low"] == pytest.approx(0.05 - 12.7062 * 0.05, abs=1e-4)


def test_shares_are_the_metrics_that_the_page_calls_0_to_1():
    units = {
        name: row[2]
        for row in metrics_page.rows("name")
        for name in metrics_page.CODE.findall(row[0])
    }
    assert [name for name in SHARES if not units[name].startswith("0 to 1")] == []
    ends = ("_low", "_high", "behind_best")  # the last is a difference
    shares = {name for name, unit in units.items() if unit == "0 to 1" and not name.endswith(ends)}
    assert shares - {*SHARES} == set()


def test_scipy_computes_the_same_interval():
    from scipy import stats

    values = [0.61, 0.58, 0.66, 0.70]
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_best_setting_has_the_best_mean_and_is_compared_by_seed(tmp_path):
    members, lines = members_of(
        {(0.1, 0): 0.70, (0.1, 1): 0.74, (1.0, 0): 0.69, (1.0, 1): 0.73, (5.0, 0): 0.9}
    )
    members["b5.0-s1"] = {"preference.beta": 5.0, "seed": 1}  # failed: no evaluation
    settings = settings_of(members, "preference", 0)
    best = choose_best(Criterion("rewards/accuracies", 1), settings, lines)
    assert best["setting"] == "beta-0.1"
    assert best["high"] == pytest.approx(0.72 + 12.7062 * 0.02, abs=1e-4)
    assert best["value"] == pytest.approx(0.72)
    assert best["members"] == ["b0.1-s0", "b0.1-s1"]
    assert best["next"]["setting"] == "beta-1"
    # Both seeds differ by 0.01, so the paired interval has no width.
    assert best["next"]["ahead"] == pytest.approx(0.01)
    assert best["next"]["low"] == pytest.approx(0.01)
    assert best["next"]["paired_seeds"] == 2
    worst = choose_best(Criterion("rewards/accuracies", -1), settings, lines)
    assert worst["setting"] == "beta-1"
    assert f"--workdir={tmp_path / 'b0.1-s0'} " in describe_best(best, tmp_path)
    # A shell reads the command, and names of members hold what values hold.
    text = describe_best(best | {"members": ["loss_weights-(0.5, 0.5)"]}, tmp_path)
    assert f"--workdir={shlex.quote(str(tmp_path / 'loss_weights-(0.5, 0.5)'))} " in text
    assert "'" in text


@pytest.mark.parametrize(
    ("seeds", "pairs", "message"),
    [
        ((1, 0), 2, "(0.01 to 0.01)"),  # in another order
        ((0, 2), 0, "the two have different seeds"),
        ((0,), 0, "the two have different seeds"),
    ],
)
def test_settings_are_paired_by_their_seeds_alone(seeds, pairs, message, tmp_path):
    accuracies = {0: 0.69, 1: 0.73, 2: 0.60}
    values = {(0.1, 0): 0.70, (0.1, 1): 0.74} | {(1.0, s): accuracies[s] for s in seeds}
    members, lines = members_of(values)
    settings = settings_of(members, "preference", 0)
    best = choose_best(Criterion("rewards/accuracies", 1), settings, lines)
    assert best["next"]["paired_seeds"] == pairs
    assert message in describe_best(best, tmp_path)


def test_of_two_settings_that_are_level_the_first_is_named_and_not_called_ahead(tmp_path):
    members, lines = members_of({(1.0, 0): 0.7, (0.1, 0): 0.7})
    settings = settings_of(members, "preference", 0)
    text = describe_best(choose_best(Criterion("rewards/accuracies", 1), settings, lines), tmp_path)
    assert "level with beta-0.1, which comes after it" in text
    assert "ahead" not in text


def test_a_run_that_is_there_with_its_seed_and_without_counts_once():
    """A sweep without seeds that goes on with --seeds=2."""
    members = {"b": {"preference.beta": 0.1}}
    members |= {f"b-{seed}": {"preference.beta": 0.1, "seed": seed} for seed in (5, 6)}
    (setting,) = settings_of(members, "preference", 5)
    assert setting.members == {5: "b", 6: "b-6"}


def test_a_setting_is_called_as_its_members_are_also_where_json_has_made_lists_of_tuples():
    (changes,) = grid_members(default_config(), ["preference.loss_weights=(0.5,0.5)"])
    (name,) = member_names([changes], "preference")
    members = json.loads(json.dumps({name: changes}))
    assert [setting.name for setting in settings_of(members, "preference", 0)] == [name]


def test_losses_of_members_with_other_betas_are_not_compared():
    by_beta = grid_members(default_config(), ["beta=0.1,1"])
    by_rate = grid_members(default_config(), ["learning_rate=1e-4,1e-3"])
    for metric in ("eval/loss", "eval/rewards/margins"):
        with pytest.raises(UsageError, match=r"members differ in preference\.beta"):
            parse_best(metric, "preference", by_beta)
    assert parse_best("eval/loss", "preference", by_rate) == ("loss", -1)
    assert parse_best("eval/rewards/accuracies", "preference", by_beta).sign == 1
    assert parse_best("-kl/per_token", "preference", by_beta) == ("kl/per_token", -1)
    with pytest.raises(UsageError, match="say whether it should be high"):
        parse_best("kl/per_token", "preference", by_beta)
    assert parse_best("", "preference", by_beta) is None


def test_the_table_of_seeds_counts_those_that_finished():
    members, lines = members_of({(0.1, 0): 0.70, (0.1, 1): 0.74, (1.0, 0): 0.69})
    members["b1.0-s1"] = {"preference.beta": 1.0, "seed": 1}
    rows = list(
        csv.DictReader(io.StringIO(seeds_csv(settings_of(members, "preference", 0), lines)))
    )
    assert [(row["setting"], row["seeds_finished"], row["seeds"]) for row in rows] == [
        ("beta-0.1", "2", "2"),
        ("beta-1", "1", "2"),
    ]
    assert float(rows[0]["rewards/accuracies"]) == pytest.approx(0.72)
    assert rows[0]["preference.beta"] == "0.1"


def test_a_metric_that_no_evaluation_has_is_told_with_those_that_there_are():
    members, lines = members_of({(0.1, 0): 0.70})
    settings = settings_of(members, "preference", 0)
    with pytest.raises(UsageError, match=r"no eval/nothing; they have eval/rewards/accuracies"):
        choose_best(Criterion("nothing", 1), settings, lines)
    assert choose_best(Criterion("rewards/accuracies", 1), settings, {}) is None
