"""Imports flow down one list, and files, functions and classes stay small."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dpojax"
ORDER = [
    {"tables", "intervals", "chips", "storage", "stopping", "peers", "watchdog", "display"}
    | {"mesh_axes", "tpu_flags", "extras"},
    {"losses", "head", "logprobs", "theory", "rl"},
    {"sharding"},
    {"models"},
    {"data"},
    {"sampling"},
    {"training"},
    {"methods"},
    {"evaluation"},
    {"config"},
    {"jobs"},
    {"stages"},
    {"runs"},
    {"plans"},
    {"planning", "certifying"},
    {"sweeps"},
    {"frontier", "recipes", "launching"},
    {"commands"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))
ALONE = {  # folders whose rooms do not know each other, and who may know all of them
    "methods": ("sft", "classifier", "reward", "preference", "ppo"),
    "stages": ("sft", "classifier", "reward", "preference", "ppo"),
}
MAY_KNOW_ALL = {"stages/registry.py"}
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_CLASS = 500, 60, 200


@functools.cache
def imported(path: pathlib.Path) -> set[str]:
    """What a file imports of dpojax, dotted and without the leading `dpojax.`.

    `from dpojax.stages.stage import Stage` is `stages.stage.Stage`. Imports of types alone count as
    well.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("dpojax.") for name in names if name.startswith("dpojax.")}


def room(path: pathlib.Path) -> str:
    """`stages/sft.py`."""
    return path.relative_to(PACKAGE).as_posix()


def top(name: str) -> str:
    return name.split(".")[0].split("/")[0].removesuffix(".py")


def test_every_room_has_its_place_in_the_list():
    assert {top(room(path)) for path in FILES} - {"__init__"} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=room)
def test_imports_flow_down(path):
    if room(path) == "__init__.py":
        return
    above = {name for name in imported(path) if RANK[top(name)] > RANK[top(room(path))]}
    assert not above


def test_no_files_import_each_other_in_a_circle():
    by_name = {room(path).removesuffix(".py").replace("/", "."): path for path in FILES}
    files_of = {}
    for name, path in by_name.items():
        files_of[name] = {
            target
            for target in by_name
            if target != name and any(f"{x}.".startswith(f"{target}.") for x in imported(path))
        }
    left = dict(files_of)
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:  # imports nothing that is left: it is part of no circle
            del left[name]
    assert not left


def test_losses_and_log_probs_import_nothing_of_dpojax_but_the_head_and_the_kinds_of_axes():
    """They need jax and numpy alone, and are installed without the rest."""
    files = [PACKAGE / name for name in ("mesh_axes.py", "head.py", "theory.py", "rl.py")]
    for path in [*files, *PACKAGE.glob("losses/**/*.py"), *PACKAGE.glob("logprobs/**/*.py")]:
        allowed = {"mesh_axes", top(room(path))} | ({"head"} if "logprobs" in room(path) else set())
        assert {top(name) for name in imported(path)} <= allowed, path


@pytest.mark.parametrize("folder", ALONE)
def test_rooms_of_one_kind_do_not_import_each_other(folder):
    """Sub-packages included: a method or a stage is added without touching another."""
    dotted = folder.replace("/", ".")
    for path in (PACKAGE / folder).rglob("*.py"):
        if room(path) in MAY_KNOW_ALL:
            continue
        own = path.relative_to(PACKAGE / folder).parts[0].removesuffix(".py")
        for name in imported(path):
            if not name.startswith(f"{dotted}."):
                continue
            other = name.removeprefix(f"{dotted}.").split(".")[0]
            assert other == own or other not in ALONE[folder], f"{room(path)} imports {name}"


def test_only_the_registry_names_the_stages():
    """Whatever runs stages asks the registry, so that a new stage is added in one place."""
    for path in FILES:
        if path.parent.name == "stages":
            continue
        stages = {f"stages.{name}" for name in ALONE["stages"]}
        for name in imported(path):
            assert ".".join(name.split(".")[:2]) not in stages, f"{room(path)} imports {name}"


def test_files_functions_and_classes_stay_small():
    for path in [*FILES, *(ROOT / "scripts").glob("*.py")]:
        text = path.read_text()
        assert len(text.splitlines()) <= LONGEST_FILE, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                lines = node.end_lineno - node.lineno + 1
                limit = LONGEST_CLASS if isinstance(node, ast.ClassDef) else LONGEST_FUNCTION
                assert lines <= limit, f"{path}: {node.name} has {lines} lines"


def test_a_run_starts_without_libraries_that_it_does_not_need_yet():
    slow = ("torch", "datasets", "matplotlib", "scipy.stats", "tensorboardX", "gcsfs", "s3fs")
    code = f"import sys, dpojax.runs.run; print(*(x for x in {slow} if x in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
