"""Type checkers accept every example of a docstring: what an author writes passes theirs, too."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import json
import pathlib
import pkgutil
import subprocess
import sys

import pytest

from dpojax import logprobs, losses, rl, theory

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parents[1]
CHECKERS = {
    "pyright": ["pyright", "--project", "pyrightconfig.json", "--pythonpath", sys.executable],
    "mypy": ["mypy", "--follow-imports=silent", "--python-executable", sys.executable, "."],
}


def modules():
    """What an author's code imports."""
    parts = [
        importlib.import_module(f"{package.__name__}.{part.name}")
        for package in (losses, logprobs)
        for part in pkgutil.iter_modules(package.__path__)
    ]
    return [losses, logprobs, rl, theory, *parts]


def imports(module, code):
    """The lines that import what an example finds in its module."""
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    found = sorted(used & vars(module).keys() - {"jax", "jnp"})
    lines = [f"from {module.__name__} import {name}\n" for name in found]
    return "import jax\nimport jax.numpy as jnp\n" + "".join(lines)


def write_examples(folder):
    """A file for the examples of each docstring, with the names that they have there."""
    names = []
    for module in modules():
        here = [x for x in vars(module).values() if getattr(x, "__module__", "") == module.__name__]
        for documented in (module, *(inspect.unwrap(x) for x in here if callable(x))):
            examples = doctest.DocTestParser().get_examples(documented.__doc__ or "")
            # An example that shows an error may be one that a checker refuses as well.
            lines = [one.source for one in examples if not one.exc_msg]
            if lines:
                name = f"{module.__name__}_{documented.__name__}".replace(".", "_")
                (folder / f"{name}.py").write_text(imports(module, "".join(lines)) + "".join(lines))
                names.append(name)
    return names


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    assert len(write_examples(folder)) > 60
    (folder / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    return folder


def check(checker, folder):
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"needs the package {checker}")
    command = [sys.executable, "-m", *CHECKERS[checker]]
    environment = {"MYPYPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("checker", CHECKERS)
def test_every_example_has_the_types_that_it_claims(checker, examples):
    ended = check(checker, examples)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_number_where_a_pair_belongs_is_an_error_of_types(checker, tmp_path):
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    wrong = "from dpojax.losses import dpo\n\ndpo(-12.0, -14.0, beta=0.1)\n"
    (tmp_path / "wrong.py").write_text(wrong)
    ended = check(checker, tmp_path)
    assert ended.returncode == 1
    assert "Pair" in ended.stdout
