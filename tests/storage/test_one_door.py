"""Files are opened and written in `dpojax.storage` only."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]


# File: the calls that are right there, and why.
ALLOWED = {
    "certifying/worker.py": {"np.savez"},  # to the file of `storage.replacing`
    "frontier/reference_samples.py": {"open", "np.savez"},  # to the file of `storage.replacing`
    "data/examples.py": {"open"},  # in the file that `storage.replacing` gives it
    "models/safetensors_io.py": {"open"},  # reads a header; writes below an unfinished folder
    "data/text_files.py": {"open"},  # reads with limits
    "stages/token_cache.py": {"os.replace"},  # into the file of `storage.replacing`
    "data/worker.py": {"open"},  # the memory that the kernel counts
    "runs/base_files.py": {"shutil.copyfile"},  # below the folder of `storage.replacing_folder`
    "launching/launch.py": {"shutil.which"},  # looks for a command, no file of a run
    "commands/inspect_data.py": {"tempfile.TemporaryDirectory"},  # nothing of it is kept
    "commands/sample.py": {"shutil.get_terminal_size"},  # of no file
    "tables.py": {"shutil.get_terminal_size"},  # of no file
    "training/reference.py": {"np.save"},  # to the file that `storage.replacing` gives it
}
CALLS = {"os.replace", "os.rename", "os.link", "np.save", "np.savez", "numpy.save"}
ANY_METHOD = {"open", "write_text", "write_bytes"}
MODULES = {"shutil", "tempfile"}


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def direct_calls(path):
    """The calls of a file that write, open or move files past storage."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        module, _, name = called.rpartition(".")
        through_storage = module == "storage" or module.endswith("ipc")  # of pyarrow
        if called in CALLS or module in MODULES:
            yield called
        elif name == "open" and module and node.args and not is_text(node.args[0]):
            continue  # a stage or a reward is opened, and no file
        elif name in ANY_METHOD and not through_storage:
            yield name


def test_files_are_opened_and_written_through_storage_only():
    wrong = {}
    for path in sorted((ROOT / "dpojax").rglob("*.py")):
        relative = path.relative_to(ROOT / "dpojax")
        if relative.parts[0] == "storage":
            continue
        if calls := set(direct_calls(path)) - ALLOWED.get(relative.as_posix(), set()):
            wrong[relative.as_posix()] = sorted(calls)
    assert not wrong


def test_commands_name_paths_through_storage_only():
    for path in sorted((ROOT / "dpojax" / "commands").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names}.isdisjoint({"glob", "pathlib"}), path


def test_every_exception_is_still_needed():
    for name, calls in ALLOWED.items():
        assert calls <= set(direct_calls(ROOT / "dpojax" / name)), name


def test_storage_imports_nothing_else_of_dpojax_but_the_watchdog():
    for path in (ROOT / "dpojax" / "storage").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpojax"):
                assert node.module.startswith(("dpojax.storage", "dpojax.watchdog")), path
