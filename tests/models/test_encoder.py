"""Sequence classifiers of BERT and RoBERTa against transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as checkpoints

from dpojax.models import encoder, huggingface
from dpojax.models.decoder import SHARDING_RULES
from dpojax.models.families import ENCODERS, config_from_raw
from dpojax.sharding import make_mesh, tree_shardings

CLASSIFIER = "AutoModelForSequenceClassification"
SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
}
CASES = {
    "bert": ("bert", SIZES),
    "bert with five labels, one token type and gelu_new": (
        "bert",
        SIZES | {"num_labels": 5, "type_vocab_size": 1, "hidden_act": "gelu_new"},
    ),
    "roberta as published": (
        "roberta",
        SIZES | {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "roberta with one label and an odd padding id": (
        "roberta",
        SIZES | {"pad_token_id": 4, "num_labels": 1, "num_hidden_layers": 1},
    ),
}
LENGTHS = np.array([15, 9, 1])


def batch(padding: int):
    """Texts [3, 15] without the padding id in them, right-padded with it."""
    tokens = checkpoints.random_tokens(53, (3, 15))
    tokens = np.where(tokens == padding, padding + 1, tokens)
    return np.where(np.arange(15) < LENGTHS[:, None], tokens, padding)


def their_logits(model, tokens):
    torch = pytest.importorskip("torch")
    mask = np.arange(tokens.shape[1]) < LENGTHS[:, None]
    with torch.no_grad():
        out = model(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(int)))
    return out.logits.numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_class_logits_equal_those_of_transformers(case, dtype, tmp_path):
    torch = pytest.importorskip("torch")
    model_type, settings = CASES[case]
    theirs = checkpoints.make(model_type, kind=CLASSIFIER, **settings)
    theirs = theirs.to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    tokens = batch(settings["pad_token_id"])
    expected = their_logits(theirs.float(), tokens)
    assert expected.std() > 0.1
    config, params, _ = huggingface.load_classifier(tmp_path)
    assert len(config.labels) == expected.shape[1]
    apply = jax.jit(encoder.build(config).apply)
    ours = apply(params, tokens, LENGTHS)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)
    # What stands in the padding is never read, be it an id outside the table.
    other = np.where(np.arange(15) < LENGTHS[:, None], tokens, 10**6)
    np.testing.assert_array_equal(apply(params, other, LENGTHS), ours)


def test_a_token_that_is_the_padding_id_is_a_token_like_any_other(tmp_path):
    """transformers would move all positions behind it; ours come from lengths."""
    torch = pytest.importorskip("torch")
    theirs = checkpoints.make("roberta", kind=CLASSIFIER, **SIZES)
    theirs.save_pretrained(tmp_path)
    tokens = np.array([[5, 0, 7, 8]])
    positions = torch.arange(1, 5)[None]
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), position_ids=positions).logits.numpy()
        shifted = theirs(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected - shifted).max() > 1e-3
    config, params, _ = huggingface.load_classifier(tmp_path)
    ours = encoder.build(config).apply(params, tokens, np.array([4]))
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)


def test_a_published_config_of_a_sentiment_classifier_is_understood():
    raw = {
        "_num_labels": 2,
        "architectures": ["RobertaForSequenceClassification"],
        "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 1024,
        "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
        "intermediate_size": 4096,
        "label2id": {"NEGATIVE": 0, "POSITIVE": 1},
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 514,
        "model_type": "roberta",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "output_past": True,
        "pad_token_id": 1,
        "position_embedding_type": "absolute",
        "type_vocab_size": 1,
        "vocab_size": 50265,
    }
    config = config_from_raw(raw, ENCODERS)
    assert config.labels == ("NEGATIVE", "POSITIVE")
    assert config.first_position == 2
    shapes = jax.eval_shape(encoder.build(config).init, jax.random.key(0))
    # roberta-large has 354 million parameters, the pooler and two labels about one million more.
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(355.4e6, rel=1e-3)


@pytest.mark.slow
def test_on_a_mesh_large_arrays_are_sharded_and_logits_equal_one_devices(tmp_path):
    settings = SIZES | {"num_attention_heads": 2, "vocab_size": 56}
    checkpoints.make("bert", kind=CLASSIFIER, **settings).save_pretrained(tmp_path)
    config, params, _ = huggingface.load_classifier(tmp_path)
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    sharded = huggingface.load_classifier(tmp_path, mesh=mesh)[1]
    up = sharded["blocks"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size * 8 == up.size
    expected = tree_shardings(params, mesh, SHARDING_RULES)
    assert jax.tree.map(lambda x: x.sharding, sharded) == expected
    apply, tokens = jax.jit(encoder.build(config).apply), jnp.asarray(batch(0)[:2])
    lengths = jnp.asarray(LENGTHS[:2])
    plain = apply(params, tokens, lengths)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(apply(sharded, tokens, lengths), plain, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, r"position_embedding_type: 'relative_key'"),
        ({"is_decoder": True}, r"is_decoder: True is not supported, only False"),
        ({"model_type": "electra"}, r"model_type: 'electra' is not supported, only bert, roberta"),
        ({"pad_token_id": None}, r"pad_token_id: must be a whole number .*, not None: roberta"),
        ({"pad_token_id": "0"}, r"pad_token_id: must be a whole number .*, not '0'"),
        ({"is_causal": True}, r"is_causal: True is not supported, only False"),
        ({"per_layer_config": [{}]}, r"per_layer_config: .* transformers reads for roberta"),
        ({"id2label": {"one": "a"}}, r"id2label: must map numbers to names, not {'one': 'a'}"),
        ({"id2label": {"0": "a", "2": "b"}}, r"id2label: its keys are not 0 to 1"),
        ({"hidden_act": "xielu"}, r"hidden_act: 'xielu' is not in"),
        ({"num_hidden_layers": 1}, r"tensor 'roberta.encoder.layer.1.* is not one that config"),
        ({"num_labels": 3, "id2label": None}, r"classifier.out_proj.bias' has shape|weight' has"),
    ],
)
def test_what_is_not_understood_is_named(change, message, tmp_path):
    checkpoints.make("roberta", kind=CLASSIFIER, **SIZES).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        huggingface.load_classifier(tmp_path)


def test_texts_longer_than_the_model_are_refused():
    config = config_from_raw({"model_type": "roberta"} | SIZES, ENCODERS)
    with pytest.raises(ValueError, match="tokens: 20 columns, but the model has 19"):
        encoder.build(config).apply({}, np.zeros((1, 20), int), np.array([20]))
    with pytest.raises(ValueError, match="model_type: 'roberta' is not supported, only gemma, "):
        config_from_raw({"model_type": "roberta"} | SIZES)
