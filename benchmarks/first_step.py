"""How long a run takes from its command to its first step: cold, and with its programs compiled.

    python benchmarks/first_step.py --shape gpt2-small --warm 3
    python benchmarks/first_step.py --shape gpt2-small --warm 3 --apart

Every run is a new process of scripts/train.py with a model folder, pairs and `compilation_cache`;
the first finds the cache empty, and keeps tokens and the reference's log-probs for the others
(--apart: every run computes its own). Seconds are counted from the start of the process to

    prepared   config.json is written: Python is up, data, model config and programs are prepared
    weights    the reference's weights, read and hashed, are in the workdir
    identity   its log-probs are there and checked, and the policy scores as it does
    eval       one batch is evaluated; the first step starts here
    train      the line of metrics.jsonl that holds the first step's loss
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

SPLITS = ("identity", "eval", "train")  # of metrics.jsonl, in the order of their first lines
PARTS = ("prepared", "weights", *SPLITS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--warm", type=int, default=3, help="runs that find the programs compiled")
    parser.add_argument("--apart", action="store_true", help="share no reference log-probs")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_inputs(folder, shape, 8)
        config = write_config(folder, shape, 8, (0.1,))
        keys = {"preference.steps": 1, "preference.data.eval_limit": shape.pairs, "log_every": 1}
        keys |= {"token_cache": folder / "tokens", "compilation_cache": folder / "compiled"}
        if not args.apart:
            keys["preference.reference.cache"] = folder / "log-probs"
        runs = [_run(config, folder / f"run-{n}", keys) for n in range(1 + args.warm)]
    warm = {part: statistics.median(run[part] for run in runs[1:]) for part in PARTS}
    for name, run in (("cold", runs[0]), ("warm", warm)):
        print(
            f"{args.shape}, {name}: prepared after {run['prepared']:.1f} s, the weights of the "
            f"reference kept after {run['weights']:.1f} s, checked after {run['identity']:.1f} s, "
            f"first step starts after {run['eval']:.1f} s, has ended after {run['train']:.1f} s"
        )
    if args.json:
        args.json.write_text(json.dumps({"shape": args.shape, "runs": runs}, indent=2) + "\n")


def _run(config: pathlib.Path, workdir: pathlib.Path, keys: dict) -> dict[str, float]:
    """Seconds from the command to each of PARTS."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), f"--config={config}"]
    began = time.time()
    subprocess.run(
        [*command, f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in keys.items())],
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    lines = [
        json.loads(x) for x in (workdir / "preference" / "metrics.jsonl").read_text().splitlines()
    ]
    at = {"prepared": (workdir / "config.json").stat().st_mtime}
    at["weights"] = (workdir / "preference" / "reference" / "0").stat().st_mtime
    for split in SPLITS:
        at[split] = next(line["time"] for line in lines if line["split"] == split)
    return {part: at[part] - began for part in PARTS}


if __name__ == "__main__":
    main()
