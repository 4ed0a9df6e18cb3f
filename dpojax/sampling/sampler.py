"""The sampler: one jitted program of prefill and cached decoding.

Shapes in comments: B prompts, P tokens of a prompt, N samples of each prompt, T tokens of a
response, D width of the model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpojax.logprobs import logits_of
from dpojax.models.cache import Branches, branch, widen
from dpojax.models.decoder import Model, Params
from dpojax.sampling.draws import Draw, SamplingParams, draw
from dpojax.sharding import ROWS, constrain

FIRST_CACHE_TOKENS = 64  # tokens of a response that the cache holds at first; then it doubles


class SamplingError(ValueError):
    """Nothing can be drawn with these numbers or this prompt; the message names them."""


class Prompts(NamedTuple):
    """A batch of prompts, padded on the right.

    A prompt of length 0 is a dummy that fills up a batch: nothing is drawn for it.
    """

    tokens: Array  # int32 [B, P]
    lengths: Array  # int32 [B]
    ids: Array  # int32 [B]; randomness is keyed by them


class ResponsePrefix(NamedTuple):
    """For prompts that end with the first tokens of a response: which response, and how many."""

    sample: Array  # int32 [B]: the number of the sample
    length: Array  # int32 [B]: how many of its tokens the prompt already ends with


class Samples(NamedTuple):
    """N responses to each of B prompts; numbers after the end of a response are 0.

    Attributes:
      tokens: int32 [B, N, T].
      logprobs: float32 [B, N, T], nats, under the policy itself: temperature 1 and the whole
        vocabulary, whatever the tokens were drawn with. `token_logprobs` gives the same numbers.
      behaviour: float32 [B, N, T], nats, under the distribution that the tokens were drawn from,
        with its temperature and truncation; 0 where the draw was greedy.
      lengths: int32 [B, N], the stop token included.
      stopped: bool [B, N], whether the last token is a stop token.
    """

    tokens: Array
    logprobs: Array
    behaviour: Array
    lengths: Array
    stopped: Array


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A function (params, prompts, *, seed, ...) -> Samples; see `build_sampler`."""

    model: Model
    max_new_tokens: int
    stop: tuple[int, ...] = ()

    def __post_init__(self):
        if self.model.decode is None or self.model.config.scalar_head:
            raise ValueError("model: it cannot predict tokens one by one")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: must be positive, got {self.max_new_tokens}")
        for token in self.stop:
            if not 0 <= token < self.model.config.vocab_size:
                raise ValueError(f"stop: {token} is not an id of the model's vocabulary")

    def __call__(
        self,
        params: Params,
        prompts: Prompts,
        *,
        seed: int | Array,
        temperature: float | Array = 1.0,
        top_k: int | Array = 0,
        top_p: float | Array = 1.0,
        samples: int = 1,
        prefix: ResponsePrefix | None = None,
    ) -> Samples:
        """Draw `samples` responses to every prompt.

        Under a mesh (`jax.set_mesh`), prompts are spread over its rows and heads over `tensor`. The
        logits of one step, [B, N, V], exist at once.

        Args:
          params: the model's parameters.
          prompts: a batch, see `pad`.
          seed: 0 <= seed < 2**32.
          temperature: logits are divided by it; 0 is greedy.
          top_k: how many tokens may be drawn, see `truncate`; 0 switches it off.
          top_p: probability that these tokens together have, see `truncate`; 1 switches it off.
          samples: N. Besides shapes, this is the one argument whose change compiles anew.
          prefix: the prompts end with these first tokens of their responses. The other tokens are
            then drawn as if the whole response was drawn at once.

        Raises:
          ValueError: a number out of its range.
        """
        _check_ranges(temperature, top_k, top_p, samples)
        sampling_params = SamplingParams(
            temperature=jnp.asarray(temperature, jnp.float32),
            top_k=jnp.asarray(top_k, jnp.int32),
            top_p=jnp.asarray(top_p, jnp.float32),
        )
        prefix = prefix or _no_prefix(len(prompts.ids))
        seed = jnp.asarray(seed, jnp.uint32)
        return _sample(self, samples, params, prompts, prefix, seed, sampling_params)


def build_sampler(model: Model, *, max_new_tokens: int, stop: Sequence[int] = ()) -> Sampler:
    """Build a function (params, prompts, *, seed, ...) -> Samples; see `Sampler.__call__`.

    Args:
      model: a decoder with a language-model head.
      max_new_tokens: T, the most tokens of a response.
      stop: token ids that end a response. The stop token is the last token of the response.

    Raises:
      ValueError: a model with a scalar head, a stop token outside the vocabulary.
    """
    return Sampler(model, max_new_tokens, tuple(int(token) for token in stop))


def _check_ranges(temperature, top_k, top_p, samples) -> None:
    """Refuse Python numbers out of range. Arrays may be traced, so their values are not read."""
    if not isinstance(temperature, Array) and not 0 <= temperature < np.inf:
        raise SamplingError(f"temperature: must be finite and not negative, got {temperature}")
    if not isinstance(top_k, Array) and top_k < 0:
        raise SamplingError(f"top_k: must not be negative, got {top_k}")
    if not isinstance(top_p, Array) and not 0 < top_p <= 1:
        raise SamplingError(f"top_p: must be above 0 and at most 1, got {top_p}")
    if samples < 1:
        raise SamplingError(f"samples: must be positive, got {samples}")


