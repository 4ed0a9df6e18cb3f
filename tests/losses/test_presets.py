"""The table of what other systems mean."""

import inspect
import pathlib

import pytest
from every_loss import EVERY

from dpojax import losses
from dpojax.losses import PRESETS, preset

ENTRIES = [(source, loss) for source, table in PRESETS.items() for loss in table]


@pytest.mark.parametrize(("source", "loss"), ENTRIES)
def test_presets_are_arguments_of_the_loss_they_name(source, loss):
    parameters = inspect.signature(getattr(losses, loss)).parameters
    assert set(preset(source, loss)) <= set(parameters)


def test_unknown_presets_are_refused_with_a_list_of_those_there_are():
    with pytest.raises(KeyError, match=r"no preset 'trl'; there are: .*trl-1\.16"):
        preset("trl", "dpo")
    with pytest.raises(KeyError, match="'emdpo' has no loss 'kto'; it has: dpo, ipo"):
        preset("emdpo", "kto")


def test_a_preset_that_is_changed_changes_no_other():
    preset("trl-1.16", "dpo")["beta"] = 7.0
    assert preset("trl-1.16", "dpo")["beta"] != 7.0


def test_versions_of_trl_differ_where_the_compatibility_table_says():
    old, new = PRESETS["trl-0.24"], PRESETS["trl-1.16"]
    assert {name for name in new if old[name] != new[name]} == {
        "bco",
        "wpo_weights",
        "ld_logprobs",
    }


def test_the_docs_have_a_row_for_every_loss_and_every_disputed_argument():
    page = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "losses.md").read_text()
    of_losses, _ = page.split("## Training with them")  # whose table lists arguments
    rows = [line for line in of_losses.splitlines() if line.startswith("| `")]
    listed = {row.split("`")[1] for row in rows}
    assert {name.split()[0] for name in EVERY} - {"divergence_scores"} <= listed
    assert listed - {"l_w, l_l", "d_w, d_l", "r = β d", "n_w, n_l", "s(z)", "ε"} <= set(
        losses.__all__
    )
