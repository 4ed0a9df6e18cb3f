"""Responses drawn from a decoder: one jitted program of prefill and cached decoding.

    sampler = build_sampler(model, max_new_tokens=64, stop=(tokenizer.eos_token_id,))
    drawn = sampler(params, prompts, seed=0, temperature=0.7, samples=4)       # arrays [B, 4, 64]
    texts = generate(sampler, params, token_ids, batch_size=32, seed=0)        # lists, any lengths

A draw depends on the seed, the prompt's id, the sample's number and the token's place in the
response, and on nothing else: not on the batch, its order or padding, nor on the devices.
"""

from __future__ import annotations

import dataclasses
import itertools
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
from dpojax.sharding import ROWS, constrain, to_host

SHORTEST = 16  # columns of the narrowest batch of prompts
ROOM = 64  # tokens of a response that the cache has room for at first; then it doubles
GATHERED = 32  # tokens after which `generate` first leaves out responses that stopped; doubles, too


class Prompts(NamedTuple):
    """Token ids, int32 [B, P], padded on the right; lengths and ids, int32 [B].

    A prompt of length 0 is a dummy that fills up a batch: nothing is drawn for it.
    """

    tokens: Array
    lengths: Array
    ids: Array


class Begun(NamedTuple):
    """Where each of B prompts stands that ends in the begin of a response, int32 [B]."""

    sample: Array  # the number of that response
    place: Array  # how many tokens of it there are


class Samples(NamedTuple):
    """N responses to each of B prompts; 0 behind their ends.

    Attributes:
      tokens: int32 [B, N, T].
      logprobs: float32 [B, N, T], nats: of the policy itself (temperature 1, whole vocabulary),
        whatever the tokens were drawn with; what `token_logprobs` gives.
      behaviour: float32 [B, N, T], nats: of the distribution that the tokens were drawn from, with
        its temperature and truncation; 0 where greedy.
      lengths: int32 [B, N], the stop token included.
      stopped: bool [B, N], whether the last token is a stop token.
    """

    tokens: Array
    logprobs: Array
    behaviour: Array
    lengths: Array
    stopped: Array


class Sample(NamedTuple):
    """One response on the host: arrays [its length], as in `Samples`."""

    tokens: np.ndarray
    logprobs: np.ndarray
    behaviour: np.ndarray
    stopped: bool


@dataclasses.dataclass(frozen=True)
class Sampler:
    """See `build_sampler`."""

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
        begun: Begun | None = None,
    ) -> Samples:
        """Draw `samples` responses to every prompt.

        Under a mesh (`jax.set_mesh`) prompts are spread over its rows and heads over `tensor`. Of
        one step, the logits [B, samples, vocabulary] exist at once.

        Args:
          seed: 0 <= seed < 2**32.
          temperature: what logits are divided by; 0 is greedy.
          top_k, top_p: see `truncate`, which they switch off by 0 and 1.
          samples: the one argument besides shapes that compiles anew.
          begun: the responses are those that the prompts end in; they draw what they would have.

        Raises:
          ValueError: a number out of its range.
        """
        for name, value, fine in (
            ("temperature", temperature, lambda x: 0 <= x < np.inf),
            ("top_k", top_k, lambda x: x >= 0),
            ("top_p", top_p, lambda x: 0 < x <= 1),
            ("samples", samples, lambda x: x >= 1),
        ):
            if not isinstance(value, Array) and not fine(value):
                raise ValueError(f"{name}: {value} is out of range")
        how = How(
            jnp.asarray(temperature, jnp.float32),
            jnp.asarray(top_k, jnp.int32),
            jnp.asarray(top_p, jnp.float32),
        )
        begun = begun or Begun(*np.zeros((2, len(prompts.ids)), np.int32))
        return _sample(self, samples, params, prompts, begun, jnp.asarray(seed, jnp.uint32), how)


def build_sampler(model: Model, *, max_new_tokens: int, stop: Sequence[int] = ()) -> Sampler:
    """A function (params, prompts, *, seed, ...) -> Samples; see `Sampler.__call__`.

    Args:
      stop: ids that end a response, of which they are the last token.

    Raises:
      ValueError: a model with a scalar head, a stop token outside the vocabulary.
    """
    return Sampler(model, max_new_tokens, tuple(int(token) for token in stop))


