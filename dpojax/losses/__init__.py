"""Preference losses: pure functions of log-probabilities, one number per example, no reduction.

Every loss takes sequence log-probs in nats, of any leading shape. A sequence log-prob is the sum
over the tokens of a response, its end token included. Some systems mean different things by one
name. There, the choice is a named argument without a default, and `preset` looks up what each
system chose.

Notation in the docstrings: y_w or w is the chosen (winning) response and y_l or l the rejected one;
l_w, l_l are the policy's log-probs, d_w, d_l the log-ratios log policy - log reference, r = beta d
the implicit rewards, m = r_w - r_l the margin, |y| the number of tokens.

Hyper-parameters may be arrays:

>>> import jax, jax.numpy as jnp
>>> policy = Pair(chosen=jnp.float32(-12.0), rejected=jnp.float32(-14.0))
>>> reference = Pair(chosen=jnp.float32(-12.5), rejected=jnp.float32(-13.0))
>>> betas = jnp.array([0.1, 0.5])
>>> losses = jax.vmap(lambda beta: dpo(policy, reference, beta=beta))(betas)
>>> [f"{loss:.3f}" for loss in losses.tolist()]
['0.621', '0.387']
"""

from dpojax.losses.absolute import (
    RunningMean,
    apo_down,
    apo_zero,
    bco,
    nca,
    sppo,
    update_baseline,
)
from dpojax.losses.adaptive import (
    GapStatistics,
    alpha_dpo,
    beta_dpo,
    epsilon_dpo,
    epsilon_steps,
    gap_statistics,
)
from dpojax.losses.baselines import bradley_terry, plackett_luce_scores, sft, unlikelihood
from dpojax.losses.divergences import chipo, divergence_scores
from dpojax.losses.forgetting import npo, simnpo
from dpojax.losses.humanline import humanline_logprobs
from dpojax.losses.margin import (
    discopop,
    dpo,
    dpo_norm,
    gpo,
    hinge,
    implicit_rewards,
    ipo,
    log_ratios,
    per_token,
)
from dpojax.losses.noise import dpo_soft, dpo_ties, exo, robust
from dpojax.losses.offsets import dpop, mappo, odpo, rpo, tdpo, uni_dpo
from dpojax.losses.pair import NO_REFERENCE, Pair
from dpojax.losses.presets import PRESETS, preset
from dpojax.losses.ranked import lambda_dpo, plackett_luce
from dpojax.losses.reference_free import alphapo, cpo, orpo, simper, simpo, slic, tpo_l
from dpojax.losses.regression import astar_po, optimal_values
from dpojax.losses.transport import aot, aot_unpaired
from dpojax.losses.unpaired import apo_zero_unpaired, bco_unpaired, kto, kto_baseline
from dpojax.losses.weights import HeadTail, ld_logprobs, mixture, shared_length, wpo_weights

__all__ = [
    "NO_REFERENCE",
    "PRESETS",
    "GapStatistics",
    "HeadTail",
    "Pair",
    "RunningMean",
    "alpha_dpo",
    "alphapo",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "apo_zero_unpaired",
    "astar_po",
    "bco",
    "bco_unpaired",
    "beta_dpo",
    "bradley_terry",
    "chipo",
    "cpo",
    "discopop",
    "divergence_scores",
    "dpo",
    "dpo_norm",
    "dpo_soft",
    "dpo_ties",
    "dpop",
    "epsilon_dpo",
    "epsilon_steps",
    "exo",
    "gap_statistics",
    "gpo",
    "hinge",
    "humanline_logprobs",
    "implicit_rewards",
    "ipo",
    "kto",
    "kto_baseline",
    "lambda_dpo",
    "ld_logprobs",
    "log_ratios",
    "mappo",
    "mixture",
    "nca",
    "npo",
    "odpo",
    "optimal_values",
    "orpo",
    "per_token",
    "plackett_luce",
    "plackett_luce_scores",
    "preset",
    "robust",
    "rpo",
    "sft",
    "shared_length",
    "simnpo",
    "simper",
    "simpo",
    "slic",
    "sppo",
    "tdpo",
    "tpo_l",
    "uni_dpo",
    "unlikelihood",
    "update_baseline",
    "wpo_weights",
]


def __dir__() -> list[str]:
    """The public names alone: the files that losses stand in would hide them in a completion."""
    return __all__
