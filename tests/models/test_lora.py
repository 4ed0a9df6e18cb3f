"""LoRA is a function of the parameter tree: zero at the start, low-rank, and blind to the model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as checkpoints
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from dpojax import sharding
from dpojax.models import decoder, huggingface, lora
from dpojax.models.attention import plain_rows
from dpojax.models.config import GPT2, LLAMA, DecoderConfig
from dpojax.models.lora import LORA_RULES, LoraConfig
from tests import further

SIZES = {"vocab_size": 61, "width": 16, "layers": 2, "heads": 4, "mlp_width": 24}
GROUPED = DecoderConfig(**LLAMA, **SIZES, max_positions=32, kv_heads=2)
LEARNED = DecoderConfig(**GPT2, **SIZES, max_positions=32)
CONFIGS = pytest.mark.parametrize("config", [GROUPED, *further(LEARNED)], ids=["llama", "gpt2"])
LOW = LoraConfig(rank=3, alpha=6.0)


def rows():
    return plain_rows(checkpoints.random_tokens(61, (2, 9)))


def noisy(adapters, seed=1):
    """Adapters after some training: every entry random."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), adapters
    )


def paths(tree):
    return set(traverse_util.flatten_dict(tree, sep="/"))


@CONFIGS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_at_the_start_policy_and_reference_are_bit_equal(config, dtype):
    model = decoder.build(config, compute_dtype=dtype)
    base = jax.tree.map(lambda x: x.astype(dtype), checkpoints.random_params(config))
    adapters = lora.init(jax.random.key(0), base, LOW)
    policy = jax.jit(lambda base, adapters: model.apply(lora.apply(base, adapters, LOW), rows()))
    reference = jax.jit(lambda base: model.apply(base, rows()))
    np.testing.assert_array_equal(policy(base, adapters), reference(base))
    assert float(jnp.abs(policy(base, noisy(adapters)) - reference(base)).max()) > 0.1


@CONFIGS
def test_the_delta_is_the_scaled_product_written_out_for_every_layer(config):
    base = checkpoints.random_params(config)
    adapters = noisy(lora.init(jax.random.key(0), base, LOW))
    adapted = traverse_util.flatten_dict(lora.apply(base, adapters, LOW), sep="/")
    flat = traverse_util.flatten_dict(adapters, sep="/")
    for path, kernel in traverse_util.flatten_dict(base, sep="/").items():
        expected = np.asarray(kernel).copy()
        if path.startswith("blocks/") and path.endswith("/kernel"):
            for layer in range(SIZES["layers"]):
                a, b = (np.asarray(flat[f"{path}/{name}"][layer]) for name in "ab")
                expected[layer] += 6.0 / 3 * (a @ b).reshape(expected[layer].shape)
        np.testing.assert_allclose(adapted[path], expected, rtol=1e-6, atol=1e-6)


def test_the_scale_is_alpha_over_the_rank_or_over_its_root():
    assert LoraConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoraConfig(rank=16, alpha=8.0, rank_stabilised=True).scale == 2.0


def test_a_is_spread_as_torch_initialises_a_linear_layer():
    torch = pytest.importorskip("torch")
    kernel = jax.ShapeDtypeStruct((2, 400, 50), jnp.float32)
    wide = {"blocks": {"mlp": {"up": {"kernel": kernel}}}}
    made = lora.init(jax.random.key(3), wide, LoraConfig(64, 1.0, ("mlp/",)))
    a = made["blocks"]["mlp"]["up"]["kernel"]["a"]
    torch.manual_seed(0)
    theirs = torch.empty(64, 400)
    torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)
    assert np.isclose(np.std(a), float(theirs.std()), rtol=0.02)
    assert np.isclose(np.abs(a).max(), float(theirs.abs().max()), rtol=0.01)
    assert not np.array_equal(a[0], a[1])


def test_shapes_alone_are_enough_and_other_targets_do_not_change_the_draw():
    params = checkpoints.random_params(GROUPED)
    abstract = jax.eval_shape(decoder.build(GROUPED).init, jax.random.key(0))
    key = jax.random.key(7)
    whole, some = (
        lora.init(key, abstract, LOW),
        lora.init(key, params, LoraConfig(3, 6.0, ("up/",))),
    )
    np.testing.assert_array_equal(
        whole["blocks"]["mlp"]["up"]["kernel"]["a"], some["blocks"]["mlp"]["up"]["kernel"]["a"]
    )