class How(NamedTuple):
    """Scalars: float32, int32, float32."""

    temperature: Array
    top_k: Array
    top_p: Array


class _State(NamedTuple):
    """Of the loop over tokens: the last tokens [B, N], whether a branch goes on, what was drawn."""

    token: Array
    alive: Array
    branches: Branches
    drawn: Samples


@partial(jax.jit, static_argnums=(0, 1))
def _sample(
    sampler: Sampler,
    samples: int,
    params: Params,
    prompts: Prompts,
    begun: Begun,
    seed: Array,
    how: How,
) -> Samples:
    model, tokens = sampler.model, sampler.max_new_tokens
    params = model.cast(params)
    head = model.head(params)
    hidden, cached = model.prefill(params, prompts.tokens, prompts.lengths)
    keys = _keys(seed, prompts.ids, begun.sample, samples)

    def draw_next(slot, hidden, state: _State) -> _State:
        logits = logits_of(constrain(hidden, ROWS, None, None), head)
        own = _fold_in(keys, jnp.broadcast_to(begun.place[:, None] + slot, keys.shape))
        return _record(state, slot, draw(logits, own, how), sampler.stop)

    def go_on(room, carry):
        slot, state = carry
        return (slot < room) & jnp.any(state.alive)

    def step(carry):
        slot, state = carry
        hidden, branches = model.decode(params, state.token, state.branches, slot - 1)
        return slot + 1, draw_next(slot, hidden, state._replace(branches=branches))

    first, *wider = _doubled(ROOM, tokens)  # a step reads all of the cache, filled or not
    shape = len(prompts.tokens), samples
    state = _State(
        jnp.zeros(shape, jnp.int32),
        jnp.broadcast_to(prompts.lengths[:, None] > 0, shape),
        branch(cached, samples, first),
        _empty(shape, tokens),
    )
    hidden = jnp.broadcast_to(hidden[:, None], (*shape, hidden.shape[-1]))
    carry = jnp.int32(1), draw_next(0, hidden, state)
    carry = jax.lax.while_loop(partial(go_on, first), step, carry)
    for room in wider:
        slot, state = carry
        carry = slot, state._replace(branches=widen(state.branches, room))
        carry = jax.lax.while_loop(partial(go_on, room), step, carry)
    return carry[1].drawn


def _doubled(first: int, tokens: int) -> list[int]:
    """`first`, twice that and so on up to `tokens`."""
    doubled = (first << i for i in itertools.count())
    return [*itertools.takewhile(lambda count: count < tokens, doubled), tokens]


def _keys(seed: Array, ids: Array, first: Array, samples: int) -> Array:
    """A key for each sample of each prompt, [B, samples]; `first` are the numbers of the first."""
    # Not the default generator, which a user may set: others give other bits in other batches.
    key = jax.random.key(seed, impl="threefry2x32")
    of_prompt = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)
    numbers = first[:, None] + jnp.arange(samples)[None]
    return _fold_in(jnp.broadcast_to(of_prompt[:, None], numbers.shape), numbers)


def _fold_in(keys: Array, numbers: Array) -> Array:
    """A new key for each of [B, samples]."""
    return jax.vmap(jax.vmap(jax.random.fold_in))(keys, numbers)


def _empty(shape: tuple[int, int], tokens: int) -> Samples:
    numbers = jnp.zeros((*shape, tokens), jnp.float32)
    return Samples(
        jnp.zeros((*shape, tokens), jnp.int32),
        numbers,
        numbers,
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, bool),
    )


def _record(state: _State, slot, new: tuple[Array, Array, Array], stop: tuple[int, ...]) -> _State:
    """The state with what `draw` gave, for the branches that are alive."""
    alive, drawn = state.alive, state.drawn
    token, logprob, behaviour = new
    token = jnp.where(alive, token, 0)
    at_stop = alive & jnp.isin(token, jnp.asarray(stop, jnp.int32))

    def put(array, value):
        value = jnp.where(alive, value, 0)[..., None]
        return jax.lax.dynamic_update_slice_in_dim(array, value, slot, axis=2)

    drawn = Samples(
        put(drawn.tokens, token),
        put(drawn.logprobs, logprob),
        put(drawn.behaviour, behaviour),
        drawn.lengths + alive,
        drawn.stopped | at_stop,
    )
    return state._replace(token=token, alive=alive & ~at_stop, drawn=drawn)


