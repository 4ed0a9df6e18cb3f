"""Laws of a checkpoint: bitwise, on any mesh, and the last good one survives whatever happens."""

import collections
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dpojax import storage
from dpojax.sharding import make_mesh
from dpojax.training.checkpoints import (
    CheckpointError,
    Checkpoints,
    best,
    load_params,
    load_tree,
    save_tree,
    saving_tree,
)
from tests import QUICK_COMPILES, further
from tests.gcs import bucket, gcs_emulator  # noqa: F401 (fixtures)

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Adam(NamedTuple):
    count: jax.Array
    mu: dict
    empty: tuple


class State(NamedTuple):
    step: jax.Array
    params: dict
    optimizer: tuple
    key: jax.Array
    nothing: None


def layout(mesh):
    """A State of shardings, for the arrays of `new_state`."""
    at = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    params = {"dense": {"kernel": at("fsdp", "tensor")}, "scale": at("tensor")}
    return State(at(), params, (Adam(at(), params, ()), ()), at(), None)


def new_state(seed, width=16):
    """A State whose every bit depends on `seed`; the kernel is [8, width]."""
    one, two, three = jax.random.split(jax.random.key(seed), 3)
    params = {
        "dense": {"kernel": jax.random.normal(one, (8, width))},
        "scale": jax.random.normal(two, (8,), jnp.bfloat16),
    }
    moments = jax.tree.map(lambda x: x * 3, params)
    return State(jnp.int32(seed), params, (Adam(jnp.int32(seed), moments, ()), ()), three, None)


def state_on(mesh, seed):
    return jax.device_put(new_state(seed), layout(mesh))


def abstract_on(mesh, width=16):
    shapes = jax.eval_shape(lambda: new_state(0, width))
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        shapes,
        layout(mesh),
    )


def bits(tree):
    """Every leaf as (dtype, shape, bytes) on the host."""

    def one(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaf = np.asarray(leaf)
        return leaf.dtype, leaf.shape, leaf.tobytes()

    return jax.tree.map(one, tree)


@pytest.fixture
def mesh():
    return make_mesh(data=1, fsdp=4, tensor=2)


def test_a_restored_state_is_the_saved_one_bit_for_bit_with_its_types(tmp_path, mesh):
    state = state_on(mesh, 3)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(3, state, metadata={"stage": "dpo", "config": "abc"})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 3
        restored, metadata = checkpoints.restore(abstract_on(mesh))
        assert checkpoints.metadata() == metadata
    assert metadata == {"stage": "dpo", "config": "abc"}
    assert bits(restored) == bits(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.random.uniform(restored.key) == jax.random.uniform(state.key)


def test_a_state_goes_onto_a_mesh_of_another_shape(tmp_path, mesh):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(mesh, 1), metadata={})
        other = abstract_on(make_mesh(data=2, fsdp=1, tensor=4))
        restored, _ = checkpoints.restore(other)
    assert bits(restored) == bits(new_state(1))
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(other)):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_a_dtype_is_cast_on_load_as_jax_casts_it(tmp_path, mesh):
    save_tree(tmp_path / "reference", state_on(mesh, 1).params, {})
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=leaf.sharding),
        abstract_on(mesh).params,
    )
    wanted = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), new_state(1).params)
    assert bits(load_tree(tmp_path / "reference", abstract)) == bits(wanted)


def test_a_state_may_be_donated_while_it_is_being_written(tmp_path, mesh):
    state = state_on(mesh, 5)
    overwrite = jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state.params), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, metadata={})
        jax.block_until_ready(overwrite(state))
        restored, _ = checkpoints.restore(abstract_on(mesh))
    assert bits(restored) == bits(new_state(5))


def test_only_the_newest_checkpoints_are_kept_and_any_of_them_restores(tmp_path, mesh):
    with Checkpoints(tmp_path, max_checkpoints=2) as checkpoints:
        for step in (1, 2, 3, 4):
            assert checkpoints.save(step, state_on(mesh, step), metadata={"step": step})
        assert checkpoints.latest == 4
        restored, metadata = checkpoints.restore(abstract_on(mesh), step=3)
        assert (bits(restored), metadata) == (bits(new_state(3)), {"step": 3})
        with pytest.raises(CheckpointError, match=r"no complete checkpoint of step 1.*\[3, 4\]"):
            checkpoints.restore(abstract_on(mesh), step=1)
    assert sorted(os.listdir(tmp_path)) == ["3", "4"]


