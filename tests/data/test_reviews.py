"""The embedded task: its reward is an exact posterior, and its samples are exact draws."""

import collections

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dpojax.data import reviews
from tests import further

WORDS = reviews.grammar().words


def chi_square(observed: collections.Counter, expected: dict[str, float]) -> float:
    """p-value of the counts, with all that is expected fewer than 5 times taken as one."""
    total = sum(observed.values())
    common = [word for word, p in expected.items() if p * total >= 5]
    counts = [observed[word] for word in common]
    means = [expected[word] * total for word in common]
    rest = total - sum(means)
    return scipy.stats.chisquare([*counts, total - sum(counts)], [*means, rest]).pvalue


def next_word_probabilities(prefix: str) -> dict[str, float]:
    """P(word | prefix) from the likelihoods of all the one-word continuations, "" for the end."""
    choices = [*WORDS, reviews.UNK, reviews.EOS]
    log_p = reviews.log_likelihood([prefix] + [f"{prefix} {word}" for word in choices])
    p = np.exp(log_p).mean(axis=1)
    return dict(zip([*WORDS, reviews.UNK, ""], p[1:] / p[0]))


@pytest.mark.parametrize("prefix", ["", "i watched", "the acting was not bad , but", "bad zebra 7"])
def test_a_prefix_is_as_likely_as_all_its_continuations(prefix):
    following = [f"{prefix} {word}" for word in (*WORDS, "unheard-of", reviews.EOS)]
    log_p = reviews.log_likelihood([prefix, *following])
    np.testing.assert_allclose(np.exp(log_p[1:]).sum(axis=0), np.exp(log_p[0]), rtol=1e-11)


@given(st.lists(st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=40), max_size=5))
@settings(max_examples=50, deadline=None)
def test_any_string_of_words_has_a_finite_log_odds(rows):
    texts = [" ".join(row) for row in rows]
    odds = reviews.log_odds(texts)
    assert odds.shape == (len(texts),)
    assert odds.dtype == np.float64
    assert np.isfinite(odds).all()
    assert np.isfinite(reviews.log_odds([f"{text} {reviews.EOS}" for text in texts])).all()


def test_a_text_scores_alike_alone_and_in_a_batch():
    texts = reviews.sample(np.random.default_rng(0), 1500)
    alone = np.concatenate([reviews.log_odds([text]) for text in texts[:20]])
    np.testing.assert_allclose(reviews.log_odds(texts)[:20], alone, rtol=1e-10, atol=1e-12)


def test_unknown_words_and_the_empty_text_say_nothing():
    np.testing.assert_allclose(reviews.reward(["", "qwerty", "qwerty " * 30]), 0.5, atol=1e-12)


def test_what_follows_the_end_is_not_read():
    ended, trailing = reviews.log_likelihood(["skip it . </s>", "skip it . </s> good <pad>"])
    np.testing.assert_array_equal(ended, trailing)


def test_the_reward_is_the_sigmoid_of_the_log_odds_even_far_out():
    good = "i loved every minute . " * 200
    bad = "i hated every minute . " * 200
    assert reviews.log_odds([good])[0] > 200 > -200 > reviews.log_odds([bad])[0]
    assert reviews.reward([good, bad]) == pytest.approx([1.0, 0.0], abs=1e-12)
    text = "the plot dragged ."
    assert reviews.reward([text])[0] == pytest.approx(
        1 / (1 + np.exp(-reviews.log_odds([text])[0]))
    )


def test_nothing_asked_for_is_nothing_drawn():
    rng = np.random.default_rng(0)
    assert reviews.sample(rng, 0) == reviews.sample(rng, 0, []) == []
    assert reviews.preferences("train", 0, seed=0) == []
    assert reviews.reward([]).shape == (0,)


