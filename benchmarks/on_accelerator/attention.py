"""Every kernel of attention against plain attention: python -m benchmarks.on_accelerator.attention

Results and gradients of each kernel that the device has, for several layouts of rows, heads and
dtypes, held against plain attention in float32 and the bound of `rounding.py`. Then their times and
memory, forward and backward, at the size of a layer; the kernels take turns.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.on_accelerator.entries import Section, first_line, leave_out, tell
from benchmarks.on_accelerator.rounding import Numbers, bounds, exact
from dpojax.data.examples import Example
from dpojax.data.packing import Shape
from dpojax.data.rows import collate
from dpojax.models import flash, kernels, splash
from dpojax.models.attention import Kernel, PlainRows, attention_mask
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.training.memory import temporary_bytes

CHECKED = 0.65  # of the time: for checks; the rest is for times


class Layout(NamedTuple):
    """Rows of examples of random lengths, and the heads that meet in them.

    Attributes:
      responses: of each example; 0: a row is one sequence, as in causal attention.
      examples: of a row.
      window: how many positions a token sees; 0 for all.
    """

    name: str
    heads: int
    kv_heads: int
    responses: int = 0
    examples: int = 1
    window: int = 0
    dim: int = 64


LAYOUTS = (
    Layout("causal", 20, 20),
    Layout("grouped heads", 32, 8),
    Layout("packed segments", 32, 8, responses=1, examples=7),
    Layout("shared prompts", 32, 8, responses=2, examples=4),
    Layout("shared prompts, window", 32, 8, responses=4, examples=2, window=300),
    Layout("shared prompts, 128 wide", 16, 4, responses=2, examples=3, dim=128),
)
ROWS, COLUMNS = 2, 2048
SMALL_COLUMNS = 200  # of which xla makes two stretches
TIMED = (Layout("grouped heads", 32, 8), Layout("shared prompts", 32, 8, 2, 4))
DTYPES = ("bfloat16", "float32")
# What CPUs check, where interpreted kernels take long to compile.
SMALL = {"bfloat16": ("grouped heads",), "float32": ("shared prompts, window",)}


def main() -> None:
    section = Section(__doc__)
    columns = SMALL_COLUMNS if section.small else COLUMNS
    for dtype in DTYPES:
        for layout in _layouts(dtype, section):
            if section.left < (1 - CHECKED) * section.args.seconds:
                leave_out("check", layout.name, "no time was left", kernel="all", dtype=dtype)
                continue
            check(layout, columns, dtype, section.small)
    for layout in _layouts("float32", section) if section.small else TIMED:
        measure(layout, columns, section)


def _layouts(dtype: str, section: Section) -> list[Layout]:
    """What is checked in a dtype."""
    if not section.small:
        return list(LAYOUTS)
    return [_small(layout) for layout in LAYOUTS if layout.name in SMALL[dtype]]


def _small(layout: Layout) -> Layout:
    heads = 2 if layout.heads == layout.kv_heads else 4
    return layout._replace(heads=heads, kv_heads=2, dim=16, window=min(layout.window, 20))


def check(layout: Layout, columns: int, dtype: str, small: bool) -> None:
    """Tell how far each kernel is from plain attention in float32, for one layout."""
    rows, arrays = make_rows(layout, columns), make_heads(layout, columns, dtype)
    scale, window = layout.dim**-0.5, layout.window or None
    unit = float(jnp.finfo(dtype).eps) / 2
    mask = jax.jit(attention_mask, static_argnums=1)(rows, window)
    with jax.default_matmul_precision("highest"):  # or GPUs round float32 to 10 bits
        right = jax.jit(exact, static_argnums=5)(*arrays, mask, scale)
        bound = jax.jit(functools.partial(bounds, scale=scale, unit=unit))(*arrays, mask)
    for name in kernels.KERNELS:
        about = {"kernel": name, "dtype": dtype}
        kernel, reason = kernel_here(name, layout, dtype, small)
        if kernel is None:
            leave_out("check", layout.name, reason, **about)
            continue
        try:
            with jax.default_matmul_precision("highest" if dtype == "float32" else None):
                numbers = run(kernel, scale, window)(rows, *arrays)
            tell("check", layout.name, **about, **compared(numbers, right, bound, rows))
        except Exception as error:  # recorded; the other kernels go on
            tell("check", layout.name, **about, within=False, error=first_line(error))


def kernel_here(name: str, layout: Layout, dtype: str, small: bool) -> tuple[Kernel | None, str]:
    """The kernel, or None and why this device has it not; on a CPU, its program is interpreted."""
    sizes = {"width": layout.heads * layout.dim, "heads": layout.heads, "layers": 1}
    sizes |= {"kv_heads": layout.kv_heads, "mlp_width": 1, "vocab_size": 1, "max_positions": 1}
    config = DecoderConfig(**LLAMA, **sizes)
    reason = kernels.obstacle(name, config, dtype, jax.local_devices()[0])
    if not reason:
        return kernels.KERNELS[name], ""
    if not small:
        return None, f"not on this device: {reason}"
    interpreted = {
        "flash": Kernel(flash.flash_mask, functools.partial(flash.attend, interpret=True)),
        "splash": Kernel(splash.span_masks, functools.partial(splash.attend, interpret=True)),
        "cudnn": Kernel(
            attention_mask, functools.partial(kernels.attend_cudnn, implementation="xla")
        ),
    }
    return interpreted[name], ""


def run(kernel: Kernel, scale: float, window: int | None) -> Callable[..., Numbers]:
    """(rows, query, key, value, cotangent) -> results and gradients, jitted."""

    @jax.jit
    def both(rows: PlainRows, query, key, value, cotangent) -> Numbers:
        mask = kernel.mask(rows, window)

        def mix(query, key, value):
            return kernel.attend(query, key, value, mask, scale)

        mixed, back = jax.vjp(mix, query, key, value)
        # What padding gets is no kernel's promise: it has no cotangent.
        real = (rows.segment > 0)[..., None, None]
        return Numbers(mixed, *back(jnp.where(real, cotangent, 0)))

    return both


def compared(numbers: Numbers, right: Numbers, bound: Numbers, rows: PlainRows) -> dict:
    """The largest difference, the largest share of its bound, and whether it is within."""
    real = (np.asarray(rows.segment) > 0)[..., None, None]
    worst, share, where = 0.0, 0.0, ""
    for name, ours, theirs, limit in zip(Numbers._fields, numbers, right, bound, strict=True):
        ours, theirs, limit = (np.asarray(x, np.float32) for x in (ours, theirs, limit))
        gap = np.where(real, np.abs(ours - theirs), 0.0)
        of_bound = np.where(real, gap / np.maximum(limit, 1e-30), 0.0)
        worst = max(worst, float(gap.max()))
        if not of_bound.max() <= share:  # a NaN as well
            share, where = float(of_bound.max()), name
    return {"worst": worst, "of_bound": share, "where": where, "within": share <= 1}


def make_rows(layout: Layout, columns: int) -> PlainRows:
    """ROWS rows of examples of random lengths, laid out as a run does it."""
    random = np.random.default_rng(0)
    responses = max(1, layout.responses)
    each = columns // layout.examples
    examples = []
    for index in range(ROWS * layout.examples):
        parts = random.dirichlet(np.full(responses + 1, 8.0)) * each
        if not layout.responses:
            parts = np.full(2, each / 2)  # a whole row
        lengths = np.maximum(1, parts.astype(int))
        prompt, *rest = (np.zeros(n, np.int32) for n in lengths)
        examples.append(Example(str(index), prompt, tuple(rest), (False,) * responses, None))
    shape = Shape(1, ROWS, columns, columns, layout.examples, responses)
    rows = collate(examples, range(len(examples)), shape)
    return PlainRows(*(jnp.asarray(getattr(rows, name)[0]) for name in PlainRows._fields))


def make_heads(layout: Layout, columns: int, dtype: str) -> list[jax.Array]:
    """Random queries, keys, values and a cotangent."""
    counts = layout.heads, layout.kv_heads, layout.kv_heads, layout.heads
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (ROWS, columns, count, layout.dim)).astype(dtype)
        for key, count in zip(keys, counts)
    ]


def measure(layout: Layout, columns: int, section: Section) -> None:
    """Tell the milliseconds of every kernel, forward and backward, and its temporary memory."""
    rows, arrays = make_rows(layout, columns), make_heads(layout, columns, "bfloat16")
    what = f"{layout.name}, {ROWS} x {columns:,}"
    programs: dict[str, jax.stages.Compiled] = {}
    for name in kernels.KERNELS:
        kernel, reason = kernel_here(name, layout, "bfloat16", small=False)
        if kernel is None or section.left < 0.05 * section.args.seconds:
            leave_out("time", what, reason or "no time was left", kernel=name)
            continue
        try:
            programs[name] = (
                run(kernel, layout.dim**-0.5, layout.window or None).lower(rows, *arrays).compile()
            )
            jax.block_until_ready(programs[name](rows, *arrays))
        except Exception as error:
            programs.pop(name, None)
            leave_out("time", what, first_line(error), kernel=name)
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(3 if section.small else 15):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(rows, *arrays))
            samples[name].append(time.perf_counter() - began)
    for name, seconds in samples.items():
        ratios = (
            [xla / own for xla, own in zip(samples["xla"], seconds)] if "xla" in samples else []
        )
        tell(
            "time",
            what,
            kernel=name,
            ms=1e3 * statistics.median(seconds),
            times_as_fast=statistics.median(ratios) if ratios else None,
            temporary_gib=temporary_bytes(programs[name]) / 2**30,
            samples=seconds,
        )


if __name__ == "__main__":
    main()
