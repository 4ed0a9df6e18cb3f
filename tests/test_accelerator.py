"""The hour on an accelerator: what is checked there, and that no section ends the command."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import accelerator
from benchmarks.accelerator import SECTIONS, Section
from benchmarks.on_accelerator import attention, tables
from benchmarks.on_accelerator.attention import Layout, compared, make_heads, make_rows, run
from benchmarks.on_accelerator.rounding import bounds, exact
from dpojax.models.attention import XLA, Kernel, attend, attention_mask
from dpojax.tables import WIDTH

ROOT = pathlib.Path(__file__).resolve().parents[1]
COLUMNS = 48
LAYOUT = Layout("shared prompts", 4, 2, responses=2, examples=2, dim=16)
SAYS = 'print(\'entry: {"kind": "sampler", "what": "a", "ours": 2.0}\', flush=True); '


def ran(folder, *programs, seconds=60.0):
    """What the JSON holds after sections that are these Python programs."""
    sections = [Section(f"section {i}", 1, ("-c", code)) for i, code in enumerate(programs)]
    out, record = folder / "out.json", {"sections": {}}
    accelerator.run_sections(sections, time.monotonic() + seconds, record, out, [])
    assert list(folder.iterdir()) == [out]
    assert json.loads(out.read_text()) == record
    return list(record["sections"].values())


def test_a_section_that_raises_is_recorded_with_its_reason_and_the_next_one_runs(tmp_path):
    first, second = ran(tmp_path, SAYS + "raise ValueError('no such shape')", SAYS)
    assert (first["status"], second["status"]) == ("failed", "done")
    assert first["reason"] == "exit 1: ValueError: no such shape"
    assert first["entries"] == second["entries"] == [{"kind": "sampler", "what": "a", "ours": 2.0}]
    assert tables.bad({"first": first, "second": second}) == ["first"]


def test_a_section_that_takes_too_long_or_dies_of_a_signal_keeps_what_it_told(tmp_path):
    wait = "import time; time.sleep(60)"
    die = "import os; os.kill(os.getpid(), 4)"
    slow, dead = ran(tmp_path, SAYS + wait, SAYS + die, seconds=5)
    assert (slow["status"], dead["status"]) == ("cut off", "failed")
    assert dead["reason"] == "SIGILL"
    assert len(slow["entries"]) == len(dead["entries"]) == 1
    assert slow["seconds"] < 5


def test_without_time_left_a_section_is_left_out(tmp_path):
    (found,) = ran(tmp_path, SAYS, seconds=0)
    assert (found["status"], found["entries"]) == ("left out", [])
    assert tables.bad({"late": found}) == []


@functools.cache
def expected(dtype):
    """Rows, heads, what is right for them, and the bounds."""
    rows, arrays = make_rows(LAYOUT, COLUMNS), make_heads(LAYOUT, COLUMNS, dtype)
    mask, scale = attention_mask(rows), LAYOUT.dim**-0.5
    unit = float(jnp.finfo(dtype).eps) / 2
    limit = jax.jit(functools.partial(bounds, scale=scale, unit=unit))(*arrays, mask)
    return rows, arrays, jax.jit(exact, static_argnums=5)(*arrays, mask, scale), limit


def verdict(kernel, dtype):
    rows, arrays, right, limit = expected(dtype)
    numbers = run(kernel, LAYOUT.dim**-0.5, None)(rows, *arrays)
    return compared(numbers, right, limit, rows)


def sees_one_later_column(rows, window):
    mask = attention_mask(rows, window)
    return mask.at[0, 3, 4].set(True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plain_attention_is_within_the_bound_and_a_wrong_one_is_not(dtype):
    assert verdict(XLA, dtype)["within"]
    wrong = verdict(Kernel(sees_one_later_column, attend), dtype)
    assert not wrong["within"]
    assert wrong["worst"] > 0.01
    assert not verdict(Kernel(attention_mask, lambda *x, **y: attend(*x) * np.nan), dtype)["within"]


def test_bounds_shrink_with_the_unit_of_rounding():
    """In proportion, where float32 sums do not count."""
    low, high = expected("bfloat16")[3], expected("float32")[3]
    real = np.asarray(expected("float32")[0].segment) > 0
    for coarse, fine in zip(low, high):
        ratio = np.asarray(coarse)[real] / np.asarray(fine)[real]
        assert (
            ratio.min() > 2.0**16 / 64
        )  # at most 64 roundings of a float32 sum for one of a product
        assert ratio.max() < 2.0**16 * 1.3


def test_tables_are_no_wider_than_a_terminal_and_name_what_differs():
    check = {"kind": "check", "dtype": "bfloat16", "worst": 0.5, "of_bound": 0.3, "within": True}
    entries = [
        check | {"kernel": "xla", "what": "causal"},
        check | {"kernel": "flash", "what": "causal"},
        check | {"kernel": "flash", "what": "shared prompts, window", "within": False},
        {"kind": "check", "what": "causal", "kernel": "splash", "left_out": "it runs on TPUs " * 9},
    ]
    found = {"status": "done", "reason": "", "seconds": 3.0, "entries": entries}
    lines = tables.summary({"kernels": found})
    assert max(map(len, lines)) <= WIDTH
    (line,) = [line for line in lines if "flash" in line]
    numbers = ["flash", "bfloat16", "2", "5.0e-01", "0.30"]
    assert line.split() == [*numbers, "shared", "prompts,", "window", "DIFFERS"]
    assert any(line.startswith("  splash: it runs on TPUs") for line in lines)
    assert tables.bad({"kernels": found}) == ["kernels"]


# Together, all sections but a second model's step.
PARTS = (("kernels",), ("step of Llama 1B", "sampler"), ("against torch", "sweep of 4"))


@pytest.mark.long  # the tests above hold the laws; here the whole command runs on a CPU
@pytest.mark.parametrize("names", PARTS, ids=" and ".join)
def test_the_command_runs_in_the_small_on_a_cpu(names, tmp_path):
    pytest.importorskip("torch", reason="the other side is torch")
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "accelerator.py"), "--json", str(out)]
    done = subprocess.run(
        [*command, "--minutes", "20", "--only", *names],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["device"]["platform"] == "cpu"
    assert "This is a CPU" in done.stdout
    assert "This is a CPU" in record["note"]
    assert tuple(record["sections"]) == names
    assert max(map(len, done.stdout.splitlines())) <= WIDTH
    for name, found in record["sections"].items():
        assert found["status"] == "done", (name, found["reason"])
        assert name in done.stdout
        by_kind = {entry["kind"]: entry for entry in found["entries"] if "left_out" not in entry}
        assert by_kind, name
        check_of_kind(by_kind, found["entries"])


def check_of_kind(by_kind, entries):
    """Numbers that hold on every machine."""
    if "check" in by_kind:
        kernels = {entry["kernel"] for entry in entries if entry["kind"] == "check"}
        assert kernels == {"xla", "cudnn", "flash", "splash"}
        assert all(entry["within"] for entry in entries if entry["kind"] == "check")
        assert {e["kernel"] for e in entries if e["kind"] == "time" and "left_out" in e} == (
            kernels - {"xla"}
        )
    if "step" in by_kind:
        step = by_kind["step"]
        assert step["tokens_per_second"] * step["seconds_per_step"] == pytest.approx(2 * 64)
        assert 0 < step["predicted_gib"] < step["peak_gib"]
        assert step["mfu"] is None
    if "system" in by_kind:
        ours, theirs = (entry for entry in entries if "left_out" not in entry)
        assert (ours["what"], theirs["what"]) == ("dpojax", "plain torch")
        assert len(ours["computed"]) == len(theirs["computed"]) == 3
    if "sweep" in by_kind:
        assert by_kind["sweep"]["ratio"] > 0
        assert by_kind["sweep"]["temporary_gib"] > by_kind["sweep"]["run_temporary_gib"]
    if "sampler" in by_kind:
        assert by_kind["sampler"]["ratio"] > 0


def test_sections_have_names_of_their_own_and_take_8_minutes_at_most():
    names = [section.name for section in SECTIONS]
    assert len(set(names)) == len(names)
    assert sum(section.share for section in SECTIONS) <= 8 * 60


def test_the_rows_that_are_checked_hold_what_their_names_say():
    for layout in attention.LAYOUTS:
        rows = make_rows(layout, 256)
        segments, branches = np.asarray(rows.segment), np.asarray(rows.branch)
        assert segments.max(-1).tolist() == [layout.examples] * 2
        assert branches.max() == max(1, layout.responses)
    (causal,) = (layout for layout in attention.LAYOUTS if layout.name == "causal")
    mask = np.asarray(attention_mask(make_rows(causal, 256)))
    np.testing.assert_array_equal(mask, np.broadcast_to(np.tri(256, dtype=bool), mask.shape))
