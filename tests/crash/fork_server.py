"""Runs scripts in children that have imported everything: a trial costs seconds less.

    LD_PRELOAD=faults.so python -m tests.crash.fork_server

reads one request a line from standard input, as `harness.Server` writes it. It answers with the
child's process id, and once the child has ended with its wait status and its CPU seconds.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import runpy
import signal
import sys

# What a run imports, early or late. None of it may start JAX's backend, which has threads.
MODULES = (
    "dpojax.evaluation.plots",
    "dpojax.evaluation.sweep_figure",
    "dpojax.runs.export",
    "dpojax.runs.run",
    "dpojax.sweeps.sweep",
    "jaxlib.mlir.dialects.builtin",
    "jaxlib.mlir.dialects.mhlo",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "ml_collections.config_flags",
    "pandas",
    "PIL.PngImagePlugin",
    "pyarrow.compute",
    "pyarrow.ipc",
    "scipy.stats",
    "transformers",
)
PR_SET_PDEATHSIG = 1  # of prctl: a process gets the signal when its parent ends


def main() -> None:
    end_with_parent()
    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what was imported is not searched for garbage again and again
    gc.set_threshold(20_000, 20, 50)
    for line in sys.stdin:
        request = json.loads(line)
        if not (child := os.fork()):
            become(**request)
            return
        print(child, flush=True)
        _, status, used = os.wait4(child, 0)
        print(status, used.ru_utime + used.ru_stime, flush=True)


def become(arguments: list[str], printed: str, errors: str, faults: list) -> None:
    """Run a script as a shell would, in a session of its own, with its output in files."""
    end_with_parent()
    os.setsid()
    for target, path in enumerate((os.devnull, printed, errors)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, target)
        os.close(opened)
    faulthandler.enable()  # SIGABRT prints the stacks of a child that hangs
    if faults:
        below, harm, at, error, log = faults
        arm = ctypes.CDLL(None).faults_arm
        arm(below.encode(), harm, ctypes.c_long(at), error, log.encode())
    sys.argv = arguments
    sys.path[0] = os.path.dirname(arguments[0])
    runpy.run_path(arguments[0], run_name="__main__")


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
