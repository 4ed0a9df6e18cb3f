"""What is to be judged: the sides, the prompts, the judge, and how responses are drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpojax.config.errors import ConfigError
from dpojax.data.prompts import EMBEDDED
from dpojax.watchdog import MINUTES

REFERENCES = "references"
LEAST = {"samples": 1, "max_new_tokens": 1, "batch_size": 1, "judge_batch_size": 1, "skip": 0}
LEAST |= {"limit": 0, "seed": 0, "repeat": 0, "resamples": 1, "hang_minutes": 0}


def _make_tuples(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None:
            object.__setattr__(settings, name, tuple(value))


def _require_temperatures(temperatures: Sequence[float]) -> None:
    for value in temperatures:
        if not 0 <= value < math.inf:
            raise ConfigError(f"temperature = {value}: must be finite and not negative")
    if not temperatures or len(set(temperatures)) < len(temperatures):
        raise ConfigError(f"temperatures = {temperatures}: give one or more, each once")


def _require_best_of(numbers: Sequence[int]) -> None:
    if not numbers or len(set(numbers)) < len(numbers) or not all(n >= 1 for n in numbers):
        raise ConfigError(f"best_of = {numbers}: give one or more numbers from 1, each once")


@dataclasses.dataclass(frozen=True)
class Side:
    """Whose responses are compared.

    Attributes:
      policy: see `policy.load_policy`; or a file of responses, with `response` and the `prompt` or
        the `id` of it in each record; or "references", those of the prompts.
      name: in tables and figures; "" is made of `policy`.
      prompt_field: the field of the prompts' records that the policy reads; "" is the prompt.
      template: a file for zero-shot or few-shot prompting, see `data.prompting`; "" is none.
      shots: examples of few-shot prompting.
      temperatures, best_of: in the place of those of the settings; None: those.
    """

    policy: str
    name: str = ""
    prompt_field: str = ""
    template: str = ""
    shots: int = 0
    temperatures: tuple[float, ...] | None = None
    best_of: tuple[int, ...] | None = None

    def __post_init__(self):
        if not self.policy:
            raise ConfigError("a side names no policy: give a folder, a file, or references")
        _make_tuples(self, "temperatures", "best_of")
        if self.shots < 0:
            raise ConfigError(f"shots = {self.shots}: must be 0 or more")
        if self.shots and not self.template:
            raise ConfigError(
                f"{self.label}: shots = {self.shots} needs a template, which says how an example "
                "is written"
            )
        if self.template and self.prompt_field:
            raise ConfigError(f"{self.label}: give a template or a prompt_field, not both")
        if self.temperatures is not None:
            _require_temperatures(self.temperatures)
        if self.best_of is not None:
            _require_best_of(self.best_of)

    @property
    def label(self) -> str:
        """The name, or the last part of the policy's."""
        return self.name or self.policy.rstrip("/").rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to judge; scripts/judge.py has a flag for each.

    Attributes:
      out: the folder to write.
      prompts, split, columns, form, skip, limit: see `references.read_prompts_with_references`.
      judge: see `judging.open_judge`.
      a: each is compared with `b`.
      b: what they are compared with.
      temperatures: of the responses of `a`.
      b_temperature: of those of `b`; None is that of the `a` it is compared with.
      best_of: of so many responses of `a` the one with the highest reward is compared.
      best_of_reward: see `rewards.open_reward`.
      samples: comparisons of each prompt.
      max_new_tokens, stop_text: see `responses.Drawing`.
      examples: data whose first records are the examples of few-shot prompting; "": records behind
        the prompts.
      batch_size: responses that are drawn at a time.
      template, template_file, tie: of the judge, see `open_judge.Options`.
      judge_batch_size: texts that a local judge reads at a time.
      repeat: see `asking.judge_comparisons`.
      max_cost: stop asking before it is passed; None: no limit.
      endpoint: options of an openai: judge, fields of `EndpointOptions`.
      resamples: of the bootstrap.
      hang_minutes: without progress, after which the process ends; 0: never.
      responses, verdicts: the folders that keep them; "" are folders of `out`. Several calls can
        share them.

    Raises:
      ConfigError: a value that cannot be; it is named.
    """

    out: str
    prompts: str
    judge: str
    a: tuple[Side, ...]
    b: Side = Side(REFERENCES)
    split: str = ""
    columns: str = ""
    form: str = "auto"
    skip: int = 0
    limit: int = 0
    temperatures: tuple[float, ...] = (1.0,)
    b_temperature: float | None = None
    best_of: tuple[int, ...] = (1,)
    best_of_reward: str = ""
    samples: int = 1
    max_new_tokens: int = 64
    stop_text: str = ""
    examples: str = ""
    batch_size: int = 64
    template: str = "summary"
    template_file: str = ""
    tie: float | None = None
    judge_batch_size: int = 64
    repeat: float = 0.05
    max_cost: float | None = None
    endpoint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    resamples: int = 2000
    seed: int = 0
    hang_minutes: float = MINUTES
    responses: str = ""
    verdicts: str = ""

    def __post_init__(self):
        object.__setattr__(self, "a", tuple(_side(side) for side in self.a))
        object.__setattr__(self, "b", _side(self.b))
        _make_tuples(self, "temperatures", "best_of")
        object.__setattr__(self, "endpoint", dict(self.endpoint))
        if not self.a:
            raise ConfigError("a: name at least one policy or file to judge")
        labels = [side.label for side in self.a]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(f"a: two sides are called {label}; name them apart: NAME=POLICY")
        for name, lowest in LEAST.items():
            if not getattr(self, name) >= lowest:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be {lowest} or more")
        if self.seed >= 2**31 - 1:
            raise ConfigError(f"seed = {self.seed}: must be below 2**31 - 1")
        if self.repeat > 1:
            raise ConfigError(f"repeat = {self.repeat}: is a share, at most 1")
        _require_temperatures(self.temperatures)
        _require_best_of(self.best_of)
        if self.b_temperature is not None:
            _require_temperatures((self.b_temperature,))
        if self.max_cost is not None and not self.max_cost > 0:
            raise ConfigError(f"max_cost = {self.max_cost}: must be positive")
        most = max(n for side in self.a for n in side.best_of or self.best_of)
        if most > 1 and not self.best_of_reward:
            raise ConfigError(f"best_of = {most}: name the reward that chooses: best_of_reward")
        if self.prompts == EMBEDDED and not self.limit:
            raise ConfigError("limit = 0: the prompts of reviews never end; say how many to use")


def settings_from_json(values: Mapping[str, Any]) -> Settings:
    """The settings in a JSON object.

    Raises:
      ConfigError: it lacks one, or has one that there is not.
    """
    return _known(Settings, values, "the settings")


def _side(value: Side | Mapping[str, Any] | str) -> Side:
    if isinstance(value, str):
        return Side(value)
    return value if isinstance(value, Side) else _known(Side, value, "a side")


def _known(kind: type, values: Mapping[str, Any], what: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise ConfigError(f"{what}: no setting is called {', '.join(unknown)}; {', '.join(fields)}")
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{what}: {', '.join(missing)} is missing")
    return kind(**values)
