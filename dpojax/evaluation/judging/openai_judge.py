"""A judge behind a server that speaks the OpenAI protocol: vLLM, ollama, llama.cpp, or hosted."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from dpojax.evaluation.judging.costs import Prices, Tokens
from dpojax.evaluation.judging.endpoint import Endpoint, EndpointError
from dpojax.evaluation.judging.endpoint_options import EndpointOptions, options_of
from dpojax.evaluation.judging.judge import JudgeError
from dpojax.evaluation.judging.pacing import Pace, backoff, call_in_threads, wait
from dpojax.evaluation.judging.templates import Template, open_template
from dpojax.evaluation.judging.verdicts import Choice, Question, Reply
from dpojax.storage import as_path

REQUEST_TOKENS = 10  # of a chat template, beside the prompt's
TOP_LOGPROBS = 5  # most likely tokens in whose probabilities A and B are looked for
LONGEST_WAIT = 600.0  # seconds that a server may ask to wait, at once and in all for a question
NOTICE_SECONDS = 30.0  # between two warnings about requests that are sent again

logger = logging.getLogger(__name__)

# A question that a server will never answer, unlike a request that it never takes.
_QUESTION_REFUSED = re.compile(
    r"context.?(?:length|window|size)|maximum context|too long|too large|longer than|"
    r"content.?(?:filter|management|policy)",
    re.IGNORECASE,
)
_NO_CREDIT = re.compile(r"insufficient_quota|billing", re.IGNORECASE)


class OpenAIJudge:
    """Asks a chat model which response is better, and reads its written reply.

    Attributes:
      prices: of tokens, where the options have them.
      counted_by: how `tokens` counts, for a person.
    """

    is_symmetric = False

    def __init__(
        self,
        model: str,
        url: str,
        template: Template,
        options: EndpointOptions | None = None,
    ):
        """Make the judge; the server is not asked.

        Args:
          model: as the server names it.
          url: of the server; see `Endpoint`.

        Raises:
          JudgeError: the address or the tokenizer cannot be used; the key is not there.
        """
        options = options or EndpointOptions()
        self._endpoint = Endpoint(url, key_variable=options.key_variable, timeout=options.timeout)
        self._model, self._template, self._options = model, template, options
        self._pace = Pace(options.requests_per_minute, options.tokens_per_minute)
        self._has_answered = False
        self._next_notice = 0.0
        self.name = f"openai:{model}@{self._endpoint.url}"
        has_prices = options.price_in is not None
        self.prices = Prices(options.price_in, options.price_out) if has_prices else None
        self._count, self.counted_by = _token_counter(options.tokenizer)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The model, the server, the prompt's version and the settings of sampling."""
        request = self.body(Question("", "", "", "-"))
        del request["messages"]
        server = self._options.served_by or self._endpoint.url
        return json.dumps(["openai", server, self._template.version, request], sort_keys=True)

    def body(self, question: Question) -> dict[str, Any]:
        """Return the request for one question, as the protocol has it."""
        options = self._options
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": self._template.fill(question)}],
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "seed": options.seed,
        }
        if options.logprobs:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        body |= options.extra_body
        return {name: value for name, value in body.items() if value is not None}

    def tokens(self, question: Question) -> Tokens:
        """Count the tokens of a request, and how many its reply has at most."""
        longest = self._options.extra_body.get("max_completion_tokens") or self._options.max_tokens
        return Tokens(self._count(self._template.fill(question)), longest)

    def read(self, question: Question, answer: Any) -> Reply:
        """Return what a server's answer says.

        Args:
          answer: a chat completion, as parsed JSON.

        Raises:
          ValueError: it is no chat completion.
        """
        try:
            choice = answer["choices"][0]
            text = _text_of(choice)
            usage = answer.get("usage") or {}
            tokens_in = usage.get("prompt_tokens")
            tokens_out = usage.get("completion_tokens")
        except (TypeError, KeyError, IndexError, AttributeError):
            shown = self._endpoint.without_key(json.dumps(answer))[:300]
            raise ValueError(f"an answer that is no chat completion: {shown}") from None
        verdict = self._template.read(text)
        return Reply(
            verdict,
            _preference(choice, verdict),
            text,
            tokens_in if isinstance(tokens_in, int) else self.tokens(question).input,
            tokens_out if isinstance(tokens_out, int) else self._count(text),
        )

    def replies(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Ask the server about each question; see `Judge.replies`.

        Raises:
          JudgeError: the server refuses, or still fails after all retries. Requests that were under
            way have been waited for, and their replies were yielded.
        """
        return call_in_threads(self._ask, questions, self._options.concurrency)

    def _ask(self, question: Question, stop: threading.Event) -> Reply:
        """Ask until there is a reply."""
        body, counts = self.body(question), self.tokens(question)
        failures, waited = 0, 0.0
        while failures <= self._options.max_retries:
            self._pace.wait(counts.input + counts.output, stop)
            try:
                answer = self._endpoint.chat(body)
                self._has_answered = True
                return self.read(question, answer)
            except ValueError as error:
                problem, delay = str(error), None
            except EndpointError as error:
                self._has_answered = self._has_answered or not error.is_unreachable
                if error.status in (400, 413, 422) and _QUESTION_REFUSED.search(str(error)):
                    return Reply(Choice.UNPARSED, text=str(error))
                self._require_passing(error)
                problem, delay = str(error), error.retry_after
            self._tell(problem)
            # A busy server that says when to come again has not failed, for some time.
            waited += max(1.0, delay) if delay else 0.0
            failures += not delay or waited > LONGEST_WAIT
            if delay:
                self._pace.pause(delay)
            elif failures <= self._options.max_retries:
                wait(backoff(failures - 1, self._options.backoff), stop)
        raise JudgeError(
            f"{self.name}: {failures} requests for one question have failed. The last one got "
            f"{problem}. Replies that came before are kept; the same command goes on"
        )

    def _tell(self, problem: str) -> None:
        """Say that a request is sent again, not for each of many."""
        if time.monotonic() >= self._next_notice:
            self._next_notice = time.monotonic() + NOTICE_SECONDS
            logger.warning("%s: %s; such requests are sent again", self.name, problem)

    def _require_passing(self, error: EndpointError) -> None:
        """Raise JudgeError unless it may help to send the request again."""
        status, advice = error.status, ""
        if error.is_unreachable and not self._has_answered:
            advice = "nobody answers at this address: is the server up, and the address right?"
        elif status in (401, 403):
            advice = (
                "the key is refused, or there is none; set OPENAI_API_KEY, or name another "
                "environment variable with key_variable (over http:// to another machine, a key "
                "is sent only if its variable is named)"
            )
        elif status == 402 or (status == 429 and _NO_CREDIT.search(str(error))):
            advice = "there is no credit left; the same command goes on once there is"
        elif status == 404:
            models = ", ".join(self._endpoint.models()[:10])
            advice = "no such model or path" + (f"; the server has {models}" if models else "")
        elif status is not None and 300 <= status < 400:
            advice = "the server has moved; give its new address"
        elif status is not None and 400 <= status < 500 and status not in (408, 409, 425, 429):
            advice = "the server does not take the request; extra_body changes its fields"
        elif (error.retry_after or 0) > LONGEST_WAIT:
            advice = f"the server asks to wait {error.retry_after:.0f} s; try again then"
        if advice:
            raise JudgeError(f"{self.name}: {error}: {advice}")


def open_endpoint(
    argument: str, *, template: str = "summary", template_file: str | None = None, **options: Any
) -> OpenAIJudge:
    """Open the judge `MODEL@URL`.

    Args:
      template: name of the prompt.
      template_file: a file with a prompt, in place of `template`.
      options: fields of `EndpointOptions`.

    Raises:
      JudgeError: the argument, the prompt or an option cannot be used.
    """
    parts = re.fullmatch(r"(.+)@(https?://.*)", argument, re.DOTALL)
    if parts is None:
        raise JudgeError(
            f"openai:{argument.partition('@')[0]}...: is not openai:MODEL@URL, such as "
            "openai:llama3@http://localhost:8000/v1"
        )
    prompt = open_template(template, template_file)
    return OpenAIJudge(parts[1], parts[2], prompt, options_of(options))


def _token_counter(folder: str | None) -> tuple[Callable[[str], int], str]:
    """Return a function that counts the tokens of a request with a text, and how it does so."""
    if folder is None:
        return _count_bytes, "UTF-8 bytes / 4"
    try:
        tokenizer = Tokenizer.from_str(
            (as_path(folder, "tokenizer") / "tokenizer.json").read_text()
        )
    except Exception as error:  # tokenizers raises plain Exceptions
        raise JudgeError(
            f"tokenizer = {folder}: tokenizer.json cannot be read ({error})"
        ) from error
    return lambda text: REQUEST_TOKENS + len(tokenizer.encode(text)), f"the tokenizer {folder}"


def _count_bytes(text: str) -> int:
    return REQUEST_TOKENS + math.ceil(len(text.encode(errors="replace")) / 4)


def _text_of(choice: Mapping[str, Any]) -> str:
    """Return the text of a completion. A refusal, and a text that was cut off, are texts, too."""
    message = choice["message"]
    content = message.get("content")
    if isinstance(content, list):  # parts, of which only texts are read
        content = "".join(part.get("text") or "" for part in content)
    if content is not None and not isinstance(content, str):
        raise TypeError
    return content or message.get("refusal") or f"(no text: {choice.get('finish_reason')})"


def _preference(choice: Mapping[str, Any], verdict: Choice) -> float:
    """Return P(A) / (P(A) + P(B)) at the token that is the verdict's letter; nan without it."""
    letter = {Choice.FIRST: "A", Choice.SECOND: "B"}.get(verdict)
    try:
        tokens = choice["logprobs"]["content"]
        at = [x for x in tokens if x["token"].strip() == letter][-1]
        odds = {"A": 0.0, "B": 0.0}
        for likely in at["top_logprobs"] or [at]:
            if (name := likely["token"].strip()) in odds:
                odds[name] += math.exp(likely["logprob"])
        return odds["A"] / (odds["A"] + odds["B"])
    except (TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError, OverflowError):
        return math.nan
