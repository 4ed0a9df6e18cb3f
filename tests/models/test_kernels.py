"""Every kernel of attention against the plain one, and the choice among them."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import random_params, random_tokens

from dpojax.config.defaults import default_config
from dpojax.config.errors import ConfigError
from dpojax.models import flash, kernels, splash
from dpojax.models.attention import XLA, Kernel, PlainRows, attention_mask, plain_rows
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.models.decoder import SHARDING_RULES, build
from dpojax.sharding import ROWS, SWEEP, make_mesh, sweep_mesh, tree_shardings
from dpojax.stages import setup

INTERPRETED = Kernel(splash.span_masks, functools.partial(splash.attend, interpret=True))
FLASH_INTERPRETED = Kernel(flash.flash_mask, functools.partial(flash.attend, interpret=True))
LENGTH = 300  # of three blocks of 128, once padded
# The examples of each row, (prompt, responses) in tokens: K = 1, 2, 3; no prompt; beyond a block.
LAYOUTS = (
    ((20, (5, 30, 7)), (40, (20, 9)), (9, (1,)), (0, (13, 6))),
    ((50, (130, 90)),),
)


def rows_of(layouts=LAYOUTS, length=LENGTH, gap=3) -> PlainRows:
    """Packed rows, with `gap` columns of padding at the start and behind every prompt."""
    arrays = np.zeros((4, len(layouts), length), np.int32)
    arrays[0] = random_tokens(50, (len(layouts), length))
    for row, examples in enumerate(layouts):
        column = gap
        for segment, (prompt, responses) in enumerate(examples, 1):
            for branch, tokens in enumerate((prompt, *responses)):
                positions = prompt * (branch > 0) + np.arange(tokens)
                part = arrays[1:, row, column : column + tokens]
                part[:] = positions, np.full(tokens, segment), np.full(tokens, branch)
                column += tokens + gap * (branch == 0)
    return PlainRows(*arrays)


def heads(dtype=jnp.float32, length=LENGTH):
    """Random queries of four heads, keys and values of two, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, length, count, 8) for count in (4, 2, 2, 4)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def values_and_gradients(kernel, rows, *, window=None, softcap=None):
    """What the tokens of examples get, and what their queries, keys and values get back."""
    *arrays, cotangent = heads()
    real = (rows.segment > 0)[..., None, None]

    @jax.jit
    def both(cotangent, *arrays):
        mask = kernel.mask(rows, window)
        mixed, back = jax.vjp(lambda *x: kernel.attend(*x, mask, 0.3, softcap=softcap), *arrays)
        return jnp.where(real, mixed, 0.0), back(cotangent)

    return jax.tree.leaves(both(jnp.where(real, cotangent, 0.0), *arrays))


