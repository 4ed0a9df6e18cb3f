"""Scalar heads: transformers' sequence classifiers, and their reading on rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as checkpoints

from dpojax.data.examples import Example
from dpojax.data.packing import plan
from dpojax.data.rows import collate
from dpojax.models import decoder, huggingface
from dpojax.models.config import GPT2, LLAMA, DecoderConfig
from dpojax.models.families import config_from_raw, config_to_raw
from dpojax.models.scores import response_scores, with_scalar_head

CLASSIFIER = "AutoModelForSequenceClassification"
PAD = {"num_labels": 1, "pad_token_id": 0}
GPT = {"vocab_size": 51, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3} | PAD
SIZES = {
    "vocab_size": 51,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
} | PAD
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
CASES = {
    "gpt2": ("gpt2", GPT),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", SIZES | {"hidden_size": 32}),
    "llama": ("llama", SIZES | {"num_key_value_heads": 2, "attention_bias": True}),
    "llama tied": ("llama", SIZES | {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", SIZES | GROUPED | {"sliding_window": 5}),
}
# Token ids from 1 on, so that no text holds transformers' padding token.
PROMPTS = ([3, 7, 9, 4], [8, 2])
RESPONSES = (([5, 6, 1], [9, 9, 9, 10, 2]), ([1], [30, 31, 32]))


def packed_rows():
    """One row of two examples, two responses each."""
    examples = [
        Example(
            id=str(i),
            prompt=np.array(prompt, np.int32),
            responses=tuple(np.array(response, np.int32) for response in responses),
            cut=(False, False),
            label=None,
        )
        for i, (prompt, responses) in enumerate(zip(PROMPTS, RESPONSES))
    ]
    indices = list(range(len(examples)))
    rows = collate(examples, indices, plan(examples, [indices], length=32))
    return jax.tree.map(lambda x: jnp.asarray(x[0]), rows)


def texts():
    """[4, 9], right-padded with transformers' padding token."""
    pairs = zip(PROMPTS, RESPONSES)
    whole = [prompt + response for prompt, responses in pairs for response in responses]
    return np.array([text + [0] * (9 - len(text)) for text in whole])


@pytest.mark.parametrize("case", CASES)
def test_scores_of_packed_responses_equal_those_of_transformers_texts(case, tmp_path):
    model_type, settings = CASES[case]
    theirs = checkpoints.make(model_type, kind=CLASSIFIER, **settings)
    theirs.save_pretrained(tmp_path / "in")
    expected = checkpoints.torch_logits(theirs, texts())[:, 0]
    assert expected.std() > 0.1
    config, params, raw = huggingface.load(tmp_path / "in")
    model = decoder.build(config)

    @jax.jit
    def read(params, rows):
        return response_scores(model.scores(params, model.apply(params, rows)), rows)

    scores = read(params, packed_rows())
    assert scores.shape == (1, 2, 2)
    np.testing.assert_allclose(scores.ravel(), expected, atol=1e-4, rtol=1e-4)

    huggingface.save(tmp_path / "saved", config, params, raw)
    again = checkpoints.from_pretrained(tmp_path / "saved", CLASSIFIER)
    checkpoints.assert_same_tensors(again, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("base", [GPT2, LLAMA])
def test_a_scalar_head_on_a_language_model_exports_as_a_classifier(base, tmp_path):
    sizes = {"vocab_size": 51, "width": 24, "layers": 2, "heads": 3, "mlp_width": 40}
    config = DecoderConfig(**base | sizes, max_positions=32)
    trunk = checkpoints.random_params(config)
    scored, params = with_scalar_head(config, trunk, jax.random.key(0))
    assert params["score"]["kernel"].shape == (1, 24)
    assert np.abs(params["score"]["kernel"]).max() > 0
    assert "head" not in params
    assert all(params[name] is trunk[name] for name in params if name != "score")

    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

        def save_pretrained(self, folder):
            pass

    huggingface.save(tmp_path / "out", scored, params, tokenizer=Tokenizer())
    theirs = checkpoints.from_pretrained(tmp_path / "out", CLASSIFIER)
    model, rows = decoder.build(scored), packed_rows()
    scores = response_scores(model.scores(params, model.apply(params, rows)), rows)
    expected = checkpoints.torch_logits(theirs, texts())[:, 0]
    assert expected.std() > 0.01
    np.testing.assert_allclose(scores.ravel(), expected, atol=1e-4, rtol=1e-4)
    assert huggingface.load(tmp_path / "out")[0] == scored


def test_the_config_of_a_language_model_becomes_that_of_the_classifier_on_its_trunk(tmp_path):
    sizes = {"vocab_size": 51, "width": 24, "layers": 1, "heads": 3, "mlp_width": 40}
    config = DecoderConfig(**LLAMA | sizes, max_positions=32)
    raw = config_to_raw(config) | {"pretraining_tp": 7}
    key, labels = jax.random.key(0), ("bad", "fair", "good")
    scored, params = with_scalar_head(config, checkpoints.random_params(config), key, labels)
    huggingface.save(tmp_path / "out", scored, params, raw)
    read_config, read_raw = huggingface.read_config(tmp_path / "out")
    assert read_config == scored
    assert read_raw["pretraining_tp"] == 7
    theirs = checkpoints.from_pretrained(tmp_path / "out", CLASSIFIER)
    assert theirs.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    model, rows = decoder.build(scored), packed_rows()
    logits = model.scores(params, model.apply(params, rows))
    expected = checkpoints.torch_logits(theirs, texts()[:1, :7])
    np.testing.assert_allclose(logits[0, 6], expected[0], atol=1e-4, rtol=1e-4)


def test_responses_that_are_absent_score_zero_and_have_no_gradient():
    rows = packed_rows()
    rows = rows._replace(present=rows.present.at[0, 1, 0].set(False))
    scores = jnp.arange(1.0, 33)[None]
    read = response_scores(scores, rows)
    # Columns: prompt 0-3, responses 4-6 and 7-11, prompt 12-13, responses 14 and 15-17.
    np.testing.assert_array_equal(read, [[[7.0, 12.0], [0.0, 18.0]]])
    gradient = jax.grad(lambda x: response_scores(x, rows).sum())(scores)
    np.testing.assert_array_equal(np.flatnonzero(gradient), [6, 11, 17])


def test_asking_a_model_for_the_head_that_it_lacks_is_an_error():
    sizes = {"vocab_size": 51, "width": 24, "layers": 1, "heads": 3, "mlp_width": 40}
    config = DecoderConfig(**GPT2 | sizes, max_positions=32)
    params = checkpoints.random_params(config)
    with pytest.raises(ValueError, match="scalar_head: this model has none"):
        decoder.build(config).scores(params, jnp.zeros((1, 24)))
    scored, params = with_scalar_head(config, params, jax.random.key(0))
    with pytest.raises(ValueError, match="scalar_head: this model scores tokens"):
        decoder.build(scored).head(params)


def test_a_classifier_has_the_labels_of_its_config_and_a_single_one_is_a_score():
    raw = {"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]} | GPT
    score = config_from_raw(raw | {"id2label": {"0": "good"}})
    assert (score.scalar_head, score.labels) == (True, ())
    both = config_from_raw(raw | {"id2label": {"0": "bad", "1": "good"}})
    assert (both.scalar_head, both.labels) == (True, ("bad", "good"))
    with pytest.raises(ValueError, match=r"labels: \('bad', 'good'\); a classifier has"):
        DecoderConfig(
            **GPT2,
            vocab_size=4,
            width=4,
            layers=1,
            heads=1,
            mlp_width=4,
            max_positions=4,
            labels=("bad", "good"),
        )
