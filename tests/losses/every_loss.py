"""Every loss as one function of (policy, reference, lengths, beta), for laws that all obey."""

import jax
import jax.numpy as jnp

from dpojax import losses
from dpojax.losses import NO_REFERENCE, Pair

# Public names that are no losses: containers, parts and look-ups.
NO_LOSSES = {
    "NO_REFERENCE",
    "PRESETS",
    "GapStatistics",
    "HeadTail",
    "Pair",
    "RunningMean",
    "epsilon_steps",
    "gap_statistics",
    "implicit_rewards",
    "kto_baseline",
    "log_ratios",
    "optimal_values",
    "per_token",
    "preset",
    "shared_length",
    "update_baseline",
}


def of_pair(name, **arguments):
    """A reference-based pair loss with its other arguments fixed."""
    return lambda p, r, n, beta: getattr(losses, name)(p, r, beta=beta, **arguments)


def of_labels(name, **arguments):
    """An unpaired loss, the chosen response as a good one and the rejected one as a bad one."""
    loss = getattr(losses, name)
    return lambda p, r, n, beta: (
        loss(p.chosen, r.chosen, jnp.full(p.chosen.shape, True), beta=beta, **arguments)
        + loss(p.rejected, r.rejected, jnp.full(p.chosen.shape, False), beta=beta, **arguments)
    )


def of_divergence(kind, **arguments):
    return lambda p, r, n, beta: losses.dpo(
        losses.divergence_scores(p, r, kind, **arguments), NO_REFERENCE, beta=beta
    )


def length_desensitised(p, r, n, beta):
    halves = lambda pair: losses.HeadTail(*(Pair(pair.chosen / 2, pair.rejected / 2),) * 2)
    new, old = losses.ld_logprobs(halves(p), halves(r), alpha=0.5, weight_reference=True)
    return losses.dpo(new, old, beta=beta)


def weighted(p, r, n, beta):
    weight = losses.wpo_weights(p, lengths=n, log_collision=None, clamp=1.0)
    return weight * losses.dpo(p, r, beta=beta)


def humanline(p, r, n, beta):
    clamped = lambda p, r: losses.humanline_logprobs(p, r, low=-1.0, high=1.5)
    return losses.dpo(Pair(*map(clamped, p, r)), r, beta=beta)


def ranked(p, r, n, beta):
    return losses.plackett_luce(jnp.stack(p, -1), jnp.stack(r, -1), beta=beta)


def listed(p, r, n, beta):
    targets = jnp.broadcast_to(jnp.array([0.7, 0.3]), (*p.chosen.shape, 2))
    return losses.lambda_dpo(jnp.stack(p, -1), jnp.stack(r, -1), targets, beta=beta)


