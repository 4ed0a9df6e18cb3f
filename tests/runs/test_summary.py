"""The table of a preference stage, where a whole run would show no more."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest

from dpojax.stages import preference_summary
from dpojax.stages.data import StageData


def stage(loss: str, label=None):
    data = StageData([SimpleNamespace(label=label)], 0, {})
    no_adapters, same_policy = SimpleNamespace(adapters=""), SimpleNamespace(path="")
    return SimpleNamespace(
        config=SimpleNamespace(loss=loss, lora=no_adapters, reference=same_policy),
        loss=SimpleNamespace(name=loss, options={}),
        batches=SimpleNamespace(data=data),
        hyper={"beta": 0.1},
        programs=SimpleNamespace(objective=SimpleNamespace(baseline=None)),
    )


def test_held_out_pairs_that_are_all_ties_have_no_accuracy():
    before, after = (defaultdict(lambda: math.nan) for _ in range(2))
    after |= {"loss": 1.25, "rewards/accuracies": math.nan}
    kl_per_token = {"before": 0.0, "after": 0.5}
    text = preference_summary._table(stage("dpo_ties"), 0, before, after, kl_per_token, {})
    assert text.count("no held-out pair states a preference") == 3
    assert "reward: beta (log p - log q), " in text
    assert "1.2500" in text


def test_an_accuracy_has_wilsons_interval():
    """Wilson 1927; 8 of 10: 0.490 to 0.943 (Brown, Cai and DasGupta 2001, equation 4)."""
    z, n, p = 1.959964, 10, 0.8
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = (100 * (middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    assert (low, high) == pytest.approx((49.0, 94.3), abs=0.05)
    assert preference_summary._accuracy(p, n) == f"80.0 % [{low:.1f}, {high:.1f}]"
