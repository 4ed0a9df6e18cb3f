"""Rewards: against transformers and the grammar, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import processors

from dpojax.data import reviews
from dpojax.data.records import DataError
from dpojax.evaluation import scored_rows
from dpojax.evaluation.rewards import (
    Reward,
    RewardError,
    classifier,
    exact_reviews,
    open_reward,
    scalar_head,
)
from dpojax.models import decoder, huggingface
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.sharding import make_mesh

POSITIONS = 48
SIZES = {"width": 16, "layers": 1, "heads": 2, "mlp_width": 16, "max_positions": POSITIONS}


@pytest.fixture(scope="module")
def texts():
    """Prompts and responses of up to 8 and 18 words; the second text is beyond 48 tokens."""
    rows = reviews.preferences("eval", 6, 0)
    responses = [" " + " ".join(r["chosen"].split()[: 3 + 3 * i]) for i, r in enumerate(rows)]
    responses[1] += " good" * POSITIONS
    return [r["prompt"] for r in rows], responses


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A folder with a random RoBERTa of two labels, with <s> and </s> around a text."""
    pytest.importorskip("torch", reason="transformers builds its models with torch")
    import transformers

    folder = tmp_path_factory.mktemp("roberta")
    transformers.set_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=len(reviews.tokenizer()),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=POSITIONS + 1,
        type_vocab_size=1,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    transformers.RobertaForSequenceClassification(config).eval().save_pretrained(folder)
    tokenizer = reviews.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.model_max_length = POSITIONS
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def positive(roberta):
    return classifier(str(roberta), batch_size=4)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder with a random decoder with a scalar head, and its model and params."""
    config = DecoderConfig(**LLAMA, **SIZES, vocab_size=len(reviews.tokenizer()), scalar_head=True)
    model = decoder.build(config)
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0)), np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.float32(0.3 * rng.normal(size=x.shape)), shapes)
    folder = tmp_path_factory.mktemp("scored") / "model"
    huggingface.save(folder, config, params, tokenizer=reviews.tokenizer())
    return folder, model, params


def their_logits(folder, ids):
    """Logits of the sequence classifier of transformers, one text at a time."""
    torch = pytest.importorskip("torch", reason="the expected values come from torch")
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return np.concatenate(
            [model(torch.tensor([tokens])).logits.double().numpy() for tokens in ids]
        )


def whole(texts):
    return [prompt + response for prompt, response in zip(*texts)]


def test_the_exact_reward_is_the_posterior_of_the_grammar(texts):
    log_p = reviews.log_likelihood(whole(texts))
    odds = log_p[:, 1] - log_p[:, 0]
    np.testing.assert_allclose(open_reward("reviews:log_odds")(*texts), odds, rtol=1e-9)
    expected = np.exp(log_p[:, 1]) / np.exp(log_p).sum(1)
    np.testing.assert_allclose(open_reward("reviews")(*texts), expected, rtol=1e-9)


def test_a_classifier_gives_the_probabilities_of_transformers(roberta, positive, texts):
    tokenizer = reviews.tokenizer()
    ids = [[1, *tokenizer(t, add_special_tokens=False)["input_ids"]] for t in whole(texts)]
    assert len(ids[1]) > POSITIONS
    logits = their_logits(roberta, [[*tokens[: POSITIONS - 1], 2] for tokens in ids])
    expected = np.exp(logits[:, 1]) / np.exp(logits).sum(1)
    np.testing.assert_allclose(positive(*texts), expected, atol=1e-5)
    assert np.ptp(expected) > 0.01


def test_the_label_stands_in_the_spec_and_eight_devices_score_as_one(roberta, positive, texts):
    mesh = make_mesh(data=4, tensor=2)
    negative = open_reward(f"classifier:{roberta}:NEGATIVE", mesh=mesh, batch_size=6)
    np.testing.assert_allclose(negative(*texts), 1 - positive(*texts), atol=1e-5)
    assert negative.fingerprint != positive.fingerprint


def test_a_label_that_the_classifier_has_not_is_refused_with_those_it_has(roberta):
    with pytest.raises(RewardError, match=r"no label 'JOY'.*\['NEGATIVE', 'POSITIVE'\]"):
        open_reward(f"classifier:{roberta}:JOY")


def test_a_decoder_of_one_label_gives_its_sigmoid(scored, texts):
    folder, _, _ = scored
    scores = classifier(str(folder), "LABEL_0", batch_size=6)(*texts)
    tokenizer = reviews.tokenizer()
    logits = their_logits(folder, [tokenizer(t)["input_ids"][:POSITIONS] for t in whole(texts)])
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits[:, 0])), atol=1e-5)
    assert np.ptp(scores) > 0.01


def test_a_reward_model_scores_the_end_of_sequence_behind_the_response(scored, texts):
    folder, model, params = scored
    short = [part[2:] for part in texts]  # without the long one
    tokenizer = reviews.tokenizer()
    scores = scalar_head(model, params, tokenizer, offset=0.25, batch_size=4)(*short)
    logits = their_logits(folder, [[*tokenizer(t)["input_ids"], 2] for t in whole(short)])
    np.testing.assert_allclose(scores, logits[:, 0] - 0.25, atol=1e-4)
    assert np.ptp(scores) > 0.1


@pytest.mark.parametrize("columns", [1024, 24])
def test_responses_that_share_the_row_of_their_prompt_score_as_whole_texts(
    scored, monkeypatch, columns
):
    """With 24 columns the responses to a prompt need several rows."""
    monkeypatch.setattr(scored_rows, "COLUMNS", columns)
    folder, model, params = scored
    words = [" a gem", " bad", " the worst film of them all", " fine and fun", ""]
    texts = [(p, w) for w in words for p in ("i think it is", "we saw", "i think it is")]
    prompts, responses = zip(*texts)
    tokenizer = reviews.tokenizer()
    mesh = make_mesh(data=4, tensor=2)
    logits = their_logits(folder, [[*tokenizer(p + r)["input_ids"], 2] for p, r in texts])
    for where in (None, mesh):
        scores = scalar_head(model, params, tokenizer, mesh=where, batch_size=16)
        np.testing.assert_allclose(scores(prompts, responses), logits[:, 0], atol=1e-4)


def test_a_text_beyond_the_reward_models_positions_is_named(scored, texts):
    _, model, params = scored
    reward = scalar_head(model, params, reviews.tokenizer(), name="mine")
    with pytest.raises(DataError, match=r"reward mine: text 1: .* exceed max_length=48"):
        reward(*texts)


def test_a_token_that_the_reward_model_has_no_row_for_is_named(scored):
    _, model, params = scored
    tokenizer = reviews.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    reward = scalar_head(model, params, tokenizer)
    image, rows = tokenizer.convert_tokens_to_ids("<image>"), model.config.vocab_size
    message = f"text 1: it has the token id {image}, but the reward's model only {rows} rows"
    with pytest.raises(RewardError, match=message):
        reward(["i", "i"], [" think", "<image>"])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.0, np.nan, np.inf], r"reward mine: 2 of 3 .* is nan for text 1, prompt 'b', .* ' y'"),
        ([0.0, -np.inf, 1.0], r"1 of 3 scores are not finite; the first is -inf for text 1"),
        ([0.0, 1.0], r"reward mine: gave an array of shape \(2,\) for 3 texts"),
        ([[0.0], [1.0], [2.0]], r"shape \(3, 1\) for 3 texts"),
        (1.0, r"shape \(\) for 3 texts"),
    ],
)
def test_scores_that_cannot_be_used_are_refused(scores, message):
    with pytest.raises(RewardError, match=message):
        Reward("mine", lambda prompts, responses: scores)("abc", [" x", " y", " z"])


def test_a_long_bad_text_is_shortened_in_the_error():
    with pytest.raises(RewardError) as error:
        Reward("mine", lambda prompts, responses: [np.nan])(["a" * 1000], ["b" * 1000])
    assert len(str(error.value)) < 400


def test_prompts_and_responses_come_in_pairs_and_may_be_none():
    reward = exact_reviews()
    with pytest.raises(ValueError, match="2 prompts for 1 responses"):
        reward(["a", "b"], ["c"])
    assert reward([], []).shape == (0,)


@pytest.mark.parametrize("spec", ["", "review", "classifier", "classifier:", "reviews:odds"])
def test_an_unknown_spec_is_answered_with_the_known_ones(spec):
    with pytest.raises(RewardError, match=r"is not one of .*log_odds"):
        open_reward(spec)


def test_a_folder_without_a_scalar_head_is_no_reward_model(tmp_path, scored):
    _, _, params = scored
    config = DecoderConfig(**LLAMA, **SIZES, vocab_size=len(reviews.tokenizer()))
    params = {k: v for k, v in params.items() if k != "score"} | {
        "head": {"kernel": params["embed"]["tokens"]}
    }
    huggingface.save(tmp_path / "lm", config, params, tokenizer=reviews.tokenizer())
    assert "CausalLM" in json.loads((tmp_path / "lm/config.json").read_text())["architectures"][0]
    with pytest.raises(ValueError, match="has no scalar head"):
        open_reward(f"reward_model:{tmp_path / 'lm'}")


def test_fingerprints_differ_where_scores_may(scored):
    folder, model, params = scored
    assert exact_reviews().fingerprint != exact_reviews("log_odds").fingerprint
    stored = open_reward(f"reward_model:{folder}")
    cases = [(params, 0.0), (params, 1.0), (jax.tree.map(lambda x: 2 * x, params), 0.0)]
    tokenizer = reviews.tokenizer()
    fingerprints = [
        scalar_head(model, p, tokenizer, offset=offset).fingerprint for p, offset in cases
    ]
    assert len(set(fingerprints)) == 3
    assert stored.fingerprint == fingerprints[0]
