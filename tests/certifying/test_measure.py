"""What is measured: the same tokens for rows of every shape, and entries from all of a gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.certifying.measure import KEPT_ENTRIES, margins_of, thinned, token_order
from dpojax.certifying.opening import certified_stage, shrunken, small
from dpojax.certifying.variants import (
    REVERSED,
    SHUFFLED,
    as_configured,
    baseline,
    variants_here,
    with_flags,
)
from dpojax.config.defaults import default_config
from dpojax.config.errors import ConfigError
from dpojax.data.examples import Example
from dpojax.data.packing import plan
from dpojax.data.rows import collate
from dpojax.models import decoder
from dpojax.models.config import GPT2, LLAMA, DecoderConfig


def make_examples(count=7, responses=2):
    rng = np.random.default_rng(0)
    ids = lambda most: rng.integers(0, 32, rng.integers(1, most + 1)).astype(np.int32)
    return [
        Example(str(i), ids(6), tuple(ids(9) for _ in range(responses)), (False,) * responses, None)
        for i in range(count)
    ]


@pytest.mark.parametrize("responses", [1, 2, 3])
def test_tokens_and_margins_do_not_depend_on_the_shape_of_rows(responses):
    examples = make_examples(responses=responses)
    wide = collate(examples, range(7), plan(examples, [range(7)], length=64))
    narrow_shape = plan(examples, [range(7)], length=40, micro_rows=2)
    narrow = collate(examples, [4, 2, 6, 0, 1, 3, 5], narrow_shape)
    expected = np.concatenate([y for example in examples for y in example.responses])
    for rows in (wide, narrow):
        targets = rows.target[token_order(rows)]
        np.testing.assert_array_equal(targets, expected)
        sums = [[int(y.sum()) for y in example.responses] for example in examples]
        margins = [s[0] - s[-1] if responses > 1 else s[0] for s in sums]
        np.testing.assert_allclose(margins_of(rows, targets), margins)
    assert wide.tokens.shape != narrow.tokens.shape


def test_a_gradient_is_kept_whole_where_it_is_small_and_else_from_all_over_it():
    small_one = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(thinned(small_one), small_one)
    x = jnp.arange(2.0 * 1024 * 1024).reshape(2, 1024, 1024)
    kept = np.asarray(thinned(x))
    assert KEPT_ENTRIES / 3 < kept.size <= KEPT_ENTRIES
    layer, place = np.divmod(kept.astype(int), 1024 * 1024)
    assert set(layer.ravel()) == {0, 1}
    for coordinate in np.divmod(place, 1024):
        steps = np.diff(np.unique(coordinate))
        assert steps.max() < 10
        assert len(set(np.unique(coordinate) % 64)) == 64  # every place in a head of 64


def test_a_shrunken_model_has_the_code_paths_of_the_large_one():
    large = DecoderConfig(
        **LLAMA, vocab_size=512, width=1024, layers=12, heads=16, kv_heads=4, mlp_width=4096,
        max_positions=512, windows=(None, 64) * 6,
    )  # fmt: skip
    found = shrunken(large)
    assert (found.layers, found.heads, found.kv_heads, found.head_dim) == (2, 4, 1, 64)
    assert (found.width, found.mlp_width, found.windows) == (256, 1024, (None, 64))
    same = {"norm", "positions", "rope", "activation", "tied_head", "vocab_size", "residual"}
    assert all(getattr(found, name) == getattr(large, name) for name in same)
    jax.eval_shape(decoder.build(found).init, jax.random.key(0))


def test_a_model_that_is_small_already_stays_as_it_is():
    tiny = DecoderConfig(
        **GPT2, vocab_size=32, width=16, layers=2, heads=2, mlp_width=32, max_positions=32
    )
    found = shrunken(tiny)
    assert jax.eval_shape(decoder.build(found).init, jax.random.key(0)) == jax.eval_shape(
        decoder.build(tiny).init, jax.random.key(0)
    )
    assert dataclasses.replace(found, head_dim=tiny.head_dim, kv_heads=tiny.kv_heads) == tiny


def test_in_the_small_a_config_reads_little_data_and_keeps_its_pace():
    config = default_config()
    found = small(config, "preference")
    assert found.preference.batch_size == 16
    assert (found.preference.data.limit, found.preference.data.eval_limit) == (320, 16)
    assert found.preference.learning_rate == config.preference.learning_rate
    assert config.preference.batch_size == 64


def test_the_last_stage_that_trains_a_policy_on_examples_is_measured():
    config = default_config()
    assert certified_stage(config) == "preference"
    config.stages = ("sft",)
    assert certified_stage(config) == "sft"
    config.stages = ("reward",)
    with pytest.raises(ConfigError, match=r"config\.stages = \('reward',\): .*\(sft, preference\)"):
        certified_stage(config)


def test_variants_cover_each_axis_and_two_orders_of_the_devices():
    config = default_config()
    config.mesh.update(data=2, fsdp=4)
    variants = variants_here(config, "preference", 8)
    assert variants[0] == as_configured(config, "preference", 8)
    meshes = {x.mesh for x in variants}
    assert meshes == {(2, 4, 1), (8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)}
    orders = {x.order: x.mesh for x in variants if x.order != "given"}
    assert orders == {REVERSED: (2, 4, 1), SHUFFLED: (2, 2, 2)}
    assert len({x.name for x in variants}) == len(variants)
    config.preference.lora.rank = 4
    bases = {x.name: x.base_dtype for x in variants_here(config, "preference", 8)}
    assert bases["as configured"] == "float32"
    assert bases["bfloat16 base"] == "bfloat16"
    config.mesh.fsdp = 3
    with pytest.raises(ConfigError, match=r"config\.mesh: data=2 x fsdp=3"):
        variants_here(config, "preference", 8)


def test_one_device_has_no_meshes_to_compare_but_precisions():
    variants = variants_here(default_config(), "preference", 1)
    assert [x.name for x in variants] == ["as configured", "bfloat16 compute"]


@pytest.mark.parametrize("order", [REVERSED, SHUFFLED])
def test_an_order_puts_the_same_devices_elsewhere_on_the_mesh(order):
    given = baseline(default_config(), "preference", (2, 2, 2))
    devices = jax.devices()
    before = given.make_mesh(devices)
    after = given._replace(order=order).make_mesh(devices)
    assert before.shape == after.shape
    assert set(before.devices.ravel()) == set(after.devices.ravel())
    moved = before.devices != after.devices
    assert moved.sum() >= 4
    if order == REVERSED:
        assert after.devices.ravel().tolist() == before.devices.ravel().tolist()[::-1]


def test_flags_are_added_word_by_word():
    variant = with_flags(baseline(default_config(), "preference"), "--xla_a=1  --xla_b=2")
    assert variant.flags == ("--xla_a=1", "--xla_b=2")
