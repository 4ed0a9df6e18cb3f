"""One record of preference data, and a parser for every common form of it.

| form | fields | responses |
| --- | --- | --- |
| `pair` | prompt, chosen, rejected; or chosen, rejected as whole message lists | 2 |
| `hh` | chosen, rejected: whole dialogues as text, "\\n\\nHuman: ...\\n\\nAssistant: ..." | 2 |
| `instruction` | instruction, input (may be absent), chosen, rejected; or output alone | 2 or 1 |
| `ranked` | prompt, responses (best first, or with ranks or scores) | K |
| `unpaired` | prompt, completion, label (true: desirable) | 1 |
| `comparison` | info, summaries, choice (Stiennon et al. 2020) | 2 |
| `text` | text; or prompt, completion; or messages | 1 |
| `classified` | text, label (the name or number of its class); has to be named, not `auto` | 1 |

A prompt or response that is text in the table may also be a list of messages
`{"role": ..., "content": ...}`. Nothing here tokenises, strips or repairs a text.

Records may also score their responses. The form `ranked` has `scores` (high is best) or `ranks` (1
is best). The forms `pair`, `hh` and `instruction` with two responses have `score_chosen` and
`score_rejected`, or `chosen_reward` and `rejected_reward`, or the difference `margin`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from dpojax.data import pairing
from dpojax.data.pairing import Labels

Messages = tuple[dict, ...]
Content = str | Messages
Scores = tuple[float, ...]

LARGEST = 3.4e38  # scores become float32
STATED = Labels(tie=0.0)  # a file states a tie by equal numbers
SCORE_FIELDS = (("score_chosen", "score_rejected"), ("chosen_reward", "rejected_reward"))
HH_SEPARATOR = "\n\nAssistant:"
INSTRUCTION_TEMPLATE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
INSTRUCTION_INPUT_TEMPLATE = "### Input:\n{input}\n\n"
TLDR_TEMPLATE = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
ARTICLE_TEMPLATE = "Article: {article}\n\nTL;DR:"


class DataError(ValueError):
    """Data that cannot be used. The message names file, record and field, and what to do."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A prompt and its K responses, best first.

    Attributes:
      id: "FILE:NUMBER" (1-based line or row).
      prompt: text or messages; "" for plain text.
      responses: K is 1 for plain text and unpaired data, 2 for a pair, more for a ranking.
      label: whether an unpaired response is desirable, else None.
      scores: the score of each response in the data, or None. Scores do not decide the order of a
        pair: the chosen response of a noisy pair may have the lower one.
      rank: for each response the number of responses that are better, such as (0, 1, 1, 3); None
        if there are no ties.
      category: the name of the class of a classified text, else None.
      tools: the row's tools, for the chat template, or None.
      template_options: further keyword arguments of the chat template (`chat_template_kwargs` of
        the row), or None.
      weight: factor of the example's loss, 0 or more: 2 counts as two equal records.
      source: name of the source that the row comes from; "" if there is one source.
    """

    id: str
    prompt: Content
    responses: tuple[Content, ...]
    label: bool | None = None
    scores: Scores | None = None
    rank: tuple[int, ...] | None = None
    category: str | None = None
    tools: tuple | None = None
    template_options: dict[str, Any] | None = None
    weight: float = 1.0
    source: str = ""

    @property
    def places(self) -> tuple[int, ...]:
        """For each response the number of responses that are better, with or without ties."""
        return tuple(range(len(self.responses))) if self.rank is None else self.rank

    @property
    def all_tied(self) -> bool:
        """Whether the record ranks two or more responses and prefers none of them."""
        return len(self.responses) > 1 and not any(self.places)


@dataclasses.dataclass(frozen=True)
class Reject:
    """A well-formed row without a usable preference, to be counted under `cause`, not raised.

    The only cause so far is `prompts_differ`: chosen and rejected answer different prompts.
    """

    id: str
    cause: str


def detect(row: Mapping[str, Any], id: str = "row") -> str:
    """Find the form of a row from its keys.

    Raises:
      DataError: no known form has these keys; the message lists the forms.
    """
    for name, form in FORMS.items():
        if form.matches(row):
            return name
    forms = "\n".join(f"  {name}: {form.fields}" for name, form in FORMS.items())
    raise DataError(
        f"{id}: no known form has the fields {_listed(row)}. Rename them (columns=...) or give "
        f"one of these forms:\n{forms}"
    )


def parse(row: Mapping[str, Any], id: str, form: str = "auto") -> Record | Reject:
    """Parse one row.

    Args:
      row: fields by name.
      id: of the record, for error messages.
      form: a name from `FORMS`, or `auto` to find it from the keys.

    Raises:
      DataError: a missing or mistyped field, a record without responses, or an unknown form. The
        message names `id` and the field.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{id}: expected an object with named fields, got {_kind(row)}")
    name = detect(row, id) if form == "auto" else form
    if name not in FORMS:
        raise DataError(f"form {form!r} is not known; choose auto or one of {_listed(FORMS)}")
    return FORMS[name].parse(Fields(row, id))


