"""Runs that differ in traced numbers alone, trained as one program over one pass of the data.

Each has a workdir of its own, which in the end holds what scripts/train.py would have made there,
but for speeds in the metrics and checkpoints before the last. While they train, one checkpoint
holds all of them.

    python -m dpojax.sweeps.group --members=MEMBERS.json --folder=FOLDER

trains the members of a JSON list of {"config": ..., "workdir": ...}.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import jax

from dpojax import display, sharding, stopping, storage
from dpojax.config.command_line import ArgumentParser
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import ResolvedRun
from dpojax.config.saved import compare_config, config_from_json, write_or_compare_config
from dpojax.runs.base_files import keep_base_files
from dpojax.runs.command import run_command
from dpojax.runs.machine import machine_of
from dpojax.runs.run import announce, finish, train_in_turn
from dpojax.runs.workdirs import (
    FAILED,
    failure_of,
    has_ended,
    share_folder,
    share_stages,
    short_hash,
    workdir_lock,
    write_failure,
)
from dpojax.stages.example_stage import ExampleStage
from dpojax.stages.kept import new_stop_at
from dpojax.stages.references import check_identity, scores_at_start
from dpojax.stages.registry import open_stage, resolve
from dpojax.stages.setup import initial_params, prepare_setup, with_scalar_params
from dpojax.stages.stage import Stage, open_metrics, require_memory
from dpojax.stages.train import Evaluator, frozen_weights, open_evaluator, speed_on
from dpojax.sweeps.layout import begun_layout, group_folder, mesh_with_members
from dpojax.sweeps.members import same_program
from dpojax.sweeps.program import MemberProgram
from dpojax.training import goodput
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.health import Health
from dpojax.training.loop import Every, NonFiniteLoss
from dpojax.training.metrics import read_metrics
from dpojax.training.preemption import StopSignal
from dpojax.training.stop_at import STOP_AT
from dpojax.training.vectorised_loop import (
    Member,
    MemberChunk,
    Orders,
    Resumed,
    VectorisedLoop,
    resume,
)
from dpojax.watchdog import watching


def train_group(
    runs: Sequence[ResolvedRun], folder: storage.Path, age: float = 0.0
) -> dict[str, str]:
    """Train every run that is not finished; the same call goes on where it was stopped.

    Stages before the last are trained once, in the first workdir, and given to the others.

    Args:
      runs: such that `same_program` puts them together.
      folder: for the checkpoints of all of them while they train.
      age: seconds that the process has needed until now for these runs.

    Returns:
      why runs failed, by the names of their workdirs; the others are finished.

    Raises:
      what `run.run` raises.
    """
    if len(same_program(runs)) > 1:
        raise ConfigError("these runs differ in more than one program can vary")
    stopping.use_stop_code(runs[0].config.exit_code_when_stopped)
    workdirs = [run.workdir for run in runs]
    if not all(map(has_ended, workdirs)):
        with watching(runs[0].config.hang_minutes), goodput.recording(age) as record:
            _train(runs, folder, record)
        if jax.process_index() == 0 and (text := goodput.describe(goodput.read(workdirs[0]))):
            display.say(text)
    sharding.agreed(True)  # what the first process wrote is there, and nobody reads checkpoints
    if jax.process_index() == 0:
        storage.remove_folder(group_folder(workdirs, folder))
    return {path.name: why for path in workdirs if (why := failure_of(path))}


def _train(runs: Sequence[ResolvedRun], folder: storage.Path, record: goodput.Record) -> None:
    """Train all runs, finished ones included, so that a repeated call makes the same plan."""
    for run in runs:
        compare_config(run)
    setup = prepare_setup(runs[0], vmapped=True)
    *opened, last = [open_stage(setup, name) for name in setup.config.stages]
    before, loaded = [stage.prepare() for stage in opened], last.load()
    group = Group([loaded.for_member(run) for run in runs], folder)
    stages = [*before, group.lead.stepping_on(group.mesh)]
    for stage in stages:
        require_memory(stage)
    with contextlib.ExitStack() as during:
        for run in runs:
            during.enter_context(workdir_lock(run.workdir))
            write_or_compare_config(run)
            keep_base_files(setup._replace(run=run))
        record.open(setup.workdir, machine_of(stages[-1].setup))
        during.enter_context(jax.set_mesh(setup.mesh))
        stop = during.enter_context(StopSignal())
        announce(stages)
        if setup.config.profile and jax.process_index() == 0:
            display.say("config.profile: nothing is profiled of members that train together")
        group.compile()  # what does not fit is refused before anything is loaded
        try:
            start = train_in_turn(before, partial(initial_params, setup), stop)
        except NonFiniteLoss as error:
            for run in runs:
                write_failure(run.workdir / FAILED, str(error))
        else:
            _share_stages(group)
            group.train(start, stop)


def _share_stages(group: Group) -> None:
    """Give the stages before the last to all members, and the reports on the last one's data."""
    for stage in group.stages[1:]:
        share_stages(group.lead.setup.workdir, stage.setup.workdir, ignore=(stage.name,))
        if jax.process_index() == 0:
            stage.save_reports()


