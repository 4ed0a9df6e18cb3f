"""The ends and the padding that an exported folder names, against transformers' own reading."""

import json

import jax
import pytest

from dpojax.data import reviews
from dpojax.models import decoder, huggingface
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.models.special_tokens import end_tokens, turn_end, with_own_padding
from dpojax.stages.tokenizers import stop_tokens

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + CHATML
BROKEN = "{% for m in messages %}{{ m.content + 1 }}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def tokenizer():
    """That of the reviews, whose EOS is </s> (2), with the tokens of ChatML (371 and 372)."""
    tokenizer = reviews.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (STRICT, "<|im_end|>"),
        (LLAMA2, "</s>"),
        (CHATML.replace("m.content }}", "m.content | trim }}\n"), "<|im_end|>"),
        (PLAIN, None),
        (BROKEN, None),
        (None, None),
        ({"rag": CHATML}, None),  # named, without a default
    ],
)
def test_the_end_of_a_turn_is_the_special_token_behind_the_answer(tokenizer, template, end):
    tokenizer.chat_template = template
    token = None if end is None else tokenizer.convert_tokens_to_ids(end)
    assert turn_end(tokenizer) == token
    ends = {2} if token is None else {2, token}
    assert set(end_tokens(tokenizer)) == set(stop_tokens(tokenizer, "")) == ends


@pytest.fixture
def saved(tmp_path, tokenizer):
    """(raw config or None, generation config) -> the folder of a tiny model with that tokenizer."""

    def save(raw=None, generation_config=None, missing_rows=0):
        shape = dict(width=8, layers=1, heads=1, mlp_width=8, max_positions=32)
        config = DecoderConfig(**LLAMA, **shape, vocab_size=len(tokenizer) - missing_rows)
        params = jax.jit(decoder.build(config).init)(jax.random.key(0))
        if raw is not None:
            raw = huggingface.config_to_raw(config) | raw
        huggingface.save(
            tmp_path / "out", config, params, raw, tokenizer=tokenizer,
            generation_config=generation_config,
        )  # fmt: skip
        return tmp_path / "out"

    return save


@pytest.mark.parametrize("generation_config", [None, {"eos_token_id": 5, "max_new_tokens": 9}])
def test_generate_stops_where_the_chat_template_ends_a_turn(saved, tokenizer, generation_config):
    torch = pytest.importorskip("torch", reason="transformers generates with torch")
    import transformers

    tokenizer.chat_template = CHATML
    folder = saved({"eos_token_id": 7, "bos_token_id": 9}, generation_config)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def say(tokens):
        """Generate these tokens, whatever the model would say."""

        def force(ids, scores):
            forced = torch.full_like(scores, -torch.inf)
            forced[:, tokens[ids.shape[1] - 3]] = 0.0
            return forced

        prompt = torch.tensor([[1, 8, 9]])
        processors = transformers.LogitsProcessorList([force])
        out = model.generate(prompt, max_new_tokens=6, logits_processor=processors, do_sample=False)
        return out[0, 3:].tolist()

    assert say([11, im_end, 12, 13, 14, 15]) == [11, im_end]
    assert say([11, 2, 12, 13, 14, 15]) == [11, 2]
    ended_before = [11, 5] if generation_config else [11, 5, 12, 13, 14, 15]
    assert say([11, 5, 12, 13, 14, 15]) == ended_before
    assert (model.config.bos_token_id, model.config.pad_token_id) == (1, 0)


def test_without_a_template_the_one_end_is_the_tokenizers_eos(saved):
    raw = json.loads((saved({"eos_token_id": [7, 8]}) / "config.json").read_text())
    assert raw["eos_token_id"] == 2


def test_code_that_stays_behind_is_not_named(saved):
    folder = saved({"auto_map": {"AutoModelForCausalLM": "modelling.Model"}})
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_a_padding_beyond_the_models_rows_is_not_named(saved, tokenizer):
    """transformers would refuse to build the model's embedding."""
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    folder = saved(missing_rows=1)
    raw = json.loads((folder / "config.json").read_text())
    assert raw.get("pad_token_id") is None
    pytest.importorskip("torch", reason="transformers builds its models with torch")
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("tokens", "padding"),
    [
        ({"pad_token": "<pad>"}, "<pad>"),
        ({"pad_token": "</s>", "additional_special_tokens": ["<|reserved_7|>"]}, "<pad>"),
        ({"pad_token": "<|im_end|>"}, "<pad>"),  # the end of a turn ends responses, too
    ],
)
def test_padding_of_a_reward_model_ends_no_response(tokenizer, tokens, padding):
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens(tokens)
    before = tokenizer.pad_token
    assert with_own_padding(tokenizer).pad_token == padding
    assert tokenizer.pad_token == before  # the run's own is as it was
