"""A damaged checkpoint is noticed, whatever its damage is, and the newest whole one is used."""

import errno
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.storage import checksums
from dpojax.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    best,
    load_params,
    load_tree,
    save_tree,
)


def state(step):
    """A state whose every bit depends on its step."""
    one, two = jax.random.split(jax.random.key(step))
    params = {"kernel": jax.random.normal(one, (64, 32)), "scale": jnp.bfloat16(step) / 3}
    return {"params": params, "step": jnp.int32(step), "key": two}


ABSTRACT = jax.eval_shape(lambda: state(0))


def bits(tree):
    data = lambda x: jax.random.key_data(x) if x.dtype == ABSTRACT["key"].dtype else x
    return [np.asarray(data(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints of the steps 1 to 3; the first is the best one."""
    folder = tmp_path_factory.mktemp("written")
    with Checkpoints(folder, max_checkpoints=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), metadata={"of": step}, score=1 / step)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def reopen(folder):
    """The step that a run would go on from, what it reads, and the best step."""
    with Checkpoints(folder, max_checkpoints=2) as checkpoints:
        restored, metadata = checkpoints.restore(ABSTRACT)
        step = checkpoints.latest
        assert metadata == {"of": step}
        assert bits(restored) == bits(state(step))
        return step, checkpoints.best.step


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_each_file_of_a_checkpoint_that_is_missing_is_noticed(folder, caplog):
    """All files but one: what a removal that was killed leaves."""
    for index in range(len(files_of(folder / "3"))):
        copy = folder.parent / f"copy {index}"
        shutil.copytree(folder, copy)
        lost = files_of(copy / "3")[index]
        lost.unlink()
        with pytest.raises(CheckpointError, match=r"3 is damaged.*use one of the steps \[1, 2\]"):
            load_params(copy, ABSTRACT["params"])
        caplog.clear()
        assert reopen(copy) == (2, 1)
        (record,) = caplog.records
        assert f"{copy}/3 is damaged" in record.message
        assert lost.name in record.message
        assert names(copy) == ["1", "2", "3.damaged"]
        shutil.rmtree(copy)


def flip(path, rng):
    """Flip one random bit of a file; returns what undoes it."""
    content = bytearray(path.read_bytes())
    if not content:
        return None
    index = int(rng.integers(len(content)))
    content[index] ^= 1 << int(rng.integers(8))
    before = path.read_bytes()
    path.write_bytes(content)
    checksums._checksums.clear()  # two writes within a tick of the clock have the same time
    return lambda: path.write_bytes(before)


def test_one_flipped_bit_anywhere_is_noticed_or_changes_nothing(folder):
    rng, noticed, tried = np.random.default_rng(0), 0, 0
    for path in files_of(folder / "3"):
        for _ in range(5):
            if (undo := flip(path, rng)) is None:
                continue
            tried += 1
            try:
                assert bits(load_params(folder, ABSTRACT["params"])) == bits(state(3)["params"])
            except CheckpointError as error:
                noticed += "3 is damaged" in str(error)
            undo()
    assert noticed == tried > 30


def test_a_flipped_bit_in_the_best_checkpoint_gives_the_next_best(folder, caplog):
    flip(max(files_of(folder / "1"), key=os.path.getsize), np.random.default_rng(1))
    assert best(folder) == (1.0, 1)  # which nobody has read yet
    assert reopen(folder) == (3, 2)
    assert "1 is damaged" in caplog.text
    assert best(folder) == (0.5, 2)
    assert "the damaged one is removed" in caplog.text  # a newer one is complete
    assert names(folder) == ["2", "3"]


def test_the_next_save_of_a_damaged_step_succeeds_and_removes_what_was_set_aside(folder):
    (folder / "3" / "_CHECKPOINT_METADATA").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    with Checkpoints(folder, max_checkpoints=2) as checkpoints:
        assert checkpoints.latest == 2
        assert names(folder) == ["1", "2", "3.damaged", "notes.txt"]
        assert checkpoints.save(3, state(3), metadata={"of": 3}, score=0.1)
    assert names(folder) == ["1", "2", "3", "notes.txt"]
    assert reopen(folder) == (3, 1)


def empty_99(folder):
    (folder / "99").mkdir()


def empty_folders_in_99(folder):
    (folder / "99" / "state" / "d").mkdir(parents=True)


def file_99(folder):
    (folder / "99").write_text("a file")


def half_a_save(folder):
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp-17")


def half_a_save_of_ours(folder):
    shutil.copytree(folder / "3", folder / ".4.unfinished" / "4")


def half_a_removal(folder):
    shutil.copytree(folder / "3" / "state", folder / ".1.0123abcd.unfinished" / "state")


def stray_files(folder):
    for path in (folder / "x", folder / "3" / "x", folder / "3" / "state" / "x", folder / "0099"):
        path.write_bytes(b"\xff")
    (folder / "3" / "metrics").mkdir()


@pytest.mark.parametrize(
    "leave",
    [
        empty_99,
        empty_folders_in_99,
        file_99,
        half_a_save,
        half_a_save_of_ours,
        half_a_removal,
        stray_files,
    ],
)
def test_whatever_else_lies_in_the_folder_blocks_nothing(folder, leave):
    leave(folder)
    assert reopen(folder) == (3, 1)
    with Checkpoints(folder, max_checkpoints=2) as checkpoints:
        assert checkpoints.save(99, state(99), metadata={"of": 99}, score=0.0)
    assert reopen(folder) == (99, 1)
    assert not [name for name in names(folder) if "tmp" in name or "unfinished" in name]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[]", b'{"manifest": 3}', b"\x00\xff\xfe", b'{"crc32c": ""}']
)
def test_garbage_in_a_manifest_is_a_damaged_checkpoint(folder, content, caplog):
    (folder / "3" / "manifest.json").write_bytes(content)
    assert reopen(folder) == (2, 1)
    assert "manifest.json is not what was written" in caplog.text


def test_a_position_that_somebody_changed_is_noticed(folder):
    path = folder / "3" / "manifest.json"
    content = json.loads(path.read_text())
    content["manifest"]["position"] = {"next_index": 7}
    path.write_text(json.dumps(content))
    assert reopen(folder) == (2, 1)


def test_where_no_checkpoint_can_be_read_the_error_says_what_to_do_and_nothing_is_lost(folder):
    for step in (1, 2, 3):
        (folder / str(step) / "state" / "_METADATA").unlink()
    before = files_of(folder)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no checkpoint can be read") as error:
            Checkpoints(folder)
        assert f"delete {folder.parent} to begin again" in str(error.value)
        assert "state/_METADATA is missing" in str(error.value)
        assert "\n" not in str(error.value)
    assert files_of(folder) == before


def test_checkpoints_of_an_older_version_are_told_from_damaged_ones_and_left_alone(folder):
    for manifest in folder.glob("*/manifest.json"):
        manifest.unlink()  # which is what that version did not write
    before = files_of(folder)
    with pytest.raises(CheckpointError, match=r"an older version .* resume it with that"):
        reopen(folder)
    assert files_of(folder) == before


@pytest.mark.slow
def test_a_kept_tree_with_a_flipped_bit_is_refused_and_written_again_by_who_has_it(tmp_path):
    folder, rng = tmp_path / "dpo" / "reference", np.random.default_rng(2)
    save_tree(folder, state(5), {"fingerprint": "five"})
    for index in range(len(files_of(folder))):  # two of the names are new in each copy
        if flip(files_of(folder)[index], rng) is None:
            continue
        with pytest.raises(CheckpointError, match=f"0 is damaged.*delete {tmp_path}/dpo"):
            load_tree(folder, ABSTRACT)
        save_tree(folder, state(5), {"fingerprint": "five"})
        assert bits(load_tree(folder, ABSTRACT)) == bits(state(5))


def test_a_folder_that_vanishes_while_a_run_goes_on_ends_it_in_one_line(folder):
    with Checkpoints(folder) as checkpoints:
        shutil.rmtree(folder)
        with pytest.raises(CheckpointError, match="was deleted while the run went on"):
            checkpoints.save(4, state(4), metadata={})
    assert not folder.exists()


def test_a_removal_loses_the_name_before_it_loses_a_file(folder, monkeypatch):
    """Killed within it, it leaves no half of a checkpoint."""
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: seen.append(pathlib.Path(path)))
    with Checkpoints(folder, max_checkpoints=1) as checkpoints:
        checkpoints.save(4, state(4), metadata={"of": 4}, score=2.0)
    removed = {path for path in seen if path.parent == folder and not path.name.startswith(".4")}
    assert sorted(path.name.split(".")[1] for path in removed) == ["1", "2", "3"]
    assert names(folder)[-1] == "4"
    assert reopen(folder) == (4, 4)


def test_a_save_that_was_killed_before_it_removed_older_ones_leaves_none(folder, monkeypatch):
    """No later save would do it where the run had come to its end."""
    with monkeypatch.context() as patch:
        patch.setattr("dpojax.training.checkpoints.steps.remove_steps", lambda *_: None)
        with Checkpoints(folder, max_checkpoints=2) as checkpoints:
            checkpoints.save(4, state(4), metadata={"of": 4})
    assert names(folder) == ["1", "2", "3", "4"]
    with Checkpoints(folder, max_checkpoints=2) as checkpoints:
        assert checkpoints.latest == 4
    assert names(folder) == ["1", "3", "4"]  # step 1 has the best score
    assert reopen(folder) == (4, 1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_made_is_an_error_at_once(folder, monkeypatch, code, capfd):
    """Orbax's thread would make it in the background, and others wait five minutes for it."""
    original = os.mkdir

    def mkdir(path, *args, **kwargs):
        if "orbax" in str(path):
            raise OSError(code, os.strerror(code), str(path))
        original(path, *args, **kwargs)

    with Checkpoints(folder) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", mkdir)
            began = time.monotonic()
            with pytest.raises(CheckpointError, match="free some space, and start") as error:
                checkpoints.save(4, state(4), metadata={"of": 4})
            assert time.monotonic() - began < 10
        assert os.strerror(code) in str(error.value)
        assert names(folder) == ["1", "2", "3"]
        assert checkpoints.save(4, state(4), metadata={"of": 4}, score=0.1)
    assert reopen(folder) == (4, 1)
    assert not capfd.readouterr().err


TWO = """
import sys, jax
port, index, folder = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(index))
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from dpojax.sharding import make_mesh
from dpojax.training.checkpoints import CheckpointError, Checkpoints
mesh = make_mesh(data=1, fsdp=jax.device_count())
at = NamedSharding(mesh, PartitionSpec("fsdp"))
new = lambda step: {"w": jax.jit(lambda: jnp.arange(4096.0) + step, out_shardings=at)()}
abstract = {"w": jax.ShapeDtypeStruct((4096,), jnp.float32, sharding=at)}
try:
    with Checkpoints(folder) as checkpoints:
        while checkpoints.latest is None or checkpoints.latest < 2:
            step = (checkpoints.latest or 0) + 1
            checkpoints.save(step, new(step), metadata={})
        restored, _ = checkpoints.restore(abstract)
        step = checkpoints.latest
        print(step, all((a.data == b.data).all() for a, b in zip(
            restored["w"].addressable_shards, new(step)["w"].addressable_shards)), flush=True)
except CheckpointError as error:
    print(error, flush=True)
"""


def in_two_processes(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(port), str(index), str(folder)],
            cwd=pathlib.Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    results = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], results
    return [out.splitlines()[-1] for out, _ in results], [err for _, err in results]


@pytest.mark.long
def test_two_processes_pass_over_the_same_damaged_checkpoint_and_say_it_once(tmp_path):
    """Each of them reads a part of the files: only one of them sees the damage."""
    folder, rng = tmp_path / "sft" / "checkpoints", np.random.default_rng(0)
    assert in_two_processes(folder)[0] == ["2 True"] * 2
    of_second = next(path for path in files_of(folder / "2") if "process_1/d" in str(path))
    flip(of_second, rng)
    out, err = in_two_processes(folder)
    assert out == ["2 True"] * 2  # trained again, from step 1
    assert "2 is damaged" in err[0]
    assert "step 1 is used instead" in err[0]
    assert "is damaged" not in err[1]
    for step in (1, 2):
        flip(max(files_of(folder / str(step)), key=os.path.getsize), rng)
    out, _ = in_two_processes(folder)
    assert all("no checkpoint can be read" in line for line in out)
