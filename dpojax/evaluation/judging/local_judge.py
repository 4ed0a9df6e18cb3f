"""A language model of this machine as judge: the log-probs of the answers A and B are compared.

The model reads a template's prompt and the start of an answer, "Preferred:". The log-probs of " A"
and " B" behind it are the reply: nothing is sampled, so that equal questions have equal replies. A
model may favour a position, so both orders are asked.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray
from scipy.special import expit

from dpojax import stopping
from dpojax.data.encoding import TextEncoder
from dpojax.data.example_maker import start_tokens
from dpojax.data.examples import Example
from dpojax.data.packing import Shape, size_of
from dpojax.data.pairing import Labels
from dpojax.data.records import Record
from dpojax.data.rows import collate
from dpojax.data.templates import ChatTemplate, Refused
from dpojax.data.tokenizer_files import read_tokenizer
from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.score_judge import choose
from dpojax.evaluation.judging.templates import Template
from dpojax.evaluation.judging.verdicts import Choice, Question, Reply
from dpojax.models import decoder, huggingface
from dpojax.models.decoder import Model, Params
from dpojax.sharding import put_rows, row_shards, to_host
from dpojax.training.forward import build_score
from dpojax.training.reference import fingerprint
from dpojax.watchdog import beat

BEFORE_ANSWER = "Preferred:"
ANSWERS = (" A", " B")
CHUNK = 512  # questions that are encoded together, and sorted by length
SHORTEST = 64  # columns of the narrowest batch
SAMPLE = Question("a prompt", "one response", "another response", "a reference")

logger = logging.getLogger(__name__)


class EncodedQuestion(NamedTuple):
    """What the model reads for one question.

    Attributes:
      example: its prompt, and the two answers as its responses; None where no prompt would fit.
      is_cut: whether the start of the question's prompt was left out, for want of positions.
    """

    example: Example | None
    is_cut: bool = False


class QuestionEncoder:
    """Makes token ids of questions, with a chat template where the tokenizer has one.

    Args:
      tokenizer: of transformers.
      template: makes the text of a question.
      longest: most tokens of a question with one answer.
    """

    def __init__(self, tokenizer: Any, template: Template, longest: int):
        self.template, self.longest = template, longest
        self._chat = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self._start, self._encoder = start_tokens(tokenizer), TextEncoder(tokenizer)

    def text(self, question: Question) -> str:
        """The text in front of the answer.

        Raises:
          JudgeError: the chat template refuses it, or the template needs a reference.
        """
        filled = self.template.fill(question)
        if self._chat is None:
            return f"{filled.rstrip()}\n\n{BEFORE_ANSWER}"
        turns = [{"role": "user", "content": filled}]
        try:
            rendered = self._chat.render(Record("a question", turns, ()), turns, generate=True)
        except Refused as refusal:
            raise JudgeError(f"the tokenizer's chat template refuses a question: {refusal}") from (
                refusal
            )
        return rendered + BEFORE_ANSWER

    def encode(self, question: Question) -> EncodedQuestion:
        """The ids of one question. Where it is too long, its prompt loses its start."""
        shortened = question
        while True:
            example = self.example(shortened)
            excess = len(example.prompt) + max(map(len, example.responses)) - self.longest
            if excess <= 0:
                return EncodedQuestion(example, is_cut=shortened is not question)
            if not shortened.prompt:
                return EncodedQuestion(None, is_cut=True)
            # A token has a character or more, mostly. A byte-level one may have less.
            shortened = shortened._replace(prompt=shortened.prompt[max(1, excess) :])

    def example(self, question: Question) -> Example:
        """The ids of one question, however many they are."""
        text = self.text(question)
        first, second = self._encoder.encode([text + answer for answer in ANSWERS])
        shared = _shared_start(first, second)
        start = [] if first[: len(self._start)] == self._start else self._start
        return Example(
            id="",
            prompt=np.asarray(start + first[:shared], np.int32),
            responses=tuple(np.asarray(ids[shared:], np.int32) for ids in (first, second)),
            cut=(True, True),  # no EOS follows
            label=None,
        )


def _shared_start(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two lists have in common at their start."""
    pairs = enumerate(zip(first, second))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


