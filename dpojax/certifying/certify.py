"""Makes the certificate of a config: measures all variants, judges them, and writes it down."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from dpojax import display, storage
from dpojax.certifying.measure import Measurement
from dpojax.certifying.report import as_markdown
from dpojax.certifying.verdict import Verdict, judge
from dpojax.certifying.worker import MEASURED, Measured, Plan, read_measurement
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import as_json, workdir_path
from dpojax.runs.certificate import CERTIFICATE, Conditions, flags_in_force
from dpojax.watchdog import beat

MARKDOWN = "certificate.md"
UNDER_WAY = "certificate.unfinished"  # folder of measurements, until they are judged
TPU_FLAG = "--xla_tpu_"  # begins the flags that libtpu reads
LOG_PREFIX = re.compile(r"^[IWEF]\d{4} \S+\s+\d+ \S+\] ")  # of XLA: level, date, time, thread, file


def certify(
    config: ConfigDict,
    workdir: str | storage.Path,
    *,
    steps: int,
    is_small: bool,
    devices: int = 0,
    flag_sets: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure the first steps of a config under all variants, and write the certificate.

    Args:
      config: of the run.
      workdir: of the run; certificate.json and certificate.md are written there.
      steps: of each variant.
      is_small: whether the model is shrunken.
      devices: of a CPU; 0 takes those that are there.
      flag_sets: flags of XLA, each set in one line. They are added to those in force, in a process
        of their own.

    Returns:
      the content of certificate.json.

    Raises:
      ConfigError: the config could not be measured as it is; nothing is written.
    """
    if config.distributed:
        raise ConfigError(
            "config.distributed: a certificate is made by one process; make it on one host, with "
            "--small for a model that does not fit there, and --config.distributed=False"
        )
    folder = workdir_path(workdir)
    scratch = folder / UNDER_WAY
    storage.remove_folder(scratch)
    scratch.mkdir(parents=True)
    try:
        plan = Plan(as_json(config), "", steps, is_small, devices)
        certificate = _certificate(plan, flag_sets, scratch)
    finally:
        storage.remove_folder(scratch)
    storage.write_text(folder / MARKDOWN, as_markdown(certificate))
    storage.write_json(folder / CERTIFICATE, certificate)
    return certificate


def _certificate(plan: Plan, flag_sets: Sequence[str], scratch: storage.Path) -> dict[str, Any]:
    """Measure, and judge; a process for the flags in force, and one for each further set."""
    here = _measure_here(plan, scratch / "0")
    first, *others = here["variants"]
    exact = read_measurement(scratch / "0" / first.file)
    entries = [_entry(one, scratch / "0", exact) for one in others]
    for number, flags in enumerate(flag_sets, 1):
        with_flags = plan._replace(flags=flags)
        entries.append(_entry_of_flags(with_flags, scratch / str(number), exact, others[0]))
    return {
        "stage": here["stage"],
        "steps": plan.steps,
        "small": plan.is_small,
        "passes": all(entry["passes"] for entry in entries),
        "float32": {
            "name": first.variant["name"],
            "losses": exact.losses.tolist(),
            "first_batch": exact.first_batch.tolist(),
        },
        "variants": entries,
    }


def _measure_here(plan: Plan, folder: storage.Path) -> dict[str, Any]:
    """What the process without further flags has measured."""
    ended, _ = _run(plan, folder)
    if ended.returncode:
        raise ConfigError(f"the config as it is could not be measured: {_last_words(ended)}")
    return _read(folder)


def _entry_of_flags(
    plan: Plan, folder: storage.Path, exact: Measurement, configured: Measured
) -> dict:
    """The entry of a flag set; one whose process ends with an error has failed."""
    ended, environment = _run(plan, folder)
    if not ended.returncode:
        (measured,) = _read(folder)["variants"]
        return _entry(measured, folder, exact)
    conditions = Conditions(**configured.conditions)._replace(flags=flags_in_force(environment))
    variant = configured.variant | {"name": plan.flags, "flags": plan.flags.split()}
    failed = configured._replace(
        variant=variant, key=conditions.hash, conditions=conditions._asdict()
    )
    why = f"its process ended with status {ended.returncode}: {_last_words(ended)}"
    return _as_json(failed, Verdict(False, why))


def _run(plan: Plan, folder: storage.Path) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
    """Run a process that measures; what it prints is shown, its errors are kept."""
    folder.mkdir(parents=True)
    storage.write_json(folder / "plan.json", plan._replace(folder=str(folder))._asdict())
    environment = environment_with(plan.flags)
    command = [sys.executable, "-m", "dpojax.certifying.worker", f"--plan={folder / 'plan.json'}"]
    ended = run_process(command, environment)
    return ended, environment


def run_process(command: Sequence[str], env: dict[str, str]) -> subprocess.CompletedProcess:
    """Run a command, show what it prints line by line, and keep its standard error."""
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        errors: list[str] = []

        def read_errors() -> None:
            errors.append(process.stderr.read())

        reader = threading.Thread(target=read_errors)
        reader.start()
        for line in process.stdout:
            beat(line.strip())
            display.say(line.rstrip())
        reader.join()
    return subprocess.CompletedProcess(command, process.returncode, "", "".join(errors))


def environment_with(flags: str) -> dict[str, str]:
    """This process's environment with further flags of XLA; those of TPUs are libtpu's."""
    environment = dict(os.environ)
    for flag in flags.split():
        name = "LIBTPU_INIT_ARGS" if flag.startswith(TPU_FLAG) else "XLA_FLAGS"
        environment[name] = f"{environment.get(name, '')} {flag}".strip()
    return environment


def _read(folder: storage.Path) -> dict[str, Any]:
    content = storage.read_json(folder / MEASURED, fields={"stage": str, "variants": list})
    return content | {"variants": [Measured(**one) for one in content["variants"]]}


def _entry(measured: Measured, folder: storage.Path, exact: Measurement) -> dict[str, Any]:
    """A variant with its verdict, as certificate.json has it."""
    if measured.left_out:
        return _as_json(measured, Verdict(True, f"left out: {measured.left_out}"))
    variant = read_measurement(folder / measured.file)
    return _as_json(measured, judge(exact, variant, is_exact=measured.is_exact))


def _as_json(measured: Measured, verdict: Verdict) -> dict[str, Any]:
    return {
        "name": measured.variant["name"],
        "passes": verdict.passes,
        "why": verdict.why,
        "bounds": "exact" if measured.is_exact else "rounded",
        "measures": None if verdict.measures is None else _finite(verdict.measures._asdict()),
        "key": measured.key,
        "conditions": measured.conditions,
        "variant": measured.variant,
    }


def _finite(measures: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in measures.items()}


def _last_words(ended: subprocess.CompletedProcess) -> str:
    """The last paragraph of what a process wrote about its end."""
    paragraphs = [part for part in ended.stderr.strip().split("\n\n") if part.strip()]
    lines = paragraphs[-1].strip().splitlines() if paragraphs else ["it said nothing"]
    text = " ".join(lines) if len(lines) <= 3 else lines[-1]
    return LOG_PREFIX.sub("", text)
