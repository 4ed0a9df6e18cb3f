"""The names that other programs give the numbers of our metrics.

The loss, the gradient's norm, the learning rate, rewards, log-probs and `num_tokens` have TRL's
names already, and so have the numbers of PPO.

Sources: TRL and transformers, `DPOTrainer.log`, `Trainer.log` and `speed_metrics`; maxtext,
`maxtext/common/metric_logger.py`. Both read on 2026-12-01.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

TRL, MAXTEXT = "trl", "maxtext"
PROGRAMS = (TRL, MAXTEXT)
# {program: {split: {our name: its name}}}
NAMES: dict[str, dict[str, dict[str, str]]] = {
    TRL: {
        "train": {
            "kto/baseline": "kl",
            "num_tokens": "num_input_tokens_seen",
            "perf/examples_per_second": "train_samples_per_second",
            "perf/steps_per_second": "train_steps_per_second",
            "perf/tokens_per_second": "train_tokens_per_second",
        },
        "eval": {"kto/baseline": "eval_kl"},
    },
    MAXTEXT: {
        "train": {
            "loss": "learning/loss",
            "grad_norm": "learning/grad_norm",
            "learning_rate": "learning/current_learning_rate",
            "rewards/accuracies": "learning/reward_accuracy",
            "perf/seconds_per_step": "perf/step_time_seconds",
            "perf/tflops_per_device": "perf/per_device_tflops_per_sec",
            "perf/tokens_per_second_per_device": "perf/per_device_tokens_per_sec",
        },
        "eval": {
            "loss": "eval/avg_loss",
            "rewards/accuracies": "eval/avg_dpo_reward_accuracy",
        },
    },
}
TRL_EVALUATION = "eval_"  # what TRL puts before every metric of an evaluation


def aliases(values: Mapping[str, float], split: str, programs: Collection[str]) -> dict[str, float]:
    """The values of a line under the names of other programs; those without one are left out.

    Args:
      values: by our names.
      split: of the line.
      programs: of `PROGRAMS`.
    """
    renamed = {}
    for program in programs:
        for ours, theirs in NAMES[program].get(split, {}).items():
            if ours in values:
                renamed[theirs] = values[ours]
    if TRL in programs and split == "eval":
        renamed |= {f"{TRL_EVALUATION}{name}": value for name, value in values.items()}
    return renamed


def parse_programs(text: str) -> tuple[str, ...]:
    """Read the programs of `config.metric_names`: names with commas between; "" is none.

    Raises:
      ValueError: naming one that is not of `PROGRAMS`.
    """
    programs = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in programs:
        if name not in PROGRAMS:
            raise ValueError(f"{name!r} is none of {', '.join(PROGRAMS)}")
    return programs
