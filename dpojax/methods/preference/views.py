"""What a loss can read from a batch: log-probs by response, pair, ranking or label.

There is one view for each form of data. `arguments.py` says which of its methods gives which
argument of a loss. Arrays keep the leading axes of the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpojax import losses
from dpojax.data.rows import Rows
from dpojax.logprobs import TokenStatistics
from dpojax.losses import NO_REFERENCE, GapStatistics, HeadTail, Pair
from dpojax.training.objective import Hyper
from dpojax.training.responses import all_pairs, response_sums


@dataclasses.dataclass(frozen=True)
class View:
    """A batch of any form.

    Attributes:
      tokens: statistics of the policy, [..., R, S].
      rows: the batch.
      hyper: traced options.
      settings: options that are not traced.
    """

    tokens: TokenStatistics
    rows: Rows
    hyper: Hyper
    settings: Mapping[str, Any]

    @cached_property
    def logprobs(self) -> Array:
        """The policy's log-prob of each response, nats, [..., R, E, K]."""
        return self.sums(self.tokens.logprob)

    @cached_property
    def loss_tokens(self) -> Array:
        """The policy's token log-probs as a loss sees them, [..., R, S]; humanline clamps them."""
        if "humanline_low" not in self.settings:
            return self.tokens.logprob
        return losses.humanline_logprobs(
            self.tokens.logprob,
            self.rows.reference,
            low=self.hyper["humanline_low"],
            high=self.hyper["humanline_high"],
        )

    @cached_property
    def loss_logprobs(self) -> Array:
        """The policy's log-prob of each response as a loss sees it, nats, [..., R, E, K]."""
        return self.sums(self.loss_tokens)

    @cached_property
    def reference_logprobs(self) -> Array:
        """The reference's log-prob of each response, nats, [..., R, E, K].

        Zero where the rows carry none: the loss needs no reference.
        """
        if self.rows.reference is None:
            return jnp.zeros_like(self.logprobs)
        return self.sums(self.rows.reference)

    @cached_property
    def token_counts(self) -> Array:
        """The responses' lengths in tokens, float, [..., R, E, K]."""
        return self.sums(jnp.ones(self.rows.response.shape, jnp.float32))

    def sums(self, values: Array) -> Array:
        """Sum per-token values [..., R, S] by response: [..., R, E, K]."""
        return response_sums(values, self.rows)

    def reward_inputs(self) -> tuple[Any, Any, Any]:
        """What a reward is made of: log-probs of policy and reference, nats, and lengths.

        Three trees of one structure. Other than what the loss takes, the policy's log-probs are not
        clamped by humanline.
        """
        values = self.logprobs, self.reference_logprobs, self.token_counts
        return tuple(map(all_pairs, values))

    def delta(self) -> Array:
        """BCO's reward shift, a scalar: the running mean of all rewards, or 0."""
        return self.hyper["delta"]

    def counts(self) -> Array:
        """As how many equal ones each entry of `mask` counts: its weight, or 0 without a loss."""
        mask, weight = self.mask(), self.rows.weight
        return mask * weight.reshape(*weight.shape, *[1] * (mask.ndim - weight.ndim))


