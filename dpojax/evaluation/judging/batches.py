"""Files of requests for servers that answer many of them later, at a lower price.

The form is that of OpenAI's batch API, which vLLM reads as well (`vllm run-batch`): one JSON object
a line, with `custom_id`, `method`, `url` and `body`. Here `custom_id` is a question's key in the
cache of verdicts, so results may come back in any order, in several files, or in part.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dpojax import storage
from dpojax.evaluation.judging.asking import REPEAT, open_questions, plan_questions
from dpojax.evaluation.judging.cache import VerdictCache
from dpojax.evaluation.judging.judge import Judge, JudgeError
from dpojax.evaluation.judging.openai_judge import OpenAIJudge
from dpojax.evaluation.judging.verdicts import Comparison, Question
from dpojax.storage import Path, as_path, matches
from dpojax.storage.paths import PathLike

MAX_REQUESTS = 50_000  # of one file; both are OpenAI's limits
MAX_BYTES = 200_000_000
PREFIX = "requests"

logger = logging.getLogger(__name__)


class Imported(NamedTuple):
    """What the lines of result files were. `missing` and `added` count questions, the rest lines.

    Attributes:
      added: replies that are new in the cache.
      known: to questions that had their reply before.
      doubled: to a question that an earlier line has answered.
      failed: requests that the server has refused, or did not get to.
      damaged: no JSON, or no chat completion.
      unknown: with a `custom_id` of no question of these comparisons and this judge.
      missing: questions that still have no reply.
    """

    added: int
    known: int
    doubled: int
    failed: int
    damaged: int
    unknown: int
    missing: int

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in self._asdict().items())


def export_batch(
    judge: Judge,
    comparisons: Sequence[Comparison],
    folder: PathLike,
    *,
    cache: VerdictCache | None = None,
    repeat: float = REPEAT,
    seed: int = 0,
    max_requests: int = MAX_REQUESTS,
    max_bytes: int = MAX_BYTES,
) -> list[Path]:
    """Write the questions that have no reply yet, and return the files: none if there are none.

    Args:
      folder: local, or on a bucket; without request files of an earlier export, which would be paid
        for twice.
      cache, repeat, seed: as in `judge_comparisons`.
      max_requests, max_bytes: of one file.

    Raises:
      JudgeError: the judge is not asked over this protocol; the folder holds request files.
    """
    judge = _require_openai(judge)
    folder = as_path(folder, "the folder of batch files")
    if old := matches(folder / f"{PREFIX}-*.jsonl"):
        raise JudgeError(
            f"{old[0]}: is of an earlier export; import its results, and name another folder"
        )
    planned = plan_questions(judge, comparisons, repeat=repeat, seed=seed)
    lines = (_request(judge, x.key, x.question) for x in open_questions(planned, cache))
    paths = []
    for number, part in enumerate(_parts(lines, max_requests, max_bytes), start=1):
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{PREFIX}-{number:03d}.jsonl")
        storage.write_bytes(paths[-1], b"".join(part))
    return paths


def import_batch(
    judge: Judge,
    comparisons: Sequence[Comparison],
    files: Iterable[PathLike],
    cache: VerdictCache,
    *,
    repeat: float = REPEAT,
    seed: int = 0,
) -> Imported:
    """Put the replies of result files into the cache.

    Judge, comparisons, `repeat` and `seed` have to be those of the export. Lines may stand in any
    order; every line that is not used is counted.

    Args:
      files: results, and files of errors, as the server gives them.

    Raises:
      JudgeError: the judge is not asked over this protocol.
      FileNotFoundError: there is no such file.
    """
    judge = _require_openai(judge)
    planned = {x.key: x for x in plan_questions(judge, comparisons, repeat=repeat, seed=seed)}
    before = {key for key in planned if key in cache}
    counts = dict.fromkeys(Imported._fields, 0)
    for path in files:
        for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            kind, text = _import_line(judge, line, planned, before, cache)
            counts[kind] += 1
            if text:
                logger.warning("%s:%d: %s: %s", path, number, kind, text)
    cache.flush()
    counts["missing"] = len(open_questions(list(planned.values()), cache))
    return Imported(**counts)


def _require_openai(judge: Judge) -> OpenAIJudge:
    if not isinstance(judge, OpenAIJudge):
        raise JudgeError(f"{judge.name}: only openai:MODEL@URL has batch files")
    return judge


def _request(judge: OpenAIJudge, key: str, question: Question) -> bytes:
    request = {
        "custom_id": key,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": judge.body(question),
    }
    return json.dumps(request).encode() + b"\n"


def _parts(lines: Iterable[bytes], max_requests: int, max_bytes: int) -> Iterator[list[bytes]]:
    """Split lines into lists that keep to both limits."""
    part, size = [], 0
    for line in lines:
        if part and (len(part) >= max_requests or size + len(line) > max_bytes):
            yield part
            part, size = [], 0
        part.append(line)
        size += len(line)
    if part:
        yield part


def _import_line(
    judge: OpenAIJudge, line: bytes, planned: dict, before: set[str], cache: VerdictCache
) -> tuple[str, str]:
    """Use one line of results; return which field of `Imported` counts it, and what is wrong."""
    try:
        record = json.loads(line)
        key = record["custom_id"]
        question = planned[key].question if key in planned else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return "damaged", f"{line[:80]!r}"
    if question is None:
        return "unknown", ""
    if key in before:
        return "known", ""
    if key in cache:
        return "doubled", ""
    if (problem := _failure(record)) is not None:
        return "failed", problem
    try:
        reply = judge.read(question, record["response"].get("body"))
    except ValueError as error:
        return "damaged", str(error)
    cache.put(key, reply, judge.name)
    return "added", ""


def _failure(record: dict[str, Any]) -> str | None:
    """What the server says of a request without a good answer; None where there is one."""
    response, error = record.get("response"), record.get("error")
    is_good = isinstance(response, dict) and response.get("status_code", 200) == 200
    return None if is_good and not error else json.dumps(error or response)[:200]
