"""The Markdown report of a frontier run: conclusions, points on the Pareto fronts, what was run.

The samples have a file of their own.

Every sentence is computed from the points. Where the points do not settle a question, the report
says so. A claim needs more than `CLAIM` standard errors. "±" is one standard error.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dpojax.evaluation import frontier_points
from dpojax.evaluation.frontier import Estimate, Shortfall, front_below
from dpojax.evaluation.frontier_points import Point
from dpojax.evaluation.markdown import escaped, escaped_table
from dpojax.evaluation.optimum import (
    Optimum,
    above_limit,
    optimal_reward_at,
    share_of_optimal_gain,
    trusted_up_to,
)

TARGETS = (1.0, 3.0, 6.0, 10.0)  # nats
NEAR = 1.5  # a front point is near a target if the ratio of the two KLs is below this
CLAIM = 2.0  # standard errors
CHANCE = 0.5 * math.erfc(CLAIM / math.sqrt(2))  # that a normal error exceeds CLAIM on one side
STOPPED = 0.95  # the report warns if a smaller share of the responses ended by EOS

POINTS, WHAT_WAS_RUN = "## Points on the Pareto fronts", "## What was run"

Samples = Mapping[str, Mapping[str, Sequence[tuple[str, float]]]]


class Row(NamedTuple):
    """One line of the table: a point of a method's front, compared with the limit at its KL."""

    near: float  # the target of `TARGETS` that the point is near to, nats; nan: end of the front
    point: Point
    optimal: Estimate  # best possible reward at the point's KL
    share: Estimate  # of the optimal gain


