"""How long a compiled program takes at least: every kernel at the roofline of a chip.

The scheduled program is walked in its order. A kernel takes the longer of its FLOPs at the chip's
peak and its bytes at the bandwidth of the HBM. A collective that runs beside kernels is *exposed*
for as long as it still runs when its result is awaited. Loops count as often as they run.

So the time is a lower bound. No kernel reaches the peak, and none of them is measured here.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from dpojax.chips import Chip
from dpojax.planning import hlo
from dpojax.planning.hlo import Instruction, Program

# What costs nothing: names for bytes that are there already.
FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")
    + ("partition-id", "replica-id", "add-dependency", "opt-barrier")
)
# A start of one of these moves bytes between the HBM and a chip's own memory, beside kernels.
MOVES = ("copy", "slice")
# Matrix products of an attention kernel, of 2 x heads x T^2 x head_dim FLOPs each. cuDNN computes
# all scores of a row. The others leave out what no token sees: half of them or more. Splash runs
# twice, over each token's branch and over its prompt, which together are one such half.
ATTENTION = {
    "splash_mha_fwd": 2 / 4,
    "splash_mha_dq": 3 / 4,
    "splash_mha_dkv": 4 / 4,
    "flash_forward": 2 / 2,
    "flash_query_gradient": 3 / 2,
    "flash_key_gradient": 4 / 2,
    "SoftmaxBackward": 5,  # cuDNN's fmha...
    "fmha": 2,
}
MAX_HEAD_DIM = 512


class Roofline(NamedTuple):
    """What one run of a program costs a chip.

    Attributes:
      flops: of matrix products, attention kernels included.
      hbm_bytes: that kernels read and write.
      collective_bytes: by kind; of the whole array that is gathered or reduced.
      kernel_seconds: at the roofline, one kernel after the other.
      collective_seconds: on the links, exposed or not.
      exposed_seconds: by kind of collective, and `copy` for moves that kernels wait for.
      unread: kernels whose FLOPs nobody knows, by name, with how often they run.
    """

    flops: float
    hbm_bytes: float
    collective_bytes: dict[str, float]
    kernel_seconds: float
    collective_seconds: float
    exposed_seconds: dict[str, float]
    unread: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.kernel_seconds + sum(self.exposed_seconds.values())


class Loop(NamedTuple):
    """A loop that runs as often as its data say: over the micro-batches of a bucket, for example.

    trips: how often it runs, on average. row_length: columns of a row in it.
    """

    trips: float
    row_length: int


def roofline(text: str, chip: Chip, *, row_length: int = 0, loops: Sequence[Loop] = ()) -> Roofline:
    """Walk the text of a compiled program.

    Args:
      text: of `compiled.as_text()`.
      chip: whose peaks count.
      row_length: columns of a row, by which attention kernels are counted.
      loops: what the loops do whose text does not say how often they run, in their order. Where
        there are more of them in the text, they begin again: an objective in two passes.

    Raises:
      ValueError: a loop does not say how often it runs, and `loops` does not either.
    """
    walk = _Walk(hlo.parse(text), chip, row_length, loops)
    walk.computation(walk.program.entry, often=1.0)
    return Roofline(
        flops=walk.sums["flops"],
        hbm_bytes=walk.sums["bytes"],
        collective_bytes=dict(walk.collective_bytes),
        kernel_seconds=walk.sums["kernels"],
        collective_seconds=walk.sums["collectives"],
        exposed_seconds=dict(walk.exposed),
        unread=dict(walk.unread),
    )


class _Begun(NamedTuple):
    """Something that runs beside kernels: when it began, how long it takes, and what it is."""

    clock: float
    seconds: float
    kind: str


class _Walk:
    """The state of a walk: a clock, which stands at the kernels of one run, and sums over all."""

    def __init__(self, program: Program, chip: Chip, row_length: int, loops: Sequence[Loop]):
        self.program, self.chip, self.row_length = program, chip, row_length
        self.loops = itertools.cycle(loops)
        self.clock = 0.0
        self.begun: dict[str, _Begun] = {}
        self.sums: Counter[str] = Counter()
        self.collective_bytes: Counter[str] = Counter()
        self.exposed: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()

    def computation(self, name: str, often: float) -> None:
        """Run a computation once by the clock; it counts `often` times in the sums."""
        instructions = self.program.computations[name]
        shapes = {one.name: one.shape for one in instructions}
        for one in instructions:
            if one.opcode == "while":
                self._loop(one, often)
            elif one.opcode == "conditional":
                # The longer branch: the other one keeps the state where a step is not finite.
                branches = [x for x in one.called if x in self.program.computations]
                longest = max(branches, key=lambda x: len(self.program.computations[x]))
                self.computation(longest, often)
            elif one.opcode == "call":
                self.computation(one.called[0], often)
            elif one.opcode not in FREE:
                self._instruction(one, shapes, often)

    def _loop(self, one: Instruction, often: float) -> None:
        count = self.program.trip_count(one)
        outer = self.row_length
        if math.isnan(count):
            loop = next(self.loops, None)
            if loop is None:
                raise ValueError(f"{one.name}: a loop that does not say how often it runs")
            count, self.row_length = loop
        began = self.clock
        self.computation(one.attribute(r"body=%?([\w.-]+)"), often * count)
        self.clock = began + count * (self.clock - began)
        self.row_length = outer

    def _instruction(self, one: Instruction, shapes: dict[str, str], often: float) -> None:
        moved = one.opcode.rsplit("-", 1)[0] if one.opcode.endswith(("-start", "-done")) else ""
        fused = _fused_collective(one, self._inner)
        if one.opcode.endswith("-done") or fused == "done":
            self._wait(one.operands[0] if fused != "done" else self._channel(one), often)
        elif one.kind or fused == "start" or self._async_collective(one):
            inner = self._async_collective(one) or self._inner_collective(one) or one
            name = self._channel(one) if fused == "start" else one.name
            waits = not one.opcode.endswith("-start") and fused != "start"
            self._collective(inner, name, often, waits='is_sync":true' in one.rest or waits)
        elif moved in MOVES:
            size = max(hlo.array_bytes(one.shape), default=0)
            self.sums["bytes"] += often * size
            self.begun[one.name] = _Begun(self.clock, size / self.chip.bandwidth, "copy")
        else:
            self._kernel(one, shapes, often)

    def _kernel(self, one: Instruction, shapes: dict[str, str], often: float) -> None:
        flops = self._flops(one, shapes, often)
        size = self._traffic(one, shapes)
        peak = (
            self.chip.float32_flops if _in_float32(self.program, one, shapes) else self.chip.flops
        )
        seconds = max(flops / peak, size / self.chip.bandwidth)
        self.clock += seconds
        self.sums["flops"] += often * flops
        self.sums["bytes"] += often * size
        self.sums["kernels"] += often * seconds

    def _collective(self, one: Instruction, name: str, often: float, *, waits: bool) -> None:
        devices = max(map(len, hlo.groups_of(one)))
        if devices < 2:
            return
        size, kind = hlo.collective_bytes(one, devices), self._kind(one)
        share = 1.0 if kind == "collective-permute" else (devices - 1) / devices
        rounds = 2 if kind == "all-reduce" else 1
        link = self.chip.link
        if kind == "collective-permute" and self.chip.platform == "tpu":
            link /= 2  # one direction
        seconds = rounds * share * size / link
        self.collective_bytes[kind] += often * size
        self.sums["collectives"] += often * seconds
        self.begun[name] = _Begun(self.clock, seconds, kind)
        if waits:
            self._wait(name, often)

    def _wait(self, name: str, often: float) -> None:
        begun = self.begun.pop(name, None)
        if begun is None:
            return
        rest = max(0.0, begun.seconds - (self.clock - begun.clock))
        self.clock += rest
        self.exposed[begun.kind] += often * rest

    def _kind(self, one: Instruction) -> str:
        """A TPU's reduce-scatter is an all-reduce in a computation that keeps a part of it."""
        for name, instructions in self.program.computations.items():
            if name.startswith("all-reduce-scatter") and one in instructions:
                return "reduce-scatter"
        return one.kind

    def _inner(self, one: Instruction) -> Iterator[Instruction]:
        for name in one.called:
            yield from self.program.computations.get(name, [])

    def _inner_collective(self, one: Instruction) -> Instruction | None:
        return next((x for x in self._inner(one) if x.kind), None)

    def _async_collective(self, one: Instruction) -> Instruction | None:
        """The collective of a generic `async-start`, or of a fusion around one and nothing else."""
        if one.opcode == "async-start" or (
            one.opcode == "fusion" and "all-reduce-scatter" in one.attribute(r"calls=%?([\w.-]+)")
        ):
            return self._inner_collective(one)
        return None

    def _channel(self, one: Instruction) -> str:
        inner = self._inner_collective(one)
        return f"channel {inner.fused_channel}" if inner else ""

    def _flops(self, one: Instruction, shapes: dict[str, str], often: float) -> float:
        if one.opcode == "fusion":
            return sum(
                self._flops(inner, {x.name: x.shape for x in self._inner(one)}, often)
                for inner in self._inner(one)
                if inner.opcode not in FREE
            )
        if one.opcode == "custom-call" and (name := _kernel_name(one)):
            if flops := _attention_flops(name, one, shapes, self.row_length):
                return flops
            self.unread[re.sub(r"[.\d]+$", "", name)] += often
        return hlo.instruction_flops(one, shapes)

    def _traffic(self, one: Instruction, shapes: dict[str, str]) -> float:
        """Bytes between the HBM and a chip for one kernel."""
        if one.opcode == "dynamic-update-slice":
            return 2.0 * _in_hbm(shapes[one.operands[1]])
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2.0 * _in_hbm(one.shape)
        if one.opcode != "fusion":
            return float(_in_hbm(one.shape) + sum(_in_hbm(shapes[x]) for x in one.operands))
        callee = one.attribute(r"calls=%?([\w.-]+)")
        read = sum(
            min(_in_hbm(shapes[operand]), self._read(callee, place))
            for place, operand in enumerate(one.operands)
        )
        return read + min(_in_hbm(one.shape), self._written(callee, None))

    def _read(self, name: str, place: int) -> float:
        """Bytes that a fused computation reads of a parameter: of slices, just these."""
        instructions = self.program.computations[name]
        parameter = next(
            x for x in instructions if x.opcode == "parameter" and x.rest.startswith(f"{place})")
        )
        return self._read_of(instructions, parameter)

    def _read_of(self, instructions: list[Instruction], one: Instruction) -> float:
        total = 0.0
        for user in instructions:
            if one.name not in user.operands:
                continue
            if user.opcode in ("bitcast", "reshape"):
                total += self._read_of(instructions, user)
            elif user.opcode in ("dynamic-slice", "slice", "gather"):
                total += sum(hlo.array_bytes(user.shape))
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == one.name:
                pass  # in place: what is written there counts as written
            elif user.opcode == "fusion":
                callee = user.attribute(r"calls=%?([\w.-]+)")
                total += self._read(callee, user.operands.index(one.name))
            elif user.opcode != "tuple":  # a tuple passes it through
                return sum(hlo.array_bytes(one.shape))
        return total

    def _written(self, name: str, root: Instruction | None) -> float:
        """Bytes that a fused computation writes: of an update in place, just the update."""
        instructions = self.program.computations[name]
        local = {x.name: x for x in instructions}
        root = root or instructions[-1]
        if root.opcode == "tuple":
            return sum(self._written(name, local[x]) for x in root.operands)
        if root.opcode in ("bitcast", "reshape"):
            return self._written(name, local[root.operands[0]])
        if root.opcode == "dynamic-update-slice":
            return sum(hlo.array_bytes(local[root.operands[1]].shape))
        if root.opcode == "parameter":
            return 0.0
        return sum(hlo.array_bytes(root.shape))


