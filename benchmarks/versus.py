"""DPO steps side by side: dpojax, TRL, a plain torch step and tunix, each in its own environment.

    python benchmarks/versus.py --environments ENVIRONMENTS --json versus.json
    python benchmarks/versus.py --environments ENVIRONMENTS --cases hh tldr --data DATA

All systems train a model of the same shape on the same token ids, in the same precision, with AdamW
and clipping; a step is all from batch to updated weights. They take turns: in every round each
system runs once, in a new process, and its first step (compilation) does not count. Times on one
machine drift, so only the ratios of one call mean something. Environments that are not there are
made (a virtual environment each; they are large and may be kept).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from typing import NamedTuple

PEERS = pathlib.Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(PEERS))

from cases import CASES, Case  # noqa: E402


class System(NamedTuple):
    """A script of `peers`, its arguments, and what its environment has installed."""

    script: str
    environment: str = ""  # "": this one
    arguments: tuple[str, ...] = ()
    families: tuple[str, ...] = ("gpt2", "llama")


SYSTEMS = {
    "dpojax": System("ours.py"),
    "TRL": System("trl_trainer.py", "torch", ("--checkpointing",)),
    "TRL, no checkpointing": System("trl_trainer.py", "torch"),
    "plain torch": System("plain_torch.py", "torch"),
    "tunix": System("tunix_trainer.py", "tunix", families=("llama",)),
}
PACKAGES = {"torch": ("torch==2.13.0", "trl", "accelerate"), "tunix": ("google-tunix",)}
SOURCES = {  # of real lengths: a file below --data, and its form
    "hh": ("hh-rlhf/helpful-single-turn/train_gt.jsonl.gz", "hh"),
    "tldr": ("summarize-from-feedback/comparisons", "comparison"),
}


def main() -> None:
    args = _arguments()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.cases:
            case = CASES[name]
            if case.lengths:
                case = case._replace(lengths=_lengths(case.lengths, args.data, folder))
            found = _measure(name, case, args)
            results.append(found)
            print(_table(found), flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=pathlib.Path, required=True, help="a folder")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["gpt2-small", "tiny"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--data", type=pathlib.Path, help="holds hh-rlhf/ and the others")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed, in every round")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    if args.data is None and any(CASES[name].lengths for name in args.cases):
        parser.error("real lengths need --data")
    return args


def _measure(name: str, case: Case, args: argparse.Namespace) -> dict:
    """Every round's result of every system."""
    systems = {x: SYSTEMS[x] for x in args.systems if case.family in SYSTEMS[x].families}
    found: dict = {system: [] for system in systems}
    for _ in range(args.rounds):
        for title, system in systems.items():
            found[title].append(_run(system, case, args))
    return {"case": name, **case._asdict(), "systems": found}


def _run(system: System, case: Case, args: argparse.Namespace) -> dict:
    python = sys.executable
    if system.environment:
        python = _environment(args.environments, system.environment)
    command = [python, str(PEERS / system.script), json.dumps(case._asdict()), str(args.steps)]
    done = subprocess.run(
        [*command, *system.arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:  # others go on: torch's bfloat16 has illegal instructions on some CPUs
        print(f"{system.script}: {_cause(done.returncode)}\n{done.stderr[-2000:]}", file=sys.stderr)
        return {"failed": _cause(done.returncode)}
    return json.loads(done.stdout.splitlines()[-1])


def _cause(code: int) -> str:
    return f"exit {code}" if code > 0 else signal.Signals(-code).name


def _environment(folder: pathlib.Path, name: str) -> str:
    """The Python of an environment; made if it is not there."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        install = [str(python), "-m", "pip", "install", "-q", *PACKAGES[name]]
        subprocess.run(install, check=True)
    return str(python)


def _lengths(name: str, data: pathlib.Path, folder: str) -> str:
    """A file of [prompt, chosen, rejected] of real pairs, in random order, by GPT-2's tokenizer."""
    from transformers import AutoTokenizer

    from dpojax.launch import data as stage_data
    from dpojax.launch.defaults import default_config

    source, form = SOURCES[name]
    config = default_config()
    config.dpo.data.update(source=str(data / source), form=form, limit=0, eval_limit=1)
    config.tokens.update(max_length=1024, truncation="drop")
    tokenizer = AutoTokenizer.from_pretrained(str(data / "gpt2-tokenizer"))
    wants = stage_data.Wants()
    found = stage_data.load(config.dpo.data, config.tokens, tokenizer, wants=wants, seed=0)
    lengths = [
        (len(example.prompt), *map(len, example.responses))
        for example in found.examples[: found.train]
    ]
    random.Random(0).shuffle(lengths)
    path = pathlib.Path(folder) / f"{name}.json"
    path.write_text(json.dumps(lengths))
    return str(path)


def _table(found: dict) -> str:
    """Medians by system; ratios to dpojax are of the same round."""
    ours = found["systems"].get("dpojax")
    lines = [f"\n{found['case']}: seconds per step, by round; the ratio to dpojax; peak GiB"]
    for title, rounds in found["systems"].items():
        if failed := [x["failed"] for x in rounds if "failed" in x]:
            lines.append(f"{title:<24}failed: {failed[0]}")
            continue
        seconds = "  ".join(f"{x['median']:7.2f}" for x in rounds)
        line = f"{title:<24}{seconds}"
        if ours:
            ratios = [x["median"] / own["median"] for x, own in zip(rounds, ours)]
            line += f"  {statistics.mean(ratios):6.2f}"
        peak = max(x["peak_gib"] for x in rounds)
        others = max(sample["others"] for x in rounds for sample in x["samples"])
        lines.append(f"{line}  {peak:6.2f}  (others had up to {100 * others:.0f} % of the machine)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
