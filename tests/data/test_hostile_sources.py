"""Files that are damaged, endless or made to fill the memory: one error, with file and line."""

import bz2
import gzip
import json
import lzma
import os
import socket
import tracemalloc

import pyarrow as pa
import pytest

from dpojax.commands import inspect_data
from dpojax.data import json_files, text_files
from dpojax.data.records import DataError
from dpojax.data.sources import read

LINE = b'{"prompt": "p", "chosen": "c", "rejected": "r"}\n'
ROW = json.loads(LINE)


def rows(path, **options):
    return [row for row, _ in read(path, **options)]


def message_of(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        rows(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


DEEP = 100_000
BROKEN = {
    "deep.jsonl": (LINE + b"[" * DEEP + b"]" * DEEP, ":2: .*nested too deep"),
    "deep.json": (b"[\n" + b"[" * DEEP + b"]" * DEEP + b"]", ":2: .*nested too deep"),
    "deep_objects.jsonl": (LINE + b'{"a":' * DEEP + b"1" + b"}" * DEEP, ":2: .*nested too deep"),
    "huge_integer.jsonl": (LINE + b'{"a": ' + b"9" * 5000 + b"}", ":2: .*has 5000 digits"),
    "huge_integer.json": (b'[\n{},\n{"a": ' + b"9" * 5000 + b"}]", ":3: .*has 5000 digits"),
    "twice.jsonl": (LINE * 2 + b'{"a": 1, "b": {"c": 1, "c": 2}}', ":3: .*two values of .*'c'"),
    "twice.json": (b'[{"a": 1},\n\n{"a": 1, "a": 1}]', ":3: .*two values of .*'a'"),
    "utf16.jsonl": (LINE.decode().encode("utf-16"), ":1: .*UTF-16.*convert"),
    "utf16_big.json": (LINE.decode().encode("utf-16-be"), ":1: .*NUL bytes.*convert"),
    "utf32.jsonl": (LINE.decode().encode("utf-32"), ":1: .*UTF-32.*convert"),
    "nul.jsonl": (LINE * 3 + b"\0" * 512, ":4: holds NUL bytes"),
    "nul.csv": (b"a,b\n1,2\n3,\0\n", ":3: holds NUL bytes"),
    "mark_within.jsonl": (LINE + b"\xef\xbb\xbf" + LINE, ":2: not valid JSON"),
    "old_mac.jsonl": (LINE.replace(b"\n", b"\r") * 2, ":1: not valid JSON .Extra data"),
    "open.json": (b'[\n{"a": 1},\n', ":3: not valid JSON"),
    "cut_within.json": (b'[\n{"a": 1},\n{"a": "x', ":3: not valid JSON .Unterminated"),
    "no_comma.json": (b'[{"a": 1}\n{"a": 2}]', ":2: not valid JSON .expected ','"),
    "more.json": (b'[{"a": 1}]\n[', ":2: not valid JSON .something follows"),
    "ragged.csv": (b"a,b\n1,2\n3\n", ":3: 1 fields, but the first line names 2"),
    "longer.tsv": (b"a\tb\n1\t2\t3\n", ":2: 3 fields, but the first line names 2"),
    "quote.csv": (b'a,b\n1,2\n3,"x\ny\n', ":3: not usable as a table"),
    "two_names.csv": (b"a,a\n1,2\n", ":1: the first line should name every column once"),
    "latin.csv": ("a,b\n1,2\ncafé,3\n".encode("latin-1"), ":3: not UTF-8"),
    "broken.parquet": (b"PAR1" + b"x" * 100 + b"PAR1", ": cannot be read as parquet"),
    "empty.parquet": (b"", ": cannot be read as parquet"),
    "broken.arrow": (b"ARROW1\0\0 and then nothing", ": cannot be read as arrow"),
    "plain.jsonl.gz": (LINE, ":1: cannot be read from here on: Not a gzipped file"),
    "plain.jsonl.bz2": (LINE, ":1: cannot be read from here on"),
    "plain.jsonl.xz": (LINE, ":1: cannot be read from here on"),
    "plain.jsonl.zst": (LINE, ":1: cannot be read from here on"),
    "nothing.jsonl": (b"", ": the data set is empty"),
    "nothing.jsonl.gz": (gzip.compress(b""), ": the data set is empty"),
    "names_alone.csv": (b"a,b\n", ": the data set is empty"),
    "archive.zip": (b"PK", ": expected a folder or a file that ends in"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_the_line_and_nothing_of_it_is_used(tmp_path, name):
    content, expected = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path}{expected}") as caught:
        rows(path)
    assert "\n" not in str(caught.value)


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_compressed_files_are_read_as_plain_ones(tmp_path, kind, ending):
    content = {"jsonl": LINE * 3, "json": json.dumps([ROW] * 3).encode()}
    content["csv"] = b"prompt,chosen,rejected\n" + b"p,c,r\n" * 3
    path = tmp_path / f"a.{kind}.{ending}"
    path.write_bytes(COMPRESS[ending](content[kind]))
    assert rows(path) == [ROW] * 3


@pytest.mark.parametrize("ending", ["gz", "xz", "bz2"])
def test_an_archive_that_was_cut_names_a_line_behind_what_could_be_read(tmp_path, ending):
    many = b"".join(b'{"prompt": "%d"}\n' % (i * 7919 % 100_003) for i in range(20_000))
    path = tmp_path / f"a.jsonl.{ending}"
    whole = COMPRESS[ending](many)
    path.write_bytes(whole[: len(whole) // 2])
    message = message_of(path)
    line = int(message.split(":")[1])
    assert f"{path}:{line}: cannot be read from here on" in message
    if ending == "gz":  # the others are decompressed in large blocks
        assert 5_000 < line < 15_000


def test_a_wrong_checksum_at_the_end_of_an_archive_is_an_error(tmp_path):
    path, whole = tmp_path / "a.jsonl.gz", gzip.compress(LINE * 9)
    path.write_bytes(whole[:-8] + b"\0\0\0\0" + whole[-4:])
    assert f"{path}:10: cannot be read from here on: CRC check failed" in message_of(path)


@pytest.fixture
def small_limits(monkeypatch):
    """As in production, but the limits are reached sooner."""
    monkeypatch.setattr(text_files, "BLOCK", 2**16)
    monkeypatch.setattr(text_files, "LINE_LIMIT", 2**20)
    monkeypatch.setattr(json_files, "WHOLE_LIMIT", 2**21)


@pytest.mark.parametrize(
    ("name", "start", "filling", "expected"),
    [
        ("a.jsonl.gz", LINE, b"x", ":2: a record of more than 1 MiB"),
        ("a.jsonl.gz", b"", b"\n", ": the data set is empty"),
        ("a.csv.gz", b"a,b\n1,", b"x", ":2: a record of more than 1 MiB"),
        ("a.json.gz", b'[{"a": "', b"x", ":1: a record of more than 1 MiB"),
        ("a.json.gz", b'{"data": [\n{}', b",{}", ": .* of more than 2 MiB is not read"),
        ("a.json.gz", b"nothing ", b"x", ": .* of more than 2 MiB is not read"),
    ],
)
def test_a_small_archive_that_expands_to_much_is_refused_before_memory_is_gone(
    tmp_path, small_limits, name, start, filling, expected
):
    path = tmp_path / name
    path.write_bytes(gzip.compress(start + filling * 20_000_000, compresslevel=1))
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(DataError, match=f"^{path}{expected}"):
        rows(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_a_long_file_is_not_held_in_memory(tmp_path, small_limits):
    for name, content in (
        ("a.jsonl", LINE * 100_000),
        ("a.json", b"[" + b",".join([LINE] * 100_000) + b"]"),
        ("a.csv", b"prompt,chosen,rejected\n" + b"ppppppppp,cccccccc,rrrrrrrr\n" * 100_000),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        found = read(path)
        tracemalloc.start()
        first = next(found)[0]
        for _ in range(5_000):
            next(found)
        assert tracemalloc.get_traced_memory()[1] < 2**21
        tracemalloc.stop()
        assert first.keys() == ROW.keys()
        del found


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's name may have about 100 characters
    os.mkfifo("pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket.jsonl")
    for path in ("pipe.jsonl", "socket.jsonl", "/dev/zero", "/dev/null"):
        assert "is no regular file" in message_of(path)
    os.symlink("pipe.jsonl", "link.jsonl")
    assert "is no regular file" in message_of("link.jsonl")


def test_odd_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["a b.jsonl", "a%20b.jsonl", "ü.jsonl", "a,b.jsonl", "a[1].jsonl", "x::y.jsonl"]
    for name in [*names, "q?.jsonl", "a:b.jsonl", "a@b.jsonl", "#x.jsonl", "-x.jsonl"]:
        (tmp_path / name).write_bytes(LINE)
        assert [id for _, id in read(tmp_path / name)] == [f"{name}:1"]
        assert rows(f"~/{name}") == [ROW]


def test_paths_that_lead_nowhere_say_so(tmp_path):
    os.symlink(tmp_path / "b.jsonl", tmp_path / "a.jsonl")
    os.symlink(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    os.symlink(tmp_path / "nothing", tmp_path / "c.jsonl")
    for name in ("a.jsonl", "c.jsonl"):
        assert "symbolic link that leads nowhere" in message_of(tmp_path / name)
    for name in ("x" * 300 + ".jsonl", "a\0b.jsonl"):
        with pytest.raises(DataError):
            rows(tmp_path / name)
    assert "is empty: name a folder" in message_of("  ")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE)

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(text_files.OPENERS, ".jsonl", denied)  # whoever runs this may be root
    assert message_of(path) == f"{path}: cannot be read: Permission denied"


def test_numbers_that_json_does_not_know_are_read_as_python_reads_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": NaN, "b": -Infinity}\n')
    (row,) = rows(tmp_path / "a.jsonl")
    assert row["a"] != row["a"]
    assert row["b"] == float("-inf")


def test_of_limited_rows_what_follows_is_not_looked_at(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE * 5 + b"broken\n")
    found = read(path)
    assert [next(found)[0] for _ in range(5)] == [ROW] * 5
    with pytest.raises(DataError, match=":6: not valid JSON"):
        next(found)


CODE = "import pathlib\npathlib.Path('RAN').touch()\n"


def test_a_folder_with_a_loading_script_runs_nothing_and_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "pairs.py").write_text(CODE)
    (folder / "train.jsonl").write_bytes(LINE)
    message = message_of(folder)
    assert message.startswith(f"{folder}: ")
    assert "pairs.py" in message
    assert "no code of a data set is run" in message
    assert not (tmp_path / "RAN").exists()


def test_a_broken_card_of_a_folder_is_one_line(tmp_path):
    (tmp_path / "README.md").write_text("---\nconfigs: [1, {]\n---\n")
    (tmp_path / "train.jsonl").write_bytes(LINE)
    assert message_of(tmp_path).startswith(f"{tmp_path}: cannot be read as a data set")


@pytest.mark.slow
def test_data_are_inspected_without_a_traceback(tmp_path, capsys, monkeypatch, shared):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(LINE * 99)[:-9])
    (tmp_path / "deep.jsonl").write_bytes(b"[" * DEEP)
    (tmp_path / "integer.jsonl").write_bytes(LINE + b'{"a": ' + b"9" * 5000 + b"}")
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text(CODE)
    for name in ("pipe.jsonl", "cut.jsonl.gz", "deep.jsonl", "integer.jsonl", "scripted"):
        arguments = ["--data", str(tmp_path / name), "--tokenizer", f"{shared}/data/gpt2-tokenizer"]
        assert inspect_data.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path / name}")
        assert error.count("\n") == 1
