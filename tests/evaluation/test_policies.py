"""A policy by its own samples, against plain loops over full forward passes."""

import jax
import numpy as np
import pytest
import scipy.stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dpojax.data import reviews
from dpojax.evaluation.policies import (
    NothingStopped,
    divergences,
    encode_prompts,
    evaluate,
    rank_correlation,
    response_texts,
)
from dpojax.evaluation.rewards import Reward, RewardError, exact_reviews
from dpojax.models import decoder
from dpojax.models.attention import plain_rows
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.models.decoder import SHARDING_RULES
from dpojax.sampling import Sample, build_sampler, generate
from dpojax.sharding import make_mesh, tree_shardings
from dpojax.training.forward import build_score

TOKENIZER = reviews.tokenizer()
EOS = TOKENIZER.eos_token_id
NEW, SAMPLES = 9, 3
PROMPTS = reviews.prompts("eval", 5, 0)
MODEL = decoder.build(
    DecoderConfig(
        **LLAMA,
        vocab_size=len(TOKENIZER),
        width=16,
        layers=1,
        heads=2,
        mlp_width=16,
        max_positions=32,
    )
)
SCORE = jax.jit(build_score(MODEL))
SAMPLER = build_sampler(MODEL, max_new_tokens=NEW, stop=(EOS,))
HOW = {"sampler": SAMPLER, "samples_per_prompt": SAMPLES, "batch_size": 4, "score": SCORE}
FULL = jax.jit(lambda params, tokens: decoder.logits(MODEL, params, plain_rows(tokens)))