class Group:
    """Stages of members that differ in traced numbers alone, and what they share.

    Args:
      stages: of the members, with their data.
      folder: for the checkpoints of all groups.
    """

    def __init__(self, stages: Sequence[ExampleStage], folder: storage.Path):
        self.folder = group_folder([stage.setup.workdir for stage in stages], folder)
        seeds = list(dict.fromkeys(stage.batches.seed for stage in stages))
        self.order_of = [seeds.index(stage.batches.seed) for stage in stages]
        longest = max(stages, key=_steps)
        # As long as the longest member: a shorter one's batches are the first of them.
        every = [longest.batches_with_seed(seed) for seed in seeds]
        begun = begun_layout(self.folder)
        self.mesh = mesh_with_members(stages[0].setup, len(stages), begun, self.folder)
        shape = stages[0].shape_for(every, mesh=self.mesh)
        self.orders = [batches.with_shape(shape) for batches in every]
        self.stages = [stage.with_shape(shape) for stage in stages]
        self.lead = self.stages[0]
        self.program = MemberProgram(self.stages, self.order_of, self.mesh, begun, self.folder)
        self.at_once = 0  # 0: all members are trained already
        self.first_scores = None  # of the policy at step 0, once it was scored

    def compile(self) -> None:
        """Compile the step, unless all members are trained, and choose how many go at once.

        Raises:
          ConfigError: see `MemberProgram.compile`.
        """
        if not all(map(_is_trained, self.stages)):
            self.at_once = self.program.compile()

    def train(self, start: Callable[[], dict], stop: StopSignal) -> None:
        """All members, as many at once as memory holds; start() -> parameters to begin with."""
        if self.at_once:
            self._train(start, stop)
        self._finish(range(len(self.stages)), {})

    def _train(self, start: Callable[[], dict], stop: StopSignal) -> None:
        lead = self.lead
        params = start()
        if lead.setup.model.config.scalar_head:
            params = with_scalar_params(lead.setup, params)
        base = None if lead.adapters is None else lead.adapters.keep_base(params)
        with contextlib.ExitStack() as writing:
            reference = lead.open_reference(params, base, stop, writing)
        for stage in self.stages[1:]:
            for name in ("reference", "base", "reference_logprobs"):
                share_folder(lead.folder / name, stage.folder / name)
        trained = params if base is None else lead.adapters.start(lead.setup.config.seed)
        evaluator = open_evaluator(lead, base, reference)
        for first in range(0, len(self.stages), self.at_once):
            indices = range(first, min(first + self.at_once, len(self.stages)))
            self._train_at_once(indices, trained, evaluator, stop)

    def _train_at_once(
        self, indices: range, trained: dict, evaluator: Evaluator, stop: StopSignal
    ) -> None:
        """Some members, from step 0 or from their checkpoint, to the end."""
        ended = {i for i in indices if _is_trained(self.stages[i])}
        errors: dict[int, str] = {}
        if len(ended) < len(indices):
            folder = self.folder / short_hash([self.stages[i].setup.workdir.name for i in indices])
            with contextlib.ExitStack() as during:
                saved = during.enter_context(Checkpoints(folder, max_checkpoints=1))
                errors = self._loop(indices, ended, trained, evaluator, saved, during, stop)
        self._finish(indices, errors)

    def _loop(
        self,
        indices: range,
        ended: set[int],
        trained: dict,
        evaluator: Evaluator,
        saved: Checkpoints,
        during: contextlib.ExitStack,
        stop: StopSignal,
    ) -> dict[int, str]:
        """Train the members at `indices`; return why some failed."""
        program, config, reference = self.program, self.lead.setup.config, evaluator.reference
        batches = Orders([order.training(reference.attach) for order in self.orders])
        per_call = program.members_per_call
        chunks = [indices[k : k + per_call] for k in range(0, len(indices), per_call)]
        resumed = resume(saved, program.abstract, len(chunks), batches)
        states, done, failed, tallies, stops = resumed or Resumed([], None, {}, {}, {})
        if resumed is None:
            evaluator = self._with_first_scores(evaluator, trained)
        members = {i: _member(self.stages[i], evaluator, during, done, i in ended) for i in indices}
        for i, member in members.items():
            member.error = failed.get(member.name, "")
            member.tally.restore(tallies.get(member.name))
            if member.stop_at is not None:
                member.stop_at.restore({STOP_AT: stops.get(member.name)})
            if resumed is None and not member.ended:
                _begin(member, self.stages[i], evaluator)
        hyperparameters_of = [program.hyperparameters(chunk, ended) for chunk in chunks]
        if resumed is None:
            states = [program.new_states(trained, values) for values in hyperparameters_of]
        frozen = frozen_weights(evaluator.base, reference)
        loop = VectorisedLoop(
            stage=self.lead.name,
            step=lambda states, rows, values: program.step(states, rows, values, frozen),
            take_member=program.take_member,
            batches=batches,
            place=partial(program.place, chunks, reference),
            rows_of=lambda batch, chunk, index: batch[self.order_of[chunks[chunk][index]]],
            every=Every(config.log_every, config.evaluate_every, config.checkpoint_every),
            examples=self.lead.batches.data.examples,
            checkpoints=saved,
            stop=stop,
            speed=speed_on(self.mesh, self.lead),
        )
        loop(
            [
                MemberChunk([members[i] for i in chunk], chunk_states, values)
                for chunk, chunk_states, values in zip(chunks, states, hyperparameters_of)
            ],
            done or 0,
        )
        return {i: member.error for i, member in members.items()}

    def _with_first_scores(self, evaluator: Evaluator, trained: dict) -> Evaluator:
        """With what the policy that all members start from scores, where that is the reference."""
        lead = self.lead
        if lead.starts_at_reference and self.first_scores is None:
            policy = lead.policy_params(evaluator.base, trained)
            self.first_scores = scores_at_start(lead, policy, evaluator.reference)
        return evaluator._replace(first_scores=self.first_scores)

    def _finish(self, indices: range, errors: dict[int, str]) -> None:
        """Summarises members that have no summary yet, and writes why others failed."""
        summarise = None
        for index in indices:
            stage = self.stages[index]
            if has_ended(stage.setup.workdir):
                continue
            if why := errors.get(index):
                write_failure(stage.setup.workdir / FAILED, why)
                continue
            what = f"summary of {stage.setup.workdir.name}"
            with goodput.spending(goodput.EVALUATION), display.doing(what):
                summarise = summarise or stage.open_summary()
                finish(stage, summarise(stage, stage.trained_params()))


