"""The classifier of words: its optimum, its folds, and that it is the same in every run."""

import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import scipy.special

from dpojax.data import label_noise


def test_one_word_has_the_weight_at_which_the_derivative_vanishes():
    x = scipy.sparse.csr_array(np.array([[1.0]] * 7 + [[-1.0]] * 2))
    expected = scipy.optimize.brentq(
        lambda w: (
            label_noise.PENALTY * w - 7 * scipy.special.expit(-w) + 2 * scipy.special.expit(w)
        ),
        -5,
        5,
    )
    assert label_noise.fit(x) == pytest.approx([expected], abs=1e-4)


def test_a_pair_is_never_judged_by_pairs_of_its_own_prompt():
    """Words that no other prompt has, however often their own repeats them, say nothing."""
    pairs = [(f"prompt {n}", f"good{n}", f"bad{n}") for n in range(60) for _ in range(5)]
    np.testing.assert_array_equal(label_noise.held_out_chances(pairs), 0.5)


def test_pairs_of_a_single_prompt_are_still_divided():
    pairs = [("", "good", "bad")] * 50
    chances = label_noise.held_out_chances(pairs)
    # 40 pairs without the fifth: two words of weight w, 40 sigmoid(-2 w) = PENALTY w.
    w = scipy.optimize.brentq(
        lambda w: 40 * scipy.special.expit(-2 * w) - label_noise.PENALTY * w, 0, 5
    )
    np.testing.assert_allclose(chances, scipy.special.expit(2 * w), atol=1e-4)


def test_words_in_both_responses_and_rare_words_say_nothing():
    pairs = [(f"p{n}", "same", "Same") for n in range(50)] + [("q", "rare same", "odd same")] * 2
    np.testing.assert_array_equal(label_noise.held_out_chances(pairs), 0.5)


PROGRAM = """
from dpojax.data import label_noise
words = [f"w{n * n % 31}" for n in range(400)]
pairs = [(f"p{n}", " ".join(words[n:n + 6]), " ".join(words[2 * n:2 * n + 5])) for n in range(120)]
print(label_noise.held_out_chances(pairs).tobytes().hex())
"""


def test_the_result_does_not_depend_on_how_python_hashes_strings():
    runs = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert len(runs[0].strip()) == 120 * 16
