"""Folders on a disk and on a bucket, and writes that fail."""

import os

import pytest

from dpojax import storage
from dpojax.storage import paths
from tests.gcs import bucket, gcs_emulator  # noqa: F401 (fixtures)


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path, monkeypatch):
    """An empty folder, once on a disk and once on a bucket."""
    monkeypatch.setenv("DPOJAX_MIRROR", str(tmp_path / "mirror"))
    if request.param == "disk":
        return storage.as_path(tmp_path / "folder")
    return storage.as_path(request.getfixturevalue("bucket")) / "folder"


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("DPOJAX_MIRROR", str(tmp_path / "mirror"))
    return tmp_path / "mirror"


@pytest.fixture
def failing_write(folder, monkeypatch):
    """A function that makes the last step of every write fail."""

    def fail(*_, **__):
        raise OSError("no space left")

    def start():
        if storage.is_local(folder):
            monkeypatch.setattr(os, "replace", fail)
        else:
            for method in ("pipe_file", "put_file", "cp_file"):
                monkeypatch.setattr(paths.filesystem(folder), method, fail)

    return start
