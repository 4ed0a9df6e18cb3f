"""Records what every command shows: in a terminal of 100 columns, in one of 60, and piped.

    python benchmarks/terminal.py --out=recordings             # every command: half an hour
    python benchmarks/terminal.py train sample --columns=60    # two of them, in one terminal

`chat` is left out: it waits for a user. Inputs are tiny. For each recording a line says how long
the longest silence and the widest line were, and what is wrong with them (`faults`).
OUT/COMMAND-COLUMNS.txt is what came, as it came. The exit status is 1 if anything is wrong. The
other commands read what `train` makes, so it runs first. Needs pexpect.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dpojax.data import reviews

ROOT = pathlib.Path(__file__).resolve().parents[1]
PIPED = 0  # the number of columns that stands for no terminal
COLUMNS = (100, 60, PIPED)
LONGEST_SILENCE = {True: 5.0, False: 70.0}  # seconds, on a terminal and without one
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
NOISE = (
    "Unable to initialize backend",
    "PyTorch was not found",
    "None of PyTorch",
    "Traceback (most recent call last)",
    "Warning:",
    "cuInit",
)
LONG_WORD = re.compile(r"\S{40,}")  # a path or a flag; nothing can be wrapped inside of it


class Recording(NamedTuple):
    """What a command showed.

    Attributes:
      columns: of its terminal; PIPED is none.
      times: seconds since the start of each piece.
      pieces: of text, as they came.
      seconds: until the command ended.
      status: its exit status.
    """

    columns: int
    times: Sequence[float]
    pieces: Sequence[str]
    seconds: float
    status: int

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def silence(self) -> tuple[float, str]:
        """The longest time without a sign of life, and the last line before it."""
        moments = [0.0, *self.times, self.seconds]
        gaps = [after - before for before, after in itertools.pairwise(moments)]
        longest = max(range(len(gaps)), key=gaps.__getitem__)
        before = [line for line in lines("".join(self.pieces[:longest])) if line.strip()]
        return gaps[longest], before[-1] if before else "the start"


def record(command: Sequence[str], columns: int, environment: dict[str, str]) -> Recording:
    """Run a command to its end, in a terminal of so many columns or in a pipe."""
    import pexpect
    import pexpect.popen_spawn

    began = time.perf_counter()
    if columns == PIPED:
        child = pexpect.popen_spawn.PopenSpawn(
            list(command), env=environment, encoding="utf-8", codec_errors="replace", timeout=1
        )
        child.proc.stdin.close()
    else:
        child = pexpect.spawn(
            command[0],
            list(command[1:]),
            env=environment,
            dimensions=(50, columns),
            encoding="utf-8",
            codec_errors="replace",
        )
    times, pieces = [], []
    while True:
        try:
            piece = child.read_nonblocking(65536, timeout=1)
        except pexpect.TIMEOUT:
            continue
        except pexpect.EOF:
            break
        if piece:
            times.append(time.perf_counter() - began)
            pieces.append(piece)
    if columns == PIPED:
        status = child.wait()
    else:
        child.close()
        status = child.exitstatus if child.signalstatus is None else -child.signalstatus
    return Recording(columns, times, pieces, time.perf_counter() - began, status)


def lines(text: str) -> list[str]:
    """The lines that were shown, those that later ones replaced included, without colours."""
    return re.split(r"[\r\n]+", ESCAPE.sub("", text))


def faults(recording: Recording, *, expected_status: int = 0) -> Iterator[str]:
    """What is wrong with a recording, one sentence each.

    A word that is longer than half of a line may stick out: a path cannot be wrapped.
    """
    terminal = recording.columns != PIPED
    if recording.status != expected_status:
        yield f"exit status {recording.status} in place of {expected_status}"
    for line in dict.fromkeys(lines(recording.text)):
        if terminal and len(line) > recording.columns and not LONG_WORD.search(line):
            yield f"{len(line)} columns: {line}"
    seconds, line = recording.silence
    if seconds > LONGEST_SILENCE[terminal]:
        yield f"{seconds:.1f} s of silence after: {line}"
    for noise in NOISE:
        if noise in recording.text:
            yield f"noise: {next(x for x in lines(recording.text) if noise in x)}"
    if not terminal and "\r" in recording.text:
        yield "a carriage return in a pipe"
    if not terminal and "\x1b" in recording.text:
        yield "an escape sequence in a pipe"


def commands(place: pathlib.Path) -> dict[str, list[str]]:
    """The words of each command by its name, in an order in which each finds what it reads."""
    config, frontier = f"--config={place / 'config.py'}", f"--config={place / 'frontier.py'}"
    run, pairs = f"{place / 'run'}", f"{place / 'pairs.jsonl'}"
    return {
        "train": ["train", config, f"--workdir={run}"],
        "finished": ["train", config, f"--workdir={run}"],
        "sample": ["sample", f"--model={run}:sft", f"--model={run}", "--prompt=this film"],
        "prefer": [
            "prefer",
            f"--policy={run}:sft",
            "--prompts=reviews",
            "--limit=16",
            "--reward=reviews",
            f"--out={place / 'pairs'}",
        ],
        "export": ["export", f"--workdir={run}", f"--out={place / 'exported'}"],
        "judge": [
            "judge",
            f"--a={run}",
            f"--b={run}:sft",
            "--prompts=reviews",
            "--limit=8",
            "--judge=length",
            f"--out={place / 'judged'}",
        ],
        "inspect-data": ["inspect-data", "--data", pairs, "--tokenizer", f"{place / 'exported'}"],
        "plan": ["plan", config, "--topology=cpu:1"],
        "certify": ["certify", config, f"--workdir={place / 'certified'}", "--small", "--steps=3"],
        "compare": ["compare", run, f"--out={place / 'compared'}"],
        "launch": ["launch", "slurm", config, f"--workdir={place / 'launched'}"],
        "sweep": ["sweep", config, f"--workdir={place / 'sweep'}"],
        "help-sweep": ["sweep", "--help"],
        "help-inspect": ["inspect-data", "--help"],
        "dry-sweep": ["sweep", config, "--dry_run"],
        "dry-frontier": ["frontier", frontier, "--dry_run"],
        "frontier": ["frontier", frontier, f"--workdir={place / 'frontier'}"],
        "dry-recipe": [
            "recipe",
            "--config=instructions:small",
            f"--workdir={place / 'recipe'}",
            "--dry_run",
        ],
    }


CONFIG = '''
"""SFT and DPO of a model that learns nothing, in a few seconds."""

from dpojax.config.defaults import default_config


def get_config():
    config = default_config()
    config.model.update(width=16, layers=1, heads=2, kv_heads=2, mlp_width=16, max_positions=128)
    config.tokens.max_length = 96
    for stage in (config.sft, config.preference):
        stage.data.update(limit=200, eval_limit=20)
        stage.update(batch_size=4, steps=40, warmup_steps=1, learning_rate=3e-3)
    config.samples.update(reward="reviews", count=8, per_prompt=2, max_new_tokens=8)
    config.plan.update(examples=200, prompt=8, response=24)
    config.log_every, config.evaluate_every, config.checkpoint_every = 5, 10, 20
    return config


def sweep():
    return [{"preference.beta": 0.1}, {"preference.beta": 0.5}, {"preference.batch_size": 2}]
'''
FRONTIER = '''
"""A frontier of two runs of a model that learns nothing."""

from dpojax.frontier.runs import Run
from CONFIG import get_config as small


def get_config():
    config = small()
    config.ppo.update(steps=2, batch_size=8, limit=16, max_new_tokens=8)
    config.checkpoint_every = 0
    config.frontier.update(count=16, completions=2, reference_samples=32, best_of_n=(2,))
    config.frontier.truncated = "keep"
    return config


def frontier(config):
    return [
        Run("dpo", "beta=0.3", {"preference.beta": 0.3}),
        Run("ppo_gt", "kl=2", {"evaluate_every": 14}, "ppo"),
    ]
'''


def make_inputs(place: pathlib.Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.py").write_text(CONFIG)
    start = f'import sys\n\nsys.path.insert(0, "{place}")\n'
    (place / "frontier.py").write_text(start + FRONTIER.replace("CONFIG", "config"))
    pairs = reviews.preferences("train", 20, 0)
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", help=f"of {', '.join(commands(pathlib.Path()))}")
    parser.add_argument("--columns", type=int, nargs="+", default=COLUMNS, help="0 is a pipe")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("recordings"))
    options = parser.parse_args(words)
    options.out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    wrong = 0
    for columns in options.columns:
        with tempfile.TemporaryDirectory() as folder:
            place = pathlib.Path(folder) / "inputs"
            make_inputs(place)
            for name, words_of in commands(place).items():
                needed = not options.commands or name in options.commands
                if not needed and name != "train" and name != "export":
                    continue
                command = [sys.executable, "-c", START, *words_of]
                if not needed:  # others read what it makes
                    subprocess.run(command, env=environment, check=True, capture_output=True)
                    continue
                wrong += _report(name, record(command, columns, environment), options.out)
    return 1 if wrong else 0


START = "import sys; sys.argv[0] = 'dpojax'; from dpojax.commands.entry import main; main()"


def _report(name: str, recording: Recording, out: pathlib.Path) -> int:
    """Keep a recording, print its line and its faults; returns how many there are."""
    where = str(recording.columns or "piped")
    (out / f"{name}-{where}.txt").write_text(recording.text)
    timed = [f"{t:8.2f} {piece!r}" for t, piece in zip(recording.times, recording.pieces)]
    (out / f"{name}-{where}.log").write_text("\n".join(timed) + "\n")
    widest = max(map(len, lines(recording.text)))
    silence, _ = recording.silence
    print(
        f"{name:<14}{where:>6}  {recording.seconds:6.1f} s, silent for {silence:4.1f} s, "
        f"widest line {widest}",
        flush=True,
    )
    faulty = list(faults(recording))
    for fault in faulty:
        print(f"    {fault}", flush=True)
    return len(faulty)


if __name__ == "__main__":
    sys.exit(main())
