"""Every loss on the same preferences: the same SFT policy, the same steps, several seeds.

    python benchmarks/every_loss.py --model=SFT_FOLDER --data=FILE --out=every_loss

SFT_FOLDER is a policy that scripts/export.py wrote. A seed decides the order of the data; loss and
step are compiled once and serve all seeds. Every run ends in one line of OUT/results.jsonl, and a
second call goes on where the first was stopped. OUT/table.md and OUT/every_loss.png show what is
there. All policies are judged on the same held-out pairs by their log-ratios against the SFT
policy, whatever their own loss looks at. Losses that look at scores find a gap of 1 in every pair.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import statistics

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from dpojax.config.checks import check
from dpojax.config.defaults import default_config
from dpojax.data.pipeline import order, train_batches
from dpojax.evaluation.plots import BLUE, GREY, STYLE, VERMILLION
from dpojax.methods import preference
from dpojax.models.decoder import SHARDING_RULES
from dpojax.stages import references, setup, token_cache
from dpojax.stages import stage as stages
from dpojax.stages.stage import shape_of
from dpojax.training.forward import FrozenWeights, build_divergence, language_model
from dpojax.training.loop import StopSignal
from dpojax.training.state import abstract_state, make_optimizer, make_schedule, new_state
from dpojax.training.step import build_step

# Options without a default; beta and all others are the library's defaults, and nothing is tuned.
GIVEN = {
    "ipo": {"length_norm": "mean"},
    "dpo_ties": {"threshold": 1.1},
    "dpo_soft": {"scale": 3.0},
    "odpo": {"alpha": 1.0},
    "dpop": {"penalty": 5.0},
    "rpo": {"scale": 3.0, "form": "bwd_kl"},
    "tdpo": {"reference.kind": "live"},
    "alphapo": {"beta": 2.0, "gamma": 1.0, "alpha": 0.25},
    "unlikelihood": {"alpha": 0.1},
    "robust": {"label_smoothing": 0.1},
}
METRICS = ("rewards/accuracies", "logps/accuracies", "displacement", "chosen", "rejected", "kl")


def main(argv: list[str] | None = None) -> None:
    args = _arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.jsonl"
    done = _read(file)
    have = {(line["loss"], line["seed"]) for line in done}
    losses = args.losses.split(",") if args.losses else preference.LOSSES
    wanted = [(loss, seed) for loss in losses for seed in range(args.seeds)]
    with tqdm(total=len(wanted), initial=len(set(wanted) & have), unit="run") as bar:
        for loss in losses:
            seeds = [seed for seed in range(args.seeds) if (loss, seed) not in have]
            for line in train(loss, seeds, args) if seeds else ():
                with open(file, "a") as out:
                    out.write(json.dumps(line) + "\n")
                bar.update()
                bar.set_postfix_str(f"{loss} {100 * line['rewards/accuracies']:.0f} %")
    done = _read(file)
    (args.out / "table.md").write_text(table(done))
    draw(done, args.out / "every_loss.png")
    print((args.out / "table.md").read_text())


def train(loss: str, seeds: list[int], args: argparse.Namespace):
    """Train one loss with each seed; yields a line of results for each."""
    stage, used, start = _open(loss, args)
    mesh, optimizer = stage.setup.mesh, make_optimizer(stage.config.optimizer)
    abstract = abstract_state(stage.setup.abstract_params, optimizer, mesh, SHARDING_RULES)
    forward = language_model(
        stage.setup.model, statistics=stage.objective.statistics, max_logits=stage.setup.max_logits
    )
    schedule = make_schedule(stage.config.schedule, stage.config.warmup_steps, stage.steps)
    step = jax.jit(build_step(forward, stage.objective, optimizer, schedule), donate_argnums=0)
    judge = _judge("preference", args)
    size = {"batch_size": stage.config.batch_size, "steps": stage.steps}
    orders = {seed: order(stage.data.train, **size, seed=seed) for seed in seeds}
    stage = stage._replace(shape=shape_of(stage, [*orders.values()]))
    frozen = FrozenWeights(reference=used.params)
    for seed, indices in orders.items():
        state = new_state(jax.tree.map(np.array, start), optimizer, abstract, seed)
        batches = train_batches(stage.data.examples, indices, stage.shape, attach=used.attach)
        values = []
        for rows in batches:
            state, report = step(state, used.to_device(rows, mesh), stage.hyper, frozen)
            values.append(report.metrics["loss"].value)
            if not bool(report.finite):
                raise FloatingPointError(f"{loss}, seed {seed}: not finite at step {len(values)}")
        found = {"loss": loss, "seed": seed, "first_loss": values[0], "last_loss": values[-1]}
        yield found | {"steps": len(values), "pairs": judge.pairs} | judge(state.params)


class _Judge:
    """Held-out pairs with the SFT policy's log-probs; calls score a policy on them."""

    def __init__(self, args: argparse.Namespace):
        self.stage, self.used, self.start = _open("preference", args)
        self.hyper = self.stage.hyper | {"beta": np.float32(1.0)}
        self.divergence = jax.jit(build_divergence(self.stage.setup.model))
        mesh = self.stage.setup.mesh
        self.rows = [self.used.to_device(x, mesh) for x in self.stage.held_out(self.used.attach)]
        self.pairs = len(self.stage.data.held_out)

    def __call__(self, params) -> dict[str, float]:
        stage = self.stage._replace(hyper=self.hyper)
        values = stage.evaluate(params, iter(self.rows))
        kl = [self.divergence(params, self.start, rows) for rows in self.rows]
        found = {name: values[name] for name in METRICS[:3]}
        found |= {"chosen": values["rewards/chosen"], "rejected": values["rewards/rejected"]}
        found["kl"] = float(sum(x.total for x in kl) / sum(x.weight for x in kl))
        return found


