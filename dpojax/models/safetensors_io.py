"""Read safetensors files as memory-mapped NumPy views, and write them one tensor at a time.

Format (huggingface/safetensors): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}`, then the tensors' bytes. Each tensor is a NumPy view into
the mapped file, so a device's shard reads only its own pages. Paths are local: `storage.local_copy`
fetches what is on a bucket.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dpojax import storage
from dpojax.models.config_values import shown
from dpojax.watchdog import beat

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Far beyond any published file, and little memory and time for one that was made to harm.
MAX_HEADER = 25_000_000  # bytes; the library's own limit is 100 MB
MAX_TENSORS = 100_000  # of one file
MAX_VALUES = 2_000_000  # commas of a header
MAX_JSON = 25_000_000  # bytes of config.json and of the index
MAX_AXES = 64  # of a tensor; NumPy's own limit
LONGEST_NAME = 255  # characters of a file's name

QUANTIZED = (
    ": the weights are quantised; take the repository with the original weights, or, for the kinds "
    "that transformers can undo, write them with from_pretrained(NAME).dequantize() and "
    "save_pretrained(NEW_FOLDER)"
)


class Stored(NamedTuple):
    """A tensor in a file: a read-only view that reads the disk when it is indexed."""

    view: np.ndarray
    file: pathlib.Path

    def require_float(self, name: str) -> None:
        """Raise a ValueError if the tensor holds integers, as quantised weights do."""
        if not jnp.issubdtype(self.view.dtype, jnp.floating):
            stored = NAMES[self.view.dtype]
            raise ValueError(f"{self.file}: tensor {name!r} holds {stored}, not floats{QUANTIZED}")

    def require_finite(self, name: str, values: np.ndarray) -> None:
        """Raise a ValueError if `values`, which were read from the tensor, are not all finite."""
        with np.errstate(all="ignore"):
            # A sum needs no memory, and is not finite if a value is not.
            if np.isfinite(values.sum(dtype=np.float32)) or np.isfinite(values).all():
                return
            broken = int(np.count_nonzero(~np.isfinite(self.view)))
        raise ValueError(
            f"{self.file}: tensor {name!r} holds {broken} values of {self.view.size} that are NaN "
            "or infinite: whatever wrote the file wrote broken weights; take another checkpoint"
            if broken
            else f"{self.file}: tensor {name!r} has values that {values.dtype} cannot hold"
        )


class Tensor(NamedTuple):
    """A tensor to write. `fetch` returns its values; it is called once, when they are written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def read_folder(folder: pathlib.Path) -> dict[str, Stored]:
    """Return every tensor of `model.safetensors`, or of the files that the index names.

    Raises:
      FileNotFoundError: there are no safetensors, or a file that the index names is missing.
      ValueError: a file or the index is damaged, or they disagree; see `read_file`.
    """
    if (folder / SINGLE).is_file():
        return read_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(_nothing_to_read(folder))
    weight_map = _read_index(folder)
    tensors: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: named by {INDEX}, but not there")
        for name, stored in read_file(folder / file).items():
            if name in tensors:
                raise ValueError(f"{stored.file}: {name!r} is in {tensors[name].file}, too")
            tensors[name] = stored
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != folder / file:
            raise ValueError(f"{folder / INDEX}: says that {name!r} is in {file}, but it is not")
    return tensors


def _read_index(folder: pathlib.Path) -> dict[str, str]:
    """Which file of the folder each tensor is in. Names of files never lead out of the folder."""
    path = folder / INDEX
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map must map names of tensors to names of files")
    for name, file in weight_map.items():
        if not _names_a_shard(file):
            raise ValueError(
                f"{path}: {name!r} is in {shown(file)}, which names no .safetensors file"
            )
        # Backslashes and colons separate folders and drives elsewhere.
        if {"..", ".", ""} & set(re.split(r"[/\\:]", file)):
            raise ValueError(
                f"{path}: {name!r} is in {file!r}, which is no plain path inside of the folder"
            )
    return weight_map


def _names_a_shard(file: Any) -> bool:
    plain = isinstance(file, str) and len(file) <= LONGEST_NAME and file.isprintable()
    return plain and file.endswith(".safetensors")


