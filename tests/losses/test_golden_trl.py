"""Values and gradients of TRL 1.16's own loss block, for all entries that were recorded."""

import json
import pathlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax import losses
from dpojax.losses import NO_REFERENCE, Pair, preset

# The file says where each number came from.
CASES = json.loads((pathlib.Path(__file__).parent / "golden.json").read_text())["trl_dpo"]
ENTRIES = [(case, entry) for case, recorded in CASES.items() for entry in recorded["entries"]]

OURS = {
    "sigmoid": losses.dpo,
    "sigmoid_norm": losses.dpo_norm,
    "ipo": losses.ipo,
    "hinge": losses.hinge,
    "robust": losses.robust,
    "exo_pair": losses.exo,
    "nca_pair": losses.nca,
    "bco_pair": losses.bco,
    "sppo_hard": losses.sppo,
    "aot": losses.aot,
    "aot_unpaired": losses.aot_unpaired,
    "apo_zero": losses.apo_zero,
    "apo_down": losses.apo_down,
    "discopop": losses.discopop,
}
NEED_LENGTHS = ("ipo", "sigmoid_norm")
KINDS = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
ENTRY = re.compile(
    r"(?P<loss>\w+) beta=(?P<beta>[\d.]+)( label_smoothing=(?P<smoothing>[\d.]+))?"
    r"( f=(?P<kind>\w+))?( alpha=(?P<alpha>[\d.]+) \(fp32\))?"
)
MIXTURE = "MPO [sigmoid,bco_pair,sft] weights=[0.8,0.2,1.0] beta=0.1"
WEIGHTED = "sigmoid beta=0.1 use_weighting=True (log_sum_sq_probs=-0.5 everywhere)"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def read(case):
    """Policy, reference and lengths of a case, in float64."""
    inputs = CASES[case]["inputs"]
    return tuple(
        Pair(
            jnp.asarray(inputs[name]["chosen"], jnp.float64),
            jnp.asarray(inputs[name]["rejected"], jnp.float64),
        )
        for name in ("policy", "reference", "lengths")
    )


def token_mean(policy, lengths):
    """TRL's sft: the micro-batch's mean over tokens, the same for every pair."""
    mean = losses.sft(policy.chosen).sum() / lengths.chosen.sum()
    return jnp.broadcast_to(mean, policy.chosen.shape)


def our_loss(entry, policy, reference, lengths):
    """Our loss for an entry's name; a name that is not understood is an error."""
    if entry == MIXTURE:
        dpo = losses.dpo(policy, reference, beta=0.1)
        bco = losses.bco(policy, reference, **preset("trl-1.16", "bco"))
        return losses.mixture([dpo, bco, token_mean(policy, lengths)], [0.8, 0.2, 1.0])
    if entry == WEIGHTED:
        collision = jax.tree.map(lambda n: -0.5 * n, lengths)
        weigh = partial(losses.wpo_weights, policy, lengths=lengths, log_collision=collision)
        weight = weigh(**preset("trl-1.16", "wpo_weights"))
        return weight * losses.dpo(policy, reference, beta=0.1)
    settings = ENTRY.fullmatch(entry)
    assert settings, f"golden entry {entry!r} is not covered"
    if settings["loss"] == "sft":
        return token_mean(policy, lengths)
    loss = OURS[settings["loss"]]
    arguments = preset("trl-1.16", loss.__name__) | {"beta": float(settings["beta"])}
    if settings["smoothing"]:
        arguments["label_smoothing"] = float(settings["smoothing"])
    if settings["loss"] in NEED_LENGTHS:
        arguments["lengths"] = lengths
    if settings["kind"]:
        alpha = {"alpha": float(settings["alpha"])} if settings["alpha"] else {}
        policy = losses.divergence_scores(policy, reference, KINDS[settings["kind"]], **alpha)
        reference = NO_REFERENCE
    return loss(policy, reference, **arguments)


@pytest.mark.parametrize(("case", "entry"), ENTRIES)
def test_values_and_gradients_are_those_of_trl(case, entry):
    policy, reference, lengths = read(case)
    want = CASES[case]["entries"][entry]
    recorded_in_float32 = "fp32" in entry or "exo_pair" in entry  # exo: only its epsilon
    tolerance = 1e-6 if recorded_in_float32 else 1e-9
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    value, pull = jax.vjp(lambda p: our_loss(entry, p, reference, lengths), policy)
    (gradient,) = pull(jnp.ones_like(value) / value.size)
    close(value.mean(), want["loss"])
    close(gradient.chosen, want["gradient_chosen"])
    close(gradient.rejected, want["gradient_rejected"])
    per_pair = want["per_pair"]
    if entry == MIXTURE:
        value = token_mean(policy, lengths)  # recorded was the last loss of the mixture
    if entry.startswith("aot"):
        value, per_pair = np.sort(value), np.sort(per_pair)  # recorded in the order of quantiles
    close(value, per_pair)


def test_every_recorded_case_is_there():
    assert set(CASES) == {"A", "B_identical_policy_and_ref", "C_extreme"}
    assert len(ENTRIES) > 130
