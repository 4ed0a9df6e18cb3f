"""Responses to any number of prompts of any lengths, batch by batch, on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpojax import display, stopping
from dpojax.data.records import DataError
from dpojax.models.decoder import Params
from dpojax.sampling.sampler import (
    Prompts,
    ResponsePrefix,
    Sampler,
    Samples,
    SamplingError,
    doubling_up_to,
)
from dpojax.sharding import to_host
from dpojax.watchdog import beat

MIN_PROMPT_COLUMNS = 16  # width of the narrowest batch of prompts; wider ones are powers of two
# `generate` leaves out responses that have stopped after so many tokens, then after twice as many.
FIRST_REBATCH_TOKENS = 32


class Sample(NamedTuple):
    """One response on the host: arrays of its own length, [T], as in `Samples`."""

    tokens: np.ndarray  # [T]
    logprobs: np.ndarray  # [T]
    behaviour: np.ndarray  # [T]
    stopped: bool


def generate(
    sampler: Sampler,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int,
    ids: Sequence[int] | None = None,
    samples: int = 1,
    **how,
) -> list[list[Sample]]:
    """Draw `samples` responses to each prompt, in the order of the prompts, without padding.

    Prompts of similar lengths share a batch of fixed size, whose width is a power of two. So few
    shapes are compiled. In a run of several processes, all call it and all get all responses.

    Args:
      sampler: see `build_sampler`.
      params: the model's parameters.
      prompts: token ids, of any lengths.
      batch_size: prompts in a batch.
      ids: the randomness of each prompt is keyed by its id; by default its index.
      samples: responses to each prompt.
      how: seed, temperature, top_k and top_p, as for `Sampler.__call__`.

    Raises:
      ValueError: a prompt that is empty, has an id outside the vocabulary, or is too long for the
        model's positions (its index is named); no positive batch size; not one id for each prompt;
        a number out of its range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: must be positive, got {batch_size}")
    ids = range(len(prompts)) if ids is None else ids
    if len(ids) != len(prompts):
        raise ValueError(f"ids: {len(ids)} for {len(prompts)} prompts")
    if samples < 1:
        raise SamplingError(f"samples: must be positive, got {samples}")
    prompts = [np.asarray(prompt) for prompt in prompts]  # [its tokens] each
    for index, prompt in enumerate(prompts):
        _check_prompt(index, prompt, sampler)
    responses = [
        [_Response(prompt, id, number) for number in range(samples)]
        for prompt, id in zip(prompts, ids)
    ]
    _draw_all(sampler, params, responses, batch_size, how)
    return [[response.sample() for response in of_prompt] for of_prompt in responses]


@dataclasses.dataclass
class _Response:
    """A response to a prompt, as far as it is drawn: `parts` are consecutive stretches of it."""

    prompt: np.ndarray  # [its tokens]
    id: int
    number: int  # of the sample
    parts: list[Sample] = dataclasses.field(default_factory=list)

    @property
    def context(self) -> np.ndarray:
        """The prompt and the tokens so far."""
        return np.concatenate([self.prompt, *(part.tokens for part in self.parts)])

    @property
    def stopped(self) -> bool:
        return self.parts[-1].stopped

    def sample(self) -> Sample:
        return Sample(
            tokens=np.concatenate([part.tokens for part in self.parts]),
            logprobs=np.concatenate([part.logprobs for part in self.parts]),
            behaviour=np.concatenate([part.behaviour for part in self.parts]),
            stopped=self.stopped,
        )


