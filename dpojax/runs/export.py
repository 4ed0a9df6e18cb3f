"""A finished or running stage's policy as a Hugging Face folder.

python -m dpojax.runs.export --workdir=runs/reviews --out=exported [--stage=sft] [--step=100] \\
    [--adapters] [--dtype=bfloat16] [--base=FOLDER]
"""

from __future__ import annotations

from collections.abc import Sequence

from dpojax import display, storage
from dpojax.config.command_line import ArgumentParser
from dpojax.config.errors import ConfigError
from dpojax.config.saved import read_run_config
from dpojax.runs.base_files import with_base_files
from dpojax.runs.command import run_command
from dpojax.stages.exported import DTYPES, ExportOptions
from dpojax.stages.registry import STAGES, open_stage, resolve
from dpojax.stages.setup import prepare_setup
from dpojax.watchdog import watching


def export(
    workdir: str | storage.Path,
    folder: str | storage.Path,
    *,
    stage: str = "",
    step: int | None = None,
    adapters: bool = False,
    dtype: str = "float32",
    base: str = "",
) -> storage.Path:
    """Write what `transformers.AutoModelForCausalLM.from_pretrained(folder)` loads.

    Adapters are merged in float32, whatever dtype a frozen base was stored in. Reward models and
    classifiers become a `...ForSequenceClassification`. A reward model's head has no bias, so its
    mean score on the held-out responses stands in a file of its own; `evaluation.rewards` subtracts
    it, and the rewards of those responses have mean 0. The ends in config.json are those of the
    run's tokenizer. The model that the run began with need not be there any more.

    Args:
      workdir: of a run.
      folder: new or empty.
      stage: of the run; "" is its last.
      step: a checkpoint of the stage; None is the best of a stage that keeps it, else its newest.
      adapters: instead write the stage's LoRA adapters alone, for `peft.PeftModel.from_pretrained`.
        Their base is config.model.path for the run's first stage, and for a later one the export
        of the stage before; load it in the stage's `lora.base_dtype`.
      dtype: to which weights are rounded: float32, bfloat16 or float16.
      base: where the model that the run began with lies now. Adapters name it as theirs.

    Returns:
      the folder.

    Raises:
      ConfigError: `workdir` holds no run, or none with that stage, or one without adapters; a
        weight that float16 cannot hold.
      CheckpointError: the stage has no such checkpoint.
      FileExistsError: `folder` is not empty.
    """
    run = storage.as_path(workdir, "--workdir")
    target = storage.as_path(folder, "--out")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype={dtype}: {', '.join(DTYPES)}")
    config = read_run_config(run)
    with watching(config.hang_minutes):
        setup = prepare_setup(resolve(with_base_files(config, run, base), run))
        opened = open_stage(setup, stage or config.stages[-1])
        base = base or config.model.path or None
        opened.export(target, ExportOptions(step, adapters, dtype, base))
    return target


def main(
    arguments: Sequence[str] | None = None, *, prog: str = "python -m dpojax.runs.export"
) -> None:
    """The command line of `export`; `prog` is the command's name in --help and errors."""
    parser = ArgumentParser(
        prog=prog,
        description="Write a stage's policy as a Hugging Face folder.",
    )
    parser.add_argument("--workdir", required=True, help="of a run")
    parser.add_argument("--out", required=True, help="the folder to write, new or empty")
    parser.add_argument(
        "--stage", default="", help=f"{', '.join(STAGES)}; by default the run's last"
    )
    parser.add_argument("--step", type=int, help="a checkpoint; by default the best or newest")
    parser.add_argument("--adapters", action="store_true", help="only the LoRA adapters, for PEFT")
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="of the weights; by default float32"
    )
    parser.add_argument("--base", default="", help="where the model that the run began with is now")
    options = parser.parse_args(arguments)
    folder = export(
        options.workdir,
        options.out,
        stage=options.stage,
        step=options.step,
        adapters=options.adapters,
        dtype=options.dtype,
        base=options.base,
    )
    place = "" if storage.is_local(folder) else "copy it to a disk and "
    loader = _loader(folder, options.adapters)
    display.say(f"{folder}: {place}load it with {loader}.from_pretrained")


def _loader(folder: storage.Path, adapters: bool) -> str:
    """The class that loads an exported folder."""
    if adapters:
        return "peft.PeftModel"
    architectures = storage.read_json(folder / "config.json").get("architectures") or []
    scores = any("Classification" in name for name in architectures)
    head = "SequenceClassification" if scores else "CausalLM"
    return f"transformers.AutoModelFor{head}"


if __name__ == "__main__":
    run_command(main)
