"""Flash attention in Pallas, interpreted on a CPU, against plain attention; and its lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from test_kernels import LAYOUTS, lowered, rows_of

from dpojax.models import flash
from dpojax.models.attention import XLA, Kernel, PlainRows, attention_mask, plain_rows
from dpojax.models.spans import spans
from tests import further

LENGTH, BLOCK = 100, 32  # of four blocks, once padded
# K = 3; K = 2; no prompt; a branch alone beyond a block.
SMALL = (((11, (5, 17, 7)), (20, (3, 9))), ((0, (13, 6)), (9, (40, 14))))


def interpreted(block=BLOCK, tile=None) -> Kernel:
    attend = functools.partial(flash.attend, tile=tile, interpret=True)
    return Kernel(functools.partial(flash.flash_mask, block=block), attend)


def small_rows() -> PlainRows:
    return rows_of(SMALL, LENGTH, gap=2)


def random_heads(heads=4, kv_heads=2, dim=16, dtype=jnp.float32):
    """Queries, keys, values and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    counts = heads, kv_heads, kv_heads, heads
    shapes = [(2, LENGTH, count, dim) for count in counts]
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes)]


def values_and_gradients(kernel, heads, *, window=None, softcap=None, scale=0.3):
    """What tokens of examples get, and what queries, keys, values and the scale get back."""
    rows, (*arrays, cotangent) = small_rows(), heads
    real = (rows.segment > 0)[..., None, None]

    @jax.jit
    def both(cotangent, scale, *arrays):
        mask = kernel.mask(rows, window)
        attend = lambda *x: kernel.attend(*x[:3], mask, x[3], softcap=softcap)
        mixed, back = jax.vjp(attend, *arrays, scale)
        return jnp.where(real, mixed, 0), *back(cotangent)

    outputs = both(jnp.where(real, cotangent, 0), jnp.float32(scale), *arrays)
    return [np.asarray(x, np.float32) for x in outputs]


@pytest.mark.parametrize(
    ("heads", "options", "tile"),
    [
        ({}, {}, None),
        ({}, {"window": 10, "softcap": 1.5}, 16),
        ({"heads": 6, "kv_heads": 1, "dim": 12}, {"window": 2}, 16),
        *further(({"heads": 2, "kv_heads": 2, "dim": 24}, {"softcap": 0.5}, 32)),
    ],
)
def test_flash_equals_plain_attention_in_values_and_gradients(heads, options, tile):
    heads = random_heads(**heads)
    outputs = values_and_gradients(interpreted(tile=tile), heads, **options)
    expected = values_and_gradients(XLA, heads, **options)
    np.testing.assert_allclose(outputs[0], expected[0], atol=2e-6)
    for a, b in zip(outputs[1:4], expected[1:4]):
        # Sums of up to thousands of products, in another order: a few roundings of the largest.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6 * max(1, np.abs(b).max()))
    # The scale's gradient is the sum of query x gradient of the query / scale over all numbers.
    # They cancel: what counts is their size, and each is rounded.
    terms = np.abs(np.asarray(heads[0]) * expected[1]).sum() / 0.3
    np.testing.assert_allclose(outputs[4], expected[4], atol=2**-24 * terms)


def test_in_bfloat16_flash_is_as_near_to_float32_as_plain_attention_is():
    exact = values_and_gradients(XLA, random_heads(), window=20, scale=0.25)[:4]
    heads = random_heads(dtype=jnp.bfloat16)
    plain, outputs = (
        values_and_gradients(kernel, heads, window=20, scale=0.25)[:4]
        for kernel in (XLA, interpreted())
    )
    errors = [[np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(x, exact)] for x in (outputs, plain)]
    assert all(0 < a < 1.1 * b for a, b in zip(*errors)), errors


@pytest.mark.slow
def test_under_vmap_over_queries_and_scales_flash_equals_plain_attention():
    rows, (query, key, value, cotangent) = small_rows(), random_heads()
    queries, scales = jnp.stack([query, 2 * query[::-1]]), jnp.array([0.2, 0.4])
    real = (rows.segment > 0)[..., None, None]

    def gradients(kernel):
        def loss(query, key, scale):
            mixed = kernel.attend(query, key, value, kernel.mask(rows, None), scale)
            return jnp.where(real, mixed * cotangent, 0).sum()

        return jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, 0)))(queries, key, scales)

    for a, b in zip(gradients(interpreted()), gradients(XLA)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 10])
