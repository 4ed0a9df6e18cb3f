"""The embedded task: short film reviews drawn from a grammar, rewarded by their exact sentiment.

The reward of a text is P(positive | text), the axis of the DPO paper's IMDb experiment (Rafailov et
al. 2023, section 6.1), computed by the forward algorithm on the hidden Markov model of
`dpojax.data.grammar` instead of by a trained classifier. Every string of words has one.

A text is split on whitespace. Words that the grammar does not know count as <unk>, which is equally
likely in every state. The text need not be complete: its probability is that of all the reviews
that begin with it. A word </s> marks the end, adds the probability of ending there, and
hides what follows it.

Records come in streams, one per (kind, split, seed): asking for more extends a stream and changes
nothing in it. A whole review belongs to "train" or to "eval" by a hash of its words, so that for
any counts and seeds no text, nor any prompt with its response, is in both.
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

SPECIAL_TOKENS = PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
PROMPT_WORDS = (2, 8)
SPLITS = ("train", "eval")
KINDS = ("texts", "prompts", "preferences")

# Two log-odds closer than this are a tie: many texts differ in neutral words alone.
TIE = 1e-3
_BLOCK = 1024
_ROUNDS = 16


def log_odds(texts: Sequence[str]) -> np.ndarray:
    """log P(text | positive) - log P(text | negative), in nats: [n], finite for any text."""
    log_p = log_likelihood(texts)
    return log_p[:, POSITIVE] - log_p[:, NEGATIVE]


def reward(texts: Sequence[str]) -> np.ndarray:
    """P(positive | text) with prior 1/2, the sigmoid of the log-odds: [n] float64 in [0, 1]."""
    return _sigmoid(log_odds(texts))


def score(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """Log-odds of each prompt, a space and its response: [n] float64, in nats."""
    return log_odds(
        [f"{prompt} {response}" for prompt, response in zip(prompts, responses, strict=True)]
    )


def log_likelihood(texts: Sequence[str], model: Grammar | None = None) -> np.ndarray:
    """log P(text | sentiment) in nats, [n, 2] float64: negative, positive.

    Without </s> it is the probability of the prefix. `model` stands in for the built-in grammar.
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
    """Word columns [n, T] (0 past the end), lengths [n] and whether </s> was there [n]."""
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
    """The forward algorithm, rescaled at each word, on texts sorted from long to short.

    Returns log P(words | sentiment) [n, 2] and P(last state | words, sentiment) [n, 2, S].
    """
    # Exactly zero wherever no rule leads: two per cent of the entries remain.
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
    """Draws `count` reviews, or one exact continuation of each of `count` prompts (without it).

    With `return_sentiment` also the latent sentiments, [count] int, 1 for positive. Raises
    ValueError where `count` is not the number of prompts, or a prompt holds </s>.
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
    """Draws (sentiment, state) given each prompt: two [n] int arrays."""
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
    """Runs the chain from each state to the boundary: word columns [n, T], V + 1 past the end."""
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
    """Cumulative sums of each row [r, c], shifted by its row number: all are one sorted list."""
    cumulative = np.cumsum(probabilities, axis=1)
    cumulative[:, -1] = 1.0
    return cumulative + np.arange(len(probabilities))[:, None]


def _draw(rng: np.random.Generator, cumulative: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """One column for each of the rows [n], drawn by the row's probabilities: [n] int."""
    width = cumulative.shape[1]
    found = np.searchsorted(cumulative.ravel(), rows + rng.random(len(rows)), side="right")
    return np.minimum(found - rows * width, width - 1)


def texts(split: str, count: int, seed: int) -> list[str]:
    """`count` whole reviews for supervised fine-tuning. `split` is "train" or "eval"."""
    reviews = (text for rng in _blocks("texts", split, seed) for text in _reviews(rng, split))
    return list(itertools.islice(reviews, count))


def prompts(split: str, count: int, seed: int) -> list[str]:
    """`count` prompts: the first 2 to 8 words of fresh reviews of the split.

    Short ones are few, so a prompt may be in both splits; the reviews that they begin are not.
    """
    found = (prompt for rng in _blocks("prompts", split, seed) for prompt in _prompts(rng, split))
    return list(itertools.islice(found, count))


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

    label: "deterministic" prefers the higher log-odds; "bradley_terry" prefers the first with
    probability sigmoid(difference of log-odds / temperature). Pairs with an empty response, equal
    responses, or, under "deterministic", equal log-odds are drawn again.
    Each record holds prompt, chosen, rejected, chosen_reward, rejected_reward; a response begins
    with the space that parts it from its prompt, the rewards are P(positive | prompt, response).
    The pairs of one prompt stand together. Raises ValueError for an unknown label, and for
    `pairs_per_prompt` or `temperature` that is not positive.
    """
    if label not in ("deterministic", "bradley_terry"):
        raise ValueError(f'label is {label!r}: expected "deterministic" or "bradley_terry"')
    if pairs_per_prompt < 1 or temperature <= 0:
        given = f"pairs_per_prompt {pairs_per_prompt}, temperature {temperature}"
        raise ValueError(f"{given}: both must be positive")
    found = (
        record
        for rng in _blocks("preferences", split, seed)
        for record in _pairs(rng, split, pairs_per_prompt, label, temperature)
    )
    return list(itertools.islice(found, count))


def _pairs(
    rng: np.random.Generator, split: str, pairs_per_prompt: int, label: str, temperature: float
) -> list[dict]:
    """The preference records of one block; a prompt that leaves no room for a choice has none."""
    asked = [prompt for prompt in _prompts(rng, split) for _ in range(pairs_per_prompt)]
    records: list[dict | None] = [None] * len(asked)
    for _ in range(_ROUNDS):
        pending = [i for i, record in enumerate(records) if record is None]
        open_prompts = [asked[i] for i in pending]
        first, second = (sample(rng, len(pending), open_prompts) for _ in range(2))
        odds = np.stack([score(open_prompts, first), score(open_prompts, second)], axis=1)
        difference = odds[:, 0] - odds[:, 1]
        if label == "deterministic":
            first_wins, usable = difference > 0, np.abs(difference) >= TIE
        else:
            first_wins = rng.random(len(pending)) < _sigmoid(difference / temperature)
            usable = np.ones(len(pending), dtype=bool)
        rewards = _sigmoid(odds).tolist()
        for j, i in enumerate(pending):
            pair = (first[j], rewards[j][0]), (second[j], rewards[j][1])
            if usable[j] and _may_pair(asked[i], first[j], second[j], split):
                chosen, rejected = pair if first_wins[j] else pair[::-1]
                records[i] = {
                    "prompt": asked[i],
                    "chosen": f" {chosen[0]}",
                    "rejected": f" {rejected[0]}",
                    "chosen_reward": chosen[1],
                    "rejected_reward": rejected[1],
                }
    starts = range(0, len(records), pairs_per_prompt)
    groups = [records[start : start + pairs_per_prompt] for start in starts]
    return [record for group in groups if None not in group for record in group]


def _may_pair(prompt: str, first: str, second: str, split: str) -> bool:
    """Whether two responses differ, are not empty, and make reviews of the split."""
    distinct = bool(first) and bool(second) and first != second
    return distinct and all(_split_of(f"{prompt} {y}") == split for y in (first, second))


def _blocks(kind: str, split: str, seed: int) -> Iterator[np.random.Generator]:
    """Endless generators, one per block of the stream."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: expected one of {SPLITS}")
    for block in itertools.count():
        key = (KINDS.index(kind), SPLITS.index(split), block)
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
