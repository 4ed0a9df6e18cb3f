"""Stages of examples that train with the loop of `stages.train`."""

from __future__ import annotations

import json
from collections.abc import Callable

from dpojax import sharding, storage
from dpojax.stages import token_cache, train
from dpojax.stages.description import describe, report_text
from dpojax.stages.example_stage import ExampleStage
from dpojax.stages.stage import Lowered, RowSize, Summarise
from dpojax.training.loop import StopSignal
from dpojax.training.memory import Footprint


class TrainedStage(ExampleStage):
    """A stage of examples, from its footprint to its summary."""

    def footprint(self) -> Footprint:
        return train.footprint(self)

    def memory_advice(self) -> dict[str, str]:
        return train.memory_advice(self)

    def lower(self, row: RowSize) -> Lowered:
        length = row.prompt + row.responses * (row.response + 1)
        return train.lower(self, length, row.responses)

    def describe(self) -> str:
        return describe(self)

    def save_reports(self) -> str:
        reports = self.batches.data.reports
        as_json = {name: json.loads(report.to_json()) for name, report in reports.items()}
        storage.write_json(self.folder / "data_report.json", as_json)
        storage.write_text(self.folder / "data_report.txt", report_text(self) + "\n")
        return f"{self.name}: tokens {token_cache.save(self.batches.data)}"

    def train(self, start: Callable[[], dict], stop: StopSignal) -> dict:
        return train.train_stage(self, start, stop)

    def evaluate(self, params: dict) -> dict[str, float]:
        """Metrics of parameters on the held-out examples, without a reference."""
        batches = (sharding.put_rows(rows, self.setup.mesh) for rows in self.batches.held_out())
        return train.evaluate_batches(self, params, batches)

    def open_summary(self) -> Summarise:
        """Nothing is summarised: the evaluations say it all."""
        return lambda stage, params: None
