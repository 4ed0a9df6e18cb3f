"""Model FLOPs against XLA's count, the matmul ceiling by a set clock, memory against the kernel."""

import itertools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.sharding import make_mesh
from dpojax.training import throughput
from dpojax.training.throughput import matmul_flops_per_second, memory_bytes, model_flops


def compiled_flops(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("backward", [False, True])
def test_model_flops_are_what_xla_counts_for_a_two_layer_network_with_a_head(backward):
    tokens, scored, width, hidden, vocabulary = 64, 16, 32, 128, 256
    up, down = jnp.ones((width, hidden)), jnp.ones((hidden, width))
    head, x = jnp.ones((width, vocabulary)), jnp.ones((tokens, width))

    def forward(up, down, head, x):
        return (((x @ up) @ down)[:scored] @ head).sum()

    # Of the input too, as in a model, where it is the hidden state of the layer below.
    function = jax.grad(forward, argnums=(0, 1, 2, 3)) if backward else forward
    counted = compiled_flops(function, up, down, head, x)
    ours = model_flops(up.size + down.size, head.size, tokens, scored, backward=backward)
    if backward:  # the loss is linear, so XLA need not redo the forward product of the head
        counted += 2 * head.size * scored
    assert ours == pytest.approx(counted, rel=0.05)


def test_a_token_costs_six_flops_a_parameter_to_train_on_and_two_to_score():
    assert model_flops(1000, 0, 1, 0) == 6000
    assert model_flops(1000, 0, 1, 0, backward=False) == 2000
    assert model_flops(0, 500, 10, 3) == 6 * 500 * 3


def test_frozen_weights_cost_what_xla_counts_without_their_gradient():
    tokens, width = 64, 32
    weight, x = jnp.ones((width, width)), jnp.ones((tokens, width))

    def forward(x):
        return jnp.tanh(x @ weight).sum()

    counted = compiled_flops(jax.grad(forward), x)
    assert model_flops(weight.size, 0, tokens, 0, frozen=True) == pytest.approx(counted, rel=0.15)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a hundredth of a second each time it is read."""
    ticks = itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: next(ticks) / 100)
    monkeypatch.setattr(throughput, "time", clock)
    return ticks


def test_the_ceiling_is_the_flops_of_a_square_product_by_its_seconds(clock):
    measured = matmul_flops_per_second("float32", size=64, seconds=0.1)
    assert measured == pytest.approx(2 * 64**3 / 0.01)
    assert next(clock) > 10  # it was repeated for the seconds that it may take


def test_the_ceiling_is_measured_once_per_dtype(clock):
    first = matmul_flops_per_second("float32", size=65, seconds=0.05)
    read = next(clock)
    assert matmul_flops_per_second(jnp.float32, size=65, seconds=0.05) == first
    assert next(clock) == read + 1
    matmul_flops_per_second("bfloat16", size=65, seconds=0.05)
    assert next(clock) > read + 2


def test_the_ceiling_of_one_device_can_be_measured_inside_a_mesh(clock):
    with jax.set_mesh(make_mesh(data=2, fsdp=4)):
        inside = matmul_flops_per_second("float32", size=160, seconds=0.05)
    assert inside == pytest.approx(2 * 160**3 / 0.01)


def test_peak_memory_of_a_cpu_is_the_kernels_peak_of_the_process():
    status = pathlib.Path("/proc/self/status").read_text()
    before = int(status.split("VmHWM:")[1].split()[0]) * 1024
    grown = np.ones(32 << 20, np.uint8)
    ((name, peak),) = memory_bytes().items()
    assert name == "peak_host_rss_bytes"
    assert before - (1 << 20) <= peak < before + 4 * grown.nbytes


def test_peak_memory_of_an_accelerator_is_that_of_its_fullest_device(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak, "bytes_in_use": 1}

    monkeypatch.setattr(throughput.jax, "local_devices", lambda: [Device(5), Device(7)])
    assert memory_bytes() == {"peak_device_bytes": 7}
