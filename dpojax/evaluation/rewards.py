"""Rewards of texts behind one function, (prompts, responses) -> scores.

    reward = open_reward("classifier:FOLDER:POSITIVE")
    scores = reward(["i think"], [" it is a gem"])  # float64 [1]

A text is its prompt and its response without anything between them: a response brings the space
that it begins with. What is scored is the text; end-of-sequence tokens are not part of it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike, NDArray

from dpojax.data import reviews
from dpojax.data.records import Record
from dpojax.data.tokenise import TokenizeConfig, tokenise
from dpojax.models import decoder, encoder, huggingface
from dpojax.models.attention import plain_rows
from dpojax.models.decoder import Model, Params
from dpojax.models.families import ENCODERS
from dpojax.sharding import put_rows, row_shards, to_host
from dpojax.training.reference import fingerprint

SHORTEST = 16  # columns of the narrowest batch
SPECS = "reviews, reviews:log_odds, classifier:FOLDER, classifier:FOLDER:LABEL, reward_model:FOLDER"


class RewardError(ValueError):
    """A reward that cannot be opened, or whose scores cannot be used."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """A function of texts that is checked in every call.

    Attributes:
      name: what errors call it.
      function: (prompts, responses) -> n numbers.
      fingerprint: differs wherever the scores may.
    """

    name: str
    function: Callable[[Sequence[str], Sequence[str]], ArrayLike]
    fingerprint: str = ""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """The scores, float64 [n].

        Raises:
          RewardError: not n numbers, or one that is not finite; it shows the first such text.
          ValueError: not as many responses as prompts.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses")
        if not len(prompts):
            return np.zeros(0)
        scores = np.asarray(self.function(prompts, responses), np.float64)
        if scores.shape != (len(prompts),):
            raise RewardError(
                f"reward {self.name}: gave an array of shape {scores.shape} for {len(prompts)} "
                f"texts; it has to give one number each, [{len(prompts)}]"
            )
        bad = np.flatnonzero(~np.isfinite(scores))
        if len(bad):
            first = int(bad[0])
            raise RewardError(
                f"reward {self.name}: {len(bad)} of {len(scores)} scores are not finite; the first "
                f"is {scores[first]} for text {first}, prompt {_shown(prompts[first])}, response "
                f"{_shown(responses[first])}"
            )
        return scores


def open_reward(spec: str, *, mesh: Mesh | None = None, batch_size: int = 64) -> Reward:
    """The reward that a command line names, one of SPECS; folders may be names of the hub.

    Raises:
      RewardError: an unknown name, or a label that the classifier has not.
      OSError, ValueError: what is in the folder cannot be read; see `huggingface.load`.
    """
    kind, _, rest = spec.partition(":")
    if kind == "reviews":
        return exact_reviews(rest or "probability")
    if kind == "classifier" and rest:
        folder, colon, label = rest.rpartition(":")
        if not colon or pathlib.Path(rest).is_dir():
            folder, label = rest, "POSITIVE"
        return classifier(folder, label, mesh=mesh, batch_size=batch_size)
    if kind == "reward_model" and rest:
        from transformers import AutoTokenizer  # takes seconds, and brings torch where it is

        config, params, _ = huggingface.load(rest, mesh=mesh)
        tokenizer = AutoTokenizer.from_pretrained(rest)
        model = decoder.build(config)
        how = {"name": spec, "mesh": mesh, "batch_size": batch_size}
        centre = huggingface.read_centre(rest)
        return scalar_head(model, params, tokenizer, offset=centre, **how)
    raise RewardError(f"reward {spec!r}: is not one of {SPECS}")


def exact_reviews(kind: str = "probability") -> Reward:
    """The embedded task's own: P(positive | text), or its log-odds in nats.

    Raises:
      RewardError: another kind than "probability" or "log_odds".
    """

    def probability(prompts, responses):
        return reviews.reward([f"{prompt} {text}" for prompt, text in zip(prompts, responses)])

    functions = {"probability": probability, "log_odds": reviews.score}
    if kind not in functions:
        raise RewardError(f"reward reviews:{kind}: is not one of {', '.join(functions)}")
    name = f"reviews:{kind}"
    return Reward(name, functions[kind], name)