def test_the_spans_are_the_plain_mask_and_padding_sees_itself(window):
    rows = rows_of(LAYOUTS)
    branch_first, prompt_first, prompt_last = (
        np.asarray(x)[..., None] for x in spans(rows, window, 300)
    )
    column = np.arange(300)
    sees = (branch_first <= column) & (column <= column[:, None])
    sees |= (prompt_first <= column) & (column <= prompt_last)
    real, mask = rows.segment > 0, np.asarray(attention_mask(rows, window))
    np.testing.assert_array_equal(sees[real], mask[real])
    np.testing.assert_array_equal(sees[~real], np.broadcast_to(np.eye(300), sees.shape)[~real])


@pytest.mark.parametrize("window", [None, 10])
def test_blocks_are_visited_if_and_only_if_a_token_sees_a_column(window):
    rows = small_rows()
    mask = np.asarray(attention_mask(rows, window)) & (rows.segment > 0)[..., None]
    mask = np.pad(mask, ((0, 0), (0, 112 - LENGTH), (0, 112 - LENGTH)))
    mask |= np.eye(112, dtype=bool)  # padding sees itself
    flash_mask = flash.flash_mask(rows, window, block=16)
    needed = mask.reshape(2, 7, 16, 7, 16).any((2, 4))
    for visits, expected in (
        (flash_mask.keys, needed),
        (flash_mask.queries, needed.swapaxes(1, 2)),
    ):
        for row in range(2):
            for block in range(7):
                listed = visits.blocks[row, block, : visits.count[row, block]]
                np.testing.assert_array_equal(listed, np.flatnonzero(expected[row, block]))
    assert needed.sum() < 2 * 7 * 8 / 2  # fewer than a causal mask alone would have


def test_what_nobody_sees_is_never_read():
    rows = plain_rows(jnp.zeros((1, 96), jnp.int32))
    rows = rows._replace(segment=jnp.repeat(jnp.array([[1, 2, 3]]), 32, axis=1))
    query, key, value, _ = (x[:1, :96] for x in random_heads())
    lost = jnp.where(jnp.arange(96) // 32 == 1, jnp.nan, 0.0)[None, :, None, None]

    def loss(query, key, value):
        kernel = interpreted()
        mixed = kernel.attend(query, key + lost, value + lost, kernel.mask(rows), 0.3)
        return mixed.sum(), mixed

    *gradients, mixed = jax.tree.leaves(
        jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
    )
    for x in (*gradients, mixed):
        finite = np.isfinite(x).all((0, 2, 3))
        np.testing.assert_array_equal(finite[[*range(32), *range(64, 96)]], True)
    assert not np.isfinite(mixed[:, 32:64]).any()


KERNELS = "flash_forward", "flash_query_gradient", "flash_key_gradient"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_flash_lowers_for_a_gpu_at_the_sizes_of_real_models(dim, dtype):
    like = lambda heads: jax.ShapeDtypeStruct((2, 4100, heads, dim), dtype)
    tokens = jax.ShapeDtypeStruct((2, 4100), jnp.int32)

    def loss(query, key, value, tokens):
        mask = flash.flash_mask(plain_rows(tokens), 1000)
        return flash.attend(query, key, value, mask, 0.1, softcap=50.0).astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    program = jax.export.export(
        gradient,
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")],
    )(like(32), like(8), like(8), tokens)
    assert all(name in program.mlir_module() for name in KERNELS)


def test_outside_the_kernels_no_array_is_quadratic_in_the_row():
    length = 4096

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (x.aval.size for x in equation.outvars)
            if equation.primitive.name != "pallas_call":
                for inner in jaxprs_in_params(equation.params):
                    yield from sizes(inner)

    def largest(kernel):
        arrays = [jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32) for heads in (2, 1, 1)]

        def loss(arrays, mask):
            return kernel.attend(*arrays, mask, 0.3).sum()

        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        mask = jax.eval_shape(lambda tokens: kernel.mask(plain_rows(tokens), None), tokens)
        return max(sizes(jax.make_jaxpr(jax.grad(loss))(arrays, mask).jaxpr))

    assert largest(flash.FLASH) == 2 * 16 * length
    assert largest(XLA) >= length**2 / 4  # the scores of a stretch
    program = lowered(flash.FLASH, "cuda")
    assert all(name in program for name in KERNELS)
    assert "1024x1024x" not in program
