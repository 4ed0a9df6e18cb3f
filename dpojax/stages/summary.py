"""Before and after: what a preference stage did to its policy, on held-out pairs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial

import jax

from dpojax import sharding
from dpojax.data.rows import Rows
from dpojax.logprobs import TokenStatistics
from dpojax.stages.references import folder_of
from dpojax.stages.setup import kept_step
from dpojax.stages.stage import Stage
from dpojax.training import checkpoints
from dpojax.training.forward import build_divergence
from dpojax.training.metrics import Window


def open_summary(stage: Stage) -> Callable[[Stage, dict], dict]:
    """(stage, params) -> a comparison of `params` with the run's reference on the held-out data, of
    this stage or of others that share its model, reference and data; the table is saved.

    Writes summary.json and summary.txt into the stage's folder. KL is exact over the vocabulary,
    averaged over the contexts of the held-out responses' tokens. Rewards are implicit ones against
    the reference, also where the loss needs none.
    """
    reference = checkpoints.load_tree(folder_of(stage), stage.setup.abstract_params)
    divergence = jax.jit(build_divergence(stage.setup.model, max_logits=stage.setup.max_logits))
    live = reference if "kl" in stage.objective.statistics else None

    put = partial(sharding.put_rows, mesh=stage.setup.mesh)

    def scored(batch: Rows) -> tuple[Rows, TokenStatistics]:
        tokens = sharding.to_host(stage.score(reference, put(batch), live))
        return batch._replace(reference=tokens.logprob), tokens

    held_out = [scored(batch) for batch in stage.held_out()]

    def summarise(own: Stage, params: dict) -> dict:
        before, after, kl_window = Window(), Window(), Window()
        for rows, tokens in map(put, held_out):
            before.add(own.metrics(tokens, rows, own.hyper))
            after.add(own.metrics(own.score(params, rows, live), rows, own.hyper))
            kl_window.add({"kl": divergence(params, reference, rows)})
        values = {"before": before.flush(), "after": after.flush()}
        return _saved(own, values, {"before": 0.0, "after": kl_window.flush()["kl"]})

    return summarise


def _saved(stage: Stage, values: dict, kl: dict) -> dict:
    count = _count(stage)
    result = {"pairs": count, "values": values, "kl_per_token_exact": kl}
    if jax.process_index() == 0:
        text = _table(stage, count, values, kl)
        (stage.folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
        (stage.folder / "summary.txt").write_text(text + "\n")
    return result


def summarise_reward(stage: Stage, params: dict) -> dict:
    """How often a reward model ranks held-out pairs rightly; saved as `open_summary` does.

    Where the best of several evaluations is kept, its accuracy is a little too high for new data.
    """
    batches = (sharding.put_rows(rows, stage.setup.mesh) for rows in stage.held_out())
    values, count = stage.evaluate(params, batches), _count(stage)
    kept = kept_step(stage.setup, stage.name) or stage.steps
    result = {"pairs": count, "step": kept, "values": {"after": values}}
    if jax.process_index() == 0:
        low, high = interval(values["rewards/accuracies"], count)
        accuracy = f"{100 * values['rewards/accuracies']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
        why = ", the best held-out accuracy" if stage.keep_best else ""
        spread = (values["rewards/squares"] - values["rewards/mean"] ** 2) ** 0.5
        lines = [
            f"reward model, {stage.config.loss}: {count} held-out pairs (95 % interval)",
            f"kept                     step {kept} of {stage.steps}{why}",
            f"ranks the pair rightly   {accuracy}",
            f"mean gap of a pair       {values['rewards/margins']:+.3f}",
            f"scores, mean and spread  {values['rewards/mean']:+.3f} ± {spread:.3f} (an export "
            "subtracts the mean)",
            f"loss (nats)              {values['loss']:.4f}",
        ]
        (stage.folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
        (stage.folder / "summary.txt").write_text("\n".join(lines) + "\n")
    return result


def summarise_classifier(stage: Stage, params: dict) -> dict:
    """How often a classifier is right about held-out texts; saved as `open_summary` does."""
    batches = (sharding.put_rows(rows, stage.setup.mesh) for rows in stage.held_out())
    values, count = stage.evaluate(params, batches), len(stage.data.held_out)
    low, high = interval(values["accuracy"], count)
    result = {"texts": count, "labels": stage.data.labels, "values": {"after": values}}
    result["accuracy_interval"] = (low, high)
    if jax.process_index() == 0:
        labels = ", ".join(stage.data.labels)
        lines = [
            f"classifier of {labels}: {count} held-out texts, their first "
            f"{stage.config.max_tokens} tokens (95 % interval)",
            f"accuracy              {100 * values['accuracy']:.1f} % "
            f"[{100 * low:.1f}, {100 * high:.1f}]",
            f"cross-entropy (nats)  {values['cross_entropy']:.4f}",
        ]
        (stage.folder / "summary.json").write_text(json.dumps(result, indent=2) + "\n")
        (stage.folder / "summary.txt").write_text("\n".join(lines) + "\n")
    return result


def interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of `count` independent pairs or texts."""
    from scipy.stats import binomtest  # takes a second, which no run waits for at its start

    found = binomtest(round(share * count), count).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def _labelled(stage: Stage) -> bool:
    return stage.data.examples[0].label is not None