def _draw_all(
    sampler: Sampler,
    params: Params,
    responses: list[list[_Response]],
    batch_size: int,
    how: dict,
) -> None:
    """Draw all responses to their ends, first those of a prompt together.

    Responses stop at very different lengths, and a batch takes as long as its longest response. So
    after some tokens the responses that go on are put into new batches, without the others. There,
    each is a prompt of its own: the prompt and the tokens so far. To read these again, all at once,
    costs little.
    """
    groups, tokens_done = responses, 0
    lengths = _rebatch_lengths(sampler, [of_prompt[0].prompt for of_prompt in responses])
    with display.bar("responses", sum(map(len, responses)), unit="drawn") as bar:
        for length in lengths:
            part_sampler = dataclasses.replace(sampler, max_new_tokens=length - tokens_done)
            groups = sorted(groups, key=lambda group: len(group[0].prompt))
            for start in range(0, len(groups), batch_size):
                batch = groups[start : start + batch_size]
                _draw_batch(part_sampler, params, batch, batch_size, tokens_done, how)
                ended = [one.stopped or length == lengths[-1] for group in batch for one in group]
                bar.update(sum(ended))
            # From the second turn on, each response is a group of its own.
            groups = [[response] for group in groups for response in group if not response.stopped]
            tokens_done = length


def _draw_batch(
    sampler: Sampler,
    params: Params,
    groups: list[list[_Response]],
    batch_size: int,
    tokens_done: int,
    how: dict,
) -> None:
    """Draw the next part of the responses of one batch; those of a group share their context."""
    stopping.between_batches()
    beat("responses are drawn")
    firsts = [group[0] for group in groups]
    prompts = pad([r.context for r in firsts], [r.id for r in firsts], batch_size)
    prefix = ResponsePrefix(np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32))  # [B]
    prefix.sample[: len(firsts)] = [r.number for r in firsts]
    prefix.length[: len(firsts)] = tokens_done
    samples = len(groups[0])
    drawn = to_host(sampler(params, prompts, samples=samples, prefix=prefix, **how))  # [B, N, T]
    for row, group in enumerate(groups):
        for number, response in enumerate(group):
            response.parts.append(_without_padding(drawn, row, number))


def _rebatch_lengths(sampler: Sampler, prompts: Sequence[np.ndarray]) -> list[int]:
    """Lengths of responses at which those that go on are put into new batches, and the limit.

    Only the limit where no token stops a response. Only the limit, too, where prompts are longer
    than responses can be: to read the prompts again would then cost most.
    """
    limit = sampler.max_new_tokens
    longest_prompt = max(map(len, prompts), default=0)
    if not sampler.stop or longest_prompt > limit:
        return [limit]
    return doubling_up_to(FIRST_REBATCH_TOKENS, limit)


def pad(prompts: Sequence[np.ndarray], ids: Sequence[int], batch_size: int) -> Prompts:
    """Make a batch of `batch_size` prompts, dummies at its end; its width is a power of two."""
    width = MIN_PROMPT_COLUMNS
    while width < max(map(len, prompts)):
        width *= 2
    batch = Prompts(
        tokens=np.zeros((batch_size, width), np.int32),  # [B, P]
        lengths=np.zeros(batch_size, np.int32),  # [B]
        ids=np.zeros(batch_size, np.int32),  # [B]
    )
    for row, prompt in enumerate(prompts):
        batch.tokens[row, : len(prompt)] = prompt
        batch.lengths[row], batch.ids[row] = len(prompt), ids[row]
    return batch


def _check_prompt(index: int, prompt: np.ndarray, sampler: Sampler) -> None:
    config = sampler.model.config
    if not len(prompt):
        raise SamplingError(f"prompt {index}: it is empty; give it at least one token (BOS)")
    if not (prompt.min() >= 0 and prompt.max() < config.vocab_size):
        raise DataError(
            f"prompt {index}: it has an id outside 0 .. {config.vocab_size - 1}, the rows of the "
            "model's table; use the model's own tokenizer"
        )
    if len(prompt) + sampler.max_new_tokens > config.max_positions:
        raise SamplingError(
            f"prompt {index}: {len(prompt)} tokens and {sampler.max_new_tokens} new ones, but the "
            f"model has {config.max_positions} positions; cut the prompt or lower max_new_tokens"
        )


def _without_padding(samples: Samples, row: int, number: int) -> Sample:
    """One response of a batch on the host."""
    length = samples.lengths[row, number]
    return Sample(
        tokens=samples.tokens[row, number, :length],  # of [B, N, T]
        logprobs=samples.logprobs[row, number, :length],
        behaviour=samples.behaviour[row, number, :length],
        stopped=bool(samples.stopped[row, number]),
    )
