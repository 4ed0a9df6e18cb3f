"""What a tracker is: it gets the numbers of every line of metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from dpojax import storage


class Tracker(Protocol):
    """Shows the metrics of one stage of a run."""

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Take the metrics of a step; some may be nan or infinite.

        Args:
          split: "train", "eval" or "identity".
          values: by their names in metrics.jsonl.
        """

    def close(self) -> None:
        """Send what is left; nothing is written afterwards."""


class TrackedRun(NamedTuple):
    """The stage of a run whose metrics a tracker gets.

    Attributes:
      folder: of the stage, WORKDIR/STAGE.
      config: all keys of the run, by dotted name, as JSON has them.
      resume_step: the stage goes on after this step, and steps beyond it are written again; -1: it
        begins; None: nobody knows, and nothing that is there is removed.
    """

    folder: storage.Path
    config: Mapping[str, Any] = {}
    resume_step: int | None = None

    @property
    def name(self) -> str:
        """`WORKDIR/STAGE`, with the last part of the workdir's path."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def group(self) -> str:
        """The folder that the workdir is in: of a sweep's members, the sweep."""
        return self.folder.parent.parent.name


class TrackerKind(NamedTuple):
    """A program, and the package that it needs.

    Attributes:
      open: starts to track a stage.
      library: the package, as it is imported and installed.
    """

    open: Callable[[TrackedRun], Tracker]
    library: str
