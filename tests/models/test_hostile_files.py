"""Model folders that are damaged or made to harm give one line that names the file, soon."""

import contextlib
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as checkpoints
from safetensors.numpy import load_file, save_file

from dpojax.models import huggingface
from dpojax.models.config import LLAMA, DecoderConfig

CONFIG = DecoderConfig(
    **LLAMA, vocab_size=11, width=8, layers=2, heads=2, mlp_width=12, max_positions=16
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM = "model.norm.weight"  # eight float32
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SECONDS, BYTES = 2, 300e6


def raw_file(header, data=b"\0" * 8, length=None):
    """A safetensors file of these bytes, whether or not it is one."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length

    def write(folder):
        (folder / WEIGHTS).write_bytes(length.to_bytes(8, "little") + header + data)

    return write


def entry(**changes):
    return raw_file({"a": F32 | changes})


def content(name, data):
    """A file of the folder with this text or these bytes, or this as JSON."""

    def write(folder):
        (folder / WEIGHTS).unlink() if name == INDEX else None
        text = data if isinstance(data, (str, bytes)) else json.dumps(data)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def sparse(name, size, start=b""):
    """A file that takes no room on the disk."""

    def write(folder):
        with (folder / name).open("wb") as stream:
            stream.write(start)
            stream.truncate(size)

    return write


def many_entries(count):
    text = ",".join(
        f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count)
    )
    return raw_file(b"{" + text.encode() + b"}", b"")


def config(**changes):
    """Keys of config.json set, or removed where the value is ...."""

    def write(folder):
        raw = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in raw.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return write


def weights(**changes):
    """Tensors replaced by what a function makes of them; `all`: each of them."""

    def write(folder):
        tensors = {name: tensor.copy() for name, tensor in load_file(folder / WEIGHTS).items()}
        for name, change in changes.items():
            tensors[name] = change(tensors[name])
        save_file(tensors, folder / WEIGHTS)

    return write


def change_norm(change):
    return weights(**{NORM: change})


def set_to(*values):
    def change(tensor):
        tensor[: len(values)] = values
        return tensor

    return change


def index(file, **more):
    """One shard, which the index says is in `file`."""

    def write(folder):
        names = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder / "one.safetensors")
        weight_map = dict.fromkeys(names, "one.safetensors") | {NORM: file} | more
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return write


def outside(folder):
    """An index that names a whole file beside the folder."""
    index("../stolen.safetensors")(folder)
    shutil.copy(folder / "one.safetensors", folder.parent / "stolen.safetensors")


def twice(folder):
    index("one.safetensors", other="two.safetensors")(folder)
    save_file({NORM: np.ones(8, np.float32), "other": np.ones(1)}, folder / "two.safetensors")


def only_a_pickle(folder):
    """What would print to a file if it were loaded."""
    (folder / WEIGHTS).unlink()
    opened = b"cbuiltins\nopen\n(V" + str(folder / "opened").encode() + b"\nVw\ntR."
    (folder / "pytorch_model.bin").write_bytes(opened)


def instead(name, make):
    """Something else under a file's name, such as a folder or a pipe."""

    def write(folder):
        (folder / name).unlink()
        make(folder / name)

    return write


NOT_WHOLE = rf"{WEIGHTS}: is not a whole safetensors file "
LEADS_OUT = rf"{INDEX}: '{NORM}' is in .*, which is no plain path inside of the folder"
NO_SHARD = rf"{INDEX}: '{NORM}' is in .*, which names no .safetensors file"
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4}
CASES = {
    # The header's bytes.
    "negative offsets": (entry(data_offsets=[-8, 0]), NOT_WHOLE + r".*integer `-8`"),
    "offsets out of order": (entry(data_offsets=[8, 0]), NOT_WHOLE),
    "overlapping tensors": (
        raw_file({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, b"\0" * 12),
        NOT_WHOLE + ".*invalid offset for tensor `b`",
    ),
    "the same bytes twice": (raw_file({"a": F32, "b": F32}), NOT_WHOLE + ".*invalid offset"),
    "a gap between tensors": (
        raw_file({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, b"\0" * 20),
        NOT_WHOLE + ".*invalid offset for tensor `b`",
    ),
    "a tensor of 101 axes": (entry(shape=[1] * 100 + [2]), rf"{WEIGHTS}: 'a' has 101 axes; more"),
    "bytes after the last tensor": (raw_file({"a": F32}, b"\0" * 16), NOT_WHOLE + ".*not fully"),
    "tensors beyond the end": (raw_file({"a": F32}, b"\0" * 4), NOT_WHOLE + ".*cut short"),
    "a length beyond the end": (raw_file({"a": F32}, length=10**4), f"{WEIGHTS}: is cut short"),
    "a length of 2^63": (raw_file({"a": F32}, length=2**63), f"{WEIGHTS}: is cut short"),
    "three bytes": (content(WEIGHTS, b"abc"), f"{WEIGHTS}: is cut short or is not a safetensors"),
    "no bytes": (content(WEIGHTS, b""), f"{WEIGHTS}: is cut short or is not a safetensors"),
    "no JSON": (raw_file(b"{'a': 1}"), NOT_WHOLE + ".*invalid JSON"),
    "no UTF-8": (raw_file(b'{"\xff": 1}'), NOT_WHOLE + ".*UTF-8"),
    "NaN in the header": (raw_file(b'{"a": NaN}'), NOT_WHOLE),
    "a list": (raw_file([F32]), NOT_WHOLE + ".*invalid type: sequence"),
    "a number": (raw_file(b"7"), NOT_WHOLE),
    "100,000 brackets": (raw_file(b"[" * 100_000), NOT_WHOLE),
    "100,000 nested objects": (raw_file(b'{"a":' * 100_000), NOT_WHOLE),
    "an entry that is a list": (raw_file({"a": [1, 2]}), NOT_WHOLE),
    "an entry that is null": (raw_file({"a": None}), NOT_WHOLE),
    "an entry without offsets": (raw_file({"a": {"dtype": "F32", "shape": [2]}}), NOT_WHOLE),
    "three offsets": (entry(data_offsets=[0, 8, 8]), NOT_WHOLE),
    "offsets that are text": (entry(data_offsets=["0", "8"]), NOT_WHOLE),
    "offsets that are fractions": (entry(data_offsets=[0.0, 8.0]), NOT_WHOLE),
    "a dtype that nobody has": (entry(dtype="F33"), NOT_WHOLE + ".*F33"),
    "a dtype that is a number": (entry(dtype=32), NOT_WHOLE),
    "a negative shape": (entry(shape=[-2]), NOT_WHOLE),
    "a shape that is a number": (entry(shape=2), NOT_WHOLE),
    "a shape of booleans": (entry(shape=[True, 2]), NOT_WHOLE),
    "a shape that overflows": (entry(shape=[2**40, 2**40]), NOT_WHOLE + ".*overflow"),
    "a shape of other bytes": (entry(shape=[3]), NOT_WHOLE),
    "metadata of numbers": (raw_file({"__metadata__": {"a": 1}, "a": F32}), NOT_WHOLE),
    "a name twice": (
        raw_file(f'{{"a":{json.dumps(F32)},"a":{json.dumps(F32)}}}'.encode()),
        rf"{WEIGHTS}: its header names 'a' twice",
    ),
    "float8": (
        entry(dtype="F8_E4M3", shape=[8]),
        rf"{WEIGHTS}: 'a' has dtype F8_E4M3, which is not supported.*original weights",
    ),
    # Too much.
    "a header of 1 GB": (
        sparse(WEIGHTS, 2**30 + 8, (2**30).to_bytes(8, "little")),
        f"{WEIGHTS}: its header has 1,073,741,824 bytes; more than",
    ),
    "3.5 million tensors": (
        sparse(WEIGHTS, 2 * 10**8, (18 * 10**7).to_bytes(8, "little") + b'{"0":'),
        f"{WEIGHTS}: its header has 180,000,000 bytes; more than",
    ),
    "120,000 tensors": (many_entries(120_000), f"{WEIGHTS}: its header names more than 100,000"),
    "12 million dimensions": (
        raw_file(
            b'{"a":{"dtype":"F32","data_offsets":[0,8],"shape":[' + b"1," * 12_000_000 + b"2]}}"
        ),
        f"{WEIGHTS}: its header names more than",
    ),
    "config.json of 1 GB": (sparse("config.json", 2**30), "config.json: 1,073,741,824 bytes"),
    "an index of 1 GB": (
        lambda folder: (index("one.safetensors")(folder), sparse(INDEX, 2**30)(folder)),
        f"{INDEX}: 1,073,741,824 bytes, which is too large",
    ),
    # Not files.
    "a folder for the weights": (instead(WEIGHTS, os.mkdir), "holds neither model.safetensors nor"),
    "a pipe for the weights": (instead(WEIGHTS, os.mkfifo), "holds neither model.safetensors nor"),
    "endless weights": (
        instead(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
        "holds neither model.safetensors nor",
    ),
    "a pipe for config.json": (instead("config.json", os.mkfifo), "config.json: not there"),
    "endless config.json": (
        instead("config.json", lambda path: path.symlink_to("/dev/zero")),
        "config.json: not there",
    ),
    "a pickle alone": (only_a_pickle, "only pytorch_model.bin, a pickle, which dpojax never opens"),
    # The index.
    "a path upwards": (outside, LEADS_OUT),
    "a path upwards, later": (index("a/../../one.safetensors"), LEADS_OUT),
    "a path upwards of Windows": (index("..\\one.safetensors"), LEADS_OUT),
    "an absolute path": (index("/etc/one.safetensors"), LEADS_OUT),
    "a drive of Windows": (index("C:\\one.safetensors"), LEADS_OUT),
    "a file that is not there": (
        index("two.safetensors"),
        rf"two.safetensors: named by {INDEX}, but not there",
    ),
    "a path with a dot": (index("./one.safetensors"), LEADS_OUT),
    "a file name of zeros": (index("\0.safetensors"), NO_SHARD),
    "a file name of two lines": (index("a\nb.safetensors"), NO_SHARD),
    "a file name of half a surrogate pair": (index("\ud800.safetensors"), NO_SHARD),
    "a file name of 5,000 letters": (index(5000 * "a" + ".safetensors"), NO_SHARD),
    "a pickle in the index": (
        index("pytorch_model.bin"),
        rf"{INDEX}: '{NORM}' is in 'pytorch_model.bin', which names no .safetensors file",
    ),
    "a file that is a number": (
        index(7),
        f"{INDEX}: '{NORM}' is in 7, which names no .safetensors",
    ),
    "a tensor that is nowhere": (
        index("one.safetensors", other="one.safetensors"),
        f"{INDEX}: says that 'other' is in one.safetensors, but it is not",
    ),
    "a tensor in two files": (twice, rf"two.safetensors: '{NORM}' is in .*one.safetensors, too"),
    "an index without a map": (content(INDEX, {"metadata": {}}), f"{INDEX}: weight_map must map"),
    "a map that is a list": (content(INDEX, {"weight_map": [1]}), f"{INDEX}: weight_map must map"),
    "an index that is a list": (content(INDEX, []), f"{INDEX}: must hold a JSON object, not list"),
    "an index that is no JSON": (content(INDEX, "{"), f"{INDEX}: not JSON"),
    "an index of 200,000 brackets": (content(INDEX, "[" * 200_000), f"{INDEX}: not JSON"),
    # Weights.
    "integers for weights": (
        change_norm(lambda x: x.astype(np.int32)),
        rf"{WEIGHTS}: tensor '{NORM}' holds I32, not floats: the weights are quantised",
    ),
    "booleans for weights": (change_norm(lambda x: x > 0), f"tensor '{NORM}' holds BOOL, not fl"),
    "a NaN": (
        change_norm(set_to(1, np.nan)),
        rf"{WEIGHTS}: tensor '{NORM}' holds 1 values of 8 that are NaN or infinite",
    ),
    "both infinities": (
        weights(**{"model.embed_tokens.weight": set_to([np.inf] * 8, [-np.inf] * 8)}),
        rf"{WEIGHTS}: tensor 'model.embed_tokens.weight' holds 16 values of 88 that are NaN or",
    ),
    "a NaN in one layer of a stacked array": (
        weights(**{"model.layers.1.mlp.up_proj.weight": set_to([np.nan] * 8)}),
        r"tensor 'model.layers.1.mlp.up_proj.weight' holds 8 values of 96",
    ),
    "a double that float32 cannot hold": (
        change_norm(lambda x: x.astype(np.float64) * 1e300),
        rf"{WEIGHTS}: tensor '{NORM}' has values that float32 cannot hold",
    ),
    "a tensor of another shape": (change_norm(lambda x: x[:4]), rf"'{NORM}' has shape \(4,\)"),
    # config.json.
    "config.json that is no JSON": (content("config.json", "{"), "config.json: not JSON"),
    "config.json of zeros": (content("config.json", b"\0\0"), "config.json: not JSON"),
    "config.json of other bytes": (content("config.json", b"\xff\xfe"), "config.json: not JSON"),
    "an empty config.json": (content("config.json", ""), "config.json: not JSON"),
    "config.json of brackets": (content("config.json", "[" * 200_000), "config.json: not JSON"),
    "a number of 5,000 digits": (content("config.json", "9" * 5000), "config.json: not JSON"),
    "config.json that is a list": (content("config.json", []), "config.json: must hold a JSON obj"),
}
# Key of config.json, its value, what the message says after the key.
NOT_A_VALUE = [
    ("rope_theta", 0, "must be a number from 0 to 1e+12, and not 0, not 0"),
    ("rope_theta", -1e4, "must be a number from 0 to 1e+12, and not 0, not -10000.0"),
    ("rope_theta", 10**30, "must be a number from 0 to 1e+12, and not 0, not 1000"),
    ("rope_theta", True, "must be a number"),
    ("rope_theta", "10000", "must be a number from 0 to 1e+12, and not 0, not '10000'"),
    ("rms_norm_eps", -1e-5, "must be a number from 0 to 1e+12, not -1e-05"),
    ("rms_norm_eps", float("nan"), "must be a number from 0 to 1e+12, not nan"),
    ("rms_norm_eps", float("inf"), "must be a number from 0 to 1e+12, not inf"),
    ("rms_norm_eps", None, "must be a number from 0 to 1e+12, not null"),
    ("rms_norm_eps", {"value": 1}, "must be a number from 0 to 1e+12, not {'value': 1}"),
    ("initializer_range", -0.02, "must be a number from 0"),
    ("num_hidden_layers", "2", "must be a whole number from 1 to 10000, not '2'"),
    ("num_hidden_layers", 2.5, "must be a whole number from 1 to 10000, not 2.5"),
    ("num_hidden_layers", True, "must be a whole number from 1 to 10000, not True"),
    ("num_hidden_layers", 10**9, "must be a whole number from 1 to 10000"),
    ("num_hidden_layers", None, "missing, and llama needs it"),
    ("num_attention_heads", 0, "must be a whole number from 1 to"),
    ("num_key_value_heads", 5, "5 does not divide heads 2"),
    ("head_dim", -4, "must be a whole number from 1 to"),
    ("head_dim", 3, "rope rotates pairs, but head_dim is 3"),
    ("vocab_size", 10**30, "must be a whole number from 1 to 2147483647, not 1000"),
    ("vocab_size", [11], "must be a whole number from 1 to 2147483647, not [11]"),
    ("max_position_embeddings", None, "must be a whole number from 1 to 2147483647, not null"),
    ("hidden_act", ["silu"], "must be a string, not ['silu']"),
    ("hidden_act", "softmax", "'softmax' is not in ["),
    ("tie_word_embeddings", "false", "must be true or false, not 'false'"),
    ("tie_word_embeddings", 1, "must be true or false, not 1"),
    ("attention_bias", "no", "must be true or false, not 'no'"),
    ("architectures", "LlamaForCausalLM", "must be a list of strings, not 'LlamaForCausalLM'"),
    ("id2label", ["a", "b"], "must be an object, not ['a', 'b']"),
    ("model_type", ["llama"], "must be a string, not ['llama']"),
    ("model_type", 7, "must be a string, not 7"),
    ("rope_parameters", "default", "must be an object, not 'default'"),
    ("rope_parameters", [1], "must be an object, not [1]"),
]
ROPE = [
    ({"rope_theta": 0}, "rope_theta: must be a number"),
    ({"rope_type": "linear", "factor": 0}, "factor: must be a number from 0 to 1e+12, and not 0"),
    ({"rope_type": "linear", "factor": "4"}, "factor: must be a number"),
    ({"rope_type": "yarn", "factor": 4.0, "truncate": "no"}, "truncate: must be true or false"),
    ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0}, "beta_slow: must be below beta_fast"),
    (LLAMA3 | {"high_freq_factor": 1}, "low_freq_factor: must be below high_freq_factor"),
    (LLAMA3 | {"original_max_position_embeddings": -1}, "original_max_position_embeddings: must"),
    ({"rope_type": 5}, "rope_type: must be a string, not 5"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    huggingface.save(folder, CONFIG, checkpoints.random_params(CONFIG))
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def refused(folder):
    """The error's one line; it came within seconds of work."""
    start = time.process_time()
    with pytest.raises((ValueError, OSError)) as error:
        huggingface.load(folder)
    assert time.process_time() - start < SECONDS
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_or_hostile_file_is_named_in_one_line(case, folder):
    change, message = CASES[case]
    change(folder)
    assert re.search(rf"{re.escape(str(folder))}.*{message}", refused(folder))
    assert not (folder / "opened").exists()


@pytest.mark.parametrize(("key", "value", "message"), NOT_A_VALUE)
def test_a_value_that_no_model_can_have_is_named_by_its_key(key, value, message, folder):
    config(**{key: value})(folder)
    assert f"{folder}/config.json: {key}: {message}" in refused(folder)


def test_heads_that_do_not_divide_the_width_are_named_by_their_key(folder):
    config(num_attention_heads=3, num_key_value_heads=..., head_dim=...)(folder)
    assert f"{folder}/config.json: num_attention_heads: 3 does not divide" in refused(folder)


@pytest.mark.parametrize(("settings", "message"), ROPE)
def test_a_rotary_setting_that_cannot_be_is_named_by_its_key(settings, message, folder):
    config(rope_parameters=settings)(folder)
    assert re.search(rf"config.json: rope(_parameters)?\.{re.escape(message)}", refused(folder))


def test_a_file_just_below_the_limits_is_read_as_soon(folder):
    many_entries(90_000)(folder)
    assert "tensor 'model.embed_tokens.weight' is missing" in refused(folder)


@pytest.mark.long
def test_no_hostile_file_takes_more_than_300_mb(good, tmp_path):
    """In a process of its own, whose largest memory grows from file to file."""
    code = f"import test_hostile_files as t; t.print_growth({str(good)!r}, {str(tmp_path)!r})"
    here = os.path.dirname(__file__)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert run.returncode == 0, run.stderr
    assert 0 <= float(run.stdout) < BYTES


def print_growth(good, scratch):
    """Print by how many bytes the process grew over all cases."""
    huggingface.load(good)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, (change, _) in enumerate(CASES.values()):
        folder = pathlib.Path(scratch) / str(number) / "model"
        shutil.copytree(good, folder)
        change(folder)
        with contextlib.suppress(ValueError, OSError):
            huggingface.load(folder)
        shutil.rmtree(folder.parent)
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def test_a_shard_that_is_a_link_into_the_blobs_of_a_hub_cache_is_read(good, tmp_path):
    """A snapshot holds links that lead out of it, to files without an ending."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    shard = shutil.copytree(good, tmp_path / "copy")
    index("one.safetensors")(shard)
    for number, file in enumerate(sorted(shard.iterdir())):
        (snapshot / file.name).symlink_to(
            os.path.relpath(file.rename(blobs / f"{number}"), snapshot)
        )
    assert (snapshot / "one.safetensors").is_symlink()
    expected, got = (huggingface.load(path)[1]["final_norm"]["scale"] for path in (good, snapshot))
    np.testing.assert_array_equal(got, expected)


def test_half_precision_weights_that_a_dtype_cannot_hold_are_named(folder):
    change_norm(lambda x: np.full_like(x, 1e30))(folder)
    with pytest.raises(ValueError, match=f"tensor '{NORM}' has values that float16 cannot hold"):
        huggingface.load(folder, dtype=jnp.float16)
    huggingface.load(folder, dtype=jnp.bfloat16)
