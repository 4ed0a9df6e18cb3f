"""Stages of examples that train with the loop of `stages.train`; those of policies among them."""

from __future__ import annotations

import abc
import json
from collections.abc import Callable
from typing import Self

from dpojax import sharding, storage
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import ResolvedRun
from dpojax.models import lora_peft
from dpojax.stages import train
from dpojax.stages.adapters import open_adapters
from dpojax.stages.example_stage import ExampleStage, Programs, make_programs
from dpojax.stages.exported import ExportOptions
from dpojax.stages.setup import Setup
from dpojax.stages.stage import (
    Lowered,
    RowSize,
    Summarise,
    count,
    mesh_text,
    require_language_model,
)
from dpojax.training.forward import build_score, language_model
from dpojax.training.memory import Footprint
from dpojax.training.objective import Objective
from dpojax.training.preemption import StopSignal
from dpojax.training.state import warmup_steps


class TrainedStage(ExampleStage):
    """A stage of examples, from its footprint to its summary."""

    def footprint(self) -> Footprint:
        return train.footprint(self)

    def memory_advice(self) -> dict[str, str]:
        return train.memory_advice(self)

    def lower(self, row: RowSize) -> Lowered:
        length = row.prompt + row.responses * (row.response + 1)
        return train.lower(self, length, row.responses)

    def metric_names(self) -> list[str]:
        return train.metric_names(self)

    def describe(self) -> str:
        return describe(self)

    def save_reports(self) -> str:
        reports = self.batches.data.reports
        as_json = {name: json.loads(report.to_json()) for name, report in reports.items()}
        storage.write_json(self.folder / "data_report.json", as_json)
        text, file = report_text(self) + "\n", self.folder / "data_report.txt"
        unchanged = file.exists() and storage.read_text(file) == text
        storage.write_text(file, text)
        report = f"{self.name}: the data are as they were, see {file}\n" if unchanged else text
        return f"{report}{self.name}: tokens {self.batches.data.file_note}"

    def train(self, start: Callable[[], dict], stop: StopSignal) -> dict:
        return train.train_stage(self, start, stop)

    def evaluate(self, params: dict) -> dict[str, float]:
        """Metrics of parameters on the held-out examples, without a reference."""
        batches = (sharding.put_rows(rows, self.setup.mesh) for rows in self.batches.held_out())
        return train.evaluate_batches(self, params, batches)

    def open_summary(self) -> Summarise:
        """Nothing is summarised: the evaluations say it all."""
        return lambda stage, params: None


class LanguageStage(TrainedStage):
    """A stage of examples that trains a policy."""

    @classmethod
    @abc.abstractmethod
    def objective_of(cls, run: ResolvedRun) -> Objective:
        """What the stage of this run minimises."""

    @classmethod
    def open(cls, setup: Setup) -> Self:
        require_language_model(setup, cls.name)
        return cls(setup, cls.build_programs(setup), open_adapters(setup, cls.name))

    @classmethod
    def build_programs(cls, setup: Setup) -> Programs:
        """The stage's programs for the setup's model, which has the stage's head."""
        objective = cls.objective_of(setup.run)
        forward = language_model(
            setup.model,
            statistics=objective.statistics,
            max_logits=setup.max_logits,
        )
        score = build_score(setup.model, max_logits=setup.max_logits)
        return make_programs(objective, forward, score)

    def export(self, folder: storage.Path, options: ExportOptions) -> None:
        if not options.adapters or self.adapters is None:
            super().export(folder, options)
            return
        if options.dtype != "float32":
            raise ConfigError(
                f"dtype {options.dtype}: of merged weights; adapters are kept in float32"
            )
        is_first = self.name == self.setup.config.stages[0]
        step = self.best_step if options.step is None else options.step
        lora_peft.save_peft(
            folder,
            self.adapters.trained(self.checkpoint_folder, step),
            self.adapters.config,
            self.setup.model.config,
            self.setup.imported_config,
            base=options.base if is_first else None,
        )

    def trained_params(self, step: int | None = None) -> dict:
        if self.adapters is None:
            return super().trained_params(step)
        step = self.best_step if step is None else step
        return self.adapters.trained_params(self.checkpoint_folder, step)


def describe(stage: ExampleStage) -> str:
    """The model, the mesh, the data, the shape of a batch, and memory."""
    batches = stage.batches
    data, shape = batches.data, batches.shape
    parameters = f"{count(stage.setup.abstract_params)} parameters"
    if stage.adapters is not None:
        parameters += f" under adapters of {count(stage.adapters.abstract)}"
    smaller = ", ".join(f"{bucket.rows} x {bucket.length}" for bucket in shape.buckets[:-1])
    return (
        f"{stage.name}: {parameters} on a mesh of {mesh_text(stage.setup)}; "
        f"{data.train:,} examples to train on and {len(data.held_out):,} held out; "
        f"{batches.steps:,} steps of {batches.batch_size} examples in at most "
        f"{shape.micro_batches} micro-batches of {shape.rows} rows x {shape.length} tokens, "
        f"{shape.scored} of them scored at most"
        + (f", the less full ones of {smaller}" if smaller else "")
        + f"\n{stage.name}: about {stage.footprint()} of each device"
        + warmup_warning(stage)
    )


def warmup_warning(stage: ExampleStage) -> str:
    """A line where the rate never reaches what the config says; else ""."""
    steps = stage.steps
    warmup = warmup_steps(stage.config, steps)
    if warmup < steps:
        return ""
    key = f"config.{stage.name}"
    return (
        f"\n{stage.name}: WARNING: the warm-up takes {warmup} steps and the stage has {steps}: the "
        f"learning rate never reaches {key}.learning_rate, and ends at {steps / (warmup + 1):.0%} "
        f"of it; lower {key}.warmup_steps, or set {key}.warmup_ratio instead"
    )


def report_text(stage: ExampleStage) -> str:
    """What became of the records."""
    reports = stage.batches.data.reports
    return "\n\n".join(f"{stage.name} data: {part}\n{report}" for part, report in reports.items())
