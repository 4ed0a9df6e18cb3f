"""The inspect script: what it prints, what it writes, and how it exits."""

import json
import re
import weakref

import numpy as np
import pytest
import tokenizers
import transformers

from dpojax import storage
from dpojax.commands import inspect_data
from dpojax.config import command_line
from dpojax.data.examples import Example
from tests.gcs import bucket, gcs_emulator  # noqa: F401 (fixtures)

ROWS = [
    {"prompt": "Hi é\n", "chosen": "yes", "rejected": "no"},
    {"prompt": "Hi", "chosen": "same", "rejected": "same"},
    {"prompt": "Ho", "chosen": "a", "rejected": "b"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a byte-level tokenizer, one token a byte."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return path


def run(data, tokenizer, *options):
    return inspect_data.main(["--data", str(data), "--tokenizer", str(tokenizer), *options])


@pytest.mark.parametrize("colour", [False, True])
def test_lines_of_tokens_end_between_two_tokens_and_fit_the_terminal(tokenizer, colour):
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    ids = np.array(loaded("日本 " + "abcdefgh " * 20)["input_ids"])
    example = Example("a:1", ids, (ids[:9],), (False,), label=True)
    whole = inspect_data.render(example, loaded, colour).split("\n")
    lines = inspect_data.render(example, loaded, colour, width=40).split("\n")
    assert len(lines) > len(whole)
    widths = [wcwidth(re.sub(r"\x1b\[\d*m", "", line)) for line in lines]
    assert 35 < max(widths) <= 40
    assert "".join(line.removeprefix("  ") for line in lines) == "".join(
        line.removeprefix("  ") for line in whole
    )


def test_a_token_that_holds_the_sign_between_tokens_stays_whole(tokenizer, monkeypatch):
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    monkeypatch.setattr(loaded, "convert_ids_to_tokens", lambda token: "<|the_end|>")
    ids = np.array([loaded.eos_token_id] * 9)
    example = Example("a:1", ids, (ids,), (False,), label=True)
    lines = inspect_data.render(example, loaded, False, width=20).split("\n")
    assert [line for line in lines if "the_end" in line] == (
        ["  ⟦<|the_end|>⟧|"] * 8 + lines[-1:]
    ) * 2


def wcwidth(text):
    """Of a text whose only wide letters are those of the test."""
    return len(text) + sum(letter in "日本" for letter in text)


def test_it_prints_tokens_with_their_boundaries_and_then_the_report(data, tokenizer, capsys):
    assert run(data, tokenizer) == 0
    out = capsys.readouterr().out
    assert "a.jsonl:1\nprompt (6 tokens)\n  H|i| |é*2|⏎\n" in out
    assert "chosen (4 tokens)\n  y|e|s|⟦</s>⟧\nrejected (3 tokens)\n  n|o|⟦</s>⟧\n" in out
    assert "a.jsonl:3\n" in out
    assert "3 records read, 2 kept, 1 dropped" in out
    assert "identical: responses are equal" in out
    assert "\x1b" not in out


def test_show_and_from_choose_the_examples(data, tokenizer, capsys):
    run(data, tokenizer, "--show", "1", "--from", "a.jsonl:3")
    out = capsys.readouterr().out
    assert out.startswith("a.jsonl:3\n")
    assert run(data, tokenizer, "--from", "a.jsonl:2") == 2
    assert "no example has the id 'a.jsonl:2'" in capsys.readouterr().err


def test_no_more_than_a_few_chunks_of_records_are_held(data, tokenizer, monkeypatch, capsys):
    rows = [{"prompt": f"q {n}", "chosen": "yes", "rejected": "no"} for n in range(60)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setattr(inspect_data.tokenise, "CHUNK", 4)
    references, held = [], []

    def add(self, record):
        references.append(weakref.ref(record))
        held.append(sum(reference() is not None for reference in references))

    monkeypatch.setattr(inspect_data.lint.Linter, "add", add)
    assert run(data, tokenizer) == 0
    assert len(references) == 60
    assert max(held) <= 4 * 4


def test_strict_fails_when_a_record_was_dropped(data, tokenizer, capsys):
    assert run(data, tokenizer, "--strict") == 1
    data.write_text(json.dumps(ROWS[0]), encoding="utf-8")
    assert run(data, tokenizer, "--strict") == 0


def test_strict_fails_on_a_fault_but_not_on_a_bias(data, tokenizer, tmp_path, capsys):
    data.write_text("\n".join(json.dumps(ROWS[0]) for _ in range(2)), encoding="utf-8")
    assert run(data, tokenizer) == 0
    out = capsys.readouterr().out
    assert "duplicate: repeats an earlier record" in out
    assert "a.jsonl:2 / a.jsonl:1" in out
    assert run(data, tokenizer, "--strict") == 1
    data.write_text(json.dumps(ROWS[0]), encoding="utf-8")  # its longer response is chosen
    assert run(data, tokenizer, "--strict") == 0
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(ROWS[2]), encoding="utf-8")
    assert run(data, tokenizer, "--strict", "--eval", str(held)) == 0
    held.write_text(json.dumps(ROWS[0] | {"chosen": "other"}), encoding="utf-8")
    assert run(data, tokenizer, "--strict", "--eval", str(held)) == 1
    assert "a.jsonl:1 / held.jsonl:1" in capsys.readouterr().out


def test_lines_that_are_not_utf8_are_counted_before_anything_else(data, tokenizer, capsys):
    data.write_bytes(data.read_bytes() + b'\n{"prompt": "\xff"}\n{"prompt": "\xe9"}')
    assert run(data, tokenizer) == 2
    captured = capsys.readouterr()
    assert "a.jsonl: 2 lines are not UTF-8 (4, 5); convert the file" in captured.err
    assert captured.out == ""


def test_the_report_is_written_whole(data, tokenizer, tmp_path, capsys):
    run(data, tokenizer, "--json", str(tmp_path / "out.json"))
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert (content["read"], content["kept"]) == (3, 2)
    assert content["dropped"]["identical"] == {"count": 1, "examples": ["a.jsonl:2"]}
    longer = next(row for row in content["lint"] if row["name"] == "longer_chosen")
    assert (longer["count"], longer["of"], longer["examples"]) == (1, 1, ["a.jsonl:1"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--form", "pairs"], "form 'pairs' is not known"),
        (["--truncation", "cut"], "truncation should be one of"),
        (["--max-length", "3"], "all 3 records were dropped"),
        (["--split", "train"], "has no splits"),
    ],
)
def test_an_error_is_one_message_without_a_traceback(data, tokenizer, capsys, options, message):
    assert run(data, tokenizer, *options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == ""


def test_every_key_of_a_training_can_be_set(data, tokenizer, capsys):
    assert run(data, tokenizer, "--config.tokens.identical=keep") == 0
    assert "3 records read, 3 kept, 0 dropped" in capsys.readouterr().out
    run(data, tokenizer, "--config.tokens.append_eos=false")
    assert "chosen (3 tokens)\n  y|e|s\n" in capsys.readouterr().out
    run(data, tokenizer, "--config.preference.data.limit=1")
    assert "1 records read, 1 kept" in capsys.readouterr().out
    rows = [{"question": "Hi", "good": "a", "bad": "b"}]
    data.write_text(json.dumps(rows[0]), encoding="utf-8")
    columns = "--config.preference.data.columns=prompt=question,chosen=good,rejected=bad"
    assert run(data, tokenizer, columns) == 0
    assert "prompt (2 tokens)\n  H|i\n" in capsys.readouterr().out


def test_a_config_says_what_is_read(data, tokenizer, tmp_path, capsys):
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(ROWS[0] | {"chosen": "other"}), encoding="utf-8")
    config = tmp_path / "config.json"
    keys = {"source": str(data), "eval_source": str(held), "form": "pair", "limit": 0}
    content = {
        "tokenizer": str(tokenizer),
        "stages": ["preference"],
        "preference": {"data": keys},
        "tokens": {"identical": "keep", "max_length": 40},
    }
    config.write_text(json.dumps(content), encoding="utf-8")
    assert inspect_data.main([f"--config={config}"]) == 0
    out = capsys.readouterr().out
    assert "3 records read, 3 kept" in out
    assert "a.jsonl:1 / held.jsonl:1" in out
    assert inspect_data.main([f"--config={config}", "--max-length=8"]) == 0  # the flag counts
    assert "1 dropped" in capsys.readouterr().out


def test_without_data_nothing_is_read(capsys):
    for words in ([], ["--stage=ppo"], ["--config.preference.betta=1"]):
        with pytest.raises(
            command_line.UsageError, match=r"--data is missing|no stage|no such key"
        ):
            inspect_data.main(words)


@pytest.mark.slow
def test_a_chat_template_can_come_from_a_file(tmp_path, tokenizer, capsys):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps(row), encoding="utf-8")
    assert run(data, tokenizer) == 2
    assert "no chat template" in capsys.readouterr().err
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}.{% endfor %}", encoding="utf-8")
    assert run(data, tokenizer, "--chat-template", str(template)) == 0
    assert "prompt (2 tokens)\n  q|.\nresponse (3 tokens)\n  a|.|⟦</s>⟧" in capsys.readouterr().out