@pytest.mark.parametrize("window", [None, 25])
def test_own_branch_and_prompt_together_are_the_plain_mask(window):
    rows = rows_of()
    column, total, run = np.arange(LENGTH), 0, 0
    for span, blocks in jax.jit(splash.span_masks, static_argnums=1)(rows, window):
        span, block = np.asarray(span)[:, :LENGTH, None], span.shape[1] // blocks.shape[1]
        in_span = (column >= (span & 0xFFFF)) & (column <= (span >> 16))
        of_blocks = np.asarray(blocks)[:, column[:, None] // block, column // block]
        assert not (in_span & ~of_blocks).any()
        total, run = total + in_span, run + np.sum(blocks)
    real, mask = rows.segment > 0, jax.jit(attention_mask, static_argnums=1)(rows, window)
    np.testing.assert_array_equal(total[real], np.asarray(mask)[real])
    np.testing.assert_array_equal(total[~real], np.broadcast_to(np.eye(LENGTH), total.shape)[~real])
    assert run < 2 * 2 * 3 * 3


@pytest.mark.slow
def test_splash_equals_plain_attention_in_values_and_gradients():
    options = {"window": 25, "softcap": 1.5}
    plain = values_and_gradients(XLA, rows_of(), **options)
    assert all(x.std() > 0.03 for x in plain)
    for outputs, expected in zip(values_and_gradients(INTERPRETED, rows_of(), **options), plain):
        np.testing.assert_allclose(outputs, expected, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("devices", [8, 2], ids=["four of a member", "two members of each"])
def test_a_model_over_devices_and_members_of_a_sweep_has_the_plain_gradients_by_each_kernel(
    devices,
):
    sizes = {"vocab_size": 50, "width": 16, "layers": 2, "heads": 4, "mlp_width": 16}
    config = DecoderConfig(**LLAMA, **sizes, max_positions=512, kv_heads=2, windows=(25, None))
    tensor = 2 if devices == 8 else 1
    mesh = sweep_mesh(make_mesh(tensor=tensor, devices=jax.devices()[:devices]), 2)
    members = jnp.array([2.0, 3.0] if devices == 8 else [2.0, 2.5, 3.0, 3.5])
    params = random_params(config)
    rows = jax.tree.map(lambda x: np.concatenate([x, x]), rows_of())
    real = (rows.segment > 0)[..., None]

    def gradients(kernel):
        model = build(config, remat="dots", kernel=kernel)

        def loss(params, power, rows):
            return jnp.where(real, jnp.abs(model.apply(params, rows)) ** power, 0.0).sum()

        axes = (None, 0, None)
        if devices == 8:
            by_member = jax.vmap(jax.grad(loss), axes, spmd_axis_name=SWEEP)
        else:
            of_member, shared = jax.P(SWEEP), jax.P()
            by_member = jax.shard_map(
                jax.vmap(jax.grad(loss), axes),
                mesh=mesh,
                in_specs=(shared, of_member, shared),
                out_specs=of_member,
                axis_names={SWEEP},
                check_vma=False,
            )
        spread = jax.NamedSharding(mesh, jax.P(ROWS))
        placed = jax.device_put(params, tree_shardings(params, mesh, SHARDING_RULES))
        with jax.set_mesh(mesh):
            return jax.jit(by_member)(placed, members, jax.device_put(rows, spread))

    plain, close = (
        gradients(XLA),
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-3),
    )
    for kernel in (INTERPRETED, FLASH_INTERPRETED)[: 2 if devices == 8 else 1]:
        jax.tree.map(close, gradients(kernel), plain)


def lowered(kernel, platform, dtype=jnp.bfloat16, length=1024) -> str:
    """The program of a gradient, for a platform that need not be here."""
    *arrays, _ = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in heads(dtype, length))
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def loss(arrays, tokens):
        mask = kernel.mask(plain_rows(tokens), None)
        return kernel.attend(*arrays, mask, 0.3).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss)).trace(arrays, tokens)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_splash_lowers_for_a_tpu_and_has_no_array_quadratic_in_the_row():
    quadratic = re.compile(r"tensor<(\d+x)*1024x1024x")
    program = lowered(splash.SPLASH, "tpu")
    for kernel in ("splash_mha_fwd_residuals", "splash_mha_dq", "splash_mha_dkv"):
        assert kernel in program
    assert not quadratic.search(program)
    assert quadratic.search(lowered(XLA, "tpu"))


