"""Win rates: responses of policies are drawn, a judge compares them, and a report is written.

    judge(Settings(out="judged", prompts="reviews", limit=256, judge="exact",
                   a=[Side("runs/reviews:preference")], b=Side("runs/reviews:sft")))

or, as a command, with the settings as JSON,

    python -m dpojax.runs.judging --settings=SETTINGS.json

The folder holds report.md, which is written last, win_rates.csv, the figure, samples.jsonl, and
what a second call does not make again: responses/ and verdicts/.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import NamedTuple

from dpojax import storage
from dpojax.config.command_line import ArgumentParser
from dpojax.evaluation.judging import report
from dpojax.evaluation.judging.asking import Judged, estimate, judge_comparisons
from dpojax.evaluation.judging.batches import Imported, export_batch, import_batch
from dpojax.evaluation.judging.cache import VerdictCache
from dpojax.evaluation.judging.costs import Estimate
from dpojax.evaluation.judging.judge import Judge, JudgeError
from dpojax.evaluation.judging.open_judge import folder_of, open_judge
from dpojax.evaluation.judging.result import Result, Row, summarise
from dpojax.evaluation.judging.result import Side as JudgedSide
from dpojax.evaluation.judging.templates import open_template
from dpojax.evaluation.judging.verdicts import Comparison, Outcome
from dpojax.models.huggingface import require_known
from dpojax.runs.command import run_command
from dpojax.runs.judging_settings import Settings, Side, settings_from_json
from dpojax.runs.responses import Log, share_cut, silent
from dpojax.runs.sides import (
    Request,
    draw_all,
    is_policy,
    read_prompts,
    request_against,
    requests_of,
)
from dpojax.tables import blocks_table, terminal_width
from dpojax.watchdog import beat, watching

__all__ = ["Settings", "Side", "judge", "settings_from_json"]

VERDICTS, SAMPLES, REPORT = "verdicts", "samples.jsonl", "report.md"

READERS = ("openai:", "local:")  # judges that read a prompt
SHORT = {outcome: outcome.value for outcome in Outcome} | {Outcome.INCONSISTENT: "flipped"}


class Contest(NamedTuple):
    """Comparisons of one side, at a temperature and an n of best-of-n, with B.

    Attributes:
      cut: share of A's responses that reached the limit of tokens.
    """

    request: Request
    comparisons: list[Comparison]
    cut: float


def make_contests(
    settings: Settings, log: Log = silent, *, only_kept: bool = False
) -> list[Contest]:
    """Draw what is missing, and put the responses of both sides together.

    Args:
      only_kept: draw nothing, see `responses.PolicyResponses.draw`.

    Raises:
      DataError: prompts that are missing, or lack a response.
      ConfigError, OSError, ValueError: as `load_policy` raises them.
    """
    prompts, examples = read_prompts(settings)
    pairs = [
        (request, request_against(request, settings))
        for side in settings.a
        for request in requests_of(side, settings)
    ]
    requests = [request for pair in pairs for request in pair]
    responses = draw_all(requests, prompts, examples, settings, log, only_kept)
    contests = []
    for request, against in pairs:
        comparisons = [
            Comparison(prompt.id, prompt.text, one.text, of_b[i % len(of_b)].text, prompt.reference)
            for prompt, of_a, of_b in zip(prompts, responses[request], responses[against])
            for i, one in enumerate(of_a)
        ]
        contests.append(Contest(request, comparisons, share_cut(responses[request])))
    return contests


def open_settings_judge(settings: Settings) -> Judge:
    """The judge that settings name.

    Raises:
      JudgeError: it cannot be opened.
    """
    return open_judge(
        settings.judge,
        template=settings.template,
        template_file=settings.template_file or None,
        tie=settings.tie,
        batch_size=settings.judge_batch_size,
        **settings.endpoint,
    )


def check_judge(settings: Settings) -> None:
    """Raise JudgeError for a judge that cannot be opened, without reading its weights."""
    folder = folder_of(settings.judge)
    if not folder:
        open_settings_judge(settings)
        return
    try:
        require_known(folder)
    except (OSError, ValueError) as error:
        raise JudgeError(f"judge {settings.judge!r}: {error}") from error
    _template_of(settings)


def _template_of(settings: Settings) -> str:
    """Name and version of the prompt that the judge reads; "" for one that reads none."""
    if not settings.judge.startswith(READERS):
        return ""
    template = open_template(settings.template, settings.template_file or None)
    return f"{template.name} {template.version}"


def judge(settings: Settings, log: Log = silent) -> Result:
    """Judge all sides, write the folder, and return what was measured.

    Several processes may be given the same settings. They draw different responses. One of them
    asks the judge; the others wait, and then find all replies there.

    Args:
      log: gets a line now and then.

    Raises:
      JudgeError: the judge cannot be asked, or would cost too much; a second call goes on.
      what `make_contests` raises.
    """
    out = storage.as_path(settings.out, "out")
    with watching(settings.hang_minutes):
        check_judge(settings)
        contests = make_contests(settings, log)
        with storage.lock_in_turn(out, log):
            return _judge(settings, contests, out, log)


def _judge(settings: Settings, contests: Sequence[Contest], out: storage.Path, log: Log) -> Result:
    """Ask the judge, and write the folder."""
    beat("the judge is opened")
    opened = open_settings_judge(settings)  # a model: the policies have left the memory
    with open_verdicts(settings) as cache:
        judged_sides, facts = _ask(settings, opened, contests, cache, log)
    beat("the report is written")
    result = summarise(
        judged_sides,
        judge=opened.name,
        fingerprint=opened.fingerprint,
        opponent=settings.b.label,
        template=_template_of(settings),
        is_symmetric=opened.is_symmetric,
        facts=facts,
        resamples=settings.resamples,
        seed=settings.seed,
    )
    _write_samples(out / SAMPLES, judged_sides)
    report.write(out, result)
    return result


def terminal_table(result: Result) -> str:
    """The win rates for a terminal, in blocks of columns where it is too narrow."""
    rows = result.rows
    outcomes = [Outcome.WIN, Outcome.TIE, Outcome.LOSS]
    if not result.is_symmetric:
        outcomes.append(Outcome.INCONSISTENT)
    if any(row.win_rate.counts[Outcome.UNPARSED] for row in rows):
        outcomes.append(Outcome.UNPARSED)
    with_cut = any(row.cut for row in rows)
    temperatures = {row.temperature for row in rows}
    heading = ["", "win rate, %", "95 %", "equal lengths", *(SHORT[x] for x in outcomes)]
    table = [[*heading, "cut"] if with_cut else heading]
    for row in rows:
        rate, equal = row.win_rate, row.length_controlled
        cells = [
            _row_label(row, with_temperature=len(temperatures) > 1),
            f"{100 * rate.value:.1f}",
            f"{100 * rate.low:.1f} to {100 * rate.high:.1f}",
            "n/a" if equal is None else f"{100 * equal.value:.1f}",
            *(f"{100 * rate.share(outcome):.1f}" for outcome in outcomes),
        ]
        if with_cut:
            cells.append("-" if row.cut is None else f"{100 * row.cut:.1f}")
        table.append(cells)
    counts = " or ".join(f"{count:,}" for count in sorted({row.win_rate.prompts for row in rows}))
    title = f"Win rates against {result.opponent}, judged by {result.judge}, on {counts} prompts"
    if len(temperatures) == 1 and None not in temperatures:
        title += f", at temperature {temperatures.pop():g}"
    return "\n".join([title, "", *blocks_table(table, terminal_width())])


def _row_label(row: Row, *, with_temperature: bool) -> str:
    """Policy and setting, shorter than `Row.label`."""
    parts = [row.policy]
    parts += [f"best of {row.best_of}"] if row.best_of > 1 else []
    if with_temperature and row.temperature is not None:
        parts.append(f"T={row.temperature:g}")
    return ", ".join(parts)


def estimate_cost(settings: Settings, log: Log = silent) -> Estimate:
    """What asking the judge would take. Nothing is drawn, and it is not asked.

    Responses that are not drawn yet are taken to be as long as they can be.
    """
    with watching(settings.hang_minutes):
        contests = make_contests(settings, log, only_kept=True)
        comparisons = [one for contest in contests for one in contest.comparisons]
        opened = open_settings_judge(settings)
        with open_verdicts(settings) as cache:
            return estimate(opened, comparisons, cache, repeat=settings.repeat, seed=settings.seed)


def export_questions(settings: Settings, folder: str, log: Log = silent) -> list[storage.Path]:
    """Draw what is missing, and write the open questions as batch files instead of asking them.

    Raises:
      JudgeError: see `batches.export_batch`.
    """
    with watching(settings.hang_minutes):
        opened, contests = open_settings_judge(settings), make_contests(settings, log)
        comparisons = [one for contest in contests for one in contest.comparisons]
        with open_verdicts(settings) as cache:
            how = {"cache": cache, "repeat": settings.repeat, "seed": settings.seed}
            return export_batch(opened, comparisons, folder, **how)


def import_replies(settings: Settings, files: Sequence[str], log: Log = silent) -> Imported:
    """Take the replies of batch files into the verdicts.

    Raises:
      JudgeError: see `batches.import_batch`.
    """
    with watching(settings.hang_minutes):
        opened, contests = open_settings_judge(settings), make_contests(settings, log)
        comparisons = [one for contest in contests for one in contest.comparisons]
        paths = [storage.as_path(file, "a batch file") for file in files]
        with open_verdicts(settings) as cache:
            how = {"repeat": settings.repeat, "seed": settings.seed}
            return import_batch(opened, comparisons, paths, cache, **how)


def open_verdicts(settings: Settings) -> VerdictCache:
    """The verdicts that are there."""
    folder = settings.verdicts or f"{settings.out}/{VERDICTS}"
    return VerdictCache(storage.as_path(folder, "verdicts"))


def _ask(
    settings: Settings,
    opened: Judge,
    contests: Sequence[Contest],
    cache: VerdictCache,
    log: Log,
) -> tuple[list[JudgedSide], dict[str, str]]:
    """Ask about all comparisons, and put what was said beside each contest."""
    how = {"cache": cache, "repeat": settings.repeat, "seed": settings.seed}
    judged = judge_comparisons(
        opened,
        [one for contest in contests for one in contest.comparisons],
        max_cost=settings.max_cost,
        progress=_Paced(log),
        **how,
    )
    judged_sides = []
    for request, comparisons, cut in contests:
        of_side = judge_comparisons(opened, comparisons, **how)  # all in the cache
        judged_sides.append(
            JudgedSide(
                request.side.label,
                comparisons,
                of_side.judgements,
                of_side.repeats,
                request.temperature,
                request.best_of,
                cut=cut if is_policy(request.side) else None,
            )
        )
    return judged_sides, _facts(settings, contests, judged)


def _facts(settings: Settings, contests: Sequence[Contest], judged: Judged) -> dict[str, str]:
    """What the report says besides numbers."""
    facts = {
        "prompts": f"{settings.prompts}, {len({c.id for c in contests[0].comparisons})} of them",
        "responses": f"{settings.samples} to each prompt, {settings.max_new_tokens} tokens at most",
        "questions": f"{judged.asked} asked now, {judged.cached} answered before",
        "seed": str(settings.seed),
    }
    if judged.cost:
        facts["cost"] = f"{judged.cost:.4g} now"
    return facts


class _Paced:
    """Tells how many questions are answered, now and then and at the end."""

    def __init__(self, log: Log, seconds: float = 10.0):
        self._log, self._seconds, self._last = log, seconds, time.monotonic()

    def __call__(self, done: int, count: int) -> None:
        if done == count or time.monotonic() - self._last >= self._seconds:
            self._last = time.monotonic()
            self._log(f"{done} of {count} questions are answered")


def _write_samples(path: storage.Path, sides: Sequence[JudgedSide]) -> None:
    """One line per comparison, with what the judge says of it."""
    lines = []
    for side in sides:
        setting = {
            "policy": side.policy,
            "temperature": side.temperature,
            "best_of": side.best_of,
        }
        for comparison, judgement in zip(side.comparisons, side.judgements):
            line = setting | comparison._asdict()
            line["outcome"] = judgement.outcome.value
            line["replies"] = [judgement.a_first.text, judgement.b_first.text]
            lines.append(json.dumps(line) + "\n")
    storage.write_text(path, "".join(lines))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of a job: see above."""
    parser = ArgumentParser(
        prog="python -m dpojax.runs.judging", description="Judge policies by their responses."
    )
    parser.add_argument("--settings", required=True, help="a JSON file with the fields of Settings")
    options = parser.parse_args(arguments)
    path = storage.as_path(options.settings, "--settings")
    with storage.damage_named(path):
        settings = settings_from_json(storage.read_json(path, fields={}))
    judge(settings, log=print)


if __name__ == "__main__":
    run_command(main)
