"""Every loss on the same preferences: the same SFT policy, the same steps, several seeds.

    python benchmarks/every_loss.py --model=SFT_FOLDER --data=FILE --out=every_loss

SFT_FOLDER is a policy that scripts/export.py wrote. A seed decides the order of the data. A loss's
step is compiled once, for all seeds. Every run ends with one line in OUT/results.jsonl, and a
second call continues where the first one stopped. OUT/table.md and OUT/every_loss.png show the
results so far. All policies are evaluated on the same held-out pairs, by their log-ratios against
the SFT policy, whatever their own loss reads. For losses that read scores, every pair has a score
gap of 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dpojax.config.defaults import default_config
from dpojax.evaluation.plots import BLUE, GREY, STYLE, VERMILLION
from dpojax.methods import preference
from dpojax.stages import registry
from dpojax.stages import train as stage_train
from dpojax.stages.held_out_kl import KL
from dpojax.stages.preference import Preference
from dpojax.stages.reference import Reference
from dpojax.stages.setup import initial_params, prepare_setup
from dpojax.training.preemption import StopSignal
from dpojax.training.state import make_optimizer, new_state

# Options without a default; beta and all others are the library's defaults, and nothing is tuned.
LOSS_OPTIONS = {
    "ipo": {"length_norm": "mean"},
    "dpo_ties": {"threshold": 1.1},
    "dpo_soft": {"scale": 3.0},
    "odpo": {"alpha": 1.0},
    "dpop": {"penalty": 5.0},
    "rpo": {"scale": 3.0, "form": "bwd_kl"},
    "tdpo": {"reference.kind": "live"},
    "alphapo": {"beta": 2.0, "gamma": 1.0, "alpha": 0.25},
    "gpo": {"convex": "exponential"},
    "chipo": {"max_reward": 1.0},
    "tpo_l": {"beta": 2.0, "gamma": 1.0, "alpha": 1.0},
    "beta_dpo": {"alpha": 0.6},
    "epsilon_dpo": {"reference.kind": "live"},
    "alpha_dpo": {"beta": 2.0, "gamma": 1.0, "alpha": 0.1},
    "uni_dpo": {"scale": 1.0, "good_score": 0.0},
    "npo": {"retain_weight": 1.0},
    "simnpo": {"beta": 2.5, "gamma": 0.0, "retain_weight": 1.0},
    "unlikelihood": {"alpha": 0.1},
    "robust": {"label_smoothing": 0.1},
}
METRICS = ("rewards/accuracies", "logps/accuracies", "displacement")


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.jsonl"
    finished = {(line["loss"], line["seed"]) for line in _read(file)}
    losses = args.losses.split(",") if args.losses else preference.LOSSES
    for number, loss in enumerate(losses, 1):
        seeds = [seed for seed in range(args.seeds) if (loss, seed) not in finished]
        for line in train(loss, seeds, args) if seeds else ():
            with open(file, "a") as out:
                out.write(json.dumps(line) + "\n")
            right = f"{line['rewards/accuracies']:.0%} right"
            print(f"{number} of {len(losses)}: {loss}, seed {line['seed']}, {right}", flush=True)
    results = _read(file)
    (args.out / "table.md").write_text(table(results))
    draw(results, args.out / "every_loss.png")
    print((args.out / "table.md").read_text())


class Opened(NamedTuple):
    """A prepared preference stage, its reference, and the SFT policy that it starts from."""

    stage: Preference
    reference: Reference
    start: dict


def train(loss: str, seeds: list[int], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train one loss with each seed; yields a line of results for each."""
    stage, reference, start = _open(loss, args.out / "runs" / loss, args)
    by_seed = {seed: stage.batches_with_seed(seed) for seed in seeds}
    shape = stage.shape_for([*by_seed.values()])
    mesh, optimizer = stage.setup.mesh, make_optimizer(stage.config.optimizer)
    abstract = stage_train.abstract_train_state(stage, optimizer)
    step = stage_train.jitted_step(stage, optimizer, stage.steps)
    frozen = stage_train.frozen_weights(None, reference)
    evaluate = _evaluator(args)
    for seed, batches in by_seed.items():
        state = new_state(jax.tree.map(np.array, start), optimizer, abstract, seed)
        values = []
        for rows in batches.with_shape(shape).training(reference.attach):
            placed = reference.to_device(rows, mesh)
            state, report = step(state, placed, stage.hyper, frozen)
            values.append(report.metrics["loss"].value)
            if not bool(report.finite):
                raise FloatingPointError(f"{loss}, seed {seed}: not finite at step {len(values)}")
        line = {"loss": loss, "seed": seed, "first_loss": values[0], "last_loss": values[-1]}
        line |= {"steps": len(values), "pairs": evaluate.pairs}
        yield line | evaluate(state.params)


class Evaluator:
    """Held-out pairs with the SFT policy's log-probs; a call evaluates a policy on them."""

    def __init__(self, args: argparse.Namespace):
        opened = _open("dpo", args.out / "runs" / "evaluation", args, beta=1.0)
        self.stage = opened.stage
        self.begin_kl = opened.reference.begin_kl
        self.rows = [
            opened.reference.to_device(rows, self.stage.setup.mesh)
            for rows in self.stage.batches.held_out(opened.reference.attach)
        ]
        self.pairs = len(self.stage.batches.data.held_out)

    def __call__(self, params: dict) -> dict[str, float]:
        values = stage_train.evaluate_batches(
            self.stage, params, iter(self.rows), begin_kl=self.begin_kl
        )
        metrics = {name: values[name] for name in METRICS}
        metrics |= {end: values[f"log_ratio/{end}"] for end in ("chosen", "rejected")}
        return metrics | {"kl": values[KL]}