def _nothing_to_read(folder: pathlib.Path) -> str:
    if any(folder.glob("pytorch_model*.bin*")):
        return (
            f"{folder}: holds only pytorch_model.bin, a pickle, which dpojax never opens because "
            "that can run code; convert it with transformers: from_pretrained(folder) and "
            "save_pretrained(new_folder) of the class that config.json names under architectures"
        )
    return f"{folder}: holds neither {SINGLE} nor {INDEX}"


def read_object(path: pathlib.Path) -> dict:
    """Return the object in a small JSON file.

    Raises:
      ValueError: the file is larger than MAX_JSON bytes, is not JSON, or holds no object.
    """
    size = path.stat().st_size
    if size > MAX_JSON:
        raise ValueError(f"{path}: {size:,} bytes, which is too large; is it the right file?")
    content = storage.read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def read_file(path: pathlib.Path) -> dict[str, Stored]:
    """Return every tensor of one file, as views.

    The `safetensors` library checks the header first: types, offsets, and that the tensors cover
    the file without gaps or overlaps.

    Raises:
      ValueError: the file is incomplete or is not safetensors; its header is too large; a dtype is
        not in DTYPES.
    """
    start, entries = _read_header(path)
    data = np.memmap(path, np.uint8, "r", offset=start) if path.stat().st_size > start else b""
    tensors = {}
    for name, entry in entries.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: {name!r} has dtype {entry['dtype']}, which is not supported"
                + (QUANTIZED if re.match(r"F[468]", entry["dtype"]) else "")
            )
        if (axes := len(entry["shape"])) > MAX_AXES:
            raise ValueError(f"{path}: {name!r} has {axes} axes; more than {MAX_AXES} are not read")
        first, stop = entry["data_offsets"]
        view = np.frombuffer(data[first:stop], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = Stored(view, path)
    return tensors


def _read_header(path: pathlib.Path) -> tuple[int, dict[str, dict]]:
    """Where the tensors start, and the header's entry of each."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: is cut short or is not a safetensors file")
        if length > MAX_HEADER:
            raise ValueError(
                f"{path}: its header has {length:,} bytes; more than {MAX_HEADER:,} are not read"
            )
        header = stream.read(length)
    # What JSON makes of the bytes grows with the number of values, so they are counted before.
    if max(header.count(b'"data_offsets"') / MAX_TENSORS, header.count(b",") / MAX_VALUES) > 1:
        raise ValueError(
            f"{path}: its header names more than {MAX_TENSORS:,} tensors, which are not read"
        )
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path}: is not a whole safetensors file ({error}); was its download cut short?"
        ) from error
    entries = json.loads(header, object_pairs_hook=partial(_without_repeats, path))
    entries.pop("__metadata__", None)
    return 8 + length, entries


def _without_repeats(path: pathlib.Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a dict. The format forbids a name twice: readers differ in which they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{path}: its header names {twice!r} twice")
    return content


def write_folder(folder: pathlib.Path, tensors: Iterable[Tensor], max_shard_bytes: int) -> None:
    """Write one `model.safetensors`, or several files and an index if it would be too large.

    Args:
      max_shard_bytes: the largest size of a file, unless a single tensor is larger.
    """
    tensors = list(tensors)
    files: list[list[Tensor]] = [[]]
    for tensor in tensors:
        used = sum(other.nbytes for other in files[-1])
        if files[-1] and used + tensor.nbytes > max_shard_bytes:
            files.append([])
        files[-1].append(tensor)
    if len(files) == 1:
        write_file(folder / SINGLE, tensors)
        return
    weight_map = {}
    for number, group in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(folder / file, group)
        weight_map |= {tensor.name: file for tensor in group}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    storage.write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_file(path: pathlib.Path, tensors: list[Tensor]) -> None:
    """Write one file. Each tensor is fetched when it is written, so one is in memory at a time."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8 bytes
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            beat("weights are written")
            values = np.ascontiguousarray(tensor.fetch(), tensor.dtype)
            if values.shape != tensor.shape:
                raise AssertionError(f"{tensor.name}: {values.shape} is not {tensor.shape}")
            stream.write(values.reshape(-1).view(np.uint8))
