"""What a stage is to a run: one interface, which every stage implements in a file of its own.

A run calls a stage's methods in this order:

    settings = STAGE.resolve(config)       # check the config, fill in defaults; nothing is loaded
    stage = STAGE.open(setup)              # model and programs from shapes, no data and no weights
    stage = stage.prepare()                # read and tokenise data, choose shapes
    stage.footprint()                      # predicted memory; a run that cannot fit is refused here
    params = stage.train(start, stop)      # from `start()`, or from the newest checkpoint
    stage.evaluate(params)                 # metrics on held-out data
    stage.summarise(params)                # a table for a person
    stage.export(folder)                   # a Hugging Face folder

`registry.STAGES` maps a config's name to the class.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax
from ml_collections import ConfigDict

from dpojax import sharding, storage
from dpojax.config.contents import NamedPath
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import ResolvedRun, as_json, flat
from dpojax.models import huggingface
from dpojax.stages.data import DataRequirements
from dpojax.stages.exported import ExportOptions, in_dtype
from dpojax.stages.kept import has_ended, kept_best, stopped_at
from dpojax.stages.samples import forget_later_samples
from dpojax.stages.setup import Setup
from dpojax.stages.tokenizers import read_generation_config
from dpojax.training import checkpoints
from dpojax.training.checkpoints import Checkpoints
from dpojax.training.memory import Footprint, gib, limit_bytes
from dpojax.training.metric_names import parse_programs
from dpojax.training.metrics import MetricWriter
from dpojax.training.preemption import StopSignal
from dpojax.training.trackers import TrackedRun, open_trackers

MEBI = 2**20  # processes agree on an int32, so bytes would be too many

POLICY = "a policy"
REWARD_MODEL = "a reward model"
CLASSIFIER = "a classifier"

Summary = dict[str, Any]
# (a stage that shares model, reference and data with the one that made this, parameters) -> summary
Summarise = Callable[["Stage", dict], Summary | None]


class RowSize(NamedTuple):
    """The largest row that a plan expects: tokens of a prompt, of a response, and responses."""

    prompt: int
    response: int
    responses: int


class Lowered(NamedTuple):
    """A train step that was lowered.

    Attributes:
      step: what can be compiled.
      rows: the batch, in words.
      weight_copies: float32 copies of the parameters: weights, gradient, moments.
    """

    step: jax.stages.Lowered
    rows: str
    weight_copies: int


class Stage(abc.ABC):
    """One stage of a run. `name` is its key in the config and its folder in the workdir.

    Attributes:
      name: of the stage.
      starts_from, makes: the kind of model that training starts from, and the kind that it gives.
      setup: what all stages of the run share.
    """

    name: ClassVar[str]
    starts_from: ClassVar[str] = POLICY
    makes: ClassVar[str] = POLICY
    setup: Setup

    @classmethod
    @abc.abstractmethod
    def resolve(cls, config: ConfigDict) -> Any:
        """Check the stage's part of a config and fill in the defaults that it leaves open.

        Args:
          config: of the whole run; it is changed in place.

        Returns:
          what the stage binds from the config for later: `ResolvedRun.settings[name]`.

        Raises:
          ConfigError: naming a key whose value no run can use.
        """

    @classmethod
    @abc.abstractmethod
    def paths(cls, config: ConfigDict) -> list[NamedPath]:
        """The files and folders in the stage's part of a config that decide its result."""

    @classmethod
    def traced_keys(cls, run: ResolvedRun) -> frozenset[str]:
        """Keys in which members of a vectorised sweep may differ. Empty: none can be vectorised."""
        del run
        return frozenset()

    @classmethod
    @abc.abstractmethod
    def open(cls, setup: Setup) -> Self:
        """The stage with its programs, without data and weights.

        Raises:
          ConfigError: the model cannot be what the stage starts from.
        """

    @property
    @abc.abstractmethod
    def requirements(self) -> DataRequirements:
        """The data that the stage learns from."""

    @abc.abstractmethod
    def prepare(self) -> Self:
        """The stage with its data, ready to train.

        Raises:
          DataError, ConfigError: data that cannot be used, or do not fit the model.
        """

    @abc.abstractmethod
    def footprint(self) -> Footprint | None:
        """The memory that a train step will need of each device; None where nothing predicts it."""

    def memory_advice(self) -> dict[str, str]:
        """What to change where a step needs too much memory, by the part that takes most of it.

        The key "" is for all other parts of the footprint.
        """
        return {"": "spread the model over more devices (config.mesh.fsdp)"}

    @abc.abstractmethod
    def lower(self, row: RowSize) -> Lowered:
        """Lower the stage's train step from shapes alone; neither data nor devices need be there.

        Args:
          row: tokens of a prompt and of each response.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """What the stage is about to do, for a person: model, mesh, data, memory."""

    def save_reports(self) -> str:
        """Keep the data report in the stage's folder; return what to print of it.

        A run that resumes prints the report again only if it has changed.
        """
        return ""

    @abc.abstractmethod
    def train(self, start: Callable[[], dict], stop: StopSignal) -> dict:
        """Train to the end, from the beginning or from the newest checkpoint.

        Args:
          start: gives the parameters to begin with, whose buffers are taken over. A stage that
            resumes calls it only to make damaged weights again, see `kept_weights.mend`.
          stop: says when the run has to save and end.

        Returns:
          the stage's final parameters, float32.
        """

    def kept_weights(self, start: Callable[[], dict]) -> dict[storage.Path, Callable[[], dict]]:
        """Folders of weights that the run keeps -> what makes them again, of start() or a path."""
        return {}

    @abc.abstractmethod
    def evaluate(self, params: dict) -> dict[str, float]:
        """Metrics of parameters on the held-out data."""

    @abc.abstractmethod
    def open_summary(self) -> Summarise:
        """What summarises this stage, and others that share its model, reference and data."""

    def summarise(self, params: dict) -> Summary | None:
        """Compare parameters with those before training, and save a table for a person."""
        return self.open_summary()(self, params)

    def export(self, folder: storage.Path, options: ExportOptions) -> None:
        """Write a Hugging Face folder of a checkpoint: weights, config, tokenizer.

        Args:
          folder: new or empty.

        Raises:
          ConfigError: the stage has no adapters; a weight that float16 cannot hold.
          CheckpointError: there is no such checkpoint.
          FileExistsError: `folder` is not empty.
        """
        if options.adapters:
            raise ConfigError(
                f"{self.setup.workdir}: its stage {self.name} trained all weights and has no "
                "adapters; export it without --adapters"
            )
        huggingface.save(
            folder,
            self.setup.model.config,
            in_dtype(self.trained_params(options.step), options.dtype),
            self.setup.imported_config,
            tokenizer=self.setup.tokenizer,
            generation_config=read_generation_config(self.setup.config.model.path),
            centre=self.score_centre(options.step),
        )

    def score_centre(self, step: int | None) -> float | None:
        """The score that an exported reward model counts as 0; None where nothing says."""
        del step
        return None

    @property
    def config(self) -> ConfigDict:
        """The stage's own part of the config."""
        return self.setup.config[self.name]

    @property
    def folder(self) -> storage.Path:
        return self.setup.workdir / self.name

    @property
    def checkpoint_folder(self) -> storage.Path:
        return self.folder / "checkpoints"

    @property
    def best_step(self) -> int | None:
        """The step whose parameters are the stage's result so far; None is the newest on disk."""
        best = checkpoints.best(self.checkpoint_folder)
        return None if best is None else best.step

    @property
    @abc.abstractmethod
    def steps(self) -> int:
        """Steps of the whole stage."""

    def trained_params(self, step: int | None = None) -> dict:
        """Float32 parameters of a checkpoint, adapters merged; None is `best_step`.

        Raises:
          CheckpointError: there is none.
        """
        step = self.best_step if step is None else step
        return checkpoints.load_params(self.checkpoint_folder, self.setup.abstract_params, step)

    @property
    def is_trained(self) -> bool:
        """Whether the stage's final state is on disk; what the first process sees."""
        remaining = self.setup.config.max_checkpoints
        with Checkpoints(self.checkpoint_folder, max_checkpoints=remaining) as saved:
            return sharding.agreed(has_ended(saved, self.steps))

    def save_summary(self, summary: Summary, text: str) -> None:
        """Write summary.json and summary.txt into the stage's folder, by the first process.

        Both say which step is kept and why (`keep_best`), and what ended the stage (`stop_at`).
        """
        if jax.process_index() == 0:
            _save_summary(self, summary, text)


