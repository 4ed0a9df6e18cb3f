"""Export: python scripts/export.py --workdir=runs/reviews --out=exported [--stage=dpo] [--step=N]

Writes a Hugging Face folder: weights, config, tokenizer and generation config.
"""

from __future__ import annotations

import sys

from absl import app, flags

WORKDIR = flags.DEFINE_string("workdir", None, "Of a run of scripts/train.py.", required=True)
OUT = flags.DEFINE_string("out", None, "The folder to write, new or empty.", required=True)
STAGE = flags.DEFINE_string("stage", "", "sft or dpo; the run's last stage by default.")
STEP = flags.DEFINE_integer("step", None, "A checkpoint of the stage; its newest by default.")


def main(_) -> int:
    from dpojax.launch.config import ConfigError
    from dpojax.launch.export import export
    from dpojax.training.checkpoints import CheckpointError

    try:
        folder = export(WORKDIR.value, OUT.value, stage=STAGE.value, step=STEP.value)
    except (ConfigError, CheckpointError, FileExistsError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: load it with transformers.AutoModelForCausalLM.from_pretrained")
    return 0


if __name__ == "__main__":
    app.run(main)