def draw(logits: Array, keys: Array, how: How) -> tuple[Array, Array, Array]:
    """One token of every distribution, by the Gumbel maximum.

    Args:
      logits: float32 [B, N, V]. keys: [B, N].

    Returns:
      tokens, int32, their log-probs, and their log-probs as they were drawn: [B, N] each.
    """
    greedy = how.temperature == 0
    # Relative to the largest, so that no temperature can make them infinite.
    z = (logits - jnp.max(logits, -1, keepdims=True)) / jnp.maximum(how.temperature, 1e-20)
    z = truncate(jnp.where(greedy, logits, z), how.top_k, how.top_p)
    gumbel = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[2:])))
    noise = jax.lax.cond(greedy, lambda _: jnp.zeros_like(z), gumbel, keys)
    token = jnp.argmax(z + noise, axis=-1).astype(jnp.int32)
    of_token = lambda x: jnp.take_along_axis(x, token[..., None], axis=-1)[..., 0]
    logprob, behaviour = (of_token(x) - jax.nn.logsumexp(x, axis=-1) for x in (logits, z))
    return token, logprob, jnp.where(greedy, 0.0, behaviour)


def truncate(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Logits [..., V] with -inf at the tokens that are not to be drawn.

    First the top_k largest stay (0: all); of their distribution then the fewest, largest first,
    that together have the probability top_p (1: all; Holtzman et al. 2020, arXiv:1904.09751,
    section 3.1). Equal logits stay or go together.
    """

    def by_count(z):
        return _largest(z, jnp.ones_like(z), top_k.astype(jnp.float32))

    def by_mass(z):
        mass = jnp.exp(z - jnp.max(z, -1, keepdims=True))
        return _largest(z, mass, top_p * jnp.sum(mass, -1))

    logits = jax.lax.cond(top_k > 0, by_count, lambda z: z, logits)
    return jax.lax.cond(top_p < 1, by_mass, lambda z: z, logits)


def _largest(z: Array, weight: Array, target: Array) -> Array:
    """z [..., V], but -inf below the highest threshold that leaves a sum of weights >= `target`.

    Where not even all weights sum to it, nothing is cut. The threshold is found bit by bit, in 32
    sums over V and without a sort: floats are ordered as their bits are, once those of negative
    ones are turned around.
    """
    bits = jax.lax.bitcast_convert_type(z, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits >= sign, ~bits, bits | sign)

    def with_bit(i, threshold):
        higher = threshold | (sign >> i)
        left = jnp.sum(jnp.where(order >= higher[..., None], weight, 0), axis=-1)
        return jnp.where(left >= target, higher, threshold)

    threshold = jnp.zeros(z.shape[:-1], jnp.uint32)
    threshold = jax.lax.fori_loop(0, 32, lambda i, t: with_bit(i.astype(jnp.uint32), t), threshold)
    return jnp.where(order >= threshold[..., None], z, -jnp.inf)


def generate(
    sampler: Sampler,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    ids: Sequence[int] | None = None,
    **how,
) -> list[list[Sample]]:
    """`samples` responses to each prompt, in the order of the prompts, without padding.

    Prompts of similar lengths share a batch of fixed size, whose width is a power of two, so few
    shapes are compiled. In a run of several processes all call it, and all get everything.

    Args:
      prompts: token ids, of any lengths.
      ids: what randomness is keyed by; by default the index of each prompt.
      how: the keywords of `Sampler.__call__`: seed, temperature, top_k, top_p, samples.

    Raises:
      ValueError: a prompt that is empty, has an id outside the vocabulary, or is too long for the
        model's positions (its index is named); no positive batch size; not one id a prompt.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: must be positive, got {batch_size}")
    ids = range(len(prompts)) if ids is None else ids
    if len(ids) != len(prompts):
        raise ValueError(f"ids: {len(ids)} for {len(prompts)} prompts")
    prompts = [np.asarray(prompt) for prompt in prompts]
    for index, prompt in enumerate(prompts):
        _check(index, prompt, sampler)
    samples = how.pop("samples", 1)
    if samples < 1:
        raise ValueError(f"samples: {samples} is out of range")
    numbers = range(samples)
    found = [[_Response(prompt, id, n) for n in numbers] for prompt, id in zip(prompts, ids)]
    _draw_all(sampler, params, found, batch_size, how)
    return [[response.sample() for response in own] for own in found]


@dataclasses.dataclass
class _Response:
    """A response to a prompt as far as it is drawn: arrays of tokens, log-probs and behaviour."""

    prompt: np.ndarray
    id: int
    number: int
    parts: list[Sample] = dataclasses.field(default_factory=list)

    @property
    def context(self) -> np.ndarray:
        return np.concatenate([self.prompt, *(part.tokens for part in self.parts)])

    def sample(self) -> Sample:
        arrays = (np.concatenate(values) for values in zip(*(part[:3] for part in self.parts)))
        return Sample(*arrays, self.parts[-1].stopped)


def _draw_all(
    sampler: Sampler,
    params: Params,
    responses: list[list[_Response]],
    batch_size: int,
    how: dict,
) -> None:
    """Draw all responses, those of a prompt together, to their ends.

    Responses stop at very different lengths, and a batch takes as long as its longest. So those
    that go on after some tokens are put into new batches without the others, each behind a prompt
    of its own: what they have said so far, which costs little to read again, all at once.
    """
    groups, done = responses, 0
    for length in _stages(sampler, [own[0].prompt for own in responses]):
        part = dataclasses.replace(sampler, max_new_tokens=length - done)
        groups = sorted(groups, key=lambda group: len(group[0].prompt))
        for start in range(0, len(groups), batch_size):
            chosen = groups[start : start + batch_size]
            firsts = [group[0] for group in chosen]
            batch = pad([r.context for r in firsts], [r.id for r in firsts], batch_size)
            begun = Begun(*np.zeros((2, batch_size), np.int32))
            begun.sample[: len(firsts)] = [r.number for r in firsts]
            begun.place[: len(firsts)] = done
            how = how | {"samples": len(chosen[0])}
            drawn = to_host(part(params, batch, begun=begun, **how))
            for row, group in enumerate(chosen):
                for response, sample in zip(group, _trimmed(drawn, row)):
                    response.parts.append(sample)
        groups = [[r] for group in groups for r in group if not r.parts[-1].stopped]
        done = length


def _stages(sampler: Sampler, prompts: Sequence[np.ndarray]) -> list[int]:
    """Lengths of responses at which those that go on are gathered, and the limit.

    They are not where nothing stops, nor where prompts are most of what would be read again.
    """
    limit = sampler.max_new_tokens
    longest = max(map(len, prompts), default=0)
    return _doubled(GATHERED, limit) if sampler.stop and longest <= limit else [limit]


def pad(prompts: Sequence[np.ndarray], ids: Sequence[int], batch_size: int) -> Prompts:
    """A batch of `batch_size` prompts, dummies at its end; its width is a power of two."""
    width = SHORTEST
    while width < max(map(len, prompts)):
        width *= 2
    tokens = np.zeros((batch_size, width), np.int32)
    lengths, own = np.zeros((2, batch_size), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row], own[row] = len(prompt), ids[row]
    return Prompts(tokens, lengths, own)


def _check(index: int, prompt: np.ndarray, sampler: Sampler) -> None:
    config = sampler.model.config
    if not len(prompt):
        raise ValueError(f"prompt {index}: it is empty; give it at least one token (BOS)")
    if not (prompt.min() >= 0 and prompt.max() < config.vocab_size):
        raise ValueError(f"prompt {index}: it has an id outside 0 .. {config.vocab_size - 1}")
    if len(prompt) + sampler.max_new_tokens > config.max_positions:
        raise ValueError(
            f"prompt {index}: {len(prompt)} tokens and {sampler.max_new_tokens} new ones, but the "
            f"model has {config.max_positions} positions; cut the prompt or lower max_new_tokens"
        )


def _trimmed(drawn: Samples, row: int) -> list[Sample]:
    own = Samples(*(x[row] for x in drawn))
    return [
        Sample(*(x[n, :length] for x in own[:3]), bool(own.stopped[n]))
        for n, length in enumerate(own.lengths)
    ]