class PairView(View):
    """All pairs of a better and a worse response of an example, [..., R, E, P].

    P = K (K - 1) / 2.
    """

    def policy(self) -> Pair:
        """What the loss takes as the policy's log-probs.

        LD-DPO and f-divergences put other scores in their place.
        """
        return self._policy_and_reference[0]

    def reference(self) -> Pair:
        """What the loss takes as the reference's log-probs."""
        return self._policy_and_reference[1]

    def lengths(self) -> Pair:
        """Lengths in tokens, float."""
        return all_pairs(self.token_counts)

    def reward_inputs(self) -> tuple[Pair, Pair, Pair]:
        return *self._as_loss_sees(self.tokens.logprob, self.logprobs), self.lengths()

    def present(self) -> Array:
        """Which pairs have both responses, bool."""
        both = all_pairs(self.rows.present)
        return both.chosen & both.rejected

    def tie(self) -> Array:
        """1 where the two responses share a rank, float."""
        rank = all_pairs(self.rows.rank)
        return (rank.chosen == rank.rejected).astype(jnp.float32)

    def mask(self) -> Array:
        """Which pairs state a preference, bool."""
        return self.present() & (self.tie() == 0)

    def nll(self) -> Array:
        """-log policy of the best response, for every pair of its example.

        The option `nll_norm` says whether it is a sum or a mean over tokens.
        """
        best, length = self.logprobs[..., :1], self.token_counts[..., :1]  # [..., R, E, 1]
        value = -best if self.settings["nll_norm"] == "sum" else -best / jnp.maximum(length, 1)
        return jnp.broadcast_to(value, self.present().shape)

    def scores(self) -> Pair:
        """The data's own scores of the responses."""
        return all_pairs(self.rows.scores)

    def offset(self) -> Array:
        """alpha log(score_w - score_l), Amini et al. 2024. The gap is clipped to at least 1e-6."""
        scores = self.scores()
        gap = scores.chosen - scores.rejected
        return self.hyper["alpha"] * jnp.log(jnp.maximum(gap, 1e-6))

    def score_gap(self) -> Array:
        """score_w - score_l, for MaPPO, clipped to [0, 1].

        Gaps above 1 are refused where data are read. Below 0, the scores contradict the preference.
        """
        scores = self.scores()
        return jnp.clip(scores.chosen - scores.rejected, 0.0, 1.0)

    def probability(self) -> Array:
        """Bradley-Terry's probability of the preference, sigmoid(scale (score_w - score_l))."""
        scores = self.scores()
        return jax.nn.sigmoid(self.hyper["scale"] * (scores.chosen - scores.rejected))

    def kl(self) -> Pair:
        """KL(reference || policy), summed over each response's tokens, nats."""
        return all_pairs(self.sums(self.tokens.kl))

    def batch_gap(self) -> Array:
        """The mean of d_w - d_l over the whole batch, a scalar, nats."""
        ratio = losses.log_ratios(self.policy(), self.reference())
        return losses.gap_statistics(ratio.chosen - ratio.rejected, self.counts()).mean

    def gap_mean(self) -> Array:
        """The mean of d_w / n_w - d_l / n_l over the whole batch, a scalar, nats."""
        return self._gap_per_token.mean

    def gap_std(self) -> Array:
        """The standard deviation of d_w / n_w - d_l / n_l over the whole batch, a scalar, nats."""
        return self._gap_per_token.std

    def steps(self) -> Array:
        """Which way beta goes (`losses.epsilon_steps`); 0 where no perturbed policy was scored."""
        if self.tokens.perturbed is None:
            return jnp.zeros(self.present().shape)
        away, towards = (all_pairs(self.sums(tokens)) for tokens in self.tokens.perturbed)
        return losses.epsilon_steps(all_pairs(self.logprobs), away, towards)

    def beta_factor(self) -> Array:
        """By what epsilon-DPO multiplies beta after the batches before this one, a scalar."""
        return jnp.exp(self.hyper["delta"] - self.log_beta_change())

    def log_beta_change(self) -> Array:
        """What this batch adds to the logarithm of that factor: -log(1 + epsilon mean(steps))."""
        counts = self.counts()
        mean = (self.steps() * counts).sum() / jnp.maximum(counts.sum(), 1e-30)
        return -jnp.log1p(self.hyper["epsilon"] * mean)

    def weight(self) -> Array | None:
        """WPO's weights of the pairs; None without the option `wpo`."""
        if "wpo" not in self.settings:
            return None
        log_collision = None
        if self.settings["wpo"] == "corrected":
            log_collision = all_pairs(self.sums(self.tokens.log_collision))
        return losses.wpo_weights(
            all_pairs(self.logprobs),
            lengths=self.lengths(),
            log_collision=log_collision,
            clamp=self.hyper.get("wpo_clamp"),
        )

    @cached_property
    def _gap_per_token(self) -> GapStatistics:
        ratio = losses.per_token(losses.log_ratios(self.policy(), self.reference()), self.lengths())
        return losses.gap_statistics(ratio.chosen - ratio.rejected, self.counts())

    @cached_property
    def _policy_and_reference(self) -> tuple[Pair, Pair]:
        return self._as_loss_sees(self.loss_tokens, self.loss_logprobs)

    def _as_loss_sees(self, tokens: Array, logprobs: Array) -> tuple[Pair, Pair]:
        """Scores of policy and reference, from the policy's log-probs of tokens and responses."""
        policy, reference = all_pairs(logprobs), all_pairs(self.reference_logprobs)
        if "ld_alpha" in self.settings:
            policy, reference = losses.ld_logprobs(
                _head_tail(self, tokens, policy),
                _head_tail(self, self.rows.reference, reference),
                alpha=self.hyper["ld_alpha"],
                weight_reference=self.settings["ld_weight_reference"],
            )
        if kind := self.settings.get("divergence"):
            alpha = self.hyper.get("divergence_alpha")
            scores = losses.divergence_scores(policy, reference, kind, alpha=alpha)
            return scores, NO_REFERENCE
        return policy, reference


