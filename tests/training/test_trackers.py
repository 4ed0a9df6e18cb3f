"""Every tracker gets the numbers of metrics.jsonl, and none of them ends a run."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest

from dpojax import storage
from dpojax.config import rules
from dpojax.config.defaults import default_config
from dpojax.config.errors import ConfigError
from dpojax.training import trackers
from dpojax.training.metrics import MetricWriter, read_metrics
from dpojax.training.trackers import KINDS, TrackedRun, open_trackers


def needs(library):
    absent = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(absent, reason=f"needs pip install {library}")


def test_a_run_is_named_by_its_workdir_and_grouped_by_the_folder_around_it(tmp_path):
    run = TrackedRun(storage.as_path(tmp_path / "sweep" / "beta-0.1" / "preference"))
    assert (run.name, run.group) == ("beta-0.1/preference", "sweep")


def test_an_unknown_tracker_and_one_that_is_not_installed_are_refused(monkeypatch):
    config = default_config()
    absent = trackers.TrackerKind(lambda run: None, "no_such_library")
    monkeypatch.setitem(trackers.KINDS, "absent", absent)
    for names in (("tensorbored",), ("tensorboard", "absent")):
        config.trackers = names
        with pytest.raises(ConfigError, match=r"config\.trackers = .*pip install wandb"):
            rules.apply_rules(rules.SHARED_RULES, config)
    assert "pip install no_such_library" in trackers.why_not(("absent",))
    assert trackers.why_not(("tensorboard",)) == ""


class Failing:
    """A tracker that fails in one of its methods."""

    def __init__(self, where):
        self.where = where
        self.written = []

    def write(self, step, split, values):
        if self.where == "write" and step == 2:
            raise ConnectionError("no network")
        self.written.append(step)

    def close(self):
        if self.where == "close":
            raise ConnectionError("no network")


@pytest.mark.parametrize("where", ["open", "write", "close"])
def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(
    where, tmp_path, monkeypatch, capsys
):
    failing = Failing(where)

    def open_it(run):
        if where == "open":
            raise ConnectionError("no network")
        return failing

    monkeypatch.setitem(trackers.KINDS, "failing", trackers.TrackerKind(open_it, "json"))
    opened = open_trackers(["failing"], TrackedRun(storage.as_path(tmp_path)))
    with MetricWriter(tmp_path, trackers=opened) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert failing.written == {"open": [], "write": [1], "close": [1, 2, 3]}[where]
    told = capsys.readouterr().out
    assert told.count("failing has failed (ConnectionError: no network)") == 1


# In a process of its own: both keep threads and a service for as long as a process lives.
WRITE = """
import pathlib, sys
from dpojax import storage
from dpojax.training.metrics import MetricWriter
from dpojax.training.trackers import TrackedRun, open_trackers
name, workdir = sys.argv[1], pathlib.Path(sys.argv[2])
def write(member, steps, resume):
    folder = workdir / member / "preference"
    run = TrackedRun(storage.as_path(folder), {"preference.beta": 0.1}, resume)
    return MetricWriter(folder, trackers=open_trackers([name], run)), steps
# Two members at the same time, then one of them is resumed.
for writers in ([("a", (1, 2), -1), ("b", (1, 2), -1)], [("a", (3,), 2)]):
    opened = [write(*one) for one in writers]
    for writer, steps in opened:
        for step in steps:
            writer.write(step, {"loss": 0.5 * step, "bad": float("nan")}, split="eval")
    for writer, _ in opened:
        writer.close()
"""


def write_in_a_process(name, workdir, **environment):
    ended = subprocess.run(
        [sys.executable, "-c", WRITE, name, str(workdir)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert "has failed" not in ended.stdout
    return ended.stdout


@needs("trackio")
@pytest.mark.long
def test_trackio_keeps_two_members_apart_and_goes_on_where_one_is_resumed(tmp_path):
    workdir, database = tmp_path / "sweep", tmp_path / "trackio"
    told = write_in_a_process("trackio", workdir, TRACKIO_DIR=str(database), TRACKIO_PROJECT="ours")
    assert told == ""
    read = (
        "import trackio, json; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "print(json.dumps({n: S.get_logs('ours', n) for n in S.get_runs('ours')}))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", read],
        env=os.environ | {"TRACKIO_DIR": str(database)},
        capture_output=True,
        text=True,
        check=True,
    )
    runs = json.loads(shown.stdout.splitlines()[-1])
    steps = {name: [(x["step"], x["eval/loss"]) for x in logs] for name, logs in runs.items()}
    assert steps == {
        "sweep/a/preference": [(1, 0.5), (2, 1.0), (3, 1.5)],
        "sweep/b/preference": [(1, 0.5), (2, 1.0)],
    }


@needs("wandb")
@pytest.mark.long
def test_wandb_writes_both_members_offline_with_their_numbers(tmp_path):
    workdir = tmp_path / "sweep"
    told = write_in_a_process("wandb", workdir, WANDB_MODE="offline")
    assert told == ""
    records = {member: _wandb_history(workdir / member) for member in ("a", "b")}
    assert records == {
        "a": [(1, 0.5), (2, 1.0), (3, 1.5)],
        "b": [(1, 0.5), (2, 1.0)],
    }


def _wandb_history(folder):
    """(step, eval/loss) of the history records in the transaction logs below a folder."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for path in sorted(folder.glob("preference/wandb/offline-run-*/run-*.wandb")):
        for data in _log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.append((items["step"], items["eval/loss"]))
    return rows


def _log_records(content):
    """The records of a log as LevelDB writes it, behind seven bytes of W&B's own.

    Blocks of 32 KiB hold parts of records: a checksum of 4 bytes, the length in 2, and the kind in
    1: whole, first, middle, last. Less than 7 bytes at the end of a block are padding.
    """
    block, place, parts = 2**15, 7, []
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        length = int.from_bytes(content[place + 4 : place + 6], "little")
        kind = content[place + 6]
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def test_a_stage_keeps_its_run_of_wandb_and_a_new_one_at_its_path_gets_another(
    tmp_path, monkeypatch
):
    import shutil
    import unittest.mock

    wandb = unittest.mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = storage.as_path(tmp_path / "runs" / "mine" / "preference")

    def open_it(resume_step):
        KINDS["wandb"].open(TrackedRun(folder, {}, resume_step)).close()
        return wandb.init.call_args.kwargs["id"]

    first = open_it(-1)
    assert len(first) == 16
    assert open_it(5) == open_it(-1) == first  # the last was killed before its first checkpoint
    shutil.rmtree(tmp_path / "runs")
    assert open_it(-1) != first


def test_numbers_that_are_not_finite_reach_no_tracker_that_cannot_hold_them(monkeypatch):
    """W&B and Trackio store JSON."""
    from dpojax.training.trackers.trackio import Trackio
    from dpojax.training.trackers.wandb import WeightsAndBiases

    class Run:
        def log(self, values, step=None):
            self.values = values

    for kind in (Trackio, WeightsAndBiases):
        tracker = object.__new__(kind)
        tracker._run = Run()
        tracker.write(3, "eval", {"loss": 0.5, "kl": math.nan, "margin": math.inf})
        tracker._run.values.pop("step", None)
        assert tracker._run.values == {"eval/loss": 0.5}