@dataclasses.dataclass(frozen=True)
class Fields:
    """Checked access to the fields of a row: every error names the record and the field."""

    row: Mapping[str, Any]
    id: str
    path: str = ""

    def error(self, name: str, expected: str) -> DataError:
        """The error that says what field `name` should have been."""
        field = f"{self.path}{name}"
        if name not in self.row:
            return DataError(
                f"{self.id}: field {field!r} is missing (expected {expected}); "
                f"the record has {_listed(self.row)}"
            )
        return DataError(
            f"{self.id}: field {field!r} should be {expected}, got {_kind(self[name])}"
        )

    def __getitem__(self, name: str) -> Any:
        return self.row.get(name)

    def text(self, name: str) -> str:
        """A field that must be text (it may be the empty string)."""
        if not isinstance(self[name], str):
            raise self.error(name, "text")
        if not _is_unicode(self[name]):
            raise self.error(name, "text without lone surrogates (half of a UTF-16 pair)")
        return self[name]

    def content(self, name: str) -> Content:
        """A field that must be text or a list of messages."""
        if isinstance(self[name], str):
            return self.text(name)
        return self.messages(name)

    def messages(self, name: str) -> Messages:
        """A field that must be a list of messages with text in `role` and `content`."""
        expected = "text or a non-empty list of messages {'role': text, 'content': text}"
        value = self[name]
        if not isinstance(value, list | tuple) or not value:
            raise self.error(name, expected)
        for number, message in enumerate(value):
            good = isinstance(message, Mapping) and all(
                isinstance(message.get(key), str) for key in ("role", "content")
            )
            if not good:
                raise DataError(
                    f"{self.id}: message {number} of field {self.path}{name!r} should be "
                    f"{{'role': text, 'content': text}}, got {_kind(message)}"
                )
        # Arrow gives every message of a column the same keys and fills the absent ones with None.
        return tuple({k: v for k, v in message.items() if v is not None} for message in value)

    def items(self, name: str, least: int) -> list:
        """A field that must be a list of at least `least` items."""
        value = self[name]
        if not isinstance(value, list | tuple) or len(value) < least:
            raise self.error(name, f"a list of {least} or more")
        return list(value)

    def number(self, name: str) -> float:
        """A field that must be a number in the range of float32."""
        if not _is_number(self[name]):
            raise self.error(name, "a finite number")
        return float(self[name])

    def scores(self) -> Scores | None:
        """The scores of (chosen, rejected); None if there is no such field, or if one is null."""
        for names in SCORE_FIELDS:
            if any(name in self.row for name in names):
                if any(name in self.row and self[name] is None for name in names):
                    return None
                return tuple(self.number(name) for name in names)
        return None if self["margin"] is None else (self.number("margin"), 0.0)

    def inside(self, name: str) -> Fields:
        """The fields of the object in field `name`."""
        if not isinstance(self[name], Mapping):
            raise self.error(name, "an object with named fields")
        return Fields(self[name], self.id, f"{self.path}{name}.")


def _record(id: str, prompt: Content, responses: Iterable[Content], **fields: Any) -> Record:
    """Make a record. If text and messages are mixed, text becomes a message."""
    responses = tuple(responses)
    if all(isinstance(content, str) for content in (prompt, *responses)):
        return Record(id, prompt, responses, **fields)
    turns = tuple(_as_messages(response, "assistant") for response in responses)
    return Record(id, _as_messages(prompt, "user"), turns, **fields)


def _as_messages(content: Content, role: str) -> Messages:
    return ({"role": role, "content": content},) if isinstance(content, str) else content


