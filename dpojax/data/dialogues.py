"""A dialogue as text: what comes before the answers, and which part of an answer is scored.

Only turns of the assistant are scored: the text that the template renders for the turn, and the
token that ends it. Results of tools, turns of the user inside an answer, and the headers of turns
are context.

Most templates render the first turns of a dialogue as the beginning of the whole dialogue. So a
turn begins where the turns before it end with the generation prompt, and ends where the turns up to
it end. Templates that render a turn differently once others follow it (those that strip reasoning
from the history) are asked otherwise: the turn's text is replaced by `MARK`, which shows its place.
Last, a template may mark what the assistant generated (`{% generation %}`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from dpojax.data.records import Record
from dpojax.data.templates import ChatTemplate

MARK = "qzMARKzq"  # it occurs in no text, and no template strips or splits it
HEADER = 32  # characters of the generation prompt's end
AssistantTurns = Literal["all", "last"]


class Drop(Exception):
    """Stops the work on one record, which is then dropped for `cause`."""

    def __init__(self, cause: str, why: str = "") -> None:
        super().__init__(cause)
        self.cause, self.why = cause, why


class Piece(NamedTuple):
    """A part of a response's text, and whether it is scored."""

    text: str
    scored: bool


class Rendered(NamedTuple):
    """The texts of a record.

    Attributes:
      prompt: what all responses share.
      responses: the pieces of each response, of which every second one is scored.
      notes: causes to note in the report.
    """

    prompt: str
    responses: tuple[tuple[Piece, ...], ...]
    notes: tuple[str, ...] = ()


def render(record: Record, template: ChatTemplate, turns: AssistantTurns) -> Rendered:
    """Render a record of messages.

    Args:
      record: prompt and responses are messages.
      template: the tokenizer's.
      turns: score all turns of the assistant in a response, or the last one.

    Raises:
      Drop: a turn cannot be found in the rendered text, or there is none.
      Refused, DataError: like `ChatTemplate.render`.
    """
    prefixes = _Prefixes(record, template)
    answers = [
        _Answer(record, template, prefixes, response, _is_continued(record))
        for response in record.responses
    ]
    scored = [answer.scored_spans(turns) for answer in answers]
    if len(answers) == 1 and turns == "last":
        start = scored[0][0][0]  # nothing else shares the prompt: all before the turn belongs to it
    else:
        start = min(answer.start() for answer in answers)
    prompt = answers[0].whole[:start]
    if not all(answer.whole.startswith(prompt) for answer in answers):
        raise Drop("template_changes_prompt")
    notes = {note for answer in answers for note in answer.notes}
    if any(len(answer.own_turns) > 1 for answer in answers):
        notes.add("all_turns_scored" if turns == "all" else "last_turn_scored")
    notes |= _unused(record, template)
    pieces = tuple(_pieces(answer.whole, start, spans) for answer, spans in zip(answers, scored))
    return Rendered(prompt, pieces, tuple(sorted(notes)))


def has_text(response: str | Sequence[Mapping]) -> bool:
    """Whether a response has text or calls a tool; white space alone is no text."""
    if isinstance(response, str):
        return bool(response.strip())
    turns = [turn for turn in response if turn["role"] == "assistant"] or response
    return any((turn.get("content") or "").strip() or turn.get("tool_calls") for turn in turns)


def _is_continued(record: Record) -> bool:
    """Whether the responses go on with the prompt's last turn, which is the assistant's."""
    last = record.prompt[-1]
    return (
        last["role"] == "assistant"
        and not last.get("tool_calls")
        and all(response[0]["role"] == "assistant" for response in record.responses)
    )


def _unused(record: Record, template: ChatTemplate) -> set[str]:
    """What the record holds for the template, and the template does not read."""
    notes = set()
    if record.tools and not template.mentions(record, "tools"):
        notes.add("template_without_tools")
    if any(not template.mentions(record, name) for name in record.template_options or {}):
        notes.add("template_without_options")
    return notes


class _Prefixes:
    """The texts of a record's first turns, each rendered once for all of its responses."""

    def __init__(self, record: Record, template: ChatTemplate) -> None:
        self.record, self.template = record, template
        self.texts: dict[tuple[int, bool], str] = {}

    def render(self, turns: list[dict], count: int, *, generate: bool) -> str:
        """The text of the first `count` turns; "" without a turn."""
        if not count:
            return ""
        if count > len(self.record.prompt):
            return self.template.render(self.record, turns[:count], generate=generate)
        key = count, generate
        if key not in self.texts:
            self.texts[key] = self.template.render(self.record, turns[:count], generate=generate)
        return self.texts[key]


