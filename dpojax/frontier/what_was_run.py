"""What a frontier was made with: models, counts, learning rates and versions, for its report."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.saved import read_run_config
from dpojax.evaluation import frontier_points
from dpojax.evaluation.frontier_report import Section
from dpojax.frontier import online
from dpojax.frontier.configs import CLASSIFIER, POLICY, PREFERENCES, REWARD_MODEL
from dpojax.frontier.runs import ONLINE, PREFERENCE
from dpojax.models import huggingface, safetensors_io
from dpojax.runs.preferences import PROVENANCE
from dpojax.training.metrics import read_metrics

PACKAGES = ("dpojax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "tokenizers")
MODELS = {
    POLICY: "policy and reference",
    REWARD_MODEL: "reward model, learned",
    CLASSIFIER: "classifier, the exact reward",
}


def sections(folder: storage.Path, plan: Mapping[str, Any]) -> list[Section]:
    """The sections of a finished frontier's report: models, counts, and the settings of runs.

    Args:
      folder: of the frontier.
      plan: what plan.json holds.
    """
    return [_models(folder), _counts(folder, plan["config"]), _settings(folder, plan)]


def environment() -> dict[str, str]:
    """Devices, machine and versions of this process, which writes the report."""
    devices = jax.devices()
    return {
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "machine": f"{platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
    } | {name: version for name in PACKAGES if (version := _version(name))}


def stage_folders(
    folder: storage.Path, plan: Mapping[str, Any], run: Mapping[str, Any]
) -> list[storage.Path]:
    """The folders of the stages that a run trained, one after the other."""
    workdir = folder / "runs" / run["name"]
    if run["stage"] != ONLINE:
        return [workdir / run["stage"]]
    rounds = plan["config"]["frontier"]["online_rounds"]
    return [trained / PREFERENCE for trained in online.trained_runs(workdir, rounds)]


def _models(folder: storage.Path) -> Section:
    rows = []
    for name, what in MODELS.items():
        if (folder / name).is_dir():
            path = huggingface.local_folder(folder / name, ["*.safetensors*", "config.json"])
            config = storage.read_json(storage.as_path(path) / "config.json")
            tensors = safetensors_io.read_folder(path).values()
            sizes = [config.get(key, "") for key in ("num_hidden_layers", "hidden_size")]
            parameters = f"{sum(tensor.view.size for tensor in tensors):,}"
            kind = config.get("model_type", "")
            rows.append([what, kind, parameters, *map(str, (*sizes, config.get("vocab_size", "")))])
    header = ["model", "kind", "parameters", "layers", "width", "vocabulary"]
    return Section("Models", "", header, rows)


def _counts(folder: storage.Path, config: Mapping[str, Any]) -> Section:
    """How much every part learned from, and how much it was judged by."""
    frontier, samples = config["frontier"], config["samples"]
    rows = []
    report = folder / "sft" / "sft" / "data_report.json"
    if report.is_file():
        rows.append(["SFT: texts", f"{storage.read_json(report)['train']['kept']:,}"])
    provenance = folder / PREFERENCES / PROVENANCE
    if provenance.is_file():
        counts = storage.read_json(provenance)["counts"]
        rows += [
            ["preferences: prompts", f"{counts['records']:,} of {counts['prompts']:,}"],
            ["preferences: completions drawn", f"{counts['completions']:,}"],
        ]
    judged = f"{samples['count'] * samples['per_prompt']:,}"
    rows += [
        ["responses that judge a checkpoint", f"{judged}, to {samples['count']:,} prompts"],
        ["responses of the reference to each prompt", f"{frontier['reference_samples']:,}"],
        ["seed", str(config["seed"])],
    ]
    return Section("Counts", "", ["what", "how many"], rows)


def _settings(folder: storage.Path, plan: Mapping[str, Any]) -> Section:
    rows = []
    for run in plan["runs"]:
        stages = stage_folders(folder, plan, run)
        if not stages or not (stages[0].parent / "config.json").exists():  # it failed before
            continue
        config = read_run_config(stages[0].parent)
        stage = config["ppo" if run["stage"] == "ppo" else PREFERENCE]
        steps = sum(_last_step(folder) for folder in stages)
        rows.append(
            [
                frontier_points.name(run["method"]),
                run["setting"],
                f"{stage.learning_rate:g}",
                _warmup(stage),
                stage.schedule,
                str(stage.batch_size),
                str(steps),
            ]
        )
    note = (
        "As the config file sets them. A step of PPO is an iteration: its batch is of responses, "
        "that of the others of prompts."
    )
    header = ["method", "setting", "learning rate", "warm-up", "schedule", "batch", "steps"]
    return Section("Settings of the runs", note, header, rows)


def _warmup(stage: ConfigDict) -> str:
    if stage.warmup_ratio is not None:
        return f"{stage.warmup_ratio:.0%}"
    return str(stage.warmup_steps)


def _last_step(stage: storage.Path) -> int:
    return max((line["step"] for line in read_metrics(stage)), default=0)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