def test_score_reads_the_prompt_and_the_response_as_one_text():
    np.testing.assert_array_equal(
        reviews.score(["the plot was", "the plot"], ["not bad .", "was not bad ."]),
        reviews.log_odds(["the plot was not bad ."] * 2),
    )


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("the plot was good .", "the plot was not good ."),
        ("the plot was not bad .", "the plot was bad ."),
        ("the acting is hardly convincing , but nobody slept .", "nobody laughed ."),
        ("the music never dragged .", "the music never worked ."),
        ("i did not mind the music .", "i did not enjoy the music ."),
        ("it has no filler .", "it has no charm ."),
        ("overall , not a boring western .", "overall , not a good western ."),
        ("do not miss it .", "do not watch it ."),
        ("skip it . 9 / 10", "skip it . 2 / 10"),
    ],
)
def test_negation_turns_the_polarity_of_a_word(better, worse):
    high, low = reviews.log_odds([better, worse])
    assert high > low + 0.3
    if better.count(" ") < 8:
        assert high > 0.2
        assert low < -0.2 or worse.startswith("skip")


def test_first_words_are_drawn_with_their_exact_probabilities():
    texts = reviews.sample(np.random.default_rng(1), 20_000)
    observed = collections.Counter((text.split() or [""])[0] for text in texts)
    assert chi_square(observed, next_word_probabilities("")) > 1e-3


@pytest.mark.parametrize(
    "prefix", ["i loved every minute .", "the plot was not", "acting bad zebra"]
)
def test_continuations_are_drawn_from_the_exact_conditional(prefix):
    texts = reviews.sample(np.random.default_rng(2), 10_000, [prefix] * 10_000)
    observed = collections.Counter((text.split() or [""])[0] for text in texts)
    assert chi_square(observed, next_word_probabilities(prefix)) > 1e-3


def test_prompts_of_different_lengths_each_get_their_own_continuation():
    prompts = ["i did not", "overall , a", "laurent played the villain", "7 /"] * 500
    texts = reviews.sample(np.random.default_rng(3), 2000, prompts)
    for i, expected in enumerate(["enjoy", "good", "badly", "10"]):
        firsts = collections.Counter((text.split() or [""])[0] for text in texts[i::4])
        assert firsts[expected] == pytest.approx(
            500 * next_word_probabilities(prompts[i])[expected], abs=60
        )
        assert firsts[expected] > 10


def test_the_sentiment_given_a_prompt_is_drawn_from_its_posterior():
    prompt = "i loved every minute ."
    _, sentiment = reviews.sample(
        np.random.default_rng(4), 8000, [prompt] * 8000, return_sentiment=True
    )
    assert sentiment.mean() == pytest.approx(reviews.reward([prompt])[0], abs=0.025)


def test_the_reward_is_calibrated():
    texts, sentiment = reviews.sample(np.random.default_rng(5), 20_000, return_sentiment=True)
    rewards = reviews.reward(texts)
    for low in np.arange(0, 1, 0.1):
        inside = (rewards >= low) & (rewards < low + 0.1)
        spread = np.sqrt((rewards * (1 - rewards))[inside].sum())
        assert inside.sum() > 200
        assert abs((sentiment - rewards)[inside].sum()) < 4.5 * spread


def test_reviews_have_ten_to_sixty_words_and_rewards_of_every_kind():
    texts = reviews.texts("train", 5000, seed=0)
    lengths = np.array([len(text.split()) for text in texts])
    assert ((lengths >= 10) & (lengths <= 60)).mean() > 0.97
    rewards = reviews.reward(texts)
    assert rewards.mean() == pytest.approx(0.5, abs=0.03)
    counts, _ = np.histogram(rewards, [0, 0.1, 0.4, 0.6, 0.9, 1])
    assert (counts > 250).all()


@pytest.mark.slow
@pytest.mark.parametrize("draw", [reviews.texts, reviews.prompts, reviews.preferences])
def test_a_stream_is_fixed_by_its_seed_and_grows_at_its_end(draw):
    few, many = draw("train", 100, 7), draw("train", 1500, 7)
    assert (len(few), len(many)) == (100, 1500)
    assert many[:100] == few
    assert draw("train", 100, 8) != few
    assert draw("eval", 100, 7) != few


@pytest.mark.slow
def test_no_review_is_in_both_splits_whatever_the_seeds():
    drawn = reviews.sample(np.random.default_rng(6), 40_000)
    assert len(set(drawn)) < len(drawn)  # Independent draws would meet.
    train = set(reviews.texts("train", 20_000, seed=0))
    assert train.isdisjoint(reviews.texts("eval", 10_000, seed=0))
    assert train.isdisjoint(reviews.texts("eval", 10_000, seed=1))
    pairs = reviews.preferences("eval", 1000, seed=0)
    whole = {f"{pair['prompt']}{pair[key]}" for pair in pairs for key in ("chosen", "rejected")}
    assert train.isdisjoint(whole)


