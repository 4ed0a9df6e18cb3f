"""Responses of the sides of comparisons: of policies, of files, and the references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dpojax import storage
from dpojax.data import sources
from dpojax.data.prompting import PromptTemplate, require_place
from dpojax.data.records import DataError
from dpojax.data.references import ReferencedPrompt, read_prompts_with_references
from dpojax.evaluation.judging.result import label
from dpojax.evaluation.rewards import open_reward
from dpojax.runs.judging_settings import REFERENCES, Settings, Side
from dpojax.runs.policy import load_policy
from dpojax.runs.responses import (
    Drawing,
    PolicyResponses,
    Response,
    best_responses,
)

ANSWERS = ("response", "completion")  # fields of a file of responses

Responses = list[list[Response]]  # [P][samples]


class Request(NamedTuple):
    """Responses of one side.

    Attributes:
      temperature: None for responses that are not drawn.
      best_of: n of best-of-n.
    """

    side: Side
    temperature: float | None
    best_of: int
    seed: int

    @property
    def label(self) -> str:
        """Side and setting in a few words."""
        return label(self.side.label, self.temperature, self.best_of)


def requests_of(side: Side, settings: Settings) -> list[Request]:
    """What a side of `settings.a` is judged at: each temperature with each n of best-of-n."""
    if not is_policy(side):
        return [Request(side, None, 1, 0)]
    temperatures = side.temperatures or settings.temperatures
    return [
        Request(side, temperature, n, settings.seed)
        for n in side.best_of or settings.best_of
        for temperature in temperatures
    ]


def request_against(request: Request, settings: Settings) -> Request:
    """What of `settings.b` a request is compared with.

    It is drawn with another seed: a policy wins half of the time against itself.
    """
    if not is_policy(settings.b):
        return Request(settings.b, None, 1, 0)
    temperature = settings.b_temperature
    if temperature is None:
        temperature = 1.0 if request.temperature is None else request.temperature
    return Request(settings.b, temperature, 1, settings.seed + 1)


def is_policy(side: Side) -> bool:
    """Whether responses are drawn, and not read."""
    return side.policy != REFERENCES and not is_file(side.policy)


def is_file(name: str) -> bool:
    """Whether a side's name is that of a file of responses."""
    return name.endswith(sources.SUFFIXES) or storage.as_path(name, "a side").is_file()


def read_prompts(settings: Settings) -> tuple[list[ReferencedPrompt], list[ReferencedPrompt]]:
    """The prompts, and the examples of few-shot prompting, which are not among them.

    Raises:
      DataError: there are too few; a side reads a field that a prompt lacks.
    """
    tokenizer = None
    if settings.prompts.startswith("prefixes:"):
        policies = [side for side in (*settings.a, settings.b) if is_policy(side)]
        if not policies:
            raise DataError(f"{settings.prompts}: prefixes are cut by a policy's tokenizer")
        tokenizer = load_policy(policies[0].policy).tokenizer
    how = dict(split=settings.split, columns=settings.columns, form=settings.form)
    how |= dict(seed=settings.seed, tokenizer=tokenizer)
    prompts = read_prompts_with_references(
        settings.prompts, skip=settings.skip, limit=settings.limit, **how
    )
    shots = max(side.shots for side in (*settings.a, settings.b))
    examples: list[ReferencedPrompt] = []
    if shots and settings.examples:
        examples = read_prompts_with_references(settings.examples, limit=shots)
    elif shots:
        skip = settings.skip + len(prompts)
        examples = read_prompts_with_references(settings.prompts, skip=skip, limit=shots, **how)
    if len(examples) < shots or not all(example.reference for example in examples):
        raise DataError(
            f"{settings.examples or settings.prompts}: {shots} examples with a response are "
            "needed for few-shot prompting; name others with examples"
        )
    return prompts, examples


def draw_all(
    requests: Sequence[Request],
    prompts: Sequence[ReferencedPrompt],
    examples: Sequence[ReferencedPrompt],
    settings: Settings,
    log: Callable[[str], None],
    only_kept: bool = False,
) -> dict[Request, Responses]:
    """The responses of each request; a policy is read once, and let go before the next one.

    What another process draws is left to it. It is read at the end; then its policy is read again.

    Args:
      only_kept: see `responses.PolicyResponses.draw`.
    """
    responses: dict[Request, Responses] = {}
    requests = list(dict.fromkeys(requests))
    for request in requests:
        if not is_policy(request.side):
            responses[request] = _read_side(request.side, prompts, settings.samples)
    drawn = [request for request in requests if is_policy(request.side)]
    for in_turn in (False, True):
        for name in dict.fromkeys(request.side.policy for request in drawn):
            of_policy = [r for r in drawn if r.side.policy == name and r not in responses]
            if of_policy:
                how = {"only_kept": only_kept, "in_turn": in_turn}
                responses |= _draw(name, of_policy, prompts, examples, settings, log, **how)
    return responses