class Section(NamedTuple):
    """A part of the report: a title, a note (or ""), and a table."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def report(
    points: Sequence[Point],
    optimum: Optimum,
    base: Point,
    environment: Mapping[str, object],
    *,
    sections: Sequence[Section] = (),
    seconds: Mapping[str, float] | None = None,
    figure: str = "frontier.png",
    failed: Mapping[str, str] | None = None,
) -> str:
    """Write the report as Markdown.

    Args:
      points: one per checkpoint, without the reference.
      optimum: the theoretical limit.
      base: the point of the reference, at KL 0.
      environment: the machine and the versions, name -> value.
      sections: what was run, after the table of points.
      seconds: stage -> how long it took; None: the report has no section on time.
      figure: address of the figure, relative to the report.
      failed: run -> why it ended early. `points` hold the checkpoints before that.
    """
    blocks = ["# Reward against KL from the reference", f"![Reward-KL frontier]({figure})"]
    blocks += ["## What the points say"]
    blocks += ["\n".join(f"* {text}" for text in conclusions(points, optimum, base))]
    if failed:
        listed = "\n".join(f"* {escaped(name)}: {escaped(why)}" for name, why in failed.items())
        blocks += ["## Runs that failed", f"Their points are those before.\n\n{listed}"]
    blocks += [POINTS, _about_the_table(optimum), table(points, optimum, base)]
    blocks += [WHAT_WAS_RUN]
    for section in sections:
        blocks += [
            f"### {section.title}",
            section.note,
            escaped_table(section.header, section.rows),
        ]
    rows = [[name, str(value)] for name, value in environment.items()]
    blocks += ["### Environment", escaped_table(["", "value"], rows)]
    if seconds is not None:
        rows = [[name, str(datetime.timedelta(seconds=round(s)))] for name, s in seconds.items()]
        blocks += ["### Time", escaped_table(["stage", "h:mm:ss"], rows)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def samples_report(samples: Samples) -> str:
    """The samples as Markdown, side by side for each prompt.

    Args:
      samples: method or run -> prompt -> pairs (response, reward).
    """
    return "\n\n".join(["# Samples for the same prompts", *_samples(samples)]) + "\n"


def conclusions(points: Sequence[Point], optimum: Optimum, base: Point) -> list[str]:
    """State what the points show: against the limit, DPO against each method, open doubts.

    The comparison with the limit comes first: a point above it by more than `CLAIM` standard errors
    means that something was measured wrongly.
    """
    finite = [frontier_points.at_the_bound(p) for p in points if frontier_points.is_finite(p)]
    sentences = _against_the_limit(finite, optimum)
    methods = frontier_points.by_method(finite)
    if "dpo" in methods:
        sentences += [_against(methods, other) for other in methods if other != "dpo"]
    else:
        sentences.append("There is no point of DPO with a finite KL and reward to compare.")
    return sentences + _doubts(points, base)


def rows(points: Sequence[Point], optimum: Optimum, base: Point) -> list[Row]:
    """The front points nearest to `TARGETS`, and the end of each front; by method and KL.

    "Nearest" is by the ratio of the KLs. A front point is used for its nearest target only. A
    target has no row for a method if no front point is within a factor of `NEAR`. Points of
    best-of-n are placed at the bound of their KL.
    """
    table_rows = []
    for members in frontier_points.by_method(points).values():
        front = frontier_points.front(map(frontier_points.at_the_bound, members))
        selected = _nearest_to_targets(front)
        if front and front[-1] not in [point for _, point in selected]:
            selected.append((math.nan, front[-1]))
        table_rows += [_row(target, point, optimum, base) for target, point in selected]
    return table_rows


def _nearest_to_targets(front: Sequence[Point]) -> list[tuple[float, Point]]:
    """(target, nearest front point) for each target that has one, by rising KL."""
    nearest: dict[float, Point] = {}
    best_ratio = dict.fromkeys(TARGETS, NEAR)
    for point in front:
        ratio, target = min((_ratio(point.kl, target), target) for target in TARGETS)
        if ratio < best_ratio[target]:
            best_ratio[target], nearest[target] = ratio, point
    return list(nearest.items())


def table(points: Sequence[Point], optimum: Optimum, base: Point) -> str:
    """`rows` as a Markdown table below a line of the reference; a dash where a value is unknown."""
    header = ["method", "near", "run", "KL", "reward", "optimal reward", "share of optimal gain"]
    header += ["length", "distinct-2", "repetition", "ended", "accuracy", "rank correlation"]
    lines = [
        ["reference", "0", "", "0", _pm(base.reward, base.reward_error), "", "", *_quality(base)]
    ]
    for near, point, optimal, share in rows(points, optimum, base):
        which = [point.setting, f"seed {point.seed}", f"step {point.step}"]
        if point.method == frontier_points.BEST_OF_N:
            which = which[:1]
        lines.append(
            [
                frontier_points.name(point.method),
                "end" if math.isnan(near) else f"{near:g}",
                ", ".join(part for part in which if part),
                _pm(point.kl, point.kl_error, 2),
                _pm(point.reward, point.reward_error),
                _pm(*optimal),
                _pm(*share, percent=True),
                *_quality(point),
            ]
        )
    return escaped_table(header, lines)


def by_prompt(lines: Sequence[Mapping]) -> Samples:
    """Group lines with method, setting, prompt, response and reward, for `samples_report`.

    Each run, "METHOD, SETTING", is a group of its own. The order of the lines is kept.

    >>> line = {"method": "dpo", "setting": "beta=1", "prompt": "So"}
    >>> by_prompt([line | {"response": " good", "reward": 0.9}])
    {'DPO, beta=1': {'So': [(' good', 0.9)]}}
    """
    samples: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for line in lines:
        run = f"{frontier_points.name(line['method'])}, {line['setting']}"
        texts = samples.setdefault(run, {}).setdefault(line["prompt"], [])
        texts.append((line["response"], line["reward"]))
    return samples


def _ratio(a: float, b: float) -> float:
    return max(a / b, b / a) if a > 0 else math.inf


def _row(near: float, point: Point, optimum: Optimum, base: Point) -> Row:
    share = share_of_optimal_gain(
        point.reward,
        point.kl,
        optimum,
        base=Estimate(base.reward, base.reward_error),
        reward_error=point.reward_error,
        kl_error=point.kl_error,
    )
    optimal = optimal_reward_at(point.kl, optimum)
    return Row(near, point, *(Estimate(*map(float, estimate)) for estimate in (optimal, share)))


def _against_the_limit(points: Sequence[Point], optimum: Optimum) -> list[str]:
    """Say whether a point lies above the limit. All points have finite KL and reward."""
    measured = frontier_points.arrays(points)
    gap = above_limit(
        measured.reward,
        measured.kl,
        optimum,
        reward_error=measured.reward_error,
        kl_error=measured.kl_error,
    )
    known = np.isfinite(gap.value) & np.isfinite(gap.error)
    count, unknown = int(known.sum()), len(points) - int(known.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        sigmas = np.where(known & (gap.value != 0), gap.value / gap.error, -np.inf)
    above = sigmas > CLAIM
    rest = ""
    if unknown:
        rest = f" {unknown} points could not be compared: the limit or an error is unknown."
    if not count:
        return [f"**Not known: whether a point lies above the theoretical limit.**{rest}"]
    if not above.any():
        return [
            f"No point of the {count} that can be compared lies above the theoretical limit by "
            f"more than {CLAIM:g} standard errors.{rest}"
        ]
    worst = int(sigmas.argmax())
    return [
        f"**WARNING: {int(above.sum())} of {count} points lie above the theoretical limit by more "
        f"than {CLAIM:g} standard errors, which cannot be.** By chance, if every point lay on the "
        f"limit, it would be about {CHANCE * count:.1f}; otherwise a reward, a KL or the limit is "
        f"wrong. The worst is {_which(points[worst])}: reward {measured.reward[worst]:.3f} at "
        f"{measured.kl[worst]:.2f} nats, {gap.value[worst]:.3f} above "
        f"({sigmas[worst]:.1f} standard errors).{rest}"
    ]


def _against(methods: Mapping[str, Sequence[Point]], other: str) -> str:
    """Compare the fronts of DPO and of another method, in both directions."""
    fronts = [frontier_points.arrays(frontier_points.front(methods[m])) for m in ("dpo", other)]
    name = escaped(frontier_points.name(other))
    start, stop = max(h.kl[0] for h in fronts), min(h.kl[-1] for h in fronts)
    if start > stop:
        return f"DPO and {name} have no KL in common: not compared."
    below, over = front_below(*fronts), front_below(*fronts[::-1])
    where = f"between {start:.2f} and {stop:.2f} nats"
    if math.isnan(below.sigmas) or math.isnan(over.sigmas):
        return f"DPO and {name} are not compared {where}: a standard error is unknown."
    behind, ahead = below.sigmas > CLAIM, over.sigmas > CLAIM
    claims = []
    if behind:
        claims.append(f"**DPO lies below {name}**, {_most(below)}")
    else:
        claims.append(
            f"DPO is nowhere below {name} by more than {CLAIM:g} combined standard errors"
        )
    if ahead:
        claims.append(f"{name} lies below DPO, {_most(over)}")
    else:
        claims.append(f"{name} is nowhere below DPO by more than that")
    end_of_dpo, end_of_other = (frontier_points.front(methods[m])[-1] for m in ("dpo", other))
    beyond = _beyond(end_of_dpo, end_of_other, name)
    return f"{'; '.join(claims)} ({where}, where both fronts run).{beyond}"


def _beyond(dpo: Point, end: Point, name: str) -> str:
    """Say where the other front goes on past the end of DPO's and gets a higher reward."""
    gain, error = end.reward - dpo.reward, math.hypot(end.reward_error, dpo.reward_error)
    if end.kl <= dpo.kl or not gain > CLAIM * error:
        return ""
    return (
        f" **Beyond that {name} gets higher**: to {end.reward:.3f} at {end.kl:.2f} nats, DPO at no "
        f"KL higher than {dpo.reward:.3f} (at {dpo.kl:.2f})."
    )