def test_targets_choose_the_kernels_and_nothing_else_is_adapted():
    abstract = jax.eval_shape(decoder.build(LEARNED).init, jax.random.key(0))
    chosen = lora.init(jax.random.key(0), abstract, LoraConfig(2, 4.0, ("(query|value)/", "down")))
    kernels = ("attention/query", "attention/value", "mlp/down")
    assert paths(chosen) == {f"blocks/{name}/kernel/{leaf}" for name in kernels for leaf in "ab"}
    every = {path.rsplit("/", 1)[0] for path in paths(lora.init(jax.random.key(0), abstract, LOW))}
    assert every == {path for path in paths(abstract) if re.search("^blocks/.*kernel", path)}
    assert len(every) == 6


@pytest.mark.parametrize("pattern", ["q_proj", "embed/tokens", "head/kernel", "mlp/gate"])
def test_a_target_that_finds_nothing_is_an_error_that_lists_the_paths(pattern):
    abstract = jax.eval_shape(decoder.build(LEARNED).init, jax.random.key(0))
    with pytest.raises(ValueError, match=rf"'{pattern}' is found in no path") as error:
        lora.init(jax.random.key(0), abstract, LoraConfig(2, 4.0, ("attention/", pattern)))
    for path in ("attention/query", "attention/out", "mlp/up", "mlp/down"):
        assert f"\n  blocks/{path}/kernel" in str(error.value)
    assert "embed/positions" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0, "alpha": 1.0}, "rank, alpha"),
        ({"rank": 2, "alpha": 0.0}, "rank, alpha"),
        ({"rank": 2, "alpha": float("nan")}, "rank, alpha"),
        ({"rank": 2, "alpha": 1.0, "targets": ()}, "one or more patterns"),
        ({"rank": 2, "alpha": 1.0, "targets": "mlp/"}, "one or more patterns"),
        ({"rank": 2, "alpha": 1.0, "targets": ("(mlp",)}, r"'\(mlp' is not a pattern"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


@CONFIGS
def test_gradients_reach_the_adapters_and_never_the_base(config):
    model, base = decoder.build(config), checkpoints.random_params(config)
    adapters = noisy(lora.init(jax.random.key(0), base, LOW))

    def loss(base, adapters):
        return jnp.square(model.apply(lora.apply(base, adapters, LOW), rows())).mean()

    to_base, to_adapters = jax.jit(jax.grad(loss, argnums=(0, 1)))(base, adapters)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(to_base))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(to_adapters))
    # The chain rule by hand: dL/da = scale * dL/dkernel @ b^T of the plain model.
    adapted = lora.apply(base, adapters, LOW)
    plain = lambda params: jnp.square(model.apply(params, rows())).mean()
    whole = jax.jit(jax.grad(plain))(adapted)
    kernel = whole["blocks"]["attention"]["out"]["kernel"].reshape(-1, 16, 16)
    pair = adapters["blocks"]["attention"]["out"]["kernel"]
    by_hand = 2.0 * np.asarray(kernel) @ np.swapaxes(pair["b"], 1, 2)
    ours = to_adapters["blocks"]["attention"]["out"]["kernel"]["a"]
    np.testing.assert_allclose(ours, by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@CONFIGS
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_adapters_beside_their_kernels_give_the_merged_kernels_values_and_gradients(config, remat):
    model, base = decoder.build(config, remat=remat), checkpoints.random_params(config)
    adapters = noisy(lora.init(jax.random.key(0), base, LOW))

    def both(put):
        def loss(base, adapters):
            return jnp.square(model.apply(put(base, adapters, LOW), rows())).mean()

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(base, adapters)

    (value, (to_base, gradient)), (expected, (_, right)) = both(lora.adapt), both(lora.apply)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # The sums have another order: each number is as exact as the largest of its array.
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * float(jnp.abs(y).max()))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(to_base))


def test_adapters_of_some_kernels_leave_the_others_as_they_are():
    model, base = decoder.build(LEARNED), checkpoints.random_params(LEARNED)
    some = LoraConfig(2, 4.0, ("(query|value)/", "down"))
    adapters = noisy(lora.init(jax.random.key(0), base, some))
    beside = jax.jit(lambda a: model.apply(lora.adapt(base, a, some), rows()))(adapters)
    merged = jax.jit(lambda a: model.apply(lora.apply(base, a, some), rows()))(adapters)
    np.testing.assert_allclose(beside, merged, rtol=1e-4, atol=1e-5)


