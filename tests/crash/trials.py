"""Trials: a run is disturbed at a place that a seed chooses, and the same command has to go on."""

from __future__ import annotations

import contextlib
import pathlib
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from tests.crash import harness
from tests.crash.harness import COUNT, ERRORS, FAIL, FAIL_ONCE, KILL, POWER, TEAR, Faults, Server
from tests.crash.verdicts import SAME, Verdict, compare, complaint, judge, judge_damaged

HANG_SECONDS = 60.0  # beyond what an undisturbed call takes
FAIL_SECONDS = 30.0  # the same, of a call that finds its disk full

# Kinds of files below run/, and what is found in their names; the first that fits.
FILES = {
    "checkpoint arrays": r"checkpoints/\d+/state/.*\bd/",
    "checkpoint manifests": r"checkpoints/\d+/state/.*manifest",
    "checkpoint metadata": r"checkpoints/\d+/",
    "kept reference": r"/reference/",
    "reference log-probs": r"/reference_logprobs/",
    "tokens": r"tokens/.*\.arrow",
    "config.json": r"run/config\.json",
    "contents.json": r"run/contents\.json",
    "metrics.jsonl": r"metrics\.jsonl",
    "samples.jsonl": r"samples\.jsonl",
    "compiled programs": r"compiled/",
    "others": r"",
}
TOKENS = "tokens"
DAMAGES = ("flip", "flip", "flip", "halve", "empty", "delete")


class Case(NamedTuple):
    """A command, and what it does where nothing disturbs it.

    Attributes:
      command: its arguments, of the folder that it works in.
      expected: what it leaves there.
      seconds: that it takes.
      changes: that it makes to files, `open /run/config.json` for example.
    """

    command: Callable[[pathlib.Path], list[str]]
    expected: harness.Snapshot
    seconds: float
    changes: list[str]


class Laboratory:
    """Where trials are made: a folder, and a server that starts runs.

    Trials use `folder/trial`, which holds what the last one left.
    """

    def __init__(self, folder: pathlib.Path, server: Server):
        self.folder, self.server, self.compiled = folder, server, folder / "compiled"
        self.trial = folder / "trial"
        self.limit = 600.0
        self.kills = 0  # of all trials

    def fresh(self, like: pathlib.Path | None = None) -> pathlib.Path:
        """The trial's folder, empty or a copy of another."""
        shutil.rmtree(self.trial, ignore_errors=True)
        if like is None:
            self.trial.mkdir()
        else:
            shutil.copytree(like, self.trial)
        return self.trial

    def call(self, case: Case, faults: Faults = Faults(), **options) -> harness.Ended:  # noqa: B008
        limit = 2 * case.seconds + HANG_SECONDS
        command = case.command(self.trial)
        ended = self.server.run(command, self.trial, faults, limit=limit, **options)
        self.kills += ended.status == -signal.SIGKILL and not ended.hung
        return ended

    def open(self, command: Callable[[pathlib.Path], list[str]]) -> Case:
        """Run a command undisturbed, twice; it has to leave the same.

        Raises:
          AssertionError: it fails, or does not.
        """
        snapshots = []
        for _ in range(2):  # the first compiles
            log = self.folder / "changes.txt"
            log.unlink(missing_ok=True)
            folder = self.fresh()
            faults = Faults(COUNT, log=str(log))
            ended = self.server.run(command(folder), folder, faults, limit=self.limit)
            assert ended.status == 0, ended.errors
            snapshots.append(harness.snapshot(folder))
        assert compare(*snapshots) == SAME, compare(*snapshots)
        changes = [line.split(" ", 1)[1] for line in log.read_text().splitlines()]
        return Case(command, snapshots[0], ended.seconds, changes)

    def stop(self, case: Case, at: str) -> pathlib.Path:
        """A copy of what a run leaves that is killed right after a change like `at`."""
        numbers = [n for n, change in enumerate(case.changes, start=1) if re.search(at, change)]
        self.fresh()
        ended = self.call(case, Faults(KILL, numbers[0] + 1))
        assert ended.status < 0, ended
        return self.keep(f"stopped-{numbers[0]}")

    def keep(self, name: str) -> pathlib.Path:
        """A copy of what the last trial has left, in folder/name."""
        kept = self.folder / name
        shutil.rmtree(kept, ignore_errors=True)
        return pathlib.Path(shutil.copytree(self.trial, kept))


@contextlib.contextmanager
def laboratory(folder: pathlib.Path) -> Iterator[Laboratory]:
    """Build faults.c, and start a server. Compiled programs stay in folder/compiled."""
    folder = folder.resolve()
    with Server(folder, harness.build(folder), folder / "compiled") as server:
        yield Laboratory(folder, server)


def kill_at_random(lab: Laboratory, case: Case, random: Random) -> Verdict:
    """Kill the run at a random time, up to three times, and let it end."""
    lab.fresh()
    for _ in range(random.choice((1, 1, 2, 3))):
        ended = lab.call(case, kill_after=random.uniform(0, 1.1 * case.seconds))
        if bad := complaint(ended):
            return bad
        if ended.status == 0:  # it was faster
            return judge(ended, harness.snapshot(lab.trial), case.expected)
    return _end(lab, case)


