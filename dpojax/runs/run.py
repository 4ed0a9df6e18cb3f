"""A whole run: the stages of a config in one workdir, resumed where they stopped.

    python -m dpojax.runs.run --config=CONFIG --workdir=WORKDIR

is the command of a job. It takes config files in Python and the keys --config.KEY=VALUE, as
scripts/train.py does, and configs that were written as JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import jax
from ml_collections import ConfigDict

from dpojax import display, sharding, stopping, storage
from dpojax.config.command_line import ArgumentParser, parse_config_words
from dpojax.config.resolved import ResolvedRun
from dpojax.config.saved import (
    code_changed,
    compare_config,
    write_or_compare_config,
)
from dpojax.runs.base_files import keep_base_files
from dpojax.runs.certificate import require_certified
from dpojax.runs.command import run_command
from dpojax.runs.machine import machine_of, machine_text
from dpojax.runs.workdirs import FINISHED, require_writable, workdir_lock, write_failure
from dpojax.stages import kept_weights
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import initial_params, prepare_setup
from dpojax.stages.stage import Stage, Summary, require_memory
from dpojax.training import goodput
from dpojax.training.compilation_cache import shared_programs
from dpojax.training.goodput import process_age
from dpojax.training.loop import NonFiniteLoss
from dpojax.training.metrics import read_metrics
from dpojax.training.preemption import StopSignal
from dpojax.watchdog import watching

CURVES = "training_curves.png"


def run(config: ConfigDict, workdir: str | storage.Path, *, age: float = 0.0) -> None:
    """Train the stages that `config` names, print and save what came of them.

    The same call in the same workdir resumes. A finished run only prints its summary again.

    Args:
      age: seconds that the process has needed until now for this run, such as for its imports.

    Raises:
      ConfigError, DataError: before anything is trained; no checkpoint is changed.
      Preempted: asked to stop (SIGTERM, SIGINT, SIGHUP), once the state is saved.
      NonFiniteLoss, ReferenceMismatch, CheckpointError, RewardError: while it trains.
    """
    run_resolved(resolve(config, workdir), age)


def run_resolved(resolved: ResolvedRun, age: float = 0.0) -> None:
    """`run`, of a config that is resolved already."""
    stopping.use_stop_code(resolved.config.exit_code_when_stopped)
    if resolved.config.distributed:
        sharding.start_distributed()
    compare_config(resolved)  # before data are read, which may take an hour
    if not sharding.agreed((resolved.workdir / FINISHED).exists()):
        require_writable(resolved.workdir)
        with (
            shared_programs(resolved.config.compilation_cache),
            watching(resolved.config.hang_minutes),
            goodput.recording(age) as record,
        ):
            _run(resolved, record)
    _show(resolved.workdir)


def _run(resolved: ResolvedRun, record: goodput.Record) -> None:
    require_certified(resolved)
    setup = prepare_setup(resolved)
    opened = [open_stage(setup, name) for name in resolved.config.stages]
    stages = [stage.prepare() for stage in opened]  # data are read once no stage can be refused
    for stage in stages:
        require_memory(stage)
    with workdir_lock(resolved.workdir), jax.set_mesh(setup.mesh), StopSignal() as stop:
        write_or_compare_config(resolved)  # another run may have begun here meanwhile
        record.open(resolved.workdir, machine_of(setup))
        keep_base_files(setup)
        announce(stages)
        finished = train_in_turn(stages, partial(initial_params, setup), stop)
        with goodput.spending(goodput.EVALUATION), display.doing("summary and figures"):
            finish(stages[-1], stages[-1].summarise(finished()))


def announce(stages: Sequence[Stage]) -> None:
    """Say what every stage is about to do, and keep the reports on its data."""

    def say() -> None:
        display.say(machine_text(machine_of(stages[-1].setup)))
        if warning := code_changed(stages[0].setup.workdir):
            display.say(f"\n{warning}")
        if warning := random_start(stages[0]):
            display.say(f"\n{warning}")
        for stage in stages:
            lines = [stage.save_reports(), stage.describe()]
            display.say("\n" + "\n".join(filter(None, lines)))

    sharding.on_first_process(say)


def random_start(first: Stage) -> str:
    """A sentence where a run aligns a model that has never learned any language; else ""."""
    if first.setup.config.model.path or first.name not in ("preference", "ppo", "reward"):
        return ""
    return (
        f"{first.name}: WARNING: config.model.path is empty and no stage comes before, so it "
        "starts from random weights, which know no language; set config.model.path to a policy, or "
        "begin config.stages with sft"
    )


def train_in_turn(
    stages: Sequence[Stage], start: Callable[[], dict], stop: StopSignal
) -> Callable[[], dict]:
    """Train stage after stage from the parameters start(); return what gives the last ones.

    The weights of a stage that is trained already are read when they are needed, and not before.
    """

    def trained(params: dict) -> dict:
        return params

    def trained_before(stage: Stage, start: Callable[[], dict]) -> dict:
        kept_weights.mend(stage.kept_weights(start))  # these, and the summary, may read them
        return stage.trained_params()

    for stage in stages:
        if stage.is_trained:
            start = partial(trained_before, stage, start)
        else:
            start = partial(trained, stage.train(start, stop))
    return start


def finish(stage: Stage, summary: Summary | None) -> None:
    """Draw the curves of a run, and write finished.json with the summary of its last stage."""
    if jax.process_index() == 0:
        from dpojax.evaluation import plots  # matplotlib, which only a run's end wants

        workdir = stage.setup.workdir
        curves = {name: read_metrics(workdir / name) for name in stage.setup.config.stages}
        plots.training_curves(curves, workdir / CURVES)
        storage.write_json(workdir / FINISHED, {} if summary is None else {stage.name: summary})


def _show(workdir: storage.Path) -> None:
    """Print what a finished run found, where its figure is, and where its time went."""
    if jax.process_index() == 0:
        for summary in sorted(workdir.glob("*/summary.txt")):
            display.say(f"\n{storage.read_text(summary)}")
        display.say(f"curves: {workdir / CURVES}")
        if text := goodput.describe(goodput.read(workdir)):
            display.say(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of a job: see above.

    Raises:
      what `run` raises; a loss that is not finite is written into --failure_file first.
    """
    parser = ArgumentParser(prog="python -m dpojax.runs.run", description=run.__doc__)
    parser.add_argument("--config", required=True, help="a config in Python or JSON")
    parser.add_argument("--workdir", required=True, help="where the run keeps everything")
    parser.add_argument("--failure_file", default="", help="where to write why the loss was NaN")
    words = parse_config_words(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(words.rest)
    try:
        run(words.value, options.workdir, age=process_age() if arguments is None else 0.0)
    except NonFiniteLoss as error:
        if options.failure_file:
            write_failure(storage.as_path(options.failure_file), str(error))
        raise


if __name__ == "__main__":
    run_command(main)
