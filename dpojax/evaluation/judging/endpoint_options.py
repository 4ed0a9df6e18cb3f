"""How a server of the OpenAI protocol is asked, and what a command line says of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from dpojax.evaluation.judging.judge import JudgeError


@dataclasses.dataclass(frozen=True)
class EndpointOptions:
    """How a server is asked. The first five are part of a judge's fingerprint.

    Attributes:
      max_tokens: of a reply. A reasoning model needs more.
      temperature: of sampling; None sends none.
      seed: of sampling, where the server takes one; None sends none.
      logprobs: ask for the probabilities of the letters, which give `Reply.preference`.
      extra_body: further fields of the request, or JSON that holds them; None removes a field.
      served_by: stands for the address in the fingerprint. Give it for a model that moves between
        addresses: its verdicts are found again.
      key_variable: see `Endpoint`.
      concurrency: requests at once.
      timeout: seconds for one request.
      max_retries: how often a request is sent again, after what may pass by itself.
      backoff: seconds before the first retry; they double.
      requests_per_minute, tokens_per_minute: limits; None or 0 for none.
      price_in, price_out: of a million tokens of requests and of replies.
      tokenizer: folder whose tokenizer.json counts tokens; None counts bytes / 4.
    """

    max_tokens: int = 512
    temperature: float | None = 0.0
    seed: int | None = 0
    logprobs: bool = False
    extra_body: Mapping[str, Any] | str = dataclasses.field(default_factory=dict)
    served_by: str | None = None
    key_variable: str | None = None
    concurrency: int = 8
    timeout: float = 120.0
    max_retries: int = 6
    backoff: float = 1.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    price_in: float | None = None
    price_out: float | None = None
    tokenizer: str | None = None

    def __post_init__(self):
        for name in NUMBERS:
            _require_number(name, getattr(self, name))
        if (self.price_in is None) != (self.price_out is None):
            raise JudgeError("price_in and price_out: give both, or none of them")
        if isinstance(self.extra_body, str):
            object.__setattr__(self, "extra_body", _parse_json("extra_body", self.extra_body))
        if not isinstance(self.extra_body, Mapping):
            raise JudgeError(f"extra_body = {self.extra_body}: is no JSON object")


# What values may be.
INTEGERS = ("max_tokens", "concurrency", "max_retries", "seed")
POSITIVE = ("max_tokens", "concurrency", "timeout")
OPTIONAL = ("temperature", "seed", "price_in", "price_out")
OPTIONAL += ("requests_per_minute", "tokens_per_minute")
NUMBERS = {*INTEGERS, *POSITIVE, *OPTIONAL, "backoff"}
TEXTS = ("served_by", "key_variable", "tokenizer")


def options_of(values: Mapping[str, Any]) -> EndpointOptions:
    """Return options from their names and values.

    Raises:
      JudgeError: there is no option of this name, or it cannot have this value.
    """
    names = [field.name for field in dataclasses.fields(EndpointOptions)]
    if unknown := sorted(values.keys() - set(names)):
        raise JudgeError(
            f"a judge behind a server has no option {', '.join(unknown)}; it has {', '.join(names)}"
        )
    return EndpointOptions(**values)


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Return names and values of options that a command line gives as NAME=VALUE.

    Raises:
      JudgeError: a text is not of this form, or the value of an option that is no text is no JSON.
    """
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise JudgeError(f"{text}: is no option NAME=VALUE of a server, such as max_tokens=900")
        values[name] = value if name in TEXTS else _parse_json(name, value)
    return values


def _parse_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise JudgeError(f"{name} = {text}: is no JSON ({error})") from error


def _require_number(name: str, value: Any) -> None:
    if value is None and name in OPTIONAL:
        return
    kinds = int if name in INTEGERS else int | float
    is_number = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (value == 0 and name in POSITIVE):
        what = "an integer" if name in INTEGERS else "a number"
        least = "above 0" if name in POSITIVE else "0 or more"
        raise JudgeError(f"{name} = {value}: has to be {what}, {least}")
