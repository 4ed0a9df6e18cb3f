"""What a loss may look at in a batch: its arguments, computed from log-probs and rows.

Each view has one attribute per name in `options.FROM_ROWS` that its form of data can answer.
Arrays keep the leading axes of the rows: pairs are [..., R, E, P], rankings [..., R, E, K] and
labelled responses [..., R, E].
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
from dpojax.logprobs import TokenStatistics, sum_by_response
from dpojax.losses import NO_REFERENCE, HeadTail, Pair
from dpojax.training.objective import Hyper


@dataclasses.dataclass(frozen=True)
class View:
    """A batch of any form. `settings` are the resolved options that are not traced."""

    tokens: TokenStatistics
    rows: Rows
    hyper: Hyper
    settings: Mapping[str, Any]

    def sums(self, values: Array) -> Array:
        """Per-token values [..., S] summed by response: [..., R, E, K]."""
        present = self.rows.present
        slots = present.shape[-2] * present.shape[-1]
        return sum_by_response(values, self.rows.response, slots).reshape(present.shape)

    @cached_property
    def logprobs(self) -> Array:
        """Of the policy's responses, nats, [..., R, E, K]."""
        return self.sums(self.tokens.logprob)

    @cached_property
    def reference_logprobs(self) -> Array:
        """Of the reference's; zero where rows carry none (a reference-free loss)."""
        if self.rows.reference is None:
            return jnp.zeros_like(self.logprobs)
        return self.sums(self.rows.reference)

    @cached_property
    def token_counts(self) -> Array:
        """The responses' lengths, float, [..., R, E, K]."""
        return self.sums(jnp.ones(self.rows.response.shape, jnp.float32))

    @property
    def delta(self) -> Array:
        return self.hyper["delta"]


