"""The embedded task: short film reviews drawn from a grammar, rewarded by their exact sentiment.

The reward of a text is P(positive | text), as in the IMDb experiment of the DPO paper (Rafailov et
al. 2023, section 6.1). There a trained classifier estimates it; here the forward algorithm computes
it on the hidden Markov model of `dpojax.data.grammar`. Every string of words has a reward.

A text is split on whitespace. Words that the grammar does not know count as <unk>, which is equally
likely in every state. The text need not be complete: its probability is that of all reviews that
begin with it. The word </s> marks the end of a text: the probability of ending there is a factor,
and all that follows </s> is ignored.

Records come in streams, one for each (kind, split, seed). A larger count continues the stream and
changes nothing in its start. A hash of its words puts a whole review into "train" or into "eval".
So no text, and no prompt with its response, is in both, whatever the counts and seeds.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpojax.data.grammar import NEGATIVE, POSITIVE, Grammar, grammar
from dpojax.data.pairing import BRADLEY_TERRY, KINDS, NEUTRAL_WORDS, Labels

SPECIAL_TOKENS = PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
PROMPT_WORDS = (2, 8)  # fewest and most
SPLITS = ("train", "eval")
STREAMS = ("texts", "prompts", "preferences")

_BLOCK = 1024  # reviews of one random generator, and texts of one call of `_forward`
_ROUNDS = 16  # how often a pair that cannot be used is drawn again


def log_odds(texts: Sequence[str]) -> np.ndarray:
    """log P(text | positive) - log P(text | negative), in nats: [n], finite for any text."""
    log_p = log_likelihood(texts)
    return log_p[:, POSITIVE] - log_p[:, NEGATIVE]


def reward(texts: Sequence[str]) -> np.ndarray:
    """P(positive | text) with prior 1/2, the sigmoid of the log-odds: [n] float64 in [0, 1]."""
    return _sigmoid(log_odds(texts))


def score(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """Log-odds of each text "PROMPT RESPONSE": [n] float64, in nats."""
    return log_odds(
        [f"{prompt} {response}" for prompt, response in zip(prompts, responses, strict=True)]
    )


def log_likelihood(texts: Sequence[str], model: Grammar | None = None) -> np.ndarray:
    """log P(text | sentiment) in nats, [n, 2] float64: negative, positive.

    A text without </s> has the probability of all reviews that begin with it.

    Args:
      texts: n texts.
      model: None is the built-in grammar.
    """
    model = model or grammar()
    tokens, lengths, ended = _encode(texts, model)
    log_p = np.zeros((len(texts), 2))
    by_length = np.argsort(-lengths, kind="stable")
    for start in range(0, len(texts), _BLOCK):
        rows = by_length[start : start + _BLOCK]
        log_p[rows], belief = _forward(model, tokens[rows], lengths[rows])
        stop = np.einsum("nsi,si->ns", belief, model.transition[:, :, 0])
        log_p[rows] += np.where(ended[rows, None], np.log(stop), 0.0)
    return log_p


def _encode(texts: Sequence[str], model: Grammar) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Word indices [n, T] (0 past the end), lengths [n], and whether a text holds </s> [n].

    A word's index is its column in `Grammar.emission`.
    """
    column = {word: i for i, word in enumerate(model.words)}
    unknown = len(model.words)
    rows, ended = [], []
    for text in texts:
        words = text.split()
        ended.append(EOS in words)
        if ended[-1]:
            words = words[: words.index(EOS)]
        rows.append([column.get(word, unknown) for word in words])
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    tokens = np.zeros((len(rows), max(lengths, default=0)), dtype=np.int64)
    tokens[np.arange(tokens.shape[1]) < lengths[:, None]] = list(
        itertools.chain.from_iterable(rows)
    )
    return tokens, lengths, np.array(ended, dtype=bool)


