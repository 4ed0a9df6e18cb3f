"""What an accelerator does with dpojax, in one command of at most 8 minutes.

    python benchmarks/accelerator.py --json accelerator.json
    python benchmarks/accelerator.py --minutes 3 --only kernels "step of Llama 1B"

Every kernel of attention against plain attention in float32; the step of GPT-2 large and of a 1B
Llama in bfloat16; GPT-2 large against a plain torch step and TRL, where they are installed; a sweep
of 4 against 4 runs; the sampler. Weights are random and of published shapes: nothing is downloaded.
On a CPU all of it runs in the small, and its times say nothing.

Each section is a process of its own and has a share of the time that is left. One that takes longer
is ended; one that fails is recorded, and the others go on. The JSON is written again after every
result. The status is 1 if a section failed, or if numbers differ by more than rounding explains.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))

from benchmarks.on_accelerator import tables  # noqa: E402
from benchmarks.on_accelerator.entries import MARK  # noqa: E402
from benchmarks.versus import about_machine  # noqa: E402
from dpojax import storage  # noqa: E402

PART = "benchmarks.on_accelerator"
SMALL_NOTE = (
    "This is a CPU: sizes are tiny, kernels are interpreted, and no time says anything of another."
)


class Section(NamedTuple):
    """A process that prints its results as lines; see `on_accelerator.entries`.

    Attributes:
      name: in the table and in the JSON.
      share: seconds of 8 minutes. Of the time that is left, a section may take its share.
      command: a module with its arguments, which gets `--seconds` and `--small`.
    """

    name: str
    share: float
    command: tuple[str, ...]


SECTIONS = (
    Section("kernels", 110, ("-m", f"{PART}.attention")),
    Section("step of GPT-2 large", 55, ("-m", f"{PART}.step", "gpt2-large")),
    Section("step of Llama 1B", 55, ("-m", f"{PART}.step", "llama-1b")),
    Section("against torch", 110, ("-m", f"{PART}.systems")),
    Section("sweep of 4", 60, ("-m", f"{PART}.members")),
    Section("sampler", 70, ("-m", f"{PART}.draws")),
)


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    ends = time.monotonic() + 60 * args.minutes
    record = {"machine": about_machine(), "minutes": args.minutes, "sections": {}}
    device = run_section(
        Section("device", 0, ("-m", f"{PART}.device")), ends - time.monotonic(), []
    )
    if device["status"] != "done":
        sys.exit(f"no device to measure: {device['reason']}")
    (record["device"],) = device["entries"]
    small = record["device"]["platform"] == "cpu"
    record["note"] = SMALL_NOTE if small else ""
    print(tables.heading(record), flush=True)
    sections = [x for x in SECTIONS if not args.only or x.name in args.only]
    run_sections(sections, ends, record, args.json, ["--small"] if small else [])
    print("\n".join(["", *tables.summary(record["sections"])]))
    if small:
        print(f"\n{SMALL_NOTE}")
    if tables.bad(record["sections"]):
        sys.exit(1)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="that all of it may take")
    names = [section.name for section in SECTIONS]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="SECTION", help=", ".join(names)
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="OUT", help="also write results here")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes}: must be positive")
    return args


def run_sections(
    sections: list[Section], ends: float, record: dict, out: pathlib.Path | None, more: list[str]
) -> None:
    """Run one section after another and add what came of each to `record["sections"]`.

    Args:
      ends: of `time.monotonic()`, when all are over.
      record: what `out` holds. It is written again after every result, whole or not at all.
      more: arguments that every section gets.
    """

    def write(name: str, found: dict) -> None:
        record["sections"][name] = found
        if out is not None:
            storage.write_json(out, record)

    for index, section in enumerate(sections):
        left = ends - time.monotonic()
        seconds = left * section.share / sum(x.share for x in sections[index:])
        print(f"{section.name}: at most {max(0, seconds):.0f} s", flush=True)
        found = run_section(
            section, seconds, more, lambda found, name=section.name: write(name, found)
        )
        write(section.name, found)
        if found["status"] != "done":
            print(f"  {found['status']}: {found['reason']}", flush=True)


def run_section(
    section: Section,
    seconds: float,
    more: list[str],
    say: Callable[[dict], None] | None = None,
) -> dict:
    """Run a section for at most `seconds`: its status, the reason of a bad one, and its entries.

    Args:
      say: gets all of this after every entry, with the status `running`.
    """
    began = time.monotonic()
    found = {"status": "running", "reason": "", "seconds": 0.0, "entries": []}
    if seconds < 1:
        return found | {"status": "left out", "reason": "no time was left"}
    # A little before it would be ended, a section ends by itself.
    command = [sys.executable, *section.command, f"--seconds={0.9 * seconds:.1f}", *more]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
            start_new_session=True,  # with a group of its own, which ends with it
        )
        with process, _ended_after(process, seconds) as late:
            for line in process.stdout:
                if line.startswith(MARK):
                    found["entries"].append(json.loads(line.removeprefix(MARK)))
                    found["seconds"] = time.monotonic() - began
                    if say is not None:
                        say(dict(found))
            code = process.wait()
        errors.seek(0)
        reason = "" if code == 0 else _reason(code, errors.read())
    status = "done" if code == 0 else "failed"
    if late.is_set():
        status, reason = "cut off", f"it was not done after {seconds:.0f} s"
    return found | {"status": status, "reason": reason, "seconds": time.monotonic() - began}


@contextlib.contextmanager
def _ended_after(process: subprocess.Popen, seconds: float) -> Iterator[threading.Event]:
    """End a process after `seconds`, which sets the event, or when the context is left."""
    late = threading.Event()

    def end_late() -> None:
        late.set()
        _end(process)

    timer = threading.Timer(seconds, end_late)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        _end(process)


def _reason(code: int, errors: str) -> str:
    """The last line that a process wrote before it failed, or the signal that ended it."""
    cause = f"exit {code}" if code > 0 else signal.Signals(-code).name
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return f"{cause}: {lines[-1][:300]}" if lines else cause


def _end(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):  # they have ended
        os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
