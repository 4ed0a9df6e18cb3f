"""Laws of files that grow by lines, on a disk and on a bucket."""

import pytest

from dpojax import storage
from dpojax.storage import files, lines

from .folders import names


def test_lines_are_appended_and_a_torn_one_at_the_end_is_dropped(folder):
    path = folder / "log" / "lines.txt"
    assert storage.read_lines(path) == []
    with storage.LineWriter(path) as writer:
        writer.write("first")
        writer.write("zweité")
    storage.write_bytes(path, path.read_bytes() + b'{"torn')
    assert storage.read_lines(path) == ["first", "zweité"]
    with storage.LineWriter(path) as writer:
        writer.write("third")
        writer.flush()
        assert storage.read_lines(path) == ["first", "zweité", "third"]
    assert path.read_bytes().endswith(b"\nthird\n")


def test_a_line_with_an_end_in_it_and_one_after_the_close_are_refused(folder):
    writer = storage.LineWriter(folder / "x")
    with pytest.raises(ValueError, match="must not hold an end of line"):
        writer.write("a\nb")
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="is closed"):
        writer.write("a")


def test_a_local_line_is_there_at_once_and_a_buckets_after_a_while(folder, monkeypatch):
    uploads = []
    monkeypatch.setattr(lines, "write_text", lambda *text: uploads.append(files.write_text(*text)))
    with storage.LineWriter(folder / "x") as writer:
        for number in range(100):
            writer.write(str(number))
        if storage.is_local(folder):
            assert len(storage.read_lines(folder / "x")) == 100
        else:
            assert len(uploads) == 1
    assert len(storage.read_lines(folder / "x")) == 100
    assert len(uploads) == (0 if storage.is_local(folder) else 2)


def test_rewriting_leaves_the_records_that_are_wanted_and_makes_no_file(folder):
    storage.write_text(folder / "x", '{"step": 1}\n{"step": 2}\n')
    storage.rewrite_records(folder / "x", lambda record: record["step"] == 2)
    assert storage.read_lines(folder / "x") == ['{"step": 2}']
    storage.rewrite_records(folder / "nothing", lambda record: True)
    assert names(folder) == ["x"]


def test_rewriting_that_fails_leaves_all_lines(folder, failing_write):
    storage.write_text(folder / "x", '{"step": 1}\n{"step": 2}\n')
    failing_write()
    with pytest.raises(OSError, match="no space left"):
        storage.rewrite_records(folder / "x", lambda record: False)
    assert len(storage.read_records(folder / "x")) == 2
