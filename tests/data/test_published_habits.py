"""Tokenizer folders with the habits of published ones: what is scored of an answer."""

import os
import subprocess
import sys

import pytest

from dpojax.data.example_maker import ExampleMaker
from dpojax.data.records import Record
from dpojax.data.tokenize_config import TokenizeConfig
from dpojax.data.tokenizer_files import read_tokenizer
from tests.data.chat_tokenizers import assistant, tool, user

CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"at": "Bern"}}}]
PLAIN = Record("plain", (user("q"),), ((assistant("yes"),), (assistant("no"),)))
THINKING = Record("think", (user("q"),), ((assistant("<think>\nhm\n</think>\n\nyes"),),))
TURNS = Record("turns", (user("q"),), ((assistant("one"), user("r"), assistant("two")),))
TOOLS = Record(
    "tools",
    (user("q"),),
    ((assistant(None, tool_calls=CALL), tool("sunny"), assistant("It shines")),),
)
RECORDS = {record.id: record for record in (PLAIN, THINKING, TURNS, TOOLS)}
# Tokenizer, record -> what is scored of the first answer, what is noted besides `all_turns_scored`.
SCORED = {
    ("chatml", "plain"): (["yes<|im_end|>"], set()),
    ("chatml", "turns"): (["one<|im_end|>", "two<|im_end|>"], set()),
    ("chatml", "tools"): (
        ['<tool_call>weather {"at": "Bern"}</tool_call><|im_end|>', "It shines<|im_end|>"],
        set(),
    ),
    ("strargs", "tools"): (
        ['<tool_call>weather {"at": "Bern"}</tool_call><|im_end|>', "It shines<|im_end|>"],
        set(),
    ),
    ("chatml_base", "plain"): (["yes<|im_end|><|endoftext|>"], {"other_end"}),
    ("separate", "plain"): (["yes<|im_end|>"], set()),
    ("named_default", "plain"): (["yes<|im_end|>"], set()),
    ("gemma", "turns"): (["one<end_of_turn>", "two<end_of_turn><eos>"], {"other_end"}),
    ("bos_eos", "turns"): (["one</s>", "two</s>"], set()),
    ("r1", "plain"): (["yes<|end|>"], set()),
    ("r1", "think"): (["\n\nyes<|end|>"], {"template_strips"}),
    ("qwen3", "plain"): (["<think>\n\n</think>\n\nyes<|im_end|>"], set()),
    ("qwen3", "think"): (["<think>\nhm\n</think>\n\nyes<|im_end|>"], set()),
    ("qwen3", "turns"): (["one<|im_end|>", "<think>\n\n</think>\n\ntwo<|im_end|>"], set()),
    ("qwen35", "think"): (["hm\n</think>\n\nyes<|im_end|>"], set()),
}


@pytest.fixture(scope="module")
def folders(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    command = [sys.executable, shared / "cases/make_tokenizers.py", folder]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return folder


@pytest.mark.long
def test_what_is_scored_of_an_answer(folders):
    found, opened = {}, {}
    for name, kind in SCORED:
        if name not in opened:
            opened[name] = read_tokenizer(folders / name)
        tokenizer = opened[name]
        config = TokenizeConfig(max_length=1000)
        (example,), report = ExampleMaker(tokenizer, config)([RECORDS[kind]])
        ids, parts, before = example.responses[0], [], False
        masks = example.scored or [[True] * len(ids)]
        for token, scored in zip(ids.tolist(), masks[0]):
            if scored and not before:
                parts.append([])
            if scored:
                parts[-1].append(token)
            before = scored
        noted = {*report.tallies["noted"]} - {"all_turns_scored"}
        found[name, kind] = [tokenizer.decode(part) for part in parts], noted
        assert example.prompt.min() >= 0
        assert report.starts == {int(tokenizer.bos_token_id in example.prompt): 1}
    assert found == SCORED
