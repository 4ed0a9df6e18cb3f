"""The plan of a stage: its programs compiled for a topology, and what they need and take there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dpojax import display
from dpojax.config.errors import ConfigError
from dpojax.planning.chips import Topology
from dpojax.planning.hlo import crossing_collectives
from dpojax.planning.programs import (
    PlannedProgram,
    PlannedStage,
    can_be_planned,
    plan_stage,
    programs,
)
from dpojax.planning.roofline import Roofline, roofline
from dpojax.training.memory import gib

HOUR = 3600.0
NO_FIT, NOT_COMPILED = "DOES NOT FIT", "THE COMPILER FAILS"


class Memory(NamedTuple):
    """Bytes of a device, as the compiler counts them.

    arguments: weights, moments and batch. temporary: activations, gradients and logits. results:
    those that do not take the place of arguments.
    """

    arguments: int
    temporary: int
    results: int

    @property
    def total(self) -> int:
        return sum(self)


class CompiledProgram(NamedTuple):
    """A program that was compiled for a topology.

    Attributes:
      program: what was compiled.
      memory: None where it does not fit, or the compiler fails; `problem` then says so in the
        compiler's words.
      roofline: None on chips without a table of peaks, and where the text cannot be read.
      compile_seconds: on this machine.
      problem: why something is None; "" otherwise.
      crossing: names of the collectives in which several members of a sweep take part; None for the
        programs of a single run, and where the text cannot be read.
    """

    program: PlannedProgram
    memory: Memory | None
    roofline: Roofline | None
    compile_seconds: float
    problem: str = ""
    crossing: tuple[str, ...] | None = None

    @property
    def hours(self) -> float | None:
        """Hours of all its runs at the roofline."""
        return None if self.roofline is None else self.program.runs * self.roofline.seconds / HOUR


class StagePlan(NamedTuple):
    """What a stage needs and takes on a topology."""

    name: str
    topology: Topology
    planned: PlannedStage
    programs: list[CompiledProgram]

    @property
    def step(self) -> CompiledProgram:
        return self.programs[0]

    @property
    def hours(self) -> float:
        """Hours at the roofline of all programs of one run; a sweep's step is not among them."""
        return sum(one.hours or 0.0 for one in self.programs if "members" not in one.program.name)

    @property
    def chip_hours(self) -> float:
        return self.hours * self.topology.chip_count

    @property
    def mfu(self) -> float | None:
        """Model FLOPs of a step over what the chips could do in its roofline time."""
        line, chip = self.step.roofline, self.topology.chip
        if line is None or chip is None:
            return None
        could = line.seconds * chip.flops * len(self.topology.devices)
        return self.step.program.work.model_flops / could

    @property
    def fits(self) -> bool:
        """Whether the compiler found room for every program."""
        return all(one.memory is not None for one in self.programs)


