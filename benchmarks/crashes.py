"""Kill, tear, fill and flip: how many runs end as if nothing had disturbed them.

    python benchmarks/crashes.py --kills 300 --faults 60 --flips 140 --others 30 --json FILE

A trial disturbs a small run of SFT and DPO at a place that its seed chooses. Then the same command
has to end with the weights, metrics and samples of an undisturbed run, and nothing else may be
left. What each kind of trial does is said in tests/crash/trials.py. Needs a C compiler, and Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pathlib
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dpojax.tables import text_table  # noqa: E402
from tests.crash import harness, trials  # noqa: E402
from tests.crash.verdicts import BAD, GOOD, Verdict  # noqa: E402

Trial = Callable[[Random], Verdict | tuple[Verdict, str]]


def kills(lab: trials.Laboratory, case: trials.Case) -> dict[str, Trial]:
    """Trials that kill a run, by kind."""
    functions = {
        "killed at a random time": trials.kill_at_random,
        "killed at the n-th change": trials.kill_at_change,
        "killed in the middle of a write": trials.tear,
        "power lost at the n-th change": trials.lose_power,
    }
    return {name: partial(function, lab, case) for name, function in functions.items()}


def faults(lab: trials.Laboratory, case: trials.Case) -> dict[str, Trial]:
    """Trials in which the disk fails, by kind."""
    made = {}
    for error in harness.ERRORS:
        made[f"{error} once"] = partial(trials.fail_once, lab, case, error=error)
        made[f"{error} from then on"] = partial(trials.fail, lab, case, error=error)
    return made


def flips(lab: trials.Laboratory, case: trials.Case) -> dict[str, Trial]:
    """Trials that damage a file of a stopped run, by kind of file."""
    stopped = [
        lab.stop(case, r"^rename /run/sft/checkpoints/3$"),
        lab.stop(case, r"^rename /run/preference/checkpoints/4$"),
    ]

    def damage(kind: str, random: Random):
        has_scores = kind in ("reference log-probs", "kept reference", "samples.jsonl")
        where = stopped[1] if has_scores else random.choice(stopped)
        return trials.damage(lab, case, random, where, kind)

    return {f"damaged: {kind}": partial(damage, kind) for kind in trials.FILES}


def others(lab: trials.Laboratory, second: harness.Server) -> Iterator[tuple[str, Trial]]:
    """Trials of other commands than a run's, by kind."""
    shared = lab.open(trials.command_with_shared_tokens)
    yield "two runs, one folder of tokens", partial(trials.share_tokens, lab, shared, other=second)
    finished = lab.keep("finished")
    for name, command in (
        ("sweep", harness.sweep),
        ("export", partial(harness.export, run=finished / "run")),
    ):
        case = lab.open(command)
        yield f"{name} killed at a random time", partial(trials.kill_at_random, lab, case)
        yield f"{name} killed at the n-th change", partial(trials.kill_at_change, lab, case)
        yield f"{name}: ENOSPC from then on", partial(trials.fail, lab, case)


def in_turn(groups: Sequence[tuple[dict[str, Trial], int]]) -> Iterator[tuple[str, int, Trial]]:
    """(kind, number, trial), as many of each group as asked for, such that all kinds go on."""
    queues = []
    for made, count in groups:
        kinds = itertools.cycle(made.items()) if count else iter(())
        queue = itertools.islice(kinds, count)
        queues.append((count, [(k, i // len(made), t) for i, (k, t) in enumerate(queue)]))
    most = max((count for count, _ in queues), default=0)
    for i in range(most):
        for count, queue in queues:
            yield from queue[i * count // most : (i + 1) * count // most]


def show(counts: dict[str, Counter]) -> str:
    """A table of kinds of trials and what came of them."""
    seen = [kind for kind in (*GOOD, *BAD) if any(counts[name][kind] for name in counts)]
    rows = [
        [name, str(sum(of.values())), *(str(of[kind] or "-") for kind in seen)]
        for name, of in counts.items()
    ]
    return "\n".join(text_table([["", "trials", *seen], *rows]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=40, help="of runs")
    parser.add_argument("--faults", type=int, default=16, help="disks that are full or fail")
    parser.add_argument("--flips", type=int, default=24, help="damaged files")
    parser.add_argument("--others", type=int, default=0, help="sweeps, exports, shared tokens")
    parser.add_argument("--only", default="", help="kinds of trials that hold this text")
    parser.add_argument("--first", type=int, default=0, help="number of the first of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--minutes", type=float, default=0, help="begin no trial later; 0: no limit"
    )
    parser.add_argument("--folder", help="for trials; what ended badly stays there")
    parser.add_argument("--json", help="a file that gets a line for each trial")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as during:
        if not options.folder:
            options.folder = during.enter_context(tempfile.TemporaryDirectory())
        folder = pathlib.Path(options.folder).resolve()
        folder.mkdir(exist_ok=True, parents=True)
        lab = during.enter_context(trials.laboratory(folder))
        return _run(lab, options)


def _run(lab: trials.Laboratory, options: argparse.Namespace) -> int:
    began, counts = time.monotonic(), {}
    case = lab.open(harness.train)
    print(f"an undisturbed run: {case.seconds:.1f} s, {len(case.changes)} changes", flush=True)
    groups = [(kills(lab, case), options.kills), (faults(lab, case), options.faults)]
    if options.flips:
        groups.append((flips(lab, case), options.flips))
    with contextlib.ExitStack() as during:
        if options.others:
            second = harness.Server(lab.folder / "second", lab.folder / "faults.so", lab.compiled)
            groups.append((dict(others(lab, during.enter_context(second))), options.others))
        groups = [({k: t for k, t in made.items() if options.only in k}, n) for made, n in groups]
        for kind, i, trial in in_turn([(made, n) for made, n in groups if made]):
            if options.minutes and time.monotonic() - began > 60 * options.minutes:
                break
            number = options.first + i
            outcome = trial(Random(f"{options.seed}/{kind}/{number}"))
            verdict, what = outcome if isinstance(outcome[0], Verdict) else (outcome, "")
            counts.setdefault(kind, Counter())[verdict.kind] += 1
            _note(lab, options, {"kind": kind, "number": number, "what": what}, verdict)
    print(f"\n{show(counts)}\n\n{lab.kills} kills in all; some trials kill a run several times")
    return 1 if any(of[kind] for of in counts.values() for kind in BAD) else 0


def _note(
    lab: trials.Laboratory, options: argparse.Namespace, trial: dict, verdict: Verdict
) -> None:
    """Keep what came of a trial, and of a bad one what it has left and what it said."""
    line = {"seed": options.seed, **trial, "verdict": verdict.kind, "detail": verdict.detail}
    if options.json:
        with open(options.json, "a") as file:
            print(json.dumps(line), file=file)
    if verdict.is_good:
        return
    print(json.dumps(line), flush=True)
    name = f"{trial['kind']}-{options.seed}-{trial['number']}".replace(" ", "-")
    folder = lab.folder / "bad" / name.replace(":", "").replace(",", "")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(lab.trial, folder)
    for file in ("printed.txt", "errors.txt"):
        shutil.copy(lab.folder / file, folder / file)


if __name__ == "__main__":
    sys.exit(main())
