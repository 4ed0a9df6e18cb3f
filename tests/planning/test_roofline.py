"""The time of a program at the roofline is the one that closed forms give."""

import dataclasses

import pytest

from dpojax.chips import CHIPS
from dpojax.planning.roofline import Loop, roofline

# 1,000 FLOP/s, 100 bytes/s of memory and 10 bytes/s of links.
CHIP = dataclasses.replace(CHIPS["h200"], flops=1000.0, bandwidth=100.0, link=10.0)

HEAD = """HloModule by_hand

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""
PRODUCT_FLOPS = 2 * 4 * 8 * 8
PRODUCT_BYTES = 4 * (4 * 8 + 8 * 8 + 4 * 8)
PRODUCT = "dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def entry(*lines: str) -> str:
    """A program of x, w and these lines; the last one is the root."""
    body = "\n".join(f"  {line}" for line in lines[:-1])
    return (
        "\nENTRY %main (x: f32[4,8], w: f32[8,8]) -> f32[4,8] {\n"
        "  %x = f32[4,8]{1,0} parameter(0)\n"
        f"  %w = f32[8,8]{{1,0}} parameter(1)\n{body}\n  ROOT {lines[-1]}\n}}\n"
    )


def test_a_kernel_takes_the_longer_of_its_flops_and_its_bytes():
    text = HEAD + entry(f"%y = f32[4,8]{{1,0}} {PRODUCT}")
    slow_memory = roofline(text, CHIP)
    assert slow_memory.flops == PRODUCT_FLOPS
    assert slow_memory.hbm_bytes == PRODUCT_BYTES
    assert slow_memory.seconds == pytest.approx(PRODUCT_BYTES / 100)


@pytest.mark.parametrize(
    ("chip", "dtype", "speed"), [("h200", "bf16", 1), ("h200", "f32", 1 / 2), ("v5e", "f32", 1)]
)
def test_products_of_float32_numbers_run_at_half_of_a_gpu_s_peak(chip, dtype, speed):
    """As NVIDIA's page has it: 989 TFLOP/s of TF32 with sparsity, half of that without."""
    text = (HEAD + entry(f"%y = f32[4,8]{{1,0}} {PRODUCT}")).replace("f32[", f"{dtype}[")
    slow_units = dataclasses.replace(CHIPS[chip], flops=1000.0, bandwidth=1e6)
    assert roofline(text, slow_units).seconds == pytest.approx(PRODUCT_FLOPS / 1000 / speed)


def gather(kernel: str = "") -> str:
    """A product, beside an all-gather that takes 256 bytes x 3/4 / 10 = 19.2 s."""
    lines = [
        "%s = (f32[2,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p), "
        "replica_groups={{0,1,2,3}}, dimensions={0}",
        *([kernel] if kernel else []),
        "%d = f32[8,8]{1,0} all-gather-done(%s)",
    ]
    return HEAD + entry(*lines)


def test_a_collective_is_exposed_for_as_long_as_no_kernel_hides_it():
    alone = roofline(gather(), CHIP)
    assert alone.collective_bytes == {"all-gather": 4 * 8 * 8}
    assert alone.exposed_seconds["all-gather"] == pytest.approx(19.2)
    beside = roofline(gather(f"%y = f32[4,8]{{1,0}} {PRODUCT}"), CHIP)
    assert beside.collective_seconds == pytest.approx(19.2)
    assert beside.exposed_seconds["all-gather"] == pytest.approx(19.2 - PRODUCT_BYTES / 100)
    assert beside.seconds == pytest.approx(19.2)
    hidden = roofline(
        gather(f"%y = f32[4,8]{{1,0}} {PRODUCT}"), dataclasses.replace(CHIP, bandwidth=1.0)
    )
    assert hidden.exposed_seconds["all-gather"] == 0
    assert hidden.seconds == pytest.approx(PRODUCT_BYTES)


def test_an_all_reduce_goes_round_twice_and_hides_behind_nothing_where_it_is_synchronous():
    reduce = "%r = f32[4,8]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add"
    line = roofline(HEAD + entry(reduce, f"%y = f32[4,8]{{1,0}} {PRODUCT}"), CHIP)
    assert line.exposed_seconds["all-reduce"] == pytest.approx(2 * 128 / 2 / 10)
    assert line.seconds == pytest.approx(2 * 128 / 2 / 10 + PRODUCT_BYTES / 100)


LOOP = """
%body (c: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %c = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%c), index=1
  %w = f32[8,8]{1,0} constant({...})
  %y = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %n = (s32[], f32[4,8]{1,0}) tuple(%i, %y)
}

%until (c.1: (s32[], f32[4,8])) -> pred[] {
  %c.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%c.1), index=0
  %most = s32[] LIMIT
  ROOT %go = pred[] compare(%j, %most), direction=LT
}
"""
WHILE = "%l = (s32[], f32[4,8]{1,0}) while(%t), condition=%until, body=%body"