@CONFIGS
def test_in_bfloat16_new_adapters_change_no_bit_and_small_ones_are_not_rounded_away(config):
    model = decoder.build(config, compute_dtype=jnp.bfloat16)
    exact = decoder.build(config)
    base = checkpoints.random_params(config)
    adapters = lora.init(jax.random.key(0), base, LOW)
    policy = jax.jit(lambda a: model.apply(lora.adapt(base, a, LOW), rows()))
    reference = jax.jit(lambda: model.apply(base, rows()))()
    np.testing.assert_array_equal(policy(adapters), reference)
    # The change in float32 and the one in bfloat16 point the same way.
    change = lambda x, y: np.asarray(x - y, np.float64).ravel()
    small = jax.tree.map(lambda x: 0.1 * x, noisy(adapters))
    right = change(exact.apply(lora.apply(base, small, LOW), rows()), exact.apply(base, rows()))
    ours = change(policy(small).astype(jnp.float32), reference.astype(jnp.float32))
    assert ours @ right / np.linalg.norm(ours) / np.linalg.norm(right) > 0.9


def test_a_bfloat16_base_with_float32_adapters_keeps_what_bfloat16_would_round_away():
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), checkpoints.random_params(GROUPED))
    adapters = jax.tree.map(lambda x: 1e-3 * x, noisy(lora.init(jax.random.key(0), base, LOW)))
    adapted = lora.apply(base, adapters, LOW)
    kernel = ("blocks", "mlp", "down", "kernel")
    old, new = base, adapted
    for name in kernel:
        old, new = old[name], new[name]
    assert new.dtype == jnp.float32
    assert float(jnp.mean(new != old.astype(jnp.float32))) > 0.9
    assert float(jnp.mean(new.astype(jnp.bfloat16) != old)) < 0.5
    assert adapted["embed"]["tokens"].dtype == jnp.bfloat16
    merged = lora.merge(base, adapters, LOW)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


@CONFIGS
def test_the_merged_export_computes_in_transformers_what_is_applied_here(config, tmp_path):
    pytest.importorskip("torch", reason="compares with a torch model of transformers")
    import transformers

    model, base = decoder.build(config), checkpoints.random_params(config)
    adapters = noisy(lora.init(jax.random.key(0), base, LOW))
    huggingface.save(tmp_path / "merged", config, lora.merge(base, adapters, LOW))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    expected = checkpoints.torch_logits(theirs, np.asarray(rows().tokens))
    applied = decoder.logits(model, lora.apply(base, adapters, LOW), rows())
    np.testing.assert_allclose(applied, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("blocks/attention/wrong/kernel", (2, 16, 2), "has no such kernel"),
        ("blocks/attention/query/kernel", (2, 15, 2), r"query/kernel: has the shapes .*15"),
    ],
)
def test_an_adapter_that_fits_no_kernel_is_named(path, shape, message):
    pair = {"a": jnp.zeros(shape), "b": jnp.zeros((2, 2, 16))}
    adapters = traverse_util.unflatten_dict({path: pair}, sep="/")
    for put in (lora.apply, lora.adapt):
        with pytest.raises(ValueError, match=message):
            put(checkpoints.random_params(GROUPED), adapters, LOW)


@CONFIGS
def test_adapters_are_sharded_like_their_kernels_and_nothing_is_communicated(config):
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    base = checkpoints.random_params(config)
    adapters = lora.init(jax.random.key(0), base, LOW)
    base_shardings = sharding.tree_shardings(base, mesh, decoder.SHARDING_RULES)
    low_shardings = sharding.tree_shardings(adapters, mesh, LORA_RULES)
    for path, placed in traverse_util.flatten_dict(low_shardings, sep="/").items():
        assert placed.spec != P(), path  # the rank is small: every adapter is cut along the other
    step = jax.jit(
        lambda base, adapters: lora.apply(base, adapters, LOW),
        in_shardings=(base_shardings, low_shardings),
        out_shardings=base_shardings,
    )
    program = step.lower(base, adapters).compile().as_text()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", program)
    adapted = step(base, noisy(adapters))
    on_one = lora.apply(base, noisy(adapters), LOW)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), adapted, on_one)


def test_each_rule_puts_the_two_sides_where_the_kernel_has_them():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    base = checkpoints.random_params(LEARNED)
    adapters = lora.init(jax.random.key(0), base, LOW)
    kernels = sharding.tree_shardings(base, mesh, decoder.SHARDING_RULES)
    flat = traverse_util.flatten_dict(kernels, sep="/")
    for path, placed in traverse_util.flatten_dict(
        sharding.tree_shardings(adapters, mesh, LORA_RULES), sep="/"
    ).items():
        kernel, _, side = path.rpartition("/")
        axes = flat[kernel].spec[1:]
        inward = 2 if "/out/" in path else 1
        half = axes[:inward] if side == "a" else axes[inward:]
        expected = [axis for axis in half if axis is not None]
        assert [axis for axis in placed.spec if axis is not None] == expected, path
