"""Refuses a stage that will not fit into memory, before anything is compiled or loaded."""

from __future__ import annotations

from dpojax import sharding
from dpojax.config.errors import ConfigError
from dpojax.stages.stage import Stage
from dpojax.training.memory import gib, limit_bytes

MEBI = 2**20  # processes agree on an int32, so bytes would be too many


def require_memory(stage: Stage) -> None:
    """Raises ConfigError if the stage's footprint is more than a device has.

    The message names the part that takes most, and the key to change first. A stage that nothing
    predicts is let through.
    """
    needed = stage.footprint()
    if needed is None or not stage.setup.config.check_memory:
        return
    limit = MEBI * sharding.agreed(min(limit_bytes() // MEBI, 2**30))
    if needed.total <= limit:
        return
    parts, advice = needed._asdict(), stage.memory_advice()
    largest = max(parts, key=parts.get)
    raise ConfigError(
        f"{stage.name}: a step needs about {needed} of each device, which has {gib(limit)} to "
        f"give. Most are {largest}: {advice.get(largest, advice[''])}. config.check_memory=False "
        "tries all the same"
    )
