"""Log-probs under logits that are moved away from the reference, and towards it (epsilon-DPO)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from dpojax.head import Head, gather_width, logits_of
from dpojax.logprobs.checks import check_reference, check_tokens
from dpojax.logprobs.divergence import map_token_chunks, token_chunk_count
from dpojax.logprobs.tokens import PerturbedLogprobs, by_token


def perturbed_logprobs(
    hidden: Array,
    head: Head,
    reference_hidden: Array,
    reference_head: Head,
    targets: Array,
    *,
    epsilon: ArrayLike,
    max_logits: int = 2**25,
) -> PerturbedLogprobs:
    """Compute log p(target) under logits z +- epsilon (z - z_reference); no gradient.

    Lee et al. 2025 (epsilon-DPO): these estimate the policies that training with beta / (1 +
    epsilon) and beta / (1 - epsilon) would have given. `losses.epsilon_steps` compares them. One
    chunk of tokens at a time has logits.

    Args:
      hidden, head: the policy's hidden states, [..., T, D], and its head.
      reference_hidden, reference_head: those of the reference.
      targets: [..., T], token ids.
      epsilon: size of the perturbation, in (0, 1), a scalar.
      max_logits: how many float32 logits may exist at once, of all three distributions together.

    Raises:
      TypeError, ValueError: as `token_logprobs`; the two models are not of the same tokens and the
        same vocabulary; several values of epsilon (use `jax.vmap`).
    """
    check_tokens(hidden, head, targets)
    check_reference(hidden, head, reference_hidden, reference_head)
    if jnp.ndim(epsilon):
        raise ValueError(f"epsilon has shape {jnp.shape(epsilon)} and must be a scalar")

    def compute(hidden, reference_hidden, targets, epsilon, *weights_and_biases):
        weight, bias, other_weight, other_bias = weights_and_biases
        policy_head = head._replace(weight=gather_width(weight), bias=bias)
        other_head = reference_head._replace(weight=gather_width(other_weight), bias=other_bias)

        def of_chunk(chunk: tuple[Array, Array, Array]) -> PerturbedLogprobs:
            logits = logits_of(chunk[0], policy_head)  # [..., t, V]
            # 0 where both models are equal, so that both perturbed policies are the policy.
            change = epsilon * (logits - logits_of(chunk[1], other_head))
            return PerturbedLogprobs(
                away=_picked(logits + change, chunk[2]), towards=_picked(logits - change, chunk[2])
            )

        # Three arrays of logits exist at once.
        count = token_chunk_count(targets.shape, len(head.weight), max_logits / 3)
        arrays = hidden, reference_hidden, targets[..., None]
        return map_token_chunks(of_chunk, arrays, count)

    arrays = *head[:2], *reference_head[:2]  # of each its weight and its bias
    numbers = jax.lax.stop_gradient((hidden, reference_hidden, jnp.asarray(epsilon), arrays))
    hidden, reference_hidden, epsilon, arrays = numbers
    return by_token(compute, hidden, reference_hidden, targets, epsilon, *arrays)


def _picked(logits: Array, targets: Array) -> Array:
    """Log-probs [..., t] of targets [..., t, 1] under logits [..., t, V]."""
    at_target = jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
    return at_target - jax.nn.logsumexp(logits, axis=-1)
