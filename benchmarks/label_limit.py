"""What an implicit reward that differs from the true one is worth.

    python benchmarks/label_limit.py

A policy that is the reference tilted by any function f of the response, p(y|x) exp(f(x,y) / b),
reaches less reward at a KL than one that is tilted by the reward itself. Labels that only say which
of two responses is better fix the order of rewards and nothing else, so DPO may end at any
increasing function of the reward, with errors on top. This prints the share of the optimal gain
that such policies reach on the embedded task, up to sampling from its grammar: a Markdown table.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from dpojax.data import reviews

Array = NDArray[np.float64]  # [prompts, samples]


def frontier(tilt: Array, reward: Array, betas: Array) -> tuple[Array, Array]:
    """KL from the reference in nats and mean reward, [betas] each, by importance sampling."""
    kls, rewards = [], []
    for beta in betas:
        log_weight = tilt / beta
        log_weight -= log_weight.max(axis=1, keepdims=True)
        weight = np.exp(log_weight)
        weight /= weight.sum(axis=1, keepdims=True)
        safe = np.maximum(weight * weight.shape[1], 1e-300)
        kls.append((weight * np.log(safe)).sum(axis=1).mean())
        rewards.append((weight * reward).sum(axis=1).mean())
    order = np.argsort(kls)
    return np.array(kls)[order], np.array(rewards)[order]


def shares(tilt: Array, reward: Array, at: list[float]) -> Array:
    """The share of the optimal gain in reward that is reached at each KL."""
    gain = []
    for f in (tilt, reward):
        kl, reached = frontier(f, reward, np.geomspace(0.01, 30, 60) * f.std())
        gain.append(np.interp(at, kl, reached) - reward.mean())
    return gain[0] / gain[1]


def tilts(log_odds: Array, rng: np.random.Generator) -> dict[str, Array]:
    """Functions f of the responses, by the name of their row in the table."""
    rank = (log_odds.argsort(axis=1).argsort(axis=1) + 0.5) / log_odds.shape[1]
    noise = rng.normal(size=log_odds.shape) * rank.std()
    by_name = {
        "rank among the reference's responses": rank,
        "log-odds of being positive": log_odds,
    }
    for correlation in (0.95, 0.9, 0.8, 0.6):
        with_noise = rank + noise * np.sqrt(1 / correlation**2 - 1)
        by_name[f"rank with noise, correlation {correlation:g}"] = with_noise
    return by_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=4096, help="of each prompt")
    parser.add_argument("--at", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 3], help="nats")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    prompts = reviews.prompts("eval", args.prompts, 5)
    repeated = [[prompt] * args.samples for prompt in prompts]
    odds = np.array([reviews.score(p, reviews.sample(rng, len(p), p)) for p in repeated])
    reward = 1 / (1 + np.exp(-odds))
    print("| tilted by | " + " | ".join(f"{kl:g} nats" for kl in args.at) + " |")
    print("| --- " * (len(args.at) + 1) + "|")
    for name, tilt in tilts(odds, rng).items():
        cells = [f"{100 * share:.0f} %" for share in shares(tilt, reward, args.at)]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
