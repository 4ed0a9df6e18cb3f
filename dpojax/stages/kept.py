"""Which checkpoint of a stage is its result, and which evaluation ends it before its last step."""

from __future__ import annotations

from collections.abc import Callable, Collection

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.errors import ConfigError, config_errors
from dpojax.stages.wins import METRICS as WINS
from dpojax.training import checkpoints, keep_best, stop_at
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.keep_best import KEEP_BEST, KeepBest, require_known
from dpojax.training.stop_at import STOP_AT, StopAt


def new_keep_best(config: ConfigDict) -> KeepBest | None:
    """What follows the metric of a stage's `keep_best`; None where the last step is kept."""
    return keep_best.parse(config.keep_best, config.patience)


def new_stop_at(config: ConfigDict) -> StopAt | None:
    """What follows the metric of a stage's `stop_at`; None where it names none."""
    return stop_at.parse(config.stop_at)


def kept_best(config: ConfigDict, checkpoint_folder: storage.Path) -> KeepBest | None:
    """`new_keep_best` as the newest checkpoint of the stage has it."""
    followed = new_keep_best(config)
    if followed is not None:
        followed.restore(checkpoints.metadata_of(checkpoint_folder))
    return followed


def stopped_at(config: ConfigDict, checkpoint_folder: storage.Path) -> StopAt | None:
    """`new_stop_at` as the newest checkpoint of the stage has it."""
    followed = new_stop_at(config)
    if followed is not None:
        followed.restore(checkpoints.metadata_of(checkpoint_folder))
    return followed


def has_ended(saved: Checkpoints, steps: int) -> bool:
    """Whether the newest checkpoint is that of the last of `steps`, or of an early stop."""
    latest = saved.latest
    if latest is None or latest == steps:
        return latest is not None
    metadata = saved.metadata(latest)
    stops = [(metadata.get(key) or {}).get("stopped_at") for key in (KEEP_BEST, STOP_AT)]
    return latest in stops


def check_metrics(
    name: str, whole: ConfigDict, *metric_names: Callable[[], Collection[str]]
) -> None:
    """Raise ConfigError if no evaluation has the metric of `keep_best` or of `stop_at`.

    Args:
      name: of the stage.
      whole: the run's config.
      metric_names: together they give the names of all metrics of an evaluation.
    """
    config, judge = whole[name], whole.samples.judge
    for key, followed in (("keep_best", new_keep_best(config)), ("stop_at", new_stop_at(config))):
        if followed is None:
            continue
        if followed.metric in WINS and not judge:
            raise ConfigError(
                f"config.{name}.{key} = {config[key]!r}: a judge says who wins; name one in "
                "config.samples.judge"
            )
        with config_errors(f"{name}.{key}"):
            require_known(followed.metric, [x for names in metric_names for x in names()])