_EVALUATORS: dict[pathlib.Path, Evaluator] = {}


def _evaluator(args: argparse.Namespace) -> Evaluator:
    """The one evaluator of all losses, opened by the first."""
    if args.out not in _EVALUATORS:
        _EVALUATORS[args.out] = Evaluator(args)
    return _EVALUATORS[args.out]


def _open(loss: str, workdir: pathlib.Path, args: argparse.Namespace, **options: float) -> Opened:
    """The stage of a loss, its reference, and the weights that it starts from."""
    config = default_config()
    config.stages = ("preference",)
    config.model.path = args.model
    config.preference.update(
        loss=loss,
        learning_rate=args.learning_rate,
        schedule="cosine",
        warmup_steps=5,
        batch_size=args.batch_size,
        steps=args.steps,
    )
    config.preference.data.update(
        source=str(_with_margins(args)), form=args.form, limit=0, eval_limit=0
    )
    config.preference.reference.cache = str(args.out / "reference_logprobs")
    config.token_cache = str(args.out / "tokens")
    config.preference.update_from_flattened_dict(LOSS_OPTIONS.get(loss, {}) | options)
    setup = prepare_setup(registry.resolve(config, workdir))
    stage = registry.open_stage(setup, "preference").prepare()
    start = initial_params(setup)
    with jax.set_mesh(setup.mesh), StopSignal() as stop, ExitStack() as writing:
        reference = stage.open_reference(start, None, stop, writing)
    return Opened(stage, reference, start)


def _with_margins(args: argparse.Namespace) -> pathlib.Path:
    """The data with a score gap of 1 in every pair, for the losses that look at one."""
    path = args.out / "data.json"
    if not path.exists():
        rows = [{"margin": 1.0} | row for row in json.loads(pathlib.Path(args.data).read_text())]
        path.write_text(json.dumps(rows))
    return path


def _read(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _mean(runs: list[dict], metric: str) -> float:
    return statistics.fmean(run[metric] for run in runs)


def _by_loss(results: list[dict]) -> list[tuple[str, list[dict]]]:
    """Losses with their runs, the highest mean accuracy first."""

    def loss_of(line: dict) -> str:
        return line["loss"]

    ordered = sorted(results, key=loss_of)
    groups = [(loss, list(runs)) for loss, runs in itertools.groupby(ordered, key=loss_of)]
    return sorted(groups, key=lambda group: -_mean(group[1], "rewards/accuracies"))


def table(results: list[dict]) -> str:
    """Mean over seeds with the standard deviation between them, as Markdown."""
    lines = [
        "| loss | own loss, first to last step | implicit reward right, % | chosen less likely, % "
        "| log-ratio chosen, nats | log-ratio rejected, nats | KL, nats/token |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for loss, runs in _by_loss(results):
        first, last = _mean(runs, "first_loss"), _mean(runs, "last_loss")
        lines.append(
            f"| `{loss}` | {first:.3f} to {last:.3f} "
            f"| {_cell(runs, 'rewards/accuracies', 100)} | {_cell(runs, 'displacement', 100)} "
            f"| {_cell(runs, 'chosen')} | {_cell(runs, 'rejected')} "
            f"| {_cell(runs, 'kl', digits=3)} |"
        )
    return "\n".join(lines) + "\n"


def _cell(runs: list[dict], metric: str, scale: float = 1.0, digits: int = 1) -> str:
    values = [scale * run[metric] for run in runs]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}"


def draw(results: list[dict], path: pathlib.Path) -> None:
    """Accuracy, share of chosen made less likely, log-ratios: a row per loss, a mark per seed."""
    groups = _by_loss(results)[::-1]
    panels = (
        ("Implicit reward right", "% of held-out pairs", [("rewards/accuracies", BLUE, "")], 100),
        ("Chosen made less likely", "% of held-out pairs", [("displacement", BLUE, "")], 100),
        (
            "Log-ratio to the SFT policy",
            "nats per response",
            [("chosen", BLUE, "chosen"), ("rejected", VERMILLION, "rejected")],
            1,
        ),
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure((9.5, 0.24 * len(groups) + 1.2), dpi=160, layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        for axis, (title, unit, series, scale) in zip(axes, panels):
            for name, color, label in series:
                for y, (_, runs) in enumerate(groups):
                    x = [scale * run[name] for run in runs]
                    axis.plot([min(x), max(x)], [y, y], color=color, alpha=0.35, linewidth=1.5)
                    once = label if label and not y else None  # in the legend
                    axis.plot(x, [y] * len(x), ".", color=color, markersize=5, label=once)
            axis.set(title=title, xlabel=unit)
            axis.axvline(50 if scale == 100 else 0, color=GREY, linewidth=0.8, linestyle="--")
        axes[0].set_yticks(range(len(groups)), [loss for loss, _ in groups])
        axes[0].set_ylim(-0.7, len(groups) - 0.3)
        axes[2].legend(frameon=False, loc="best")
        figure.savefig(path)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder of the SFT policy")
    add("--data", required=True, help="preferences, as config.preference.data.source")
    add("--form", default="instruction", help="of the data")
    add("--out", type=pathlib.Path, required=True)
    add("--losses", default="", help="comma-separated; default: all")
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=30)
    add("--batch-size", type=int, default=16)
    add("--learning-rate", type=float, default=1e-4)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
