"""Export: python scripts/export.py --workdir=runs/reviews --out=exported [--stage=preference] [--step=N]

Writes a Hugging Face folder: weights (adapters merged), config, tokenizer and generation config;
with --adapters, the LoRA adapters alone in the format of peft.
"""

from __future__ import annotations

import sys

from absl import app, flags

WORKDIR = flags.DEFINE_string("workdir", None, "Of a run of scripts/train.py.", required=True)
OUT = flags.DEFINE_string("out", None, "The folder to write, new or empty.", required=True)
STAGE = flags.DEFINE_string(
    "stage", "", "sft, dpo, ppo, reward or classifier; the run's last by default."
)
ADAPTERS = flags.DEFINE_bool("adapters", False, "Only the LoRA adapters, for peft.")
STEP = flags.DEFINE_integer(
    "step", None, "A checkpoint of the stage; by default its best or newest."
)


def main(_) -> int:
    from dpojax.config.checks import ConfigError
    from dpojax.runs.export import export
    from dpojax.training.checkpoints import CheckpointError

    try:
        folder = export(
            WORKDIR.value, OUT.value, stage=STAGE.value, step=STEP.value, adapters=ADAPTERS.value
        )
    except (ConfigError, CheckpointError, FileExistsError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    reader = "peft.PeftModel" if ADAPTERS.value else "transformers.AutoModelForCausalLM"
    print(f"{folder}: load it with {reader}.from_pretrained")
    return 0


if __name__ == "__main__":
    app.run(main)
