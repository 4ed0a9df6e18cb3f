"""Tokenises chunks of records in other processes, in order.

The processes are started by a plain command, not forked: JAX has threads, which a fork would break.
Nor are they started by `multiprocessing`, which runs the user's main script again.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pathlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dpojax.data import worker
from dpojax.data.example_maker import ExampleMaker
from dpojax.data.examples import Examples
from dpojax.data.records import DataError, Record
from dpojax.data.report import Report
from dpojax.data.templates import LimitExceeded
from dpojax.data.tokenize_config import TokenizeConfig

Made = tuple[Examples, Report]

COMMAND = "from dpojax.data.worker import serve; serve()"
LIMITS = worker.Limits()
MOST = 16  # processes that `cores` gives at most: one process reads the records for all of them


def cores() -> int:
    """How many processes may run at once."""
    usable = getattr(os, "sched_getaffinity", None)
    return min(MOST, len(usable(0)) if usable else os.cpu_count() or 1)


class WorkerLost(Exception):
    """The other process has ended."""


class Worker:
    """One other process."""

    def __init__(self, threads: int | None) -> None:
        root = str(pathlib.Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if threads is not None:
            environment.setdefault("RAYON_NUM_THREADS", str(threads))
        self.process = subprocess.Popen(
            [sys.executable, "-c", COMMAND],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C and a lost terminal are this process's to answer
        )

    def ask(self, kind: str, content: Any) -> Any:
        """Send a request, and return what it gives.

        Raises:
          DataError: as there.
          WorkerLost: the process has ended.
        """
        try:
            worker.write(self.process.stdin, (kind, content))
            reply, result = worker.read(self.process.stdout)
        except (OSError, EOFError, ValueError) as error:
            raise WorkerLost from error
        if reply == worker.DATA_ERROR:
            raise result
        if reply == worker.FAILED:
            raise RuntimeError(f"tokenising in another process failed:\n{result}")
        return result

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was not written any more
                stream.close()


_idle: list[Worker] = []  # at most one, so that the next call need not start another
_idle_lock = threading.Lock()


@atexit.register
def end_idle() -> None:
    """End the process that waits for the next call."""
    with _idle_lock:
        while _idle:
            _idle.pop().end()


class Pool:
    """Makes examples in other processes, which start when they are needed.

    Args:
      make: what makes them.
      most: number of other processes.
      threads: of the tokenizer in each of them; None is one for each core.
    """

    def __init__(self, make: ExampleMaker, most: int, threads: int | None = None) -> None:
        self._maker, self._tokenizer_threads = make, threads
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="tokenise")
        self._lock = threading.Lock()
        self._free: list[Worker] = []
        self._busy: list[Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            for each in list(self._busy):  # nobody wants what they make
                each.process.kill()
        self._threads.shutdown()
        with _idle_lock:
            if not _idle and self._free and self._tokenizer_threads is None:
                _idle.append(self._free.pop())
        for each in self._free:
            each.end()

    def submit(self, records: Sequence[Record], *, here: bool = False) -> Future[Made]:
        """Make the examples of a chunk: in another process, or now and in this one."""
        if here:
            made: Future[Made] = Future()
            made.set_result(self._maker(records))
            return made
        # Pickled before this process makes examples itself, which changes the maker's counts.
        return self._threads.submit(self._make, records, self._setup)

    @functools.cached_property
    def _setup(self) -> bytes:
        return pickle.dumps((self._maker, LIMITS))

    def _make(self, records: Sequence[Record], setup: bytes) -> Made:
        with self._lock:
            each = self._free.pop() if self._free else None
        each = each or self._start(setup)
        self._busy.append(each)
        try:
            made = each.ask(worker.CHUNK, records)
        except WorkerLost:
            self._busy.remove(each)
            each.end()
            raise LimitExceeded(
                f"{records[0].id} to {records[-1].id}: the process that tokenises these records "
                "was killed: their chat template does not end or fills the memory, or the system "
                "ran out of memory. Set config.chat_template to another one, or config.num_proc=1"
            ) from None
        except DataError:
            self._release(each)
            raise
        self._release(each)
        return made

    def _release(self, each: Worker) -> None:
        with self._lock:
            self._busy.remove(each)
            self._free.append(each)

    def _start(self, setup: bytes) -> Worker:
        """A process that is ready: the idle one, if it still lives, or a new one."""
        with _idle_lock:
            idle = _idle.pop() if _idle and self._tokenizer_threads is None else None
        if idle is not None:
            try:
                idle.ask(worker.SETUP, setup)
                return idle
            except WorkerLost:  # it ended, since nothing came for a while
                idle.end()
        new = Worker(self._tokenizer_threads)
        try:
            new.ask(worker.SETUP, setup)
        except WorkerLost:
            new.end()
            raise DataError(
                "the process that should tokenise ended at once; its last words stand above"
            ) from None
        return new


def check_template(tokenizer: Any, dialogue: Sequence[Mapping[str, str]]) -> None:
    """Render a plain dialogue in another process, before its template is called in this one.

    Args:
      tokenizer: a `transformers` tokenizer.
      dialogue: messages of the user and the assistant.

    Raises:
      LimitExceeded: the chat template takes too much time or memory.
    """
    if not getattr(tokenizer, "chat_template", None):
        return
    record = Record("a plain dialogue", tuple(dialogue[:-1]), (tuple(dialogue[-1:]),))
    make = ExampleMaker(tokenizer, TokenizeConfig(append_eos=False))
    try:
        with Pool(make, 1) as pool:
            pool.submit([record]).result()
    except LimitExceeded:
        raise
    except DataError:
        pass  # the template is wanted, and then refused, only where the data hold messages