@pytest.mark.slow
def test_every_path_may_begin_with_the_home_folder(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = storage.as_path("~")
    (tmp_path / "tokenizer").symlink_to(tokenizer)
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    storage.write_text(home / "a.jsonl", json.dumps(row))
    storage.write_text(home / "chat.jinja", "{% for m in messages %}{{ m.content }}.{% endfor %}")
    options = ("--chat-template", "~/chat.jinja", "--eval", "~/b.jsonl", "--json", "~/out.json")
    storage.write_text(home / "b.jsonl", json.dumps(row).replace("q", "r"))
    assert run("~/a.jsonl", "~/tokenizer", *options) == 0
    assert storage.read_json(home / "out.json")["kept"] == 1
    storage.write_bytes(home / "b.jsonl", b'{"prompt": "\xff"}\n')
    assert run("~/a.jsonl", "~/tokenizer", *options) == 2
    assert "b.jsonl: 1 lines are not UTF-8 (1); convert the file" in capsys.readouterr().err
    assert run("~/a.jsonl", "~/tokenizer", "--chat-template", " ") == 2
    assert "error: --chat-template is empty" in capsys.readouterr().err


def test_a_bucket_holds_what_a_disk_holds(
    bucket,  # noqa: F811
    tokenizer,
    tmp_path,
    capsys,
    monkeypatch,
):
    monkeypatch.setenv("DPOJAX_MIRROR", str(tmp_path / "mirror"))
    folder = storage.as_path(bucket)
    storage.write_text(folder / "chat.jinja", "{{ messages[0].content }}")
    for file in tokenizer.iterdir():
        storage.write_bytes(folder / "tokenizer" / file.name, file.read_bytes())
    storage.write_text(folder / "a.jsonl", json.dumps(ROWS[0]))
    options = ("--chat-template", f"{folder}/chat.jinja", "--json", f"{folder}/out.json")
    assert run(f"{folder}/*.jsonl", f"{folder}/tokenizer", *options) == 0
    assert storage.read_json(folder / "out.json")["kept"] == 1
    storage.write_bytes(folder / "a.jsonl", b'{"prompt": "\xff"}\n{"prompt": "\xe9"}')
    for name in ("a.jsonl", "*.jsonl"):
        assert run(f"{folder}/{name}", f"{folder}/tokenizer") == 2
        message = f"{folder}/a.jsonl: 2 lines are not UTF-8 (1, 2); convert the file"
        assert message in capsys.readouterr().err


def test_code_in_a_tokenizers_folder_never_runs(data, tokenizer, monkeypatch):
    asked = {}

    def from_pretrained(name, **options):
        asked.update(options)
        raise OSError("no tokenizer")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    assert run(data, tokenizer) == 2
    assert asked == {"trust_remote_code": False}


def test_colours_add_nothing_but_colours(tokenizer):
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)

    def encode(text):
        return np.asarray(loaded(text)["input_ids"], np.int32)

    example = Example("f:1", encode("q"), (encode("a</s>"), encode("b")), (False, True), None)
    coloured = inspect_data.render(example, loaded, colour=True)
    plain = inspect_data.render(example, loaded, colour=False)
    bare = re.sub(r"\x1b\[\d+m", "", coloured)
    assert bare == plain.replace("⟦", "").replace("⟧", "")
    assert "\x1b[2mq\x1b[0m" in coloured
    assert "\x1b[32ma\x1b[0m" in coloured
    assert "\x1b[31mb\x1b[0m" in coloured
    assert "\x1b[7m</s>\x1b[0m" in coloured
    assert "end cut off" in plain


