"""Length limits of examples, and what is done with odd records."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args, get_origin, get_type_hints


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """Length limits, and what to do with odd records.

    Attributes:
      max_length: most tokens of a prompt with any one of its responses, BOS and EOS included.
      max_prompt_length: most tokens of a prompt, or None for no limit of its own. Both cutting
        kinds of `truncation` shorten a longer prompt at its start; `drop` and `error` drop the
        record or raise.
      truncation: what to do with a record over `max_length`. `drop` drops it. `cut_prompt_start`
        cuts the prompt's start; BOS and at least one more token have to remain.
        `cut_response_end` cuts the end of the responses that are too long; they lose EOS and are
        marked in `Example.cut`. `error` raises.
      append_eos: end every response with the tokenizer's EOS.
      identical: what to do with records with two equal responses (their margin is always 0).
      empty: what to do with records with a response without text (white space is no text).
      prompts_differ: what to do with pairs whose dialogues have different prompts.
      malformed: what to do with records that cannot be read, or that the chat template refuses.
      assistant_turns: where a response has several turns of the assistant, whether all of them are
        scored or only the last.

    Raises:
      ValueError: for a choice that does not exist or a length that leaves no room.
    """

    max_length: int = 512
    max_prompt_length: int | None = None
    truncation: Literal["drop", "cut_prompt_start", "cut_response_end", "error"] = "drop"
    append_eos: bool = True
    identical: Literal["drop", "keep", "error"] = "drop"
    empty: Literal["drop", "keep", "error"] = "drop"
    prompts_differ: Literal["drop", "error"] = "drop"
    malformed: Literal["drop", "error"] = "drop"
    assistant_turns: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(TokenizeConfig).items():
            value, choices = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                raise ValueError(f"{name} should be one of {', '.join(choices)}, got {value!r}")
        if self.max_length < 2:
            raise ValueError(f"max_length should be 2 or more, got {self.max_length}")
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise ValueError(
                f"max_prompt_length should be between 1 and max_length - 1 = "
                f"{self.max_length - 1}, got {self.max_prompt_length}"
            )
