"""What the stages of a dry run need: memory from shapes alone, and hours where chips are named."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from dpojax import display
from dpojax.chips import chip_of
from dpojax.planning import plan
from dpojax.planning.chips import Topology, topology
from dpojax.planning.plan import StagePlan
from dpojax.planning.programs import can_be_planned, plan_stage, programs
from dpojax.plans.dry_run import stage_program
from dpojax.stages.stage import RowSize, count

Say = Callable[[str], None]


class Outline:
    """The lines of a dry run about programs, and the hours of those that have been told.

    Args:
      chips: as `--topology` names them; "" for the devices of this process, without hours.
      say: is told what is compiled.

    Attributes:
      unplanned: stages whose hours are not known.

    Raises:
      TopologyError: see `chips.topology`.
    """

    def __init__(self, chips: str = "", say: Say = lambda _: None):
        self.say, self.chips, self.unplanned = say, None, []
        if chips:
            # Programs for devices that are not there can be written to the cache, but not read.
            jax.config.update("jax_enable_compilation_cache", False)
            self.chips = topology(chips)
        self.hours = 0.0

    def stage(
        self, config: ConfigDict, name: str, row: RowSize, *, members: int = 1, times: int = 1
    ) -> Iterator[str]:
        """A stage's step from shapes alone; on named chips, all its programs and their hours.

        Args:
          config: of the run.
          name: of the stage.
          row: the largest row, for a stage that no plan can be made of.
          members: runs of a sweep that train as one program.
          times: how often all this is done, one after the other.

        Raises:
          ConfigError: a run that could not start.
        """
        if not can_be_planned(name) or not config.plan.examples:
            self.unplanned.append(name)
            yield stage_program(config, name, row)
        elif self.chips is None:
            yield _from_shapes(config, name)
        else:
            alone = copy.deepcopy(config)
            alone.stages = (name,)
            for one in plan.make_plan(alone, self.chips, members=members, say=self.say):
                yield from plan.describe(one)
                self.hours += times * hours_of_members(one, members)

    def total(self) -> str:
        """The hours of all that was told."""
        if self.chips is None:
            return (
                "Hours: with --topology=h200:8, or other chips of docs/plans.md, these programs "
                "are compiled for them"
            )
        if self.chips.chip is None:
            return f"Hours: none, since no peaks of {self.chips.name} are known"
        names = ", ".join(dict.fromkeys(self.unplanned))
        without = f", without {names}, of which no plan is made" if names else ""
        return (
            f"On {self.chips.name} in all at least {self.hours:.2f} h, "
            f"{self.chips.chip_count * self.hours:.1f} chip-hours{without}"
        )


def show(dry_run: Callable[[Outline], Iterator[str]], chips: str) -> None:
    """Print the lines of a dry run, and on standard error what is being compiled.

    Args:
      chips: see `Outline`.
    """
    for line in dry_run(Outline(chips, say=display.complain)):
        display.say(line)


def hours_of_members(one: StagePlan, members: int) -> float:
    """Hours of several members at the roofline.

    They share the scoring of the reference. They share a step if their program fits; else each
    takes its own.
    """
    if members < 2:
        return one.hours
    together = next(x for x in one.programs if x.program.member_devices)
    total = members * (one.step.hours or 0.0) if together.memory is None else together.hours or 0.0
    for program in one.programs:
        if program.program.name == "reference":
            total += program.hours or 0.0
        elif program not in (one.step, together):
            total += members * (program.hours or 0.0)
    return total


def _from_shapes(config: ConfigDict, name: str) -> str:
    """Parameters, steps, the shape of batches, and the memory of a device of this process."""
    devices = jax.devices()
    planned = plan_stage(config, name, Topology("here", chip_of(devices[0]), devices))
    step = programs(planned)[0]
    step.lower()
    stage = planned.stage
    title = f"{name}, loss {stage.config.loss}" if name == "preference" else name
    where = f"each of {len(devices)} devices" if len(devices) > 1 else "one device"
    return (
        f"{title}: {count(stage.setup.abstract_params)} parameters; {planned.steps:,} steps of "
        f"{planned.batch}; one run is predicted to take of {where} like those here "
        f"{step.footprint}; lowers"
    )
