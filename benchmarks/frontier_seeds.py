"""The same frontier from several seeds: python benchmarks/frontier_seeds.py runs/frontier*

Of each method: the share of the optimal gain that its Pareto front reaches at a KL, for each folder
of scripts/frontier.py, and by how much DPO's front lies below that of the others. A Markdown table
for RESULTS.md.
"""

from __future__ import annotations

import pathlib

import numpy as np
from absl import app, flags

from dpojax.evaluation import frontier_points
from dpojax.evaluation.frontier import Estimate, front_below
from dpojax.evaluation.frontier_points import Point
from dpojax.evaluation.optimum import Optimum, optimal_reward_at, read_optimum

AT = flags.DEFINE_list("at", ["1", "2", "3", "5", "10"], "KLs, nats.")
BEST = flags.DEFINE_float(
    "best", 1.0, "The largest reward there is: the limit where it cannot be estimated."
)

Frontier = tuple[dict[str, list[Point]], Point, Optimum]


def read(folder: pathlib.Path) -> Frontier:
    """The fronts of a finished frontier by method, its reference and its limit."""
    points, base = frontier_points.without_base(
        frontier_points.read_points(folder / "frontier.csv")
    )
    methods = frontier_points.by_method(map(frontier_points.at_the_bound, points))
    fronts = {method: frontier_points.front(points) for method, points in methods.items()}
    return fronts, base, read_optimum(folder / "optimum.json")


def share_at(kl: float, front: list[Point], base: Point, optimum: Optimum, best: float) -> Estimate:
    """Of the optimal gain; the front is straight between its points and the reference, then flat.

    Beyond the KL up to which the limit is trusted it is taken to be `best`, so that the share is
    too small rather than too large. Standard errors are those of the front's rewards, interpolated.
    """
    measured = frontier_points.arrays([base, *front])
    limit = float(optimal_reward_at(kl, optimum).value)
    gain = (best if np.isnan(limit) else limit) - base.reward
    reward = np.interp(kl, measured.kl, measured.reward)
    error = np.interp(kl, measured.kl, measured.reward_error)
    return Estimate((reward - base.reward) / gain, error / gain)


def shares_table(frontiers: list[Frontier], at: list[float], best: float) -> list[str]:
    """Lines of Markdown: a method in each, with the shares of all folders at every KL."""
    lines = ["| method | " + " | ".join(f"{kl:g} nats" for kl in at) + " |"]
    lines.append("| --- " * (len(at) + 1) + "|")
    methods = dict.fromkeys(method for fronts, *_ in frontiers for method in fronts)
    for method in methods:
        cells = []
        for kl in at:
            shares = [
                share_at(kl, fronts[method], base, optimum, best)
                for fronts, base, optimum in frontiers
                if method in fronts
            ]
            shown = ", ".join(f"{100 * share.value:.0f}" for share in shares)
            cells.append(f"{shown} ± {100 * max(share.error for share in shares):.0f}")
        lines.append(f"| {frontier_points.name(method)} | " + " | ".join(cells) + " |")
    return lines


def below_table(frontiers: list[Frontier]) -> list[str]:
    """Lines of Markdown: how far DPO's front lies below each other at most, and where."""
    lines = ["| DPO below | " + " | ".join(f"folder {i}" for i in range(len(frontiers))) + " |"]
    lines.append("| --- " * (len(frontiers) + 1) + "|")
    others = dict.fromkeys(m for fronts, *_ in frontiers for m in fronts if m != "dpo")
    for method in others:
        cells = []
        for fronts, *_ in frontiers:
            dpo, other = (frontier_points.arrays(fronts[name]) for name in ("dpo", method))
            gap = front_below(dpo, other)
            cells.append(f"{gap.reward:+.3f} at {gap.reward_at:.1f} nats ({gap.sigmas:.1f} s.e.)")
        lines.append(f"| {frontier_points.name(method)} | " + " | ".join(cells) + " |")
    return lines


def main(argv: list[str]) -> None:
    frontiers = [read(pathlib.Path(folder)) for folder in argv[1:]]
    lines = shares_table(frontiers, [float(kl) for kl in AT.value], BEST.value)
    print("\n".join([*lines, "", *below_table(frontiers)]))


if __name__ == "__main__":
    app.run(main)
