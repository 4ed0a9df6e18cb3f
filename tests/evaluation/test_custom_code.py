"""Folders with code of their own: nothing of it runs, whatever stands on standard input."""

import builtins
import json

import jax
import pytest

from dpojax.config.defaults import default_config
from dpojax.config.errors import ConfigError
from dpojax.data import reviews
from dpojax.data.tokenizer_files import read_tokenizer
from dpojax.evaluation.rewards import open_reward
from dpojax.models import decoder, huggingface
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.stages.tokenizers import load_tokenizer, read_generation_config

CODE = """
open({mark!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class MyConfig(LlamaConfig):
    model_type = "mine"

class MyModel(LlamaForCausalLM):
    config_class = MyConfig

class MyTokenizer(PreTrainedTokenizerFast):
    pass
"""
OWN_MODEL = {"AutoConfig": "mine.MyConfig", "AutoModel": "mine.MyModel"}
OWN_MODEL |= {f"AutoModelFor{head}": "mine.MyModel" for head in ("CausalLM", "TokenClassification")}
OWN_TOKENIZER = {"AutoTokenizer": ["mine.MyTokenizer", None]}
NEVER = "code of their own .auto_map., which dpojax never runs"


@pytest.fixture(autouse=True)
def a_user_who_says_yes(monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *prompt: "y")


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    """A reward model of the embedded task's vocabulary."""
    folder, tokenizer = tmp_path_factory.mktemp("model") / "model", reviews.tokenizer()
    sizes = dict(width=8, layers=1, heads=2, mlp_width=8, max_positions=64)
    config = DecoderConfig(**LLAMA, **sizes, vocab_size=len(tokenizer), scalar_head=True)
    params = jax.jit(decoder.build(config).init)(jax.random.key(0))
    huggingface.save(folder, config, params, tokenizer=tokenizer)
    return folder


@pytest.fixture
def mine(scorer, tmp_path):
    """(changes of config.json, of tokenizer_config.json) -> a copy of the folder with code."""
    made = []

    def make(config=None, tokenizer=None):
        folder = tmp_path / "folder"
        folder.mkdir()
        made.append(folder)
        for file in scorer.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "mine.py").write_text(CODE.format(mark=str(folder / "ran")))
        for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            content = json.loads((folder / name).read_text()) | (changes or {})
            (folder / name).write_text(json.dumps(content))
        return folder

    yield make
    assert all((folder / "mine.py").exists() for folder in made)
    assert not any((folder / "ran").exists() for folder in made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "reward_model"])
def test_a_model_of_a_known_family_scores_as_without_its_code(kind, scorer, mine):
    """Such as Phi-3, whose folder has the code that transformers has by now."""
    folder = mine({"auto_map": OWN_MODEL})
    texts = ["the film"], [" was good"]
    assert open_reward(f"{kind}:{folder}")(*texts) == open_reward(f"{kind}:{scorer}")(*texts)
    assert read_generation_config(str(folder)) is None


def test_a_model_of_an_unknown_type_says_that_its_code_never_runs(mine):
    folder = mine({"auto_map": OWN_MODEL, "model_type": "mine"})
    message = r"config.json: model_type: 'mine' is not supported, .*auto_map. never runs here"
    for read in (
        lambda: huggingface.load(folder),
        lambda: huggingface.load_classifier(folder),
        lambda: open_reward(f"classifier:{folder}"),
        lambda: open_reward(f"reward_model:{folder}"),
    ):
        with pytest.raises(ValueError, match=message):
            read()


def test_a_tokenizer_of_its_own_code_is_refused_by_all_that_read_one(mine, tmp_path):
    folder = mine(None, {"auto_map": OWN_TOKENIZER, "tokenizer_class": "MyTokenizer"})
    for read in (
        lambda: read_tokenizer(folder),
        lambda: open_reward(f"classifier:{folder}"),
        lambda: open_reward(f"reward_model:{folder}"),
    ):
        with pytest.raises(ValueError, match=NEVER):
            read()
    config = default_config()
    config.tokenizer = str(folder)
    with pytest.raises(ConfigError, match=f"no tokenizer in .*folder.*{NEVER}"):
        load_tokenizer(config, tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "{", r"cannot be read \(JSONDecodeError"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Nope"}}', "cannot be read"),
        ("tokenizer_config.json", "[]", "cannot be read"),
        ("tokenizer_config.json", "[" * 200_000, r"cannot be read \(RecursionError"),
        ("tokenizer_config.json", '{"eos_token": 5}', "cannot be read"),
        ("tokenizer.json", None, "no vocabulary|holds no tokenizer and no tokenizer.json"),
    ],
)
def test_damaged_files_of_a_tokenizer_name_the_folder_in_one_line(name, text, message, mine):
    folder = mine()
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"^{folder}: .*({message})") as error:
        read_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_a_sentencepiece_model_alone_says_how_to_convert_it(mine):
    folder = mine(None, {"tokenizer_class": "LlamaTokenizer"})
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(
        ValueError, match=r"only a SentencePiece model and no tokenizer.json; .*save"
    ):
        read_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"cannot be read \(OSError"),
        ("[]", r"cannot be read \(TypeError"),
        ('{"eos_token_id": "x"}', "eos_token_id: must be ids, not 'x'"),
        ('{"eos_token_id": [1, true]}', r"eos_token_id: must be ids, not \[1, True\]"),
    ],
)
def test_a_damaged_generation_config_is_named_and_not_taken_for_none(text, message, mine):
    folder = mine()
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"{folder}/generation_config.json: {message}"):
        read_generation_config(str(folder))
