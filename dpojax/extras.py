"""What `pip install dpojax` leaves out, and the sentence for whoever needs it.

The losses, log-probs, closed forms and returns need jax and numpy alone. All else of dpojax needs
the extra `train`.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys

LIGHT = (
    *("losses", "head", "logprobs", "theory", "rl", "mesh_axes", "extras"),
    *("commands", "display", "stopping", "watchdog"),  # dpojax --help, which needs Python alone
)
# The packages that the extra `train` of pyproject.toml installs, as they are imported.
TRAIN_LIBRARIES = (
    "flax",
    "optax",
    "orbax",
    "google_crc32c",
    "grain",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "datasets",
    "ml_collections",
    "absl",
    "etils",
    "fsspec",
    "scipy",
    "pyarrow",
    "yaml",
    "jinja2",
    "matplotlib",
    "tensorboardX",
)


@functools.cache
def missing_library() -> str:
    """The first library of the extra `train` that is not installed; "" if all are there."""
    absent = (name for name in TRAIN_LIBRARIES if importlib.util.find_spec(name) is None)
    return next(absent, "")


def needs_train(what: str) -> str:
    """Says that `what` needs the extra `train`; "" if it is installed."""
    if not (library := missing_library()):
        return ""
    return f"{what} needs pip install 'dpojax[train]' ({library} is not installed)"


class _TrainingPackages(importlib.abc.MetaPathFinder):
    """Refuses to import a package of dpojax whose libraries are not there."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, rest = fullname.partition(".")
        if package == "dpojax" and rest and rest.partition(".")[0] not in LIGHT:
            raise ModuleNotFoundError(needs_train(fullname), name=fullname)
        return None  # somebody else finds it


def refuse_training_without_its_libraries() -> None:
    """Make `import dpojax.training` and the like say what to install, where it would fail."""
    if missing_library():
        sys.meta_path.insert(0, _TrainingPackages())
