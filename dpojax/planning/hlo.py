"""What a compiled program does, read from its text: its collectives and its matrix products.

    text = jax.jit(step).lower(...).compile().as_text()

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs.
Programs of CPUs, GPUs and TPUs are read. They differ: a product is a `dot` on CPUs, a `dot` in a
fusion or a call of cuBLAS on GPUs, and a `convolution` on TPUs.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "bf16": 2, "token": 0}  # of the others the name says the bits

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\((.*)$")
_NAME = re.compile(r"%([\w.-]+)")
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
_DIM_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


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


class Instruction(NamedTuple):
    """One line: `%name = shape opcode(%operands), attributes`. `rest` is all behind the opcode."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """The names of what it reads."""
        return _NAME.findall(self.rest[: _closing(self.rest)])

    @property
    def called(self) -> list[str]:
        """The names of the computations that it runs."""
        return [name for one in _CALLED.findall(self.rest) for name in re.findall(r"[\w.-]+", one)]

    @property
    def kind(self) -> str:
        """The collective that it is or starts, of KINDS; "" for everything else."""
        name = self.opcode.removesuffix("-start")
        return name if name in KINDS else ""

    @property
    def fused_channel(self) -> str:
        """The channel of a collective that a TPU runs beside several fusions; "" for others."""
        return self.attribute(r'channel_id=(\d+),.*"async_collective_fusion_config"')

    def attribute(self, pattern: str) -> str:
        """The first group of a regular expression among the attributes; "" if there is none."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""


class Program(NamedTuple):
    """The computations of a compiled program, in the order of its text: callers after callees."""

    computations: dict[str, list[Instruction]]

    @property
    def entry(self) -> str:
        return next(reversed(self.computations))

    def trip_count(self, loop: Instruction) -> float:
        """How often the body of a `while` runs; NaN where the text does not say.

        GPU and CPU programs say it. Those of TPUs are read: a counter starts at 0, the condition
        compares it with a constant, and the body adds 1 to it, or 2 where it was unrolled.
        """
        if count := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}'):
            return int(count)
        condition = self.computations.get(loop.attribute(r"condition=%?([\w.-]+)"), [])
        constants = _constants(condition)
        if condition and condition[-1].opcode == "compare" and "direction=LT" in condition[-1].rest:
            limits = [constants[name] for name in condition[-1].operands if name in constants]
            if len(limits) == 1:
                return math.ceil(limits[0] / self._counter_step(loop, condition))
        return math.nan

    def _counter_step(self, loop: Instruction, condition: list[Instruction]) -> int:
        """What the body of a loop adds to the counter that its condition compares; 1 if unknown."""
        local = {one.name: one for one in condition}
        counters = [local[name] for name in condition[-1].operands if name in local]
        places = [one.attribute(r"index=(\d+)") for one in counters if "index=" in one.rest]
        body = self.computations.get(loop.attribute(r"body=%?([\w.-]+)"), [])
        if not places or not body or int(places[0]) >= len(body[-1].operands):
            return 1
        by_name, constants = {one.name: one for one in body}, _constants(body)
        new = by_name.get(body[-1].operands[int(places[0])])
        while new is not None and new.opcode in ("copy", "bitcast"):
            new = by_name.get(new.operands[0])
        if new is None or new.opcode != "add":
            return 1
        return next((constants[name] for name in new.operands if constants.get(name)), 1)


def _constants(instructions: list[Instruction]) -> dict[str, int]:
    """The whole numbers among constants, by name."""
    return {
        one.name: int(number)
        for one in instructions
        if one.opcode == "constant" and (number := one.rest.split(")")[0]).isdigit()
    }


