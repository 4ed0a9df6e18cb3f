"""Before and after: what a preference stage did to its policy, on held-out pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

from dpojax import sharding
from dpojax.data.rows import Rows
from dpojax.intervals import wilson_interval
from dpojax.logprobs import TokenStatistics
from dpojax.methods import preference
from dpojax.stages.example_stage import ExampleStage
from dpojax.stages.held_out_kl import KL, kl_programs
from dpojax.stages.references import policy_starts_at_reference, saved_weights
from dpojax.stages.stage import Summary
from dpojax.tables import ruled_table
from dpojax.training.metrics import Window

Values = dict[str, float]


def open_summary(stage: ExampleStage) -> Callable[[ExampleStage, dict], Summary]:
    """(stage, params) -> a comparison of `params` with the reference on the held-out data.

    The stage may be this one, or another that shares its model, reference and data. The table is
    saved in the stage's folder. KL is exact over the vocabulary, averaged over the contexts of the
    held-out responses' tokens. Rewards are those that the loss trains, as in every line of metrics.
    """
    reference = saved_weights(stage)
    kl_of = kl_programs(stage)
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
            both = (kl_of.distributions(x, rows) for x in (params, reference))
            kl.add({KL: kl_of.divergence(*both, rows)})
        by_source = {
            name: {"before": before.flush(), "after": after.flush()}
            for name, (before, after) in windows.items()
        }
        values = by_source.pop("")
        kl_per_token = {"before": 0.0, "after": kl.flush()[KL]}
        pairs = member.batches.data.count_held_out_pairs()
        reward = preference.loss_reward(member.loss.name, member.loss.options)
        summary = {
            "pairs": pairs,
            "values": values,
            "kl_per_token_exact": kl_per_token,
            "reward": {"formula": reward.formula, "unit": reward.unit},
        }
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
    reward = preference.loss_reward(stage.loss.name, stage.loss.options)
    labelled = data.is_labelled
    chosen, rejected = ("desirable", "undesirable") if labelled else ("chosen", "rejected")

    def both(name: str) -> tuple[str, str]:
        return f"{before[name]:+.3f}", f"{after[name]:+.3f}"

    def accuracies(name: str, values: dict[str, Values], count: int) -> tuple[str, str, str]:
        start = "all are equal"  # where policy == reference
        if not reward.needs_reference:
            start = _accuracy(values["before"][accuracy], count)
        return name, start, _accuracy(values["after"][accuracy], count)

    ranks = "has the sign of the label" if labelled else "ranks the pair rightly"
    rows = [("", "before" if policy_starts_at_reference(stage) else "the reference", "after")]
    if accuracy in after:
        everything = {"before": before, "after": after}
        rows.append(accuracies(f"reward {ranks}", everything, pairs))
        for name, indices in data.held_out_by_source.items():
            count = data.count_pairs(indices)
            rows.append(accuracies(f"  of those from {name}", by_source[name], count))
    if not labelled:
        likelier = (_accuracy(x["logps/accuracies"], pairs) for x in (before, after))
        rows += [
            ("policy finds the chosen response likelier", *likelier),
            (f"reward margin ({reward.unit})", *both("rewards/margins")),
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
    about = f"reward: {reward.formula}, with p of the policy and q of the reference"
    return "\n".join([*ruled_table(title, rows), about])


def _accuracy(share: float, pairs: int) -> str:
    """A share of pairs with its interval, in percent."""
    if pairs == 0:
        return "- (no held-out pair states a preference)"
    low, high = wilson_interval(round(share * pairs), pairs)
    return f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