def random_params(seed):
    """Weights whose hidden states have a part in common, along which lies the head's EOS."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(MODEL.init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.float32(0.2 * rng.normal(size=x.shape)), shapes)
    params["final_norm"]["scale"] = np.ones(16, np.float32)
    params["embed"]["tokens"][:, 0] += 2
    params["head"]["kernel"][EOS, 0] += 1.1
    return params


@pytest.fixture(scope="module")
def params():
    """(policy, reference)."""
    return random_params(0), random_params(1)


@pytest.fixture(scope="module")
def evaluation(params):
    return evaluate(*params, MODEL, TOKENIZER, PROMPTS, exact_reviews(), seed=0, **HOW)


def drawn(params, **how):
    """What `evaluate` draws, [(prompt's ids, sample)]."""
    ids = [TOKENIZER(prompt)["input_ids"] for prompt in PROMPTS]
    samples = generate(SAMPLER, params, ids, batch_size=4, samples=SAMPLES, seed=0, **how)
    return [(tokens, sample) for tokens, many in zip(ids, samples) for sample in many]


def log_softmax(z):
    return scipy.special.log_softmax(np.float64(z), axis=-1)


def plain(params, pairs, temperature=1.0):
    """Log-ratio and exact KL of tokens of every sample, from logits of the whole text."""
    ratios, kls = [], []
    for prompt, sample in pairs:
        text = np.zeros((1, 32), np.int32)
        text[0, : len(prompt) + len(sample.tokens)] = [*prompt, *sample.tokens]
        where = slice(len(prompt) - 1, len(prompt) - 1 + len(sample.tokens))
        policy, reference = (np.asarray(FULL(p, text))[0, where] for p in params)
        log_p, log_q = log_softmax(policy / temperature), log_softmax(reference)
        ratio = np.take_along_axis(log_p - log_q, sample.tokens[:, None], axis=1)
        ratios.append(ratio.sum())
        kls.append((np.exp(log_p) * (log_p - log_q)).sum())
    return np.array(ratios), np.array(kls)


def test_kl_is_the_mean_log_ratio_of_full_forward_passes(params, evaluation):
    ratios, kls = plain(params, drawn(params[0]))
    np.testing.assert_allclose(evaluation.log_ratios.ravel(), ratios, atol=1e-4)
    np.testing.assert_allclose(evaluation.kl.value, ratios.mean(), rtol=1e-4)
    np.testing.assert_allclose(evaluation.kl_of_tokens.value, kls.mean(), rtol=1e-4)
    for estimate, values in ((evaluation.kl, ratios), (evaluation.kl_of_tokens, kls)):
        of_prompts = values.reshape(len(PROMPTS), SAMPLES).mean(1)
        np.testing.assert_allclose(estimate.error, scipy.stats.sem(of_prompts), rtol=1e-3)
    assert evaluation.kl_of_tokens.error < evaluation.kl.error
    assert kls.min() > 0.1


def test_with_a_temperature_it_is_the_sampled_distribution_that_is_compared(params):
    cooler = evaluate(
        *params, MODEL, TOKENIZER, PROMPTS, exact_reviews(), seed=0, temperature=0.6, **HOW
    )
    ratios, _ = plain(params, drawn(params[0], temperature=0.6), temperature=0.6)
    np.testing.assert_allclose(cooler.log_ratios.ravel(), ratios, atol=1e-4)
    assert np.isnan(cooler.kl_of_tokens.value)


def test_a_policy_does_not_diverge_from_itself(params):
    policy, _ = params
    same = evaluate(policy, policy, MODEL, TOKENIZER, PROMPTS, exact_reviews(), seed=0, **HOW)
    np.testing.assert_allclose(same.log_ratios, 0, atol=1e-5)
    assert same.kl_of_tokens.value == 0


def test_rewards_lengths_and_texts_are_those_of_the_samples(params, evaluation):
    pairs = drawn(params[0])
    words = [[t for t in sample.tokens if t != EOS] for _, sample in pairs]
    texts = [" " + " ".join(TOKENIZER.convert_ids_to_tokens(tokens)) for tokens in words]
    repeated = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]
    expected = reviews.reward([p + t for p, t in zip(repeated, texts)])
    np.testing.assert_allclose(evaluation.rewards.ravel(), expected, rtol=1e-6)
    np.testing.assert_allclose(evaluation.reward.value, expected.mean(), rtol=1e-6)
    shown = [(text.prompt, text.response) for text in evaluation.texts]
    assert shown == [(p, t.rstrip()) for p, t in zip(repeated, texts)][::SAMPLES][:4]
    assert evaluation.lengths.mean == np.mean([len(tokens) for tokens in words])
    stopped = [sample.tokens[-1] == EOS for _, sample in pairs]
    assert evaluation.stopped == np.mean(stopped)
    assert 0 < evaluation.stopped < 1
    assert evaluation.metrics()["samples/kl_error"] == evaluation.kl.error
    assert evaluation.metrics()["samples/length"] == evaluation.lengths.mean


def test_evaluating_again_compiles_nothing(params, evaluation):
    before = SCORE._cache_size()
    again = evaluate(*params, MODEL, TOKENIZER, PROMPTS, exact_reviews(), seed=1, **HOW)
    assert SCORE._cache_size() == before
    assert not np.array_equal(again.rewards, evaluation.rewards)


@pytest.mark.slow
def test_eight_devices_find_the_same_divergences(params, evaluation):
    mesh = make_mesh(data=4, tensor=2)
    placed = [jax.device_put(p, tree_shardings(p, mesh, SHARDING_RULES)) for p in params]
    pairs = drawn(params[0])
    prompts = [np.array(prompt) for prompt, _ in pairs]
    samples = [[sample] for _, sample in pairs]
    with jax.set_mesh(mesh):
        ratios, token_kl = divergences(
            SCORE, *placed, prompts, samples, max_new_tokens=NEW, batch_size=3, mesh=mesh
        )
    np.testing.assert_allclose(ratios.ravel(), evaluation.log_ratios.ravel(), atol=1e-4)
    np.testing.assert_allclose(token_kl.mean(), evaluation.kl_of_tokens.value, rtol=1e-4)


def test_responses_that_are_all_cut_are_refused_unless_a_fixed_length_is_meant(params):
    kernel = params[0]["head"]["kernel"].copy()
    kernel[EOS, 0] -= 50
    endless = params[0] | {"head": {"kernel": kernel}}
    run = lambda **more: evaluate(
        endless, params[1], MODEL, TOKENIZER, PROMPTS, exact_reviews(), seed=0, **HOW, **more
    )
    message = (
        r"all 15 responses were cut at max_new_tokens = 9; none reached a stop token \(ids \[2\]"
    )
    with pytest.raises(NothingStopped, match=message):
        run()
    assert run(fixed_length=True).stopped == 0


def test_a_reward_that_breaks_is_named_with_its_text(params):
    broken = lambda prompts, responses: np.full(len(prompts), np.nan)
    run = lambda reward: evaluate(*params, MODEL, TOKENIZER, PROMPTS, reward, seed=0, **HOW)
    with pytest.raises(RewardError, match="reward reward: 15 of 15 scores are not finite"):
        run(broken)
    with pytest.raises(RewardError, match=r"reward short: gave an array of shape \(2,\)"):
        run(Reward("short", lambda prompts, responses: [0.0, 1.0]))


def test_prompts_are_encoded_as_in_training_and_responses_keep_their_space():
    prompts = ["i think", "the plot"]
    ids = encode_prompts(TOKENIZER, prompts)
    assert [tokens.tolist() for tokens in ids] == TOKENIZER(prompts)["input_ids"]
    word = TOKENIZER("good", add_special_tokens=False)["input_ids"]
    sample = Sample(np.array([*word, *word, EOS]), np.zeros(3), np.zeros(3), True)
    assert response_texts(TOKENIZER, ids[0], [sample, sample]) == [" good good"] * 2
    assert response_texts(TOKENIZER, [TOKENIZER.bos_token_id], [sample]) == ["good good"]


def byte_level():
    """One token a byte, as GPT-2's alphabet; é takes two."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([], trainer)
    return core


def metaspace():
    """Words with a mark for the space before them, as Llama's; alone a first one loses it."""
    words = ["<s>", "</s>", "<unk>", "▁i", "▁thé", "▁fine", "ly", "▁a"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return core


@pytest.mark.parametrize("core", [byte_level(), metaspace()], ids=["byte level", "metaspace"])
def test_a_response_is_what_its_tokens_add_to_the_prompts_text(core):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    prompt, response = "i thé", " fine a"
    ids = encode_prompts(tokenizer, [prompt])[0]
    tokens = np.array(tokenizer(prompt + response, add_special_tokens=False)["input_ids"])
    assert ids.tolist() == tokens[: len(ids)].tolist()
    sample = Sample(np.append(tokens[len(ids) :], 1), np.zeros(0), np.zeros(0), True)
    assert response_texts(tokenizer, ids, [sample]) == [response]


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    for implicit in (rng.normal(size=40), rng.integers(0, 4, 40)):
        exact = implicit + rng.normal(size=40)
        correlation = rank_correlation(implicit, exact)
        np.testing.assert_allclose(
            correlation.value, scipy.stats.spearmanr(implicit, exact).statistic
        )
        assert correlation.low < correlation.value < correlation.high


@pytest.mark.slow
def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Of normal variables, rho is 6 / pi arcsin(r / 2)."""
    rng, r, covered = np.random.default_rng(1), 0.6, 0
    for _ in range(80):
        x = rng.normal(size=60)
        y = r * x + np.sqrt(1 - r**2) * rng.normal(size=60)
        correlation = rank_correlation(x, y, resamples=100)
        covered += correlation.low < 6 / np.pi * np.arcsin(r / 2) < correlation.high
    assert 68 <= covered <= 79


def test_repeated_responses_of_a_prompt_narrow_the_interval_only_if_taken_for_independent():
    rng = np.random.default_rng(2)
    x = rng.normal(size=30)
    y = x + rng.normal(size=30)
    one = rank_correlation(x, y)
    width = lambda correlation: correlation.high - correlation.low
    x, y, prompts = (np.repeat(a, 4) for a in (x, y, np.arange(30)))
    np.testing.assert_allclose(width(rank_correlation(x, y, prompts)), width(one), rtol=0.01)
    assert width(rank_correlation(x, y)) < 0.7 * width(one)


def test_rank_correlation_wants_numbers_of_both_and_has_none_of_constants():
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3])).all()
    with pytest.raises(ValueError, match="3 or more responses"):
        rank_correlation([1, 2], [1, 2])
    with pytest.raises(ValueError, match="as many prompts"):
        rank_correlation([1, 2, 3], [1, 2, 3], prompts=[1])
