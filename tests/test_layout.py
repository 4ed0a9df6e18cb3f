"""Imports flow down one list, and files stay small."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
ORDER = [
    {"losses", "head", "logprobs", "theory", "rl"},
    {"sharding"},
    {"models"},
    {"data"},
    {"sampling"},
    {"training"},
    {"methods"},
    {"evaluation"},
    {"launch"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
FILES = sorted((ROOT / "dpojax").rglob("*.py"))


def imported(path: pathlib.Path):
    """The modules or packages right below dpojax that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "dpojax":
            names = [f"dpojax.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("dpojax."))


def test_imports_flow_down():
    wrong = []
    for path in FILES:
        own = path.relative_to(ROOT / "dpojax").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        wrong += [(str(path), name) for name in imported(path) if RANK[name] > RANK[own]]
    assert not wrong


def test_losses_and_log_probs_import_nothing_of_dpojax_but_the_head():
    package = ROOT / "dpojax"
    alone = [package / name for name in ("head.py", "logprobs.py", "theory.py", "rl.py")]
    for path in [*alone, *package.glob("losses/*.py")]:
        own = {"losses"} if path.parent.name == "losses" else set()
        own = {"head"} if path.name == "logprobs.py" else own
        assert set(imported(path)) <= own, path


def test_methods_never_import_each_other():
    for path in (ROOT / "dpojax" / "methods").glob("*.py"):
        assert "methods" not in list(imported(path)), path


def test_files_and_functions_stay_small():
    for path in [*FILES, *(ROOT / "scripts").glob("*.py")]:
        text = path.read_text()
        assert len(text.splitlines()) <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


def test_a_run_starts_without_libraries_that_it_does_not_need_yet():
    slow = ("torch", "datasets", "matplotlib", "scipy.stats", "tensorboardX")
    code = f"import sys, dpojax.runs.run; print(*(x for x in {slow} if x in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []
