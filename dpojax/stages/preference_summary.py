"""Before and after: what a preference stage did to its policy, on held-out pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import jax

from dpojax import sharding
from dpojax.data.rows import Rows
from dpojax.intervals import wilson_interval
from dpojax.logprobs import TokenStatistics
from dpojax.stages.example_stage import ExampleStage
from dpojax.stages.references import policy_starts_at_reference, saved_weights
from dpojax.stages.stage import Summary
from dpojax.tables import ruled_table
from dpojax.training.forward import build_divergence
from dpojax.training.metrics import Window

Values = dict[str, float]


def open_summary(stage: ExampleStage) -> Callable[[ExampleStage, dict], Summary]:
    """(stage, params) -> a comparison of `params` with the reference on the held-out data.

    The stage may be this one, or another that shares its model, reference and data. The table is
    saved in the stage's folder. KL is exact over the vocabulary, averaged over the contexts of the
    held-out responses' tokens. Rewards are implicit ones against the reference, also where the loss
    needs no reference.
    """
    reference = saved_weights(stage)
    divergence = jax.jit(build_divergence(stage.setup.model, max_logits=stage.setup.max_logits))
    live = reference if "kl" in stage.programs.objective.statistics else None
    put = partial(sharding.put_rows, mesh=stage.setup.mesh)

    def scored(rows: Rows) -> tuple[Rows, TokenStatistics]:
        tokens = sharding.to_host(stage.programs.score(reference, put(rows), reference=live))
        return rows._replace(reference=tokens.logprob), tokens

    held_out = [scored(rows) for rows in stage.batches.held_out()]
    sources = stage.batches.held_out_sources or [""] * len(held_out)

    def summarise(member: ExampleStage, params: dict) -> Summary:
        score, metrics, hyper = member.programs.score, member.programs.metrics, member.hyper
        windows: dict[str, tuple[Window, Window]] = defaultdict(lambda: (Window(), Window()))
        kl = Window()
        for (rows, tokens), source in zip(map(put, held_out), sources):
            now = metrics(tokens, rows, hyper)
            then = metrics(score(params, rows, reference=live), rows, hyper)
            for name in {"", source}:  # all of them, and those of one source
                before, after = windows[name]
                before.add(now)
                after.add(then)
            kl.add({"kl": divergence(params, reference, rows)})
        by_source = {
            name: {"before": before.flush(), "after": after.flush()}
            for name, (before, after) in windows.items()
        }
        values = by_source.pop("")
        kl_per_token = {"before": 0.0, "after": kl.flush()["kl"]}
        pairs = member.batches.data.count_held_out_pairs()
        summary = {"pairs": pairs, "values": values, "kl_per_token_exact": kl_per_token}
        if by_source:
            summary["by_source"] = by_source
        text = _table(member, pairs, values["before"], values["after"], kl_per_token, by_source)
        member.save_summary(summary, text)
        return summary

    return summarise


def _table(
    stage: ExampleStage,
    pairs: int,
    before: Values,
    after: Values,
    kl_per_token: Values,
    by_source: dict[str, dict[str, Values]],
) -> str:
    data, accuracy = stage.batches.data, "rewards/accuracies"
    labelled = data.is_labelled
    chosen, rejected = ("desirable", "undesirable") if labelled else ("chosen", "rejected")

    def both(name: str) -> tuple[str, str]:
        return f"{before[name]:+.3f}", f"{after[name]:+.3f}"

    ranks = "has the sign of the label" if labelled else "ranks the pair rightly"
    zero = "all rewards are 0"
    rows = [
        ("", "before" if policy_starts_at_reference(stage) else "the reference", "after"),
        (f"implicit reward {ranks}", zero, _accuracy(after[accuracy], pairs)),
    ]
    for name, indices in data.held_out_by_source.items():
        shares = by_source[name]["after"][accuracy], data.count_pairs(indices)
        rows.append((f"  of those from {name}", zero, _accuracy(*shares)))
    if not labelled:
        likelier = (_accuracy(x["logps/accuracies"], pairs) for x in (before, after))
        rows += [
            ("policy finds the chosen response likelier", *likelier),
            ("reward margin (nats)", *both("rewards/margins")),
        ]
    rows += [
        (f"log-prob of {chosen} (nats)", *both("logps/chosen")),
        (f"log-prob of {rejected} (nats)", *both("logps/rejected")),
        (f"{chosen} became less likely", "-", f"{100 * after['displacement']:.1f} %"),
        (
            "KL(policy || reference) (nats/token)",
            *(f"{kl_per_token[when]:.4f}" for when in ("before", "after")),
        ),
    ]
    if stage.programs.objective.baseline is None:  # else the loss depends on the running baseline
        rows.append(("loss (nats)", f"{before['loss']:.4f}", f"{after['loss']:.4f}"))
    beta = f" with beta {stage.hyper['beta']:g}" if "beta" in stage.hyper else ""
    kind = "labelled responses" if labelled else "pairs"
    title = (
        f"{stage.config.loss.upper()}{beta}, {pairs} held-out {kind} (95 % intervals in brackets)"
    )
    return "\n".join(ruled_table(title, rows))


def _accuracy(share: float, pairs: int) -> str:
    """A share of pairs with its interval, in percent."""
    if pairs == 0:
        return "- (no held-out pair states a preference)"
    low, high = wilson_interval(round(share * pairs), pairs)
    return f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
