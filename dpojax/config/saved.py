"""The config of a run in its workdir: written once, compared by every call that goes on.

config.json holds the config. contents.json holds a hash of everything that the config names by a
path, so that a run notices when a file behind a path has changed.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from importlib import metadata

import jax
from ml_collections import ConfigDict

from dpojax import storage
from dpojax.config.contents import Content, changed_contents, moved_keys
from dpojax.config.defaults import default_config
from dpojax.config.errors import ConfigError
from dpojax.config.resolved import ResolvedRun, as_json, flat

CONFIG, CONTENTS, FINISHED = "config.json", "contents.json", "finished.json"
# What to do about a damaged file.
REWRITTEN = "delete it: the command that began the run writes it again"
HASHED_AGAIN = (
    "delete it: the command that began the run writes it again, from the files as they are now"
)
# A resumed run may change these keys, and its result stays the same to the bit.
SAME_RESULT = ("log_every", "evaluate_every", "checkpoint_every", "max_checkpoints", "trackers")
SAME_RESULT += ("model.remat", "check_memory", "profile", "token_cache", "compilation_cache")
SAME_RESULT += ("num_proc", "hang_minutes", "preference.reference.cache", "plan")
SAME_RESULT += ("exit_code_when_stopped", "numerics", "metric_names")
# And these, which change the order of sums: its result stays the same to rounding.
SAME_TO_ROUNDING = ("distributed", "mesh", "micro_rows", "max_buckets", "row_length", "max_logits")
SAME_TO_ROUNDING += ("model.attention", "sweep")
EARLY_STOPS = ("keep_best", "stop_at")  # of a stage: what its evaluations decide


def compare_config(run: ResolvedRun) -> None:
    """Compare a run with the one that its workdir holds, if it holds one.

    Of a finished run only the config is compared: its files need not be there any more.

    Raises:
      ConfigError: the workdir belongs to a run of another config, or a file behind a path has
        changed since it began; the message names the keys, or the file and both hashes.
    """
    path, contents = run.workdir / CONFIG, {}
    same: set[str] = set()
    if not (run.workdir / FINISHED).exists():
        contents = _read_contents(run.workdir)
        same = moved_keys(contents, run.contents) if contents else set()
    before = storage.read_json(path, REWRITTEN, fields={}) if path.exists() else None
    if before is not None and (
        changed := config_differences(before, as_json(run.config), ignore=same)
    ):
        raise ConfigError(
            f"{run.workdir} holds a run of another config; give this one its own --workdir, or "
            "take back these changes:\n" + "\n".join(changed)
        )
    if contents:
        require_same_contents(run.workdir, contents, run.contents)


def write_or_compare_config(run: ResolvedRun) -> None:
    """`compare_config`, then the first process writes config.json and contents.json.

    The caller holds the lock of the workdir.
    """
    compare_config(run)
    if jax.process_index() == 0:
        version = _begun_by(run.workdir) or code_version()
        files = {"version": version, "files": run.contents}
        storage.write_json(run.workdir / CONTENTS, files)
        storage.write_json(run.workdir / CONFIG, as_json(run.config))


def config_differences(before: dict, now: dict, *, ignore: Sequence[str] | set = ()) -> list[str]:
    """What a resumed run must not change, a line each, between two configs as JSON has them.

    Args:
      ignore: further dotted keys that may differ.
    """
    before, now = flat(before), flat(now)
    free = {*SAME_RESULT, *SAME_TO_ROUNDING, *ignore}
    decisive = [f"{name}.{key}" for name in now.get("stages", ()) for key in EARLY_STOPS]
    if any(now.get(key) for key in decisive):
        free -= {"evaluate_every"}  # evaluations decide which checkpoint is the result
    free = tuple(f"{key}." for key in free)
    return [
        f"  {key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not f"{key}.".startswith(free)
    ]


def read_run_config(run: storage.Path) -> ConfigDict:
    """The config that a run was started with, with whatever mesh and attention this machine has.

    Raises:
      ConfigError: there is none, or it is of another version of this library.
    """
    path = run / CONFIG
    if not path.is_file():
        raise ConfigError(f"{path} is not there: {run} is not the workdir of a run")
    config = config_from_json(storage.read_json(path, REWRITTEN, fields={}), where=str(path))
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    config.model.attention = "auto"
    return config


def config_from_json(values: dict, *, where: str) -> ConfigDict:
    """The config that `as_json` gave; `where` names it in errors.

    Raises:
      ConfigError: it has a key, or a value, that this version of the library does not know.
    """
    config = default_config()
    try:
        config.update(values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: not a config of this version ({error})") from error
    return config


def code_version() -> dict[str, str]:
    """The version of dpojax and a hash of its source files."""
    return {"dpojax": metadata.version("dpojax"), "code": _code_hash()}


def code_changed(workdir: storage.Path) -> str:
    """A sentence if another version of the code began the run in a workdir; else ""."""
    before, now = _begun_by(workdir), code_version()
    if not before or before == now:
        return ""
    return (
        f"{workdir} was begun by dpojax {before.get('dpojax')} with other code (hash "
        f"{before.get('code')}, now {now['dpojax']} and {now['code']}): the result may differ from "
        "that of an undisturbed run"
    )


@functools.cache
def _code_hash() -> str:
    package = pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def require_same_contents(
    workdir: storage.Path, before: Mapping[str, Sequence[str]], now: Mapping[str, Content]
) -> None:
    """Raise ConfigError for files that have changed; it names each, with both hashes.

    Args:
      before: of the keys that were there, (path, hash), as JSON has them.
    """
    before = {key: Content(*pair) for key, pair in before.items()}
    changed = changed_contents(before, now)
    if not changed:
        return
    lines = []
    for key, (then, content) in changed.items():
        hashes = f"sha256 {then.hash[:16]}, now {content.hash[:16]}"
        lines.append(f"  config.{key} ({content.path}): {hashes}")
        if differences := then.differences(content):
            lines.append(f"    {differences}")
    raise ConfigError(
        f"{workdir} began with other files, and going on would mix both:\n"
        + "\n".join(lines)
        + "\nPut the files back as they were, or give this run its own --workdir."
    )


def _read_contents(workdir: storage.Path) -> dict[str, Content]:
    path = workdir / CONTENTS
    if not path.is_file():
        return {}
    files = storage.read_json(path, HASHED_AGAIN, fields={"files": dict})["files"]
    with storage.damage_named(path, HASHED_AGAIN):
        contents = {key: Content(*content) for key, content in files.items()}
        for content in contents.values():
            if not all(map(isinstance, content, (str, str, dict))):
                raise TypeError("not paths and hashes")
    return contents


def _begun_by(workdir: storage.Path) -> dict[str, str]:
    """The `code_version` that began the run in a workdir; empty where nothing says."""
    path = workdir / CONTENTS
    if not path.is_file():
        return {}
    return storage.read_json(path, HASHED_AGAIN, fields={"version": dict})["version"]
