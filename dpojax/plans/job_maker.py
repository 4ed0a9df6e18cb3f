"""Jobs that plans are made of, and the JSON files that their commands read."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.resolved import as_json
from dpojax.jobs.job import Job, command
from dpojax.runs.preferences import Settings
from dpojax.runs.workdirs import FINISHED

JOBS = "jobs"  # folder of the plan's workdir


class JobMaker:
    """Makes jobs whose commands read what they do from files in WORKDIR/jobs.

    Args:
      folder: the plan's workdir.

    Attributes:
      files: what those files hold, by path; whoever carries out the jobs writes them.
    """

    def __init__(self, folder: storage.Path):
        self.folder = folder
        self.files: dict[str, Any] = {}

    def file(self, name: str, content: Any) -> str:
        """The path of a file, which will hold `content` as JSON."""
        path = str(self.folder / JOBS / f"{name}.json")
        self.files[path] = content
        return path

    def train(
        self,
        name: str,
        config: ConfigDict,
        workdir: storage.Path,
        *,
        needs: tuple[str, ...] = (),
        kind: str = "",
        failure_file: str = "",
    ) -> Job:
        """A run of `runs.run`."""
        return Job(
            name,
            command(
                "dpojax.runs.run",
                config=self.file(name, as_json(config)),
                workdir=workdir,
                failure_file=failure_file,
            ),
            needs=needs,
            outputs=(str(workdir / FINISHED),),
            failure_files=_one(failure_file),
            kind=kind,
        )

    def export(
        self,
        name: str,
        workdir: storage.Path,
        out: storage.Path,
        *,
        needs: tuple[str, ...],
        failure_file: str = "",
    ) -> Job:
        """The export of a run."""
        return Job(
            name,
            command("dpojax.runs.export", workdir=workdir, out=out),
            needs=needs,
            outputs=(str(out / "config.json"),),  # `huggingface.save` writes it last
            failure_files=_one(failure_file),
            kind="export",
        )

    def preferences(
        self,
        name: str,
        settings: Settings,
        *,
        needs: tuple[str, ...],
        kind: str,
        failure_file: str = "",
        part: tuple[int, int] = (0, 1),
    ) -> Job:
        """A part (index, count) of the preferences that settings describe."""
        index, count = part
        done = storage.as_path(settings.out) / f".done-{index + 1}of{count}"  # hidden: no data
        return Job(
            f"{name}-{index + 1}of{count}" if count > 1 else name,
            command(
                "dpojax.runs.preferences",
                settings=self.file(name, dataclasses.asdict(settings)),
                process=f"{index}/{count}",
                done=done,
            ),
            needs=needs,
            outputs=(str(done),),
            failure_files=_one(failure_file),
            kind=kind,
            is_part=count > 1,
        )


def _one(failure_file: str) -> tuple[str, ...]:
    return (failure_file,) if failure_file else ()
