"""A search for the mesh, the rematerialisation and the rows with which a step takes least time.

One thing is varied after the other, from the config's own values: rows of a micro-batch, then what
the backward pass computes again, then the mesh. Each variant is compiled; the fastest at the
roofline that fits is kept. So a dozen programs are compiled and not all combinations, and the best
of all may be missed.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from dpojax.config.errors import ConfigError
from dpojax.planning.chips import Topology
from dpojax.planning.plan import CompiledProgram, compile_program
from dpojax.planning.programs import plan_stage, programs

ROWS_A_SHARD = (1, 2, 4, 8, 16)
REMAT = ("none", "dots", "full")
TENSOR = (1, 2, 4, 8)
NO_ROOM = 1.5  # a footprint so many times the chip's memory is not compiled


class Variant(NamedTuple):
    """Keys of a config, and the step that was compiled with them.

    Attributes:
      keys: dotted, with their values.
      step: None where the config is refused, or far too large to be compiled; `problem` says why.
    """

    keys: dict[str, Any]
    step: CompiledProgram | None
    problem: str = ""

    @property
    def seconds(self) -> float:
        """Of a step at the roofline; infinite where it does not fit."""
        if self.step is None or self.step.memory is None or self.step.roofline is None:
            return math.inf
        return self.step.roofline.seconds

    @property
    def flags(self) -> str:
        """What to copy to a command line."""
        return " ".join(f"--config.{key}={value}" for key, value in self.keys.items())

    @property
    def short(self) -> str:
        """The keys in a line of a terminal."""
        pairs = [f"{key}={value}" for key, value in self.keys.items()]
        return " ".join(pairs) or "the config as it is"


def search(
    config: ConfigDict, name: str, topology: Topology, say: Callable[[str], None]
) -> list[Variant]:
    """Every variant that was tried, the fastest first.

    A variant that is refused, or that the compiler fails at, ends nothing.

    Args:
      config: where the search begins.
      name: of the stage.
      topology: to compile for.
      say: is told each variant with its time.

    Raises:
      ConfigError: the config itself cannot be planned.
    """
    plan_stage(config, name, topology)
    trials = _Trials(config, name, topology, say)
    best = trials.run({})
    for options in (_rows, _remat, _meshes, _rows):
        for keys in options(config, best.keys, topology):
            best = min(best, trials.run(best.keys | keys), key=lambda one: one.seconds)
    return sorted(trials.done.values(), key=lambda one: one.seconds)


class _Trials:
    """What was tried, by flags; each program is compiled once, whatever keys lead to it."""

    def __init__(
        self, config: ConfigDict, name: str, topology: Topology, say: Callable[[str], None]
    ):
        self.config, self.name, self.topology, self.say = config, name, topology, say
        self.done: dict[str, Variant] = {}
        self.compiled: dict[tuple, CompiledProgram] = {}
        self.began = time.perf_counter()

    def run(self, keys: dict[str, Any]) -> Variant:
        """Compile the step with these keys, unless that has been done."""
        variant = Variant(keys, None)
        if variant.flags in self.done:
            return self.done[variant.flags]
        self.say(f"{len(self.done) + 1}. {variant.short}")
        try:
            variant = self._compile(keys)
        except (ConfigError, ValueError, jax.errors.JaxRuntimeError) as error:
            variant = Variant(keys, None, " ".join(str(error).split()))
        self.done[variant.flags] = variant
        took = f"{1e3 * variant.seconds:.0f} ms a step" if variant.seconds < math.inf else "no"
        minutes = (time.perf_counter() - self.began) / 60
        problem = f": {variant.problem[:70]}" if variant.problem else ""
        self.say(f"   {took}{problem} ({minutes:.1f} min so far)")
        return variant

    def _compile(self, keys: dict[str, Any]) -> Variant:
        changed = with_keys(self.config, keys)
        planned = plan_stage(changed, self.name, self.topology)
        setup = planned.stage.setup
        program = tuple(setup.mesh.shape.items()), planned.stage.batches.shape, changed.model.remat
        if program not in self.compiled:
            step = programs(planned)[0]
            chip = self.topology.chip
            if chip and step.footprint.total > NO_ROOM * chip.memory:
                return Variant(keys, None, f"predicted {step.footprint}")
            self.compiled[program] = compile_program(step, self.topology)
        step = self.compiled[program]
        return Variant(keys, step, step.problem)


def with_keys(config: ConfigDict, keys: dict[str, Any]) -> ConfigDict:
    """A copy of a config with other values of some dotted keys."""
    changed = copy.deepcopy(config)
    changed.update_from_flattened_dict(keys)
    return changed


def _rows(config: ConfigDict, best: dict, topology: Topology) -> Iterator[dict[str, Any]]:
    """Rows of a micro-batch: so many on each shard of the mesh."""
    shards = len(topology.devices) // best.get("mesh.tensor", config.mesh.tensor)
    for rows in ROWS_A_SHARD:
        yield {"micro_rows": rows * shards}


def _remat(config: ConfigDict, best: dict, topology: Topology) -> Iterator[dict[str, Any]]:
    del config, best, topology
    for remat in REMAT:
        yield {"model.remat": remat}


def _meshes(config: ConfigDict, best: dict, topology: Topology) -> Iterator[dict[str, Any]]:
    """All devices along fsdp, or some of them along tensor, or along data."""
    del config
    count = len(topology.devices)
    for tensor in TENSOR:
        if count % tensor:
            continue
        for data in (1, 2, 4):
            if count % (tensor * data) == 0:
                keys = {"mesh.data": data, "mesh.fsdp": count // (tensor * data)}
                rows = best.get("micro_rows", 0)
                keys["mesh.tensor"] = tensor
                if rows % (count // tensor):
                    keys["micro_rows"] = 0
                yield keys
