"""A checkpoint in the middle of a training run, as a Hugging Face folder.

    python -m dpojax.recipes.checkpoint --workdir=RUN --share=0.25 --out=FOLDER

takes the one whose step is nearest to a quarter of the run's steps. checkpoint.json in the folder
says which one that is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dpojax import storage
from dpojax.config.command_line import ArgumentParser
from dpojax.config.saved import read_run_config
from dpojax.recipes.plan import CHECKPOINT
from dpojax.runs.command import run_command
from dpojax.runs.export import export
from dpojax.training.checkpoints import CheckpointError
from dpojax.training.checkpoints.steps import find_steps


def export_at(workdir: storage.Path, share: float, out: storage.Path) -> int:
    """Export the checkpoint nearest to a share of the steps; return its step.

    Raises:
      CheckpointError: the run has no checkpoint.
    """
    stage = read_run_config(workdir).stages[-1]
    steps = sorted(find_steps(workdir / stage / "checkpoints").complete)
    if not steps:
        raise CheckpointError(f"{workdir}: the stage {stage} has no checkpoint")
    step = nearest_step(steps, share)
    if not (out / "config.json").exists():  # it is written last
        storage.remove_folder(out)
        export(workdir, out, stage=stage, step=step)
    storage.write_json(out / CHECKPOINT, {"step": step, "steps": steps[-1]})
    return step


def nearest_step(steps: Sequence[int], share: float) -> int:
    """Of ascending steps the one that is nearest to a share of the last."""

    def distance(step: int) -> float:
        return abs(step - share * steps[-1])

    return min(steps, key=distance)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of a job: see above."""
    parser = ArgumentParser(
        prog="python -m dpojax.recipes.checkpoint",
        description="Export a checkpoint of the middle of a run.",
    )
    parser.add_argument("--workdir", required=True, help="of a finished run")
    parser.add_argument("--share", required=True, type=_share, help="of the run's steps, up to 1")
    parser.add_argument("--out", required=True, help="the folder to write")
    options = parser.parse_args(arguments)
    workdir = storage.as_path(options.workdir, "--workdir")
    step = export_at(workdir, options.share, storage.as_path(options.out, "--out"))
    print(f"{options.out}: step {step}")


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text}: above 0, and at most 1")
    return share


if __name__ == "__main__":
    run_command(main)