def _fused_collective(
    one: Instruction, inside: Callable[[Instruction], Iterator[Instruction]]
) -> str:
    """Whether a TPU's fusion starts or ends a collective that runs beside several fusions."""
    if one.opcode != "fusion":
        return ""
    targets = (x.attribute(r'custom_call_target="AsyncCollective(\w+)"') for x in inside(one))
    return next((target.lower() for target in targets if target), "")


def _in_float32(program: Program, one: Instruction, shapes: dict[str, str]) -> bool:
    """Whether a kernel has a matrix product of float32 numbers."""
    if one.opcode == "fusion":
        inner = [x for name in one.called for x in program.computations.get(name, [])]
        local = {x.name: x.shape for x in inner}
        return any(_in_float32(program, x, local) for x in inner)
    product = hlo.instruction_flops(one, shapes) > 0
    return product and all(shapes[name].startswith("f32") for name in one.operands[:2])


def _attention_flops(name: str, one: Instruction, shapes: dict[str, str], row_length: int) -> float:
    """FLOPs of a kernel of `ATTENTION`; 0 for others."""
    for attention, products in ATTENTION.items():
        if attention in name:
            sizes = [hlo.dims(shapes[x]) for x in one.operands]
            # Of queries or keys; a bias, [R, 1, T, T], may have more numbers.
            numbers = max(math.prod(x) for x in sizes if x and x[-1] <= MAX_HEAD_DIM)
            return 2.0 * products * numbers * row_length
    return 0.0


def _kernel_name(one: Instruction) -> str:
    """The name of a kernel that is no product of cuBLAS; "" for calls that compute nothing."""
    target = one.attribute(r'custom_call_target="([^"]*)"')
    if target == "tpu_custom_call":
        return one.name
    if "triton" in target:
        return one.attribute(r'\bname = "([^"]+)"') or one.name
    return target if "fmha" in target else ""


def _in_hbm(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in the HBM, and not in another memory of the chip."""
    total = 0
    for array in re.finditer(r"\b[a-z]+\d*\w*\[[\d,]*\](\{[^}]*\})?", shape):
        if "S(" not in (array[1] or ""):
            total += sum(hlo.array_bytes(array[0].split("{")[0]))
    return total
