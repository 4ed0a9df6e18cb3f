"""Where the wall time of a run goes, over all its starts: goodput, and what restarts have cost.

At any time one bucket counts (`BUCKETS`), so that the buckets add up to the wall time since the run
first began:

    start       imports, reading data, loading weights or a checkpoint, log-probs of the reference
    compile     JAX traces and compiles, wherever that happens
    data        the loop waits for a batch while the devices have no step to compute
    step        train steps: the only bucket that is goodput
    evaluation  on held-out data, of samples, and the summary
    checkpoint  the loop waits for a checkpoint
    lost        steps, and the data and evaluations between them, after the checkpoint from which
                the next start went on: they are done again
    down        no process was there: from the last that is known of one to the next start

It is the time of process 0, on the host's clock. A file of the workdir keeps it. Each process
appends how many seconds it has spent on what when it starts, goes on from a checkpoint, saves one,
writes a line of metrics (at most every `BEAT` seconds) and ends. So of a process that is killed all
is known but the last seconds, which count as `down`. One that is stopped before it has the lock of
the workdir leaves no trace. Members that train together have one record, in the first workdir.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

import dpojax
from dpojax import storage

START, COMPILE, DATA, STEP = "start", "compile", "data", "step"
EVALUATION, CHECKPOINT, LOST, DOWN = "evaluation", "checkpoint", "lost", "down"
BUCKETS = (START, COMPILE, DATA, STEP, EVALUATION, CHECKPOINT, LOST, DOWN)
DONE_AGAIN = (DATA, STEP, EVALUATION)  # by the next start; the others are a start's own

FILE = "goodput.jsonl"
BEAT = 30.0  # seconds between two records that say no more than how far the process is
# What a record says has happened.
STARTED, GOES_ON, SAVED, BEATS, ENDED = "started", "goes on", "saved", "beat", "ended"
WIDTH = 100  # columns of what is printed
HARD_SPACE = "\u00a0"  # where no line is broken
COMPILING = "/jax/core/compile/"  # how the names of JAX's events begin (jax/_src/dispatch.py)


class Stopwatch:
    """Adds up the seconds of one process by bucket.

    Args:
      age: seconds for which the process is there already; they count as `start`.
      clock: seconds since any moment.
    """

    def __init__(self, age: float = 0.0, clock: Callable[[], float] = time.monotonic):
        self._clock, self._thread = clock, threading.get_ident()
        self._seconds = dict.fromkeys(BUCKETS, 0.0)
        self._bucket, self._since = START, clock() - age
        self._compiled: list[tuple[float, float]] = []  # (begin, end) since `_since`

    def switch(self, bucket: str, *, instead: str = "") -> str:
        """From now on `bucket` counts; return the one that has counted until now.

        Args:
          instead: the time until now counts as this one after all.
        """
        now, before = self._clock(), self._bucket
        compiled = sum(end - begin for begin, end in self._compiled)
        self._seconds[COMPILE] += compiled
        self._seconds[instead or before] += now - self._since - compiled
        self._bucket, self._since, self._compiled = bucket, now, []
        return before

    def compiled(self, seconds: float) -> None:
        """Count the last `seconds` as `compile`; what was compiled meanwhile counts once."""
        if threading.get_ident() != self._thread:
            return  # it kept nobody waiting
        end = self._clock()
        begin = max(end - seconds, self._since)
        while self._compiled and self._compiled[-1][0] >= begin:
            self._compiled.pop()
        if self._compiled:
            begin = max(begin, self._compiled[-1][1])
        self._compiled.append((begin, end))

    def seconds(self) -> dict[str, float]:
        """The seconds of each bucket until now; they add up to the age of the process."""
        self.switch(self._bucket)
        return dict(self._seconds)


class Record:
    """The time of a run, of this process and of those before it.

    Args:
      age: of this process, in seconds.
    """

    def __init__(self, age: float = 0.0):
        self.stopwatch = Stopwatch(age)
        self._began = time.time() - age
        self._records: list[dict] = []  # of all processes, but for beats that later ones replace
        self._file: storage.LineWriter | None = None
        self._last = time.monotonic()

    def open(self, folder: str | os.PathLike, machine: Mapping[str, Any] | None = None) -> None:
        """Go on with the record of a run's workdir, whose lock the caller holds.

        Args:
          machine: what the process computes on, for whoever reads the file.
        """
        path = storage.as_path(folder) / FILE
        self._records = shortened(read(folder))
        if jax.process_index() == 0:
            self._file = storage.LineWriter(path)
        more = {} if machine is None else {"machine": dict(machine)}
        zero = dict.fromkeys(BUCKETS, 0.0)
        self._append({"event": STARTED, "time": self._began, "seconds": zero} | more)
        self.add(BEATS)

    def add(self, event: str, stage: str = "", step: int = 0) -> None:
        """Say what has happened, and keep the seconds until now."""
        seconds = self.stopwatch.seconds()
        record = {"event": event, "time": self._began + sum(seconds.values())}
        if stage:
            record |= {"stage": stage, "step": step}
        self._append(record | {"seconds": seconds})

    def beat(self) -> None:
        """Keep the seconds until now, unless that was done a moment ago."""
        if time.monotonic() - self._last >= BEAT:
            self.add(BEATS)

    def totals(self) -> dict[str, float]:
        """Seconds of each bucket, of all processes until now."""
        if not self._records:
            return self.stopwatch.seconds()
        seconds = self.stopwatch.seconds()
        now = {"event": BEATS, "time": self._began + sum(seconds.values()), "seconds": seconds}
        return split([*self._records, now])

    def close(self) -> None:
        """Say that the process has ended, and close the file."""
        if self._file is not None:
            self.add(ENDED)
            self._file.close()
            self._file = None

    def _append(self, record: dict) -> None:
        self._records = shortened([*self._records, record])
        self._last = time.monotonic()
        if self._file is not None:
            rounded = {name: round(x, 3) for name, x in record["seconds"].items() if x}
            line = record | {"time": round(record["time"], 3), "seconds": rounded}
            self._file.write(json.dumps(line))


_current: Record | None = None  # of the run that this process is in


def process_age() -> float:
    """Seconds since this process began, but for those before it first imported dpojax."""
    return time.monotonic() - dpojax.BEGAN


@contextlib.contextmanager
def recording(age: float = 0.0) -> Iterator[Record]:
    """Measure the time of a run in the block; `Record.open` keeps it in a file.

    Args:
      age: of the process, in seconds, where the whole process is for this run.
    """
    global _current
    before, record = _current, Record(age)

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.startswith(COMPILING):
            record.stopwatch.compiled(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    _current = record
    try:
        yield record
    finally:
        _current = before
        jax.monitoring.unregister_event_duration_listener(listen)
        record.close()


@contextlib.contextmanager
def spending(bucket: str, hidden: Callable[[], bool] | None = None) -> Iterator[None]:
    """Count the time of a `with` block as `bucket`; blocks may stand in one another.

    Args:
      hidden: says at the end whether the devices have computed a step all the while: then it was a
        step that took the time.
    """
    if _current is None:
        yield
        return
    watch = _current.stopwatch
    before = watch.switch(bucket)
    try:
        yield
    finally:
        watch.switch(before, instead=STEP if hidden is not None and hidden() else "")


def goes_on(stage: str, step: int) -> None:
    """Say that a stage trains on from `step`: from its checkpoint, or, at 0, from its beginning."""
    if _current is not None:
        _current.add(GOES_ON, stage, step)


def saved(stage: str, step: int) -> None:
    """Say that the state of a stage was saved."""
    if _current is not None:
        _current.add(SAVED, stage, step)


def metrics() -> dict[str, float]:
    """The seconds of each bucket so far, of all starts, and the share of goodput, for a line."""
    if _current is None:
        return {}
    _current.beat()
    totals = _current.totals()
    return {f"goodput/{name}": x for name, x in totals.items()} | {"goodput/share": share(totals)}


def read(folder: str | os.PathLike) -> list[dict]:
    """The records of a workdir, in order; [] where there are none."""
    records = storage.read_records(storage.as_path(folder) / FILE)
    return [record | {"seconds": _whole(record)} for record in records if _is_complete(record)]


def split(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each bucket over all processes; they add up to the time since the first start.

    Args:
      records: of all processes, in order; the first says that a process started.
    """
    totals = dict.fromkeys(BUCKETS, 0.0)
    processes = _by_process(records)
    kept = [dict(process[-1]["seconds"]) for process in processes]
    for index, process in enumerate(processes):
        for record in process:
            if record["event"] == GOES_ON:
                _forget_what_is_done_again(processes[:index], kept, record)
    for process, seconds in zip(processes, kept):
        spent = process[-1]["seconds"]
        for name in BUCKETS:
            totals[name] += seconds[name]
            totals[LOST] += spent[name] - seconds[name]
    for before, after in itertools.pairwise(processes):
        totals[DOWN] += max(0.0, after[0]["time"] - before[-1]["time"])
    return totals


