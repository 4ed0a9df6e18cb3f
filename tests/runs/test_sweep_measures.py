"""What members of a sweep are compared by: no loss where it means another thing in each of them."""

import pytest

from dpojax.sweeps import table
from dpojax.sweeps.best import measure_keys

BETAS = [{"preference.beta": 0.1}, {"preference.beta": 1.0}]
RATES = [{"preference.learning_rate": 1e-3, "seed": 0}, {"preference.learning_rate": 1e-4}]
LINE = {"step": 5, "loss": 0.5, "rewards/accuracies": 0.7, "rewards/margins": 1.0}
LINE |= {"kl/per_token": 0.25}


@pytest.mark.parametrize(
    ("members", "keys"),
    [(BETAS, ["preference.beta"]), (RATES, []), ([BETAS[0]] * 2, []), ([*BETAS, *RATES], BETAS[0])],
)
def test_losses_of_another_beta_are_another_measure_and_those_of_another_rate_are_not(
    members, keys
):
    assert measure_keys(members, "preference") == [*keys]


def test_the_table_has_no_loss_where_it_cannot_be_compared():
    headings = [column.heading for column in table._columns({"a": LINE}, True)]
    assert headings == ["held-out loss", "accuracy, %", "margin, nats", "KL, nats/token"]
    shown = [column.heading for column in table._columns({"a": LINE}, False)]
    assert shown == headings[1:]