def _no_prefix(batch_size: int) -> ResponsePrefix:
    zeros = np.zeros(batch_size, np.int32)
    return ResponsePrefix(sample=zeros, length=zeros)


class _LoopState(NamedTuple):
    """The state of the loop over tokens."""

    token: Array  # int32 [B, N], the last token of each response
    alive: Array  # bool [B, N], whether the response still goes on
    branches: Branches  # keys and values of prompts and responses
    samples: Samples  # what was drawn so far


@partial(jax.jit, static_argnums=(0, 1))
def _sample(
    sampler: Sampler,
    samples: int,
    params: Params,
    prompts: Prompts,
    prefix: ResponsePrefix,
    seed: Array,
    sampling_params: SamplingParams,
) -> Samples:
    model, max_tokens = sampler.model, sampler.max_new_tokens
    params = model.cast(params)
    head = model.head(params)
    hidden, cached_prompts = model.prefill(params, prompts.tokens, prompts.lengths)  # [B, D]
    keys = _sample_keys(seed, prompts.ids, prefix.sample, samples)

    def draw_next(slot, hidden, state: _LoopState) -> _LoopState:
        logits = logits_of(constrain(hidden, ROWS, None, None), head)  # [B, N, V]
        position = jnp.broadcast_to(prefix.length[:, None] + slot, keys.shape)
        drawn = draw(logits, _fold_in(keys, position), sampling_params)
        return _append(state, slot, drawn, sampler.stop)

    def goes_on(cache_tokens, carry):
        slot, state = carry
        return (slot < cache_tokens) & jnp.any(state.alive)

    def step(carry):
        slot, state = carry
        hidden, branches = model.decode(params, state.token, state.branches, slot - 1)
        return slot + 1, draw_next(slot, hidden, state._replace(branches=branches))

    # A step reads the whole cache, filled or not. So the cache starts small and grows.
    first_size, *larger_sizes = doubling_up_to(FIRST_CACHE_TOKENS, max_tokens)
    shape = len(prompts.tokens), samples
    state = _LoopState(
        token=jnp.zeros(shape, jnp.int32),
        alive=jnp.broadcast_to(prompts.lengths[:, None] > 0, shape),
        branches=branch(cached_prompts, samples, first_size),
        samples=_empty_samples(shape, max_tokens),
    )
    hidden = jnp.broadcast_to(hidden[:, None], (*shape, hidden.shape[-1]))
    carry = jnp.int32(1), draw_next(0, hidden, state)
    carry = jax.lax.while_loop(partial(goes_on, first_size), step, carry)
    for cache_tokens in larger_sizes:
        slot, state = carry
        carry = slot, state._replace(branches=widen(state.branches, cache_tokens))
        carry = jax.lax.while_loop(partial(goes_on, cache_tokens), step, carry)
    _, state = carry
    return state.samples


def doubling_up_to(first: int, limit: int) -> list[int]:
    """`first`, twice that and so on while below `limit`, and then `limit`."""
    sizes = []
    size = first
    while size < limit:
        sizes.append(size)
        size *= 2
    return [*sizes, limit]


def _sample_keys(seed: Array, ids: Array, first_sample: Array, samples: int) -> Array:
    """A key for each sample of each prompt, [B, N]; the first sample of a prompt has its number."""
    # Threefry by name and not the default generator, which a user may set: with others, the bits of
    # a key depend on the batch that it is in.
    key = jax.random.key(seed, impl="threefry2x32")
    prompt_keys = jax.vmap(partial(jax.random.fold_in, key))(ids)  # [B]
    numbers = first_sample[:, None] + jnp.arange(samples)[None]  # [B, N]
    return _fold_in(jnp.broadcast_to(prompt_keys[:, None], numbers.shape), numbers)


def _fold_in(keys: Array, numbers: Array) -> Array:
    """A new key for each entry of [B, N]."""
    return jax.vmap(jax.vmap(jax.random.fold_in))(keys, numbers)


def _empty_samples(shape: tuple[int, int], max_tokens: int) -> Samples:
    zeros = jnp.zeros((*shape, max_tokens), jnp.float32)
    return Samples(
        tokens=jnp.zeros((*shape, max_tokens), jnp.int32),
        logprobs=zeros,
        behaviour=zeros,
        lengths=jnp.zeros(shape, jnp.int32),
        stopped=jnp.zeros(shape, bool),
    )


def _append(state: _LoopState, slot, drawn: Draw, stop: tuple[int, ...]) -> _LoopState:
    """The state after a draw, which counts for the responses that still go on."""
    alive, samples = state.alive, state.samples
    token = jnp.where(alive, drawn.token, 0)
    at_stop = alive & jnp.isin(token, jnp.asarray(stop, jnp.int32))

    def write(array, value):  # [B, N, T], [B, N]
        value = jnp.where(alive, value, 0)[..., None]
        return jax.lax.dynamic_update_slice_in_dim(array, value, slot, axis=2)

    samples = Samples(
        tokens=write(samples.tokens, token),
        logprobs=write(samples.logprobs, drawn.logprob),
        behaviour=write(samples.behaviour, drawn.behaviour),
        lengths=samples.lengths + alive,
        stopped=samples.stopped | at_stop,
    )
    return state._replace(token=token, alive=alive & ~at_stop, samples=samples)
