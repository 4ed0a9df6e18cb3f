"""Before and after: what PPO did to a policy, by its samples."""

from __future__ import annotations

from collections.abc import Callable

import jax

from dpojax.stages.ppo_setup import PPOSetup
from dpojax.stages.samples import held_out_prompts, last_samples
from dpojax.stages.stage import Summary
from dpojax.tables import ruled_table
from dpojax.training.metrics import read_metrics

SHOWN = 4  # responses in the summary


def summarise(stage: PPOSetup, params: dict) -> Summary:
    """Compare the evaluations before the first iteration and after the kept one; save the table.

    `params` are those of the kept iteration. They were evaluated then, and are not looked at again.
    """
    del params
    if jax.process_index() > 0:  # the files are the first process's
        return {}
    lines = read_metrics(stage.folder, "eval")
    best_line = {line["step"]: line for line in lines}.get(stage.best_step, lines[-1])
    values = {"before": _sample_metrics(lines[0]), "after": _sample_metrics(best_line)}
    config = stage.setup.config.samples
    count = len(held_out_prompts(stage.setup))  # some of them may be the same
    summary = {"prompts": count, "per_prompt": config.per_prompt, "values": values}
    text = _table(summary, stage.evaluation_reward)
    for sample in last_samples(stage.folder, best_line["step"])[:SHOWN]:
        end = "" if sample["stopped"] else " [...]"
        text += f"\n{sample['reward']:+.3f}  {sample['prompt']} |{sample['response']}{end}"
    stage.save_summary(summary, text)
    return summary


def _sample_metrics(line: dict) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("samples/")}


def _table(summary: Summary, reward: str) -> str:
    values = summary["values"]

    def both(name: str, shown: Callable[[float], str]) -> list[str]:
        return [shown(values[when][f"samples/{name}"]) for when in ("before", "after")]

    def estimates(name: str) -> list[str]:
        numbers = both(name, lambda x: f"{round(x, 3) + 0.0:.3f}")  # no -0.000
        errors = both(f"{name}_error", "{:.3f}".format)
        return [f"{number} ± {error}" for number, error in zip(numbers, errors)]

    rows = [
        ("", "before", "after"),
        ("reward", *estimates("reward")),
        ("KL(policy || reference) (nats/response)", *estimates("kl")),
        ("the same by exact KLs of tokens", *estimates("kl_of_tokens")),
        ("length (tokens)", *both("length", "{:.1f}".format)),
        ("stopped by themselves", *both("stopped", _percent)),
        ("distinct 2-grams", *both("distinct_2", _percent)),
    ]
    title = (
        f"PPO, judged by {reward}: {summary['prompts']} held-out prompts with "
        f"{summary['per_prompt']} responses each (± standard error)"
    )
    return "\n".join(ruled_table(title, rows))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
