"""The table of docs/plans.md: what the shipped configs need and take on named chips.

    pip install 'jax[tpu]' 'jax[cuda13]'
    JAX_PLATFORMS=cpu python benchmarks/plans.py

Each pair of a config and a topology is compiled by scripts/plan.py in a process of its own, a few
minutes each. The numbers are kept in benchmarks/plans/, one file a pair; a pair whose file is there
is not compiled again (--again does). The table is written between two marks of docs/plans.md.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "benchmarks/plans"
PAGE = ROOT / "docs/plans.md"
BEGIN, END = "<!-- plans: begin -->\n", "<!-- plans: end -->\n"
GIB = 2**30


class Pair(NamedTuple):
    """A config, a topology, and keys that fit the config to it."""

    config: str
    topology: str
    keys: tuple[str, ...] = ()

    @property
    def file(self) -> pathlib.Path:
        config = self.config.removeprefix("configs/").replace(".py", "").replace(":", "_")
        return NUMBERS / f"{config}-{self.topology.replace(':', '_')}.json"

    @property
    def command(self) -> list[str]:
        words = [f"--config={self.config}", f"--topology={self.topology}"]
        return ["scripts/plan.py", *words, *(f"--config.{key}" for key in self.keys)]


PAIRS = (
    Pair("configs/llama8b.py", "h200:8"),
    Pair("configs/llama8b.py:v5e", "v5e:4x8"),
    Pair("configs/llama8b.py:v5p", "v5p:2x2x2"),
    Pair("configs/llama8b.py:v5p", "v5p:2x2x4"),
    Pair("configs/llama8b.py:v6e", "v6e:4x4"),
    Pair("configs/hh.py", "h100:8"),
    Pair("configs/hh.py", "v5e:4x4", ("max_buckets=1",)),
    Pair("configs/tldr.py", "h100:8"),
    Pair("configs/tldr.py", "v5e:4x4", ("max_buckets=1",)),
    Pair("configs/imdb.py:paper", "h200:1", ("stages=preference",)),
    Pair("configs/instructions.py", "h200:1"),
    Pair("configs/instructions.py", "v6e:1x1", ("max_buckets=1",)),
    Pair("configs/instructions.py", "v5p:2x2x1", ("max_buckets=1", "micro_rows=4")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="compile every pair again")
    parser.add_argument("--only", default="", help="pairs whose file has this in its name")
    args = parser.parse_args()
    for pair in PAIRS:
        if args.only in pair.file.name and (args.again or not pair.file.exists()):
            compile_pair(pair)
    rows = [row for pair in PAIRS if pair.file.exists() for row in table_rows(pair)]
    write_table(rows)


def compile_pair(pair: Pair) -> None:
    """Run scripts/plan.py, and keep its numbers; a pair that does not fit is kept as well."""
    NUMBERS.mkdir(exist_ok=True)
    print(f"{pair.config} on {pair.topology}", flush=True)
    began = time.perf_counter()
    command = [sys.executable, *pair.command, f"--json={pair.file}"]
    ended = subprocess.run(command, cwd=ROOT)
    print(f"  status {ended.returncode}, {time.perf_counter() - began:.0f} s", flush=True)


HEADING = (
    "config, stage",
    "chips",
    "mesh",
    "rows",
    "memory a device, GiB",
    "predicted",
    "step, ms",
    "MFU",
    "exposed, ms",
    "hours",
    "chip-hours",
)


def table_rows(pair: Pair) -> list[list[str]]:
    """The cells of each stage of a pair."""
    return [_cells(pair, stage) for stage in json.loads(pair.file.read_text())]


def _cells(pair: Pair, stage: dict) -> list[str]:
    step = stage["programs"][0]
    config = " ".join([pair.config.removeprefix("configs/"), *pair.keys])
    name = f"`{config}` {stage['stage']}"
    mesh = " x ".join(f"{axis} {size}" for axis, size in stage["mesh"].items() if size > 1)
    cells = [name, pair.topology, mesh or "1 device", stage["rows"]]
    if step["memory"] is None:
        return [
            *cells,
            step["problem"].partition(":")[0].lower(),
            *[""] * (len(HEADING) - len(cells) - 1),
        ]
    total, predicted = sum(step["memory"].values()), sum(step["predicted"].values())
    off = round(predicted / total - 1, 2) + 0.0  # never -0 %
    cells += [f"{total / GIB:.1f}", f"{off:+.0%}"]
    if step["roofline"] is None:
        return [*cells, *[""] * (len(HEADING) - len(cells))]
    exposed = sum(step["roofline"]["exposed_seconds"].values())
    times = [f"{1e3 * step['seconds']:,.0f}", f"{stage['mfu']:.0%}", f"{1e3 * exposed:,.0f}"]
    return [*cells, *times, f"{stage['hours']:.2f}", f"{stage['chip_hours']:.1f}"]


def write_table(rows: list[list[str]]) -> None:
    """Put the table between the marks of the page."""
    lines = [HEADING, ["---"] * len(HEADING), *rows]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + table + END + after)


if __name__ == "__main__":
    main()
