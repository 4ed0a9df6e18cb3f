"""Responses of a policy to prompts: drawn once, and kept in files of JSON lines.

    responses = PolicyResponses(load_policy("runs/reviews:sft"), folder / "responses")
    drawn = responses.draw(prompts, Drawing(temperature=0.5, samples=4))
    drawn[0][0].text

A drawing has a folder of its own, named by a hash of all that its responses depend on. Only what is
missing there is drawn, so a second judge or a command that was killed draws nothing again. A
response depends on its prompt's text, its number and the drawing, not on the other prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dpojax import storage
from dpojax.data.references import ReferencedPrompt, prompt_ids
from dpojax.evaluation.policies import response_texts
from dpojax.evaluation.rewards import Reward
from dpojax.runs.kept_scores import keep_scores
from dpojax.runs.policy import Policy
from dpojax.sampling import build_sampler, generate
from dpojax.stages.tokenizers import vocabulary_hash
from dpojax.training.reference import fingerprint

FORMAT = "dpojax responses, version 1"  # changes when the same drawing gives other responses
FILE, SETTINGS = "responses.jsonl", "drawing.json"
LOG_SECONDS = 10.0  # between two lines of the log
AT_ONCE = 32  # samples of a prompt that share its reading

Log = Callable[[str], None]


def silent(line: str) -> None:
    """Print nothing: a log that nobody reads."""


class Response(NamedTuple):
    """A response, and whether it ended by itself rather than at the limit of tokens."""

    text: str
    stopped: bool


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How responses are drawn.

    Attributes:
      temperature: 0 is greedy, and draws one response whatever `samples` says.
      samples: responses to each prompt. The first ones are the same, however many there are.
      max_new_tokens: of a response.
      seed: of the draws.
      stop_text: a response ends before this text; "" for none. Base models that are prompted go on
        with another example.
    """

    temperature: float = 1.0
    samples: int = 1
    max_new_tokens: int = 64
    seed: int = 0
    stop_text: str = ""

    @property
    def drawn_samples(self) -> int:
        """Responses to each prompt that are drawn."""
        return 1 if self.temperature == 0 else self.samples