def shortened(records: Sequence[dict]) -> list[dict]:
    """The records without beats that a later record of their process replaces."""
    return [
        record
        for record, after in zip(records, [*records[1:], None])
        if record["event"] != BEATS or after is None or after["event"] == STARTED
    ]


def share(totals: Mapping[str, float]) -> float:
    """Train steps that count, as a share of the time in which a process was there."""
    there = sum(totals.values()) - totals[DOWN]
    return totals[STEP] / there if there else 0.0


def describe(records: Sequence[Mapping[str, Any]]) -> str:
    """The split of the time for a person, in lines of at most `WIDTH` columns; "" without records.

    Args:
      records: of `read`.
    """
    if not records:
        return ""
    totals, starts = split(records), len(_by_process(records))
    there = sum(totals.values()) - totals[DOWN]
    shown = [name for name in BUCKETS if totals[name] or name not in (LOST, DOWN)]
    parts = [f"{name} {_duration(totals[name])}".replace(" ", HARD_SPACE) for name in shown]
    over = f" over {starts} starts" if starts > 1 else ""
    first = f"goodput: {100 * share(totals):.1f} % of {_duration(there)}{over} were train steps"
    lines = [line.replace(HARD_SPACE, " ") for line in textwrap.wrap(", ".join(parts), WIDTH)]
    return "\n".join([first, *lines])