class PairView(View):
    """All pairs of a better and a worse response of an example."""

    def pair(self, values: Array) -> Pair:
        """[..., K] by response as better and worse [..., P], P = K (K - 1) / 2."""
        better, worse = np.triu_indices(self.rows.present.shape[-1], k=1)
        return Pair(values[..., better], values[..., worse])

    @cached_property
    def plain_policy(self) -> Pair:
        """Log-probs of the pairs, before any weighting of their tokens."""
        return self.pair(self.logprobs)

    @cached_property
    def plain_reference(self) -> Pair:
        return self.pair(self.reference_logprobs)

    @cached_property
    def _policy_and_reference(self) -> tuple[Pair, Pair]:
        policy, reference = self.plain_policy, self.plain_reference
        if "ld_alpha" in self.settings:
            policy, reference = losses.ld_logprobs(
                self._head_tail(self.tokens.logprob, policy),
                self._head_tail(self.rows.reference, reference),
                alpha=self.hyper["ld_alpha"],
                weight_reference=self.settings["ld_weight_reference"],
            )
        if kind := self.settings.get("divergence"):
            alpha = self.hyper.get("divergence_alpha")
            return losses.divergence_scores(policy, reference, kind, alpha=alpha), NO_REFERENCE
        return policy, reference

    @property
    def policy(self) -> Pair:
        return self._policy_and_reference[0]

    @property
    def reference(self) -> Pair:
        return self._policy_and_reference[1]

    @cached_property
    def lengths(self) -> Pair:
        return self.pair(self.token_counts)

    @cached_property
    def present(self) -> Array:
        """Which pairs have both responses, bool."""
        both = self.pair(self.rows.present)
        return both.chosen & both.rejected

    @cached_property
    def tie(self) -> Array:
        """1 where the two responses share a rank."""
        rank = self.pair(self.rows.rank)
        return (rank.chosen == rank.rejected).astype(jnp.float32)

    @cached_property
    def mask(self) -> Array:
        """Which pairs state a preference, bool."""
        return self.present & (self.tie == 0)

    @cached_property
    def nll(self) -> Array:
        """Of the best response, a sum or a mean over tokens, for all pairs of its example."""
        best, length = self.logprobs[..., :1], self.token_counts[..., :1]
        value = -best if self.settings["nll_norm"] == "sum" else -best / jnp.maximum(length, 1)
        return jnp.broadcast_to(value, self.present.shape)

    @cached_property
    def scores(self) -> Pair:
        """What the data say the responses are worth."""
        return self.pair(self.rows.scores)

    @cached_property
    def offset(self) -> Array:
        """alpha log(score_w - score_l), Amini et al. 2024; not above 0 where the gap is."""
        gap = self.scores.chosen - self.scores.rejected
        return self.hyper["alpha"] * jnp.log(jnp.maximum(gap, 1e-6))

    @cached_property
    def probability(self) -> Array:
        """Bradley-Terry's, sigmoid(scale (score_w - score_l))."""
        return jax.nn.sigmoid(self.hyper["scale"] * (self.scores.chosen - self.scores.rejected))

    @cached_property
    def kl(self) -> Pair:
        """Sums over the responses' tokens of KL(reference || policy), nats."""
        return self.pair(self.sums(self.tokens.kl))

    @cached_property
    def weight(self) -> Array | None:
        """WPO's weights of the pairs, or None."""
        if "wpo" not in self.settings:
            return None
        corrected = self.settings["wpo"] == "corrected"
        return losses.wpo_weights(
            self.plain_policy,
            lengths=self.lengths,
            log_collision=self.pair(self.sums(self.tokens.log_collision)) if corrected else None,
            clamp=self.hyper.get("wpo_clamp"),
        )

    def _head_tail(self, values: Array, total: Pair) -> HeadTail:
        """Sums over the tokens before and behind the shorter response's length."""
        rows, counts = self.rows, self.token_counts
        responses = rows.present.shape[-1]
        example = jnp.maximum(rows.response, 0)[..., None] // responses
        partner = jnp.take_along_axis(counts, example, axis=-2)  # [..., S, K] lengths
        inside = _index_in_response(rows.response)[..., None] < partner
        by_partner = jax.vmap(self.sums, in_axes=-1, out_axes=-1)
        heads = by_partner(jnp.where(inside, values[..., None], 0.0))  # [..., E, K, K]
        better, worse = np.triu_indices(responses, k=1)
        head = Pair(heads[..., better, worse], heads[..., worse, better])
        return HeadTail(head, jax.tree.map(jnp.subtract, total, head))


class RankedView(PairView):
    """Whole rankings, best first. Its pairs are there for the metrics."""

    @property
    def policy(self) -> Array:
        return self.logprobs

    @property
    def reference(self) -> Array:
        return self.reference_logprobs

    @property
    def mask(self) -> Array:
        return self.rows.present

    @property
    def ranks(self) -> Array:
        return self.rows.rank


class LabelledView(View):
    """Single responses with a label; a second one of the same row is a mismatched response."""

    @property
    def policy(self) -> Array:
        return self.logprobs[..., 0]

    @property
    def reference(self) -> Array:
        return self.reference_logprobs[..., 0]

    @property
    def desirable(self) -> Array:
        return self.rows.desirable

    @property
    def mask(self) -> Array:
        return self.rows.present[..., 0]

    @cached_property
    def kl(self) -> Array:
        """KTO's z, from the mismatched responses of the whole batch; a scalar, nats."""
        ratio = (self.logprobs - self.reference_logprobs)[..., 1]
        return losses.kto_baseline(ratio, self.rows.present[..., 1])


def _index_in_response(response: Array) -> Array:
    """How many tokens of its response stand before each scored token, [..., S] int."""
    place = jnp.broadcast_to(jnp.arange(response.shape[-1]), response.shape)
    first = jnp.concatenate(
        [jnp.ones_like(response[..., :1], bool), response[..., 1:] != response[..., :-1]], axis=-1
    )
    start = jax.lax.cummax(jnp.where(first, place, 0), axis=response.ndim - 1)
    return place - start