class PolicyResponses:
    """Draws responses of a policy and keeps them.

    Args:
      policy: see `runs.policy.load_policy`.
      folder: of all drawings.
      batch_size: responses that are drawn at a time; a kill loses as many.
      log: gets a line now and then.
    """

    def __init__(
        self,
        policy: Policy,
        folder: storage.Path,
        *,
        batch_size: int = 64,
        log: Log = silent,
    ):
        self.policy, self.folder, self.batch_size, self.log = policy, folder, batch_size, log
        self._fingerprint = _hash(
            fingerprint(policy.params),
            repr(policy.model.config),
            vocabulary_hash(policy.tokenizer),
            list(policy.stop),
        )

    def draw(
        self,
        prompts: Sequence[ReferencedPrompt],
        drawing: Drawing,
        texts: Sequence[str] | None = None,
        *,
        only_kept: bool = False,
        in_turn: bool = False,
    ) -> list[list[Response]]:
        """The responses to P prompts, [P][samples]; what the folder lacks is drawn and written.

        Args:
          texts: what the policy reads in the place of each prompt; None: the prompts themselves.
          only_kept: draw nothing. In the place of a response that is missing stands a text as long
            as it can be, which no other one equals.
          in_turn: wait for a process that draws the same, in the place of raising Locked.

        Raises:
          DataError: a prompt that cannot be rendered; SamplingError: one that is too long.
          Locked: another process draws the same.
        """
        ids = prompt_ids(prompts, self.policy.tokenizer, texts)
        names = [_hash(tokens)[:16] for tokens in ids]
        folder = self.folder / self._name(drawing)
        numbers = range(drawing.drawn_samples)
        if only_kept:
            there = _read(folder / FILE)
            longest = "word " * drawing.max_new_tokens
            return [
                [
                    there.get((name, k), Response(f"{longest}{folder.name}{name}{k}", False))
                    for k in numbers
                ]
                for name in names
            ]
        with storage.lock_in_turn(folder, self.log) if in_turn else storage.lock(folder):
            path = folder / FILE
            if not path.exists():
                settings = {"format": FORMAT} | dataclasses.asdict(drawing)
                settings.pop("samples")
                storage.write_json(folder / SETTINGS, settings)
            there = _read(path)
            missing = [
                (name, tokens, block)
                for name, tokens in dict(zip(names, ids)).items()
                for block in _blocks(drawing.drawn_samples)
                if any((name, number) not in there for number in block)
            ]
            if missing:
                self._draw_missing(missing, drawing, path, there)
        return [[there[name, number] for number in range(drawing.drawn_samples)] for name in names]

    def kept_scores(self, reward: Reward, drawing: Drawing) -> Reward:
        """The same reward, whose scores of a drawing's responses are kept beside them."""
        return keep_scores(reward, self.folder / self._name(drawing), self.log)

    def _name(self, drawing: Drawing) -> str:
        """The drawing's folder: responses of other numbers of samples share it."""
        return _hash(
            FORMAT,
            self._fingerprint,
            drawing.temperature,
            drawing.max_new_tokens,
            drawing.seed,
            drawing.stop_text,
        )[:16]

    def _draw_missing(
        self,
        missing: Sequence[tuple[str, list[int], range]],
        drawing: Drawing,
        path: storage.Path,
        there: dict[tuple[str, int], Response],
    ) -> None:
        """Draw batch by batch, the short prompts first, and append each batch to the file."""
        policy = self.policy
        sampler = build_sampler(
            policy.model, max_new_tokens=drawing.max_new_tokens, stop=policy.stop
        )
        at_once = max(len(block) for _, _, block in missing)
        size = max(1, self.batch_size // at_once)
        missing = sorted(missing, key=lambda one: len(one[1]))
        last_line = time.monotonic()
        with storage.LineWriter(path) as lines:
            for start in range(0, len(missing), size):
                batch = missing[start : start + size]
                with jax.set_mesh(policy.mesh):
                    drawn = generate(
                        sampler,
                        policy.params,
                        [tokens for _, tokens, _ in batch],
                        batch_size=size,
                        ids=[_number(name, block.start) for name, _, block in batch],
                        seed=drawing.seed,
                        temperature=drawing.temperature,
                        samples=at_once,
                    )
                for (name, tokens, block), samples in zip(batch, drawn):
                    texts = response_texts(policy.tokenizer, tokens, samples)
                    for number, sample, text in zip(block, samples, texts):
                        response = _ended(text, sample.stopped, drawing.stop_text)
                        if (name, number) not in there:
                            there[name, number] = response
                            line = {"prompt": name, "sample": number} | response._asdict()
                            lines.write(json.dumps(line))
                done = min(start + size, len(missing))
                if done == len(missing) or time.monotonic() - last_line >= LOG_SECONDS:
                    last_line = time.monotonic()
                    self.log(f"{done} of {len(missing)} are drawn")


def best_responses(
    prompts: Sequence[str],
    responses: Sequence[Sequence[Response]],
    n: int,
    reward: Reward | None,
) -> list[list[Response]]:
    """Of every n responses in a row to a prompt the one with the highest reward.

    Args:
      prompts: P texts, which the reward reads.
      responses: [P][samples * n].
      reward: may be None if n is 1.

    Returns:
      [P][samples].
    """
    if n == 1 or reward is None:
        return [list(of_prompt) for of_prompt in responses]
    texts = dict.fromkeys(
        (prompt, one.text) for prompt, of_prompt in zip(prompts, responses) for one in of_prompt
    )
    values = reward([prompt for prompt, _ in texts], [text for _, text in texts])
    scores = dict(zip(texts, values.tolist()))
    return [
        [
            max(of_prompt[start : start + n], key=lambda one: scores[prompt, one.text])
            for start in range(0, len(of_prompt), n)
        ]
        for prompt, of_prompt in zip(prompts, responses)
    ]


def share_cut(responses: Sequence[Sequence[Response]]) -> float:
    """The share of responses that reached the limit of tokens."""
    return float(np.mean([not one.stopped for of_prompt in responses for one in of_prompt]))


def _blocks(samples: int) -> list[range]:
    """Numbers of samples that are drawn together."""
    return [range(start, min(start + AT_ONCE, samples)) for start in range(0, samples, AT_ONCE)]


def _ended(text: str, stopped: bool, stop_text: str) -> Response:
    """The response up to the text that ends it."""
    place = text.find(stop_text) if stop_text else -1
    return Response(text, bool(stopped)) if place < 0 else Response(text[:place], True)


def _read(path: storage.Path) -> dict[tuple[str, int], Response]:
    """Responses in a file by (name of the prompt, number); damaged lines are left out."""
    there = {}
    for line in storage.read_records(path):
        if {"prompt", "sample", "text", "stopped"} <= line.keys():
            there[line["prompt"], line["sample"]] = Response(line["text"], line["stopped"])
    return there


def _number(name: str, start: int) -> int:
    """The randomness of a block of samples of a prompt: an int32 that is not negative."""
    return int(_hash(name, start)[:8], 16) & 0x7FFFFFFF


def _hash(*values) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()
