"""Config files: Python with a function get_config(), or JSON as a run writes it."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import pathlib
import traceback
import types
from collections.abc import Iterator

from ml_collections import ConfigDict

from dpojax.config.errors import ConfigError


def read_config(path: str) -> ConfigDict:
    """The config of a file, locked.

    Args:
      path: FILE.py or FILE.py:VARIANT, whose get_config(VARIANT) makes it; or a config.json.

    Raises:
      ConfigError: naming the file, and the line where its code fails.
    """
    from dpojax.config.saved import config_from_json

    if path.endswith(".json"):
        from dpojax import storage

        return config_from_json(
            storage.read_json(storage.as_path(path, "--config")), where=path
        ).lock()
    file, _, variant = split_variant(path)
    module = load_config_file(path)
    if not callable(get_config := getattr(module, "get_config", None)):
        raise ConfigError(f"{file}: has no function get_config()")
    with failing_at_its_line(file):
        takes = inspect.signature(get_config).parameters
        if variant and not takes:
            raise ConfigError(f"--config={path}: {file} has no variants; its get_config takes none")
        config = get_config(*([variant] if variant else []))
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{file}: get_config() returned {_described(config)}, not a ConfigDict; it begins with "
            "default_config() and ends with `return config`"
        )
    _require_finite(config, file)
    return config.lock()


def load_config_file(path: str) -> types.ModuleType:
    """The module of a config file, for its functions besides get_config(); FILE:VARIANT is FILE.

    Raises:
      ConfigError: naming the file, and the line where its code fails.
    """
    file = split_variant(path)[0]
    if not pathlib.Path(file).is_file():
        what = "a folder, not a file" if pathlib.Path(file).is_dir() else "there is no such file"
        if not pathlib.Path(file).suffix:
            what += f"; dpojax has the configs {', '.join(shipped_configs())}"
        raise ConfigError(f"--config={path}: {what}")
    with failing_at_its_line(file):
        spec = importlib.util.spec_from_file_location("config_file", file)
        if spec is None:
            raise ConfigError(f"--config={path}: a config is a Python file (.py) or JSON (.json)")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def shipped_configs() -> dict[str, pathlib.Path]:
    """The configs that come with dpojax, by name: in the package, or beside it in a checkout."""
    package = pathlib.Path(__file__).parents[1]
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {file.stem: file for file in sorted(folder.glob("[a-z]*.py"))}


def with_shipped(path: str) -> str:
    """FILE.py or FILE.py:VARIANT of a config that comes with dpojax, for NAME or NAME:VARIANT.

    Any other path stays as it is.
    """
    name, colon, variant = path.partition(":")
    file = shipped_configs().get(name) if name.isidentifier() else None
    return f"{file}{colon}{variant}" if file else path


def shipped_name(path: str) -> str:
    """NAME or NAME:VARIANT of a config that comes with dpojax; any other path stays as it is.

    On another machine dpojax may be installed in another folder, where the name still says it.
    """
    file, colon, variant = split_variant(path)
    resolved = pathlib.Path(file).resolve()
    names = [name for name, shipped in shipped_configs().items() if shipped.resolve() == resolved]
    return f"{names[0]}{colon}{variant}" if names else path


def split_variant(path: str) -> tuple[str, str, str]:
    """FILE, ":" and VARIANT; the last two are empty where there is none."""
    file, extension, variant = path.partition(".py:")
    return (file + ".py", ":", variant) if extension else (path, "", "")


@contextlib.contextmanager
def failing_at_its_line(file: str) -> Iterator[None]:
    """Raise what the code of a config file raises as a ConfigError that begins with FILE:LINE."""
    try:
        yield
    except ConfigError:
        raise
    except SyntaxError as error:
        where = f"{error.filename or file}:{error.lineno or 1}"
        raise ConfigError(f"{where}: this is not Python: {error.msg}") from error
    except (Exception, SystemExit) as error:
        full = str(pathlib.Path(file).resolve())
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if str(pathlib.Path(f.filename).resolve()) == full]
        where = f"{file}:{lines[-1]}" if lines else file
        text = " ".join(str(error.args[0] if error.args else error).split())
        raise ConfigError(f"{where}: {type(error).__name__}: {text}") from error


def _require_finite(config: ConfigDict, file: str, prefix: str = "config") -> None:
    """Raise ConfigError for a number that is NaN or infinite."""
    for name in config:
        value = config.get(name)
        if isinstance(value, ConfigDict):
            _require_finite(value, file, f"{prefix}.{name}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{file}: {prefix}.{name} = {value}: a finite number is expected")


def _described(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
