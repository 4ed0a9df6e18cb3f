"""What tests of storage write and read."""

from dpojax import storage


def names(folder):
    """The names in a folder, hidden ones too, sorted."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def content(folder):
    """The text of every file below a folder, by relative name."""
    local = storage.local_copy(folder)
    files = sorted(path for path in local.rglob("*") if path.is_file())
    return {path.relative_to(local).as_posix(): path.read_text() for path in files}


def fill(folder, **texts):
    for name, text in texts.items():
        storage.write_text(folder / name, text)


def write_and_fail(path):
    path.write_text("new")
    raise KeyError("in the body")
