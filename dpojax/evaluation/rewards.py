"""Rewards of texts behind one interface, (prompts, responses) -> scores.

    reward = open_reward("classifier:FOLDER:POSITIVE")
    scores = reward(["i think"], [" it is a gem"])  # float64 [1]

A text is its prompt followed by its response, with nothing between them: a response includes the
space that it begins with. A text contains no end-of-sequence token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike, NDArray

from dpojax import stopping, storage
from dpojax.data import reviews
from dpojax.data.records import Record
from dpojax.data.tokenise import tokenise
from dpojax.data.tokenize_config import TokenizeConfig
from dpojax.data.tokenizer_files import read_tokenizer
from dpojax.evaluation.scored_rows import Text, score_texts
from dpojax.models import decoder, encoder, huggingface
from dpojax.models.attention import plain_rows
from dpojax.models.decoder import Model, Params
from dpojax.models.families import ENCODERS
from dpojax.sharding import put_rows, row_shards, to_host
from dpojax.training.reference import fingerprint
from dpojax.watchdog import beat

SHORTEST = 16  # columns of the narrowest batch


class RewardError(ValueError):
    """A reward that cannot be opened, or whose scores cannot be used."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """A function that scores texts, with a check of its scores in every call.

    Attributes:
      name: for error messages.
      function: (prompts, responses) -> n numbers.
      fingerprint: different for rewards whose scores may differ.
    """

    name: str
    function: Callable[[Sequence[str], Sequence[str]], ArrayLike]
    fingerprint: str = ""

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """Score n texts, float64 [n].

        Raises:
          RewardError: the function returned something other than n finite numbers. The message
            shows the first text with a bad score.
          ValueError: the numbers of prompts and responses differ.
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
    """Open the reward that a config or command line names: KIND, or KIND:ARGUMENT.

    Args:
      spec: as a kind's `usage` in `KINDS` says; a folder may also be a name on the hub.
      mesh: where models are placed; None is one device.
      batch_size: texts in a batch of a model.

    Raises:
      RewardError: an unknown name, or a label that the classifier does not have.
      OSError, ValueError: the folder cannot be read; see `huggingface.load`.
    """
    kind, argument = _kind_and_argument(spec)
    return kind.open(argument, mesh, batch_size)


def folder_of(spec: str) -> str:
    """The model's folder, or hub name, that a reward reads; "" where it reads none.

    Raises:
      RewardError: an unknown name.
    """
    kind, argument = _kind_and_argument(spec)
    return kind.folder(argument)


def exact_reviews(kind: str = "probability") -> Reward:
    """The exact reward of the embedded task: P(positive | text), or its log-odds in nats.

    Raises:
      RewardError: `kind` is neither "probability" nor "log_odds".
    """

    def probability(prompts, responses):
        return reviews.reward([f"{prompt} {text}" for prompt, text in zip(prompts, responses)])

    functions = {"probability": probability, "log_odds": reviews.score}
    if kind not in functions:
        raise RewardError(f"reward reviews:{kind}: is not one of {', '.join(functions)}")
    name = f"reviews:{kind}"
    return Reward(name, functions[kind], name)