_JUDGES: dict[str, _Judge] = {}


def _judge(name: str, args: argparse.Namespace) -> _Judge:
    if name not in _JUDGES:
        _JUDGES[name] = _Judge(args)
    return _JUDGES[name]


def _open(loss: str, args: argparse.Namespace):
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
    for key, value in GIVEN.get(loss, {}).items():
        config.preference.update_from_flattened_dict({key: value})
    check(config)
    stage = stages.prepare("preference", setup.prepare(config, args.out / "runs" / loss))
    token_cache.save(stage.data)
    start = setup.initial_params(stage.setup)
    with jax.set_mesh(stage.setup.mesh), StopSignal() as stop:
        needs = stage.objective.needs_reference
        used = references.open_reference(stage, start, stop) if needs else references.Reference()
    return stage, used, start


def _with_margins(args: argparse.Namespace) -> pathlib.Path:
    """The data with a score gap of 1 in every pair, for the losses that look at one."""
    path = args.out / "data.json"
    if not path.exists():
        rows = [{"margin": 1.0} | row for row in json.loads(pathlib.Path(args.data).read_text())]
        path.write_text(json.dumps(rows))
    return path


def _read(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _by_loss(results: list[dict]) -> list[tuple[str, list[dict]]]:
    """Losses with their runs, the highest mean accuracy first."""
    results = sorted(results, key=lambda line: line["loss"])
    groups = [(k, list(g)) for k, g in itertools.groupby(results, key=lambda line: line["loss"])]
    mean = lambda runs: statistics.fmean(run["rewards/accuracies"] for run in runs)
    return sorted(groups, key=lambda group: -mean(group[1]))


def table(results: list[dict]) -> str:
    """Mean over seeds with the standard deviation between them, as Markdown."""
    lines = [
        "| loss | own loss, first to last step | implicit reward right, % | chosen less likely, % "
        "| log-ratio chosen, nats | log-ratio rejected, nats | KL, nats/token |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for loss, runs in _by_loss(results):

        def cell(name: str, scale: float = 1.0, digits: int = 1, runs=runs) -> str:
            values = [scale * run[name] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            return f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}"

        mean = lambda name, runs=runs: statistics.fmean(run[name] for run in runs)
        lines.append(
            f"| `{loss}` | {mean('first_loss'):.3f} to {mean('last_loss'):.3f} "
            f"| {cell('rewards/accuracies', 100)} | {cell('displacement', 100)} "
            f"| {cell('chosen')} | {cell('rejected')} | {cell('kl', 1, 3)} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: list[dict], path: pathlib.Path) -> None:
    """One row per loss: accuracy, displacement and both log-ratios, a mark for every seed."""
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
                    given = {"label": label} if label and not y else {}
                    axis.plot(x, [y] * len(x), ".", color=color, markersize=5, **given)
            axis.set(title=title, xlabel=unit)
            axis.axvline(50 if scale == 100 else 0, color=GREY, linewidth=0.8, linestyle="--")
        axes[0].set_yticks(range(len(groups)), [loss for loss, _ in groups])
        axes[0].set_ylim(-0.7, len(groups) - 0.3)
        axes[2].legend(frameon=False, loc="upper left")
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