def test_a_loop_counts_as_often_as_its_condition_says():
    line = roofline(HEAD + LOOP.replace("LIMIT", "constant(12)") + entry(WHILE), CHIP)
    assert line.flops == 12 * PRODUCT_FLOPS
    assert line.seconds == pytest.approx(12 * PRODUCT_BYTES / 100)


def test_a_loop_over_data_runs_as_often_as_the_caller_says():
    text = HEAD + LOOP.replace("LIMIT", "parameter(1)") + entry(WHILE)
    assert roofline(text, CHIP, loops=[Loop(2.5, 8)]).flops == 2.5 * PRODUCT_FLOPS
    with pytest.raises(ValueError, match="does not say how often"):
        roofline(text, CHIP)


FUSED = """
%slice (p: f32[12,4,8], k: s32[]) -> f32[4,8] {
  %p = f32[12,4,8]{2,1,0} parameter(0)
  %k = s32[] parameter(1)
  %one = f32[1,4,8]{2,1,0} dynamic-slice(%p, %k, %k, %k), dynamic_slice_sizes={1,4,8}
  ROOT %same = f32[4,8]{1,0} bitcast(%one)
}

%update (q: f32[12,4,8], v: f32[1,4,8], m: s32[]) -> f32[12,4,8] {
  %q = f32[12,4,8]{2,1,0} parameter(0)
  %v = f32[1,4,8]{2,1,0} parameter(1)
  %m = s32[] parameter(2)
  ROOT %new = f32[12,4,8]{2,1,0} dynamic-update-slice(%q, %v, %m, %m, %m)
}
"""


def test_a_fusion_moves_only_the_slices_that_it_reads_and_writes():
    read = "%f = f32[4,8]{1,0} fusion(%all, %k), kind=kLoop, calls=%slice"
    all_ = "%all = f32[12,4,8]{2,1,0} parameter(2)"
    number = "%k = s32[] parameter(3)"
    line = roofline(HEAD + FUSED + entry(all_, number, read), CHIP)
    assert line.hbm_bytes == 2 * 4 * 4 * 8 + 4  # the slice, read and written, and its place
    part = "%v = f32[1,4,8]{2,1,0} parameter(4)"
    write = "%g = f32[12,4,8]{2,1,0} fusion(%all, %v, %k), kind=kLoop, calls=%update"
    line = roofline(HEAD + FUSED + entry(all_, number, part, write), CHIP)
    assert line.hbm_bytes == 2 * 4 * 4 * 8 + 4  # the update, read and written, and its place


def test_what_lies_in_the_chip_s_own_memory_costs_no_bytes_of_the_hbm():
    near = "%y = f32[4,8]{1,0:T(8,128)S(1)} add(%u, %u)"
    from_near = "%u = f32[4,8]{1,0:T(8,128)S(1)} parameter(2)"
    assert roofline(HEAD + entry(from_near, near), CHIP).hbm_bytes == 0


@pytest.mark.parametrize(
    ("shapes", "attributes", "flops"),
    [
        # A plain product [4,8] x [8,16], as a convolution of size 1.
        (
            ("f32[4,8]{1,0}", "f32[8,16]{1,0}", "f32[4,16]{1,0}"),
            "dim_labels=bf_io->bf",
            2 * 4 * 8 * 16,
        ),
        # A sum over two axes, of 2 and of 8, of which one is the window.
        (
            ("f32[4,2,8]{2,1,0}", "f32[2,8,16]{2,1,0}", "f32[4,16,1]{1,0,2}"),
            "window={size=2}, dim_labels=b0f_0io->bf0",
            2 * 4 * 2 * 8 * 16,
        ),
        # Five products [4,8] x [8,16]: the window meets one number of the dilated array each time.
        (
            ("f32[5,4,8]{2,1,0}", "f32[5,8,16]{2,1,0}", "f32[5,4,16]{2,1,0}"),
            "window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0io->0bf",
            5 * 2 * 4 * 8 * 16,
        ),
        # An outer product over an axis of 2: the window reaches into padding.
        (
            ("f32[4,8]{1,0}", "f32[8,2,16]{2,1,0}", "f32[4,2,16]{0,2,1}"),
            "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
            2 * 4 * 8 * 2 * 16,
        ),
    ],
)
def test_products_that_a_tpu_writes_as_convolutions_have_the_flops_of_products(
    shapes, attributes, flops
):
    left, right, out = shapes
    if "bf0_" in attributes:
        left = "f32[4,8,1]{1,0,2}"
    text = (
        f"{HEAD}\nENTRY %main (l: f32[4], r: f32[8]) -> f32[4] {{\n  %l = {left} parameter(0)\n"
        f"  %r = {right} parameter(1)\n  ROOT %c = {out} convolution(%l, %r), {attributes}\n}}\n"
    )
    assert roofline(text, CHIP).flops == flops