def _steps(stage: ExampleStage) -> int:
    return stage.steps


def _is_trained(stage: Stage) -> bool:
    """Whether a member has ended, or its final state is on disk already."""
    return has_ended(stage.setup.workdir) or stage.is_trained


def _member(
    stage: ExampleStage,
    evaluator: Evaluator,
    during: contextlib.ExitStack,
    done: int | None,
    ended: bool,
) -> Member:
    """What a member has of its own; open as long as `during`."""
    name = stage.setup.workdir.name
    if ended:
        return Member(name, stage.steps, ended=True)
    most = stage.setup.config.max_checkpoints
    saved = Checkpoints(stage.checkpoint_folder, max_checkpoints=most)
    return Member(
        name=name,
        steps=stage.steps,
        evaluate=partial(evaluator, stage),
        writer=during.enter_context(open_metrics(stage, done)),
        checkpoints=during.enter_context(saved),
        stop_at=new_stop_at(stage.config),
        health=Health(read_metrics(stage.folder, "eval")),
    )


def _begin(member: Member, stage: ExampleStage, evaluator: Evaluator) -> None:
    """Check at step 0 that the policy is the reference, if the stage has one."""
    if evaluator.first_scores is not None:
        identity = check_identity(stage, evaluator.first_scores, evaluator.reference)
        member.writer.write(0, identity, split="identity")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of a job: see above."""
    parser = ArgumentParser(
        prog="python -m dpojax.sweeps.group",
        description="Train runs that differ in traced numbers alone as one program.",
    )
    parser.add_argument("--members", required=True, help='JSON: [{"config", "workdir"}, ...]')
    parser.add_argument("--folder", required=True, help="for checkpoints while they train")
    options = parser.parse_args(arguments)
    path = storage.as_path(options.members, "--members")
    members = storage.read_json(path)
    with storage.damage_named(path):
        pairs = [(dict(member["config"]), str(member["workdir"])) for member in members]
    runs = [resolve(config_from_json(x, where=options.members), workdir) for x, workdir in pairs]
    if runs[0].config.distributed:
        sharding.start_distributed()
    age = goodput.process_age() if arguments is None else 0.0
    failed = train_group(runs, storage.as_path(options.folder, "--folder"), age)
    for name, why in failed.items():
        print(f"{name} failed: {why}")


if __name__ == "__main__":
    run_command(main)
