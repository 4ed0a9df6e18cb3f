"""Messages as the common formats write them, and what two dialogues have in common."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from dpojax.data.records.record import Messages, RecordError, kind_of

# Other names of the four roles, in lower case.
ALIASES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "bing", "bard", "ai"),
    "tool": ("tool", "function", "ipython", "observation", "tool_response"),
}
ROLES = {alias: role for role, aliases in ALIASES.items() for alias in aliases}
# A turn of the assistant that is a tool call as JSON, in LLaMA-Factory and ms-swift.
CALL_ROLES = ("function_call", "tool_call")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
SHAPE = "{'role': text, 'content': text}"
MEDIA = ("image", "video", "audio")  # types of content that no model here reads
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def read_messages(values: Sequence[Any], where: str) -> Messages:
    """Messages with known roles and text as content, from any of the common ways to write them.

    Roles are mapped by `ALIASES` whatever their case. `from` and `value` are `role` and `content`.
    Content that is a list of text parts is joined. Keys without a value are left out. Other keys
    stay: the chat template may read them.

    Args:
      values: one or more messages.
      where: "ID: field NAME", for errors.

    Raises:
      RecordError: something else than such a message, an unknown role, no content, content that is
        no text.
    """
    return tuple(_message(value, f"{where}, message {i}") for i, value in enumerate(values))


def _message(value: Any, where: str) -> dict:
    if isinstance(value, dict) and len(value) == 2:  # almost all of them, and the shortest way
        role, content = value.get("role"), value.get("content")
        if isinstance(content, str) and role in ALIASES:
            require_unicode(content, where)
            return {"role": role, "content": content}
    if not isinstance(value, Mapping):
        raise RecordError(f"{where} should be {SHAPE}, got {kind_of(value)}", "bad_message")
    role = _first(value, ROLE_KEYS)
    if not isinstance(role, str):
        raise RecordError(f"{where} should be {SHAPE}, got {kind_of(value)}", "bad_message")
    message = {"role": _role(role, where), "content": None}
    for key, item in value.items():
        if item is not None and key not in ROLE_KEYS and key not in CONTENT_KEYS:
            require_unicode_inside(item, f"{where}, {key!r}")
            message[key] = item
    if any(message.get(medium) or message.get(f"{medium}s") for medium in MEDIA):
        raise RecordError(f"{where} has images, video or audio, which no model here reads", "media")
    content = _first(value, CONTENT_KEYS)
    if role.strip().lower() in CALL_ROLES:
        return message | {"content": "", "tool_calls": _calls(content, where)}
    if message.get("function_call"):  # OpenAI's older name for the only call
        message["tool_calls"] = _calls(message.pop("function_call"), where)
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], where)
        if not message["tool_calls"]:
            del message["tool_calls"]
    message["content"] = _text_of(content, message, where)
    return message


def _first(value: Mapping, keys: Sequence[str]) -> Any:
    return next((value[key] for key in keys if value.get(key) is not None), None)


def _role(role: str, where: str) -> str:
    known = ROLES.get(role) or ROLES.get(role.strip().lower())
    if known is None and role.strip().lower() in CALL_ROLES:
        return "assistant"
    if known is None:
        raise RecordError(
            f"{where} has the unknown role {role!r}; known are {', '.join(ROLES)}", "unknown_role"
        )
    return known


def _text_of(content: Any, message: dict, where: str) -> str | None:
    """The content as text; None is right only where calls or reasoning stand in its place.

    The result of a tool may be an object, which becomes JSON.
    """
    if message["role"] == "tool" and isinstance(content, Mapping):
        require_unicode_inside(content, where)
        return json.dumps(content, ensure_ascii=False, default=str)
    if isinstance(content, list | tuple):
        content = "".join(_part(part, where) for part in content)
    if content is None:
        if any(message.get(key) for key in ("tool_calls", "reasoning_content", "thinking")):
            return None
        raise RecordError(f"{where} should be {SHAPE}, got no content (null)", "field_null")
    if not isinstance(content, str):
        expected = "text or a list of text parts"
        raise RecordError(
            f"{where} should have {expected} as 'content', got {kind_of(content)}", "bad_message"
        )
    require_unicode(content, where)
    return content


def _part(part: Any, where: str) -> str:
    """The text of one part of a content, such as {"type": "text", "text": "..."}."""
    text = part.get("text") if isinstance(part, Mapping) else part
    if isinstance(text, str):
        return text
    kind = str(part.get("type", "")) if isinstance(part, Mapping) else ""
    if any(medium in kind for medium in MEDIA):
        raise RecordError(
            f"{where} has a part of type {kind!r}, which no model here reads", "media"
        )
    raise RecordError(f"{where} has a part without text: {kind_of(part)}", "bad_message")


def _calls(value: Any, where: str) -> list:
    """Tool calls as a list of {"type": "function", "function": {"name", "arguments"}}.

    Raises:
      RecordError: text that is no JSON, or something else than objects.
    """
    if isinstance(value, str):
        require_unicode(value, where)
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RecordError(
                f"{where}: a tool call should be JSON ({error})", "bad_message"
            ) from None
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, list | tuple) or not all(isinstance(x, Mapping) for x in calls):
        raise RecordError(
            f"{where}: tool calls should be objects, got {kind_of(value)}", "bad_message"
        )
    require_unicode_inside(calls, f"{where}, tool calls")
    return [
        call if "function" in call else {"type": "function", "function": dict(call)}
        for call in calls
    ]


def require_unicode(text: str, where: str) -> None:
    """Raise RecordError if a text holds half of a surrogate pair, which no tokenizer encodes."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            f"{where} should be text without lone surrogates (half of a UTF-16 pair), but "
            f"character {error.start} is {text[error.start]!r}",
            "not_unicode",
        ) from None