def classifier(
    folder: str,
    label: str = "POSITIVE",
    *,
    log_odds: bool = False,
    mesh: Mesh | None = None,
    batch_size: int = 64,
) -> Reward:
    """What a sequence classifier of transformers says of a label: P(label | text), in [0, 1].

    The model is a BERT-type encoder, or a decoder that classifies at the text's last token. A text
    is encoded by the folder's tokenizer, and truncated to what the model can read. The logits are
    read as transformers' text-classification pipeline reads them, by `problem_type` in config.json:

      regression: the number itself, which is no probability;
      multi_label_classification, or a single label: the sigmoid of the label's logit;
      otherwise: the softmax over the labels.

    Args:
      folder: of the model and its tokenizer.
      label: a name in `id2label`. Case is ignored; "pos" is "positive", and "neg" is "negative". A
        model with a single label needs none.
      log_odds: give log P / (1 - P) instead, in nats.
      mesh: where the model is placed; None is one device.
      batch_size: texts in a batch.

    Raises:
      RewardError: the model is no classifier, or has no such label; log-odds of a regression.
      OSError, ValueError: see `huggingface.load_classifier` and `huggingface.load`.
    """
    from transformers import AutoConfig  # late, see `open_reward`

    name = f"classifier:{folder}"
    huggingface.require_known(folder)
    pretrained = huggingface.pretrained_name(folder)
    hf_config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
    is_encoder = hf_config.model_type in ENCODERS
    _require_classifier(name, hf_config.architectures, is_encoder=is_encoder)
    labels = [hf_config.id2label[i] for i in sorted(hf_config.id2label)]
    index = 0 if len(labels) == 1 else _label_index(labels, label, name)
    odds = _log_odds_of(hf_config.problem_type, index, len(labels))
    if odds is None and log_odds:
        raise RewardError(f"reward {name}: a regression has no log-odds; use classifier:{folder}")
    tokenizer = read_tokenizer(folder)
    apply, params, longest = _encoder_logits(folder, mesh) if is_encoder else _logits(folder, mesh)
    pad = None if is_encoder else hf_config.get_text_config().pad_token_id
    longest = min(longest, tokenizer.model_max_length)
    logits_of = batched(apply, params, longest, mesh, batch_size)

    def scores(prompts, responses):
        texts = [prompt + response for prompt, response in zip(prompts, responses)]
        ids = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        logits = logits_of([_without_padding(x, pad) for x in ids]).reshape(len(ids), -1)
        if odds is None:
            return logits[:, index]
        return odds(logits) if log_odds else _sigmoid(odds(logits))

    kind = "log_odds" if log_odds else hf_config.problem_type or ""
    return Reward(name, scores, f"{fingerprint(params)} {labels[index]} {kind}".rstrip())


def _require_classifier(name: str, architectures: list[str] | None, *, is_encoder: bool) -> None:
    """Refuse language models, and heads of a model's own code. Old encoders name no class."""
    if is_encoder and not architectures:
        return
    if not any(one.endswith("ForSequenceClassification") for one in architectures or ()):
        raise RewardError(
            f"reward {name}: it is no sequence classifier: config.json has the architectures "
            f"{architectures}, none of which is a ...ForSequenceClassification"
        )


def _encoder_logits(folder: str, mesh: Mesh | None) -> tuple[Callable, Params, int]:
    """(params, tokens, lengths) -> logits of an encoder, its params, and its longest text."""
    config, params, _ = huggingface.load_classifier(folder, mesh=mesh)
    return encoder.build(config).apply, params, config.max_positions - config.first_position


def _logits(folder: str, mesh: Mesh | None) -> tuple[Callable, Params, int]:
    """`_encoder_logits` of a decoder, at the text's last token."""
    config, params, _ = huggingface.load(folder, mesh=mesh)
    return _last_score(decoder.build(config)), params, config.max_positions


def _log_odds_of(
    problem_type: str | None, index: int, labels: int
) -> Callable[[NDArray], NDArray] | None:
    """logits [n, L] -> log P / (1 - P) of a label [n]; None for a regression, which has no P."""
    if problem_type == "regression":
        return None
    if problem_type == "multi_label_classification" or labels == 1:

        def of_the_label(logits: NDArray) -> NDArray:
            return logits[:, index]

        return of_the_label

    def against_the_others(logits: NDArray) -> NDArray:
        others = np.delete(logits, index, axis=1)
        return logits[:, index] - np.logaddexp.reduce(others, axis=1)

    return against_the_others


def _sigmoid(x: NDArray) -> NDArray:
    """1 / (1 + exp(-x)), without an overflow."""
    return np.exp(-np.logaddexp(0, -x))


def _without_padding(ids: Sequence[int], pad: int | None) -> Sequence[int]:
    """A text up to its last token that is not `pad`, at which transformers' decoders score it.

    Where a model's padding is its EOS as well, that is the token before EOS. Of a text that has no
    other token they score the first one.
    """
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return ids[:end]


def _label_index(labels: Sequence[str], label: str, name: str) -> int:
    """The index of a label: the exact name, else the only one with the same `_short_label`."""
    if label in labels:
        return labels.index(label)
    same = [i for i, other in enumerate(labels) if _short_label(other) == _short_label(label)]
    if len(same) != 1:
        raise RewardError(f"reward {name}: no label {label!r} in its id2label, only {labels}")
    return same[0]


