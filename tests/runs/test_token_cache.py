"""What was tokenised once is read again, under a name that changes with all it depends on."""

import json
import re
import shutil
import threading
import time

import numpy as np
import pyarrow as pa
import pytest
import transformers
from tokenizers import normalizers, processors

from dpojax import sharding
from dpojax.config.defaults import default_config
from dpojax.data import reviews, sources
from dpojax.data.records import DataError
from dpojax.runs import run as runs
from dpojax.stages import token_cache
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import prepare_setup
from dpojax.stages.trained_stage import report_text

ROWS = [
    {"prompt": f"the plot {i}", "chosen": " was good", "rejected": " was bad" + " so" * (i % 9)}
    for i in range(40)
]
TEXTS = [{"text": f"good {'so ' * (i % 5)}", "label": "pos" if i % 2 else "neg"} for i in range(60)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(config, workdir, name):
    """A stage with its data."""
    config.stages = (name,)
    return open_stage(prepare_setup(resolve(config, workdir)), name).prepare()


def no_tokenizer(self, *args, **kwargs):
    raise AssertionError("the tokenizer was called")


def plain(example):
    tokens = [x.tolist() for x in (example.prompt, *example.responses)]
    return example._replace(prompt=None, responses=None), tokens


CASES = {
    "sft on the embedded task": ("sft", {}),
    "mismatched responses of a file": (
        "preference",
        {"preference.loss": "kto", "preference.data.source": "pairs"},
    ),
    "two files": (
        "preference",
        {"preference.data.source": "pairs", "preference.data.eval_source": "pairs"},
    ),
    "a classifier": ("classifier", {"classifier.data.source": "texts"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_second_run_tokenises_nothing_and_finds_the_same(tiny, tmp_path, monkeypatch, case):
    files = {"pairs": write(tmp_path / "pairs.jsonl", ROWS)}
    files["texts"] = write(tmp_path / "texts.jsonl", TEXTS)
    name, changes = CASES[case]
    changes = {key: files.get(value, value) for key, value in changes.items()}
    config = tiny(**changes, token_cache=str(tmp_path / "tokens"))
    first = prepared(config, tmp_path / "first", name)
    assert first.batches.data.file_note == f"kept in {first.batches.data.file}"
    with monkeypatch.context() as without:
        without.setattr(transformers.PreTrainedTokenizerFast, "__call__", no_tokenizer)
        without.setattr(sources, "read_each", None)
        without.setattr(reviews, "preferences", None)
        without.setattr(reviews, "texts", None)
        again = prepared(config, tmp_path / "again", name)
    assert again.batches.data.file_note == f"read from {first.batches.data.file}"
    assert report_text(again) == report_text(first)
    assert (again.batches.shape, again.batches.data.labels) == (
        first.batches.shape,
        first.batches.data.labels,
    )
    in_json = lambda stage: {part: x.to_json() for part, x in stage.batches.data.reports.items()}
    assert in_json(again) == in_json(first)
    monkeypatch.setattr(token_cache, "examples", None)  # made anew, and not read
    config.token_cache = str(tmp_path / "other")
    fresh = prepared(config, tmp_path / "fresh", name).batches.data
    assert [*map(plain, again.batches.data.examples)] == [*map(plain, fresh.examples)]
    assert (again.batches.data.train, again.batches.data.reports.keys()) == (
        fresh.train,
        fresh.reports.keys(),
    )


# By what the key is made from: (stage, config key, another value).
CHANGES = [
    ("preference", "preference.data.limit", 30),
    ("preference", "preference.data.eval_limit", 3),
    ("preference", "preference.data.eval_share", 0.3),
    ("preference", "preference.data.split", "train"),
    ("preference", "preference.data.form", "pair"),
    ("preference", "preference.data.columns", "prompt=question"),
    ("preference", "preference.data.subset", "helpful"),
    ("preference", "preference.data.revision", "v2"),
    ("preference", "preference.data.data_dir", "part"),
    ("preference", "preference.data.weights", (2.0,)),
    ("preference", "preference.data.source", "reviews"),
    ("preference", "preference.data.eval_source", "reviews"),
    ("preference", "preference.data.eval_split", "eval"),
    ("preference", "preference.loss", "kto"),  # labelled, with mismatched responses
    ("preference", "preference.loss", "bco_unpaired"),  # labelled alone
    ("preference", "preference.loss", "plackett_luce"),  # keeps ties
    ("preference", "preference.loss", "odpo"),  # wants scores
    ("preference", "tokens.max_length", 50),
    ("preference", "tokens.max_prompt_length", 5),
    ("preference", "tokens.truncation", "cut_response_end"),
    ("preference", "tokens.append_eos", False),
    ("preference", "tokens.identical", "keep"),
    ("preference", "tokens.empty", "keep"),
    ("preference", "tokens.prompts_differ", "error"),
    ("preference", "tokens.malformed", "error"),
    ("preference", "tokens.assistant_turns", "last"),
    ("classifier", "classifier.max_tokens", 9),
    ("classifier", "seed", 1),  # draws the texts within the limit
]


@pytest.fixture
def name_of(tiny, tmp_path, monkeypatch):
    """The file that a stage's examples would be kept in; nothing is read but the source's bytes."""
    files = {"preference": write(tmp_path / "pairs.jsonl", ROWS)}
    files["classifier"] = write(tmp_path / "texts.jsonl", TEXTS)
    names = []

    def cached(folder, key, load):
        names.append(key())
        raise KeyboardInterrupt

    monkeypatch.setattr(token_cache, "cached", cached)

    def name_of(stage="preference", tokenizer=None, **changes):
        config = tiny(**{f"{stage}.data.source": files[stage], "classifier.data.limit": 20})
        config.update_from_flattened_dict(changes)
        config.stages = (stage,)
        setup = prepare_setup(resolve(config, tmp_path / "run"))
        setup = setup._replace(tokenizer=tokenizer or setup.tokenizer)
        with pytest.raises(KeyboardInterrupt):
            open_stage(setup, stage).prepare()
        return names.pop()

    return name_of


@pytest.mark.parametrize(("stage", "key", "value"), CHANGES)
def test_what_changes_the_examples_changes_their_name(name_of, stage, key, value):
    needed = {"preference.alpha": 1.0} if value == "odpo" else {}
    assert name_of(stage, **{key: value} | needed) != name_of(stage)


def test_every_key_that_selects_or_tokenises_is_changed_by_this_file():
    config = default_config()
    every = {f"preference.data.{key}" for key in config.preference.data}
    every |= {f"tokens.{key}" for key in config.tokens}
    assert every <= {key for _, key, _ in CHANGES}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 3},
        {"preference.beta": 2.0},
        {"preference.batch_size": 4},
        {"preference.loss": "ipo"},
        {"micro_rows": 8},
    ],
)
def test_what_only_trains_does_not(name_of, change):
    extra = {"preference.length_norm": "mean"} if "preference.loss" in change else {}
    assert name_of(**change | extra) == name_of()


def test_the_seed_counts_where_it_makes_the_records(name_of):
    embedded = {"preference.data.source": "reviews"}
    assert name_of(**embedded, seed=1) != name_of(**embedded)


def test_a_file_counts_by_its_name_and_bytes_and_not_by_its_folder(name_of, tmp_path):
    plain, path = name_of(), tmp_path / "pairs.jsonl"
    moved = tmp_path / "elsewhere" / "pairs.jsonl"
    moved.parent.mkdir()
    shutil.copy(path, moved)
    assert name_of(**{"preference.data.source": str(moved)}) == plain
    renamed = moved.rename(moved.with_name("others.jsonl"))  # the ids begin with it
    assert name_of(**{"preference.data.source": str(renamed)}) != plain
    write(path, [*ROWS[:-1], ROWS[-1] | {"chosen": " was great"}])
    assert name_of() != plain


def test_of_a_folder_every_file_counts(name_of, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text("1")
    (folder / "b.jsonl").write_text("2")
    of_folder = lambda: name_of(**{"preference.data.source": str(folder)})
    names = [of_folder()]
    (folder / "a.jsonl").write_text("2")
    (folder / "b.jsonl").write_text("1")
    names.append(of_folder())
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    names.append(of_folder())
    (folder / "part").mkdir()
    (folder / "part" / "d.jsonl").write_text("")
    names.append(of_folder())
    assert len({*names}) == 4
    (folder / ".lock").write_text("a process")  # no data
    assert of_folder() == names[-1]


def test_of_a_hub_data_set_the_version_counts(name_of, monkeypatch):
    import datasets

    def load_dataset(path, *, streaming, trust_remote_code):
        assert (path, streaming, trust_remote_code) == ("someone/pairs", False, False)
        return datasets.DatasetDict(train=datasets.Dataset.from_list(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    of_hub = lambda: name_of(**{"preference.data.source": "someone/pairs"})
    rows = ROWS
    before = of_hub()
    assert of_hub() == before
    rows = ROWS[1:]
    assert of_hub() != before


@pytest.fixture
def of_pairs(tiny, tmp_path):
    return tiny(**{"preference.data.source": write(tmp_path / "pairs.jsonl", ROWS)})


def altered(change):
    tokenizer = reviews.tokenizer()
    change(tokenizer)
    return tokenizer


TOKENIZERS = {
    "normaliser": lambda x: setattr(x.backend_tokenizer, "normalizer", normalizers.Lowercase()),
    "what begins a text": lambda x: setattr(
        x.backend_tokenizer, "post_processor", processors.TemplateProcessing("$A", "$A $B", [])
    ),
    "vocabulary": lambda x: x.add_tokens(["dpojax"]),
    "end": lambda x: setattr(x, "eos_token", "<pad>"),
    "chat template": lambda x: setattr(x, "chat_template", "{{ messages }}"),
    "special tokens in a text": lambda x: setattr(x, "split_special_tokens", True),
}


@pytest.mark.parametrize("change", TOKENIZERS)
def test_all_that_a_tokenizer_does_counts(name_of, change):
    assert name_of(tokenizer=altered(TOKENIZERS[change])) != name_of()


def test_a_tokenizer_that_was_used_is_the_same(name_of):
    use = lambda x: x(["the plot", "the"], padding=True, truncation=True, max_length=1)
    assert name_of(tokenizer=altered(use)) == name_of()


def test_the_code_and_the_libraries_count(name_of, monkeypatch):
    names = [name_of()]
    for other in (["code"], ["numpy 0"]):
        monkeypatch.setattr(token_cache, "_code", lambda other=other: other)
        names.append(name_of())
    assert len({*names}) == 3
    monkeypatch.undo()
    parts = token_cache._code()
    assert f"numpy {np.__version__}" in parts
    assert len(parts) > 15


def test_a_tokenizer_without_content_keeps_nothing(of_pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "content_hash", lambda tokenizer: None)
    stage = prepared(of_pairs, tmp_path / "run", "preference")
    assert "not kept" in stage.batches.data.file_note
    assert not (tmp_path / "run").exists()


def test_a_folder_that_takes_no_file_stops_no_run(of_pairs, tmp_path):
    of_pairs.token_cache = str(tmp_path / "file" / "tokens")
    (tmp_path / "file").write_text("")
    stage = prepared(of_pairs, tmp_path / "run", "preference")
    assert "not kept" in stage.batches.data.file_note
    assert len(stage.batches.data.examples) > 0


def test_a_file_that_changes_while_it_is_read_is_not_kept(of_pairs, tmp_path, monkeypatch):
    rows = sources.read_each

    def appended(*args):
        (only,) = rows(*args)
        yield only
        write(tmp_path / "pairs.jsonl", ROWS * 2)

    monkeypatch.setattr(sources, "read_each", appended)
    stage = prepared(of_pairs, tmp_path / "run", "preference")
    assert stage.batches.data.file is None
    assert not (tmp_path / "run").exists()


def test_an_error_in_the_data_is_never_kept(tiny, tmp_path):
    path = tmp_path / "pairs.jsonl"
    write(path, [*ROWS, {"prompt": "the", "chosen": " plot"}])
    changes = {"preference.data.source": str(path), "stages": ("preference",)}
    changes["tokens.malformed"] = "error"
    for _ in range(2):
        with pytest.raises(DataError, match=r"pairs\.jsonl:41"):
            runs.run(tiny(**changes), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damaged", [lambda x: x[:-100], lambda x: b"", lambda x: x[::-1]])
def test_a_damaged_file_is_named_and_made_again(of_pairs, tmp_path, caplog, damaged):
    first = prepared(of_pairs, tmp_path / "run", "preference").batches.data
    (file,) = (tmp_path / "run" / "tokens").iterdir()
    content = file.read_bytes()
    file.unlink()  # not changed in place, as it is mapped
    file.write_bytes(damaged(content))
    again = prepared(of_pairs, tmp_path / "run", "preference").batches.data
    (warning,) = [record.getMessage() for record in caplog.records]
    assert re.search(rf"{file.name}: not a usable cache .*; it is made again$", warning)
    assert [*map(plain, again.examples)] == [*map(plain, first.examples)]
    assert file.read_bytes() == content


def test_a_damaged_file_whose_data_are_gone_is_not_made_of_others(of_pairs, tmp_path):
    prepared(of_pairs, tmp_path / "run", "preference")
    (file,) = (tmp_path / "run" / "tokens").iterdir()
    file.unlink()
    file.write_bytes(b"")
    write(tmp_path / "pairs.jsonl", ROWS[::-1])
    prepared(of_pairs, tmp_path / "run", "preference")
    assert file.read_bytes() == b""


def test_no_process_waits_for_another(of_pairs, tmp_path, monkeypatch):
    """One may find what another does not see yet: each has the same examples all the same."""

    def waits(value):
        raise AssertionError("all processes have to come here")

    missed = (stage := prepared(of_pairs, tmp_path / "run", "preference")).batches.data
    monkeypatch.setattr(sharding, "agreed", waits)
    hit = open_stage(stage.setup, "preference").prepare().batches.data
    assert (missed.file_note, hit.file_note) == (f"kept in {hit.file}", f"read from {hit.file}")
    assert [*map(plain, missed.examples)] == [*map(plain, hit.examples)]


def test_of_two_runs_that_need_the_same_tokens_at_once_one_tokenises(
    of_pairs, tmp_path, monkeypatch
):
    of_pairs.stages, of_pairs.token_cache = ("preference",), str(tmp_path / "tokens")
    kept, both, notes = token_cache._kept, threading.Barrier(2), []

    def slowly(*arguments):
        time.sleep(0.3)
        return kept(*arguments)

    monkeypatch.setattr(token_cache, "_kept", slowly)
    opened = [
        open_stage(prepare_setup(resolve(of_pairs, tmp_path / name)), "preference")
        for name in ("a", "b")
    ]

    def prepare(stage):
        both.wait()
        notes.append(stage.prepare().batches.data.file_note)

    threads = [threading.Thread(target=prepare, args=(stage,)) for stage in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (file,) = (tmp_path / "tokens").iterdir()
    assert sorted(notes) == [f"kept in {file}", f"read from {file}"]


def test_a_disk_that_fills_up_while_tokens_are_written_stops_no_run(
    of_pairs, tmp_path, monkeypatch
):
    def full(self, batch):
        raise OSError(28, "No space left on device")

    class Full(pa.RecordBatchFileWriter):
        write_batch = full

    monkeypatch.setattr(pa.ipc, "new_file", Full)
    data = prepared(of_pairs, tmp_path / "run", "preference").batches.data
    assert (data.file, data.file_note) == (None, "not kept: [Errno 28] No space left on device")
    monkeypatch.undo()
    (tmp_path / "run" / "tokens" / ".key.arrow.0123abcd.unfinished").mkdir(parents=True)  # killed
    kept = prepared(of_pairs, tmp_path / "run", "preference").batches.data
    assert [*map(plain, data.examples)] == [*map(plain, kept.examples)]
    assert data.reports["train and eval"].to_json() == kept.reports["train and eval"].to_json()
    assert [path.name for path in (tmp_path / "run" / "tokens").iterdir()] == [kept.file.name]
