"""At which evaluation a condition on a metric is reached, and what is said of it."""

import math

import pytest

from dpojax.training.stop_at import STOP_AT, parse


@pytest.mark.parametrize(
    ("condition", "metric", "measured", "reached"),
    [
        ("eval/samples/win_rate>=0.6", "samples/win_rate", 0.6, True),
        ("samples/win_rate >= 0.6", "samples/win_rate", 0.7, True),
        ("samples/win_rate >= 0.6", "samples/win_rate", 0.59, False),
        ("eval/loss<=5e-1", "loss", 0.5, True),
        ("eval/loss<=5e-1", "loss", 0.51, False),
        ("rewards/margins>=-1", "rewards/margins", -0.9, True),
        ("loss<=0.5", "loss", math.nan, False),
        ("loss<=0.5", "loss", -math.inf, False),
    ],
)
def test_a_condition_is_reached_at_its_value_and_beyond_and_by_numbers_alone(
    condition, metric, measured, reached
):
    followed = parse(condition)
    assert followed.add(5, {metric: measured}) == reached
    assert followed.stopped_at == (5 if reached else None)


@pytest.mark.parametrize(
    "condition",
    [
        "eval/loss",
        "loss=0.5",
        "loss<0.5",
        "loss>=",
        ">=0.5",
        "loss>=high",
        "loss>=nan",
        "loss<=inf",
    ],
)
def test_what_is_no_condition_is_refused_with_an_example(condition):
    with pytest.raises(ValueError, match=r"such as 'eval/samples/win_rate>=0\.6'"):
        parse(condition)
    assert parse("") is None


def test_the_evaluation_before_the_first_step_stops_nothing_and_is_told():
    followed = parse("accuracy>=0.5")
    assert not followed.add(0, {"accuracy": 0.8})
    followed.add(10, {"accuracy": 0.4})
    followed.add(20, {"accuracy": 0.3})
    assert followed.describe(20) == (
        "eval/accuracy >= 0.5 was never reached: the highest was 0.4, at step 10 of 20 (before "
        "training it was 0.8, which does not count)"
    )


def test_an_evaluation_without_the_metric_names_those_that_there_are():
    with pytest.raises(ValueError, match=r"no eval/accuracy; they have eval/kl, eval/loss"):
        parse("accuracy>=1").add(2, {"loss": 1.0, "kl": 0.0})


def test_what_a_checkpoint_keeps_goes_on_where_it_was():
    first = parse("loss<=0.5")
    for step, loss in {0: 0.7, 5: math.nan, 10: 0.6}.items():
        first.add(step, {"loss": loss})
    resumed = parse("loss<=0.5")
    resumed.restore({STOP_AT: first.state()})
    assert resumed == first
    assert resumed.add(15, {"loss": 0.25})
    assert resumed.describe(60) == "step 15 of 60, the first evaluation with eval/loss <= 0.5: 0.25"


def test_a_metric_that_never_was_a_number_is_told():
    followed = parse("samples/win_rate>=0.5")
    followed.add(5, {"samples/win_rate": math.nan})
    assert "no evaluation gave a number" in followed.describe(5)
