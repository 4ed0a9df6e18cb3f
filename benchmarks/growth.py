"""How time, memory and communication of a train step grow, against what the mathematics says.

    python benchmarks/growth.py                                 # some minutes on 2 cores
    python benchmarks/growth.py --study devices --json growth.json

Studies: tokens per row, vocabulary, responses per prompt, members of a sweep, (fake) devices, whose
collectives are read from the compiled program, and there the vocabulary once more, with the head in
chunks. Each study runs in a process of its own. At the end the script prints what grew faster than
its law, and its exit code is 1 if anything did. With all studies it also draws
benchmarks/figures/growth.png.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import growth_figure  # noqa: E402
from benchmarks.growth_laws import MIB, Curve, Record, curves, sent_bytes, step_flops  # noqa: E402
from benchmarks.growth_programs import STUDIES, measure  # noqa: E402

FIGURE = ROOT / "benchmarks" / "figures" / "growth.png"


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    records: list[Record] = []
    for study in args.study:
        # The number of devices is fixed when a process first asks for one.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            study_records = fresh.submit(measure, study, args.rounds).result()
        print(f"\n### {study}\n\n{table(study_records)}", flush=True)
        records += study_records
    if args.json:
        unfinished = args.json.with_name(f".{args.json.name}.unfinished")
        unfinished.write_text(json.dumps(records, indent=2) + "\n")
        unfinished.replace(args.json)
    all_curves = curves(records)
    print(f"\n### Against the laws\n\n{verdicts(all_curves)}")
    if set(args.study) == set(STUDIES):
        growth_figure.draw(all_curves, records, FIGURE)
    faster = [curve for curve in all_curves if not curve.holds]
    for curve in faster:
        print(f"\ngrew faster than the mathematics: {curve.study} {curve.mesh} {curve.quantity}")
    return 1 if faster else 0


def table(records: Sequence[Record]) -> str:
    """What was measured at each point of one study, in Markdown."""
    if max(record["devices"] for record in records) > 1:
        heads = (
            "mesh",
            "devices",
            "vocabulary",
            "collectives, times: MiB",
            "MiB sent",
            "/ closed form",
        )
        heads += ("argument MiB", "temporary MiB", "compile s")
        lines = [_device_cells(record) for record in records]
    else:
        heads = (records[0]["study"], "s/step", "median", "product GFLOP", "/ closed form")
        heads += ("temporary MiB", "argument MiB", "compile s")
        lines = [_cells(record) for record in records]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ("---",) * len(heads), *lines))


def _cells(record: Record) -> tuple[str, ...]:
    return (
        f"{record['x']:,}",
        f"{min(record['samples']):.3f}",
        f"{statistics.median(record['samples']):.3f}",
        f"{record['flops'] / 1e9:.2f}",
        f"{record['flops'] / step_flops(record):.3f}",
        f"{record['temporary'] / MIB:.1f}",
        f"{record['arguments'] / MIB:.1f}",
        f"{record['compile_seconds']:.1f}",
    )


def _device_cells(record: Record) -> tuple[str, ...]:
    sizes, closed_form = record["collective_bytes"], sent_bytes(record)
    sent = sum(sizes.values())
    kinds = [f"{kind} {n}: {sizes[kind] / MIB:.2f}" for kind, n in record["collectives"].items()]
    return (
        record["mesh"] if record["devices"] > 1 else "any",
        str(record["devices"]),
        f"{record['case']['vocabulary']:,}",
        ", ".join(kinds) or "none",
        f"{sent / MIB:.2f}",
        f"{sent / closed_form:.2f}" if closed_form and record["devices"] > 1 else "",
        f"{record['arguments'] / MIB:.2f}",
        f"{record['temporary'] / MIB:.1f}",
        f"{record['compile_seconds']:.1f}",
    )


def verdicts(all_curves: Sequence[Curve]) -> str:
    """A Markdown table: how far the largest point of each curve lies above its law."""
    heads = ("study", "quantity", "law", "largest point / law", "limit", "")
    lines = [
        (
            f"{curve.study} {curve.mesh}".strip(),
            curve.quantity,
            curve.law,
            f"{curve.excess:.2f}",
            f"{curve.limit:.2f}",
            "holds" if curve.holds else "GREW FASTER",
        )
        for curve in all_curves
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ("---",) * len(heads), *lines))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--study", nargs="+", choices=list(STUDIES), default=list(STUDIES), help="default: all")
    add(
        "--rounds",
        type=int,
        default=7,
        help="timed steps of each point, in turns; the least counts",
    )
    add("--json", type=pathlib.Path, metavar="OUT", help="also write what was measured here")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: at least one step has to be timed")
    return args


if __name__ == "__main__":
    sys.exit(main())
