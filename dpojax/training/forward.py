"""The forward passes that training, references and evaluation share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dpojax.data.rows import Rows
from dpojax.head import Head
from dpojax.logprobs import (
    TokenStatistics,
    perturbed_logprobs,
    token_kl,
    token_logprobs,
    token_statistics,
)
from dpojax.models import lora
from dpojax.models.decoder import Model
from dpojax.models.lora import LoraConfig
from dpojax.models.scores import response_scores
from dpojax.training.metrics import Metric
from dpojax.training.micro_batches import add_up, map_present, part_like
from dpojax.training.objective import Hyper
from dpojax.training.responses import answer_tokens

MAX_LOGITS = 2**25  # float32 logits that may exist at once: 128 MiB


class FrozenWeights(NamedTuple):
    """Weights that a step reads and never changes."""

    base: dict | None = None  # the model that adapters are added to
    reference: dict | None = None  # a live reference's, for objectives that need its distributions


NO_FROZEN_WEIGHTS = FrozenWeights()


class Distributions(NamedTuple):
    """What a model's next-token distributions at scored tokens are made of; see `Head`."""

    hidden: Array  # [M, R, S, D]
    weight: Array  # [V, D]
    bias: Array | None = None  # [V]


NO_NUMBERS: Hyper = {}

# (params, rows [R, ...] of one micro-batch, frozen weights, numbers of the method) -> outputs
Forward = Callable[[dict, Rows, FrozenWeights, Hyper], Any]


def scored_hidden(model: Model, params: dict, rows: Rows) -> Array:
    """Hidden states [R, S, D] at the columns that predict scored tokens."""
    hidden_RxTxD = model.apply(params, rows)
    return jnp.take_along_axis(hidden_RxTxD, rows.source[..., None], axis=1)


def row_logprobs(model: Model, params: dict, rows: Rows, *, max_logits: int = MAX_LOGITS) -> Array:
    """Log-prob of every scored token of one micro-batch, nats, [R, S]; undefined at padding."""
    hidden = scored_hidden(model, params, rows)
    return token_logprobs(hidden, model.head(params), rows.target, max_logits=max_logits)


def language_model(
    model: Model,
    *,
    statistics: tuple[str, ...] = (),
    max_logits: int = MAX_LOGITS,
) -> Forward:
    """Build the forward pass of a language model: `TokenStatistics` [R, S] of the scored tokens.

    Args:
      model: a decoder.
      statistics: what to compute besides the log-prob. `log_collision` and `perturbed` have no
        gradient. `kl` has one; it and `perturbed` read `frozen.reference`. `perturbed` reads
        hyper["epsilon"] as well.
      max_logits: float32 logits that may exist at once.
    """

    def forward(
        params: dict,
        rows: Rows,
        frozen: FrozenWeights = NO_FROZEN_WEIGHTS,
        hyper: Hyper = NO_NUMBERS,
    ) -> TokenStatistics:
        hidden, head = scored_hidden(model, params, rows), model.head(params)
        limit = {"max_logits": max_logits}
        tokens = TokenStatistics(token_logprobs(hidden, head, rows.target, **limit))
        if "log_collision" in statistics:
            constant = jax.lax.stop_gradient((hidden, head))
            collision = token_statistics(*constant, rows.target, **limit).log_collision
            tokens = tokens._replace(log_collision=collision)
        if not {"kl", "perturbed"} & set(statistics):
            return tokens
        reference = jax.lax.stop_gradient(scored_hidden(model, frozen.reference, rows))
        reference_head = jax.lax.stop_gradient(model.head(frozen.reference))
        if "kl" in statistics:
            kl = token_kl(reference, reference_head, hidden, head, **limit)
            tokens = tokens._replace(kl=kl)
        if "perturbed" in statistics:
            both, epsilon = (hidden, head, reference, reference_head), hyper["epsilon"]
            perturbed = perturbed_logprobs(*both, rows.target, epsilon=epsilon, **limit)
            tokens = tokens._replace(perturbed=perturbed)
        return tokens

    return forward


def adapted(forward: Forward, config: LoraConfig) -> Forward:
    """Turn a forward pass of a model's params into one of adapters over `frozen.base`.

    The live reference is the base, which is the model without its adapters, unless
    `frozen.reference` names another.
    """

    def of_adapters(
        adapters: dict, rows: Rows, frozen: FrozenWeights, hyper: Hyper = NO_NUMBERS
    ) -> Any:
        reference = frozen.base if frozen.reference is None else frozen.reference
        params = lora.adapt(frozen.base, adapters, config)
        return forward(params, rows, FrozenWeights(reference=reference), hyper)

    return of_adapters