def _short_label(label: str) -> str:
    return {"positive": "pos", "negative": "neg"}.get(label.lower(), label.lower())


def scalar_head(
    model: Model,
    params: Params,
    tokenizer,
    *,
    name: str = "reward_model",
    offset: float = 0.0,
    pad: int | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 64,
) -> Reward:
    """The score of a learned reward model at the response's last token, minus `offset`.

    Texts are tokenised as in training (`data.tokenise`): a response ends with EOS, and the score is
    taken there, unless EOS is `pad`.

    Args:
      model: with a scalar head.
      params: its weights.
      tokenizer: its tokenizer.
      name: for error messages.
      offset: the mean score on some texts, on which the reward then has mean 0.
      pad: `pad_token_id` of the model's config.json, if its scores are to be those of transformers;
        see `_without_padding`.
      mesh: where the model is placed; None is one device.
      batch_size: texts in a batch.

    Raises:
      ValueError: the model has no scalar head. A call raises `DataError` if a text is longer than
        the model's positions.
    """
    if not model.config.scalar_head:
        raise ValueError(f"reward {name}: the model has no scalar head (it predicts tokens)")
    longest = model.config.max_positions
    config = TokenizeConfig(max_length=longest, truncation="error", identical="keep", empty="keep")

    def score(prompts, responses):
        records = [
            Record(f"reward {name}: text {index}", prompt, (response,))
            for index, (prompt, response) in enumerate(zip(prompts, responses))
        ]
        examples, _ = tokenise(records, tokenizer, config)
        ids = [[*e.prompt, *e.responses[0]] for e in examples]
        _check_ids(ids, params)
        ends = [len(_without_padding(x, pad)) for x in ids]
        texts = [Text(e.prompt, e.responses[0], end) for e, end in zip(examples, ends)]
        return score_texts(model, params, texts, mesh=mesh, batch_size=batch_size) - offset

    end = "" if pad is None or pad != tokenizer.eos_token_id else " before EOS"
    return Reward(name, score, f"{fingerprint(params)} {offset}{end}")


def _last_score(model: Model) -> Callable:
    """Build (params, tokens [B, T], lengths [B]) -> scores at the last tokens, [B] or [B, L]."""

    def apply(params, tokens, lengths):
        hidden_BxTxD = model.apply(params, plain_rows(tokens))
        last_Bx1xD = jnp.take_along_axis(hidden_BxTxD, lengths[:, None, None] - 1, axis=1)
        return model.scores(params, last_Bx1xD)[:, 0]

    return apply


