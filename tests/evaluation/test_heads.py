"""Heads of classifiers and reward models: what transformers makes of the same folder."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import processors

from dpojax.data import reviews
from dpojax.evaluation.rewards import RewardError, classifier, open_reward
from dpojax.models import decoder, huggingface
from dpojax.models.config import LLAMA, DecoderConfig
from tests import further

POSITIONS = 64
PROMPTS = ["the film was", "the plot is", "i think", "acting"]
RESPONSES = [" good", " dull and slow .", " it was a great film , and the plot is good .", " bad"]
TEXTS = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES)]


def bert(folder, problem_type, labels):
    """A random BERT classifier with these labels, and a tokenizer, in a folder."""
    pytest.importorskip("torch", reason="transformers builds its models with torch")
    import transformers

    transformers.set_seed(len(labels))
    config = transformers.BertConfig(
        vocab_size=len(reviews.tokenizer()),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=POSITIONS,
        initializer_range=0.7,
        pad_token_id=0,
        problem_type=problem_type,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    transformers.BertForSequenceClassification(config).eval().save_pretrained(folder)
    tokenizer = reviews.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.model_max_length = POSITIONS
    tokenizer.save_pretrained(folder)
    return str(folder)


def pipeline_scores(folder, label):
    """What transformers' pipeline says of a label, by its own reading of the config."""
    import transformers

    pipe = transformers.pipeline("text-classification", folder, top_k=None, device="cpu")
    answers = [pipe([text], top_k=None)[0] for text in TEXTS]
    return np.array([{x["label"]: x["score"] for x in answer}[label] for answer in answers])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("problem_type", "labels", "label"),
    [
        ("regression", ("stars",), "stars"),
        *further(
            (None, ("LABEL_0",), "LABEL_0"),
            ("regression", ("plot", "acting"), "acting"),
            (None, ("NEGATIVE", "POSITIVE"), "POSITIVE"),
        ),
        ("single_label_classification", ("bad", "fair", "good"), "fair"),
        ("multi_label_classification", ("funny", "sad", "long"), "sad"),
    ],
)
def test_an_encoders_head_gives_what_the_pipeline_of_transformers_gives(
    problem_type, labels, label, tmp_path
):
    folder = bert(tmp_path, problem_type, labels)
    want = pipeline_scores(folder, label)
    assert np.ptp(want) > 0.01  # no head gives one number for every text
    spec = f"classifier:{folder}" if len(labels) == 1 else f"classifier:{folder}:{label}"
    np.testing.assert_allclose(open_reward(spec)(PROMPTS, RESPONSES), want, atol=1e-5)
    if problem_type == "regression":
        with pytest.raises(RewardError, match="a regression has no log-odds"):
            classifier(folder, label, log_odds=True)
    else:
        odds = open_reward(spec.replace("classifier", "log_odds"))(PROMPTS, RESPONSES)
        np.testing.assert_allclose(odds, np.log(want / (1 - want)), atol=2e-5)


@pytest.mark.parametrize(
    ("model_type", "architectures"),
    [
        ("llama", ["LlamaForCausalLM"]),
        ("llama", ["LlamaForRewardModelWithGating"]),  # ArmoRM's own code
        ("llama", None),
        ("bert", ["BertForMaskedLM"]),
    ],
)
def test_a_model_that_is_no_sequence_classifier_is_told_before_its_labels(
    model_type, architectures, tmp_path
):
    raw = {"model_type": model_type, "architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    named = f"no sequence classifier: .*architectures {re.escape(str(architectures))}"
    for spec in ("classifier:{}", "classifier:{}:LABEL_1", "log_odds:{}"):
        with pytest.raises(RewardError, match=named):
            open_reward(spec.format(tmp_path))


def test_a_one_label_encoder_is_a_reward_model_whose_number_is_its_logit(tmp_path):
    folder = bert(tmp_path / "one", None, ("LABEL_0",))
    want = pipeline_scores(folder, "LABEL_0")
    got = open_reward(f"reward_model:{folder}")(PROMPTS, RESPONSES)
    np.testing.assert_allclose(got, np.log(want / (1 - want)), atol=2e-5)
    several = bert(tmp_path / "several", None, ("bad", "good"))
    with pytest.raises(RewardError, match=r"a classifier of 2 labels; .*'bad', 'good'"):
        open_reward(f"reward_model:{several}")


def tokenizer_with(pad):
    tokenizer = reviews.tokenizer()
    tokenizer.pad_token = None
    if pad == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    elif pad:
        tokenizer.pad_token = pad
    return tokenizer


def their_scores(folder, side, texts):
    """Scores of one padded batch of texts with EOS, by transformers."""
    torch = pytest.importorskip("torch", reason="the expected values come from torch")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = [[*tokenizer(t, add_special_tokens=False)["input_ids"]] for t in texts]
    ids = [[tokenizer.bos_token_id, *x, tokenizer.eos_token_id] for x in ids]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert len({len(x) for x in ids}) > 1
    return logits[:, 0].double().numpy()


def scalar_model(spare_rows=0):
    size = len(reviews.tokenizer()) + spare_rows
    config = DecoderConfig(
        **LLAMA, width=16, layers=1, heads=2, mlp_width=16, max_positions=POSITIONS,
        vocab_size=size, scalar_head=True,
    )  # fmt: skip
    model, rng = decoder.build(config), np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return config, jax.tree.map(lambda x: jnp.float32(0.3 * rng.normal(size=x.shape)), shapes)


@pytest.mark.parametrize("spare_rows", [0, *further(3)])
@pytest.mark.parametrize("pad", ["eos", None, "own"])
def test_an_exported_reward_model_scores_in_transformers_what_it_scores_here(
    pad, spare_rows, tmp_path
):
    """With EOS as padding, without any, and with a token of its own: left and right."""
    config, params = scalar_model(spare_rows)
    tokenizer = tokenizer_with("<unk>" if pad == "own" else pad)
    if pad != "own":
        tokenizer.unk_token = None
    huggingface.save(tmp_path / "out", config, params, tokenizer=tokenizer)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["pad_token_id"] != raw["eos_token_id"] == tokenizer.eos_token_id
    ours = open_reward(f"reward_model:{tmp_path / 'out'}")(PROMPTS, RESPONSES)
    for side in ("right", "left"):
        theirs = their_scores(tmp_path / "out", side, TEXTS)
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert np.ptp(ours) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reward_model_of_transformers_whose_padding_is_its_eos_scores_here_what_it_scores_there(
    side, tmp_path
):
    config, params = scalar_model()
    huggingface.save(tmp_path / "out", config, params, tokenizer=tokenizer_with("<unk>"))
    tokenizer = tokenizer_with("eos")
    tokenizer.save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    at_eos = open_reward(f"reward_model:{tmp_path / 'out'}")(PROMPTS, RESPONSES)
    raw = json.loads(file.read_text()) | {"pad_token_id": tokenizer.eos_token_id}
    file.write_text(json.dumps(raw))
    ours = open_reward(f"reward_model:{tmp_path / 'out'}")
    scores = ours(PROMPTS, RESPONSES)
    np.testing.assert_allclose(scores, their_scores(tmp_path / "out", side, TEXTS), atol=2e-5)
    assert np.abs(scores - at_eos).max() > 0.1
