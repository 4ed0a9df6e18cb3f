"""Export: dpojax export --workdir=runs/reviews --out=exported [--stage=sft] [--step=N]

Writes a Hugging Face folder: weights (adapters merged), config, tokenizer and generation config;
with --adapters, the LoRA adapters alone in the format of PEFT.
"""

from __future__ import annotations

from typing import NoReturn

from dpojax.runs.command import run_command


def main() -> None:
    from dpojax.config.command_line import command_name
    from dpojax.runs import export

    export.main(prog=command_name())


def start() -> NoReturn:
    """Run the command that `sys.argv` holds, and end the process."""
    run_command(main)
