"""Strict tests: eight CPU devices, full-precision products, no silent broadcasting."""

import atexit
import gc
import os
import pathlib
import shutil
import tempfile

from . import QUICK_COMPILES

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK_COMPILES}"
)
os.environ["HF_HUB_OFFLINE"] = "1"
# What one process compiled serves all of this session, those that tests start among them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dpojax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import pytest
from hypothesis import settings

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("dpojax", deadline=None, derandomize=True)
settings.load_profile("dpojax")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of real data and golden values that stands beside a developer's checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (real data and golden values), which is not here")
    return SHARED


def pytest_collection_modifyitems(items):
    """Files with long tests first, so that no process is left with them when the others end."""
    long = {"runs", "jobs", "test_slurm.py", "test_light_install.py", "test_notebooks.py"}
    items.sort(key=lambda item: long.isdisjoint({item.path.name, item.path.parent.name}))


def pytest_collection_finish(session):
    """Tracing makes many objects: what was imported is not searched for garbage again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_sessionfinish(session, exitstatus):
    """With DPOJAX_NO_SKIPS (as in .ci/run) a skipped test fails the session."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # one of several processes, whose reports go to the first
        return
    skipped = reporter.stats.get("skipped", [])
    if os.environ.get("DPOJAX_NO_SKIPS") and skipped and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line(f"{len(skipped)} tests were skipped where none may be", red=True)
