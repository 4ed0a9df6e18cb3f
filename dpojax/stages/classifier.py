"""Text classifiers: a decoder with an output for each label."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Self

from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.rules import apply_rules, at_least, one_of
from dpojax.data.examples import Store
from dpojax.intervals import wilson_interval
from dpojax.methods import classifier
from dpojax.stages import classifier_data, train
from dpojax.stages.data import DataRequirements, NewStore, StageData
from dpojax.stages.example_stage import Programs, make_programs, scores_of
from dpojax.stages.setup import Setup, with_scalar_model
from dpojax.stages.stage import CLASSIFIER, Lowered, RowSize, Stage, Summarise, Summary
from dpojax.stages.trained_stage import TrainedStage
from dpojax.training import forward as forwards

LABELS = "labels.json"  # in the stage's folder
RULES = (
    at_least("max_tokens", 2),
    at_least("first_token", 0, "0 (only the last) or more"),
    one_of("data.form", ("auto", "classified"), "auto or classified: text and label"),
)


class Classifier(TrainedStage):
    """Trains the model it starts from, with an output for each label, to name a text's label."""

    name = "classifier"
    makes = CLASSIFIER

    @classmethod
    def resolve(cls, config: ConfigDict) -> None:
        super().resolve(config)
        apply_rules(RULES, config.classifier, "classifier.")

    @classmethod
    def open(cls, setup: Setup) -> Self:
        """The stage with the labels of its folder; `prepare` reads those of the data."""
        path = setup.workdir / cls.name / LABELS
        labels = _read_labels(path) if path.exists() else ()
        return cls.with_labels(setup, labels)

    @classmethod
    def with_labels(cls, setup: Setup, labels: tuple[str, ...]) -> Self:
        """The stage for a model with these labels."""
        setup = with_scalar_model(setup, labels)
        return cls(setup, cls.build_programs(setup))

    @classmethod
    def build_programs(cls, setup: Setup) -> Programs:
        labels_known = bool(setup.model.config.labels)
        forward = (forwards.classifier if labels_known else forwards.reward_model)(setup.model)
        objective = classifier.objective(setup.config.classifier.first_token)
        return make_programs(objective, forward, scores_of(forward))

    @property
    def requirements(self) -> DataRequirements:
        return DataRequirements("classified")

    @property
    def draws_records(self) -> bool:
        return bool(self.config.data.limit or self.config.data.eval_limit)

    def read_data(self, new_store: NewStore = Store) -> StageData:
        return classifier_data.load(
            self.config.data,
            self.setup.tokenizer,
            max_tokens=self.config.max_tokens,
            seed=self.setup.config.seed,
            new_store=new_store,
        )

    def data_settings(self) -> dict[str, Any]:
        return {"max_tokens": self.config.max_tokens}

    def load(self) -> Self:
        loaded = super().load()
        labelled = self.with_labels(self.setup, loaded.batches.data.labels)
        return dataclasses.replace(labelled, batches=loaded.batches)

    def lower(self, row: RowSize) -> Lowered:
        return train.lower(self._with_some_labels(), self.config.max_tokens, 1)

    def metric_names(self) -> list[str]:
        return train.metric_names(self._with_some_labels())

    def _with_some_labels(self) -> Self:
        """The stage with labels, also where those of the data are not known yet."""
        return self.with_labels(self.setup, self.setup.model.config.labels or ("0", "1"))

    def save_reports(self) -> str:
        storage.write_text(self.folder / LABELS, json.dumps(self.batches.data.labels) + "\n")
        return super().save_reports()

    def open_summary(self) -> Summarise:
        return summarise


def summarise(stage: Stage, params: dict) -> Summary:
    """How often a classifier is right about held-out texts; saved for a person."""
    data, values = stage.batches.data, stage.evaluate(params)
    texts = len(data.held_out)
    low, high = wilson_interval(round(values["accuracy"] * texts), texts)
    lines = [
        f"classifier of {', '.join(data.labels)}: {texts} held-out texts, their first "
        f"{stage.config.max_tokens} tokens (95 % interval)",
        f"accuracy              {100 * values['accuracy']:.1f} % "
        f"[{100 * low:.1f}, {100 * high:.1f}]",
        f"cross-entropy (nats)  {values['cross_entropy']:.4f}",
    ]
    summary = {"texts": texts, "labels": data.labels, "values": {"after": values}}
    summary["accuracy_interval"] = (low, high)
    stage.save_summary(summary, "\n".join(lines))
    return summary


def _read_labels(path: storage.Path) -> tuple[str, ...]:
    hint = "delete it: the command that began the run writes it again"
    labels = storage.read_json(path, hint)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise storage.StorageError(f"{path}: not a list of labels; {hint}")
    return tuple(labels)
