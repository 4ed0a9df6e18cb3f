"""A run, what disturbs it, and whether it ends as if nothing had.

`faults.c` is preloaded into the run. It counts the changes that the run makes to its files, and
does harm at the n-th of them. `Server` starts runs, `snapshot` says what one has left, and
`judge` compares that with an undisturbed run.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests import QUICK_COMPILES

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE = pathlib.Path(__file__).with_name("faults.c")
CONFIG = pathlib.Path(__file__).with_name("small_run.py")
# What faults.c does at the n-th change: nothing; kill; write half and kill; kill and lose what was
# not synced to the disk; fail once; fail from then on.
COUNT, KILL, TEAR, POWER, FAIL_ONCE, FAIL = range(6)
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
SURVIVOR_SECONDS = 10.0  # in which processes notice that the one that started them is gone
TEXTS = ("data_report.txt", "summary.txt")  # files without a time in them


class Faults(NamedTuple):
    """What happens to a run below its folder: see the numbers above.

    Attributes:
      harm: COUNT to FAIL.
      at: the change at which it happens, from 1.
      error: errno of FAIL_ONCE and FAIL.
      log: a file to which every change is written, or "".
    """

    harm: int = COUNT
    at: int = 0
    error: int = 0
    log: str = ""


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
      status: its exit status; minus the signal that killed it.
      hung: it was killed because it had run for too long; `errors` holds its stacks.
      seconds: that it ran; cpu: seconds of CPU time.
      printed, errors: its standard output and standard error.
      survivors: ids of processes that it had started, and that went on without it.
    """

    status: int
    hung: bool
    seconds: float
    cpu: float
    printed: str
    errors: str
    survivors: tuple[int, ...] = ()