def test_a_step_that_is_there_is_not_written_again_and_an_older_one_is_refused(tmp_path, mesh):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(4, state_on(mesh, 4), metadata={"first": True})
        assert not checkpoints.save(4, state_on(mesh, 4), metadata={"first": False})
        assert checkpoints.metadata() == {"first": True}
        with pytest.raises(CheckpointError, match="cannot save step 3 after step 4"):
            checkpoints.save(3, state_on(mesh, 3), metadata={})


def test_a_grain_iterator_goes_on_where_it_was_when_the_save_began(tmp_path, mesh):
    def batches():
        numbers = grain.MapDataset.range(64).shuffle(seed=7).batch(4, drop_remainder=True)
        return iter(numbers.repeat(3).to_iter_dataset())

    everything = [batch.tolist() for batch in batches()]
    data = batches()
    with Checkpoints(tmp_path) as checkpoints:
        for _ in range(21):
            next(data)
        checkpoints.save(21, state_on(mesh, 21), data, metadata={})
        next(data)  # reading on must not move the saved position
        resumed = batches()
        checkpoints.restore(abstract_on(mesh), resumed)
    assert [batch.tolist() for batch in resumed] == everything[21:]


def test_the_checkpoint_of_another_config_is_refused_with_the_arrays_that_differ(tmp_path, mesh):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(mesh, 1), metadata={})
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(abstract_on(mesh, width=32))
        assert "params/dense/kernel: (8, 16) in the checkpoint, (8, 32) expected" in str(
            error.value
        )
        assert "params/scale" not in str(error.value)
        wanted = abstract_on(mesh)._replace(params={"head": abstract_on(mesh).step})
        with pytest.raises(CheckpointError, match=r"params/head: absent in the checkpoint, \(\)"):
            checkpoints.restore(wanted)


def test_parameters_are_read_without_the_optimiser(tmp_path, mesh):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_on(mesh, step), metadata={})
    abstract = abstract_on(mesh).params
    shutil.copytree(tmp_path / "2", tmp_path / "3.orbax-checkpoint-tmp")
    assert bits(load_params(tmp_path, abstract)) == bits(new_state(2).params)
    assert bits(load_params(tmp_path, abstract, step=1)) == bits(new_state(1).params)
    with pytest.raises(CheckpointError, match="params/dense/kernel"):
        load_params(tmp_path, abstract_on(mesh, width=8).params)
    with pytest.raises(CheckpointError, match="complete steps: none"):
        load_params(tmp_path / "nothing", abstract)


def test_a_tree_is_saved_once_and_never_replaced_by_another(tmp_path, mesh):
    folder, abstract = tmp_path / "reference", abstract_on(mesh).params
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_tree(folder, abstract)
    for _ in range(2):
        save_tree(folder, state_on(mesh, 1).params, {"hash": "a"})
    with pytest.raises(CheckpointError, match=r"holds a tree with metadata {'hash': 'a'}"):
        save_tree(folder, state_on(mesh, 2).params, {"hash": "b"})
    assert bits(load_tree(folder, abstract)) == bits(new_state(1).params)


def test_what_a_killed_save_left_is_ignored_and_removed(tmp_path, mesh):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state_on(mesh, 1), metadata={})
    shutil.copytree(tmp_path / "1", tmp_path / "2.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 1
        checkpoints.save(2, state_on(mesh, 2), metadata={})
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_too_little_disk_space_is_refused_before_anything_is_written(tmp_path, mesh, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    with Checkpoints(tmp_path, max_checkpoints=1) as checkpoints:
        checkpoints.save(1, state_on(mesh, 1), metadata={})
        checkpoints.wait()
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10_000, 9_000, 1_000))
        # 2 x (8 x 16 float32 + 8 bfloat16) + 2 int32 + a key of 8 bytes = 1,072, and 5 %
        with pytest.raises(
            CheckpointError, match=r"1,125 bytes are needed.*1,000 are free"
        ) as error:
            checkpoints.save(2, state_on(mesh, 2), metadata={})
        assert str(tmp_path) in str(error.value)
        assert os.listdir(tmp_path) == ["1"]
        assert bits(checkpoints.restore(abstract_on(mesh))[0]) == bits(new_state(1))