def batched(
    apply: Callable, params, longest: int, mesh: Mesh | None, batch_size: int
) -> Callable[[Sequence[Sequence[int]]], NDArray[np.float64]]:
    """Turn `apply(params, tokens [B, T], lengths [B])` into a function of any number of texts.

    Texts of similar lengths share a batch of fixed size, padded on the right to a power of two.

    Args:
      apply: returns one result for each text, [B, ...].
      params: its first argument.
      longest: most tokens of a text.
      mesh: where the batches are placed; None is one device.
      batch_size: texts in a batch; rounded up to a multiple of the mesh's row shards.

    Returns:
      A function of lists of token ids; its result is float64 [n, ...].
    """
    size = batch_size if mesh is None else -(-batch_size // row_shards(mesh)) * row_shards(mesh)

    @jax.jit
    def program(params, tokens_1xBxT, lengths_1xB):
        # `put_rows` shards the second axis: the first one is that of micro-batches.
        return apply(params, tokens_1xBxT[0], lengths_1xB[0])

    def run(texts):
        _check_ids(texts, params)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        results = {}
        for start in range(0, len(by_length), size):
            stopping.between_batches()
            indices = by_length[start : start + size]
            batch = _pad([texts[i] for i in indices], size, longest)
            with nullcontext() if mesh is None else jax.set_mesh(mesh):
                batch = batch if mesh is None else put_rows(batch, mesh)
                results |= zip(indices, to_host(program(params, *batch)))
            beat("responses are scored")
        return np.array([results[i] for i in range(len(texts))], np.float64)

    return run


def _check_ids(texts: Sequence[Sequence[int]], params: Params) -> None:
    """Raise RewardError for a text without tokens, or with one that the model has no row for."""
    rows = params["embed"]["tokens"].shape[0]
    for index, ids in enumerate(texts):
        if not len(ids):
            raise RewardError(f"text {index}: it has no token; a score needs at least one")
        if max(ids) >= rows:
            raise RewardError(
                f"text {index}: it has the token id {max(ids)}, but the reward's model only "
                f"{rows} rows; its tokenizer does not belong to it"
            )


def _pad(texts: Sequence[Sequence[int]], size: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [1, size, T] and lengths [1, size]; rows without a text have length 1."""
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


class RewardKind(NamedTuple):
    """A kind of reward.

    Attributes:
      usage: how it is named, for a person.
      open: (what follows the colon, mesh, batch size) -> the reward.
      folder: what follows the colon -> the model's folder; "" where there is none.
      needs_argument: whether something has to follow the colon.
    """

    usage: str
    open: Callable[[str, Mesh | None, int], Reward]
    folder: Callable[[str], str]
    needs_argument: bool = True


def _kind_and_argument(spec: str) -> tuple[RewardKind, str]:
    name, _, argument = spec.partition(":")
    kind = KINDS.get(name)
    if kind is None or (kind.needs_argument and not argument):
        usages = ", ".join(kind.usage for kind in KINDS.values())
        raise RewardError(f"reward {spec!r}: is not one of {usages}")
    return kind, argument


def _open_reviews(argument: str, mesh: Mesh | None, batch_size: int) -> Reward:
    del mesh, batch_size
    return exact_reviews(argument or "probability")


def _no_folder(argument: str) -> str:
    return ""


def _folder_and_label(argument: str) -> tuple[str, str]:
    """Of FOLDER or FOLDER:LABEL; a folder's name may have a colon, too."""
    folder, colon, label = argument.rpartition(":")
    if not colon or label.startswith("//") or storage.as_path(argument).is_dir():
        return argument, "POSITIVE"
    return folder, label


def _classifier_folder(argument: str) -> str:
    return _folder_and_label(argument)[0]


def _open_classifier(argument: str, mesh: Mesh | None, batch_size: int) -> Reward:
    folder, label = _folder_and_label(argument)
    return classifier(folder, label, mesh=mesh, batch_size=batch_size)


def _open_log_odds(argument: str, mesh: Mesh | None, batch_size: int) -> Reward:
    folder, label = _folder_and_label(argument)
    return classifier(folder, label, log_odds=True, mesh=mesh, batch_size=batch_size)


def _open_reward_model(argument: str, mesh: Mesh | None, batch_size: int) -> Reward:
    # The import takes seconds, and imports torch where it is installed.
    from transformers import AutoConfig

    huggingface.require_known(argument)
    pretrained = huggingface.pretrained_name(argument)
    hf_config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
    if hf_config.model_type in ENCODERS:
        _require_one_label(argument, list(hf_config.id2label.values()))
        log_odds = hf_config.problem_type != "regression"  # the number as it is
        return classifier(argument, log_odds=log_odds, mesh=mesh, batch_size=batch_size)
    config, params, _ = huggingface.load(argument, mesh=mesh)
    _require_one_label(argument, config.labels)
    return scalar_head(
        decoder.build(config),
        params,
        read_tokenizer(argument),
        name=f"reward_model:{argument}",
        offset=huggingface.read_centre(argument),
        pad=hf_config.get_text_config().pad_token_id,
        mesh=mesh,
        batch_size=batch_size,
    )


def _require_one_label(folder: str, labels: Sequence[str]) -> None:
    if len(labels) > 1:
        raise RewardError(
            f"reward reward_model:{folder}: it is a classifier of {len(labels)} labels; "
            f"classifier:{folder}:LABEL takes one of {list(labels)}"
        )


KINDS: dict[str, RewardKind] = {
    "reviews": RewardKind(
        "reviews, reviews:log_odds", _open_reviews, _no_folder, needs_argument=False
    ),
    "classifier": RewardKind(
        "classifier:FOLDER, classifier:FOLDER:LABEL", _open_classifier, _classifier_folder
    ),
    "log_odds": RewardKind(
        "log_odds:FOLDER, log_odds:FOLDER:LABEL", _open_log_odds, _classifier_folder
    ),
    "reward_model": RewardKind("reward_model:FOLDER", _open_reward_model, str),
}