class _Answer:
    """The dialogue of one response.

    Attributes:
      whole: the text of all turns.
      own_turns: places of the assistant's turns in the response.
      notes: causes to note in the report.
    """

    def __init__(
        self,
        record: Record,
        template: ChatTemplate,
        prefixes: _Prefixes,
        response: Sequence[dict],
        continued: bool,
    ) -> None:
        self.record, self.template, self.prefixes = record, template, prefixes
        self.continued = continued
        self.turns = [*record.prompt, *response]
        self.first = len(record.prompt)  # the response's first turn
        if continued:
            self.first -= 1
            self.turns[self.first :] = [_joined(record.prompt[-1], response[0]), *response[1:]]
        places = range(self.first, len(self.turns))
        self.own_turns = [i for i in places if self.turns[i]["role"] == "assistant"]
        if not self.own_turns or self.own_turns[-1] != places[-1]:
            raise Drop("ends_without_answer")
        self.whole = template.render(record, self.turns)
        self.response = response
        self.spans: dict[int, tuple[int, int]] = {}  # of the turns that were looked for
        self.notes: set[str] = set()

    def scored_spans(self, turns: AssistantTurns) -> list[tuple[int, int]]:
        """Where the turns that are scored begin and end in the text."""
        places = self.own_turns if turns == "all" else self.own_turns[-1:]
        return [self._span(place) for place in places]

    def start(self) -> int:
        """Where the response begins in the text."""
        if self.turns[self.first]["role"] == "assistant":
            return self._span(self.first)[0]
        before = self.prefixes.render(self.turns, self.first, generate=False)
        if not self.whole.startswith(before):
            raise Drop("template_changes_prompt")
        return len(before)

    def _span(self, turn: int) -> tuple[int, int]:
        """Where the text that the assistant generates in a turn begins and ends."""
        if turn not in self.spans:
            start, end = self._by_prefixes(turn) or self._by_mark(turn) or self._generated(turn)
            end = start + len(self.template.without_end(self.whole[start:end]))
            self.spans[turn] = start, end
            # The beginning of the reasoning may stand in the generation prompt, so look there too.
            self._check(turn, self.whole[max(0, start - HEADER) : end])
        return self.spans[turn]

    def _by_prefixes(self, turn: int) -> tuple[int, int] | None:
        """The span, if the first turns are rendered as the beginning of the whole."""
        if self.continued and turn == self.first:
            before = self.template.render(self.record, self.record.prompt, proceed=True)
        else:
            before = self.prefixes.render(self.turns, turn, generate=True)
            if not turn:
                return None  # nothing tells where the header of the first turn ends
        if not self.whole.startswith(before):
            return None
        if turn == len(self.turns) - 1:
            return len(before), len(self.whole)
        after = self.prefixes.render(self.turns, turn + 1, generate=False)
        return (len(before), len(after)) if self.whole.startswith(after) else None

    def _by_mark(self, turn: int) -> tuple[int, int] | None:
        """The span, found by the dialogue with `MARK` in the place of the turn's text."""
        before = self.prefixes.render(self.turns, turn, generate=False)
        generate = self.prefixes.render(self.turns, turn, generate=True) if turn else ""
        begun = self.whole.startswith(before) or (generate and self.whole.startswith(generate))
        if turn == self.first and not begun:
            raise Drop("template_changes_prompt")  # sampling would begin with another prompt
        head = self.record.prompt[-1]["content"] if self.continued and turn == self.first else ""
        marked = {**self.turns[turn], "content": head + MARK}
        marked.pop("reasoning_content", None)
        turns = [*self.turns[:turn], marked, *self.turns[turn + 1 :]]
        start, rest = _around_mark(self.template.render(self.record, turns))
        _, own_end = _around_mark(self.template.render(self.record, turns[: turn + 1]))
        if start is None or not self.whole.endswith(rest):
            return None
        if generate and self.whole.startswith(generate):
            start = len(generate)  # the template writes before the text, such as an empty <think>
        elif self.whole[: len(start)] != start:
            return None
        else:
            start = len(start)
        own_end = self.template.without_end(own_end)
        if not rest.startswith(own_end):
            # Some templates write a token behind the last turn alone, such as Phi-3's.
            own_end = self.template.to_marker(_common_start(own_end, rest))
            if not own_end:
                return None
        return start, len(self.whole) - len(rest) + len(own_end)

    def _generated(self, turn: int) -> tuple[int, int]:
        """The span by the template's own marks."""
        spans = self.template.generated(self.record, self.turns)
        places = [i for i, each in enumerate(self.turns) if each["role"] == "assistant"]
        if len(spans) != len(places):
            raise Drop("turn_not_found")
        return spans[places.index(turn)]

    def _check(self, turn: int, text: str) -> None:
        """Note what the template leaves out of a turn.

        Raises:
          Drop: it leaves out a tool call, and nothing else is there.
        """
        message = self.turns[turn]
        if self.continued and turn == self.first:
            message = self.response[0]
        parts = [message.get("content"), message.get("reasoning_content")]
        parts = [part.strip() for part in parts if isinstance(part, str)]
        if any(part not in text for part in parts):
            self.notes.add("template_strips")
        if any(name not in text for name in _called(message)):
            if not any(parts):
                raise Drop("tool_call_not_rendered")
            self.notes.add("template_strips")


def _around_mark(text: str) -> tuple[str | None, str]:
    """What stands before `MARK` and behind it; (None, "") if it does not stand there once."""
    before, mark, after = text.partition(MARK)
    return (before, after) if mark and MARK not in after else (None, "")


def _common_start(first: str, second: str) -> str:
    pairs = enumerate(zip(first, second))
    return first[: next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))]


def _joined(begun: Mapping[str, Any], message: Mapping[str, Any]) -> dict[str, Any]:
    """One message of the assistant whose text is begun by the prompt."""
    content = (begun.get("content") or "") + (message.get("content") or "")
    return {**begun, **message, "content": content}


def _called(message: Mapping[str, Any]) -> list[str]:
    """The names of the tools that a message calls."""
    calls = message.get("tool_calls")
    functions = [call.get("function", call) for call in calls or () if isinstance(call, Mapping)]
    names = [call.get("name") for call in functions if isinstance(call, Mapping)]
    return [name for name in names if isinstance(name, str)]


def _pieces(whole: str, start: int, spans: Sequence[tuple[int, int]]) -> tuple[Piece, ...]:
    """The text from `start` to the end of the last span, cut at the spans."""
    pieces = []
    for begin, end in spans:
        if begin > start:
            pieces.append(Piece(whole[start:begin], False))
        pieces.append(Piece(whole[begin:end], True))
        start = end
    return tuple(pieces)
