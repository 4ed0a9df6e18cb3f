"""How much memory and time a stage's data take before the first step, by number of pairs.

    python benchmarks/preparation.py --rows 100000 1000000 --formats jsonl jsonl.gz parquet

Each measurement is a process of its own: it reads a file of short pairs, tokenises them with the
embedded task's tokenizer, writes the tokens beside it, and plans the rows of every batch. The table
shows the largest resident memory after each part, in MiB, and its seconds. "data" is reading,
tokenising and writing; "plan" the choice of rows. Pages of the mapped file of tokens count in both.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from dpojax.tables import text_table

TEXT = "the film plot cast story music was is and a not very good bad slow great dull fun"
WORDS = TEXT.split()
PER_FILE = 10_000  # pairs that are made at once


def pairs(count: int) -> Iterator[dict[str, str]]:
    """Pairs of 8 to 40 words in all, no two prompts alike."""
    draw = random.Random(0)
    text = lambda most: " ".join(draw.choices(WORDS, k=draw.randint(2, most)))
    for number in range(count):
        prompt = f"{number} {text(10)}"
        yield {"prompt": prompt, "chosen": f" {text(14)} good", "rejected": f" {text(14)} bad"}


def write(path: pathlib.Path, count: int) -> None:
    """Write pairs as the file's name says."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        schema = pa.schema({name: pa.string() for name in ("prompt", "chosen", "rejected")})
        with parquet.ParquetWriter(path, schema) as writer:
            rows = []
            for row in pairs(count):
                rows.append(row)
                if len(rows) == PER_FILE:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows = []
            writer.write_table(pa.Table.from_pylist(rows, schema))
        return
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as file:
        for row in pairs(count):
            file.write(json.dumps(row) + "\n")


def prepare(path: pathlib.Path) -> dict[str, float]:
    """Prepare a stage on the pairs of a file; return seconds and peaks (MiB) of both parts."""
    from dpojax.config.defaults import default_config
    from dpojax.stages import registry
    from dpojax.stages.setup import prepare_setup

    config = default_config()
    config.stages = ("preference",)
    config.model.update(width=16, layers=1, heads=2, kv_heads=2, mlp_width=16)
    config.tokens.max_length = 256
    config.preference.data.update(source=str(path), limit=0)
    setup = prepare_setup(registry.resolve(config, path.parent / "run"))
    stage = registry.open_stage(setup, "preference")
    measured = {"start MiB": peak()}
    began = time.perf_counter()
    loaded = stage.load()
    measured |= {"data s": time.perf_counter() - began, "data MiB": peak()}
    began = time.perf_counter()
    loaded.shape_for([loaded.batches])
    measured |= {"plan s": time.perf_counter() - began, "plan MiB": peak()}
    return measured


def peak() -> float:
    """The largest resident memory of this process so far, MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--formats", nargs="+", default=["jsonl", "jsonl.gz", "parquet"])
    parser.add_argument("--prepare", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        print(json.dumps(prepare(args.prepare)))
        return
    lines = []
    for kind in args.formats:
        for count in args.rows:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / f"pairs.{kind}"
                write(path, count)
                size = path.stat().st_size / 2**20
                command = [sys.executable, __file__, "--prepare", str(path)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            measured = json.loads(done.stdout.splitlines()[-1])
            lines.append(
                [kind, f"{count:,}", f"{size:,.0f}", *(f"{x:,.0f}" for x in measured.values())]
            )
            print("\n".join(text_table([["file", "pairs", "MiB", *measured], *lines])), flush=True)


if __name__ == "__main__":
    main()