def _forward(
    model: Grammar, tokens: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The forward algorithm, rescaled at each word.

    Args:
      model: the grammar, with S states.
      tokens: word indices [n, T] of texts sorted from long to short.
      lengths: [n].

    Returns:
      log P(words | sentiment) [n, 2] and P(last state | words, sentiment) [n, 2, S].
    """
    # Without the leak, a transition that no rule makes is exactly zero: 2 % of the entries remain.
    sparse = [
        scipy.sparse.csr_array((matrix - leak).T)
        for matrix, leak in zip(model.transition, model.leak[:, None])
    ]
    shared = model.leak[:, :, None]
    belief = np.zeros((2, len(model.states), len(tokens)))
    belief[:, 0] = 1.0
    log_p = np.zeros((len(tokens), 2))
    for t in range(max(lengths, default=0)):
        n = np.count_nonzero(lengths > t)
        emission = np.take(model.emission, tokens[:n, t], axis=1)
        for s in (NEGATIVE, POSITIVE):
            joint = (sparse[s] @ belief[s, :, :n] + shared[s]) * emission
            total = joint.sum(axis=0)
            belief[s, :, :n] = joint / total
            log_p[:n, s] += np.log(total)
    return log_p, belief.transpose(2, 0, 1)


def sample(
    rng: np.random.Generator,
    count: int,
    prompts: Sequence[str] | None = None,
    *,
    return_sentiment: bool = False,
) -> list[str] | tuple[list[str], np.ndarray]:
    """Draw whole reviews, or continuations of prompts, from the exact distribution.

    Args:
      rng: source of randomness.
      count: number of texts.
      prompts: `count` beginnings of reviews. A continuation does not repeat its prompt. None: whole
        reviews.
      return_sentiment: also return the latent sentiments, [count] int, 1 for positive.

    Raises:
      ValueError: `count` is not the number of prompts, or a prompt holds </s>.
    """
    model = grammar()
    if prompts is None:
        sentiment = rng.integers(0, 2, count)
        state = np.zeros(count, dtype=np.int64)
    else:
        if len(prompts) != count:
            raise ValueError(
                f"count is {count}, but there are {len(prompts)} prompts: make them equal"
            )
        sentiment, state = _posterior_draw(rng, model, prompts)
    words = np.array([*model.words, UNK, ""], dtype=object)
    drawn = words[_walk(rng, model, sentiment, state)]
    texts = [" ".join(row).rstrip() for row in drawn.tolist()]
    return (texts, sentiment) if return_sentiment else texts


def _posterior_draw(
    rng: np.random.Generator, model: Grammar, prompts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Draw (sentiment, state) given each prompt: two [n] int arrays."""
    tokens, lengths, ended = _encode(prompts, model)
    if ended.any():
        raise ValueError(f"prompt {int(np.argmax(ended))} holds {EOS}: a prompt must be open")
    order = np.argsort(-lengths, kind="stable")
    log_p, belief = _forward(model, tokens[order], lengths[order])
    weight = np.exp(log_p - log_p.max(axis=1, keepdims=True))
    joint = (belief * weight[:, :, None]).reshape(len(prompts), 2 * len(model.states))
    cumulative = np.cumsum(joint, axis=1)
    threshold = rng.random(len(prompts))[order] * cumulative[:, -1]
    drawn = np.empty(len(prompts), dtype=np.int64)
    drawn[order] = np.count_nonzero(cumulative <= threshold[:, None], axis=1)
    return np.divmod(drawn, len(model.states))


def _walk(
    rng: np.random.Generator, model: Grammar, sentiment: np.ndarray, state: np.ndarray
) -> np.ndarray:
    """Run the chain from each state to the boundary.

    Args:
      rng: source of randomness.
      model: the grammar, with V words.
      sentiment, state: [n], of the n chains at their start.

    Returns:
      Word indices [n, T], V + 1 past the end.
    """
    size = len(model.states)
    step = _cumulative(model.transition.reshape(2 * size, size))
    word = _cumulative(model.emission)
    live, columns = np.arange(len(state)), []
    while True:
        state = _draw(rng, step, sentiment[live] * size + state)
        live, state = live[state > 0], state[state > 0]
        if not len(live):
            break
        columns.append(np.full(len(sentiment), len(model.words) + 1))
        columns[-1][live] = _draw(rng, word, state)
    return np.stack(columns, axis=1) if columns else np.empty((len(sentiment), 0), dtype=np.int64)


def _cumulative(probabilities: np.ndarray) -> np.ndarray:
    """Cumulative sums of each row [r, c], plus the row number.

    The flattened result is sorted, so one binary search can draw from many rows.
    """
    cumulative = np.cumsum(probabilities, axis=1)
    cumulative[:, -1] = 1.0
    return cumulative + np.arange(len(probabilities))[:, None]


def _draw(rng: np.random.Generator, cumulative: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Draw a column for each row number in `rows` [n], by the probabilities of that row: [n]."""
    width = cumulative.shape[1]
    flat = np.searchsorted(cumulative.ravel(), rows + rng.random(len(rows)), side="right")
    return np.minimum(flat - rows * width, width - 1)


def texts(split: str, count: int, seed: int) -> list[str]:
    """`count` whole reviews for supervised fine-tuning. `split` is "train" or "eval"."""
    reviews = (text for rng in _blocks("texts", split, seed) for text in _reviews(rng, split))
    return list(itertools.islice(reviews, count))


def prompts(split: str, count: int, seed: int) -> list[str]:
    """`count` prompts: the first 2 to 8 words of new reviews of the split.

    There are few short prompts, so a prompt may be in both splits. The reviews are not.
    """
    stream = (prompt for rng in _blocks("prompts", split, seed) for prompt in _prompts(rng, split))
    return list(itertools.islice(stream, count))


def preferences(
    split: str,
    count: int,
    seed: int,
    *,
    pairs_per_prompt: int = 1,
    label: str = "deterministic",
    temperature: float = 1.0,
) -> list[dict]:
    """`count` pairs of continuations drawn from the grammar, labelled by their exact log-odds.

    Pairs with an empty response, with equal responses, or with tied log-odds are drawn again.

    Args:
      split: "train" or "eval".
      count: number of records.
      seed: of the stream.
      pairs_per_prompt: the pairs of one prompt follow one another.
      label, temperature: `kind` and `temperature` of `pairing.Labels`; the score is the log-odds.

    Returns:
      Records with prompt, chosen, rejected, chosen_reward, rejected_reward. A response begins with
      the space that separates it from its prompt. A reward is P(positive | prompt, response).

    Raises:
      ValueError: an unknown split or label; `pairs_per_prompt` or `temperature` is not positive.
    """
    if label not in KINDS:
        raise ValueError(f"label is {label!r}: expected one of {', '.join(KINDS)}")
    if pairs_per_prompt < 1 or temperature <= 0:
        raise ValueError(
            f"pairs_per_prompt {pairs_per_prompt}, temperature {temperature}: both must be positive"
        )
    labels = Labels(label, temperature, tie=NEUTRAL_WORDS)
    stream = (
        record
        for rng in _blocks("preferences", split, seed)
        for record in _pairs(rng, split, pairs_per_prompt, labels)
    )
    return list(itertools.islice(stream, count))


def _pairs(
    rng: np.random.Generator, split: str, pairs_per_prompt: int, labels: Labels
) -> list[dict]:
    """The preference records of one block.

    A prompt of which some pair is unusable in every round has no record at all.
    """
    prompts = [prompt for prompt in _prompts(rng, split) for _ in range(pairs_per_prompt)]
    records: list[dict | None] = [None] * len(prompts)
    for _ in range(_ROUNDS):
        pending = [i for i, record in enumerate(records) if record is None]
        open_prompts = [prompts[i] for i in pending]
        first, second = (sample(rng, len(pending), open_prompts) for _ in range(2))
        odds = np.stack([score(open_prompts, first), score(open_prompts, second)], axis=1)
        difference = odds[:, 0] - odds[:, 1]
        uniform = rng.random(len(pending)) if labels.kind == BRADLEY_TERRY else None
        first_wins, tied = labels.first_wins(difference, uniform), labels.tied(difference)
        rewards = _sigmoid(odds).tolist()
        for j, i in enumerate(pending):
            if tied[j] or not _may_pair(prompts[i], first[j], second[j], split):
                continue
            pair = (first[j], rewards[j][0]), (second[j], rewards[j][1])
            chosen, rejected = pair if first_wins[j] else pair[::-1]
            records[i] = _record(prompts[i], *chosen, *rejected)
    starts = range(0, len(records), pairs_per_prompt)
    groups = [records[start : start + pairs_per_prompt] for start in starts]
    return [record for group in groups if None not in group for record in group]


def _record(
    prompt: str, chosen: str, chosen_reward: float, rejected: str, rejected_reward: float
) -> dict:
    return {
        "prompt": prompt,
        "chosen": f" {chosen}",
        "rejected": f" {rejected}",
        "chosen_reward": chosen_reward,
        "rejected_reward": rejected_reward,
    }


def _may_pair(prompt: str, first: str, second: str, split: str) -> bool:
    """Whether two responses differ, are not empty, and make whole reviews of the split."""
    distinct = bool(first) and bool(second) and first != second
    return distinct and all(_split_of(f"{prompt} {y}") == split for y in (first, second))


def _blocks(kind: str, split: str, seed: int) -> Iterator[np.random.Generator]:
    """Yield a random generator for each block of a stream, without end."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: expected one of {SPLITS}")
    for block in itertools.count():
        key = (STREAMS.index(kind), SPLITS.index(split), block)
        yield np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _reviews(rng: np.random.Generator, split: str) -> list[str]:
    return [text for text in sample(rng, _BLOCK) if _split_of(text) == split]


def _prompts(rng: np.random.Generator, split: str) -> list[str]:
    reviews = [text.split() for text in _reviews(rng, split)]
    lengths = rng.integers(PROMPT_WORDS[0], PROMPT_WORDS[1] + 1, len(reviews))
    return [" ".join(words[:n]) for words, n in zip(reviews, lengths.tolist()) if len(words) > n]


def _split_of(text: str) -> str:
    return SPLITS[hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 2]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # By tanh, which does not overflow for large negative x.
    return 0.5 * (1 + np.tanh(x / 2))


@functools.cache
def _vocabulary() -> dict[str, int]:
    return {token: i for i, token in enumerate((*SPECIAL_TOKENS, *grammar().words))}


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the grammar: <pad> 0, <s> 1, </s> 2, <unk> 3, then the words.

    It splits on whitespace, and puts one <s> before a text (as Llama's do) unless called with
    add_special_tokens=False. It has no chat template.
    """
    backend = Tokenizer(models.WordLevel(_vocabulary(), unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, _vocabulary()[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK
    )
