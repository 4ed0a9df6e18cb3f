"""The process that measures variants: JAX reads XLA's flags once, when it starts.

    python -m dpojax.certifying.worker --plan=FILE

FILE is JSON, see `Plan`. What was measured goes into its folder: a file of arrays for each variant,
and then MEASURED, which names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from dpojax import storage
from dpojax.certifying.measure import Measurement, measure
from dpojax.certifying.opening import certified_stage, open_variant, small
from dpojax.certifying.variants import (
    DEFAULT,
    FLOAT32,
    GIVEN,
    Variant,
    as_configured,
    baseline,
    variants_here,
    with_flags,
)
from dpojax.config.command_line import ArgumentParser
from dpojax.config.saved import config_from_json
from dpojax.runs.certificate import conditions_here
from dpojax.runs.command import run_command
from dpojax.stages.stage import require_memory
from dpojax.stages.trained_stage import LanguageStage
from dpojax.training.memory import gib, limit_bytes

MEASURED = "measured.json"


class Plan(NamedTuple):
    """What a process is to measure; all fields can be written as JSON.

    Attributes:
      config: of the run, as JSON has it.
      folder: for the results.
      steps: of each variant.
      is_small: whether the model is shrunken.
      devices: of a CPU; 0 takes those that are there.
      flags: of XLA, which are in force in this process and not in the others; "" if there are none.
    """

    config: dict
    folder: str
    steps: int
    is_small: bool
    devices: int = 0
    flags: str = ""


class Measured(NamedTuple):
    """One variant that a process has measured, or left out; all fields can be written as JSON.

    Attributes:
      variant: as JSON has it.
      file: of the arrays; "" where it was left out.
      left_out: why.
      key: of the conditions under which a run is refused if this fails; "" for those that no run
        has: a mesh of fewer devices, another order of them.
      conditions: as JSON has them.
      is_exact: whether all is computed in float32.
    """

    variant: dict
    file: str
    left_out: str
    key: str
    conditions: dict
    is_exact: bool


def measure_plan(plan: Plan) -> None:
    """Measure what a plan says, and write it.

    Raises:
      ConfigError, DataError: a run that could not start.
    """
    config = config_from_json(plan.config, where="the config")
    stage, devices = certified_stage(config), jax.devices()
    if plan.is_small:
        config = small(config, stage)
    variants = [with_flags(as_configured(config, stage, len(devices)), plan.flags)]
    if not plan.flags:
        variants = variants_here(config, stage, len(devices))
        variants.insert(0, baseline(config, stage))
    opener, results = _Opener(config, stage, devices, plan.is_small), []
    if not plan.flags:
        variants[0] = opener.baseline_that_fits(variants[0])
    for number, variant in enumerate(variants, 1):
        print(f"{stage}: {variant.name} ({number} of {len(variants)})", flush=True)
        results.append(_measured(opener, variant, plan, f"{len(results)}.npz"))
    storage.write_json(
        storage.as_path(plan.folder) / MEASURED,
        {"stage": stage, "variants": [result._asdict() for result in results]},
    )


class _Opener:
    """Opens variants of one stage, whose data are read once."""

    def __init__(
        self, config: ConfigDict, stage: str, devices: Sequence[jax.Device], is_small: bool
    ):
        self.config, self.stage, self.devices = config, stage, devices
        self.is_small, self.data = is_small, None

    def __call__(self, variant: Variant) -> LanguageStage:
        stage = open_variant(
            self.config,
            self.stage,
            variant,
            self.devices,
            is_small=self.is_small,
            data=self.data,
        )
        self.data = stage.batches.data
        return stage

    def baseline_that_fits(self, one_device: Variant) -> Variant:
        """Float32 on one device, or spread over all of them where it does not fit.

        Raises:
          ConfigError: it fits on neither.
        """
        if not (why := does_not_fit(self(one_device))):
            return one_device
        every = baseline(self.config, self.stage, (1, len(self.devices), 1))
        print(f"{self.stage}: on one device {why}; it is spread over all", flush=True)
        require_memory(self(every))
        return every


def does_not_fit(stage: LanguageStage) -> str:
    """Why a stage does not fit on a device; "" if it does."""
    needed, limit = stage.footprint(), limit_bytes()
    if needed.total <= limit or not stage.setup.config.check_memory:
        return ""
    return f"it needs about {gib(needed.total)} of each device, which has {gib(limit)} to give"


def _measured(opener: _Opener, variant: Variant, plan: Plan, file: str) -> Measured:
    stage = opener(variant)
    left_out = does_not_fit(stage)
    if not left_out:
        measurement = measure(stage, plan.steps, variant.precision)
        with storage.replacing(storage.as_path(plan.folder) / file) as unfinished:
            np.savez(unfinished, **measurement._asdict())
    conditions = conditions_here(stage.setup.config, stage.name, variant.mesh)
    platform = opener.devices[0].platform
    floats = {variant.compute_dtype, variant.base_dtype or FLOAT32} == {FLOAT32}
    is_exact = floats and (variant.precision != DEFAULT or platform == "cpu")
    if variant.precision != DEFAULT:  # another mesh, in float32
        conditions = conditions.in_any_precision()
    is_of_a_run = variant.order == GIVEN and np.prod(variant.mesh) == len(opener.devices)
    return Measured(
        variant=variant._asdict(),
        file="" if left_out else file,
        left_out=left_out,
        key=conditions.hash if is_of_a_run else "",
        conditions=conditions._asdict(),
        is_exact=bool(is_exact),
    )


def read_measurement(path: storage.Path) -> Measurement:
    """The arrays of a variant."""
    with np.load(storage.local_copy(path)) as arrays:
        return Measurement(**{name: arrays[name] for name in Measurement._fields})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of this process: see above."""
    parser = ArgumentParser(
        prog="python -m dpojax.certifying.worker", description="Measure variants of a config."
    )
    parser.add_argument("--plan", required=True, help="a file of JSON, see Plan")
    path = storage.as_path(parser.parse_args(arguments).plan)
    plan = Plan(**storage.read_json(path, fields={"config": dict, "folder": str}))
    if plan.devices:
        jax.config.update("jax_num_cpu_devices", plan.devices)
    measure_plan(plan)


if __name__ == "__main__":
    run_command(main)