def test_cudnn_lowers_for_a_gpu_and_computes_no_scores_outside_its_kernels(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    program = lowered(kernels.CUDNN, "cuda")
    assert "__cudnn$fmhaScaleBiasSoftmax" in program
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in program
    assert "dot_general" not in program
    assert "cudnn" not in lowered(kernels.CUDNN, "cuda", length=1023)


def test_the_call_of_cudnn_means_plain_attention():
    same_call = functools.partial(kernels.attend_cudnn, implementation="xla")
    plain, outputs = (
        values_and_gradients(kernel, rows_of(), window=25)
        for kernel in (XLA, Kernel(attention_mask, same_call))
    )
    for a, b in zip(outputs, plain):
        np.testing.assert_allclose(a, b, atol=1e-5)


def device(platform, capability="9.0"):
    client = types.SimpleNamespace(platform_version="cuda 12" if platform == "gpu" else "")
    return types.SimpleNamespace(platform=platform, client=client, compute_capability=capability)


MODEL = {"vocab_size": 50, "width": 128, "layers": 1, "heads": 2, "mlp_width": 8}
PLAIN = DecoderConfig(**LLAMA, **MODEL, max_positions=8)
GEMMA = DecoderConfig(**LLAMA, **MODEL, max_positions=8, attention_softcap=50.0, windows=(4,))
WIDE = DecoderConfig(**LLAMA, **MODEL, max_positions=8, head_dim=256)
WIDER = DecoderConfig(**LLAMA, **MODEL, max_positions=8, head_dim=512)


def test_auto_takes_the_kernel_of_the_platform():
    choose = functools.partial(kernels.choose, "auto")
    assert choose(PLAIN, "bfloat16", device("cpu")) is XLA
    assert choose(PLAIN, "bfloat16", device("gpu")) is kernels.CUDNN
    for config in (PLAIN, GEMMA, WIDE):
        assert choose(config, "float32", device("gpu"), vmapped=True) is flash.FLASH
    for config in (PLAIN, GEMMA, WIDE):
        assert choose(config, "float32", device("tpu"), vmapped=True) is splash.SPLASH


@pytest.mark.parametrize(
    ("config", "dtype", "where", "vmapped", "reason", "instead"),
    [
        (PLAIN, "float32", device("gpu"), False, "bfloat16, not float32", flash.FLASH),
        (PLAIN, "bfloat16", device("gpu", "7.5"), False, "capability 8.0", XLA),
        (PLAIN, "bfloat16", device("gpu"), True, "vmap", flash.FLASH),
        (GEMMA, "bfloat16", device("gpu"), False, "softcap", flash.FLASH),
        (WIDE, "bfloat16", device("gpu"), False, "up to 128, not 256", flash.FLASH),
        (WIDER, "bfloat16", device("gpu"), False, "up to 128, not 512", XLA),
    ],
)
def test_what_cudnn_cannot_do_auto_gives_to_another_and_a_name_refuses(
    config, dtype, where, vmapped, reason, instead, caplog
):
    kernels._warn_once.cache_clear()
    for _ in range(2):
        assert kernels.choose("auto", config, dtype, where, vmapped=vmapped) is instead
    skipped = ["cudnn", "flash"] if instead is XLA else ["cudnn"]
    named = [message.split(":")[0].split()[-1] for message in caplog.messages]
    assert named == skipped
    assert reason in caplog.messages[0]
    with pytest.raises(ValueError, match=f"'cudnn': .*{reason}.*; set it to auto or xla"):
        kernels.choose("cudnn", config, dtype, where, vmapped=vmapped)


def test_what_flash_cannot_do_is_refused_by_name():
    with pytest.raises(ValueError, match="'flash': heads may have up to 256 dimensions"):
        kernels.choose("flash", WIDER, "bfloat16", device("gpu"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("splash", "config.model.attention: 'splash': it runs on TPUs, and this is a cpu"),
        ("cudnn", "config.model.attention: 'cudnn': it runs on GPUs of NVIDIA, and this is a cpu"),
        ("flash", "config.model.attention: 'flash': it runs on GPUs of NVIDIA, and this is a cpu"),
        ("flesh", "attention: 'flesh' is not one of auto, xla, cudnn, flash, splash"),
    ],
)
def test_an_attention_that_the_devices_do_not_have_names_its_key(name, message):
    config = default_config()
    config.model.attention = name
    with pytest.raises(ConfigError, match=message):
        setup.open_model(config, 50, make_mesh())


def test_a_row_too_long_for_splash_is_refused():
    tokens = jax.ShapeDtypeStruct((1, 2**16 + 2), jnp.int32)
    with pytest.raises(ValueError, match="splash takes 65536 at most"):
        jax.eval_shape(lambda tokens: splash.span_masks(plain_rows(tokens)), tokens)
