"""What a finished frontier run leaves, made up: the points, the optimum, and samples."""

import json
import pathlib

import numpy as np

from dpojax.evaluation.frontier import best_of_n, best_of_n_kl
from dpojax.evaluation.frontier_points import Point, write_points
from dpojax.evaluation.optimum import optimal_reward_at, optimum, trusted_up_to, write_optimum

# Method: its settings, the largest KL of a run, and the share of the optimal gain at KL 0 and 10.
METHODS = {
    "dpo": (["beta=0.05", "beta=0.1", "beta=0.3", "beta=1"], 11.0, (0.93, 0.88)),
    "online_dpo": (["beta=0.1", "beta=0.3"], 9.0, (0.97, 0.93)),
    "ppo": (["kl=0.02", "kl=0.05", "kl=0.1", "kl=0.3"], 10.0, (0.75, 0.55)),
    "ppo_gt": (["kl=0.02", "kl=0.05", "kl=0.1", "kl=0.3"], 12.0, (0.8, 0.78)),
    "unlikelihood": (["alpha=0.05", "alpha=0.5", "alpha=1"], 7.0, (0.5, 0.1)),
    "preferred_ft": (["lr=1e-5"], 0.6, (0.6, 0.6)),
}


def rewards(prompts=64, samples=2048):
    """Of samples of the reference, [prompts, samples], in [0, 1]."""
    draw = np.random.default_rng(0)
    logits = draw.normal(0.2, 0.8, (prompts, 1)) + draw.normal(0, 1.6, (prompts, samples))
    return 1 / (1 + np.exp(-logits))


def run(checkpoints=8, samples=2048):
    """Points of 22 runs, the optimum, and the point of the reference."""
    draw = np.random.default_rng(1)
    given = rewards(samples=samples)
    curve = optimum(given, np.concatenate([[np.inf], np.geomspace(3, 0.005, 40)]))
    base = float(given.mean())
    text = lambda: (draw.normal(38, 3), draw.uniform(0.3, 0.5), draw.uniform(0, 0.1))
    points = []
    for method, (settings, largest, (near, far)) in METHODS.items():
        for number, setting in enumerate(settings):
            reach = largest * (0.12 + 0.88 * (1 - number / len(settings)) ** 2)
            for seed in range(2 if method in ("dpo", "ppo", "unlikelihood", "preferred_ft") else 1):
                for step in range(1, checkpoints + 1):
                    kl = reach * (step / checkpoints) ** 0.7 * draw.uniform(0.85, 1.1)
                    best = optimal_reward_at(min(kl, trusted_up_to(curve)), curve).value
                    share = near + (far - near) * kl / 10 - 0.2 * draw.uniform() ** 3
                    reward = base + share * (best - base) + draw.normal(0, 0.008)
                    points.append(
                        Point(
                            method,
                            setting,
                            seed,
                            100 * step,
                            kl,
                            0.02 + 0.02 * kl,
                            reward,
                            0.01,
                            *text(),
                            draw.uniform(0.93, 1),
                            draw.uniform(0.6, 0.8),
                        )
                    )
    for n in (2, 4, 8, 16, 32, 64, 128, 256):
        kl, reward = best_of_n_kl(given, n), best_of_n(given, n)
        rest = (*text(), 1.0, np.nan)
        points.append(Point("best_of_n", f"n={n}", 0, 0, *kl, *reward, *rest))
    error = float(given.mean(1).std(ddof=1) / 8)
    start = Point("sft", "", 0, 0, 0.0, 0.0, base, error, *text(), 1.0, np.nan)
    return points, curve, start


def samples(points, texts=12):
    """Lines of `samples.jsonl`: of the last point of each method, for three prompts."""
    draw = np.random.default_rng(2)
    lines = []
    for point in {point.method: point for point in points}.values():
        for number in range(texts):
            words = draw.choice(["good", "bad", "<br />", "film", "a|b", "long"], 5 + number)
            lines.append(
                {
                    "method": point.method,
                    "setting": point.setting,
                    "prompt": f"Prompt {number % 3}: this",
                    "response": " " + " ".join(words),
                    "reward": float(np.clip(draw.normal(point.reward, 0.1), 0, 1)),
                    "logprob_ratio": float(draw.normal(point.kl, 1)),
                }
            )
    return lines


def write(folder: pathlib.Path):
    """The files of a small finished run."""
    points, curve, base = run(checkpoints=3, samples=256)
    write_points(folder / "frontier.csv", [base, *points])
    write_optimum(folder / "optimum.json", curve)
    lines = samples([base, *points])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