def _pair(fields: Fields) -> Record | Reject:
    chosen, rejected = fields.content("chosen"), fields.content("rejected")
    stated = fields.content("prompt") if "prompt" in fields.row else None
    if isinstance(chosen, str) != isinstance(rejected, str):
        kind = "text" if isinstance(chosen, str) else "a list of messages"
        raise fields.error("rejected", f"{kind}, as in 'chosen'")
    scores = fields.scores()
    if isinstance(chosen, str):
        return _record(fields.id, fields.content("prompt"), (chosen, rejected), scores=scores)
    answers_alone = all(message["role"] == "assistant" for message in chosen + rejected)
    if stated is not None and answers_alone:
        return _record(fields.id, stated, (chosen, rejected), scores=scores)
    split = _split_dialogues(chosen, rejected)
    if split is None or (stated is not None and not _is_prompt(stated, split[0])):
        return Reject(fields.id, "prompts_differ")
    return Record(fields.id, split[0], split[1:], scores=scores)


def _split_dialogues(first: Messages, second: Messages) -> tuple[Messages, ...] | None:
    """Split two dialogues with a common prompt into (prompt, first answer, second answer).

    The prompt is the longest common start that leaves each dialogue a message. The result is None
    if there is no common start, or if an answer would contain a turn of the user or the system.
    """
    limit = min(len(first), len(second)) - 1
    shared = next((i for i in range(limit) if first[i] != second[i]), limit)
    answers = first[shared:] + second[shared:]
    if shared == 0 or any(message["role"] in ("user", "system") for message in answers):
        return None
    return first[:shared], first[shared:], second[shared:]


def _is_prompt(stated: Content, common: Messages) -> bool:
    """Whether the prompt field agrees with the common start of the dialogues."""
    if isinstance(stated, str):
        return any(stated.strip() == message["content"].strip() for message in common)
    return stated == common


def _hh(fields: Fields) -> Record | Reject:
    halves = []
    for name in ("chosen", "rejected"):
        head, separator, answer = fields.text(name).rpartition(HH_SEPARATOR)
        if not separator:
            raise DataError(
                f"{fields.id}: field {name!r} should be a dialogue with {HH_SEPARATOR!r} in it "
                "(form hh); if it is an answer alone, give its prompt in a field 'prompt'"
            )
        halves.append((head + separator, answer))
    (prompt, chosen), (other_prompt, rejected) = halves
    if prompt != other_prompt:
        return Reject(fields.id, "prompts_differ")
    return Record(fields.id, prompt, (chosen, rejected), scores=fields.scores())


def _instruction(fields: Fields) -> Record:
    extra = fields.text("input") if fields["input"] is not None else ""
    prompt = INSTRUCTION_TEMPLATE.format(
        instruction=fields.text("instruction"),
        input=INSTRUCTION_INPUT_TEMPLATE.format(input=extra) if extra else "",
    )
    paired = "chosen" in fields.row or "rejected" in fields.row
    names = ("chosen", "rejected") if paired else ("output",)
    responses = tuple(fields.text(name) for name in names)
    return Record(fields.id, prompt, responses, scores=fields.scores() if paired else None)


def _ranked(fields: Fields) -> Record:
    """Order by `ranks` (1 is best), else `scores` (high is best); ties keep the file's order."""
    prompt = fields.content("prompt")
    listed = fields.items("responses", 1)
    parts = Fields({str(i): part for i, part in enumerate(listed)}, fields.id, "responses.")
    responses = [parts.content(str(i)) for i in range(len(listed))]
    scores = _one_per_response(fields, "scores", len(responses))
    ranks = _one_per_response(fields, "ranks", len(responses))
    if scores is None and ranks is None:
        return _record(fields.id, prompt, responses)
    values = scores if ranks is None else [-rank for rank in ranks]
    best_first = sorted(range(len(values)), key=lambda i: -values[i])
    places = pairing.places([values[i] for i in best_first], STATED)
    return _record(
        fields.id,
        prompt,
        (responses[i] for i in best_first),
        scores=None if scores is None else tuple(scores[i] for i in best_first),
        rank=None if places == list(range(len(places))) else tuple(places),
    )


def _one_per_response(fields: Fields, name: str, count: int) -> list[float] | None:
    """The numbers in a list field; None if the field is absent or null."""
    if fields[name] is None:
        return None
    numbers = fields.items(name, 1)
    if len(numbers) != count or not all(map(_is_number, numbers)):
        raise DataError(
            f"{fields.id}: field {name!r} should be {count} finite numbers, one per response, "
            f"got {numbers!r}"
        )
    return [float(number) for number in numbers]


def _unpaired(fields: Fields) -> Record:
    if not isinstance(fields["label"], bool):
        raise fields.error("label", "true (desirable) or false (undesirable)")
    return _completion(fields, label=fields["label"])