def reward_model(model: Model) -> Forward:
    """Build the forward pass of a model with a scalar head: the responses' scores [R, E, K]."""

    def forward(
        params: dict,
        rows: Rows,
        frozen: FrozenWeights = NO_FROZEN_WEIGHTS,
        hyper: Hyper = NO_NUMBERS,
    ) -> Array:
        del frozen, hyper
        return response_scores(model.scores(params, model.apply(params, rows)), rows)

    return forward


def classifier(model: Model) -> Forward:
    """Build the forward pass of a model with labels: the logits [R, T, labels] of every token."""

    def forward(
        params: dict,
        rows: Rows,
        frozen: FrozenWeights = NO_FROZEN_WEIGHTS,
        hyper: Hyper = NO_NUMBERS,
    ) -> Array:
        del frozen, hyper
        return model.scores(params, model.apply(params, rows))

    return forward


def build_outputs(forward: Forward) -> Callable[..., Any]:
    """Build `forward` over micro-batches.

    Returns:
      (params, rows [M, R, ...], frozen=NO_FROZEN_WEIGHTS, hyper=NO_NUMBERS) -> outputs [M, ...].
    """

    def outputs(
        params: dict,
        rows: Rows,
        frozen: FrozenWeights = NO_FROZEN_WEIGHTS,
        hyper: Hyper = NO_NUMBERS,
    ) -> Any:
        return map_present(lambda part: forward(params, part, frozen, hyper), rows)

    return outputs


def build_score(model: Model, *, max_logits: int = MAX_LOGITS) -> Callable[..., TokenStatistics]:
    """Build the program that scores tokens without a gradient.

    The reference's log-probs, the identity check at step 0, a live reference and evaluation all
    come from this one program, so equal weights give equal numbers.

    Returns:
      (params, rows [M, R, ...], *, reference=None) -> statistics [M, R, S] of the scored tokens,
      zero at padding. `kl` is among them if `reference`, another model's params, is given.
    """

    def score(params: dict, rows: Rows, *, reference: dict | None = None) -> TokenStatistics:
        def one(part: Rows) -> TokenStatistics:
            hidden, head = scored_hidden(model, params, part), model.head(params)
            tokens = token_statistics(hidden, head, part.target, max_logits=max_logits)
            if reference is None:
                return tokens
            reference_hidden = scored_hidden(model, reference, part)
            reference_head = model.head(reference)
            kl = token_kl(reference_hidden, reference_head, hidden, head, max_logits=max_logits)
            return tokens._replace(kl=kl)

        tokens = map_present(one, rows)
        return jax.tree.map(lambda x: jnp.where(rows.response >= 0, x, 0.0), tokens)

    return score


def build_hidden(model: Model) -> Callable[[dict, Rows], Array]:
    """Build the hidden states that predict scored tokens, without a gradient.

    Returns:
      (params, rows [M, R, ...]) -> [M, R, S, D].
    """

    def hidden(params: dict, rows: Rows) -> Array:
        return map_present(lambda part: scored_hidden(model, params, part), rows)

    return hidden


def build_divergence(
    model: Model, *, max_logits: int = MAX_LOGITS
) -> Callable[[Distributions, Distributions, Rows], Metric]:
    """Build the exact KL(policy || reference) of next-token distributions.

    Returns:
      (policy, reference, rows [M, R, ...]) -> the sum over the answers' tokens, nats, and their
      number. Tokens of mismatched responses do not count.
    """

    def divergence(policy: Distributions, reference: Distributions, rows: Rows) -> Metric:
        heads = [Head(*x[1:], softcap=model.config.head_softcap) for x in (policy, reference)]

        def one(part: Rows, index: Array) -> Array:
            like = jax.ShapeDtypeStruct(
                (*part.response.shape, policy.hidden.shape[-1]), jnp.float32
            )
            hidden = (part_like(x.hidden, index, like) for x in (policy, reference))
            (policy_hidden, reference_hidden), (head, reference_head) = hidden, heads
            return token_kl(
                policy_hidden, head, reference_hidden, reference_head, max_logits=max_logits
            )

        scored = answer_tokens(rows)
        _, kl = add_up(lambda part, index: ((), one(part, index)), rows)
        return Metric(jnp.sum(jnp.where(scored, kl, 0.0)), jnp.sum(scored))

    return divergence
