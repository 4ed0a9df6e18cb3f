"""docs/metrics.md defines every number of a run, and what it says of the code is so."""

import re

import pytest

from dpojax.evaluation import policies
from dpojax.methods import preference
from dpojax.stages import wins
from dpojax.sweeps.table import BEHIND
from dpojax.training.metric_names import NAMES, TRL

from . import metrics_page
from .methods.conftest import GIVEN

TEXT = metrics_page.PAGE.read_text(encoding="utf-8")
SYMBOL = re.compile(r"`(dpojax/[\w/]+\.py)`\s+\(((?:`\w+`(?:, )?)+)\)")


def test_metrics_of_samples_of_judges_and_of_sweeps_are_defined():
    sampled = {*policies.SAMPLE_METRICS, *policies.REWARD_METRICS, *policies.RANK_METRICS}
    assert {*sampled, *wins.METRICS, BEHIND} <= metrics_page.names()


def test_no_metric_is_defined_twice():
    listed = [x for cells in metrics_page.rows("name") for x in metrics_page.CODE.findall(cells[0])]
    assert len(listed) == len(set(listed))


def test_every_metric_says_its_unit_and_what_others_call_it():
    for cells in metrics_page.rows("name"):
        assert len(cells) == 5, cells
        assert cells[1], cells
    assert all(cells[3] and cells[4] for cells in metrics_page.rows("name"))


def test_what_the_page_says_is_in_a_file_is_there():
    places = SYMBOL.findall(TEXT)
    assert len(places) > 12
    for file, symbols in places:
        source = (metrics_page.ROOT / file).read_text(encoding="utf-8")
        for symbol in metrics_page.CODE.findall(symbols):
            assert re.search(rf"^\s*(def {symbol}\(|{symbol}\b.* = )", source, re.M), (file, symbol)


def test_names_for_dashboards_of_trl_stand_on_the_page():
    by_name = {
        name: cells
        for cells in metrics_page.rows("name")
        for name in metrics_page.CODE.findall(cells[0])
    }
    for ours, theirs in (NAMES[TRL]["train"] | {"kto/baseline": "kl"}).items():
        if ours != "num_tokens":  # the page names TRL's own number there, not transformers'
            assert f"`{theirs}`" in by_name[ours][3]


@pytest.mark.parametrize("loss", preference.LOSSES)
def test_the_reward_of_a_loss_is_the_one_that_the_page_says(loss):
    reward = preference.loss_reward(loss, preference.resolve(loss, GIVEN.get(loss, {})))
    table = {}
    for cells in metrics_page.rows("losses"):
        for name in metrics_page.CODE.findall(cells[0].partition(";")[0].partition("(")[0]):
            table[name] = cells[1:]
    formula, unit = table.get(loss, ["`beta (log p - log q)`", "nats"])
    assert formula.strip("`") == reward.formula
    assert unit.replace("none", "no unit") == reward.unit