def _completion(fields: Fields, label: bool | None = None) -> Record:
    responses = (fields.content("completion"),)
    return _record(fields.id, fields.content("prompt"), responses, label=label)


def _comparison(fields: Fields) -> Record:
    info = fields.inside("info")
    if "article" in info.row:
        prompt = ARTICLE_TEMPLATE.format(article=info.text("article"))
    else:
        names = ("subreddit", "title", "post")
        prompt = TLDR_TEMPLATE.format(**{name: info.text(name) for name in names})
    summaries = fields.items("summaries", 2)
    choice = fields["choice"]
    if len(summaries) != 2:
        raise fields.error("summaries", "two summaries")
    if isinstance(choice, bool) or choice not in (0, 1):
        raise fields.error("choice", "0 or 1, the index of the better summary")
    both = Fields(dict(zip(("0", "1"), summaries)), fields.id, "summaries.")
    texts = [both.inside(name).text("text") for name in ("0", "1")]
    return Record(fields.id, prompt, (texts[choice], texts[1 - choice]))


def _text(fields: Fields) -> Record:
    if "messages" in fields.row:
        messages = fields.messages("messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise fields.error("messages", "a dialogue that ends with an assistant message")
        return Record(fields.id, messages[:-1], (messages[-1:],))
    if "completion" in fields.row:
        return _completion(fields)
    return Record(fields.id, "", (fields.text("text"),))


def _classified(fields: Fields) -> Record:
    """A class that is a number gets the name that transformers gives it, such as LABEL_1."""
    label = fields["label"]
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        expected = "the class of the text, a name or a whole number"
        raise DataError(
            f"{fields.error('label', expected)}; if it has another name, say so: "
            "data.columns=label=NAME"
        )
    name = label if isinstance(label, str) else f"LABEL_{label}"
    return Record(fields.id, "", (fields.text("text"),), category=name)


def _is_number(value: Any) -> bool:
    """Whether `value` is a number in the range of float32; bool, NaN and infinity are not."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -LARGEST <= value <= LARGEST


def _kind(value: Any) -> str:
    """Describe a value in a word or two, for an error."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return f"an object with {_listed(value)}"
    text = repr(value)
    shown = text if len(text) <= 40 else text[:40] + "..."
    return f"{type(value).__name__} {shown}"


def _listed(names: Any) -> str:
    return ", ".join(sorted(str(name) for name in names)) or "no fields"


class Form(NamedTuple):
    """A form of data.

    Attributes:
      fields: its fields, for a person.
      matches: whether a row with these fields has this form; the first form of `FORMS` that
        matches is taken.
      parse: the fields of a row -> a record, or why there is none.
    """

    fields: str
    matches: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Fields], Record | Reject]


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether a row has all of these fields."""
    return lambda row: set(names) <= row.keys()


def _is_instruction(row: Mapping[str, Any]) -> bool:
    return "instruction" in row and ("chosen" in row or "output" in row)


def _is_pair(row: Mapping[str, Any]) -> bool:
    """Without a prompt the answers have to be message lists, which hold it."""
    return _has("chosen", "rejected")(row) and (
        "prompt" in row or not isinstance(row["chosen"], str)
    )


def _is_text(row: Mapping[str, Any]) -> bool:
    return "text" in row or "messages" in row or _has("prompt", "completion")(row)


def _never(row: Mapping[str, Any]) -> bool:
    """The form has to be named: its fields are those of another form, too."""
    return False


FORMS: dict[str, Form] = {
    "comparison": Form("info, summaries, choice", _has("info", "summaries", "choice"), _comparison),
    "instruction": Form(
        "instruction, input, chosen, rejected; or instruction, input, output",
        _is_instruction,
        _instruction,
    ),
    "ranked": Form(
        "prompt, responses (best first), optionally ranks or scores",
        _has("prompt", "responses"),
        _ranked,
    ),
    "unpaired": Form("prompt, completion, label", _has("prompt", "completion", "label"), _unpaired),
    "pair": Form(
        "prompt, chosen, rejected; or chosen, rejected (whole message lists); optionally "
        "score_chosen and score_rejected",
        _is_pair,
        _pair,
    ),
    "hh": Form("chosen, rejected (whole dialogues as text)", _has("chosen", "rejected"), _hh),
    "text": Form("text; or prompt, completion; or messages", _is_text, _text),
    "classified": Form("text, label (a class: its name or number)", _never, _classified),
}


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