def test_checkpoints_that_keep_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_checkpoints must be at least 1"):
        Checkpoints(tmp_path, max_checkpoints=0)


def child(script, *arguments, **options):
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=2 {QUICK_COMPILES}"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **options)


# Random floats hardly compress, so that the files are as large as the arrays.
BIG = """
import sys, jax
from dpojax.training.checkpoints import CheckpointError, Checkpoints
def big(seed): return {"w": jax.random.normal(jax.random.key(seed), (1024, 2048))}
"""

FULL = """
import os, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Checkpoints(sys.argv[1], max_checkpoints=1) as checkpoints:
    checkpoints.save(1, big(1), metadata={})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    for step in (2, 3):
        checkpoints.save(step, big(step), metadata={})
        try:
            checkpoints.wait()
        except CheckpointError as error:
            print(f"step {step}: latest {checkpoints.latest}:", str(error).replace("\\n", " "))
    restored, _ = checkpoints.restore(jax.eval_shape(big, 1))
    print("restored", bool((restored["w"] == big(1)["w"]).all()), os.listdir(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoints.save(3, big(3), metadata={})
    print("then", checkpoints.latest, os.listdir(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_is_an_error_and_the_last_good_checkpoint_stays(tmp_path):
    process = child(BIG + FULL, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    first, second, restored, then = out.splitlines()
    assert first.startswith(f"step 2: latest 1: cannot write the checkpoint {tmp_path}/2: ")
    assert second.startswith(f"step 3: latest 1: cannot write the checkpoint {tmp_path}/3: ")
    assert "too large" in first
    assert "Traceback" not in err  # of Orbax's threads, whose errors are raised
    assert restored == "restored True ['1']"
    assert then == "then 3 ['3']"


KILLED = """
with Checkpoints(sys.argv[1], max_checkpoints=1) as checkpoints:
    checkpoints.save(1, big(1), metadata={})
    checkpoints.wait()
    print("saved", flush=True)
    for step in range(2, 10_000):
        checkpoints.save(step, big(step), metadata={"step": step})
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.2, *further(0.03, 0.33)])
def test_a_process_killed_while_saving_leaves_a_complete_checkpoint(tmp_path, delay):
    process = child(BIG + KILLED, tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "saved\n"
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    big = lambda seed: {"w": jax.random.normal(jax.random.key(seed), (1024, 2048))}
    with Checkpoints(tmp_path, max_checkpoints=1) as checkpoints:
        step = checkpoints.latest
        restored, _ = checkpoints.restore(jax.eval_shape(big, 1))
        assert bits(restored) == bits(big(step))
        checkpoints.save(step + 1, big(step + 1), metadata={})
    assert os.listdir(tmp_path) == [str(step + 1)]


TWO = """
import sys, jax
port, index, folder = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=int(index))
import grain, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from dpojax.sharding import make_mesh
from dpojax.training.checkpoints import Checkpoints
from tests import further
rows = NamedSharding(make_mesh(data=1, fsdp=4), PartitionSpec("fsdp"))
whole = NamedSharding(rows.mesh, PartitionSpec())
new = jax.jit(lambda: {"w": jnp.arange(32.0).reshape(8, 4), "key": jax.random.key(3)},
              out_shardings={"w": rows, "key": whole})
data = lambda: iter(grain.MapDataset.range(100)[int(index)::2].to_iter_dataset())
state, position = new(), data()
abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
with Checkpoints(folder, max_checkpoints=1) as checkpoints:
    for step in (1, 2):
        next(position)
        checkpoints.save(step, state, position, metadata={"step": step})
    resumed = data()
    restored, metadata = checkpoints.restore(abstract, resumed)
    same = all((a.data == b.data).all() for a, b in
               zip(restored["w"].addressable_shards, state["w"].addressable_shards))
    print(bool(same), metadata, next(resumed), checkpoints.latest, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["tmp_path", "bucket"])
def test_two_processes_write_one_checkpoint_that_one_process_reads(place, request):
    folder = request.getfixturevalue(place)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    pair = [child(TWO, port, index, folder, **pipes) for index in range(2)]
    for index, process in enumerate(pair):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == f"True {{'step': 2}} {4 + index} 2"
    abstract = {
        "w": jax.ShapeDtypeStruct((8, 4), jnp.float32),
        "key": jax.eval_shape(jax.random.key, 0),
    }
    with Checkpoints(folder) as checkpoints:
        restored, _ = checkpoints.restore(abstract)
    assert bits(restored) == bits({"w": jnp.arange(32.0).reshape(8, 4), "key": jax.random.key(3)})


def test_the_best_checkpoint_stays_until_a_better_one_is_there_also_after_a_resumption(tmp_path):
    save = lambda step, score: checkpoints.save(step, new_state(step), metadata={}, score=score)
    with Checkpoints(tmp_path, max_checkpoints=1) as checkpoints:
        assert checkpoints.best is None
        for step, score in ((1, 0.5), (2, 0.8), (3, None), (4, 0.7)):
            save(step, score)
        assert checkpoints.best == (0.8, 2)
    with Checkpoints(tmp_path, max_checkpoints=1) as checkpoints:
        assert checkpoints.best == (0.8, 2)
        save(5, None)
        assert checkpoints.best == best(tmp_path) == (0.8, 2)
        assert checkpoints.latest == 5
        save(6, 0.9)
        save(7, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "7"]
    assert best(tmp_path) == (0.9, 6)


def test_a_tree_is_complete_once_what_ran_beside_its_writing_has_ended(mesh, tmp_path):
    """Also where that failed, and where it took over the arrays."""
    params = state_on(mesh, 1).params
    overwrite = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)

    def fail():
        jax.block_until_ready(overwrite(params))
        raise KeyError("meanwhile")

    with pytest.raises(KeyError, match="meanwhile"), saving_tree(tmp_path / "tree", params, {}):
        fail()
    found = load_tree(tmp_path / "tree", abstract_on(mesh).params)
    assert bits(found) == bits(new_state(1).params)


def test_the_arrays_of_a_tree_are_free_before_what_runs_beside_its_writing_ends(mesh, tmp_path):
    params = state_on(mesh, 1).params
    arrays = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
    with saving_tree(tmp_path / "tree", params, {}):
        del params
        deadline = time.monotonic() + 20  # Orbax's threads let go once they have written
        while any(array() is not None for array in arrays) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [array() for array in arrays] == [None] * len(arrays)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_checkpoints_on_a_bucket_are_kept_removed_and_restored_as_on_a_disk(bucket, mesh):  # noqa: F811
    folder = storage.as_path(f"{bucket}/run/checkpoints")
    with Checkpoints(folder, max_checkpoints=1) as checkpoints:
        assert checkpoints.latest is checkpoints.best is None
        for step, score in ((1, 0.5), (2, 0.9), (3, 0.1), (4, 0.2)):
            checkpoints.save(step, state_on(mesh, step), metadata={"step": step}, score=score)
        assert (checkpoints.latest, checkpoints.best) == (4, (0.9, 2))
    assert names(folder) == ["2", "4"]
    with Checkpoints(folder, max_checkpoints=1) as checkpoints:
        restored, metadata = checkpoints.restore(abstract_on(mesh))
    assert (bits(restored), metadata) == (bits(new_state(4)), {"step": 4})
    assert bits(load_params(folder, abstract_on(mesh).params, 2)) == bits(new_state(2).params)
    for _ in range(2):
        save_tree(folder.parent / "reference", state_on(mesh, 1).params, {"hash": "a"})
    loaded = load_tree(folder.parent / "reference", abstract_on(mesh).params)
    assert bits(loaded) == bits(new_state(1).params)


@pytest.mark.parametrize("lost", ["_CHECKPOINT_METADATA", "commit_success.txt", "state/_METADATA"])
def test_a_checkpoint_that_a_bucket_holds_in_part_is_none(bucket, mesh, lost):  # noqa: F811
    """A killed removal or save leaves some of its objects."""
    folder = storage.as_path(f"{bucket}/checkpoints")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_on(mesh, step), metadata={}, score=1 / step)
    (folder / "1" / lost).unlink()
    with Checkpoints(folder, max_checkpoints=1) as checkpoints:
        assert (checkpoints.latest, checkpoints.best) == (2, (0.5, 2))
        checkpoints.save(3, state_on(mesh, 3), metadata={}, score=2)
    assert names(folder) == ["3"]


def test_a_folder_that_orbax_cannot_write_to_is_refused():
    with pytest.raises(CheckpointError, match="local folders and gs:// only"):
        Checkpoints("s3://bucket/run")
