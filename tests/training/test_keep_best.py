"""Which metric says what is best, in which direction, and what it says of it."""

import math

import pytest

from dpojax.training.keep_best import KEEP_BEST, parse


@pytest.mark.parametrize(
    ("name", "metric", "sign"),
    [
        ("eval/loss", "loss", -1),
        ("loss", "loss", -1),
        ("eval/cross_entropy", "cross_entropy", -1),
        ("eval/rewards/accuracies", "rewards/accuracies", 1),
        ("accuracy", "accuracy", 1),
        ("samples/reward", "samples/reward", 1),
        ("-samples/kl", "samples/kl", -1),
        ("+eval/samples/length", "samples/length", 1),
        ("+loss", "loss", 1),  # who says so means it
    ],
)
def test_a_metric_is_named_with_or_without_its_split_and_direction(name, metric, sign):
    followed = parse(name, 0)
    assert (followed.metric, followed.sign) == (metric, sign)


def test_a_metric_whose_direction_nobody_knows_and_a_wait_for_nothing_are_refused():
    with pytest.raises(ValueError, match=r"\('\+eval/samples/kl'\) or low \('-eval/samples/kl'\)"):
        parse("eval/samples/kl", 0)
    with pytest.raises(ValueError, match="it is empty, but patience = 3"):
        parse("", 3)
    assert parse("", 0) is None


def test_an_evaluation_without_the_metric_names_those_that_there_are():
    with pytest.raises(ValueError, match=r"no eval/accuracy; they have eval/kl, eval/loss"):
        parse("accuracy", 0).add(2, {"loss": 1.0, "kl": 0.0})


def test_what_a_checkpoint_keeps_goes_on_where_it_was():
    first = parse("loss", 3)
    values = {0: 0.1, 5: math.inf, 10: 0.5, 15: 0.7, 20: 0.7, 25: math.nan, 30: 0.1}
    for step in (0, 5, 10, 15):
        first.add(step, {"loss": values[step]})
    resumed = parse("loss", 3)
    resumed.restore({KEEP_BEST: first.state()})
    assert resumed == first
    assert not resumed.add(20, {"loss": 0.7})
    assert resumed.stopped_at is None
    resumed.add(25, {"loss": values[25]})
    assert resumed.stopped_at == 25
    text = resumed.describe(60)
    assert "step 10 of 60, where eval/loss was lowest: 0.5" in text
    assert "before training it was 0.1, no worse" in text
    assert "stopped at step 25 after 3 evaluation(s) without a better one" in text


def test_where_no_evaluation_gave_a_number_the_last_step_is_kept_and_told():
    followed = parse("accuracy", 0)
    assert not followed.add(5, {"accuracy": math.nan})
    state = followed.state()
    assert state["score"] is None
    again = parse("accuracy", 0)
    again.restore({KEEP_BEST: state})
    assert again.add(10, {"accuracy": 0.0})  # any number is better than none
    assert "no evaluation gave a number" in followed.describe(60)