def _count(stage: Stage) -> int:
    """Held-out pairs that state a preference, or labelled responses."""
    if _labelled(stage):
        return len(stage.data.held_out)
    held_out = [stage.data.examples[i] for i in stage.data.held_out]
    ranks = [example.rank or range(len(example.responses)) for example in held_out]
    return sum(a < b for places in ranks for a, b in itertools.combinations(places, 2))


def _table(stage: Stage, count: int, values: dict, kl: dict) -> str:
    before, after = values["before"], values["after"]
    labelled = _labelled(stage)
    chosen, rejected = ("desirable", "undesirable") if labelled else ("chosen", "rejected")

    def accuracy(of: dict, name: str) -> str:
        if count == 0:
            return "- (no held-out pair states a preference)"
        low, high = interval(of[name], count)
        return f"{100 * of[name]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

    def number(name: str) -> tuple[str, str]:
        return f"{before[name]:+.3f}", f"{after[name]:+.3f}"

    ranks = "has the sign of the label" if labelled else "ranks the pair rightly"
    rows = [
        ("", "before" if stage.starts_at_reference else "the reference", "after"),
        (
            f"implicit reward {ranks}",
            "all rewards are 0",
            accuracy(after, "rewards/accuracies"),
        ),
    ]
    if not labelled:
        rows += [
            (
                "policy finds the chosen response likelier",
                accuracy(before, "logps/accuracies"),
                accuracy(after, "logps/accuracies"),
            ),
            ("reward margin (nats)", *number("rewards/margins")),
        ]
    rows += [
        (f"log-prob of {chosen} (nats)", *number("logps/chosen")),
        (f"log-prob of {rejected} (nats)", *number("logps/rejected")),
        (f"{chosen} became less likely", "-", f"{100 * after['displacement']:.1f} %"),
        ("KL(policy || reference) (nats/token)", f"{kl['before']:.4f}", f"{kl['after']:.4f}"),
    ]
    if stage.objective.baseline is None:  # else the loss depends on the baseline kept in training
        rows.append(("loss (nats)", f"{before['loss']:.4f}", f"{after['loss']:.4f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
    beta = f" with beta {stage.hyper['beta']:g}" if "beta" in stage.hyper else ""
    kind = "labelled responses" if labelled else "pairs"
    title = (
        f"{stage.config.loss.upper()}{beta}, {count} held-out {kind} (95 % intervals in brackets)"
    )
    rule = "-" * len(lines[0])
    return "\n".join([title, rule, lines[0], rule, *lines[1:], rule])
