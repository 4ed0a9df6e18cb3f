"""A quick check for wrong labels: a classifier of words, cross-validated on the pairs.

The classifier is a logistic regression, P(chosen beats rejected) = sigmoid(w . x). x [words] is 1
for a word that only the chosen response has, and -1 for a word that only the rejected one has. The
prompts are divided into five folds. The pairs of each fold are predicted by weights that were
fitted to the other four.

The result is not a rate of wrong labels. The classifier sees neither the order of words nor the
prompt, so it misses most wrong labels, and it flags right ones that break a habit of the data. It
means something only if its held-out accuracy is high. Measured with 5 % of the labels swapped on
purpose, a pair being flagged below a chance of 10 %:

* 1,094 pairs of polite and rude answers (accuracy 90 %): 15 flagged, all of them among the 50
  swapped ones.
* 3,989 pairs of HH helpful (accuracy 62 %): 211 flagged, 27 of them among the 210 swapped ones.

There is no randomness: the same data always give the same answer.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.special

MOST_PAIRS = 20_000  # takes about a minute; callers take a part of a larger data set
FEWEST_PAIRS, FOLDS = 50, 5
VOCABULARY = 20_000  # words
RAREST = 3  # a word is left out if it makes a difference in fewer pairs
PENALTY = 3.0  # of |w|^2 / 2

Pair = tuple[str, str, str]  # prompt, chosen, rejected


def held_out_chances(pairs: Sequence[Pair]) -> np.ndarray:
    """P(label is right) of every pair, float64 [pairs], by weights fitted without its prompt."""
    x, folds = _word_differences(pairs), _folds(pairs)
    chance = np.empty(len(pairs))
    for fold in np.unique(folds):
        held_out = folds == fold
        chance[held_out] = scipy.special.expit(x[held_out] @ fit(x[~held_out]))
    return chance


def fit(x: scipy.sparse.csr_array) -> np.ndarray:
    """Fit the weights w [words] that minimise -sum log sigmoid(x w) + PENALTY / 2 |w|^2.

    Args:
      x: [pairs, words].
    """

    def loss_and_gradient(w: np.ndarray) -> tuple[float, np.ndarray]:
        margin = x @ w
        loss = np.logaddexp(0.0, -margin).sum() + PENALTY / 2 * (w @ w)
        return loss, PENALTY * w - x.T @ scipy.special.expit(-margin)

    start = np.zeros(x.shape[1])
    return scipy.optimize.minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B").x


def _folds(pairs: Sequence[Pair]) -> np.ndarray:
    """The fold of each pair [pairs]. Pairs of one prompt share it, unless prompts are too few."""
    prompts: dict[str, int] = {}
    numbers = np.array([prompts.setdefault(prompt, len(prompts)) for prompt, _, _ in pairs])
    return (numbers if len(prompts) >= FEWEST_PAIRS else np.arange(len(pairs))) % FOLDS


def _word_differences(pairs: Sequence[Pair]) -> scipy.sparse.csr_array:
    """[pairs, words]: 1 where only the chosen response has the word, -1 where only the rejected."""
    numbers: dict[str, int] = {}  # of the words, in the order in which they come
    rows, words, signs = array("l"), array("l"), array("d")
    for row, (_, *responses) in enumerate(pairs):
        chosen, rejected = (set(re.findall(r"\w+|[^\w\s]", text.lower())) for text in responses)
        for sign, differing in ((1.0, chosen - rejected), (-1.0, rejected - chosen)):
            # Sorted: the order of a set of strings differs from run to run.
            words.extend(numbers.setdefault(word, len(numbers)) for word in sorted(differing))
            rows.extend(itertools.repeat(row, len(differing)))
            signs.extend(itertools.repeat(sign, len(differing)))
    counts = np.bincount(words, minlength=len(numbers))
    known = np.argsort(-counts, kind="stable")[:VOCABULARY]
    known = known[counts[known] >= RAREST]
    column_of = np.full(len(numbers), -1)
    column_of[known] = np.arange(len(known))
    columns = column_of[np.asarray(words)]
    is_known = columns >= 0
    shape = (len(pairs), max(len(known), 1))
    entries = np.asarray(signs)[is_known], (np.asarray(rows)[is_known], columns[is_known])
    return scipy.sparse.csr_array(entries, shape=shape)
