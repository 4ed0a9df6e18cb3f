"""Rows come out the same from every kind of file, and a bad file is named with its line."""

import gzip
import json
import pathlib

import datasets
import pytest

from dpojax.data.parsing import ParseConfig
from dpojax.data.records import DataError, read_columns
from dpojax.data.sources import load_records, read

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def rows(path, **options):
    return [row for row, _ in read(path, **options)]


def write(path: pathlib.Path, content: str | bytes) -> pathlib.Path:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of its own for `datasets`."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl.gz", LINES),
        ("a.json", LINES),
        ("a.json.gz", LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json.gz", json.dumps(ROWS)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=1)),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("a.jsonl", LINES.replace("\n", "\r\n")),
    ],
)
def test_every_kind_of_json_gives_the_same_rows(tmp_path, name, content):
    assert rows(write(tmp_path / name, content)) == ROWS
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_one_line_of_json_may_be_a_row_that_holds_lists(tmp_path):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert rows(write(tmp_path / "a.json", json.dumps(row))) == [row]


def test_mixed_types_and_line_separators_inside_text_do_not_matter(tmp_path):
    mixed = [{"text": "a\u2028b\x85"}, {"text": "c", "extra": [1]}, {"text": "d", "extra": "x"}]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in mixed)
    assert rows(write(tmp_path / "a.jsonl", content)) == mixed


def test_ids_are_the_file_and_the_line(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES.replace("\n", "\n\n"))
    assert [id for _, id in read(path)] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:5"]


def test_a_list_and_a_glob_read_all_files_and_equal_names_get_their_folder(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.jsonl", json.dumps(ROWS[0]))
    ids = ["x/a.jsonl:1", "y/a.jsonl:1"]
    assert [id for _, id in read(f"{tmp_path}/*/a.jsonl")] == ids
    assert [id for _, id in read([tmp_path / "x/a.jsonl", tmp_path / "y/a.jsonl"])] == ids


def test_parquet_is_read_in_place(tmp_path, cache):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(path)
    assert rows(path) == ROWS
    assert [id for _, id in read(path)] == ["a.parquet:1", "a.parquet:2", "a.parquet:3"]
    assert list(tmp_path.iterdir()) == [path]
    assert list(cache.rglob("*.arrow")) == []  # no copy of the data


def test_a_saved_data_set_is_read(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    before = sorted(tmp_path.rglob("*"))
    assert rows(tmp_path / "one") == ROWS
    assert sorted(tmp_path.rglob("*")) == before


def test_a_saved_data_set_with_splits_wants_one(tmp_path):
    parts = {"train": ROWS[:2], "test": ROWS[2:]}
    saved = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "both")
    assert rows(tmp_path / "both", split="test") == ROWS[2:]
    with pytest.raises(DataError, match="splits train, test"):
        rows(tmp_path / "both")
    with pytest.raises(DataError, match="no split 'dev', only train, test"):
        rows(tmp_path / "both", split="dev")


def test_a_folder_of_data_files_is_read_without_writing_into_it(tmp_path):
    write(tmp_path / "train.jsonl", LINES)
    write(tmp_path / "test.jsonl", json.dumps(ROWS[0]))
    assert rows(tmp_path, split="train") == ROWS
    assert rows(tmp_path, split="test") == ROWS[:1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]


def test_an_object_of_several_lists_wants_a_split(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"train": ROWS, "test": ROWS[:1]}))
    assert rows(path, split="test") == ROWS[:1]
    with pytest.raises(DataError, match="splits train, test"):
        rows(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES + '{"prompt": \n', "a.jsonl:4: not valid JSON"),
        ("a.json", '[\n{"prompt": "p"},\n{"prompt" "q"}\n]', "a.json:3: not valid JSON"),
        ("a.jsonl", LINES.encode() + b'{"a": "\xff"}\n', "a.jsonl:4: not UTF-8"),
        ("a.json", b'[\n{"a": "b"},\n{"a": "\xe9"}]', "a.json:3: not UTF-8"),
        ("a.jsonl.gz", LINES + "oops\n", "a.jsonl.gz:4: not valid JSON"),
        ("a.jsonl", LINES + "[1]\n", "a.jsonl:4: expected an object"),
        ("a.json", '["text"]', "record 1: expected an object"),
        ("a.json", '{"version": 1,\n "n": 2}', "array of records or an object with one"),
        ("a.json", "3", "array of records or an object with one"),
        ("a.jsonl", "\n\n", "the data set is empty"),
        ("a.json", "[]", "the data set is empty"),
        ("a.json", "", "the data set is empty"),
        ("a.parquet", b"not parquet", "cannot be read as parquet"),
        ("a.xlsx", "a,b\n", "a file that ends in .json"),
        ("a.csv", "a,b\n", "the data set is empty"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        rows(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_gzip_file_that_was_cut_short_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode())[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        rows(path)


def test_a_split_that_a_file_cannot_have_is_refused_and_not_ignored(tmp_path):
    for path in (write(tmp_path / "a.jsonl", LINES), write(tmp_path / "b.json", json.dumps(ROWS))):
        with pytest.raises(DataError, match="has no splits"):
            rows(path, split="train")


def test_a_missing_file_gets_its_absolute_path_and_a_near_name(tmp_path, monkeypatch):
    write(tmp_path / "train.jsonl", LINES)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        rows("trian.jsonl")
    assert str(tmp_path / "trian.jsonl") in str(caught.value)
    assert "did you mean train.jsonl?" in str(caught.value)
    with pytest.raises(DataError, match="no file matches"):
        rows("*.parquet")
    with pytest.raises(DataError, match="list of data files is empty"):
        rows([])


def test_a_name_that_is_neither_a_file_nor_on_the_hub_says_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="nor as a hub data set") as caught:
        rows("nobody/nothing")
    assert str(tmp_path / "nobody/nothing") in str(caught.value)


def test_columns_can_be_renamed_and_a_wrong_name_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"q": "p", "chosen": "c", "rejected": "r"}')
    config = ParseConfig(columns=read_columns("prompt=q"))
    records, _ = load_records(path, config=config)
    assert (records[0].id, records[0].prompt) == ("a.jsonl:1", "p")
    config = ParseConfig(columns=read_columns("prompt=question"))
    expected = r"a\.jsonl: columns takes 'prompt' from 'question', which no record has; they have "
    with pytest.raises(DataError, match=expected + "chosen, q, rejected"):
        load_records(path, config=config)


def test_when_every_row_is_rejected_the_causes_are_shown(tmp_path):
    row = {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"}
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    with pytest.raises(DataError, match=r"all 1 records were dropped:(.|\n)*prompts_differ"):
        load_records(path)


@pytest.mark.parametrize(
    ("path", "form", "read_count", "record_count"),
    [
        ("hh-rlhf/harmless-base/test.jsonl.gz", "hh", 2312, 2307),
        ("hh-rlhf/helpful-single-turn/*.jsonl.gz", "auto", 12000, 11975),
        ("instruction-preference/instruction-data-with-preference.json", "auto", 1100, 1100),
        ("summarize-from-feedback/comparisons/*.json.gz", "comparison", 1771, 1771),
        ("imdb/test.parquet", "text", 25000, 25000),
    ],
)
def test_real_files_load(shared, path, form, read_count, record_count):
    records, report = load_records(f"{shared}/data/{path}", config=ParseConfig(form))
    assert (report.read, len(records)) == (read_count, record_count)
    assert report.number("dropped", "prompts_differ") == read_count - record_count
