"""Read safetensors files as memory-mapped NumPy views, and write them one tensor at a time.

Format (huggingface/safetensors): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}`, then the tensors' bytes. Each tensor is a NumPy view into
the mapped file, so a device's shard reads only its own pages. Paths are local: `storage.local_copy`
fetches what is on a bucket.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dpojax import storage

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


class Stored(NamedTuple):
    """A tensor in a file: a read-only view that reads the disk when it is indexed."""

    view: np.ndarray
    file: pathlib.Path


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
      ValueError: a file is incomplete or is not safetensors; the index disagrees with its files.
    """
    if (folder / SINGLE).is_file():
        return read_file(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(_nothing_to_read(folder))
    weight_map = storage.read_json(folder / INDEX)["weight_map"]
    tensors: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: named by {INDEX}, but not there")
        tensors |= read_file(folder / file)
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise ValueError(f"{folder / INDEX}: says that {name!r} is in {file}, but it is not")
    return tensors


def _nothing_to_read(folder: pathlib.Path) -> str:
    if any(folder.glob("pytorch_model*.bin*")):
        return (
            f"{folder}: holds only pytorch_model.bin; convert it with transformers: "
            "from_pretrained(folder) and save_pretrained(new_folder) of the class that config.json "
            "names under architectures"
        )
    return f"{folder}: holds neither {SINGLE} nor {INDEX}"


def read_file(path: pathlib.Path) -> dict[str, Stored]:
    """Return every tensor of one file, as views.

    Raises:
      ValueError: the file is incomplete or is not safetensors; a dtype is not in DTYPES.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: is cut short or is not a safetensors file")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: is not a safetensors file ({error})") from error
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else b""
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name!r} has dtype {entry['dtype']}, which is not supported")
        dtype, (start, stop) = DTYPES[entry["dtype"]], entry["data_offsets"]
        size = int(np.prod(entry["shape"], dtype=np.int64)) * dtype.itemsize
        if stop > len(data) or stop - start != size:
            raise ValueError(f"{path}: {name!r} needs {size} bytes; is the file cut short?")
        view = np.frombuffer(data[start:stop], dtype).reshape(entry["shape"])
        tensors[name] = Stored(view, path)
    return tensors


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
            values = np.ascontiguousarray(tensor.fetch(), tensor.dtype)
            if values.shape != tensor.shape:
                raise AssertionError(f"{tensor.name}: {values.shape} is not {tensor.shape}")
            stream.write(values.reshape(-1).view(np.uint8))
