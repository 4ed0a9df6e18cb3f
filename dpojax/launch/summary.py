"""Before and after: what a preference stage did to its policy, on held-out pairs."""

from __future__ import annotations

import json

import jax
from scipy.stats import binomtest

from dpojax import sharding
from dpojax.launch.references import folder_of
from dpojax.launch.stages import Stage
from dpojax.training import checkpoints
from dpojax.training.metrics import Window
from dpojax.training.step import build_divergence


def summarise(stage: Stage, params: dict) -> dict:
    """Compare `params` with the run's reference on the held-out pairs; save the table.

    Writes summary.json and summary.txt into the stage's folder. KL is exact over the vocabulary,
    averaged over the contexts of the held-out responses' tokens.
    """
    reference = checkpoints.load_tree(folder_of(stage), stage.setup.abstract_params)
    divergence = jax.jit(build_divergence(stage.setup.model, max_logits=stage.setup.max_logits))
    before, after, kl_window = Window(), Window(), Window()
    for batch in stage.held_out():
        rows = sharding.put_rows(batch, stage.setup.mesh)
        scored = stage.score(reference, rows)
        rows = rows._replace(reference=scored.logprob)
        before.add(stage.metrics(scored, rows, stage.hyper))
        after.add(stage.metrics(stage.score(params, rows), rows, stage.hyper))
        kl_window.add({"kl": divergence(params, reference, rows)})
    values = {"before": before.flush(), "after": after.flush()}
    kl = {"before": 0.0, "after": kl_window.flush()["kl"]}
    pairs = _pairs(stage)
    result = {"pairs": pairs, "values": values, "kl_per_token_exact": kl}
    if jax.process_index() == 0:
        text = _table(stage, pairs, values, kl)
        (stage.folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
        (stage.folder / "summary.txt").write_text(text + "\n")
    return result


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of `count` independent pairs."""
    found = binomtest(round(share * count), count).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def _pairs(stage: Stage) -> int:
    counts = [len(stage.data.examples[i].responses) for i in stage.data.held_out]
    return sum(k * (k - 1) // 2 for k in counts)


def _table(stage: Stage, pairs: int, values: dict, kl: dict) -> str:
    before, after = values["before"], values["after"]

    def accuracy(of: dict, name: str) -> str:
        low, high = interval(of[name], pairs)
        return f"{100 * of[name]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

    def number(name: str) -> tuple[str, str]:
        return f"{before[name]:+.3f}", f"{after[name]:+.3f}"

    rows = [
        ("", "the reference" if stage.config.reference.path else "before", "after"),
        (
            "implicit reward ranks the pair rightly",
            "all rewards are 0",
            accuracy(after, "rewards/accuracies"),
        ),
        (
            "policy finds the chosen response likelier",
            accuracy(before, "logps/accuracies"),
            accuracy(after, "logps/accuracies"),
        ),
        ("reward margin (nats)", *number("rewards/margins")),
        ("log-prob of chosen (nats)", *number("logps/chosen")),
        ("log-prob of rejected (nats)", *number("logps/rejected")),
        ("chosen became less likely", "-", f"{100 * after['displacement']:.1f} %"),
        ("KL(policy || reference) (nats/token)", f"{kl['before']:.4f}", f"{kl['after']:.4f}"),
        ("loss (nats)", f"{before['loss']:.4f}", f"{after['loss']:.4f}"),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
    beta = float(stage.hyper["beta"])
    title = (
        f"{stage.config.loss.upper()} with beta {beta:g}, {pairs} held-out pairs "
        "(95 % intervals in brackets)"
    )
    rule = "-" * len(lines[0])
    return "\n".join([title, rule, lines[0], rule, *lines[1:], rule])
