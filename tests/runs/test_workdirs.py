"""Workdirs that nothing can be written to are refused before data are read."""

import os

import pytest

from dpojax.config.errors import ConfigError
from dpojax.runs.workdirs import require_writable
from dpojax.storage import as_path


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("/", "--workdir=/: the root of all files"),
        ("file", "file is a file; name a folder"),
        ("file/run", "file is a file; name a folder"),
        ("locked", "locked may not be written to"),
        ("locked/run/sub", "locked may not be written to"),
        ("x" * 300, "too long"),
    ],
)
def test_a_workdir_that_cannot_be_written_is_refused_with_its_name(
    tmp_path, monkeypatch, name, complaint
):
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    allowed = os.access  # a root user may write anywhere
    monkeypatch.setattr(
        os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode)
    )
    with pytest.raises(ConfigError, match=complaint) as refused:
        require_writable(as_path(tmp_path / name))
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "locked"]


@pytest.mark.parametrize("name", ["", "new", "new/deep/er", "Umlaut ä and a space"])
def test_a_workdir_that_can_be_made_is_not_made_yet(tmp_path, name):
    require_writable(as_path(tmp_path / name))
    assert not list(tmp_path.iterdir())
