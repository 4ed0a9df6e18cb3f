"""The tables that `benchmarks/accelerator.py` prints, within 100 columns, from what it recorded."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

from dpojax.tables import WIDTH, text_table

Entry = dict
Column = tuple[str, str, str]  # heading, field, format

COLUMNS: dict[str, tuple[Column, ...]] = {
    "check": (
        ("kernel", "kernel", ""),
        ("dtype", "dtype", ""),
        ("layouts", "layouts", "d"),
        ("largest difference", "worst", ".1e"),
        ("of its bound", "of_bound", ".2f"),
        ("in", "what", ""),
        ("", "verdict", ""),
    ),
    "time": (
        ("rows", "what", ""),
        ("kernel", "kernel", ""),
        ("ms", "ms", ".2f"),
        ("times as fast as xla", "times_as_fast", ".2f"),
        ("temporary GiB", "temporary_gib", ".2f"),
    ),
    "step": (
        ("model", "what", ""),
        ("tokens/s", "tokens_per_second", ",.0f"),
        ("MFU", "mfu", ".1%"),
        ("of matmul", "utilisation", ".1%"),
        ("peak GiB", "peak_gib", ".1f"),
        ("compiled", "compiled_gib", ".1f"),
        ("predicted", "predicted_gib", ".1f"),
        ("compile s", "compile_seconds", ".0f"),
    ),
    "system": (
        ("system", "what", ""),
        ("s/step", "median", ".3f"),
        ("of dpojax", "ratio", ".2f"),
        ("GiB", "device_peak_gib", ".1f"),
        ("loss differs", "loss_gap", ".0e"),
        ("norm differs", "norm_gap", ".0e"),
        ("", "verdict", ""),
    ),
    "sweep": (
        ("batch", "what", ""),
        ("sweep ms", "sweep_ms", ".1f"),
        ("4 runs ms", "runs_ms", ".1f"),
        ("ratio", "ratio", ".2f"),
        ("compile s", "compile_seconds", ".0f"),
        ("of a run", "run_compile_seconds", ".0f"),
    ),
    "sampler": (
        ("prompts x samples x tokens", "what", ""),
        ("tokens/s", "ours", ",.0f"),
        ("torch", "torch", ",.0f"),
        ("times as fast", "ratio", ".2f"),
        ("compile s", "compile", ".0f"),
    ),
}
LEFT = ("what", "kernel", "dtype", "verdict")  # columns that are aligned to the left


def heading(record: dict) -> str:
    """The machine, its device and the versions, in two lines."""
    machine, device = record["machine"], record["device"]
    memory = device["bytes_limit"]
    size = f", {memory / 2**30:.0f} GiB" if memory else ""
    packages = [f"{name} {x}" for name, x in device["packages"].items() if x]
    return (
        f"{machine['date']}, {device['device_kind']}{size}, {machine['commit']}\n"
        f"{', '.join(packages)}"
    )


def summary(sections: dict[str, dict]) -> list[str]:
    """Lines with the tables of all sections, and why something is missing."""
    lines = []
    for name, found in sections.items():
        state = "" if found["status"] == "done" else f", {found['status']}: {found['reason']}"
        lines += [*_wrapped(f"{name}, {found['seconds']:.0f} s{state}", ""), ""]
        for kind, columns in COLUMNS.items():
            entries = [x for x in found["entries"] if x["kind"] == kind and "left_out" not in x]
            if entries:
                rows = [_row(x, columns) for x in _collapsed(kind, entries)]
                left = [i for i, (_, field, _) in enumerate(columns) if field in LEFT]
                headings = [title for title, _, _ in columns]
                lines += [f"  {line}" for line in text_table([headings, *rows], left=left)] + [""]
        lines += _left_out(found["entries"])
    return lines


def bad(sections: dict[str, dict]) -> list[str]:
    """The sections that failed or were cut off, or in which something differs that should not."""
    return [
        name
        for name, found in sections.items()
        if found["status"] in ("failed", "cut off")
        or any(entry.get("within") is False for entry in found["entries"])
    ]


def _collapsed(kind: str, entries: Sequence[Entry]) -> list[Entry]:
    """Of checks a line for each kernel and dtype, with its worst layout; all others unchanged."""
    if kind == "system":
        return [entry | {"verdict": _verdict(entry)} for entry in entries]
    if kind != "check":
        return list(entries)
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry["kernel"], entry["dtype"]), []).append(entry)
    return [
        max(group, key=_badness) | {"layouts": len(group), "verdict": _verdict(*group)}
        for group in groups.values()
    ]


def _badness(entry: Entry) -> tuple[bool, float]:
    return not entry["within"], entry.get("of_bound", 0.0)


def _verdict(*entries: Entry) -> str:
    errors = [entry["error"] for entry in entries if "error" in entry]
    if errors:
        return f"FAILED: {errors[0][:30]}"
    return "" if all(entry["within"] for entry in entries) else "DIFFERS"


def _row(entry: Entry, columns: Sequence[Column]) -> list[str]:
    cells = []
    for _, field, form in columns:
        value = entry.get(field)
        cells.append("-" if value is None else format(value, form))
    return cells


def _left_out(entries: Sequence[Entry]) -> list[str]:
    """A line for each reason, with what it left out."""
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        if "left_out" in entry:
            what = entry.get("kernel", entry["what"])
            names = reasons.setdefault(entry["left_out"], [])
            if what not in names:
                names.append(what)
    lines = []
    for reason, names in reasons.items():
        lines += _wrapped(f"{', '.join(names)}: {reason}", "  ")
    return [*lines, ""] if lines else []


def _wrapped(text: str, indent: str) -> list[str]:
    make: Callable = textwrap.TextWrapper(
        WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  "
    ).wrap
    return make(text)
