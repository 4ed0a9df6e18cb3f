"""The table of a preference stage, where a whole run would show no more."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest

from dpojax.stages import summary


def stage(loss: str, label=None):
    examples = [SimpleNamespace(label=label)]
    return SimpleNamespace(
        config=SimpleNamespace(loss=loss),
        data=SimpleNamespace(examples=examples),
        hyper={"beta": 0.1},
        objective=SimpleNamespace(baseline=None),
        starts_at_reference=True,
    )


def test_held_out_pairs_that_are_all_ties_have_no_accuracy():
    values = {"before": defaultdict(lambda: math.nan), "after": defaultdict(lambda: math.nan)}
    values["after"]["loss"] = 1.25
    text = summary._table(stage("dpo_ties"), 0, values, {"before": 0.0, "after": 0.5})
    assert text.count("no held-out pair states a preference") == 3
    assert "1.2500" in text


def test_an_accuracy_has_wilsons_interval():
    """Wilson 1927; 8 of 10: 0.490 to 0.943 (Brown, Cai and DasGupta 2001, equation 4)."""
    z, n, p = 1.959964, 10, 0.8
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    want = [(middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)]
    assert summary.interval(p, n) == pytest.approx(want, abs=1e-6)