PAIR = {
    "dpo": of_pair("dpo", label_smoothing=0.1),
    "dpo_norm": lambda p, r, n, beta: losses.dpo_norm(p, r, beta=beta, lengths=n),
    "dpo_soft": of_pair("dpo_soft", probability=0.7),
    "dpo_ties": of_pair("dpo_ties", tie=0.5, threshold=0.5),
    "ipo": of_pair("ipo", length_norm="sum"),
    "hinge": of_pair("hinge"),
    "robust": of_pair("robust", label_smoothing=0.1),
    "exo": of_pair("exo", label_smoothing=1e-3),
    "nca": of_pair("nca"),
    "bco": of_pair("bco", delta=0.3),
    "sppo": of_pair("sppo"),
    "apo_zero": of_pair("apo_zero"),
    "apo_down": of_pair("apo_down"),
    "discopop": of_pair("discopop", tau=0.05),
    "gpo": of_pair("gpo", convex="exponential"),
    "gpo squared": of_pair("gpo", convex="squared"),
    "gpo truncated": of_pair("gpo", convex="truncated_quadratic"),
    "beta_dpo": of_pair("beta_dpo", alpha=0.6, batch_gap=0.5, running_gap=0.2),
    "alpha_dpo": lambda p, r, n, beta: losses.alpha_dpo(
        p, r, beta=beta, gamma=0.5, alpha=0.1, gap_mean=0.1, gap_std=0.5, lengths=n
    ),
    "epsilon_dpo": of_pair("epsilon_dpo", epsilon=0.1, steps=-1.0),
    "chipo": of_pair("chipo", max_reward=float("inf")),
    "chipo clipped": of_pair("chipo", max_reward=1.0),
    "mappo": of_pair("mappo", score_gap=0.4),
    "uni_dpo": lambda p, r, n, beta: losses.uni_dpo(
        p,
        r,
        beta=beta,
        lengths=n,
        scores=Pair(8.0, 6.5),
        scale=0.1,
        margin=0.8,
        gamma=1.5,
        alpha=0.1,
        good_score=7.0,
    ),
    "odpo": of_pair("odpo", offset=0.5),
    "dpop": of_pair("dpop", penalty=50.0),
    "tdpo": lambda p, r, n, beta: losses.tdpo(
        p, r, beta=beta, kl=Pair(-p.chosen, -p.rejected), alpha=0.5, stop_chosen=True
    ),
    "rpo": of_pair("rpo", scores=Pair(2.0, -1.0), scale=1.0, form="bwd_kl"),
    "rpo fwd_kl": of_pair("rpo", scores=Pair(2.0, -1.0), scale=1.0, form="fwd_kl"),
    "rpo sq": of_pair("rpo", scores=Pair(2.0, -1.0), scale=1.0, form="sq"),
    "divergence_scores": of_divergence("forward_kl"),
    "divergence_scores js": of_divergence("js"),
    "divergence_scores alpha": of_divergence("alpha", alpha=2.0),
    "simpo": lambda p, r, n, beta: losses.simpo(p, beta=beta, gamma=0.5, lengths=n),
    "alphapo": lambda p, r, n, beta: losses.alphapo(p, beta=beta, gamma=0.5, alpha=0.25, lengths=n),
    "tpo_l": lambda p, r, n, beta: losses.tpo_l(
        p, beta=beta, gamma=0.5, alpha=1.0, nll=-p.chosen, lengths=n
    ),
    "simper": lambda p, r, n, beta: losses.simper(p, lengths=n),
    "cpo": lambda p, r, n, beta: losses.cpo(p, beta=beta, alpha=1.0, nll=-p.chosen),
    "orpo": lambda p, r, n, beta: losses.orpo(p, beta=beta, lengths=n, nll=-p.chosen),
    "slic": lambda p, r, n, beta: losses.slic(p, margin=beta, alpha=0.1, nll=-p.chosen),
    "plackett_luce": ranked,
    "lambda_dpo": listed,
    "plackett_luce_scores": lambda p, r, n, beta: losses.plackett_luce_scores(
        beta * jnp.stack(p, -1)
    ),
    "kto": of_labels("kto", kl=0.2, desirable_weight=1.0, undesirable_weight=1.3),
    "bco_unpaired": of_labels("bco_unpaired", delta=0.3),
    "apo_zero_unpaired": of_labels("apo_zero_unpaired"),
    "npo": of_labels("npo", retain_weight=1.0, nll=2.0),
    "simnpo": lambda p, r, n, beta: losses.simnpo(
        p.rejected,
        jnp.full(p.rejected.shape, False),
        beta=beta,
        gamma=0.5,
        lengths=n.rejected,
        retain_weight=1.0,
        nll=-p.rejected,
    ),
    "astar_po": lambda p, r, n, beta: losses.astar_po(p.chosen, r.chosen, 1.0, 0.3, beta=beta),
    "sft": lambda p, r, n, beta: losses.sft(p.chosen),
    "unlikelihood": lambda p, r, n, beta: losses.unlikelihood(p, alpha=beta),
    "bradley_terry": lambda p, r, n, beta: losses.bradley_terry(p, margin=1.0, centring=beta),
    "ld_logprobs": length_desensitised,
    "humanline_logprobs": humanline,
    "wpo_weights": weighted,
    "mixture": lambda p, r, n, beta: losses.mixture(
        [losses.dpo(p, r, beta=beta), losses.sft(p.chosen)], [0.8, beta]
    ),
}


def by_batch(loss):
    """`loss` of a batch [B], for arrays [..., B]."""

    def each(p, r, n, beta):
        mapped = loss
        for _ in p.chosen.shape[:-1]:
            mapped = jax.vmap(mapped, (0, 0, 0, None))
        return mapped(p, r, n, beta)

    return each


def beta_of_its_batch(p, r, n, beta):
    ratio = losses.log_ratios(p, r)
    gap = losses.gap_statistics(ratio.chosen - ratio.rejected).mean
    return losses.beta_dpo(p, r, beta=beta, alpha=0.6, batch_gap=gap, running_gap=0.1 * gap)


def alpha_of_its_batch(p, r, n, beta):
    ratio = losses.per_token(losses.log_ratios(p, r), n)
    mean, std = losses.gap_statistics(ratio.chosen - ratio.rejected)
    return losses.alpha_dpo(
        p, r, beta=beta, gamma=0.5, alpha=0.1, gap_mean=mean, gap_std=std, lengths=n
    )


BATCH = {
    "aot": of_pair("aot"),
    "aot_unpaired": of_pair("aot_unpaired"),
    "beta_dpo of its batch": by_batch(beta_of_its_batch),
    "alpha_dpo of its batch": by_batch(alpha_of_its_batch),
}
EVERY = PAIR | BATCH