def _duration(seconds: float) -> str:
    """`12.3 s`, `4.5 min` or `6.7 h`."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def _by_process(records: Sequence[Mapping]) -> list[list[Mapping]]:
    processes: list[list[Mapping]] = []
    for record in records:
        if record["event"] == STARTED or not processes:
            processes.append([])
        processes[-1].append(record)
    return processes


def _forget_what_is_done_again(
    processes: Sequence[Sequence[Mapping]], kept: list[dict], on: Mapping
) -> None:
    """Keep of earlier processes what they did until the checkpoint that `on` names.

    A process that has not come so far has done nothing that is kept, and the one before it is
    looked at. Another stage than that of `on` came before it, and is done.
    """
    for process, seconds in reversed(list(zip(processes, kept))):
        marks = [record["seconds"] for record in process if _is_before(record, on)]
        for name in DONE_AGAIN:
            seconds[name] = min(seconds[name], marks[-1][name] if marks else 0.0)
        if marks:
            return


def _is_before(record: Mapping, on: Mapping) -> bool:
    if record["event"] not in (GOES_ON, SAVED):
        return False
    return record["stage"] != on["stage"] or record["step"] <= on["step"]


def _is_complete(record: Mapping) -> bool:
    return isinstance(record.get("seconds"), dict) and {"event", "time"} <= record.keys()


def _whole(record: Mapping) -> dict[str, float]:
    return {name: float(record["seconds"].get(name, 0.0)) for name in BUCKETS}
