"""Whatever kills a run, fills its disk or flips its bits, the same command ends with its result.

These are a few seeded trials; `python benchmarks/crashes.py` makes hundreds.
"""

import os
import shutil
import subprocess
import sys
from functools import partial
from random import Random

import pytest

from tests.crash import harness, trials
from tests.crash.harness import COUNT, FAIL, FAIL_ONCE, KILL, POWER, TEAR
from tests.crash.verdicts import SAME, compare, complaint, judge_damaged

# Six changes: two files are made and written, one is synced, and one is renamed.
SCRIPT = """
import ctypes, os, sys
below, harm, at, error, log = sys.argv[1:]
arm = ctypes.CDLL(None).faults_arm
arm(below.encode(), int(harm), ctypes.c_long(int(at)), int(error), log.encode())
os.chdir(below)
for name in ("first", "second"):
    file = os.open(name, os.O_CREAT | os.O_WRONLY)
    try:
        os.write(file, b"12345678")
    except OSError as failed:
        print(name, failed.errno)
    if name == "first":
        os.fsync(file)
os.rename("second", "third")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not shutil.which("cc") or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    return harness.build(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def disturbed(library, tmp_path):
    """(harm, n, error) -> the files of SCRIPT with their content, and what it printed."""

    def run(harm, at=0, error=0):
        folder = tmp_path / "below"
        folder.mkdir()
        arguments = map(str, (folder, harm, at, error, tmp_path / "log"))
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments],
            env=os.environ | {"LD_PRELOAD": str(library)},
            capture_output=True,
            text=True,
        )
        files = {path.name: path.read_text() for path in folder.iterdir()}
        return files, ended.stdout.split(), (tmp_path / "log").read_text().splitlines()

    return run


WHOLE = "12345678"


def test_every_change_below_the_folder_is_counted(disturbed):
    files, _, log = disturbed(COUNT)
    assert files == {"first": WHOLE, "third": WHOLE}
    changes = ["open /first", "write /first", "sync /first"]
    changes += ["open /second", "write /second", "rename /third"]
    assert log == [f"{n} {change}" for n, change in enumerate(changes, start=1)]


@pytest.mark.parametrize(
    ("harm", "at", "left"),
    [
        (KILL, 2, {"first": ""}),
        (KILL, 5, {"first": WHOLE, "second": ""}),
        (KILL, 6, {"first": WHOLE, "second": WHOLE}),
        (TEAR, 2, {"first": "1234"}),
        (TEAR, 3, {"first": WHOLE, "second": "1234"}),
        (POWER, 3, {"first": ""}),
        (POWER, 6, {"first": WHOLE, "second": ""}),  # the first was synced
    ],
)
def test_a_process_is_killed_at_its_nth_change(disturbed, harm, at, left):
    assert disturbed(harm, at)[0] == left


@pytest.mark.parametrize(
    ("harm", "left", "said"),
    [
        (FAIL_ONCE, {"first": "", "third": WHOLE}, ["first", "28"]),
        (FAIL, {"first": ""}, ["first", "28"]),  # to make the second file fails as well
    ],
)
def test_a_full_disk_takes_no_bytes_from_the_nth_change_on(disturbed, harm, left, said):
    assert disturbed(harm, 2, harness.ERRORS["ENOSPC"])[:2] == (left, said)


def ended(status=0, errors="", hung=False):
    return harness.Ended(status, hung, 1.0, 1.0, "", errors)


def test_a_verdict_names_what_differs():
    expected = {"run/a.jsonl": [{"loss": 1}], "run/b": None}
    assert compare(expected, expected) == SAME
    other = compare({"run/a.jsonl": [{"loss": 2}], "run/b": None}, expected)
    assert (other.kind, "line 1: ['loss']" in other.detail) == ("different", True)
    assert compare({"run/b": None}, expected).kind == "different"
    assert compare(expected | {"run/c.tmp": None}, expected).kind == "leftovers"


def test_a_call_may_fail_in_one_paragraph_and_in_no_other_way():
    assert complaint(ended(1, "CheckpointError: the disk is full\n")) is None
    assert complaint(ended(1, "x\n" * 16)).kind == "noisy"
    assert complaint(ended(1, "Traceback (most recent call last):\n")).kind == "traceback"
    assert complaint(ended(-6)).kind == "traceback"
    assert complaint(ended(-9)) is None
    assert complaint(ended(-9, hung=True)).kind == "hung"


def test_damage_has_to_be_named_or_to_change_nothing_else():
    expected = {"run/a.json": [1], "run/b.json": [2]}
    judged = partial(judge_damaged, expected=expected, damaged="run/a.json")
    assert judged(ended(), expected).kind == "same"
    assert judged(ended(errors="run/a.json: not read"), expected).kind == "noticed"
    assert judged(ended(), expected | {"run/a.json": [3]}).kind == "unread"
    assert judged(ended(), expected | {"run/b.json": [3]}).kind == "different"
    assert judged(ended(1, "/x/run/a.json: not JSON"), expected).kind == "noticed"
    assert judged(ended(1, "something is damaged"), expected).kind == "refused"


@pytest.fixture(scope="module")
def lab(library, tmp_path_factory):
    with trials.laboratory(tmp_path_factory.mktemp("laboratory")) as opened:
        yield opened


@pytest.fixture(scope="module")
def case(lab):
    return lab.open(harness.train)


@pytest.fixture(scope="module")
def stopped(lab, case):
    """What a run has left that was killed in its second stage."""
    return lab.stop(case, r"^rename /run/preference/checkpoints/4$")


@pytest.mark.long
@pytest.mark.parametrize(
    ("disturb", "seed"),
    [
        (trials.kill_at_random, 0),
        (trials.kill_at_change, 0),
        (trials.tear, 0),
        (partial(trials.fail, error="ENOSPC"), 0),
        (partial(trials.fail_once, error="EIO"), 0),
    ],
)
def test_a_disturbed_run_ends_as_if_nothing_had_disturbed_it(lab, case, disturb, seed):
    assert disturb(lab, case, Random(seed)) == SAME


@pytest.mark.long
@pytest.mark.parametrize("kind", ["checkpoint arrays", "reference log-probs", "config.json"])
def test_a_damaged_file_is_named_or_changes_nothing(lab, case, stopped, kind):
    verdict, what = trials.damage(lab, case, Random(0), stopped, kind)
    assert verdict.is_good, (what, verdict)