def require_unicode_inside(value: Any, where: str) -> None:
    """Raise RecordError like `require_unicode` for a text, or any text in a list or object."""
    if isinstance(value, str):
        require_unicode(value, where)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            require_unicode_inside(key, where)
            require_unicode_inside(item, where)
    elif isinstance(value, list | tuple):
        for item in value:
            require_unicode_inside(item, where)


def unpack_json(value: Any) -> Any:
    """The list or object that a text holds as JSON, or as Python prints it; else None."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return None
    try:
        unpacked = json.loads(value)
    except (ValueError, RecursionError):
        unpacked = _printed(value)
    return unpacked if isinstance(unpacked, list | dict) else None


def _printed(text: str) -> Any:
    """The value of which Python printed `text`, as pandas does for lists in a CSV file; or None.

    NumPy puts a newline between the objects of an array where lists have a comma. A text inside of
    them has no newline: it is printed as "\\n".
    """
    if not text.lstrip().startswith(("[{'", "{'")):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # an escape such as "\\d"
            return ast.literal_eval(text.strip().replace("}\n {", "}, {"))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def unpack_messages(value: Any) -> list | None:
    """The messages that a text holds as JSON; None if it is no text, or some other text."""
    unpacked = unpack_json(value)
    messages = [unpacked] if isinstance(unpacked, dict) else unpacked
    return messages if messages and all(map(_looks_like_message, messages)) else None


def _looks_like_message(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    role = _first(value, ROLE_KEYS)
    content = any(key in value for key in (*CONTENT_KEYS, "tool_calls"))
    return content and isinstance(role, str) and role.strip().lower() in (*ROLES, *CALL_ROLES)


def same_message(first: dict, second: dict) -> bool:
    """Whether two messages say the same: role, content, reasoning and calls. Ids do not count."""
    return first == second or _compared(first) == _compared(second)


def _compared(message: dict) -> tuple:
    """What counts of a message: role, content, reasoning, and the calls with parsed arguments."""
    calls = []
    for call in message.get("tool_calls", ()):
        function = call["function"] if isinstance(call["function"], Mapping) else call
        arguments = function.get("arguments")
        parsed = unpack_json(arguments)
        calls.append((function.get("name"), arguments if parsed is None else parsed))
    reasoning = message.get("reasoning_content") or message.get("thinking")
    return message["role"], message["content"] or "", reasoning, calls


def same_messages(first: Messages, second: Messages) -> bool:
    """Whether two dialogues say the same."""
    return len(first) == len(second) and all(map(same_message, first, second))


def common_start(first: Messages, second: Messages) -> int:
    """How many messages two dialogues have in common before they part, leaving each at least 1."""
    limit = min(len(first), len(second)) - 1
    return next((i for i in range(limit) if not same_message(first[i], second[i])), limit)


def opens_dialogue(messages: Messages) -> bool:
    """Whether the first turn is that of the system or the user: the prompt is in the messages."""
    return messages[0]["role"] in ("system", "user")


def has_prompt(messages: Messages) -> bool:
    """Whether the user says something before the last turn."""
    return any(message["role"] == "user" for message in messages[:-1])


def require_answer(messages: Messages, where: str) -> None:
    """Raise RecordError unless the last turn is the assistant's."""
    role = messages[-1]["role"]
    if role != "assistant":
        raise RecordError(
            f"{where} should be a dialogue that ends with an assistant message, but it ends with "
            f"one of {role!r}",
            "no_answer",
        )


def split_hh(text: str) -> Messages:
    """The turns of a dialogue that is written "\\n\\nHuman: ...\\n\\nAssistant: ...".

    A last "Assistant:" without text, which asks for an answer, is left out. Text without such marks
    is one turn of the user.
    """
    marks = list(HH_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        return ({"role": "user", "content": text},)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    turns = [
        {"role": ROLES[mark[1].lower()], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends)
    ]
    asks = turns[-1]["role"] == "assistant" and not turns[-1]["content"] and len(turns) > 1
    return tuple(turns[:-1] if asks else turns)