def parse(text: str) -> Program:
    """Read the text of a compiled program."""
    computations: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computations[head[1]] = []
        elif (instruction := _INSTRUCTION.match(line)) and computations:
            next(reversed(computations.values())).append(Instruction(*instruction.groups()))
    return Program(computations)


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program in which more than one device takes part.

    Raises:
      ValueError: what is written there is not understood, or a loop with a collective does not say
        how often it runs.
    """
    program, used = parse(text), []
    started: set[str] = set()  # TPU programs repeat one in each fusion that it runs beside
    for times, instructions in _counted(program):
        for one in instructions:
            if not one.kind:
                continue
            groups = groups_of(one)
            widest = max(map(len, groups))
            if channel := one.fused_channel:
                if channel in started:
                    continue
                started.add(channel)
            if widest > 1:
                size = collective_bytes(one, widest)
                used.append(Collective(one.kind, _known(times, one), size, groups))
    return used


def collective_bytes(one: Instruction, devices: int) -> int:
    """`Collective.size` of a collective, or of the start of one, among so many devices."""
    arrays = array_bytes(one.shape)
    if one.opcode == one.kind:
        return sum(arrays) * (devices if one.kind == "reduce-scatter" else 1)
    if one.kind == "all-reduce":
        return sum(arrays)  # the result alone
    # A start gives its operands and its results, of which some may be tuples.
    operands, results = arrays[: len(one.operands)], arrays[len(one.operands) :]
    return max(sum(operands), sum(results[: len(operands)]))


def crossing_collectives(text: str, devices: int) -> list[str]:
    """The names of the collectives in which devices of more than one member take part.

    Args:
      text: of a compiled program on a mesh whose first axis is that of the members.
      devices: that one place of this axis has. The first so many ids are of the first place.

    Raises:
      ValueError: the groups of a collective are not understood.
    """
    names = []
    for instructions in parse(text).computations.values():
        for one in instructions:
            # Whatever its opcode is: what names groups or pairs of devices moves data among them.
            if "replica_groups=" in one.rest or "source_target_pairs=" in one.rest:
                groups = groups_of(one)
                if any(len({device // devices for device in group}) > 1 for group in groups):
                    names.append(one.name)
    return names


def product_flops(text: str) -> float:
    """FLOPs of all matrix products of a compiled program: 2 for each multiplication.

    Kernels of Pallas and cuDNN are not looked into.

    Raises:
      ValueError: a loop with a product does not say how often it runs.
    """
    program, total = parse(text), 0.0
    for times, instructions in _counted(program):
        shapes = {one.name: one.shape for one in instructions}
        for one in instructions:
            if flops := instruction_flops(one, shapes):
                total += _known(times, one) * flops
    return total


def instruction_flops(one: Instruction, shapes: dict[str, str]) -> float:
    """FLOPs of one matrix product; 0 for anything else.

    Args:
      one: the instruction. A fusion is 0: its own instructions are counted.
      shapes: of the instructions of its computation, by name.
    """
    if one.opcode == "dot":
        inner = [
            int(i) for i in one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}").split(",") if i
        ]
        return _dot_flops(one, shapes, inner)
    if one.opcode == "custom-call" and "gemm" in one.attribute(r'custom_call_target="([^"]*)"'):
        inner = re.findall(r"\d+", one.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]'))
        return _dot_flops(one, shapes, [int(i) for i in inner])
    if one.opcode == "convolution":
        return _convolution_flops(one, shapes)
    return 0.0


def _dot_flops(one: Instruction, shapes: dict[str, str], inner: list[int]) -> float:
    left = dims(shapes[one.operands[0]])
    return 2.0 * math.prod(dims(one.shape)) * math.prod(left[i] for i in inner)


def _convolution_flops(one: Instruction, shapes: dict[str, str]) -> float:
    """A product that is written as a convolution has FLOPs where the window meets numbers.

    The window may reach into padding, or into the holes of a dilated array: batched products are
    written so. These positions cost nothing and are not counted.
    """
    left_labels, right_labels, out_labels = _DIM_LABELS.search(one.rest).groups()
    left, right = (
        dict(zip(labels, dims(shapes[name])))
        for labels, name in zip((left_labels, right_labels), one.operands)
    )
    out = dict(zip(out_labels, dims(one.shape)))
    spatial = [label for label in out_labels if label.isdigit()]
    window = one.attribute(r"window=\{([^}]*)\}")
    positions = 1
    for place, label in enumerate(spatial):
        positions *= _meetings(
            left[label], right[label], out[label], **_window_at(window, place, len(spatial))
        )
    return 2.0 * out["b"] * out["f"] * right["i"] * positions


def _window_at(window: str, place: int, count: int) -> dict[str, int]:
    """The window's stride, padding and dilations in one dimension."""

    def numbers(key: str, default: str) -> str:
        written = re.search(rf"\b{key}=(\S+)", window)
        return (written[1].split("x") if written else [default] * count)[place]

    low = numbers("pad", "0_0").split("_")[0]
    return {
        "stride": int(numbers("stride", "1")),
        "low": int(low),
        "left_dilation": int(numbers("lhs_dilate", "1")),
        "right_dilation": int(numbers("rhs_dilate", "1")),
    }