class RankedView(View):
    """Whole rankings, best first, [..., R, E, K]."""

    def policy(self) -> Array:
        """The policy's log-probs, nats."""
        return self.loss_logprobs

    def reference(self) -> Array:
        """The reference's log-probs, nats."""
        return self.reference_logprobs

    def mask(self) -> Array:
        """Which responses exist, bool."""
        return self.rows.present

    def ranks(self) -> Array:
        """How many responses are better, int."""
        return self.rows.rank

    def scores(self) -> Array:
        """The data's own scores of the responses."""
        return self.rows.scores

    def targets(self) -> Array:
        """lambda-DPO's targets: softmax(scale * scores) over the responses to a prompt."""
        scores = self.hyper["scale"] * jnp.where(self.mask(), self.scores(), 0.0)
        # A list without a response has no distribution; the loss does not count it.
        share = jax.nn.softmax(scores, where=self.mask() | ~self.mask().any(-1, keepdims=True))
        return jnp.where(self.mask(), share, 0.0)

    def values(self) -> Array:
        """A*-PO's V* of each response's prompt, from the scores of all responses to it."""
        beta = self.hyper["value_beta"]
        values = losses.optimal_values(self.rows.scores, self.rows.present, beta=beta)
        return jnp.broadcast_to(values[..., None], self.rows.scores.shape)


class LabelledView(View):
    """Single labelled responses, [..., R, E]. A second one of a row is a mismatched response."""

    def policy(self) -> Array:
        """The policy's log-probs, nats."""
        return self.loss_logprobs[..., 0]

    def reference(self) -> Array:
        """The reference's log-probs, nats."""
        return self.reference_logprobs[..., 0]

    def desirable(self) -> Array:
        """The labels, bool."""
        return self.rows.desirable

    def mask(self) -> Array:
        """Which responses exist, bool."""
        return self.rows.present[..., 0]

    def lengths(self) -> Array:
        """Lengths in tokens, float."""
        return self.token_counts[..., 0]

    def reward_inputs(self) -> tuple[Array, Array, Array]:
        values = self.logprobs, self.reference_logprobs, self.token_counts
        return tuple(x[..., 0] for x in values)

    def nll(self) -> Array:
        """-log policy, nats: by the option `nll_norm` a sum or a mean over tokens."""
        if self.settings["nll_norm"] == "sum":
            return -self.logprobs[..., 0]
        return -self.logprobs[..., 0] / jnp.maximum(self.lengths(), 1)

    def kl(self) -> Array:
        """KTO's z, from the mismatched responses of the whole batch; a scalar, nats."""
        ratio = (self.loss_logprobs - self.reference_logprobs)[..., 1]
        return losses.kto_baseline(ratio, self.rows.present[..., 1] * self.rows.weight)


def _head_tail(view: PairView, values: Array, total: Pair) -> HeadTail:
    """Sums over each response's tokens up to the shorter response's length, and the rest.

    Args:
      view: of the pairs.
      values: per token, [..., R, S].
      total: sums over whole responses, [..., R, E, P].
    """
    rows, counts = view.rows, view.token_counts
    responses = rows.present.shape[-1]
    example = jnp.maximum(rows.response, 0)[..., None] // responses  # [..., R, S, 1]
    partner = jnp.take_along_axis(counts, example, axis=-2)  # [..., R, S, K] lengths
    inside = _index_in_response(rows.response)[..., None] < partner
    by_partner = jax.vmap(view.sums, in_axes=-1, out_axes=-1)
    heads = by_partner(jnp.where(inside, values[..., None], 0.0))  # [..., R, E, K, K]
    better, worse = np.triu_indices(responses, k=1)
    head = Pair(heads[..., better, worse], heads[..., worse, better])
    return HeadTail(head, jax.tree.map(jnp.subtract, total, head))


def _index_in_response(response: Array) -> Array:
    """How many tokens of its response stand before each scored token, [..., R, S] int."""
    place = jnp.broadcast_to(jnp.arange(response.shape[-1]), response.shape)
    first = jnp.concatenate(
        [jnp.ones_like(response[..., :1], bool), response[..., 1:] != response[..., :-1]], axis=-1
    )
    start = jax.lax.cummax(jnp.where(first, place, 0), axis=response.ndim - 1)
    return place - start
