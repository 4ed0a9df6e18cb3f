"""A dialogue with a policy: its chat template, our sampler, a reply that comes piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dpojax.config.command_line import UsageError
from dpojax.data.records import DataError
from dpojax.data.templates import prompt_text
from dpojax.runs.policy import Policy
from dpojax.sampling import ResponsePrefix, build_sampler, pad
from dpojax.sharding import to_host

PIECE = 16  # tokens that are drawn at a time
UNFINISHED = "\ufffd"  # how a character ends of which not all tokens are there yet


class ChatSettings(NamedTuple):
    """How replies are drawn.

    Attributes:
      system: the system's message before a dialogue; "" is none.
      template: whether messages go through the tokenizer's chat template. Without it each message
        is a prompt by itself, and the model goes on with it.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    system: str = ""
    template: bool = True


class NoRoom(ValueError):
    """A message that does not fit into the model's positions."""


@dataclasses.dataclass
class Dialogue:
    """The messages that were exchanged with one policy.

    Attributes:
      policy: that answers.
      settings: how it does.
      messages: role and content, as chat templates read them.
      draws: replies so far; each is drawn with randomness of its own.
      forgotten: exchanges that were left out of the last prompt since they did not fit any more.
    """

    policy: Policy
    settings: ChatSettings
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    draws: int = 0
    forgotten: int = 0

    @property
    def uses_template(self) -> bool:
        return self.settings.template and bool(self.policy.tokenizer.chat_template)

    @property
    def system_turn(self) -> dict[str, str]:
        return {"role": "system", "content": self.settings.system}

    def clear(self) -> None:
        """Begin a new dialogue."""
        self.messages = []

    def reply(self, message: str) -> Iterator[str]:
        """Add a user's message at once; return the pieces of the reply as they are drawn.

        What was yielded stays in the dialogue, also where the caller stops early. Of a reply that
        the caller never began to read that is an empty one.

        Raises:
          NoRoom: the message alone is too long for the model.
          DataError: the chat template refuses the messages.
        """
        if not self.uses_template:
            self.messages = []
        self.messages.append({"role": "user", "content": message})
        try:
            prompt = self._prompt()
        except ValueError:
            self.messages.pop()
            raise
        answer = {"role": "assistant", "content": ""}
        self.messages.append(answer)
        return self._answered(answer, prompt)

    def _answered(self, answer: dict[str, str], prompt: list[int]) -> Iterator[str]:
        """The pieces of the reply, each of which is added to the message `answer`."""
        for piece in self._pieces(prompt):
            answer["content"] += piece
            yield piece

    def again(self) -> Iterator[str]:
        """Draw another reply to the last message, in place of the one that was given.

        Raises:
          ValueError: there is no message yet.
        """
        user_turns = [k for k, message in enumerate(self.messages) if message["role"] == "user"]
        if not user_turns:
            raise ValueError("nothing was said yet")
        last = self.messages[user_turns[-1]]["content"]
        del self.messages[user_turns[-1] :]
        return self.reply(last)

    def _prompt(self) -> list[int]:
        """The ids before the reply; the oldest exchanges are left out if they do not fit."""
        limit = self.policy.model.config.max_positions - PIECE
        for start in range(0, len(self.messages), 2):
            messages = self.messages[start:]
            ids = self._encode([self.system_turn, *messages] if self.settings.system else messages)
            if len(ids) <= limit:
                self.forgotten = start // 2
                return ids
        raise NoRoom(
            f"the message has {len(ids)} tokens, and the model reads {limit} before a reply"
        )

    def _encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        tokenizer = self.policy.tokenizer
        if self.uses_template:
            text = prompt_text(tokenizer, messages)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer(messages[-1]["content"])["input_ids"]
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and len(ids) > 1 else ids

    def _pieces(self, prompt: list[int]) -> Iterator[str]:
        """The text of the reply, where each piece ends with a whole character."""
        tokenizer, yielded = self.policy.tokenizer, ""
        tokens: list[int] = []
        for new, has_ended in self._tokens(prompt):
            tokens += new
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if has_ended or not text.endswith(UNFINISHED):
                yield text[len(yielded) :]
                yielded = text

    def _tokens(self, prompt: list[int]) -> Iterator[tuple[list[int], bool]]:
        """The ids of the reply, `PIECE` at a time, and whether these are the last.

        They are those that would be drawn at once: the sampler is told how many there are already.
        """
        settings, policy = self.settings, self.policy
        sampler = build_sampler(policy.model, max_new_tokens=PIECE, stop=policy.stop)
        room = policy.model.config.max_positions - len(prompt)
        limit = min(settings.max_new_tokens, room - room % PIECE)
        drawn: list[int] = []
        number, self.draws = self.draws, self.draws + 1
        while len(drawn) < limit:
            batch = pad([np.asarray([*prompt, *drawn])], [number], 1)
            prefix = ResponsePrefix(np.zeros(1, np.int32), np.full(1, len(drawn), np.int32))
            with jax.set_mesh(policy.mesh):
                samples = to_host(
                    sampler(
                        policy.params,
                        batch,
                        seed=settings.seed,
                        temperature=settings.temperature,
                        top_k=settings.top_k,
                        top_p=settings.top_p,
                        prefix=prefix,
                    )
                )
            new = samples.tokens[0, 0, : samples.lengths[0, 0]].tolist()[: limit - len(drawn)]
            drawn += new
            has_ended = bool(samples.stopped[0, 0]) or len(drawn) >= limit
            yield new, has_ended
            if has_ended:
                return


def require_template(name: str, dialogue: Dialogue) -> None:
    """Raise UsageError for a system message that no prompt of the dialogue would hold.

    Also for a chat template that refuses all messages.
    """
    if not dialogue.uses_template:
        if dialogue.settings.system:
            reason = _why_no_template(dialogue)
            raise UsageError(f"--system: {name} would not read it, since {reason}; leave it out")
        return
    messages, tokenizer = [{"role": "user", "content": "hello"}], dialogue.policy.tokenizer
    try:
        without = prompt_text(tokenizer, messages)
    except DataError as error:
        raise UsageError(
            f"{name}: {error}; with --notemplate each line is a prompt that the model goes on with"
        ) from error
    if dialogue.settings.system:
        try:
            is_read = prompt_text(tokenizer, [dialogue.system_turn, *messages]) != without
            reason = "its chat template leaves it out"
        except DataError as error:
            is_read, reason = False, str(error)
        if not is_read:
            raise UsageError(f"--system: {name} would not read it, since {reason}; leave it out")


def _why_no_template(dialogue: Dialogue) -> str:
    return "it has no chat template" if dialogue.settings.template else "--notemplate is given"


def describe(name: str, dialogue: Dialogue) -> str:
    """How a model will be talked to."""
    if dialogue.uses_template:
        return f"{name}: with its chat template"
    reason = _why_no_template(dialogue)
    return f"{name}: each line is a prompt by itself, that the model goes on with ({reason})"


def one_line(text: str) -> str:
    """A reply as one line: a newline is \\n, and a backslash is doubled."""
    text = text.strip().replace("\\", "\\\\")
    return text.replace("\r", "").replace("\n", "\\n").replace("\t", "\\t")
