"""Runs that differ in traced numbers alone, trained as one program over one pass of the data.

Each has a workdir of its own, which in the end holds what scripts/train.py would have made there,
but for speeds in the metrics and checkpoints before the last. While they train, one checkpoint
holds all of them.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from dpojax import sharding
from dpojax.config.checks import ConfigError, check, fill_in, flat, loss_options, only_run, record
from dpojax.data.pipeline import train_batches
from dpojax.data.rows import Rows
from dpojax.jobs.plan import write_json
from dpojax.logprobs import TokenStatistics
from dpojax.runs import run as runs
from dpojax.runs.workdirs import digest, ended, failure_of, say_failed, share, share_folder
from dpojax.sharding import ROWS, SWEEP
from dpojax.stages import setup as run_setup
from dpojax.stages import stage as stages
from dpojax.stages.data import EMBEDDED
from dpojax.stages.references import Reference, check_identity, first_scores
from dpojax.stages.stage import Stage
from dpojax.stages.train import (
    Evaluator,
    abstract_beside,
    abstract_frozen,
    abstract_of,
    make_step,
    open_evaluator,
    policy_of,
    reference_of,
)
from dpojax.sweeps.layout import LANES, Layout, begun, folder_of, mesh_of
from dpojax.training import memory
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.loop import Every, NonFiniteLoss, StopSignal
from dpojax.training.metrics import MetricWriter
from dpojax.training.state import initial_state, make_optimizer
from dpojax.training.vectorised_loop import Member, MemberChunk, Orders, VectorisedLoop, resume
from dpojax.training.vectorised_step import (
    MemberHyperparameters,
    abstract_member_states,
    build_take_member,
    build_vectorised_step,
    new_member_states,
    stack,
)

PACE = ("learning_rate", "warmup_steps", "steps", "epochs")


def traced(config: ConfigDict) -> frozenset[str]:
    """The keys in which runs may differ that one program trains; none where there is no such way.

    The seed is among them where it only orders the data: weights, adapters and the embedded task's
    records that are drawn from it would be others.
    """
    name = config.stages[-1]
    if name == "ppo" or (name == "reward" and config.reward.keep_best):
        return frozenset()
    stage = config[name]
    keys = {f"{name}.{key}" for key in PACE}
    if name == "dpo":
        numbers = loss_options(stage).items()
        keys |= {f"dpo.{key}" for key, x in numbers if type(x) in (int, float)}
    if name == "reward":
        keys.add("reward.centring")
    drawn = len(config.stages) > 1 or not config.model.path or name in stages.SCORING
    drawn = drawn or EMBEDDED in (stage.data.source, stage.data.eval_source)
    adapted = "lora" in stage and stage.lora.rank
    return frozenset(keys if drawn or adapted else keys | {"seed"})


def same_program(configs: Sequence[ConfigDict]) -> list[list[int]]:
    """The configs by their indices, those together that one program can train; in order."""
    found: dict[str, list[int]] = {}
    for index, config in enumerate(configs):
        own = config.copy_and_resolve_references()
        fill_in(own)
        keys = traced(own)
        rest = {key: x for key, x in flat(json.loads(own.to_json())).items() if key not in keys}
        alone = [] if keys else [index]
        found.setdefault(json.dumps([sorted(keys), rest, alone]), []).append(index)
    return list(found.values())


def train_together(
    configs: Sequence[ConfigDict], workdirs: Sequence[pathlib.Path], folder: pathlib.Path
) -> dict[str, str]:
    """Train every run that is not finished; the same call goes on where it was stopped.

    Stages before the last are trained once, in the first workdir, and given to the others.

    Args:
      configs: such that `same_program` puts them together.
      folder: for the checkpoints of all of them while they train.

    Returns:
      why runs failed, by the names of their workdirs; the others are finished.

    Raises:
      what `run.run` raises.
    """
    for config in configs:
        check(config)
        fill_in(config)
    if len(same_program(configs)) > 1:
        raise ConfigError("these runs differ in more than one program can vary")
    workdirs = [pathlib.Path(workdir).resolve() for workdir in workdirs]
    if not all(map(ended, workdirs)):
        # All of them, whatever is left: so a plan does not change when the call is repeated.
        setup = run_setup.prepare(configs[0], workdirs[0], vmapped=True)
        *names, last = setup.config.stages
        before = [runs.prepare(name, setup) for name in names]
        loaded = stages.load(last, setup)
        every = [stages.with_numbers(loaded, *own) for own in zip(configs, workdirs)]
        group = _Group(every, folder)
        prepared = [*before, stages.stepping_on(group.lead, group.mesh)]
        runs.require_memory_of(prepared)
        for config, workdir in zip(configs, workdirs):
            record(config, workdir)
        with contextlib.ExitStack() as during:
            for workdir in workdirs:
                during.enter_context(only_run(workdir))
            during.enter_context(jax.set_mesh(setup.mesh))
            stop = during.enter_context(StopSignal())
            runs.announce(prepared)
            if setup.config.profile and jax.process_index() == 0:
                print("config.profile: nothing is profiled of members that train together")
            group.compile()  # what does not fit is refused before anything is loaded
            try:
                start = runs.train(before, partial(run_setup.initial_params, setup), stop)
            except NonFiniteLoss as error:
                for workdir in workdirs:
                    say_failed(workdir, str(error))
            else:
                for stage in group.stages[1:]:
                    share(workdirs[0], stage.setup.workdir, but=(stage.name,))
                    if jax.process_index() == 0:
                        stages.save_reports(stage)
                group.train(start, stop)
    sharding.agreed(True)  # what the first process wrote is there, and nobody reads checkpoints
    if jax.process_index() == 0:
        shutil.rmtree(folder_of(workdirs, folder), ignore_errors=True)
    return {path.name: why for path in workdirs if (why := failure_of(path))}


class _Group:
    """Stages that differ in traced numbers alone, and what they share."""

    def __init__(self, every: Sequence[Stage], folder: pathlib.Path):
        self.folder = folder_of([stage.setup.workdir for stage in every], folder)
        self.first: TokenStatistics | None = None  # of step 0, once that was scored
        seeds = list(dict.fromkeys(stage.setup.config.seed for stage in every))
        self.order_of = [seeds.index(stage.setup.config.seed) for stage in every]
        longest = max(stage.steps for stage in every)
        first = [next(s for s in every if s.setup.config.seed == seed) for seed in seeds]
        # As long as the longest member: a shorter one's batches are the first of them.
        self.orders = [stage._replace(steps=longest) for stage in first]
        self.begun = begun(self.folder)
        self.mesh = mesh_of(every, self.begun, self.folder)
        shape = stages.shape_of(every[0], [stage.order for stage in self.orders], mesh=self.mesh)
        self.stages = [stage._replace(shape=shape) for stage in every]
        self.lead = self.stages[0]
        self.optimizer = make_optimizer(self.lead.config.optimizer)

    @property
    def own_rows(self) -> bool:
        return len(self.orders) > 1

    def compile(self) -> None:
        """Compile the step, unless all members are trained, and choose how many go at once.

        Raises:
          ConfigError: see `_Lanes.compile`.
        """
        self.lanes = None
        if not all(map(self._trained, range(len(self.stages)))):
            self.lanes = _Lanes(self)
            self.at_once = self.lanes.compile()

    def train(self, start: Callable[[], dict], stop: StopSignal) -> None:
        """All of them, as many at once as memory holds; start() -> parameters to begin with."""
        self.stop = stop
        if self.lanes is not None:
            self._train(start)
        self._end(range(len(self.stages)), {})

    def _train(self, start) -> None:
        lead = self.lead
        params = start()
        if lead.setup.model.config.scalar_head:
            params = run_setup.scored(lead.setup, params)
        base = None if lead.lora is None else lead.lora.keep_base(params)
        used = reference_of(lead, params, base, self.stop)
        for stage in self.stages[1:]:
            for name in ("reference", "base", "reference_logprobs"):
                share_folder(lead.folder / name, stage.folder / name)
        trained = params if base is None else lead.lora.start(lead.setup.config.seed)
        judge = open_evaluator(lead, base, used)
        frozen = used.params if base is None else base
        for first in range(0, len(self.stages), self.at_once):
            indices = range(first, min(first + self.at_once, len(self.stages)))
            self._train_at_once(indices, trained, frozen, judge, used)

    def _trained(self, index: int) -> bool:
        """Whether a member has ended, or its final state is on disk already."""
        stage = self.stages[index]
        if ended(stage.setup.workdir):
            return True
        with Checkpoints(stage.folder / "checkpoints") as saved:
            return sharding.agreed(saved.latest == stage.steps)

    def _train_at_once(self, indices: range, trained, frozen, judge: Evaluator, used) -> None:
        """Some of them, from step 0 or from their checkpoint, to the end."""
        lead, config, lanes = self.lead, self.lead.setup.config, self.lanes
        names = [self.stages[i].setup.workdir.name for i in indices]
        folder = self.folder / digest(names)
        ended = {i for i in indices if self._trained(i)}
        errors: dict[int, str] = {}
        if len(ended) < len(indices):
            with contextlib.ExitStack() as during:
                saved = during.enter_context(Checkpoints(folder, max_checkpoints=1))
                batches = Orders([self._batches(stage, used) for stage in self.orders])
                turns = -(-len(indices) // lanes.count)
                found = resume(saved, lanes.abstract, turns, batches)
                if found is None:
                    judge = judge._replace(first=self._first_scores(judge, trained))
                done = -1 if found is None else found[1]
                members = [self._member(i, judge, during, done, i in ended) for i in indices]
                for member, i in zip(members, indices):
                    if found is not None:
                        member.error = found[2].get(member.name, "")
                    elif not member.ended:
                        self._begin(member, self.stages[i], judge)
                places = [
                    range(len(indices))[t * lanes.count :][: lanes.count] for t in range(turns)
                ]
                at = [[indices[k] for k in place] for place in places]
                numbers = [lanes.numbers(own, ended) for own in at]
                state = [lanes.new(trained, own) for own in numbers] if found is None else found[0]
                fit = VectorisedLoop(
                    stage=lead.name,
                    step=lambda lane, rows, own: lanes.step(lane, rows, own, frozen),
                    lane=lanes.lane,
                    batches=batches,
                    place=partial(lanes.place, at, used),
                    rows_of=lambda batch, t, lane: batch[self.order_of[at[t][lane]]],
                    every=Every(config.log_every, config.evaluate_every, config.checkpoint_every),
                    examples=lead.data.examples,
                    checkpoints=saved,
                    stop=self.stop,
                )
                groups = [[members[k] for k in place] for place in places]
                fit([MemberChunk(*own) for own in zip(groups, state, numbers)], max(done, 0))
                errors = {i: member.error for i, member in zip(indices, members)}
        self._end(indices, errors)

    def _member(self, index: int, judge: Evaluator, during, done: int, ended: bool) -> Member:
        stage = self.stages[index]
        if ended:
            return Member(stage.setup.workdir.name, stage.steps, ended=True)
        board = stage.setup.config.tensorboard
        writer = MetricWriter(stage.folder, tensorboard=board, resume_step=done)
        return Member(
            name=stage.setup.workdir.name,
            steps=stage.steps,
            evaluate=partial(judge, stage),
            writer=during.enter_context(writer),
            checkpoints=during.enter_context(Checkpoints(stage.folder / "checkpoints")),
        )

    def _first_scores(self, judge: Evaluator, trained: dict) -> TokenStatistics | None:
        """Of the policy that all start from, where that is the reference."""
        if not (self.lead.objective.needs_reference and self.lead.starts_at_reference):
            return None
        if self.first is None:
            policy = policy_of(self.lead, judge.base, trained)
            self.first = first_scores(self.lead, policy, judge.used)
        return self.first

    def _begin(self, member: Member, stage: Stage, judge: Evaluator) -> None:
        """Step 0: each starts from the reference, if it has one."""
        if judge.first is not None:
            found = check_identity(stage, judge.first, judge.used)
            member.writer.write(0, found, split="identity")

    def _end(self, indices: range, errors: dict[int, str]) -> None:
        """Evaluator those that have not been judged, and say why others failed."""
        summarise = None
        for index in indices:
            stage = self.stages[index]
            if ended(stage.setup.workdir):
                continue
            if why := errors.get(index):
                say_failed(stage.setup.workdir, why)
            else:
                summarise = summarise or runs.summariser(stage)
                params = run_setup.trained_params(stage.setup, stage.name)
                runs.finish(stage, params, summarise)

    def _batches(self, stage: Stage, used: Reference):
        return train_batches(
            stage.data.examples,
            stage.order,
            self.lead.shape,
            score_prompt=stage.score_prompt,
            attach=used.attach,
        )


class _Lanes:
    """The program of a group: how many lanes it has, where they lie, and what goes in and out."""

    def __init__(self, group: _Group):
        self.group, self.mesh = group, group.mesh
        self.members, self.asked = len(group.stages), group.lead.setup.config.sweep
        axis, on_cpu = self.mesh.shape[SWEEP], self.mesh.devices.flat[0].platform == "cpu"
        # A CPU's products are not faster for being batched; its cores are filled by devices.
        members = min(self.members, self.asked.at_once or self.members)
        self.vmapped = self.asked.vmapped or (1 if on_cpu else -(-members // axis))
        self.own = abstract_of(group.lead, group.optimizer)

    @property
    def count(self) -> int:
        """MemberStates of one call."""
        return self.vmapped * self.mesh.shape[SWEEP]

    def compile(self) -> int:
        """Compile the step; returns how many members are trained at once.

        What was chosen stays so as long as the members' checkpoints, which have its shape.

        Raises:
          ConfigError: memory does not hold those of one call, or as many as were asked for.
        """
        begun = self.group.begun
        self.vmapped = begun.vmapped if begun else self.vmapped
        while True:
            lanes, beside, turns = self._compile()
            if turns >= 1 or self.vmapped == 1 or begun or self.asked.vmapped:
                break
            self.vmapped = -(-self.vmapped // 2)
        most = -(-self.members // self.count)
        at_once = self.asked.at_once or min(max(1, turns), most) * self.count
        at_once = begun.at_once if begun else at_once
        calls = -(-min(at_once, self.members) // self.count)
        if calls > turns and self.group.lead.setup.config.check_memory:
            change = "lower config.sweep.at_once, axis or vmapped"
            if begun:
                change = f"they began so: give them as much memory, or delete {self.group.folder}"
            raise ConfigError(
                f"config.sweep: {calls * self.count} members at once, {self.count} in a call, take "
                f"{memory.gib(calls * lanes)} of each device and {memory.gib(beside)} beside them, "
                f"more than there is; {change} (config.check_memory=False tries all the same)"
            )
        self.lane = build_take_member(self.own)
        if jax.process_index() == 0:
            self.group.folder.mkdir(parents=True, exist_ok=True)
            layout = Layout(self.mesh.shape[SWEEP], self.vmapped, at_once)
            write_json(self.group.folder / LANES, layout._asdict())
            print(self._described(min(at_once, self.members), lanes, beside), flush=True)
        return at_once

    def _compile(self) -> tuple[int, int, int]:
        """Compile for the present lanes; bytes of a device for them and beside them, and how many
        times such lanes fit."""
        self.abstract = abstract_member_states(self.own, self.count, self.mesh)
        lead = stages.stepping_on(self.group.lead, self.mesh)
        step = build_vectorised_step(
            make_step(lead, self.group.optimizer),
            self.abstract,
            own_rows=self.group.own_rows,
        )
        numbers = self.numbers(range(min(self.count, self.members)), set())
        with jax.set_mesh(self.mesh):
            given = self.abstract, self._rows(), numbers, abstract_frozen(lead)
            self._step = step.lower(*given).compile()
        memory.give_back()
        lanes = memory.bytes_per_device(self.abstract)
        # The weights that all start from stay, and an evaluation takes one member's state out.
        others = self.own.params, self.own, abstract_beside(lead)
        beside = memory.temporary_bytes(self._step) + memory.bytes_per_device(others)
        fit = int((memory.limit_bytes() - beside) // lanes)
        return lanes, beside, sharding.agreed(max(-1, min(2**20, fit)))

    def _described(self, at_once: int, lanes: int, beside: int) -> str:
        return (
            f"sweep: {self.members} members, {at_once} of them at once; {self.count} in a call, on "
            f"a sweep axis of {self.mesh.shape[SWEEP]}; on each device {memory.gib(lanes)} for "
            f"the states of a call and {memory.gib(beside)} beside them"
        )

    def step(self, lanes, rows, numbers, frozen):
        with jax.set_mesh(self.mesh):
            return self._step(lanes, rows, numbers, frozen)

    def numbers(self, indices: Sequence[int], ended: set[int]) -> MemberHyperparameters:
        """Of the members at `indices`; those that have ended, and lanes to spare, do no steps."""
        idle = lambda own: own._replace(steps=jnp.int32(0))
        own = [_numbers_of(self.group.stages[i]) for i in indices]
        own = [idle(x) if i in ended else x for i, x in zip(indices, own)]
        return stack([*own, *[idle(own[-1])] * (self.count - len(own))], self.mesh)

    def new(self, trained: dict, numbers: MemberHyperparameters):
        make_state = lambda params, seed: initial_state(params, self.group.optimizer, seed)
        return new_member_states(trained, make_state, numbers.seed, self.abstract)

    def place(self, at: list[list[int]], used: Reference, batch: list[Rows]) -> list[Rows]:
        """A batch of every order -> the rows of every turn, with reference log-probs."""
        if used.on_mesh is not None:
            plain = self.group.lead.setup.mesh
            batch = [sharding.to_host(used.to_device(rows, plain)) for rows in batch]
        if not self.group.own_rows:
            return [sharding.put(batch[0], self._row_sharding)] * len(at)
        placed = []
        for indices in at:
            spare = [indices[-1]] * (self.count - len(indices))
            own = [batch[self.group.order_of[i]] for i in (*indices, *spare)]
            stacked = jax.tree.map(lambda *x: np.stack(x), *own)
            placed.append(sharding.put(stacked, self._row_sharding))
        return placed

    @property
    def _row_sharding(self) -> NamedSharding:
        spec = (SWEEP, None, ROWS) if self.group.own_rows else (None, ROWS)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def _rows(self) -> Rows:
        """Their shapes."""
        rows = stages.abstract_rows(self.group.lead)
        leading = (self.count,) * self.group.own_rows
        where = self._row_sharding
        shaped = lambda x: jax.ShapeDtypeStruct((*leading, *x.shape), x.dtype, sharding=where)
        return jax.tree.map(shaped, rows)


def _numbers_of(stage: Stage) -> MemberHyperparameters:
    whole = lambda x: jnp.asarray(x, jnp.int32)
    warmup, seed = stage.config.warmup_steps, stage.setup.config.seed
    return MemberHyperparameters(
        stage.hyper, whole(warmup), whole(stage.steps), whole(seed % 2**31)
    )
