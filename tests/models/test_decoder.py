"""Laws of the decoder: packing, sharding, rematerialisation and precision change no number."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import random_params, random_tokens

from dpojax.models.attention import (
    PlainRows,
    attend,
    attend_causally,
    attention_mask,
    plain_rows,
    scores_of,
)
from dpojax.models.config import GPT2, LLAMA, DecoderConfig, Rope
from dpojax.models.decoder import REMAT, SHARDING_RULES, build, logits
from dpojax.models.layers import product
from dpojax.sharding import make_mesh, path_of, tree_shardings
from tests import further

SIZES = {"vocab_size": 50, "width": 16, "layers": 2, "heads": 4, "mlp_width": 32}
SIZES |= {"max_positions": 64}
CONFIGS = {
    "gpt2": DecoderConfig(**GPT2, **SIZES),
    "llama": DecoderConfig(**LLAMA, **SIZES, kv_heads=2),
    "windows": DecoderConfig(**LLAMA, **SIZES, kv_heads=1, windows=(4, None)),
    "gemma": DecoderConfig(
        **LLAMA | {"qk_norm": True, "post_norms": True, "norm_offset": 1.0, "tied_head": True},
        **SIZES,
        kv_heads=2,
        windows=(4, None),
        local_rope=Rope(theta=100.0),
        embedding_scale=4.0,
        attention_softcap=2.0,
    ),
    "gptj": DecoderConfig(
        **GPT2 | {"positions": "rope", "rope": Rope(dim=2, interleaved=True)},
        **SIZES,
        residual="parallel_one_norm",
        head_bias=True,
    ),
}
PROMPT, RESPONSES = 5, (4, 1, 6)


class Rows(NamedTuple):
    tokens: np.ndarray
    positions: np.ndarray
    segment: np.ndarray
    branch: np.ndarray


def example(tokens, segment):
    """The four arrays of one example: a prompt and its responses."""
    branch = np.repeat(np.arange(4), (PROMPT, *RESPONSES))
    positions = [np.arange(PROMPT)] + [PROMPT + np.arange(n) for n in RESPONSES]
    return Rows(tokens, np.concatenate(positions), np.full(tokens.shape, segment), branch)


def packed_row(padding=3):
    """[1, 45]: padding, then two examples."""
    columns = PROMPT + sum(RESPONSES)
    first, second = random_tokens(50, (2, columns))
    zeros = np.zeros(padding, int)
    parts = [Rows(*[zeros] * 4), example(first, 1), example(second, 2)]
    return Rows(*(np.concatenate(arrays)[None].astype(np.int32) for arrays in zip(*parts)))


def branch_columns(rows, segment, branch):
    on_path = (rows.branch[0] == 0) | (rows.branch[0] == branch)
    return np.flatnonzero((rows.segment[0] == segment) & on_path)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_packed_row_gives_the_hidden_states_of_separate_sequences(family):
    config = CONFIGS[family]
    model, params, rows = build(config), random_params(config), packed_row()
    apply = jax.jit(model.apply)
    packed = np.asarray(apply(params, rows)[0])
    longest = PROMPT + max(RESPONSES)
    columns = [branch_columns(rows, *pair) for pair in itertools.product((1, 2), (1, 2, 3))]
    # Causal, so what stands after the end of a shorter sequence cannot matter.
    separate = np.stack([np.resize(rows.tokens[0, places], longest) for places in columns])
    hidden = np.asarray(apply(params, plain_rows(separate)))
    assert hidden.std() > 0.3
    for one, places in zip(hidden, columns):
        np.testing.assert_allclose(packed[places], one[: len(places)], atol=1e-5, rtol=1e-5)


def test_the_mask_is_the_stated_rule_for_every_pair_of_columns():
    rows, window = packed_row(), 4
    tokens = rows.tokens.shape[1]
    expected = np.zeros((1, tokens, tokens), bool)
    for i, j in itertools.product(range(tokens), repeat=2):
        expected[0, i, j] = (
            j <= i
            and rows.segment[0, i] == rows.segment[0, j]
            and rows.branch[0, j] in (0, rows.branch[0, i])
            and rows.positions[0, i] - rows.positions[0, j] < window
        )
    np.testing.assert_array_equal(attention_mask(Rows(*map(jnp.asarray, rows)), window), expected)
    assert expected.any(-1).all()


@pytest.mark.parametrize("family", ["gpt2", "windows", "gemma"])
def test_rows_of_padding_only_are_finite_and_so_are_their_gradients(family):
    model = build(CONFIGS[family])
    zeros = jnp.zeros((2, 6), jnp.int32)

    def loss(params):
        return jnp.square(model.apply(params, Rows(*[zeros] * 4))).sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(random_params(CONFIGS[family]))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_ids_and_positions_outside_their_tables_give_nan_and_not_another_row():
    config = CONFIGS["gpt2"]
    apply, params = jax.jit(build(config).apply), random_params(config)
    rows = plain_rows(jnp.zeros((2, 4), jnp.int32))
    for field, size in (("tokens", config.vocab_size), ("positions", config.max_positions)):
        bad = rows._replace(**{field: getattr(rows, field).at[0, 3].set(size)})
        hidden = apply(params, bad)
        assert np.isnan(hidden[0, 3]).all()
        assert np.isfinite(hidden[1]).all()


def test_grouped_attention_equals_that_of_repeated_keys_and_values():
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 7, 6, 8), np.float32)
    key, value = rng.standard_normal((2, 2, 7, 2, 8), np.float32)
    mask = np.broadcast_to(np.tril(np.ones((7, 7), bool)), (2, 7, 7))
    scores = 0.3 * np.einsum("rtnh,rsnh->rnts", query, np.repeat(key, 3, axis=2))
    weights = np.where(mask[:, None], np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("rnts,rsnh->rtnh", weights, np.repeat(value, 3, axis=2))
    np.testing.assert_allclose(attend(query, key, value, mask, 0.3), expected, atol=1e-6)


@pytest.mark.parametrize("length", [95, 200, 421])
def test_attention_by_stretches_equals_that_of_whole_rows(length):
    rng = np.random.default_rng(length)
    heads = lambda n: jnp.asarray(rng.standard_normal((2, length, n, 8), np.float32))
    segment = jnp.asarray(np.sort(rng.integers(1, 4, (2, length)), axis=1))
    branch = jnp.asarray(np.sort(rng.integers(0, 3, (2, length)), axis=1))
    mask = attention_mask(PlainRows(segment, segment, segment, branch))

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(attend, *arrays):
        mixed, back = jax.vjp(lambda *x: attend(*x, mask, 0.3, softcap=4.0), *arrays)
        return mixed, *back(arrays[0])

    arrays = heads(4), heads(2), heads(2)
    by_stretches, whole = (with_gradients(by, *arrays) for by in (attend_causally, attend))
    for got, want in zip(by_stretches, whole):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_n_stretches_compute_n_plus_1_of_2_n_scores():
    assert scores_of(95) == 95**2
    assert scores_of(200) == 3 / 4 * 200**2
    assert scores_of(400) == 5 / 8 * 400**2


def test_every_remat_policy_gives_the_same_gradients():
    config, rows = CONFIGS["llama"], packed_row()
    params = random_params(config)

    def gradients(remat):
        model = build(config, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.square(logits(model, p, rows)).mean()))(params)

    plain, *others = (gradients(remat) for remat in REMAT)
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), plain, other
        )
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(plain))


def test_full_remat_stores_less_than_none():
    config, rows = CONFIGS["llama"], plain_rows(random_tokens(50, (2, 16)))
    params = random_params(config)

    def stored(remat):
        model = build(config, remat=remat)
        pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: model.apply(p, rows), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert stored("full") < stored("dots") < stored("none")


@pytest.mark.parametrize("family", ["llama", *further("gpt2")])
def test_bfloat16_compute_is_near_float32_and_its_gradients_are_float32(family):
    config, rows = CONFIGS[family], packed_row()
    params = random_params(config)
    exact = jax.jit(build(config).apply)(params, rows)
    model = build(config, compute_dtype=jnp.bfloat16)

    def loss(params):
        hidden = model.apply(params, rows)
        return jnp.square(hidden.astype(jnp.float32)).mean(), hidden

    grads, hidden = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert hidden.dtype == jnp.bfloat16
    error = jnp.abs(hidden.astype(jnp.float32) - exact)
    assert 0 < float(error.mean()) < 0.02 * float(jnp.abs(exact).mean()) + 0.01
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("subscripts", "shapes"),
    [("nd,df->nf", ((5, 6), (6, 4))), ("rgth,rgsh->rgts", ((2, 3, 4, 6), (2, 3, 5, 6)))],
    ids=str,
)
def test_a_bfloat16_product_and_its_gradients_are_sums_in_float32(subscripts, shapes):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=shape) for shape in shapes)
    low = lambda a: jnp.asarray(a, jnp.bfloat16)
    exact = lambda a: np.asarray(low(a), np.float64)
    out = product(subscripts, low(x), jnp.float32(y), dtype=jnp.float32)
    np.testing.assert_allclose(out, np.einsum(subscripts, exact(x), exact(y)), atol=1e-5)
    g = rng.normal(size=out.shape)
    _, pull = jax.vjp(lambda *a: product(subscripts, *a, dtype=jnp.float32), low(x), jnp.float32(y))
    dx, dy = pull(jnp.float32(g))
    inputs, to = subscripts.split("->")
    of_x, of_y = inputs.split(",")
    assert (dx.dtype, dy.dtype) == (jnp.bfloat16, jnp.float32)
    want = np.einsum(f"{to},{of_y}->{of_x}", exact(g), exact(y))
    np.testing.assert_allclose(dx.astype(jnp.float32), want, rtol=1e-2, atol=1e-3)
    want = np.einsum(f"{of_x},{to}->{of_y}", exact(x), exact(g))
    np.testing.assert_allclose(dy, want, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", *further("gemma", "gptj")])
def test_on_a_mesh_large_arrays_are_sharded_and_outputs_equal_one_devices(family):
    config = CONFIGS[family]
    model, mesh = build(config), make_mesh(data=1, fsdp=4, tensor=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shardings = tree_shardings(shapes, mesh, SHARDING_RULES)
    params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        if leaf.size > config.width**2:
            pieces = leaf.size // leaf.addressable_shards[0].data.size
            assert pieces == 8, f"{path_of(keys)} is in {pieces} pieces"
    params = jax.device_put(random_params(config), shardings)
    rows = plain_rows(random_tokens(50, (4, 12)))
    expected = jax.jit(model.apply)(jax.device_put(params, jax.devices()[0]), rows)
    with jax.set_mesh(mesh):
        got = jax.jit(model.apply)(params, rows)
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-5)


def test_initial_weights_have_the_stated_spread():
    config = DecoderConfig(**GPT2, **SIZES | {"width": 64, "mlp_width": 256}, initializer_range=0.1)
    params = build(config).init(jax.random.key(0))
    block = params["blocks"]
    assert np.std(block["mlp"]["up"]["kernel"]) == pytest.approx(0.1, rel=0.05)
    assert np.std(block["mlp"]["down"]["kernel"]) == pytest.approx(0.05, rel=0.05)
    assert np.std(block["attention"]["out"]["kernel"]) == pytest.approx(0.05, rel=0.05)
    assert np.std(params["embed"]["tokens"]) == pytest.approx(0.1, rel=0.05)
    layers = np.asarray(block["mlp"]["up"]["kernel"])
    assert not np.allclose(layers[0], layers[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "heads: 3 does not divide width 16"),
        ({"kv_heads": 3}, "kv_heads: 3 does not divide heads 4"),
        ({"layers": 0}, "layers: must be positive, got 0"),
        ({"norm": "batchnorm"}, "norm: 'batchnorm' is not one of layernorm, rmsnorm"),
        ({"rope": Rope()}, "rope: give Rope"),
        ({"windows": (3,)}, "windows: 1 entries for 2 layers"),
    ],
)
def test_a_config_that_does_not_fit_together_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**GPT2 | SIZES | change)


def test_unknown_names_are_refused_when_a_model_is_built():
    with pytest.raises(ValueError, match="remat: 'some' is not one of none, dots, full"):
        build(CONFIGS["gpt2"], remat="some")
    with pytest.raises(ValueError, match="activation: 'softest'"):
        build(DecoderConfig(**GPT2, **SIZES, activation="softest"))
