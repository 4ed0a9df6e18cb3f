"""The sources of records that a stage's config names."""

from __future__ import annotations

from ml_collections import ConfigDict

from dpojax.config.errors import ConfigError
from dpojax.data import sources
from dpojax.data.prompts import EMBEDDED
from dpojax.data.sources import Source


def sources_of(data: ConfigDict, *, evaluation: bool = False) -> list[Source]:
    """The sources that `config.STAGE.data` names, to train on or to evaluate on.

    The list is empty where it names none, or the embedded task.

    Raises:
      DataError: see `sources.listed`.
      ConfigError: a part of the embedded task is asked for, which has none.
    """
    text = data.eval_source if evaluation else data.source
    part = {"subset": data.subset, "revision": data.revision, "data_dir": data.data_dir}
    if text in ("", EMBEDDED):
        if any(part.values()) and not evaluation:
            named = ", ".join(f"data.{key}" for key, value in part.items() if value)
            raise ConfigError(f"{named}: the embedded task has no such part; leave it empty")
        return []
    return sources.listed(text, split=data.eval_split if evaluation else data.split, **part)


def weights_of(data: ConfigDict) -> tuple[float, ...]:
    """The weights of the sources to train on; () mixes all records as one data set.

    Raises:
      ConfigError: there are more or fewer weights than sources, or one is not above 0.
    """
    weights, listed = tuple(data.weights), sources_of(data)
    if weights and (len(weights) != len(listed) or not all(weight > 0 for weight in weights)):
        names = ", ".join(sources.labels(listed)) or data.source
        raise ConfigError(
            f"config.STAGE.data.weights = {weights}: one number above 0 for each source; there "
            f"are {len(listed)}: {names}"
        )
    return weights
