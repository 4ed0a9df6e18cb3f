"""`pip install dpojax` brings jax and numpy alone, and that is enough for losses and log-probs."""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import dpojax
from dpojax.commands.entry import COMMANDS
from dpojax.extras import TRAIN_LIBRARIES

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WITHOUT_FLAX = "import sys; sys.modules['flax'] = None; "  # as if it were not installed
NO_NETWORK = re.compile(
    "NewConnectionError|ConnectTimeout|name resolution|No matching distribution|Could not find a"
)


def name_of(requirement: str) -> str:
    """The normalised name of the distribution that a requirement names."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_the_extra_is_what_the_sentence_of_a_missing_library_asks_for():
    in_extra = {name_of(line) for line in PROJECT["optional-dependencies"]["train"]} - {"jax"}
    of_module = importlib.metadata.packages_distributions()
    for library in TRAIN_LIBRARIES:
        assert in_extra & set(map(name_of, of_module[library])), library
    assert len(TRAIN_LIBRARIES) == len(in_extra)


def test_a_package_of_the_extra_says_what_to_install_and_the_light_ones_do_not():
    code = f"""
{WITHOUT_FLAX}
import importlib, dpojax.losses, dpojax.logprobs, dpojax.head, dpojax.theory, dpojax.rl
for name in ("dpojax.training", "dpojax.models.decoder", "dpojax.data"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [
        f"{name} needs pip install 'dpojax[train]' (flax is not installed)"
        for name in ("dpojax.training", "dpojax.models", "dpojax.data")
    ]


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["train"], 1)])
def test_without_the_extra_the_command_lists_and_refuses_its_commands(words, status):
    code = f"{WITHOUT_FLAX}from dpojax.commands.entry import main; main()"
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert ended.returncode == status
    if status:
        sentence = "dpojax train needs pip install 'dpojax[train]' (flax is not installed)\n"
        assert (ended.stdout, ended.stderr) == ("", sentence)
    else:
        assert all(name in ended.stdout for name in COMMANDS)


def test_the_changelog_and_the_citation_know_the_version():
    assert dpojax.__version__ in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {dpojax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def pip(*words: object) -> str:
    """What pip prints; the test is skipped where the registry cannot be reached."""
    command = [sys.executable, "-m", "pip", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode and NO_NETWORK.search(ended.stderr):
        pytest.skip(f"pip needs the network: {ended.stderr.strip().splitlines()[-1]}")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy: setuptools leaves files where it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("dpojax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--quiet", "--no-deps", f"--wheel-dir={out}", source)
    (file,) = out.glob("*.whl")
    return file


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_types_and_its_configs_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dpojax").rglob("*.py")}
    configs = {f"dpojax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    beside = {name for name in names if ".dist-info/" not in name}
    assert beside == package | configs | {"dpojax/py.typed"}
