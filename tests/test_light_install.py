"""`pip install dpojax` brings jax and numpy alone, and that is enough for losses and log-probs."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import dpojax
from dpojax.commands.entry import COMMANDS
from dpojax.extras import TRAIN_LIBRARIES

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WITHOUT_FLAX = "import sys; sys.modules['flax'] = None; "  # as if it were not installed
NO_NETWORK = re.compile("error sending request|dns error|Failed to fetch|client error")
TEST_REQUIREMENTS = ("pytest>=8.3,<10", "hypothesis>=6.100,<7")
NEEDED_BY_JAX = {"jaxlib", "ml-dtypes", "opt-einsum", "scipy"}
TESTS = (
    *(f"tests/losses/test_{name}.py" for name in ("golden_trl", "golden_others", "checks")),
    *("tests/losses/test_every_loss.py", "tests/losses/test_shards.py"),
    *("tests/test_sequence_logprobs.py", "tests/test_mesh_axes.py"),
)
# One case of each kind of mesh axis; of the laws of every loss the docstrings alone.
SELECTED = "golden or checks or docstrings or shards or sequence_logprobs or float32-several"


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


def uv(*words: object, **given) -> str:
    """What uv prints; the test is skipped where the registry cannot be reached."""
    command = [sys.executable, "-m", "uv", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, **given)
    if ended.returncode and NO_NETWORK.search(ended.stderr):
        pytest.skip(f"uv needs the network: {ended.stderr.strip().splitlines()[-1]}")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of this checkout, and the wheel that is made of it; of a copy, where it builds."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("dpojax", "configs", "docs", "scripts", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ROOT.iterdir():
        if name.is_file():
            shutil.copy(name, source)
    uv("build", "--quiet", f"--out-dir={out}", source)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_types_and_its_configs_and_no_tests(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dpojax").rglob("*.py")}
    configs = {f"dpojax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    beside = {name for name in names if ".dist-info/" not in name}
    assert beside == package | configs | {"dpojax/py.typed"}


class EmptyEnvironment:
    """A virtual environment that holds the wheel and what it asks for, and the sdist's files.

    Args:
      folder: where both lie.
      wheel, sdist: of the package.
      ages: uv's `--resolution`: the highest or the lowest versions of what is asked for.
    """

    def __init__(self, folder: pathlib.Path, wheel: pathlib.Path, sdist: pathlib.Path, ages: str):
        self.ages, self.python = f"--resolution={ages}", folder / "venv" / "bin" / "python"
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (self.files,) = folder.glob("dpojax-*")
        shutil.rmtree(self.files / "dpojax")  # the wheel's is the one that is tested
        # Nothing of the environment that these tests run in may help.
        hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTEST_ADDOPTS")
        self.environ = {key: value for key, value in os.environ.items() if key not in hidden}
        uv("venv", "--quiet", f"--python={sys.executable}", folder / "venv", env=self.environ)
        self.install(wheel, *PROJECT["dependencies"])

    def install(self, *requirements: object) -> None:
        """Add distributions; those that are there stay as they are."""
        words = "pip", "install", "--quiet", f"--python={self.python}", self.ages
        uv(*words, *requirements, env=self.environ)

    def names(self) -> set[str]:
        listed = uv("pip", "freeze", f"--python={self.python}", env=self.environ)
        return {name_of(line) for line in listed.splitlines()}

    def run(self, *words: str) -> str:
        command = [str(self.python), *words]
        given = dict(cwd=self.files, env=self.environ, capture_output=True, text=True)
        ended = subprocess.run(command, **given)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout


@pytest.fixture(scope="module")
def newest(built, tmp_path_factory):
    return EmptyEnvironment(tmp_path_factory.mktemp("newest"), *built, "highest")


@pytest.fixture(scope="module")
def oldest(built, tmp_path_factory):
    return EmptyEnvironment(tmp_path_factory.mktemp("oldest"), *built, "lowest-direct")


def run_tests_of_losses(environment: EmptyEnvironment) -> None:
    """Golden values, refused mistakes, docstrings, sequences, and each kind of mesh axis."""
    environment.install(*TEST_REQUIREMENTS)
    command = "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"
    told = environment.run(*command, "-m", "not slow and not long", "-k", SELECTED, *TESTS)
    assert int(re.search(r"(\d+) passed", told)[1]) > 100, told


@pytest.mark.slow
def test_the_wheel_alone_brings_jax_and_numpy_and_passes_tests_of_losses(newest):
    assert newest.names() == {"dpojax", "jax", "numpy"} | NEEDED_BY_JAX
    run_tests_of_losses(newest)


@pytest.mark.slow
def test_with_the_oldest_versions_that_are_allowed_tests_of_losses_pass(oldest):
    lowest = re.search(r">=([\d.]+)", PROJECT["dependencies"][0])[1]
    assert oldest.run("-c", "import jax; print(jax.__version__)").startswith(lowest)
    run_tests_of_losses(oldest)


@pytest.mark.long  # tests/test_docs.py runs the same programs in CI, where all is installed
def test_the_example_loops_of_the_pages_run_beside_the_wheel(newest):
    page = (newest.files / "docs" / "own_loop.md").read_text()
    sections = dict(re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```$", page, re.M | re.S))
    newest.install("optax")
    newest.run("-c", sections["Plain JAX, without logits"])
    newest.install("flax")
    for name in ("Flax NNX", "Flax Linen"):
        newest.run("-c", sections[name])