@functools.cache
def _meetings(
    left: int,
    right: int,
    out: int,
    *,
    stride: int,
    low: int,
    left_dilation: int,
    right_dilation: int,
) -> int:
    """How many pairs of a result and a window's number meet a number of the array."""
    places = np.arange(out)[:, None] * stride + np.arange(right)[None] * right_dilation - low
    return int(
        (
            (places >= 0)
            & (places < (left - 1) * left_dilation + 1)
            & (places % left_dilation == 0)
        ).sum()
    )


def _counted(program: Program) -> Iterator[tuple[float, list[Instruction]]]:
    """(how often it runs, its instructions) of every computation; NaN if nobody knows."""
    times = dict.fromkeys(program.computations, 0.0)
    times[program.entry] = 1.0
    for name in reversed(program.computations):  # every caller stands after its callees
        for one in program.computations[name]:
            often = times[name]
            if one.opcode == "while":
                often *= program.trip_count(one)
            for callee in one.called:
                times[callee] += often
        yield times[name], program.computations[name]


def _known(times: float, one: Instruction) -> int:
    if math.isnan(times):
        raise ValueError(f"{one.name}: in a loop that does not say how often it runs")
    return int(times)


def groups_of(one: Instruction) -> list[list[int]]:
    """The groups of device ids that a collective works among.

    Raises:
      ValueError: they are written in a form that is not understood.
    """
    rest = one.rest
    if listed := _LISTED.search(rest):
        return [_ints(one) for one in re.findall(r"\{([\d,]+)\}", listed[1])]
    # [groups,size]<=[dims]T(permutation): ids in order, reshaped, transposed, cut into groups.
    if iota := _GROUPS.search(rest):
        count, size, sizes, permutation = iota.groups()
        return _ids(sizes, permutation).reshape(int(count), int(size)).tolist()
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


def dims(shape: str) -> list[int]:
    """The sizes of an array: [32, 8] of `f32[32,8]{1,0}`."""
    return _ints(_ARRAY.search(shape)[2])


def array_bytes(shape: str) -> list[int]:
    """Bytes of an array, or of each array of a tuple."""

    def width(dtype: str) -> int:
        return BYTES[dtype] if dtype in BYTES else int(re.search(r"\d+", dtype)[0]) // 8

    return [width(dtype) * math.prod(_ints(sizes)) for dtype, sizes in _ARRAY.findall(shape)]


def _ids(sizes: str, permutation: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_ints(sizes))).reshape(_ints(sizes))
    return ids.transpose(_ints(permutation)) if permutation else ids


def _ints(text: str) -> list[int]:
    return [int(i) for i in text.split(",") if i]


def _closing(rest: str) -> int:
    """Where the parenthesis that was opened before `rest` closes."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place
    return len(rest)
