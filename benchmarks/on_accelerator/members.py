"""A sweep of 4 as one program against 4 runs: python -m benchmarks.on_accelerator.members

The steps take turns: one of the sweep, then four of a single run. What a run does once (reading,
compiling) is not in the ratio; the seconds of compilation stand beside it.
"""

from __future__ import annotations

import statistics
import time

import jax
import numpy as np

from benchmarks.growth_programs import Point, build
from benchmarks.on_accelerator.entries import Section, first_line, leave_out, tell
from benchmarks.train_step import Case
from dpojax.training.memory import temporary_bytes

MEMBERS = 4
GPT2 = {"model": "openai-community/gpt2", "dtype": "bfloat16"}
# Small batches leave most of a chip idle, which is where training together pays.
CASES = {
    "4 x 384 tokens": Case(**GPT2, pairs=4, prompt=128, response=128),
    "16 x 768 tokens": Case(**GPT2, pairs=16, prompt=256, response=256),
}
TINY = {"tiny": Case(layers=2, width=64, heads=4, vocabulary=512, pairs=2, prompt=8, response=12)}


def main() -> None:
    section = Section(__doc__)
    for name, case in (TINY if section.small else CASES).items():
        if section.left < 0.3 * section.args.seconds:
            leave_out("sweep", name, "no time was left")
            continue
        try:
            tell("sweep", name, **measure(case, rounds=2 if section.small else 8))
        except Exception as error:  # recorded; the next case goes on
            leave_out("sweep", name, first_line(error))


def measure(case: Case, rounds: int) -> dict:
    """Milliseconds of a step of the sweep and of all runs, and their ratio: medians over rounds."""
    together, alone = build(Point(MEMBERS, case, members=MEMBERS)), build(Point(1, case))
    states, step_together = together.start()
    state, step_alone = alone.start()
    samples: list[tuple[float, float]] = []
    for _ in range(rounds + 1):  # the first one does not count
        began = time.perf_counter()
        states, finite = step_together(states)
        assert np.all(jax.device_get(finite)), case  # waits for the device
        between = time.perf_counter()
        for _ in range(MEMBERS):
            state, finite = step_alone(state)
            assert bool(finite), case
        samples.append((between - began, time.perf_counter() - between))
    del samples[0]
    return {
        "members": MEMBERS,
        "sweep_ms": 1e3 * statistics.median(one for one, _ in samples),
        "runs_ms": 1e3 * statistics.median(four for _, four in samples),
        "ratio": statistics.median(one / four for one, four in samples),
        "compile_seconds": together.compile_seconds,
        "run_compile_seconds": alone.compile_seconds,
        "temporary_gib": temporary_bytes(together.compiled) / 2**30,
        "run_temporary_gib": temporary_bytes(alone.compiled) / 2**30,
        "samples": samples,
    }


if __name__ == "__main__":
    main()
