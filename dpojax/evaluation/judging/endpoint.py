"""One request to a server that speaks the OpenAI protocol, and what may go wrong with it.

This is the standard library's HTTP client. That of huggingface_hub refuses every server, also one
on this machine, where HF_HUB_OFFLINE is set, as it is on many clusters; and without a key it sends
the hub's token.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import json
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from dpojax.evaluation.judging.judge import JudgeError
from dpojax.watchdog import taking_up_to

DEFAULT_KEY = "OPENAI_API_KEY"  # the environment variable that holds the key
LARGEST_ANSWER = 64 << 20  # bytes
PIECE = 1 << 16  # bytes that are read at once
SHOWN = 300  # characters of an answer in an error
LIST_SECONDS = 5.0  # for the list of models, which only an error message shows
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


class EndpointError(Exception):
    """A request that got no answer that can be used. The message holds the last answer.

    Attributes:
      status: of HTTP; None where no answer came, or only a part of one, or no JSON.
      retry_after: seconds that the server asks to wait; None where it names none.
      is_unreachable: nobody listens at this address.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        is_unreachable: bool = False,
    ):
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.is_unreachable = is_unreachable


class Endpoint:
    """A server's address and the key to it. Threads may share it.

    Attributes:
      url: without a slash at its end.
    """

    def __init__(self, url: str, *, key_variable: str | None = None, timeout: float = 120.0):
        """Check the address and read the key. The server is not asked.

        Args:
          url: of the server; `/v1` is added where it names no path.
          key_variable: the environment variable that holds the key. None is OPENAI_API_KEY, if that
            is set; over plain http it is sent to this machine alone.
          timeout: seconds for one request in all.

        Raises:
          JudgeError: the address cannot be used, or the variable is not set.
        """
        parts = _parse(url)
        self.url = url.rstrip("/")
        self._chat_url = _chat_url(parts)
        self._timeout = timeout
        self.__key = _read_key(parts, key_variable)
        handlers = [_NoRedirects()]
        if parts.scheme == "https":  # else each request would read all certificates again
            handlers.append(urllib.request.HTTPSHandler(context=ssl.create_default_context()))
        self._opener = urllib.request.build_opener(*handlers)

    def chat(self, body: Mapping[str, Any]) -> Any:
        """Return the parsed answer to a request for a chat completion.

        Raises:
          EndpointError: there is no answer of status 200 that is JSON.
        """
        return self._ask(self._chat_url, json.dumps(body).encode(), self._timeout)

    def models(self) -> list[str]:
        """Return the names of models that the server says it has; [] if it does not say."""
        url = self._chat_url.replace("/chat/completions", "/models")
        with contextlib.suppress(EndpointError, TypeError, KeyError):
            return [str(model["id"]) for model in self._ask(url, None, LIST_SECONDS)["data"]]
        return []

    def without_key(self, text: str) -> str:
        """Return a server's text without the key, which some servers repeat."""
        return text.replace(self.__key, "***") if self.__key else text

    def _ask(self, url: str, data: bytes | None, timeout: float) -> Any:
        # The first bytes may take the whole time, and so may each later piece.
        with taking_up_to(2 * timeout):
            text = self._answer(url, data, timeout)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            shown = self._shown(text)
            raise EndpointError(f"an answer that is no JSON: {shown}") from None

    def _answer(self, url: str, data: bytes | None, timeout: float) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "dpojax"}
        if self.__key:
            headers["Authorization"] = f"Bearer {self.__key}"
        request = urllib.request.Request(url, data, headers)
        deadline = time.monotonic() + timeout
        try:
            with self._opener.open(request, timeout=timeout) as response:
                return _read(response, deadline)
        except urllib.error.HTTPError as error:
            raise self._refusal(error, deadline) from None
        except (OSError, http.client.HTTPException) as error:
            raise _no_answer(error, timeout) from None

    def _refusal(self, error: urllib.error.HTTPError, deadline: float) -> EndpointError:
        text = b""
        with error, contextlib.suppress(OSError, http.client.HTTPException):
            text = _read(error, deadline)
        location = error.headers.get("Location")
        answer = f"to {location}" if 300 <= error.code < 400 and location else self._shown(text)
        return EndpointError(
            f"HTTP {error.code} {answer}",
            status=error.code,
            retry_after=_retry_after(error.headers),
        )

    def _shown(self, text: bytes) -> str:
        return repr(self.without_key(text.decode(errors="replace"))[:SHOWN])


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirected request would send the key, and no texts, to another server."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _parse(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018 (raises)
    except ValueError as error:
        raise JudgeError(f"{url}: is no address ({error})") from error
    if parts.username is not None or parts.password is not None:
        raise JudgeError(
            f"the address of {parts.hostname} holds a name or a password, which reports would "
            "show; put the key into an environment variable and name it with key_variable"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise JudgeError(f"{url}: is no address; it begins with http:// or https://")
    return parts


def _chat_url(parts: urllib.parse.SplitResult) -> str:
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return parts._replace(path=path, fragment="").geturl()


def _read_key(parts: urllib.parse.SplitResult, variable: str | None) -> str:
    key = os.environ.get(variable or DEFAULT_KEY, "").strip()
    if variable and not key:
        raise JudgeError(f"key_variable = {variable}: this environment variable is not set")
    is_safe = parts.scheme == "https" or parts.hostname in THIS_MACHINE
    return key if variable or is_safe else ""


def _read(response: Any, deadline: float) -> bytes:
    """Read an answer. One that comes byte by byte meets the deadline as well."""
    pieces, size = [], 0
    while piece := response.read1(PIECE):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST_ANSWER:
            raise http.client.HTTPException("an answer of more than 64 MB")
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(pieces)


def _no_answer(error: Exception, timeout: float) -> EndpointError:
    reason = getattr(error, "reason", error)  # urllib wraps what went wrong before the answer
    if isinstance(reason, TimeoutError):
        return EndpointError(f"no answer within {timeout:g} s")
    refused = isinstance(reason, ConnectionRefusedError)
    lost = isinstance(reason, ConnectionError | http.client.HTTPException) and not refused
    return EndpointError(
        f"{type(reason).__name__}: {reason}",
        is_unreachable=isinstance(reason, OSError) and not lost,
    )


def _retry_after(headers: Any) -> float | None:
    """Read how long a server asks to wait: seconds, milliseconds or a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(TypeError, ValueError):
            seconds = float(headers.get(name)) * unit
            if seconds >= 0:  # not nan
                return seconds
    with contextlib.suppress(TypeError, ValueError):
        date = email.utils.parsedate_to_datetime(headers.get("retry-after"))
        return max(0.0, date.timestamp() - time.time())
    return None
