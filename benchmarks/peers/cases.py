"""What every system of `benchmarks/versus.py` trains on, and how its steps are timed.

A step is all from a batch of token ids (lists of integers) to updated weights: packing or padding
counts, and so does the reference's pass where it is live. What is done once for a data set does
not: tokenising, the shape that our rows share, a reference that is cached.

With the variable of TURNS set, a process prints `turn` before each step and waits for a line: so
several that stay alive can take turns (`benchmarks/on_accelerator/systems.py`).

Imported in virtual environments of other systems: NumPy is all that it needs.
"""

from __future__ import annotations

import json
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BETA, CLIP = 0.1, 1.0
WARM = 1  # steps that are not counted: they compile
TURNS = "DPOJAX_BENCHMARK_TURNS"
SPECIAL = 4  # ids below it are padding, end, unknown


class Case(NamedTuple):
    """A model's shape, the lengths of its data, the precision of its products, and its weights."""

    family: str = "gpt2"  # or llama
    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int = 12
    mlp_width: int = 3072
    vocabulary: int = 50257
    pairs: int = 4
    dtype: str = "float32"  # weights and optimiser are float32
    reference: str = "live"  # scored in every step; or cached
    prompt: int = 128
    response: int = 128
    lengths: str = ""  # a JSON file of [prompt, chosen, rejected], in place of these two
    learning_rate: float = 1e-6
    weights: str = ""  # a Hugging Face folder, the policy's and the reference's
    device: str = "cpu"  # of torch: cpu or cuda. JAX takes its own choice, or JAX_PLATFORMS


GPT2_SMALL = Case()
LLAMA = Case("llama", kv_heads=4, mlp_width=2048, vocabulary=32000)
TINY = {"layers": 4, "width": 256, "heads": 4, "mlp_width": 1024, "vocabulary": 8192, "pairs": 16}
TINY |= {"prompt": 64, "response": 64, "kv_heads": 4}
# Seconds long, of ragged lengths, at a rate at which wrong updates show.
CHECK = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2, "mlp_width": 128, "vocabulary": 500}
CHECK |= {"lengths": "ragged", "prompt": 12, "response": 9, "learning_rate": 1e-3}
CASES = {
    "check": GPT2_SMALL._replace(**CHECK),
    "check-cached": GPT2_SMALL._replace(**CHECK, reference="cached"),
    "check-bfloat16": GPT2_SMALL._replace(**CHECK, dtype="bfloat16"),
    "check-llama": LLAMA._replace(**CHECK),
    "check-llama-cached": LLAMA._replace(**CHECK, reference="cached"),
    "check-llama-bfloat16": LLAMA._replace(**CHECK, dtype="bfloat16"),
    "tiny": GPT2_SMALL._replace(**TINY),
    "tiny-llama": LLAMA._replace(**TINY),
    "tiny-150k": GPT2_SMALL._replace(**TINY | {"vocabulary": 150_000}),
    "gpt2-small": GPT2_SMALL,
    "gpt2-small-cached": GPT2_SMALL._replace(reference="cached"),
    "gpt2-small-bfloat16": GPT2_SMALL._replace(dtype="bfloat16"),
    "gpt2-small-150k": GPT2_SMALL._replace(vocabulary=150_000),
    "llama": LLAMA,
    "llama-cached": LLAMA._replace(reference="cached"),
    "llama-bfloat16": LLAMA._replace(dtype="bfloat16"),
    "hh": GPT2_SMALL._replace(lengths="hh", pairs=8),
    "tldr": GPT2_SMALL._replace(lengths="tldr", pairs=8),
    "llama-hh": LLAMA._replace(lengths="hh", pairs=8),
    "llama-tldr": LLAMA._replace(lengths="tldr", pairs=8),
}


class Pair(NamedTuple):
    """Token ids; both responses end with the id of the end."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class StepResult(NamedTuple):
    """What a step computed; every system has to give the same numbers."""

    loss: float  # nats, the mean of the batch, before the update
    norm: float  # of the gradient, before clipping
    scored: int  # tokens whose log-probs count: those of the responses


def read_case(argument: str) -> Case:
    return Case(**json.loads(argument))


def batches(case: Case, count: int) -> list[list[Pair]]:
    """`count` optimiser batches of random ids, the same for every system."""
    rng = np.random.default_rng(0)
    lengths = [(case.prompt, case.response, case.response)] * (case.pairs * count)
    if case.lengths == "ragged":
        lengths = np.random.default_rng(1).integers(2, np.array(lengths) + 1).tolist()
    elif case.lengths:
        lengths = json.loads(pathlib.Path(case.lengths).read_text())

    def ids(length: int) -> list[int]:
        return rng.integers(SPECIAL, case.vocabulary, length).tolist()

    def ended(length: int) -> list[int]:
        return [*ids(length - 1), 1]

    pairs = [Pair(ids(p), ended(c), ended(r)) for p, c, r in lengths[: case.pairs * count]]
    return [pairs[i * case.pairs : (i + 1) * case.pairs] for i in range(count)]


def report(
    step: Callable[[int], StepResult],
    steps: int,
    device_peak: Callable[[], int | None] | None = None,
    **about,
) -> None:
    """Time `step(0)`, `step(1)`, ...; print the results as the last line.

    Args:
      device_peak: reads the most bytes that were in use on an accelerator; None on a CPU.
    """
    clock, results = Clock(), []
    for index in range(WARM + steps):
        clock.start()
        results.append(step(index))
        clock.stop()
    clock.report(results, device_peak, **about)


class Clock:
    """Seconds of steps, and how much of the machine others had meanwhile."""

    def __init__(self, warm: int = WARM):
        self.samples: list[dict] = []
        self.warm = warm
        self.before = _peak_gib()  # weights were read; TRL's and tunix's trainers are made

    def start(self) -> None:
        if os.environ.get(TURNS):
            print("turn", flush=True)
            sys.stdin.readline()
        self.began, self.others = time.perf_counter(), _others_cpu_seconds()

    def stop(self) -> None:
        seconds = time.perf_counter() - self.began
        share = (_others_cpu_seconds() - self.others) / seconds / os.cpu_count()
        self.samples.append({"seconds": seconds, "others": share})

    def report(
        self,
        computed: list[StepResult],
        device_peak: Callable[[], int | None] | None = None,
        **about,
    ) -> None:
        peak = None if device_peak is None else device_peak()
        warm, timed = self.samples[: self.warm], self.samples[self.warm :]
        record = {
            "first": warm[0]["seconds"],
            "median": statistics.median(sample["seconds"] for sample in timed),
            "samples": timed,
            "peak_gib": _peak_gib(),
            "peak_gib_before": self.before,
            "device_peak_gib": None if peak is None else peak / 2**30,
            "computed": [step._asdict() for step in computed],
        }
        print(json.dumps(record | about), flush=True)


def _peak_gib() -> float:
    """The most memory that this process has had resident, of its whole life."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def _others_cpu_seconds() -> float:
    """CPU time that all other processes have had since the machine started; 0 if not known."""
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *more = map(int, stat.read_text().split()[1:9])
    ticks = user + nice + system + sum(more)
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])