def build(folder: pathlib.Path) -> pathlib.Path:
    """Compile faults.c.

    Raises:
      FileNotFoundError: there is no C compiler `cc`.
    """
    library = folder / "faults.so"
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wno-unused-result"]
    subprocess.run(["cc", *options, "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


class Server:
    """Starts scripts of this repository one after another; use it as a context manager.

    Args:
      folder: for what its runs print.
      library: what `build` returned.
      compiled: for the compiled programs that its runs share.
    """

    def __init__(self, folder: pathlib.Path, library: pathlib.Path, compiled: pathlib.Path):
        folder.mkdir(exist_ok=True)
        self._printed, self._errors = folder / "printed.txt", folder / "errors.txt"
        environment = os.environ | {
            "LD_PRELOAD": str(library),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{QUICK_COMPILES} --xla_force_host_platform_device_count=1",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TF_CPP_MIN_LOG_LEVEL": "1",
            "OPENBLAS_NUM_THREADS": "1",  # threads do not outlive a fork
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(ROOT),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self._child, self._began = 0, 0.0

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        if self._child:
            os.killpg(self._child, signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(self, arguments: Sequence[str], folder: pathlib.Path, faults: Faults) -> None:
        """Start a script with arguments; `faults` count changes below `folder`."""
        request = {
            "arguments": list(arguments),
            "printed": str(self._printed),
            "errors": str(self._errors),
            "faults": [str(folder), *faults],
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        self._child, self._began = int(self._process.stdout.readline()), time.monotonic()

    def wait(self, limit: float, kill_after: float | None = None) -> Ended:
        """Wait for the script.

        Args:
          limit: seconds after which it is taken to hang.
          kill_after: seconds after which it is killed. None: never.
        """
        hung = False
        if kill_after is not None and self._outlives(kill_after):
            os.kill(self._child, signal.SIGKILL)
        elif self._outlives(limit):
            hung = True
            os.kill(self._child, signal.SIGABRT)
            if self._outlives(time.monotonic() - self._began + 5.0):
                os.kill(self._child, signal.SIGKILL)
        status, cpu = self._process.stdout.readline().split()
        seconds = time.monotonic() - self._began
        survivors = _survivors(self._child)
        self._child = 0
        printed, errors = (x.read_text(errors="replace") for x in (self._printed, self._errors))
        code = os.waitstatus_to_exitcode(int(status))
        return Ended(code, hung, seconds, float(cpu), printed, errors, survivors)

    def run(
        self,
        arguments: Sequence[str],
        folder: pathlib.Path,
        faults: Faults = Faults(),  # noqa: B008 (it cannot be changed)
        *,
        limit: float = 600.0,
        kill_after: float | None = None,
    ) -> Ended:
        """`start`, and `wait`."""
        self.start(arguments, folder, faults)
        return self.wait(limit, kill_after)

    def _outlives(self, seconds: float) -> bool:
        """Whether the child still runs so long after its start; returns as soon as it does not."""
        left = max(0.0, self._began + seconds - time.monotonic())
        return not select.select([self._process.stdout], [], [], left)[0]


def _survivors(session: int) -> tuple[int, ...]:
    """Processes of a session that do not end within some seconds; then they are killed."""
    deadline = time.monotonic() + SURVIVOR_SECONDS
    while (living := _processes(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in living:
        os.kill(process, signal.SIGKILL)
    return tuple(living)


def _processes(session: int) -> list[int]:
    """Ids of the living processes of a session."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            # ID (NAME) STATE PARENT GROUP SESSION ...
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def train(folder: pathlib.Path, name: str = "run", **changes) -> list[str]:
    """The command of the small run in folder/name, with some keys changed."""
    keys = [f"--config.{key}={value}" for key, value in changes.items()]
    script = str(ROOT / "scripts" / "train.py")
    return [script, f"--config={CONFIG}", f"--workdir={folder / name}", *keys]


def sweep(folder: pathlib.Path) -> list[str]:
    """The command of its sweep in folder/run."""
    script = str(ROOT / "scripts" / "sweep.py")
    return [script, f"--config={CONFIG}", f"--workdir={folder / 'run'}", "--cpu_devices=1"]


def export(folder: pathlib.Path, run: pathlib.Path) -> list[str]:
    """The command that exports a finished run to folder/run."""
    return [str(ROOT / "scripts" / "export.py"), f"--workdir={run}", f"--out={folder / 'run'}"]


Snapshot = Mapping[str, object]


def snapshot(folder: pathlib.Path) -> Snapshot:
    """What a run has left: the name of every file, with what of its content must not differ.

    Times and speeds may differ, and programs in folder/compiled. Of a tree of arrays (`.../state`)
    it is the arrays' bytes.
    """
    content: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith("compiled"):
            continue
        if any(f"{one}/" in f"{name}/" for one in content if one.endswith("/state")):
            continue
        if path.is_dir():
            content[name] = _arrays(path) if path.name == "state" else None
        elif re.search(r"/(checkpoints|reference)/\d+/", name):
            content[name] = None  # records of files whose names are random
        elif path.name == "goodput.jsonl":
            content[name] = None  # every start adds to it
        elif path.suffix in (".json", ".jsonl"):
            texts = path.read_text(errors="replace").replace(str(folder), "FOLDER")
            texts = texts.splitlines() if path.suffix == ".jsonl" else [texts]
            content[name] = [_without_times(text) for text in texts]
        elif path.suffix in (".npy", ".arrow", ".safetensors") or path.name in TEXTS:
            content[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content[name] = None
    return content


def _arrays(folder: pathlib.Path) -> dict[str, str]:
    """Hashes of all that an Orbax tree holds, by key; read without Orbax, and without its files'
    names, which are random."""
    import tensorstore as ts

    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    try:
        store = ts.KvStore.open(spec).result()
        values = {key.decode(): store.read(key).result().value for key in store.list().result()}
    except ValueError as error:
        return {"unreadable": str(error)[:80]}
    return {key: hashlib.sha256(value).hexdigest() for key, value in values.items()}


def _without_times(text: str) -> object:
    try:
        values = json.loads(text)
    except ValueError:
        return text
    if not isinstance(values, dict):
        return values
    free = ("time", "perf/", "goodput/", "memory/", "compilation_cache")
    return {key: value for key, value in values.items() if not key.startswith(free)}
