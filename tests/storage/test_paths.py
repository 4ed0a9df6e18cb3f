"""Laws of paths: one spelling for a disk and for a bucket."""

import pathlib

import pytest

from dpojax import storage
from dpojax.storage import paths

from .folders import fill


def test_a_local_path_is_absolute_with_the_home_folder_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert str(storage.as_path("~/run")) == str(tmp_path / "run")
    assert str(storage.as_path("a/../run")) == str(tmp_path / "run")
    assert str(storage.as_path(pathlib.Path("run"))) == str(tmp_path / "run")
    assert storage.is_local(storage.as_path("run"))


def test_a_bucket_stays_as_it_is():
    pytest.importorskip("gcsfs", reason="needs gcsfs")
    path = storage.as_path("gs://bucket/run/")
    assert str(path) == "gs://bucket/run"
    assert str(path / "a") == "gs://bucket/run/a"
    assert not storage.is_local(path)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "--workdir is empty: name a folder"),
        ("  ", "--workdir is empty"),
        ("gs:/bucket/run", "a bucket begins with gs://"),
        ("gs://", "no bucket is named"),
        ("~nobody_of_this_name/run", "there is no user nobody_of_this_name; write ./~nobody"),
        ("run\nfolder", "has a control character"),
        ("run\0", "has a control character"),
        ("ftp://host/run", "ftp:// is not supported"),
    ],
)
def test_a_name_that_is_no_path_is_refused_with_its_option(name, complaint):
    with pytest.raises(ValueError, match="--workdir") as error:
        storage.as_path(name, "--workdir")
    assert complaint in str(error.value)


def test_a_bucket_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs gcsfs; pip install 'dpojax\[gcs\]'"):
        storage.as_path("gs://bucket/run")


def test_patterns_match_on_a_disk_and_on_a_bucket_alike(folder):
    fill(folder, **{"a.json": "1", "b.json": "2", "c/d.json": "3", "e.txt": "4"})
    assert storage.matches(folder / "*.json") == [folder / "a.json", folder / "b.json"]
    assert folder / "c/d.json" in storage.matches(folder / "**/*.json")
