"""Damaged files of a run: mended, passed over, or one line that names the file and what to do."""

import json
import shutil

import jax
import numpy as np
import pytest

from dpojax import storage
from dpojax.config import saved
from dpojax.config.saved import CONFIG, CONTENTS, read_run_config, write_or_compare_config
from dpojax.frontier import frontier, reference_samples
from dpojax.jobs import progress
from dpojax.runs import run as runs
from dpojax.runs.command import failures
from dpojax.runs.workdirs import failure_of
from dpojax.stages.registry import resolve
from dpojax.stages.samples import FILE, forget_later_samples, last_samples
from dpojax.sweeps import layout, sweep
from dpojax.training.checkpoints import load_tree
from dpojax.training.checkpoints.arrays import saved_tree
from dpojax.training.metrics import read_metrics

from .conftest import tiny_config

FAILURES = failures()
GARBAGE = [b"", b"{", b"null", b"[]", b"3", b'"text"', b"\xff\x00\xfe", b"[" * 50_000]
GARBAGE += [b'{"files": 3, "version": 3}', b'{"files": {"a": 1}, "version": {}}']

SFT = {"stages": ("sft",), "sft.steps": 4, "evaluate_every": 2}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A workdir that has begun, without anything trained."""
    workdir = tmp_path_factory.mktemp("begun")
    write_or_compare_config(resolve(tiny_config(), workdir))
    return workdir


def one_line(error):
    """The message of an error that a command prints without a traceback."""
    assert isinstance(error.value, FAILURES)
    assert "\n" not in str(error.value)
    return str(error.value)


def grow(folder):
    """`layout.json` counts only beside checkpoints."""
    (folder / "20" / "4").mkdir(parents=True)


# File: what reads it, and what an error advises.
READERS = {
    "config.json of a run": (
        CONFIG,
        lambda folder: read_run_config(storage.as_path(folder)),
        "delete it: the command that began the run writes it again",
    ),
    "sweep.json": (
        "sweep.json",
        lambda folder: sweep.read_plan(storage.as_path(folder)),
        "delete it: the command that began the sweep",
    ),
    "plan.json": (
        "plan.json",
        lambda folder: frontier.read_plan(storage.as_path(folder)),
        "delete it: the command that began the frontier",
    ),
    "layout.json": (
        "layout.json",
        lambda folder: layout.read_layout(storage.as_path(folder)),
        "to begin these members again",
    ),
    "the reference's samples": (
        "samples.npz",
        lambda folder: reference_samples.read_reference_samples(
            storage.as_path(folder) / "samples.npz"
        ),
        "delete it: the command that began the frontier makes it again",
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_garbage_is_one_line_that_names_the_file_and_says_what_to_do(tmp_path, name):
    file, read, advice = READERS[name]
    grow(tmp_path)
    for content in GARBAGE:
        (tmp_path / file).write_bytes(content)
        with pytest.raises(FAILURES) as error:
            read(tmp_path)
        assert str(tmp_path / file) in one_line(error)
        if not content.startswith(b'{"files') or file != CONFIG:  # JSON, of another config
            assert advice in str(error.value)


@pytest.mark.parametrize("file", [CONFIG, CONTENTS])
def test_what_the_advice_on_a_damaged_config_says_works(begun, tmp_path, file):
    workdir = tmp_path / "run"
    shutil.copytree(begun, workdir)
    run, whole = resolve(tiny_config(), workdir), (workdir / file).read_bytes()
    for content in [*GARBAGE, whole[: len(whole) // 2]]:
        if content.startswith(b'{"files') and file == CONFIG:
            continue  # JSON, which is compared key by key
        (workdir / file).write_bytes(content)
        with pytest.raises(FAILURES) as error:
            write_or_compare_config(run)
        assert str(workdir / file) in one_line(error)
        assert "delete it: the command that began the run writes it again" in str(error.value)
        (workdir / file).unlink()
        write_or_compare_config(run)
        assert (workdir / file).read_bytes() == whole


def test_files_are_compared_also_where_the_config_was_deleted(begun, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(begun, workdir)
    (workdir / CONFIG).unlink()
    hashes = {"tokenizer": saved.Content("here", "0" * 64, {})}
    before = json.loads((workdir / CONTENTS).read_text()) | {"files": hashes}
    (workdir / CONTENTS).write_text(json.dumps(before))
    now = {"tokenizer": saved.Content("here", "1" * 64)}
    run = resolve(tiny_config(), workdir)
    monkeypatch.setattr(type(run), "contents", now)
    with pytest.raises(saved.ConfigError, match=r"tokenizer \(here\): sha256 0{16}, now 1{16}"):
        saved.compare_config(run)


def test_a_record_of_seconds_that_is_damaged_begins_anew(tmp_path, caplog):
    for content in GARBAGE:
        (tmp_path / progress.SECONDS).write_bytes(content)
        assert progress.read_seconds(storage.as_path(tmp_path)) == (0.0, {})
        assert str(tmp_path / progress.SECONDS) in caplog.text
        caplog.clear()


def test_why_a_member_failed_is_shown_whatever_the_bytes_are(tmp_path):
    (tmp_path / "failed.txt").write_bytes(b"the loss \xff")
    assert failure_of(storage.as_path(tmp_path)) == "the loss \ufffd"


def sample_lines(*steps):
    lines = [{"step": step, "prompt": p, "text": "x"} for step in steps for p in ("a", "b")]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.mark.parametrize(
    "torn", ["", '{"step": 9, "pro', "\0" * 40, "{", "\n[]\n", '{"step": 9}\n']
)
def test_samples_after_the_step_of_a_resume_go_with_a_line_that_was_torn(tmp_path, torn):
    path = tmp_path / FILE
    path.write_text(sample_lines(0, 2, 4, 4, 6) + torn)
    assert [line["step"] for line in last_samples(storage.as_path(tmp_path))] == [6, 6]
    forget_later_samples(storage.as_path(tmp_path), 4)
    assert path.read_text() == sample_lines(0, 2, 4, 4)
    forget_later_samples(storage.as_path(tmp_path), None)
    assert path.read_text() == ""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An SFT run of four steps, with checkpoints of the steps 2 and 4."""
    workdir = tmp_path_factory.mktemp("finished")
    runs.run(tiny_config(**SFT), workdir)
    return workdir