def _save_summary(stage: Stage, summary: Summary, text: str) -> None:
    if (best := kept_best(stage.config, stage.checkpoint_folder)) is not None:
        summary |= {"kept": best.state() | {"metric": best.metric}}
        text += f"\nkept: {best.describe(stage.steps)}"
    if (stop := stopped_at(stage.config, stage.checkpoint_folder)) is not None:
        summary |= {"stop_at": stop.state() | {"condition": stop.condition}}
        text += f"\nended: {stop.describe(stage.steps)}"
    storage.write_json(stage.folder / "summary.json", summary)
    storage.write_text(stage.folder / "summary.txt", text + "\n")


def open_metrics(stage: Stage, done: int | None) -> MetricWriter:
    """What writes the metrics of a stage that goes on after `done` steps; None: it begins.

    The lines of later steps go, and their samples: the stage writes them again.
    """
    forget_later_samples(stage.folder, done)
    config = flat(as_json(stage.setup.config))
    run = TrackedRun(stage.folder, config, -1 if done is None else done)
    return MetricWriter(
        stage.folder,
        trackers=open_trackers(stage.setup.config.trackers, run),
        resume_step=run.resume_step,
        names=parse_programs(stage.setup.config.metric_names),
    )


def announce_kept(stage: Stage) -> None:
    """Say which step is the stage's result and why, by the first process."""
    best = kept_best(stage.config, stage.checkpoint_folder)
    if best is not None and jax.process_index() == 0:
        print(f"{stage.name}: kept {best.describe(stage.steps)}", flush=True)


