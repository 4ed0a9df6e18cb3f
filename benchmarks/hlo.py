"""What a compiled program does, read from its text: its collectives and its matrix products.

    text = jax.jit(step).lower(...).compile().as_text()

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "bf16": 2, "token": 0}  # of the others the name says the bits

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|(?:true|false)_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=" + _IOTA)
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(" + _IOTA + r"\))? \{([^}]*)\}"
)
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")


class Collective(NamedTuple):
    """One collective instruction.

    kind: of KINDS. times: how often it runs. size: bytes that a device puts in or takes out each
    time, whichever is more: of the whole array, where it is gathered or reduced. groups: the ids of
    devices that exchange data (of a permutation, source and target).
    """

    kind: str
    times: int
    size: int
    groups: list[list[int]]


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program in which more than one device takes part.

    Raises:
      ValueError: what is written there is not understood, or a loop with a collective does not say
        how often it runs.
    """
    used: list[Collective] = []
    for times, instructions in _computations(text):
        for one in instructions:
            if one.opcode.removesuffix("-start") not in KINDS:
                continue
            if one.opcode not in KINDS:
                raise ValueError(f"{one.opcode}: only programs with synchronous collectives")
            groups = _groups(one.rest)
            widest = max(map(len, groups))
            size = _bytes(one.shape) * (widest if one.opcode == "reduce-scatter" else 1)
            if widest > 1:
                used.append(Collective(one.opcode, _known(times, one), size, groups))
    return used


def product_flops(text: str) -> float:
    """FLOPs of all matrix products of a compiled program: 2 for each multiplication.

    Raises:
      ValueError: a loop with a product does not say how often it runs.
    """
    total = 0.0
    for times, instructions in _computations(text):
        shapes = {one.name: one.shape for one in instructions}
        for one in instructions:
            if one.opcode == "dot":
                left = _dims(shapes[re.match(r"%?([\w.-]+)", one.rest)[1]])
                summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)[1]
                inner = math.prod(left[i] for i in _ints(summed))
                total += 2.0 * _known(times, one) * math.prod(_dims(one.shape)) * inner
    return total


def _computations(text: str) -> Iterator[tuple[float, list[_Instruction]]]:
    """(how often it runs, its instructions) of every computation; NaN if nobody knows."""
    bodies: dict[str, list[_Instruction]] = {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            bodies[head[1]] = []
        elif (instruction := _INSTRUCTION.match(line)) and bodies:
            next(reversed(bodies.values())).append(_Instruction(*instruction.groups()))
    times = dict.fromkeys(bodies, 0.0)
    times[next(reversed(bodies))] = 1.0  # the entry stands last, and every caller after its callees
    for name in reversed(bodies):
        for one in bodies[name]:
            often = times[name]
            if one.opcode == "while":
                count = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', one.rest)
                often *= int(count[1]) if count else math.nan
            for called in _CALLED.findall(one.rest):
                for callee in re.findall(r"[\w.-]+", called):
                    times[callee] += often
        yield times[name], bodies[name]


def _known(times: float, one: _Instruction) -> int:
    if math.isnan(times):
        raise ValueError(f"{one.name}: in a loop that does not say how often it runs")
    return int(times)


def _groups(rest: str) -> list[list[int]]:
    if listed := _LISTED.search(rest):
        return [_ints(one) for one in re.findall(r"\{([\d,]+)\}", listed[1])]
    # [groups,size]<=[dims]T(permutation): ids in order, reshaped, transposed, cut into groups.
    if iota := _GROUPS.search(rest):
        count, size, dims, permutation = iota.groups()
        return _ids(dims, permutation).reshape(int(count), int(size)).tolist()
    # A mesh of such ids with named axes, and the axes along which devices exchange data.
    if mesh := _MESH.search(rest):
        axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])]
        sizes = [size for _, size in axes]
        ids = _ids(mesh[2] or str(math.prod(sizes)), mesh[3]).reshape(sizes)
        along = mesh[4].replace("'", "").replace(" ", "").split(",")
        if not set(along) <= {name for name, _ in axes}:
            raise ValueError(f"axes {mesh[4]} of {mesh[1]}: parts of axes are not understood")
        last = [i for i, (name, _) in enumerate(axes) if name in along]
        order = [i for i in range(len(axes)) if i not in last] + last
        return ids.transpose(order).reshape(-1, math.prod(sizes[i] for i in last)).tolist()
    raise ValueError(f"no groups of devices are understood in {rest[:300]!r}")


def _ids(dims: str, permutation: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(permutation)) if permutation else ids


def _ints(text: str) -> list[int]:
    return [int(i) for i in text.split(",") if i]


def _dims(shape: str) -> list[int]:
    return _ints(_ARRAY.search(shape)[2])


def _bytes(shape: str) -> int:
    """Of an array, or of all in a tuple."""

    def width(dtype: str) -> int:
        return BYTES[dtype] if dtype in BYTES else int(re.search(r"\d+", dtype)[0]) // 8

    return sum(width(dtype) * math.prod(_ints(dims)) for dtype, dims in _ARRAY.findall(shape))