def values(workdir):
    dropped = ("time", "perf/", "goodput/", "memory/")
    return [
        {name: x for name, x in line.items() if not name.startswith(dropped)}
        for line in read_metrics(workdir / "sft")
    ]


def weights(workdir):
    """The bytes of every array of the last checkpoint."""
    folder = workdir / "sft" / "checkpoints"
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved_tree(str(folder / "4"))
    )
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(load_tree(folder, shapes))]


def flip_a_bit(folder):
    """In the middle of the largest file."""
    largest = max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)


@pytest.mark.long
def test_a_damaged_reference_is_made_again_where_the_stage_before_is_there(tmp_path, caplog):
    """Before the last step, and between it and the summary, which reads the reference."""
    changes = {"sft.steps": 1, "preference.steps": 3, "checkpoint_every": 1}
    runs.run(tiny_config(**changes), tmp_path)
    loss = read_metrics(tmp_path / "preference", "eval")[-1]["loss"]
    summary = (tmp_path / "preference" / "summary.json").read_text()
    for lost in ("preference/checkpoints/3", "preference/summary.json"):
        (tmp_path / "finished.json").unlink()
        path = tmp_path / lost
        path.unlink() if path.is_file() else shutil.rmtree(path)
        flip_a_bit(tmp_path / "preference" / "reference")
        caplog.clear()
        runs.run(tiny_config(**changes), tmp_path)
        assert f"{tmp_path}/preference/reference was damaged" in caplog.text
        assert read_metrics(tmp_path / "preference", "eval")[-1]["loss"] == loss
        assert (tmp_path / "preference" / "summary.json").read_text() == summary
        assert not list((tmp_path / "preference" / "reference").glob("*.damaged"))


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_to_the_same_bits(
    finished, tmp_path, caplog
):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "finished.json").unlink()
    newest = workdir / "sft" / "checkpoints" / "4"
    flip_a_bit(newest)
    with (workdir / "sft" / "metrics.jsonl").open("ab") as metrics:
        metrics.write(b"\xff\n\0\0{")
    runs.run(tiny_config(**SFT), workdir)
    assert f"{newest} is damaged" in caplog.text
    assert "step 2 is used instead" in caplog.text
    assert weights(workdir) == weights(finished)
    assert values(workdir) == values(finished)
    assert sorted(x.name for x in (workdir / "sft" / "checkpoints").iterdir()) == ["2", "4"]
