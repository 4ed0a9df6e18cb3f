"""GPT-2 large's step against other systems: python -m benchmarks.on_accelerator.systems

dpojax, a plain torch step and TRL train the same weights on the same token ids, as in
`benchmarks/versus.py`, in the environment of this Python. Their processes stay alive and take
turns, step by step, so that all see the same machine. Their losses and gradient norms are compared.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from benchmarks.on_accelerator.entries import Section, leave_out, tell
from benchmarks.peers.cases import TURNS
from benchmarks.versus import CASES, NO_AMX, PEERS, ROOT, SYSTEMS, Case, gap_of, is_within

GPT2_LARGE = Case(
    layers=36,
    width=1280,
    heads=20,
    kv_heads=20,
    mlp_width=5120,
    pairs=8,
    prompt=256,
    response=384,
    dtype="bfloat16",
    device="cuda",
)
NEEDS = {"dpojax": (), "plain torch": ("torch",), "TRL": ("torch", "trl")}
STEPS = 6


def main() -> None:
    section = Section(__doc__)
    case = CASES["check"] if section.small else GPT2_LARGE
    titles = []
    for title, packages in NEEDS.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            leave_out("system", title, f"{' and '.join(missing)} is not installed")
        else:
            titles.append(title)
    if len(titles) < 2:
        return
    with tempfile.TemporaryDirectory() as folder:
        case = case._replace(weights=str(pathlib.Path(folder) / "weights"))
        make = [sys.executable, str(PEERS / "weights.py"), json.dumps(case._asdict())]
        subprocess.run(make, check=True, env=_variables(case) | {"JAX_PLATFORMS": "cpu"})
        compare(titles, case, 2 if section.small else STEPS)


def compare(titles: list[str], case: Case, steps: int) -> None:
    """Let the systems take turns, and tell the seconds of each, its memory and its differences.

    Raises:
      RuntimeError: dpojax failed.
    """
    systems = [Running(title, case, steps) for title in titles]
    try:
        for system in systems:
            system.wait()
        for system in systems:
            system.go()  # the first steps, which compile, together
        for system in systems:
            system.wait()
        for _ in range(steps):
            for system in systems:
                system.go()
                system.wait()
    finally:
        for system in systems:
            system.end()
    ours = systems[0].result
    if ours is None:
        raise RuntimeError(f"dpojax {systems[0].failed}")
    for system in systems:
        if system.result is None:
            leave_out("system", system.title, system.failed)
            continue
        gap = gap_of([system.result], [ours])
        pairs = zip(system.result["samples"], ours["samples"], strict=True)
        ratios = [theirs["seconds"] / own["seconds"] for theirs, own in pairs]
        numbers = {"ratio": statistics.median(ratios), "within": is_within(gap, case.dtype)}
        numbers |= {"loss_gap": gap.loss, "norm_gap": gap.norm, "scored_gap": gap.scored}
        tell("system", system.title, **numbers, **system.result)


class Running:
    """A system's process, which waits before each of its steps until it is told to go on."""

    def __init__(self, title: str, case: Case, steps: int):
        system = SYSTEMS[title]
        script = [
            sys.executable,
            str(PEERS / system.script),
            json.dumps(case._asdict()),
            str(steps),
        ]
        self.title, self.result, self.failed = title, None, ""
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (`end` closes it)
        self.process = subprocess.Popen(
            [*script, *system.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=_variables(case) | {TURNS: "1"},
        )

    def go(self) -> None:
        """Let the process make a step, unless it has ended."""
        if not self.failed and self.result is None:
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def wait(self) -> None:
        """Wait until the process waits for its turn, or has its result, or has failed."""
        if self.failed or self.result is not None:
            return
        for line in self.process.stdout:
            if line.strip() == "turn":
                return
            if line.startswith("{") and '"computed"' in line:
                self.result = json.loads(line)
                return
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        last = lines[-1][:200] if lines else ""
        self.failed = f"failed with status {self.process.wait()}: {last}"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def _variables(case: Case) -> dict[str, str]:
    """The environment of all processes. They share the device's memory: none takes most of it."""
    more = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    more["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return os.environ | more | (NO_AMX if case.device == "cpu" else {})


if __name__ == "__main__":
    main()