def classifier(
    folder: str, label: str = "POSITIVE", *, mesh: Mesh | None = None, batch_size: int = 64
) -> Reward:
    """P(label | text) by a sequence classifier of transformers, in [0, 1].

    A BERT-type encoder with a softmax over its labels, or a decoder with the same at the text's
    last token; with a single label the probability is the sigmoid of its logit. Upper and lower
    case are one in `label`, and "pos" and "neg" are what "positive" and "negative" are. A text is
    encoded by the folder's own tokenizer, and cut where it is longer than the model reads.

    Raises:
      RewardError: the model has no such label.
      OSError, ValueError: see `huggingface.load_classifier` and `huggingface.load`.
    """
    from transformers import AutoConfig, AutoTokenizer  # as in `open_reward`

    name = f"classifier:{folder}"
    known = AutoConfig.from_pretrained(folder)
    labels = [known.id2label[i] for i in sorted(known.id2label)]
    chosen = _label_among(labels, label, name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if known.model_type in ENCODERS:
        config, params, _ = huggingface.load_classifier(folder, mesh=mesh)
        longest = config.max_positions - config.first_position
        apply = encoder.build(config).apply
    else:
        config, params, _ = huggingface.load(folder, mesh=mesh)
        longest, apply = config.max_positions, _last_score(decoder.build(config))
    longest = min(longest, tokenizer.model_max_length)
    logits_of = _batched(apply, params, longest, mesh, batch_size)

    def probability(prompts, responses):
        texts = [prompt + response for prompt, response in zip(prompts, responses)]
        ids = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        logits = logits_of(ids)
        if logits.ndim == 1:
            return 1 / (1 + np.exp(-logits))
        weight = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weight[:, chosen] / weight.sum(axis=1)

    return Reward(name, probability, f"{fingerprint(params)} {labels[chosen]}")


def _label_among(labels: Sequence[str], label: str, name: str) -> int:
    """The place of the label that is meant."""
    if label in labels:
        return labels.index(label)
    plain = lambda text: {"positive": "pos", "negative": "neg"}.get(text.lower(), text.lower())
    same = [place for place, other in enumerate(labels) if plain(other) == plain(label)]
    if len(same) != 1:
        raise RewardError(f"reward {name}: no label {label!r} in its id2label, only {labels}")
    return same[0]


def scalar_head(
    model: Model,
    params: Params,
    tokenizer,
    *,
    name: str = "reward_model",
    offset: float = 0.0,
    mesh: Mesh | None = None,
    batch_size: int = 64,
) -> Reward:
    """A learned reward model's score at the response's last token, minus `offset`.

    Texts become tokens as in training (`data.tokenise`): a response ends with EOS, where it is
    scored. Where the rewards are to have mean 0 on some texts, `offset` is their mean score.

    Raises:
      ValueError: a model without a scalar head; in a call, `DataError` for a text that is longer
        than the model's positions.
    """
    if not model.config.scalar_head:
        raise ValueError(f"reward {name}: the model has no scalar head (it predicts tokens)")
    longest = model.config.max_positions
    policy = TokenizeConfig(max_length=longest, truncation="error", identical="keep", empty="keep")
    scores_of = _batched(_last_score(model), params, longest, mesh, batch_size)

    def score(prompts, responses):
        records = [
            Record(f"reward {name}: text {index}", prompt, (response,))
            for index, (prompt, response) in enumerate(zip(prompts, responses))
        ]
        examples, _ = tokenise(records, tokenizer, policy)
        return scores_of([[*e.prompt, *e.responses[0]] for e in examples]) - offset

    return Reward(name, score, f"{fingerprint(params)} {offset}")


def _last_score(model: Model) -> Callable:
    """(params, tokens [B, T], lengths [B]) -> scores [B] at the last tokens."""

    def apply(params, tokens, lengths):
        hidden = model.apply(params, plain_rows(tokens))
        last = jax.numpy.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
        return model.scores(params, last)[:, 0]

    return apply


def _batched(
    apply: Callable, params, longest: int, mesh: Mesh | None, batch_size: int
) -> Callable[[Sequence[Sequence[int]]], NDArray[np.float64]]:
    """`apply(params, tokens [B, T], lengths [B])` as a function of lists of ids, any number of.

    Texts of similar lengths share a batch of fixed size, padded on the right to a power of two.
    """
    size = batch_size if mesh is None else -(-batch_size // row_shards(mesh)) * row_shards(mesh)
    # Rows lie on a mesh behind an axis of micro-batches, of which there is one.
    program = jax.jit(lambda params, tokens, lengths: apply(params, tokens[0], lengths[0]))

    def run(texts):
        for index, ids in enumerate(texts):
            if not len(ids):
                raise RewardError(f"text {index}: it has no token; a score needs at least one")
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = {}
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = _pad([texts[i] for i in chosen], size, longest)
            with nullcontext() if mesh is None else jax.set_mesh(mesh):
                batch = batch if mesh is None else put_rows(batch, mesh)
                found |= zip(chosen, to_host(program(params, *batch)))
        return np.array([found[i] for i in range(len(texts))], np.float64)

    return run


def _pad(texts: Sequence[Sequence[int]], size: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [1, size, T] and lengths [1, size]; what fills up the batch has one token."""
    width = SHORTEST
    while width < max(map(len, texts)):
        width *= 2
    tokens = np.zeros((1, size, min(width, longest)), np.int32)
    lengths = np.ones((1, size), np.int32)
    for row, ids in enumerate(texts):
        tokens[0, row, : len(ids)] = ids
        lengths[0, row] = len(ids)
    return tokens, lengths


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")
