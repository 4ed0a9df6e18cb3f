"""Values of the authors' code, of TRL's other trainers, open-instruct and NeMo, and an oracle."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax import losses
from dpojax.losses import NO_REFERENCE, Pair, preset

# The file says where each number came from.
GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden.json").read_text())
OTHERS = GOLDEN["others"]


def free(loss):
    return lambda p, r, n: loss(p, NO_REFERENCE, n)


def rpo(form):
    preset_of_nemo = preset("nemo-aligner", "rpo")
    return lambda p, r, n: losses.rpo(p, r, scores=Pair(1.0, 0.0), form=form, **preset_of_nemo)


def orpo_term(p, r, n):
    return -losses.orpo(p, beta=0.1, lengths=n, nll=0.0)


def kto(label):
    kl = losses.kto_baseline(jnp.array([0.4, -0.2, 0.3]))
    arguments = preset("trl-1.16", "kto")
    return lambda p, r, n: losses.kto(p, r, jnp.full(p.shape, label), kl=kl, **arguments)


def apo(label):
    return lambda p, r, n: losses.apo_zero_unpaired(p, r, jnp.full(p.shape, label), beta=0.1)


def alphapo(p, r, n):
    return losses.alphapo(p, beta=2.0, gamma=0.5, alpha=0.25, lengths=n)


def two_ranked(p, r, n):
    return losses.plackett_luce(jnp.stack(p, -1), jnp.stack(r, -1), beta=0.1)


def ipo(p, r, n, length_norm):
    return losses.ipo(p, r, beta=0.1, length_norm=length_norm, lengths=n)


PAIRED = {
    "emdpo dpo beta=0.1": lambda p, r, n: losses.dpo(p, r, beta=0.1, **preset("emdpo", "dpo")),
    "emdpo cdpo beta=0.1 ls=0.1": lambda p, r, n: losses.dpo(p, r, beta=0.1, label_smoothing=0.1),
    "emdpo ipo beta=0.1": lambda p, r, n: losses.ipo(p, r, beta=0.1, **preset("emdpo", "ipo")),
    "emdpo reference_free beta=0.1": free(lambda p, r, n: losses.dpo(p, r, beta=0.1)),
    "trl cpo sigmoid (no nll)": lambda p, r, n: losses.cpo(p, nll=0.0, **preset("trl-1.16", "cpo")),
    "trl cpo hinge": free(lambda p, r, n: losses.hinge(p, r, beta=0.1)),
    "trl cpo ipo (avg logps)": free(lambda p, r, n: ipo(p, r, n, "mean")),
    "trl simpo beta=2.0 gamma=0.5 (avg logps)": lambda p, r, n: losses.simpo(
        p, beta=2.0, gamma=0.5, lengths=n
    ),
    "trl alphapo simpo beta=2.0 gamma=0.5 alpha=0.25 (avg logps)": alphapo,
    "open-instruct dpo_norm beta=5.0 (avg logps, policy & ref)": lambda p, r, n: losses.dpo_norm(
        p, r, lengths=n, **preset("open-instruct", "dpo_norm")
    ),
    "open-instruct simpo beta=5.0 gamma_beta_ratio=0.3 (avg logps)": lambda p, r, n: losses.simpo(
        p, lengths=n, **preset("open-instruct", "simpo")
    ),
    "nemo-aligner rpo_bwd beta=0.2 scale=1 gt delta=1": rpo("bwd_kl"),
    "nemo-aligner rpo_fwd beta=0.2 scale=1 gt delta=1": rpo("fwd_kl"),
    "nemo-aligner rpo_sq beta=0.2 scale=1 gt delta=1": rpo("sq"),
}
KTO = "trl kto beta=0.1 kl=clip(mean([0.4,-0.2,0.3]),0) desirable=pc undesirable=pr w=1"
APO = "trl kto apo_zero_unpaired beta=0.1"
ORPO = "trl orpo beta=0.1 (avg logps)"
RANKED = "oracle plackett-luce K=4 beta=0.1 ranking=index order, implicit rewards beta*(pc-rc)"
TWO_RANKED = "oracle plackett-luce K=2 equals DPO"
OWN_TEST = {KTO, APO, ORPO, RANKED, TWO_RANKED}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def case():
    """Policy, reference and lengths of case A, in float64."""
    inputs = GOLDEN["trl_dpo"]["A"]["inputs"]
    return tuple(
        Pair(
            jnp.array(inputs[name]["chosen"], float),
            jnp.array(inputs[name]["rejected"], float),
        )
        for name in ("policy", "reference", "lengths")
    )


def close(got, want):
    """The recorded values are float32."""
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("entry", sorted(set(OTHERS) - OWN_TEST))
def test_values_are_those_of_the_other_systems(entry, case):
    got = PAIRED[entry](*case)
    close(got, OTHERS[entry]["per_pair"])
    close(got.mean(), OTHERS[entry]["mean"])


@pytest.mark.parametrize("entry", [e for e in OTHERS if e.startswith("emdpo")])
def test_implicit_rewards_are_those_of_the_authors(entry, case):
    reward = losses.implicit_rewards(case[0], case[1], 0.1)
    close(reward.chosen, OTHERS[entry]["chosen_rewards"])
    close(reward.rejected, OTHERS[entry]["rejected_rewards"])


@pytest.mark.parametrize(("entry", "loss"), [(KTO, kto), (APO, apo)])
def test_unpaired_losses_are_those_of_trl(entry, loss, case):
    policy, reference, lengths = case
    good = loss(True)(policy.chosen, reference.chosen, lengths)
    bad = loss(False)(policy.rejected, reference.rejected, lengths)
    close(good, OTHERS[entry]["chosen"])
    close(bad, OTHERS[entry]["rejected"])


def test_the_odds_ratio_term_is_that_of_trl(case):
    close(orpo_term(*case), OTHERS[ORPO]["beta_times_logsig_log_odds"])
    close(orpo_term(*case).mean() / 0.1, OTHERS[ORPO]["log_odds_ratio"])


def test_rankings_cost_what_the_oracle_says(case):
    policy, reference, _ = case
    close(losses.plackett_luce(policy.chosen, reference.chosen, beta=0.1), OTHERS[RANKED])
    close(two_ranked(*case), OTHERS[TWO_RANKED])


def test_every_recorded_entry_is_covered():
    assert set(OTHERS) == set(PAIRED) | OWN_TEST