def _most(gap: Shortfall) -> str:
    return (
        f"by up to {gap.reward:.3f} at {gap.reward_at:.2f} nats and up to {gap.sigmas:.1f} "
        f"combined standard errors at {gap.sigmas_at:.2f} nats"
    )


def _doubts(points: Sequence[Point], base: Point) -> list[str]:
    """Say what these points do not settle."""
    doubts = [
        "A front is made of the best of many noisy checkpoints, so it lies a little too high, the "
        "more so the more runs a method has; the errors do not contain that.",
    ]
    unknown = [p for p in points if not frontier_points.is_finite(p)]
    if unknown:
        doubts.append(
            f"**{len(unknown)} of {len(points)} points have no finite KL or reward** and are in "
            f"neither figure nor fronts; the first is {_which(unknown[0])}."
        )
    cut = [p for p in points if p.stopped < STOPPED]
    if cut and all(p.stopped == 0 for p in points if math.isfinite(p.stopped)):
        doubts.append("No response ends before the length limit: all have as many tokens.")
    elif cut:
        worst = min(cut, key=lambda p: p.stopped)
        doubts.append(
            f"At {len(cut)} of {len(points)} points fewer than {STOPPED:.0%} of the responses "
            "ended by EOS, so that KL and reward are of texts without their end; the worst is "
            f"{_which(worst)} with {worst.stopped:.0%}."
        )
    if not math.isfinite(base.reward):
        doubts.append("**The reward of the reference is not finite**, so that no share is known.")
    return doubts


