"""The health line: each rule, on evaluations that are made by hand."""

import math

import pytest

from dpojax.training.health import (
    LOWER_RATE,
    RAISE_RATE,
    STAY_NEAR,
    STOP_EARLIER,
    Health,
)

START = {
    "loss": math.log(2),
    "rewards/accuracies": 0.0,
    "logps/chosen": -50.0,
    "logps/rejected": -52.0,
    "kl/per_token": 0.0,
}


def line_after(*later, start=START):
    """What is said of the last of some evaluations, 10 steps apart; each changes the one before."""
    health, values = Health(), dict(start)
    text = health.add(0, values)
    for number, change in enumerate(later, 1):
        values |= change
        text = health.add(10 * number, values)
    return text


GOOD = {"loss": 0.6, "rewards/accuracies": 0.7, "logps/chosen": -49.0, "logps/rejected": -55.0}


def test_nothing_is_said_of_the_policy_that_still_is_the_reference():
    assert line_after() == ""


@pytest.mark.parametrize(
    ("later", "text"),
    [
        ([GOOD], "learning"),
        ([GOOD, {"loss": 0.5995}], "level"),
        ([GOOD, {"loss": 0.63}], f"overfitting (loss 0.600 at step 10, 0.630 now): {STOP_EARLIER}"),
        ([GOOD, {"loss": 0.61}], "learning"),  # less than 3 % above the lowest
        ([{"loss": 0.69, "rewards/accuracies": 0.51}], f"not learning: {RAISE_RATE}"),
        ([GOOD | {"loss": 0.9}], f"getting worse: {LOWER_RATE}"),
        ([GOOD | {"loss": 0.72}], f"getting worse: {LOWER_RATE}"),  # 4 % above log 2
        ([GOOD | {"loss": 0.01, "rewards/accuracies": 1.0}], "saturated"),
        ([GOOD | {"logps/chosen": -51.0}], "learning; chosen falls with rejected"),
        (
            [GOOD | {"logps/chosen": -51.0, "logps/rejected": -51.5}],
            "learning; chosen falls",
        ),
        ([GOOD | {"kl/per_token": 0.4}], f"learning; KL 0.40 nats a token: {STAY_NEAR}"),
        (
            [GOOD | {"logps/chosen": -51.0, "kl/per_token": 0.4}],
            f"learning; chosen falls with rejected, KL 0.40 nats a token: {STAY_NEAR}",
        ),
        (
            [GOOD | {"loss": 0.9, "kl/per_token": 0.4}],
            f"getting worse; KL 0.40 nats a token: {STAY_NEAR}",
        ),
    ],
)
def test_every_rule_says_what_is_seen_and_what_to_change(later, text):
    assert line_after(*later) == text


def test_a_stage_without_pairs_is_judged_by_its_loss_alone():
    start = {"loss": 4.0, "logps/chosen": -80.0}
    assert line_after({"loss": 2.0, "logps/chosen": -90.0}, start=start) == "learning"
    assert line_after({"loss": 2.0}, {"loss": 2.5}, start=start).startswith("overfitting (loss 2.0")
    assert line_after({"loss": math.nan}, start=start) == ""


def test_a_run_that_resumes_says_what_one_does_that_was_never_stopped():
    lines = [START | {"step": 0}, START | GOOD | {"step": 10}, START | GOOD | {"step": 20}]
    resumed = Health(lines)  # the last one was evaluated after the checkpoint, and is again
    worse = START | GOOD | {"loss": 0.65}
    assert resumed.add(20, worse) == line_after(GOOD, {"loss": 0.65})
