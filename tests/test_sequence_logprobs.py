"""From a model's output to the log-probs of its responses, and what is refused on the way."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax import head
from dpojax.head import Head
from dpojax.logprobs import (
    sequence_logprobs,
    sequence_logprobs_from_hidden,
    sequences,
    sum_by_response,
    token_logprobs,
    token_logprobs_plain,
)

DRAW = np.random.default_rng(0)
ROWS, TOKENS, WIDTH, VOCABULARY = 3, 6, 8, 11
HIDDEN = jnp.float32(DRAW.normal(size=(ROWS, TOKENS, WIDTH)))
HEAD = Head(jnp.float32(DRAW.normal(size=(VOCABULARY, WIDTH))))
LOGITS = HIDDEN @ HEAD.weight.T
IDS = jnp.int32(DRAW.integers(0, VOCABULARY, (ROWS, TOKENS)))
MASK = jnp.array([[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)


def by_hand(logits, ids, mask):
    """Sums, means and lengths, token by token in float64."""
    sums, lengths = np.zeros(ROWS), np.zeros(ROWS, int)
    for row in range(ROWS):
        for place in range(1, TOKENS):
            if mask[row, place]:
                z = np.float64(logits[row, place - 1])
                sums[row] += z[ids[row, place]] - np.log(np.exp(z).sum())
                lengths[row] += 1
    return sums, sums / np.maximum(lengths, 1), lengths


def forms(mask, ids=IDS):
    """The two ways to the same numbers."""
    return (
        sequence_logprobs(LOGITS, ids, mask),
        sequence_logprobs_from_hidden(HIDDEN, HEAD, ids, mask),
    )


@pytest.mark.parametrize("dtype", [bool, jnp.int32], ids=["bool", "0 and 1"])
def test_sums_means_and_lengths_are_those_of_the_next_tokens_in_the_mask(dtype):
    for got in forms(MASK.astype(dtype)):
        for one, want in zip(got, by_hand(LOGITS, IDS, MASK), strict=True):
            np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-6)


def test_what_the_mask_leaves_out_may_be_labels_of_minus_100_and_logits_of_nan():
    labels = jnp.where(MASK, IDS, -100)
    for got, want in zip(forms(labels != -100, labels), forms(MASK), strict=True):
        np.testing.assert_array_equal(got.sums, want.sums)
    predicts_nothing = ~jnp.roll(MASK, -1, axis=1)[..., None]
    got = sequence_logprobs(jnp.where(predicts_nothing, jnp.nan, LOGITS), IDS, MASK)
    np.testing.assert_array_equal(got.sums, forms(MASK)[0].sums)


def test_logits_in_bfloat16_are_summed_in_float32():
    got = sequence_logprobs(LOGITS.astype(jnp.bfloat16), IDS, MASK).sums
    rounded = np.asarray(LOGITS.astype(jnp.bfloat16), np.float32)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, by_hand(rounded, IDS, MASK)[0], rtol=1e-5)


REFUSED = {
    "a mask of another shape": (
        lambda: sequence_logprobs(LOGITS, IDS, MASK[:, 1:]),
        ValueError,
        r"logits \(3, 6, 11\), tokens \(3, 6\) and mask \(3, 5\) do not belong together",
    ),
    "shifted tokens": (
        lambda: sequence_logprobs_from_hidden(HIDDEN, HEAD, IDS[:, 1:], MASK[:, 1:]),
        ValueError,
        r"hidden \(3, 6, 8\), tokens \(3, 5\)",
    ),
    "a mask of floats": (
        lambda: sequence_logprobs(LOGITS, IDS, MASK.astype(jnp.float32)),
        TypeError,
        "mask must be boolean",
    ),
    "tokens of floats": (
        lambda: sequence_logprobs(LOGITS, IDS.astype(jnp.float32), MASK),
        TypeError,
        "tokens must be integers, got float32",
    ),
    "targets of floats": (
        lambda: token_logprobs(HIDDEN, HEAD, IDS.astype(jnp.float32)),
        TypeError,
        "targets must be integers, got float32",
    ),
    "a mask for numbers of responses": (
        lambda: sum_by_response(LOGITS[..., 0], MASK, 1),
        TypeError,
        "no mask.*must be integers, got bool",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_does_not_belong_together_is_refused_also_under_jit(mistake):
    call, kind, message = REFUSED[mistake]
    for run in (call, jax.jit(call)):
        with pytest.raises(kind, match=message):
            run()


@pytest.mark.parametrize("target", [-100, -1, VOCABULARY])
def test_a_target_that_is_no_token_is_refused_and_nan_where_its_value_is_not_known(target):
    targets = IDS.at[1, 2].set(target)
    with pytest.raises(ValueError, match=rf"targets hold .*{target}.* tokens 0 to 10; .*-100"):
        token_logprobs(HIDDEN, HEAD, targets)
    for function in (token_logprobs, token_logprobs_plain):
        got = jax.jit(function)(HIDDEN, HEAD, targets)
        want = function(HIDDEN, HEAD, IDS)
        assert np.isnan(got[1, 2])
        others = np.ones(IDS.shape, bool)
        others[1, 2] = False
        np.testing.assert_allclose(got[others], want[others], rtol=1e-5)


def test_a_nan_of_padding_reaches_no_gradient():
    targets = IDS.at[1, 2].set(-100)

    def total(hidden, targets):
        return jnp.where(targets >= 0, token_logprobs(hidden, HEAD, targets), 0).sum()

    gradient = jax.jit(jax.grad(total))(HIDDEN, targets)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1, 2], 0)


def test_a_mask_of_0_and_1_as_numbers_of_responses_is_refused_or_nan():
    values, mask = jnp.array([[-1.0, -2.0, -30.0, -60.0]]), jnp.array([[1, 1, 0, 0]])
    with pytest.raises(ValueError, match=r"response holds 1, and there are 1 slots.*padding is -1"):
        sum_by_response(values, mask, 1)
    assert np.isnan(jax.jit(sum_by_response, static_argnums=2)(values, mask, 1)).all()


def test_examples_run():
    outcome = doctest.testmod(sequences)
    assert outcome.attempted > 10
    assert outcome.failed == 0
    outcome = doctest.testmod(head)
    assert outcome.attempted > 2
    assert outcome.failed == 0
