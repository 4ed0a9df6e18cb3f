"""The benchmark of the train step measures what it says; its times are nobody's test."""

import contextlib
import io
import json
import math
import os
import pathlib
import subprocess
import sys
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from benchmarks import train_step, versus
from benchmarks.frontier_seeds import share_at
from benchmarks.peers.cases import CASES, batches, read_case
from benchmarks.train_step import COLUMNS, Case
from dpojax.evaluation.frontier_points import Point
from dpojax.evaluation.optimum import optimum

ROOT = pathlib.Path(__file__).resolve().parents[1]


def flops(layers, width, vocabulary, tokens, scored, *, passes):
    """2 per weight and token: 4 width^2 in attention and 8 width^2 in the MLP of every layer."""
    return passes * 2 * (12 * layers * width**2 * tokens + vocabulary * width * scored)


class ThisProcess:
    """An executor that computes at once, here, in place of a new process."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """What the script prints and writes for a very small case with a live reference."""
    case = Case(2, 32, 2, 50, pairs=3, prompt=4, response=5, reference="live", row_length=14)
    out, printed = tmp_path_factory.mktemp("benchmark") / "result.json", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(train_step, "CASES", {"small": case})
        patch.setattr(train_step, "ProcessPoolExecutor", ThisProcess)
        train_step.main(["--case", "small", "--steps", "1", "--json", str(out)])
    (result,) = json.loads(out.read_text())
    assert list(out.parent.iterdir()) == [out]
    return printed.getvalue(), result


@pytest.mark.slow
def test_a_case_prints_its_row_and_writes_its_fields(small_run):
    printed, result = small_run
    assert {key for _, key, _, _ in COLUMNS} <= set(result)
    assert all(heading in printed for heading, _, _, _ in COLUMNS)
    assert (result["case"], result["dtype"], result["reference"]) == ("small", "float32", "live")
    seconds = result["seconds_per_step"]
    assert result["tokens_per_second"] * seconds == pytest.approx(3 * 14)
    assert result["pairs_per_second"] * seconds == pytest.approx(3)
    quiet, taken = map(int, result["quiet"].split("/"))
    assert 1 <= len(result["samples"]) == taken <= 2
    assert quiet <= 1


@pytest.mark.long  # the test of a very small case holds the rest of the law
def test_the_tiny_case_needs_a_process_of_its_own_and_the_memory_of_its_weights(tmp_path):
    out = tmp_path / "result.json"
    script = str(ROOT / "benchmarks" / "train_step.py")
    command = [sys.executable, script, "--case", "tiny", "--steps", "1", "--json", str(out)]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=600
    ).stdout
    (result,) = json.loads(out.read_text())
    assert list(tmp_path.iterdir()) == [out]
    assert {key for _, key, _, _ in COLUMNS} <= set(result)
    assert all(heading in printed for heading, _, _, _ in COLUMNS)
    assert (result["case"], result["dtype"], result["reference"]) == ("tiny", "float32", "cached")

    seconds = result["seconds_per_step"]
    assert result["rows"] == "16 x 192"
    assert result["tokens_per_second"] * seconds == pytest.approx(16 * 3 * 64)
    assert result["pairs_per_second"] * seconds == pytest.approx(16)
    expected = flops(4, 256, 8192, 16 * 3 * 64, 16 * 2 * 64, passes=3)
    assert result["model_gflops_per_second"] * seconds * 1e9 == pytest.approx(expected)

    # Weights, gradient and two moments, in float32, are there at once.
    parameters = 4 * 12 * 256**2 + 8192 * 256
    assert result["peak_gib"] * 2**30 > 4 * 4 * parameters
    assert result["compile_seconds"] > 0
    assert result["matmul_gflops_per_second"] > 0
    quiet, taken = map(int, result["quiet"].split("/"))
    assert 1 <= len(result["samples"]) == taken <= 2
    assert quiet <= 1
    assert 0 < result["utilisation"] < 10


@pytest.mark.slow
def test_a_live_reference_costs_one_more_pass_forward(small_run):
    _, result = small_run
    assert result["rows"] == "3 x 14"
    expected = flops(2, 32, 50, 3 * 14, 3 * 10, passes=4)
    measured = result["model_gflops_per_second"] * result["seconds_per_step"] * 1e9
    assert math.isclose(measured, expected, rel_tol=1e-9)


@pytest.mark.slow
def test_the_sampler_is_timed_against_transformers_on_the_same_tokens(tmp_path, capsys):
    pytest.importorskip("torch", reason="the other side is torch")
    from benchmarks import sampler

    out = tmp_path / "sampler.json"
    shape = ["--layers", "1", "--width", "64", "--prompts", "2", "--samples", "2", "--tokens", "3"]
    sampler.main([*shape, "--rounds", "1", "--json", str(out)])
    (result,) = json.loads(out.read_text())
    assert (result["prompts"], result["samples"], result["tokens"]) == (2, 2, 3)
    assert result["ours"] / result["torch"] == pytest.approx(result["ratio"])
    assert result["cpu_ratio"] > 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {8}
    assert rows[-1].startswith("| 2 x 2 | 3 |")


def test_a_front_is_straight_from_the_reference_to_its_points_and_flat_behind_them():
    empty = dict.fromkeys(Point._fields, 0.0) | {"setting": ""}
    base = Point(**empty | {"method": "sft", "reward": 0.2, "reward_error": 0.01})
    end = Point(**empty | {"method": "dpo", "kl": 4.0, "reward": 0.6, "reward_error": 0.03})
    unknown = optimum(np.linspace(0, 1, 20)[None], [np.inf])  # trusted at 0 nats alone
    shares = [share_at(kl, [end], base, unknown, best=1.0) for kl in (2.0, 4.0, 9.0)]
    assert [float(share.value) for share in shares] == pytest.approx([0.25, 0.5, 0.5])
    assert [float(share.error) for share in shares] == pytest.approx([0.025, 0.0375, 0.0375])


def test_every_system_gets_the_same_pairs_of_the_lengths_asked_for(tmp_path):
    lengths = [[3, 4, 5], [6, 2, 7], [1, 1, 1], [2, 3, 4]]
    (tmp_path / "lengths.json").write_text(json.dumps(lengths))
    case = CASES["tiny"]._replace(lengths=str(tmp_path / "lengths.json"), pairs=2)
    made = batches(read_case(json.dumps(case._asdict())), 2)
    assert [[len(ids) for ids in pair] for batch in made for pair in batch] == lengths
    assert made == batches(case, 2)
    ids = {i for batch in made for pair in batch for i in (*pair.prompt, *pair.chosen[:-1])}
    assert min(ids) >= 4
    assert max(ids) < case.vocabulary
    assert {pair.chosen[-1] for batch in made for pair in batch} == {1}


@pytest.mark.long  # test_parity.py and test_golden_trl.py compare logits, losses and gradients
def test_ours_and_a_plain_torch_step_compute_the_same_losses_and_gradients(
    tmp_path, capsys, monkeypatch
):
    pytest.importorskip("torch", reason="the other side is torch")
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    place = tmp_path / "torch"
    (place / "bin").mkdir(parents=True)
    python = place / "bin" / "python"  # this environment in place of one that would be made
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (place / versus.COMPLETE).write_text(json.dumps(versus.PACKAGES["torch"]))
    out = tmp_path / "versus.json"
    what = ["--cases", "check-llama", "--systems", "dpojax", "plain torch", "--json", str(out)]
    versus.main(["--environments", str(tmp_path), *what, "--rounds", "1", "--steps", "2"])
    record = json.loads(out.read_text())
    (case_record,) = record["cases"]
    steps = {name: rounds[0]["computed"] for name, rounds in case_record["systems"].items()}
    assert len(steps["dpojax"]) == len(steps["plain torch"]) == 3
    assert steps["dpojax"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(steps["dpojax"][1]["loss"] - math.log(2)) > 1e-4  # an update that shows
    for ours, theirs in zip(steps["dpojax"], steps["plain torch"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-4)
        assert ours["scored"] == theirs["scored"]
    assert record["environments"]["dpojax"]["packages"]["jax"] == jax.__version__
    assert {"date", "cpu", "commit"} <= set(record["machine"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "of the machine" in line]
    assert [row.split("  ")[0] for row in rows] == ["dpojax", "plain torch"]


def ran(loss, norm, scored):
    computed = [{"loss": math.log(2), "norm": 1.0, "scored": 7}]
    computed += [{"loss": loss, "norm": norm, "scored": scored}]
    samples = [{"seconds": 2.0, "others": 0.0}]
    return [{"median": 2.0, "samples": samples, "peak_gib": 1.0, "computed": computed}]


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ((0.69, 1.5, 9), True),
        ((0.70, 1.5, 9), False),
        ((0.69, 1.6, 9), False),
        ((0.69, 1.5, 8), False),
    ],
)
def test_a_system_that_computes_something_else_is_named(other, same):
    """The other needs one step more to compile."""
    longer = ran(*other)
    longer[0]["computed"].append({"loss": 0.1, "norm": 9.0, "scored": 1})
    systems = {"dpojax": ran(0.69, 1.5, 9), "other": longer, "dead": [{"failed": "SIGILL"}]}
    about = {"case": "a", "dtype": "float32", "variables": {key: {} for key in systems}}
    table = versus._table(about | {"systems": systems})
    assert ("other COMPUTES SOMETHING ELSE" in table) == (not same)
    assert "dead                    failed: SIGILL" in table
    del longer[0]["computed"][1:]  # what is missing is not the same
    assert "other COMPUTES SOMETHING ELSE" in versus._table(about | {"systems": systems})


def test_an_environment_is_finished_once_and_again_when_it_is_for_other_packages(
    tmp_path, monkeypatch
):
    calls = []

    def interrupted(command, check):
        calls.append(command[1:4])
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(versus.subprocess, "run", interrupted)
    (tmp_path / "torch").mkdir()
    with pytest.raises(KeyboardInterrupt):
        versus._python(tmp_path, "torch")
    made = [["-m", "venv", str(tmp_path / "torch")], ["-m", "pip", "install"]]
    for expected in (made * 2, made * 2):
        assert versus._python(tmp_path, "torch") == str(tmp_path / "torch" / "bin" / "python")
        assert calls == expected
    monkeypatch.setitem(versus.PACKAGES, "torch", ("torch==3",))
    versus._python(tmp_path, "torch")
    assert calls == made * 3
