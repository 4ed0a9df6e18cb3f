"""What a sweep would do: its runs, and their programs from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.planning.outline import Outline
from dpojax.plans.dry_run import NOWHERE, lines_of_names, with_sources
from dpojax.stages.registry import check_order
from dpojax.stages.stage import RowSize
from dpojax.sweeps.members import (
    Changes,
    member_config,
    member_names,
    member_run,
    same_program,
    what_begins,
)


def dry_run(config: ConfigDict, members: Sequence[Changes], outline: Outline) -> Iterator[str]:
    """Lines for the groups of members that train together, and for each stage's programs.

    Weights and data need not be there. Nothing is written.

    Args:
      config: of the sweep.
      members: their changes.
      outline: where to, and what sums the hours up.

    Raises:
      ConfigError: a member that could not start.
    """
    check_order(config.stages)
    *beginning, last = config.stages
    config = with_sources(config)
    names = member_names(members, last)
    folder = storage.as_path(NOWHERE)
    runs = [member_run(config, x, folder / name) for name, x in zip(names, members)]
    configs = [member_config(config, changes) for changes in members]
    groups = same_program(runs)
    yield f"Runs ({len(runs)}), those of a line as one program:"
    for group in groups:
        yield from lines_of_names([names[i] for i in group])
    yield "Programs:"
    begun = []
    for run, of_member in zip(runs, configs):
        if (begins := what_begins(run.config)) not in begun:
            begun.append(begins)
            for stage in beginning:
                yield from outline.stage(of_member, stage, _row(of_member))
    for group in groups:
        yield from outline.stage(configs[group[0]], last, _row(config), members=len(group))
    yield outline.total()


def _row(config: ConfigDict) -> RowSize:
    """A prompt and two responses that fill half of the longest text each."""
    half = config.tokens.max_length // 2
    return RowSize(config.tokens.max_length - half, half, 2)