def require_language_model(setup: Setup, name: str) -> None:
    """Raise ConfigError where a stage of policies would start from a model with another head."""
    config = setup.model.config
    if config.scalar_head:
        kind = f"a classifier of {', '.join(config.labels)}" if config.labels else REWARD_MODEL
        raise ConfigError(
            f"config.model.path = {setup.config.model.path!r} holds {kind}: its head is "
            f"score.weight, of {max(1, len(config.labels))} output(s), and the stage {name} starts "
            "from a language model, whose head gives a logit for each token; set it to the folder "
            "of a policy"
        )


def require_memory(stage: Stage) -> None:
    """Raise ConfigError if the stage's footprint is more than a device has.

    The message names the part that takes most, and the key to change first. A stage that nothing
    predicts is let through.
    """
    needed = stage.footprint()
    if needed is None or not stage.setup.config.check_memory:
        return
    limit = MEBI * sharding.agreed(min(limit_bytes() // MEBI, 2**30))
    if needed.total <= limit:
        return
    parts, advice = needed._asdict(), stage.memory_advice()
    largest = max(parts, key=parts.get)
    raise ConfigError(
        f"{stage.name}: a step needs about {needed} of each device, which has {gib(limit)} to "
        f"give. Most are {largest}: {advice.get(largest, advice[''])}. config.check_memory=False "
        "tries all the same"
    )


def mesh_text(setup: Setup) -> str:
    """`data 2 x fsdp 4 x tensor 1`."""
    return " x ".join(f"{name} {size}" for name, size in setup.mesh.shape.items())


def count(tree: Any) -> str:
    """How many numbers a tree of arrays or shapes has: `1,234,567`."""
    return f"{sum(x.size for x in jax.tree.leaves(tree)):,}"