def make_plan(
    config: ConfigDict,
    topology: Topology,
    *,
    members: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[StagePlan]:
    """The plan of each stage of a config, one after the other, but for those of `unplanned`.

    Args:
      config: of the run.
      topology: to compile for.
      members: of a sweep that trains together.
      say: is told what is compiled.

    Raises:
      ConfigError: see `programs.plan_stage`.
    """
    for name in filter(can_be_planned, config.stages):
        planned = plan_stage(config, name, topology)
        compiled: list[CompiledProgram] = []
        for program in programs(planned, members=members):
            same = [one for one in compiled if one.program.lower is program.lower]
            if same:
                compiled.append(same[0]._replace(program=program))
                continue
            say(f"{name}: compiling {program.name} for {topology.name}")
            with display.doing(f"compiling {program.name} of {name}"):
                compiled.append(compile_program(program, topology))
        yield StagePlan(name, topology, planned, compiled)


def unplanned(config: ConfigDict) -> list[str]:
    """The stages of a config that no plan is made of: PPO, which learns from what it samples."""
    return [name for name in config.stages if not can_be_planned(name)]


def compile_program(program: PlannedProgram, topology: Topology) -> CompiledProgram:
    """Compile one program, and read its memory and its scheduled text."""
    began = time.perf_counter()
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        why = NO_FIT if "RESOURCE_EXHAUSTED" in str(error) else NOT_COMPILED
        problem = f"{why}: {_short(error)}"
        return CompiledProgram(program, None, None, time.perf_counter() - began, problem)
    seconds = time.perf_counter() - began
    memory = _memory(compiled)  # before its text, which XLA cannot write of some programs
    line, problem, crossing = None, "", None
    try:
        text = compiled.as_text()
        if program.member_devices:
            crossing = tuple(crossing_collectives(text, program.member_devices))
        if topology.chip is not None:
            line = roofline(text, topology.chip, row_length=program.row_length, loops=program.loops)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        problem = f"no time: {_short(error)}"
    return CompiledProgram(program, memory, line, seconds, problem, crossing)


def _memory(compiled: jax.stages.Compiled) -> Memory:
    sizes = compiled.memory_analysis()
    return Memory(
        arguments=int(sizes.argument_size_in_bytes),
        temporary=int(sizes.temp_size_in_bytes),
        results=int(sizes.output_size_in_bytes - sizes.alias_size_in_bytes),
    )


def _short(error: Exception) -> str:
    """The sentence of an error that says how much is missing."""
    text = " ".join(str(error).split())
    place = max(text.find("Used "), text.find("Ran out of"), 0)
    return text[place : place + 160]


def describe(plan: StagePlan, *, price: float = 0.0) -> Iterator[str]:
    """The lines of a plan, for a person.

    Args:
      price: of a chip for an hour; 0 where it is not known.
    """
    topology, planned = plan.topology, plan.planned
    sizes = planned.stage.setup.mesh.shape
    mesh = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    yield (
        f"{plan.name} on {topology.name} ({mesh or 'one device'}): {planned.steps:,} steps of "
        f"{planned.batch}"
    )
    for one in plan.programs:
        yield from _program_lines(one)
    yield from _sums(plan, price)


def _program_lines(one: CompiledProgram) -> Iterator[str]:
    name = f"  {one.program.name}"
    if one.memory is None:
        yield f"{name}: {one.problem}"
        return
    memory = one.memory
    yield (
        f"{name}: {gib(memory.total)} a device: {gib(memory.arguments)} arguments, "
        f"{gib(memory.temporary)} temporary, {gib(memory.results)} results "
        f"(compiled in {one.compile_seconds:.0f} s)"
    )
    if one.program.footprint is not None:
        predicted = one.program.footprint
        off = predicted.total / memory.total - 1
        yield f"    predicted {predicted}: {off:+.0%}"
    if one.problem:
        yield f"    {one.problem}"
    if one.crossing is not None:
        yield f"    {_crossing(one)}"
    if one.roofline is not None:
        yield from _roofline_lines(one.roofline)


def _crossing(one: CompiledProgram) -> str:
    """Says whether members of a sweep wait for each other."""
    if one.crossing:
        return f"COLLECTIVES ACROSS MEMBERS: {', '.join(one.crossing)}"
    return "no collective across members"


def _roofline_lines(line: Roofline) -> Iterator[str]:
    moved = ", ".join(
        f"{kind} {gib(size)}"
        for kind, size in sorted(line.collective_bytes.items())
        if size > line.hbm_bytes / 1000
    )
    yield (
        f"    {line.flops / 1e12:.2f} TFLOP, HBM {gib(line.hbm_bytes)}"
        + (f", collectives: {moved}" if moved else "")
    )
    exposed = ", ".join(
        f"{kind} {1e3 * seconds:.1f} ms"
        for kind, seconds in sorted(line.exposed_seconds.items())
        if seconds > 5e-5
    )
    yield (
        f"    {1e3 * line.seconds:.1f} ms at the roofline: kernels {1e3 * line.kernel_seconds:.1f}"
        f" ms, exposed {exposed or 'nothing'}"
    )
    if line.unread:
        yield f"    FLOPs of these kernels are not known: {', '.join(sorted(line.unread))}"


def _sums(plan: StagePlan, price: float) -> Iterator[str]:
    if plan.step.roofline is None:
        return
    mfu, tokens = plan.mfu, plan.step.program.work.tokens
    rate = tokens / plan.step.roofline.seconds / len(plan.topology.devices)
    yield f"  step: {rate:,.0f} tokens/s a device, MFU {mfu:.0%} at the roofline"
    cost = f", {price * plan.chip_hours:,.2f} at {price:g} a chip-hour" if price else ""
    yield (
        f"  in all at least {plan.hours:.2f} h, {plan.chip_hours:.1f} chip-hours{cost}: no kernel "
        "reaches the roofline"
    )


def as_json(plan: StagePlan) -> dict[str, Any]:
    """A plan as JSON has it."""
    shape = plan.planned.stage.batches.shape
    return {
        "stage": plan.name,
        "topology": plan.topology.name,
        "rows": f"{shape.micro_batches} x {shape.rows} x {shape.length}",
        "mesh": dict(plan.planned.stage.setup.mesh.shape),
        "steps": plan.planned.steps,
        "hours": plan.hours,
        "chip_hours": plan.chip_hours,
        "mfu": plan.mfu,
        "programs": [_program_json(one) for one in plan.programs],
    }


def _program_json(one: CompiledProgram) -> dict[str, Any]:
    predicted = one.program.footprint
    return {
        "name": one.program.name,
        "runs": one.program.runs,
        "memory": None if one.memory is None else one.memory._asdict(),
        "predicted": None if predicted is None else predicted._asdict(),
        "roofline": None if one.roofline is None else one.roofline._asdict(),
        "seconds": None if one.roofline is None else one.roofline.seconds,
        "problem": one.problem,
        "crossing": one.crossing,
    }


def require_hours(plans: list[StagePlan], most: float) -> None:
    """Raise PlanRefused if the plans together take more hours at the roofline than `most`."""
    hours = math.fsum(plan.hours for plan in plans)
    if hours > most:
        raise PlanRefused(f"{hours:.2f} h at the roofline are more than --max_hours={most:g}")


class PlanRefused(ConfigError):
    """A plan that takes longer than was allowed, or does not fit."""