def kill_at_change(lab: Laboratory, case: Case, random: Random, harm: int = KILL) -> Verdict:
    """Kill the run at its n-th change, once or twice, and let it end; harm: KILL, TEAR, POWER."""
    lab.fresh()
    for _ in range(random.choice((1, 1, 2))):
        ended = lab.call(case, Faults(harm, random.randint(1, len(case.changes))))
        if bad := complaint(ended):
            return bad
        if ended.status == 0:  # it was faster
            return judge(ended, harness.snapshot(lab.trial), case.expected)
    return _end(lab, case)


def tear(lab: Laboratory, case: Case, random: Random) -> Verdict:
    """`kill_at_change`, in the middle of a write."""
    return kill_at_change(lab, case, random, TEAR)


def lose_power(lab: Laboratory, case: Case, random: Random) -> Verdict:
    """`kill_at_change`, and what was not synced to the disk is lost."""
    return kill_at_change(lab, case, random, POWER)


def fail(
    lab: Laboratory, case: Case, random: Random, harm: int = FAIL, error: str = "ENOSPC"
) -> Verdict:
    """Let changes fail from the n-th on, or the n-th alone; then the same command has to end."""
    lab.fresh()
    faults = Faults(harm, random.randint(1, len(case.changes)), ERRORS[error])
    ended = lab.call(case, faults)
    if bad := complaint(ended):
        return bad
    if ended.seconds > 2 * case.seconds + FAIL_SECONDS:
        return Verdict("hung", f"ended after {ended.seconds:.0f} s")
    if ended.status == 0:  # it came to the end before, or did without a file of tokens
        left, expected = harness.snapshot(lab.trial), case.expected
        needed = {name: x for name, x in expected.items() if name in left or "/tokens" not in name}
        return judge(ended, left, needed)
    if ended.status != 1:
        return Verdict("refused", f"status {ended.status}: {ended.errors}")
    return _end(lab, case)


def fail_once(lab: Laboratory, case: Case, random: Random, error: str = "ENOSPC") -> Verdict:
    """`fail`, the n-th change alone."""
    return fail(lab, case, random, FAIL_ONCE, error)


def damage(
    lab: Laboratory, case: Case, random: Random, stopped: pathlib.Path, kind: str
) -> tuple[Verdict, str]:
    """Damage a file of a kind in what a stopped run has left; then the same command goes on.

    Returns:
      also what was done to which file.
    """
    folder = lab.fresh(stopped)
    if kind == "compiled programs":
        shutil.copytree(lab.compiled, folder / "compiled")
        case = case._replace(command=command_with_programs)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if _kind_of(path.relative_to(folder).as_posix()) == kind]
    files = [path for path in files if path.stat().st_size] or files
    path, how = random.choice(files), random.choice(DAMAGES)
    _damage(path, how, random)
    name = path.relative_to(folder).as_posix()
    ended = lab.call(case)
    verdict = judge_damaged(ended, harness.snapshot(folder), case.expected, name)
    return verdict, f"{how} {name}"


def share_tokens(lab: Laboratory, case: Case, random: Random, other: Server) -> Verdict:
    """Two runs share a folder of tokens; one is killed while it writes there, and called again.

    Args:
      case: `command_with_shared_tokens`.
      other: a second server.
    """
    folder, limit = lab.fresh(), 4 * case.seconds + HANG_SECONDS
    second = harness.train(folder, "second", token_cache=folder / TOKENS)
    writes = sum(f"/{TOKENS}" in change for change in case.changes)
    lab.server.start(case.command(folder), folder, Faults())
    faults = Faults(random.choice((KILL, TEAR)), random.randint(1, writes))
    calls = [other.run(second, folder / TOKENS, faults, limit=limit), lab.server.wait(limit)]
    for ended in calls:
        if bad := complaint(ended):
            return bad
    ended = other.run(second, folder, limit=limit)
    expected = dict(case.expected)
    expected |= {re.sub("^run", "second", name): what for name, what in case.expected.items()}
    return judge(ended, harness.snapshot(folder), expected)


def command_with_shared_tokens(folder: pathlib.Path) -> list[str]:
    """The command of a run in folder/run with its tokens in folder/tokens."""
    return harness.train(folder, token_cache=folder / TOKENS)


def command_with_programs(folder: pathlib.Path) -> list[str]:
    """The command of a run in folder/run with its compiled programs in folder/compiled."""
    return harness.train(folder, compilation_cache=folder / "compiled")


def _end(lab: Laboratory, case: Case) -> Verdict:
    """Let the run in the trial's folder end, undisturbed."""
    return judge(lab.call(case), harness.snapshot(lab.trial), case.expected)


def _kind_of(name: str) -> str:
    return next(kind for kind, pattern in FILES.items() if re.search(pattern, name))


def _damage(path: pathlib.Path, how: str, random: Random) -> None:
    content = bytearray(path.read_bytes())
    if how == "delete" or not content:
        path.unlink()
        return
    if how == "flip":
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.unlink()  # it may have another name elsewhere
    path.write_bytes({"flip": content, "halve": content[: len(content) // 2], "empty": b""}[how])
