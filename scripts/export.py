"""Export: python scripts/export.py --workdir=runs/reviews --out=exported [--stage=sft] [--step=N]

Writes a Hugging Face folder: weights (adapters merged), config, tokenizer and generation config;
with --adapters, the LoRA adapters alone in the format of PEFT.
"""

from __future__ import annotations

from dpojax.runs.command import run_command


def main() -> None:
    from dpojax.runs import export

    export.main()


if __name__ == "__main__":
    run_command(main)