def _about_the_table(optimum: Optimum) -> str:
    end = trusted_up_to(optimum)
    known = (
        f"The limit can be trusted up to {end:.2f} nats; beyond that, or where an error is "
        "missing, a dash says that nothing is known."
        if math.isfinite(end)
        else "**The limit can be trusted nowhere**: no optimal reward and no share is known."
    )
    targets = ", ".join(f"{t:g}" for t in TARGETS[:-1]) + f" and {TARGETS[-1]:g}"
    return (
        f"Of each method the front points nearest to {targets} nats, none further away than a "
        f"factor of {NEAR:g}, and the end of the front. ± is one standard error over prompts. "
        f"{known} Best of n stands at log n - (n - 1) / n nats, which its KL cannot exceed. Length "
        "is in tokens, repetition the share of 4-grams that are repeats, ended the share of "
        "responses that ended by EOS, accuracy the share of held-out pairs that the reward of the "
        "run's loss ranks rightly, rank correlation Spearman's between the log-ratio to the "
        "reference and the exact reward, on held-out responses of the reference."
    )


def _which(point: Point) -> str:
    """Name a point in a sentence: method, setting, seed and step."""
    setting = escaped(point.setting)
    parts = [frontier_points.name(point.method), setting]
    parts += [f"seed {point.seed}", f"step {point.step}"]
    return ", ".join(part for part in parts if part)


def _samples(samples: Samples) -> list[str]:
    """A table for each prompt, with a line for each response, method by method."""
    blocks = []
    for prompt in dict.fromkeys(p for texts in samples.values() for p in texts):
        lines = []
        for method, texts in samples.items():
            name = frontier_points.name(method)
            for text, reward in texts.get(prompt, [("(no sample for this prompt)", math.nan)]):
                lines.append([name, _pm(reward, None), text])
        blocks += [f"> {escaped(prompt)}"]
        blocks += [escaped_table(["method", "reward", "response"], lines)]
    return blocks or ["None were given."]


def _quality(point: Point) -> list[str]:
    """The cells from "length" to "rank correlation" of a point."""
    shares = (point.distinct_2, point.repetition)
    texts = [_pm(point.length, None, 1), *(_pm(x, None, 3) for x in shares)]
    texts += [_pm(x, None, percent=True) for x in (point.stopped, point.accuracy)]
    return [*texts, _pm(point.rank_correlation, point.rank_correlation_error, 2)]


def _pm(value: float, error: float | None, digits: int = 3, *, percent: bool = False) -> str:
    """A value and its standard error, "0.5 ± 0.1"; a dash for a number that is not finite."""
    scale, unit, digits = (100, " %", 1) if percent else (1, "", digits)
    texts = [
        f"{scale * x:.{digits}f}" if math.isfinite(x) else "-"
        for x in ((value,) if error is None else (value, error))
    ]
    return texts[0] if texts[0] == "-" else " ± ".join(texts) + unit