def _draw(
    name: str,
    requests: Sequence[Request],
    prompts: Sequence[ReferencedPrompt],
    examples: Sequence[ReferencedPrompt],
    settings: Settings,
    log: Callable[[str], None],
    *,
    only_kept: bool,
    in_turn: bool,
) -> dict[Request, Responses]:
    """The responses of one policy to each of its requests.

    Args:
      in_turn: wait for a process that draws one of them. Otherwise, it is missing in the result.
    """
    folder = storage.as_path(settings.responses or f"{settings.out}/responses")
    policy = load_policy(name)
    drawer = PolicyResponses(policy, folder, batch_size=settings.batch_size)
    reward = None
    if any(request.best_of > 1 for request in requests) and not only_kept:
        reward = open_reward(settings.best_of_reward, mesh=policy.mesh)
    texts = [prompt.text for prompt in prompts]
    responses = {}
    for request in requests:
        drawer.log = _prefixed(log, request.label)
        drawing = Drawing(
            temperature=request.temperature,
            samples=settings.samples * request.best_of,
            max_new_tokens=settings.max_new_tokens,
            seed=request.seed,
            stop_text=settings.stop_text,
        )
        read = texts_to_read(request.side, prompts, examples)
        try:
            drawn = drawer.draw(prompts, drawing, read, only_kept=only_kept, in_turn=in_turn)
        except storage.Locked:
            if in_turn:  # the lock was lost
                raise
            continue
        if only_kept:
            responses[request] = [of_prompt[: settings.samples] for of_prompt in drawn]
            continue
        scores = drawer.kept_scores(reward, drawing) if request.best_of > 1 else None
        responses[request] = best_responses(texts, drawn, request.best_of, scores)
    return responses


def _prefixed(log: Callable[[str], None], label: str) -> Callable[[str], None]:
    def prefixed(line: str) -> None:
        log(f"{label}: {line}")

    return prefixed


def texts_to_read(
    side: Side, prompts: Sequence[ReferencedPrompt], examples: Sequence[ReferencedPrompt]
) -> list[str] | None:
    """What a policy reads in the place of each prompt; None: the prompts themselves.

    Raises:
      DataError: a prompt without the side's field; a template without a place for the prompt.
    """
    if side.prompt_field:
        for prompt in prompts:
            if side.prompt_field not in prompt.row:
                raise DataError(
                    f"{prompt.id}: has no text in the field {side.prompt_field!r}, which "
                    f"{side.label} reads; it has {', '.join(sorted(prompt.row)) or 'no fields'}"
                )
        return [prompt.row[side.prompt_field] for prompt in prompts]
    if not side.template:
        return None
    path = storage.as_path(side.template, f"the template of {side.label}")
    template = PromptTemplate(storage.read_text(path).removesuffix("\n"))
    require_place(template.text, str(path))
    shown = [(example.text, example.reference) for example in examples[: side.shots]]
    return [template.apply(prompt.text, shown) for prompt in prompts]


def _read_side(side: Side, prompts: Sequence[ReferencedPrompt], samples: int) -> Responses:
    """The references, or the responses of a file."""
    if side.policy == REFERENCES:
        for prompt in prompts:
            if not prompt.reference:
                raise DataError(
                    f"{prompt.id}: the prompt has no reference response; compare with a policy or "
                    "a file, or name prompts with a chosen response or a field reference"
                )
        return [[Response(prompt.reference, True)] for prompt in prompts]
    by_prompt = _read_file(side.policy)
    responses = []
    for prompt in prompts:
        keys = ("prompt", prompt.text), ("id", prompt.row.get("id", "")), ("id", prompt.id)
        of_prompt = next((by_prompt[key] for key in keys if key in by_prompt), None)
        if not of_prompt:
            raise DataError(
                f"{side.policy}: has no response to the prompt {prompt.id}, "
                f"{prompt.text[-60:]!r}; add it, or judge fewer prompts (limit)"
            )
        responses.append(of_prompt[:samples])
    return responses


def _read_file(name: str) -> Mapping[tuple[str, str], list[Response]]:
    """The responses of a file by ("prompt", text) and ("id", id)."""
    by_prompt: dict[tuple[str, str], list[Response]] = {}
    for row, place in sources.read(name):
        text = next((row[field] for field in ANSWERS if isinstance(row.get(field), str)), None)
        keys = [("id", str(row["id"]))] if row.get("id") is not None else []
        keys += [("prompt", row["prompt"])] if isinstance(row.get("prompt"), str) else []
        if text is None or not keys:
            raise DataError(
                f"{place}: a file of responses has a text `response` and the `prompt` or `id` that "
                f"it answers in each record; this one has {', '.join(sorted(row))}"
            )
        for key in keys:
            by_prompt.setdefault(key, []).append(Response(text, bool(row.get("stopped", True))))
    return by_prompt
