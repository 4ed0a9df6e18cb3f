"""DPO steps side by side: dpojax, TRL, a plain torch step and tunix, each in its own environment.

    python benchmarks/versus.py --environments ENVIRONMENTS --cases check check-llama
    python benchmarks/versus.py --environments ENVIRONMENTS --json versus.json
    python benchmarks/versus.py --environments ENVIRONMENTS --cases hh tldr --data DATA

All systems train the same weights on the same token ids, in the same precision, with AdamW and
clipping; a step is all from a batch of token ids to updated weights. Every step's loss, gradient
norm and number of scored tokens are compared: a system that computes something else is named, and
the exit status is 1. `check...` are cases of seconds for that alone.

They take turns: in every round each system runs once, in a new process, and its first step (of
tunix its first two), which compiles, does not count. Times on one machine drift, so only the
ratios of one call mean something. Environments that are not there are made (a virtual environment
each; they are large and may be kept).
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
sys.path[:0] = [str(ROOT), str(PEERS)]

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
    "tunix, checkpointing": System("tunix_trainer.py", "tunix", ("--checkpointing",), ("llama",)),
}
PACKAGES = {
    "torch": ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0"),
    "tunix": ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8", "optax==0.2.8"),
}
COMPLETE = "complete.json"  # in an environment: the packages that were installed to the end
SHOWN_PACKAGES = (
    "jax",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "google-tunix",
    "flax",
    "optax",
)
SOURCES = {  # of real lengths: a file below --data, and its form
    "hh": ("hh-rlhf/helpful-single-turn/train_gt.jsonl.gz", "hh"),
    "tldr": ("summarize-from-feedback/comparisons", "comparison"),
}
# Of the loss, in nats, and of the gradient's norm, relative: what rounding explains.
TOLERANCE = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 5e-2)}
# Some virtual machines announce AMX and stop a program that uses it. oneDNN (torch) reads this.
NO_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    pythons = {SYSTEMS[name].environment for name in args.systems}
    pythons = {name: _python(args.environments, name) for name in sorted(pythons)}
    record = {"machine": about_machine(), "environments": {}, "cases": []}
    for name, python in pythons.items():
        record["environments"][name or "dpojax"] = _installed(python)
    print(_heading(record), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.cases:
            case = CASES[name]
            if case.lengths in SOURCES:
                case = case._replace(lengths=_lengths(case.lengths, args.data, folder))
            case_record = _measure(name, case, pythons, args)
            record["cases"].append(case_record)
            print(_table(case_record), flush=True)
            if args.json:
                args.json.write_text(json.dumps(record, indent=2) + "\n")
    if any(_differing(case_record) or _lonely(case_record) for case_record in record["cases"]):
        sys.exit(1)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=pathlib.Path, required=True, help="a folder")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["gpt2-small", "tiny"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--data", type=pathlib.Path, help="holds hh-rlhf/ and the others")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed, in every round")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args(argv)
    if args.data is None and any(CASES[name].lengths in SOURCES for name in args.cases):
        parser.error("real lengths need --data")
    return args


def _measure(name: str, case: Case, pythons: dict[str, str], args: argparse.Namespace) -> dict:
    """Every round's result of every system."""
    systems = {x: SYSTEMS[x] for x in args.systems if case.family in SYSTEMS[x].families}
    by_system: dict = {system: [] for system in systems}
    extra: dict = {system: {} for system in systems}
    with tempfile.TemporaryDirectory() as folder:
        case = case._replace(weights=str(pathlib.Path(folder) / "weights"))
        subprocess.run(
            [sys.executable, str(PEERS / "weights.py"), json.dumps(case._asdict())],
            check=True,
            env=_variables(),
        )
        for _ in range(args.rounds):
            for title, system in systems.items():
                python = pythons[system.environment]
                result = _run(python, system, case, args.steps, extra[title])
                if result.get("failed") == "SIGILL" and not extra[title]:
                    extra[title] = NO_AMX
                    result = _run(python, system, case, args.steps, NO_AMX)
                by_system[title].append(result)
    about = {"case": name, **case._asdict(), "rounds": args.rounds, "steps": args.steps}
    return about | {"variables": extra, "systems": by_system}


def _run(python: str, system: System, case: Case, steps: int, extra: dict[str, str]) -> dict:
    command = [python, str(PEERS / system.script), json.dumps(case._asdict()), str(steps)]
    done = subprocess.run(
        [*command, *system.arguments], capture_output=True, text=True, env=_variables() | extra
    )
    if done.returncode:  # the others go on
        print(f"{system.script}: {_cause(done.returncode)}\n{done.stderr[-2000:]}", file=sys.stderr)
        return {"failed": _cause(done.returncode)}
    return json.loads(done.stdout.splitlines()[-1])


def _variables() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def _cause(code: int) -> str:
    return f"exit {code}" if code > 0 else signal.Signals(-code).name


def _python(folder: pathlib.Path, name: str) -> str:
    """The Python of an environment, which is made where it is missing, half made or of others."""
    if not name:
        return sys.executable
    place, packages = folder / name, list(PACKAGES[name])
    python, complete = place / "bin" / "python", place / COMPLETE
    if not complete.exists() or json.loads(complete.read_text()) != packages:
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        partial = complete.with_suffix(".partial")
        partial.write_text(json.dumps(packages) + "\n")
        os.replace(partial, complete)
    return str(python)


