"""A step's predicted memory on a device is what its program needs, to a third."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpojax import sharding
from dpojax.data.packing import Shape
from dpojax.data.rows import empty
from dpojax.methods import preference
from dpojax.models import decoder, lora
from dpojax.models.attention import XLA
from dpojax.models.config import GPT2, LLAMA, DecoderConfig
from dpojax.models.splash import SPLASH
from dpojax.training import memory
from dpojax.training.forward import FrozenWeights, adapted, language_model
from dpojax.training.state import abstract_state, make_schedule
from dpojax.training.step import build_step

SIZES = {"layers": 3, "width": 128, "heads": 4, "mlp_width": 512, "max_positions": 256}
SHAPE = Shape(micro_batches=1, rows=8, length=128, scored=96, examples=4, responses=2)
MANY = 2**30
HYPER = {name: jnp.float32(x) for name, x in preference.resolve("dpo", {}).items()}
HYPER["learning_rate"] = jnp.float32(1)


def with_reference(rows):
    return rows._replace(reference=np.zeros(rows.target.shape, np.float32))


def jitted_step(forward, optimizer):
    objective, schedule = preference.objective("dpo", {}), make_schedule("constant", 0, 1)
    return jax.jit(build_step(forward, objective, optimizer, schedule), donate_argnums=0)


def predicted_and_real(optimizer, *, family=GPT2, remat="dots", max_logits=MANY, **changes):
    vocabulary, axes = changes.pop("vocabulary", 2048), changes.pop("mesh", (1, 1, 1))
    config = DecoderConfig(**family, **SIZES, vocab_size=vocabulary)
    shape = SHAPE._replace(**changes)
    mesh = sharding.make_mesh(*axes, devices=jax.devices()[: math.prod(axes)])
    model = decoder.build(config, remat=remat)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = abstract_state(params, optimizer, mesh, decoder.SHARDING_RULES)
    rows = sharding.put_rows(with_reference(empty(shape)), mesh)
    forward = language_model(model, max_logits=max_logits)
    with jax.set_mesh(mesh):
        compiled = jitted_step(forward, optimizer).lower(state, rows, HYPER).compile()
    found = memory.predict(config, shape, mesh, state=state, remat=remat, max_logits=max_logits)
    assert memory.bytes_per_device(state.params) == found.weights
    return found.total, memory.bytes_per_device(state) + memory.temporary_bytes(compiled)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"remat": "full"},
        pytest.param({"length": 256}, marks=pytest.mark.long),
        pytest.param({"micro_batches": 3}, marks=pytest.mark.long),
        {"family": LLAMA},
        pytest.param({"vocabulary": 32768, "max_logits": 2**22}, marks=pytest.mark.long),
        pytest.param({"vocabulary": 32768, "mesh": (1, 1, 4)}, marks=pytest.mark.long),
        {"vocabulary": 32767, "mesh": (1, 1, 4)},
        pytest.param(
            {"vocabulary": 32768, "mesh": (2, 1, 2), "max_logits": 2**23}, marks=pytest.mark.long
        ),
        pytest.param(
            {"vocabulary": 32768, "mesh": (1, 2, 2), "max_logits": 2**23}, marks=pytest.mark.long
        ),
    ],
    ids=str,
)
def test_the_prediction_is_within_a_third_of_the_program(changes):
    predicted, real = predicted_and_real(optax.scale_by_adam(), **changes)
    assert real / 1.34 < predicted < real * 1.34


def test_adapters_need_their_base_and_no_second_kernel_and_no_gradient_of_one():
    """Weights of 512 x 512 and more outweigh the activations of a single row."""
    config = DecoderConfig(**GPT2, **SIZES | {"width": 512, "mlp_width": 2048}, vocab_size=2048)
    shape, mesh = SHAPE._replace(rows=1), sharding.make_mesh(devices=jax.devices()[:1])
    model, optimizer = decoder.build(config, remat="dots"), optax.scale_by_adam()
    base = jax.eval_shape(model.init, jax.random.key(0))
    adapters = lora.LoraConfig(rank=4, alpha=8.0, targets=("attention/(query|value)", "mlp"))
    started = jax.eval_shape(lambda: lora.init(jax.random.key(0), base, adapters))
    state = abstract_state(started, optimizer, mesh, lora.LORA_RULES)
    rows = sharding.put_rows(with_reference(empty(shape)), mesh)
    forward = adapted(language_model(model, max_logits=MANY), adapters)
    step, frozen = jitted_step(forward, optimizer), FrozenWeights(base=base)
    with jax.set_mesh(mesh):
        compiled = step.lower(state, rows, HYPER, frozen).compile()
    real = memory.bytes_per_device((state, base)) + memory.temporary_bytes(compiled)
    given = {"state": state, "frozen": base, "max_logits": MANY}
    found = memory.predict(config, shape, mesh, **given)
    assert found.total == pytest.approx(real, rel=0.1)
    whole = abstract_state(base, optimizer, mesh, decoder.SHARDING_RULES)
    trained = memory.predict(config, shape, mesh, state=whole, max_logits=MANY)
    assert trained.logits - found.logits == 4 * 2048 * 512  # the gradient of the head
    # Merged, the program would have the kernels once more, and a gradient of their size.
    kernels = 4 * 3 * 512 * (2 * 512 + 2 * 2048)
    assert memory.bytes_per_device(lora.adapted(base, started)) == kernels
    assert memory.temporary_bytes(compiled) < kernels


def test_under_fsdp_gpus_hold_two_kernels_of_every_layer_a_second_time():
    """XLA's program of Llama 8B on two H200 turns f32[32, 14336, 2048] and f32[32, 32, 128, 2048]
    round: 3.5 and 1 GiB."""
    sizes = {"layers": 32, "width": 4096, "heads": 32, "mlp_width": 14336, "max_positions": 8}
    config = DecoderConfig(**LLAMA, **sizes, vocab_size=8)

    def gathered(platform):
        devices = np.array([SimpleNamespace(platform=platform)] * 2)
        mesh = SimpleNamespace(shape={"data": 1, "fsdp": 2, "tensor": 1}, devices=devices)
        return memory._gathered(config, mesh, size=2, ways=1)

    assert gathered("gpu") - gathered("tpu") == 4.5 * 2**30


def test_what_a_program_needs_is_what_it_is_given_and_what_it_makes_beside():
    """A state of 2 MiB updated in place from 1 MiB of rows; 3 MiB of other results."""
    mebi = lambda n: jax.ShapeDtypeStruct((n, 2**18), jnp.float32)
    step = lambda state, rows: (state + rows, jnp.concatenate([state, rows]))
    compiled = jax.jit(step, donate_argnums=0).lower(mebi(2), mebi(1)).compile()
    found = compiled.memory_analysis()
    assert memory.needed(compiled) == (
        f"{6 + found.temp_size_in_bytes // 2**20} MiB on each device (3 MiB for arguments, "
        f"{3 + found.temp_size_in_bytes // 2**20} MiB for results and temporary arrays)"
    )


def test_activations_are_linear_in_the_row_only_where_no_scores_are_kept():
    config = DecoderConfig(**GPT2, **SIZES | {"heads": 16}, vocab_size=8)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state = abstract_state({}, optax.sgd(1.0), mesh, decoder.SHARDING_RULES)

    def activations(kernel, length):
        shape, given = SHAPE._replace(length=length), {"state": state, "max_logits": MANY}
        return memory.predict(config, shape, mesh, kernel=kernel, **given).activations

    assert activations(SPLASH, 8192) == 2 * activations(SPLASH, 4096)
    assert activations(XLA, 8192) > 3 * activations(XLA, 4096)


def test_bytes_of_a_device_are_those_of_its_shards():
    mesh = sharding.make_mesh(2, 4, 1)
    params = {"blocks": {"mlp": {"up": {"kernel": jnp.zeros((2, 16, 32), jnp.bfloat16)}}}}
    shardings = sharding.tree_shardings(params, mesh, decoder.SHARDING_RULES)
    assert memory.bytes_per_device(jax.device_put(params, shardings)) == 2 * 4 * 32 * 2
    assert memory.bytes_per_device(None) == 0


def test_the_host_has_memory_to_give():
    assert 2**28 < 8 * memory.limit_bytes() < 2**50


@pytest.mark.parametrize(
    ("kernel", "axes", "tokens"),
    [
        # Of a layer's 128 x 512 weights a token stores 2 x 128 numbers, those of 4 heads, their
        # keys and values, and 512: 1,152 in all, of which a tensor axis divides the last 896.
        (XLA, (1, 1, 1), 128 * 512 / 1152),
        (XLA, (2, 1, 4), 2 * (128 * 512 / 4) / (256 + 896 / 4)),
        (SPLASH, (2, 1, 4), 2 * (128 * 512 / 4) / (256 + (896 + 128) / 4)),
    ],
)
def test_a_gradient_is_as_large_as_the_activations_of_so_many_tokens(kernel, axes, tokens):
    config = DecoderConfig(**GPT2, **SIZES, vocab_size=8)
    mesh = sharding.make_mesh(*axes, devices=jax.devices()[: math.prod(axes)])
    params = {"blocks": {"mlp": {"up": {"kernel": jnp.zeros((3, 128, 512))}}}}
    shardings = sharding.tree_shardings(params, mesh, decoder.SHARDING_RULES)
    params = jax.device_put(params, shardings)
    given = {"remat": "dots", "dtype": "float32", "kernel": kernel}
    assert memory.gradient_in_tokens(config, params, mesh, **given) == pytest.approx(tokens)


def test_a_lean_function_compiles_once_and_gives_what_it_gave(caplog):
    def double(state, by):
        return state * by

    lean = memory.lean(jax.jit(double, donate_argnums=0))
    given = [(jnp.float32(start), jnp.float32(2)) for start in (3, 5)]
    with jax.log_compiles():
        assert [float(lean(*each)) for each in given] == [6, 10]
    compiled = [x for x in caplog.messages if "Finished XLA compilation of jit(double)" in x]
    assert len(compiled) == 1


def test_a_lean_function_gives_memory_back_between_compiling_and_running(monkeypatch):
    done = []

    class Jitted:
        def __call__(self):
            done.append("run")

        def lower(self):
            return self

        def compile(self):
            done.append("compile")

    monkeypatch.setattr(memory, "give_back", lambda: done.append("trim"))
    monkeypatch.setattr(memory, "needed", lambda program: "5 MiB")
    lean = memory.lean(Jitted(), say=done.append)
    lean()
    lean()
    assert done == ["compile", "compiled in 0 s; the step needs 5 MiB", "trim", "run", "run"]
