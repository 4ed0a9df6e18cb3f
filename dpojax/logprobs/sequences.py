"""Log-probs of whole sequences, and sums over several responses of one row."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpojax.head import Head, sum_dtype
from dpojax.logprobs.checks import require_integers, values_if_known
from dpojax.logprobs.tokens import by_token, token_logprobs


class SequenceLogprobs(NamedTuple):
    """Of the tokens that a mask picks from each sequence, [...] each."""

    sums: Array  # sum of their log-probs, nats
    means: Array  # sums / lengths, nats a token; 0 for a sequence without such tokens
    lengths: Array  # how many they are, int32


def sequence_logprobs(logits: Array, tokens: Array, mask: Array) -> SequenceLogprobs:
    """Log-probs of sequences, from the logits of a causal language model.

    The shift to the next token is done here: logits[..., t, :] predict tokens[..., t + 1], as those
    of Flax's and Hugging Face's models do. So the first token has no log-prob, whatever its mask.

    Args:
      logits: [..., T, V], any float dtype; log-probs are computed in float32 (or float64).
      tokens: [..., T], int. What the mask leaves out may be anything, -100 for instance.
      mask: [..., T], bool or 0 and 1: True for the tokens of the response, its end token included;
        False for the prompt and for padding.

    Returns:
      `SequenceLogprobs`, [...] each.

    Raises:
      TypeError, ValueError: shapes or dtypes that do not belong together.

    >>> logits = jnp.zeros((1, 4, 8))  # of a model that finds all 8 tokens equally likely
    >>> tokens = jnp.array([[5, 2, 7, 1]])
    >>> response = jnp.array([[False, False, True, True]])
    >>> computed = sequence_logprobs(logits, tokens, response)
    >>> print(f"{computed.sums[0]:.4f} = 2 log 1/8, {computed.lengths[0]} tokens")
    -4.1589 = 2 log 1/8, 2 tokens
    """
    _check_sequences("logits", logits, tokens, mask)
    mask = jnp.asarray(mask[..., 1:], bool)
    targets = jnp.where(mask, tokens[..., 1:], 0)

    def logprobs(logits: Array, targets: Array) -> Array:
        logits = logits.astype(sum_dtype(logits))
        of_targets = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return of_targets - jax.nn.logsumexp(logits, axis=-1)

    return _summed(by_token(logprobs, logits[..., :-1, :], targets), mask)


def sequence_logprobs_from_hidden(
    hidden: Array, head: Head, tokens: Array, mask: Array, *, max_logits: int = 2**25
) -> SequenceLogprobs:
    """What `sequence_logprobs` computes, from hidden states: no logits of all tokens in memory.

    Args:
      hidden: [..., T, D], the model's last hidden states, behind its final norm.
      head: what the model multiplies them with.
      tokens, mask: as in `sequence_logprobs`.
      max_logits: as in `token_logprobs`.

    >>> hidden = jax.random.normal(jax.random.key(0), (1, 4, 16))  # model(tokens), without its head
    >>> head = Head(weight=jax.random.normal(jax.random.key(1), (8, 16)))  # [V, D]
    >>> tokens, response = jnp.array([[5, 2, 7, 1]]), jnp.array([[False, False, True, True]])
    >>> by_head = sequence_logprobs_from_hidden(hidden, head, tokens, response)
    >>> by_logits = sequence_logprobs(hidden @ head.weight.T, tokens, response)
    >>> bool(jnp.allclose(by_head.sums, by_logits.sums, atol=1e-5))
    True
    """
    _check_sequences("hidden", hidden, tokens, mask)
    mask = jnp.asarray(mask[..., 1:], bool)
    targets = jnp.where(mask, tokens[..., 1:], 0)
    logprobs = token_logprobs(hidden[..., :-1, :], head, targets, max_logits=max_logits)
    return _summed(logprobs, mask)


def _check_sequences(name: str, outputs: Array, tokens: Array, mask: Array) -> None:
    shape = np.shape(tokens)
    if np.shape(outputs)[:-1] != shape or np.shape(mask) != shape:
        raise ValueError(
            f"{name} {np.shape(outputs)}, tokens {shape} and mask {np.shape(mask)} do not belong "
            f"together: the shape of {name} is that of tokens and one axis more, and that of mask "
            "is that of tokens"
        )
    require_integers("tokens", tokens)
    if not jnp.issubdtype(mask.dtype, jnp.bool_) and not jnp.issubdtype(mask.dtype, jnp.integer):
        raise TypeError(f"mask must be boolean, or 0 and 1 as integers; got {mask.dtype}")


def _summed(logprobs: Array, mask: Array) -> SequenceLogprobs:
    sums = jnp.sum(jnp.where(mask, logprobs, 0), axis=-1)
    lengths = jnp.sum(mask, axis=-1, dtype=jnp.int32)
    return SequenceLogprobs(sums, sums / jnp.maximum(lengths, 1), lengths)


def sum_by_response(values: Array, response: Array, slots: int) -> Array:
    """Sum per-token values over the tokens of each of several responses that share a row.

    `response` is no mask: it holds numbers, and 0 is the first response. For a mask use
    `sequence_logprobs`, or `jnp.where(mask, values, 0).sum(-1)`.

    Args:
      values: [R, T].
      response: [R, T], int: the slot of the response that each token belongs to, below `slots`; -1
        for padding.
      slots: S, how many responses a row can hold.

    Returns:
      [R, S]; 0 for slots without tokens, and NaN for a row whose `response` is not below `slots`.

    Raises:
      TypeError: `response` is no array of integers.
      ValueError: `response` is not below `slots`, where that is known before the program runs.

    >>> logprobs = jnp.array([[-1.0, -2.0, -4.0, -8.0]])
    >>> sum_by_response(logprobs, jnp.array([[0, 0, 1, -1]]), slots=2).tolist()
    [[-3.0, -4.0]]
    """
    require_integers("response (the number of the response, no mask)", response)
    known = values_if_known(response)
    if known is not None and np.any(known >= slots):
        raise ValueError(
            f"response holds {known.max()}, and there are {slots} slots; it counts from "
            "0, and padding is -1 (a mask of 0 and 1 would sum what it leaves out)"
        )
    belongs = response[..., None] == jnp.arange(slots)[(None,) * response.ndim]  # [R, T, S]
    sums = jnp.sum(jnp.where(belongs, values[..., None], 0), axis=-2)
    impossible = jnp.any(response >= slots, axis=-1, keepdims=True)
    return jnp.where(impossible, jnp.nan, sums)


def of_response(values: Array, response: Array) -> Array:
    """Give every token the value of the response that it belongs to.

    Args:
      values: [R, S].
      response: [R, T], int: the slot of the response that each token belongs to; -1 for padding.

    Returns:
      [R, T]; padding gets the value of slot 0, which has no meaning.
    """
    return jnp.take_along_axis(values, jnp.maximum(response, 0), axis=-1)
