"""Each option of a loss has one source and one value, or is refused by its name."""

import pickle

import jax
import numpy as np
import pytest

from dpojax.methods import preference
from dpojax.methods.preference.arguments import FORMS, FromBatch, source_of
from dpojax.methods.preference.options import LOSS_TABLE, Loss, arguments

from .conftest import GIVEN, example, micro_batch, with_reference


def test_an_option_comes_from_the_config_then_the_preset_then_the_default():
    assert preference.resolve("dpo", {})["beta"] == 0.1
    assert preference.resolve("ipo", {}, "emdpo") == {"beta": 0.1, "length_norm": "sum"}
    assert preference.resolve("ipo", {"length_norm": "sum"}, "trl-1.16")["length_norm"] == "sum"
    assert preference.resolve("bco", {}, "trl-1.16")["baseline"] == "zero"
    assert preference.resolve("bco", {}, "trl-0.24")["baseline"] == "running"
    assert preference.resolve("bco", {}, "llama-factory")["baseline"] == "running"
    mixed = {"weights": (1.0, 0.2), "nll_norm": "mean"}
    assert preference.resolve("dpo+sft", mixed, "trl-1.16")["nll_norm"] == "mean"
    with pytest.raises(ValueError, match="nll_norm: cpo needs it"):  # its tokens count the prompt
        preference.resolve("cpo", {}, "trl-1.16")
    given = {"ld_alpha": 0.5, "wpo": "corrected"}
    around = preference.resolve("dpo", given, "trl-0.24")
    assert around["ld_weight_reference"] is False
    assert around["wpo_clamp"] == 1.0


def test_resolved_options_resolve_to_themselves():
    for loss in (*preference.LOSSES, "dpo+bco+sft"):
        once = preference.resolve(loss, GIVEN.get(loss, {}))
        assert preference.resolve(loss, once) == once
    around = {"ld_alpha": 0.5, "wpo": "plain", "divergence": "alpha", "divergence_alpha": 0.5}
    once = preference.resolve("dpo", around, "trl-0.24")
    assert preference.resolve("dpo", once, "trl-0.24") == once


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        ("dppo", {}, r"loss: there is no 'dppo'; it must be one of dpo, "),
        ("ipo", {}, "length_norm: ipo needs it and has no default; it is 'sum' or 'mean'"),
        ("dpo", {"gamma": 0.5}, "gamma: dpo has no such option; it has: beta, label_smoothing"),
        ("dpo", {"beta": 0.0}, "beta: must be greater than 0, got 0.0"),
        ("dpo", {"label_smoothing": 0.5}, r"label_smoothing: must be in \[0, 0.5\), got 0.5"),
        ("exo", {"label_smoothing": 0.0}, "exo is infinite at 0"),
        ("dpo+ipo", {"length_norm": "sum"}, "loss_weights: dpo.ipo takes a finite number for each"),
        ("dpo+kto", {"weights": (1.0, 1.0)}, "mixes losses of labelled and pairs data"),
        ("dpo+dpo_norm", {"weights": (1.0, 1.0)}, "beta: the losses of .* have different defaults"),
        ("nca", {"divergence": "js"}, "divergence: only for losses of the margin"),
        ("dpo+dpo", {"weights": (1.0, 1.0)}, "loss: a mixture names each loss once"),
        ("dpo+nca", {"weights": (1.0, float("nan"))}, "loss_weights: .* a finite number"),
        ("dpo+dpo_ties", {"weights": (1.0, 1.0)}, "loss: dpo_ties counts tied pairs"),
        ("simpo", {"ld_alpha": 0.5}, "ld_alpha: simpo has no reference"),
        ("aot", {"wpo": "plain"}, "wpo: aot sorts the batch"),
        ("sft", {"wpo": "plain"}, "wpo: sft alone looks at no pair"),
        ("sft", {"divergence": "js"}, "divergence: sft alone looks at no pair"),
        ("dpo", {"beta": float("inf")}, "beta: must be greater than 0, got inf"),
        ("dpo", {"divergence": "alpha"}, "divergence_alpha: divergence 'alpha' takes it"),
        ("dpo", {"wpo_clamp": 1.0}, "wpo_clamp: means nothing without wpo"),
        ("dpo", {"ld_alpha": 0.5}, "ld_weight_reference: dpo needs it"),
        ("kto", {"wpo": "plain"}, "wpo: kto has no such option"),
    ],
)
def test_wrong_options_are_refused_by_name(loss, given, message):
    with pytest.raises(ValueError, match=message):
        preference.resolve(loss, given)


def test_a_preset_that_is_unknown_or_has_no_such_loss_is_refused():
    with pytest.raises(ValueError, match="preset: there is no 'trl'; there are "):
        preference.resolve("dpo", {}, "trl")
    with pytest.raises(ValueError, match="preset: openrlhf has none for kto"):
        preference.resolve("kto", {}, "openrlhf")


def test_every_argument_of_every_loss_has_a_source():
    for name, loss in LOSS_TABLE.items():
        for argument in arguments(name):
            source = source_of(name, loss.form, argument)
            if isinstance(source, FromBatch) and source.option:
                assert source.option in preference.OPTIONS


def test_every_source_is_read_by_some_loss():
    for form, (_, sources) in FORMS.items():
        names = [name for name, loss in LOSS_TABLE.items() if loss.form == form]
        used = {argument for name in names for argument in arguments(name)}
        assert sources.keys() - used <= {"mask"}


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_asks_for_scores_where_one_of_its_arguments_is_made_of_them(form):
    view_of, sources = FORMS[form]
    scores = [example(3, 4, scores=(0.9, 0.4)), example(2, 6, scores=(0.8, 0.7))]
    tokens, rows = with_reference(micro_batch(scores))
    numbers = {"alpha": 0.5, "scale": 2.0, "value_beta": 0.5, "epsilon": 0.1, "delta": 0.0}

    def read(source, rows):
        return jax.tree.leaves(source.read(view_of(tokens, rows, numbers, {"nll_norm": "sum"})))

    without = rows._replace(scores=0 * rows.scores)
    for name, source in sources.items():
        is_same = all(map(np.array_equal, read(source, rows), read(source, without)))
        assert source.needs_scores == (not is_same), name
    for loss in (loss for loss, entry in LOSS_TABLE.items() if entry.form == form):
        needs = any(sources[name].needs_scores for name in sources.keys() & arguments(loss))
        assert preference.loss_requirements(loss).scores == needs


def test_traced_options_are_the_numbers_of_a_step():
    for name in preference.LOSSES:
        options = preference.resolve(name, GIVEN.get(name, {}))
        traced = {x for x in options if preference.OPTIONS[x].traced and options[x] is not None}
        assert preference.hyper(options).keys() - {"delta"} == traced


def test_an_argument_without_a_source_says_what_to_add_where(monkeypatch):
    def of_temperature(policy, *, temperature):
        return temperature * policy.chosen

    monkeypatch.setitem(LOSS_TABLE, "heated", Loss(of_temperature))
    with pytest.raises(TypeError, match=r"'temperature'.* FORMS\['pairs'\] in .*arguments.py"):
        preference.objective("heated", {})


def test_a_refused_option_can_be_read_by_the_caller():
    with pytest.raises(preference.OptionError) as refused:
        preference.resolve("dpo", {"beta": -1.0})
    assert refused.value.option == "beta"
    assert refused.value.reason == "must be greater than 0, got -1.0"
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
