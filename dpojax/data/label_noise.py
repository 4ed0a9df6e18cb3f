"""A quick implicit check for wrong labels: what words alone say about every pair.

A logistic regression P(chosen beats rejected) = sigmoid(w . x), where x [words] is which words
stand in the chosen response less which stand in the rejected one, is fitted five times, each time
without a fifth of the prompts, and asked about the pairs of that fifth.

What it is not: a rate of wrong labels. It knows words, and neither their order nor the prompt, so
it misses most wrong labels and flags right ones that break a habit of the data. It means something
where its held-out accuracy is high. Measured with 5 % of the labels swapped on purpose, flags being
chances below 10 %: of 1,094 polite against rude answers (accuracy 90 %) it flagged 15, all of them
swapped, of 50; of 3,989 pairs of HH helpful (accuracy 62 %) it flagged 211, of them 27 swapped, of
210. No randomness: the same data always give the same answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.special

MOST_PAIRS = 20_000  # callers with more thin them out; at this size it takes about a minute
FEWEST_PAIRS, FOLDS = 50, 5
VOCABULARY, RAREST = 20_000, 3  # words, and in how many pairs a word has to make a difference
PENALTY = 3.0

Pair = tuple[str, str, str]  # prompt, chosen, rejected


def held_out_chances(pairs: Sequence[Pair]) -> np.ndarray:
    """P(label is right) of every pair, float64 [pairs], by weights fitted without its prompt."""
    x, folds = _word_differences(pairs), _folds(pairs)
    chance = np.empty(len(pairs))
    for fold in np.unique(folds):
        held = folds == fold
        chance[held] = scipy.special.expit(x[held] @ fit(x[~held]))
    return chance


def fit(x: scipy.sparse.csr_array) -> np.ndarray:
    """The w [words] that minimises -sum log sigmoid(x w) + PENALTY / 2 |w|^2; x [pairs, words]."""

    def loss_and_gradient(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = x @ w
        loss = np.logaddexp(0.0, -margin).sum() + PENALTY / 2 * (w @ w)
        return loss, PENALTY * w - x.T @ scipy.special.expit(-margin)

    start = np.zeros(x.shape[1])
    return scipy.optimize.minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B").x


def _folds(pairs: Sequence[Pair]) -> np.ndarray:
    """The fold of each pair; pairs of one prompt share it, unless there are too few prompts."""
    prompts: dict[str, int] = {}
    numbers = np.array([prompts.setdefault(prompt, len(prompts)) for prompt, _, _ in pairs])
    return (numbers if len(prompts) >= FEWEST_PAIRS else np.arange(len(pairs))) % FOLDS


def _word_differences(pairs: Sequence[Pair]) -> scipy.sparse.csr_array:
    """[pairs, words]: 1 where only the chosen response has the word, -1 where only the rejected."""
    differing = []
    for _, *responses in pairs:
        chosen, rejected = (set(re.findall(r"\w+|[^\w\s]", text.lower())) for text in responses)
        # Sorted: the order of a set of strings differs from run to run.
        signs = dict.fromkeys(sorted(chosen - rejected), 1.0)
        differing.append(signs | dict.fromkeys(sorted(rejected - chosen), -1.0))
    counts = Counter(word for words in differing for word in words)
    known = [word for word, count in counts.most_common(VOCABULARY) if count >= RAREST]
    column = {word: number for number, word in enumerate(known)}
    entries = [
        (row, column[word], sign)
        for row, words in enumerate(differing)
        for word, sign in words.items()
        if word in column
    ]
    rows, columns, values = zip(*entries) if entries else ((), (), ())
    shape = (len(pairs), max(len(known), 1))
    return scipy.sparse.csr_array((values, (rows, columns)), shape=shape, dtype=np.float64)
