"""How long a run takes from its command to its first step: cold, and with its programs compiled.

    python benchmarks/first_step.py --shape gpt2-small --warm 3

Every run is a new process of scripts/train.py with a model folder, pairs and `compilation_cache`;
the first finds the cache empty. Counted from the start of the process to the line of metrics.jsonl
that holds the first step's loss; before it come reading weights and data, tokenising (kept by the
first run), the identity check, and the evaluation of one batch.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from sweep import ROOT, SHAPES, make_inputs, write_config

PARTS = ("identity", "eval", "train")  # splits of metrics.jsonl, in the order of their first lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--warm", type=int, default=3, help="runs that find the programs compiled")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_inputs(folder, shape, 8)
        config = write_config(folder, shape, 8, (0.1,))
        runs = [_run(config, folder, number, shape.pairs) for number in range(1 + args.warm)]
    warm = {part: statistics.median(run[part] for run in runs[1:]) for part in PARTS}
    for name, run in (("cold", runs[0]), ("warm", warm)):
        print(
            f"{args.shape}, {name}: checked against the reference after {run['identity']:.1f} s, "
            f"evaluated after {run['eval']:.1f} s, first step after {run['train']:.1f} s"
        )
    if args.json:
        args.json.write_text(json.dumps({"shape": args.shape, "runs": runs}, indent=2) + "\n")


def _run(config: pathlib.Path, folder: pathlib.Path, number: int, pairs: int) -> dict[str, float]:
    """Seconds from the command to the first line of each split."""
    workdir = folder / f"run-{number}"
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"--config={config}"]
    keys = {"dpo.steps": 1, "dpo.data.eval_limit": pairs, "log_every": 1}
    keys |= {"token_cache": folder / "tokens", "compilation_cache": folder / "compiled"}
    began = time.time()
    subprocess.run(
        [*command, f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in keys.items())],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    lines = [json.loads(x) for x in (workdir / "dpo" / "metrics.jsonl").read_text().splitlines()]
    first = lambda split: next(line["time"] for line in lines if line["split"] == split)
    return {part: first(part) - began for part in PARTS}


if __name__ == "__main__":
    main()