def test_no_color_is_respected_on_a_terminal(data, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    run(data, tokenizer)
    assert "\x1b[" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    run(data, tokenizer)
    assert "\x1b[" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("label", "count", "names"),
    [
        (True, 1, ["desirable"]),
        (False, 1, ["undesirable"]),
        (None, 1, ["response"]),
        (None, 3, ["rank 1", "rank 2", "rank 3"]),
    ],
)
def test_responses_are_called_what_they_are(tokenizer, label, count, names):
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    one = np.asarray(loaded("x")["input_ids"], np.int32)
    example = Example("f:1", one, (one,) * count, (False,) * count, label)
    text = inspect_data.render(example, loaded, colour=False)
    assert re.findall(r"^(.*) \(1 tokens\)", text, re.MULTILINE) == ["prompt", *names]


def test_tokens_of_an_answer_that_are_not_scored_are_shown_as_such(tokenizer):
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    one, answer = (np.asarray(loaded(text)["input_ids"], np.int32) for text in ("q", "abcd"))
    mask = np.array([True, False, False, True])
    example = Example("f:1", one, (answer, one), (False, False), None, scored=(mask, mask[:1]))
    plain = inspect_data.render(example, loaded, colour=False)
    assert "chosen (4 tokens, 2 scored)\n  a|⟨b|c⟩|d\nrejected (1 tokens)\n  q" in plain
    coloured = inspect_data.render(example, loaded, colour=True)
    assert "\x1b[32ma\x1b[0m" in coloured
    assert "\x1b[2mb\x1b[0m" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == re.sub("[⟨⟩]", "", plain)