class LocalJudge:
    """Compares the log-probs of the two answers.

    Attributes:
      name, fingerprint, is_symmetric: see `Judge`.
    """

    is_symmetric = False

    def __init__(
        self,
        model: Model,
        params: Params,
        tokenizer: Any,
        template: Template,
        *,
        name: str,
        tie: float = 0.0,
        mesh: Mesh | None = None,
        batch_size: int = 16,
    ):
        """Make a judge.

        Args:
          model: a decoder that predicts tokens.
          params: its weights.
          tokenizer: its tokenizer.
          template: makes the text of a question.
          name: see `Judge`.
          tie: largest difference of two tied log-probs, in nats.
          mesh: where the weights are; None is one device.
          batch_size: questions in a batch, rounded up to a multiple of the mesh's row shards.

        Raises:
          JudgeError: the model has a scalar head, and predicts no tokens; the tokenizer has the
            same ids for both answers.
        """
        if model.config.scalar_head:
            raise JudgeError(
                f"judge {name}: the model scores texts and predicts no tokens; "
                "reward_model:FOLDER or classifier:FOLDER is for such models"
            )
        self.name, self._labels = name, Labels(tie=tie)
        self._encoder = QuestionEncoder(tokenizer, template, model.config.max_positions)
        self._params, self._mesh, self._rows = params, mesh, model.config.vocab_size
        shards = 1 if mesh is None else row_shards(mesh)
        self._batch_size = -(-batch_size // shards) * shards
        self._score = jax.jit(build_score(model))
        sample = self._encoder.example(SAMPLE)
        if not all(map(len, sample.responses)):
            raise JudgeError(
                f"judge {name}: its tokenizer has the same ids for {' and '.join(ANSWERS)}; the "
                "model cannot choose between them"
            )
        ids = [part.tolist() for part in (sample.prompt, *sample.responses)]
        reads = hashlib.sha256(f"{template.text}{ids}".encode()).hexdigest()
        self.fingerprint = f"{fingerprint(params)} {reads} tie={float(tie)!r}"

    def replies(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Yield (index, reply), batch by batch.

        A question that is too long for the model loses the start of its prompt, and its reply says
        so. Where that does not suffice, the reply is UNPARSED. `preference` is the share of " A" in
        the probability of both answers.

        Raises:
          JudgeError: the tokenizer does not belong to the model, or refuses a question.
        """
        cut = 0
        for start in range(0, len(questions), CHUNK):
            encoded = [self._encoder.encode(q) for q in questions[start : start + CHUNK]]
            cut += sum(each.is_cut for each in encoded)
            for index, each in enumerate(encoded, start):
                if each.example is None:
                    text = f"not asked: longer than the model's {self._encoder.longest} positions"
                    yield index, Reply(Choice.UNPARSED, text=text)
            for index, logprobs in self._scored([each.example for each in encoded]):
                yield start + index, self._reply(*logprobs, is_cut=encoded[index].is_cut)
        if cut:
            logger.warning(
                "judge %s: %d of %d questions are longer than the model's %d positions; the start "
                "of their prompts was left out",
                *(self.name, cut, len(questions), self._encoder.longest),
            )

    def answer_logprobs(self, questions: Sequence[Question]) -> NDArray[np.float64]:
        """Log-probs of " A" and " B", nats, [n, 2]; nan where a question does not fit."""
        logprobs_nx2 = np.full((len(questions), 2), np.nan)
        encoded = [self._encoder.encode(question) for question in questions]
        for index, values in self._scored([each.example for each in encoded]):
            logprobs_nx2[index] = values
        return logprobs_nx2

    def _scored(self, examples: Sequence[Example | None]) -> Iterator[tuple[int, NDArray]]:
        """Yield (index, log-probs [2]) of the examples that there are."""
        present = [i for i, example in enumerate(examples) if example is not None]
        by_length = sorted(present, key=lambda i: size_of(examples[i]).tokens)
        for start in range(0, len(by_length), self._batch_size):
            stopping.between_batches()
            indices = by_length[start : start + self._batch_size]
            yield from zip(indices, self._logprobs([examples[i] for i in indices]))
            beat("questions are judged")

    def _logprobs(self, examples: Sequence[Example]) -> NDArray[np.float64]:
        """Log-probs of both answers, [n, 2], of one batch with an example in each row."""
        largest = max(int(ids.max()) for e in examples for ids in (e.prompt, *e.responses))
        if largest >= self._rows:
            raise JudgeError(
                f"judge {self.name}: a question has the token id {largest}, but the model only "
                f"{self._rows} rows; its tokenizer does not belong to it"
            )
        sizes = [size_of(example) for example in examples]
        length, scored = SHORTEST, max(size.scored for size in sizes)
        while length < max(size.tokens for size in sizes):
            length *= 2
        shape = Shape(1, self._batch_size, length, scored, examples=scored // 2, responses=2)
        rows = collate(examples, range(len(examples)), shape)
        with nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            placed = rows if self._mesh is None else put_rows(rows, self._mesh)
            logprob = to_host(self._score(self._params, placed).logprob)
        is_scored, slot = rows.response >= 0, np.maximum(rows.response, 0)
        example = np.take_along_axis(rows.example, slot // 2, axis=-1)
        totals_nx2 = np.zeros((len(examples), 2))
        places = example[is_scored], slot[is_scored] % 2
        np.add.at(totals_nx2, places, logprob[is_scored].astype(np.float64))
        return totals_nx2

    def _reply(self, first: float, second: float, *, is_cut: bool) -> Reply:
        difference = first - second
        text = f"log P(A) {first:.4f}, log P(B) {second:.4f}"
        if is_cut:
            text += "; the prompt's start was left out"
        return Reply(choose(self._labels, difference), float(expit(difference)), text)


def open_local(
    folder: str | os.PathLike,
    template: Template,
    *,
    tie: float = 0.0,
    mesh: Mesh | None = None,
    batch_size: int = 16,
) -> LocalJudge:
    """Open a language model's folder, or a name of the hub, as judge `local:FOLDER`.

    Args:
      folder: of any decoder family, with its tokenizer.
      template, tie, mesh, batch_size: see `LocalJudge`.

    Raises:
      JudgeError: see `LocalJudge`.
      OSError, ValueError: see `huggingface.load` and `read_tokenizer`.
    """
    huggingface.require_model(folder)
    config, params, _ = huggingface.load(folder, mesh=mesh)
    return LocalJudge(
        decoder.build(config),
        params,
        read_tokenizer(folder),
        template,
        name=f"local:{folder}",
        tie=tie,
        mesh=mesh,
        batch_size=batch_size,
    )