def _installed(python: str) -> dict:
    """Python's version and those of all packages of an environment."""
    program = (
        "import importlib.metadata, json, platform;"
        "versions = {x.name: x.version for x in importlib.metadata.distributions()};"
        "print(json.dumps({'python': platform.python_version(), 'packages': versions}))"
    )
    done = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def about_machine() -> dict:
    """When and where, and what of this repository."""
    cpu, info = platform.processor(), pathlib.Path("/proc/cpuinfo")
    if info.exists():
        fields = dict(
            map(str.strip, x.split(":", 1)) for x in info.read_text().splitlines() if ":" in x
        )
        cpu = fields.get("model name", cpu)
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    system = platform.platform()
    return {"date": date, "cpu": cpu, "cores": os.cpu_count(), "system": system, "commit": commit}


def _lengths(name: str, data: pathlib.Path, folder: str) -> str:
    """A file of [prompt, chosen, rejected] of real pairs, in random order, by GPT-2's tokenizer."""
    path = pathlib.Path(folder) / f"{name}.json"
    if path.exists():
        return str(path)
    from transformers import AutoTokenizer

    from dpojax.config.defaults import default_config
    from dpojax.stages.data import DataRequirements, load

    source, form = SOURCES[name]
    config = default_config()
    config.preference.data.update(source=str(data / source), form=form, limit=0, eval_limit=1)
    config.tokens.update(max_length=1024, truncation="drop")
    tokenizer = AutoTokenizer.from_pretrained(str(data / "gpt2-tokenizer"), trust_remote_code=False)
    stage_data = load(
        config.preference.data,
        config.tokens,
        tokenizer,
        requirements=DataRequirements(),
        seed=0,
    )
    lengths = [
        (len(example.prompt), *map(len, example.responses))
        for example in stage_data.examples[: stage_data.train]
    ]
    random.Random(0).shuffle(lengths)
    path.write_text(json.dumps(lengths))
    return str(path)


class Gap(NamedTuple):
    """How far a system's steps are from those of the first system, at most."""

    loss: float  # nats
    norm: float  # relative
    scored: int  # tokens


def gap_of(rounds: list[dict], against: list[dict]) -> Gap:
    """Over the steps of the first system; another may need one more to compile."""
    if any(len(result["computed"]) < len(against[0]["computed"]) for result in rounds):
        return Gap(math.nan, math.nan, 0)
    both = [
        (step, first)
        for result in rounds
        for step, first in zip(result["computed"], against[0]["computed"])
    ]
    return Gap(
        loss=_largest(abs(step["loss"] - first["loss"]) for step, first in both),
        norm=_largest(abs(step["norm"] / first["norm"] - 1) for step, first in both),
        scored=max(abs(step["scored"] - first["scored"]) for step, first in both),
    )


def is_within(gap: Gap, dtype: str) -> bool:
    """Whether rounding explains it."""
    loss, norm = TOLERANCE[dtype]
    return gap.loss <= loss and gap.norm <= norm and gap.scored == 0


def _largest(gaps: Iterable[float]) -> float:
    """NaN if one of them is, which then is within no tolerance."""
    gaps = list(gaps)
    return next(filter(math.isnan, gaps), max(gaps))


def _gaps(case_record: dict) -> dict[str, Gap]:
    """Of every system that ran, to the first of them."""
    ran = {x: rounds for x, rounds in case_record["systems"].items() if not _failed(rounds)}
    return {title: gap_of(rounds, next(iter(ran.values()))) for title, rounds in ran.items()}


def _differing(case_record: dict) -> list[str]:
    """The systems that compute something else than the first one."""
    gaps = _gaps(case_record).items()
    return [title for title, gap in gaps if not is_within(gap, case_record["dtype"])]


def _lonely(case_record: dict) -> bool:
    """Whether of several systems fewer than two ran: nothing was compared."""
    return len(_gaps(case_record)) < min(2, len(case_record["systems"]))


def _failed(rounds: list[dict]) -> str:
    return next((x["failed"] for x in rounds if "failed" in x), "")


def _heading(record: dict) -> str:
    machine, lines = record["machine"], []
    lines.append(f"{machine['date']}, {machine['cores']} x {machine['cpu']}, {machine['commit']}")
    for name, about in record["environments"].items():
        packages = [f"{x} {about['packages'][x]}" for x in SHOWN_PACKAGES if x in about["packages"]]
        lines.append(f"{name}: Python {about['python']}, {', '.join(packages)}")
    return "\n".join(lines)


def _table(case_record: dict) -> str:
    """Medians by system; ratios to dpojax are of the same round."""
    ours, gaps = case_record["systems"].get("dpojax"), _gaps(case_record)
    lines = [
        f"\n{case_record['case']}: seconds per step, by round; the ratio to dpojax; peak GiB; how "
        "far loss (nats) and gradient norm (relative) are from the first system's"
    ]
    for title, rounds in case_record["systems"].items():
        extra = case_record["variables"][title].items()
        set_ = "".join(f"  (SIGILL without {name}={value})" for name, value in extra)
        if failed := _failed(rounds):
            lines.append(f"{title:<24}failed: {failed}{set_}")
            continue
        line = f"{title:<24}" + "  ".join(f"{x['median']:7.2f}" for x in rounds)
        if ours and not _failed(ours):
            ratios = [x["median"] / our["median"] for x, our in zip(rounds, ours, strict=True)]
            line += f"  {statistics.mean(ratios):6.2f}"
        peak = max(x["peak_gib"] for x in rounds)
        others = max(sample["others"] for x in rounds for sample in x["samples"])
        gap = gaps[title]
        line += f"  {peak:6.2f}  {gap.loss:.0e}  {gap.norm:.0e}"
        lines.append(f"{line}  (others had up to {100 * others:.0f} % of the machine){set_}")
    for title in _differing(case_record):
        lines.append(f"{title} COMPUTES SOMETHING ELSE: {gaps[title]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