def test_prompts_are_two_to_eight_words_long():
    lengths = {len(prompt.split()) for prompt in reviews.prompts("eval", 500, seed=0)}
    assert lengths == set(range(2, 9))


def test_deterministic_preferences_choose_the_higher_exact_reward():
    pairs = reviews.preferences("train", 600, seed=0)
    prompts, chosen, rejected = (
        [pair[key] for pair in pairs] for key in ("prompt", "chosen", "rejected")
    )
    assert (reviews.score(prompts, chosen) > reviews.score(prompts, rejected)).all()
    for key, responses in (("chosen_reward", chosen), ("rejected_reward", rejected)):
        exact = reviews.reward([f"{x} {y}" for x, y in zip(prompts, responses)])
        np.testing.assert_allclose([pair[key] for pair in pairs], exact, rtol=1e-9)
    assert all(chosen)
    assert all(rejected)


@pytest.mark.parametrize("temperature", [0.5, *further(3.0)])
def test_bradley_terry_labels_follow_the_sigmoid_of_the_difference(temperature):
    pairs = reviews.preferences("train", 2000, 0, label="bradley_terry", temperature=temperature)
    odds = scipy.special.logit([[pair["chosen_reward"], pair["rejected_reward"]] for pair in pairs])
    difference = odds[:, 0] - odds[:, 1]
    p = scipy.special.expit(np.abs(difference) / temperature)
    spread = np.sqrt((p * (1 - p)).sum())
    assert abs((difference > 0).sum() - p.sum()) < 4 * spread
    assert (difference < 0).sum() > 50


@pytest.mark.slow
def test_pairs_of_one_prompt_stand_together_and_differ():
    pairs = reviews.preferences("train", 300, seed=0, pairs_per_prompt=3)
    for start in range(0, 300, 3):
        group = pairs[start : start + 3]
        assert len({pair["prompt"] for pair in group}) == 1
        assert len({pair["chosen"] for pair in group}) > 1


def test_bad_arguments_are_refused_with_what_was_expected():
    with pytest.raises(ValueError, match=r"split is 'test'.*train.*eval"):
        reviews.texts("test", 1, 0)
    with pytest.raises(ValueError, match="label is 'bt'"):
        reviews.preferences("train", 1, 0, label="bt")
    with pytest.raises(ValueError, match="temperature 0"):
        reviews.preferences("train", 1, 0, temperature=0)
    with pytest.raises(ValueError, match="prompt 1 holds </s>"):
        reviews.sample(np.random.default_rng(0), 2, ["i saw", "skip it . </s>"])
    with pytest.raises(ValueError, match="2 prompts"):
        reviews.sample(np.random.default_rng(0), 3, ["i saw", "i watched"])


def test_the_tokenizer_puts_one_bos_before_a_text_and_gives_its_words_back():
    tokenizer = reviews.tokenizer()
    text = "the acting was not bad , but the plot dragged . 7 / 10"
    ids = tokenizer(text).input_ids
    bare = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == [tokenizer.bos_token_id, *bare]
    assert tokenizer.decode(bare) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(bare) == text.split()
    assert tokenizer("a zebra").input_ids[-1] == tokenizer.unk_token_id
    assert len(tokenizer) == len(WORDS) + 4
    assert tokenizer.chat_template is None


def test_no_sampled_word_is_unknown_to_the_tokenizer():
    texts = reviews.texts("train", 500, seed=0)
    tokenizer = reviews.tokenizer()
    assert tokenizer.batch_decode(tokenizer(texts, add_special_tokens=False).input_ids) == texts


def test_a_saved_tokenizer_comes_back_by_auto_tokenizer_with_the_same_ids(tmp_path):
    tokenizer = reviews.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*reviews.texts("eval", 20, seed=0), "a zebra , perhaps"]
    assert loaded(texts).input_ids == tokenizer(texts).input_ids
    assert loaded.batch_decode(loaded(texts).input_ids) == tokenizer.batch_decode(
        tokenizer(texts).input_ids
    )
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id")
    assert [getattr(loaded, name) for name in names] == [0, 1, 2, 3]
