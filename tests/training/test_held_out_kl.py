"""The KL of held-out batches, with the reference's head on the mesh once for an evaluation."""

import types

import jax
import numpy as np
import pytest

from dpojax import sharding
from dpojax.head import Head, logits_of
from dpojax.stages.held_out_kl import KL, HeldOutKL, KLPrograms
from dpojax.training.metrics import Metric

TOKENS, WIDTH, VOCABULARY = 3, 4, 6


def kl_of_rows(policy, reference, rows):
    """KL of all tokens of a batch; stands for `build_divergence`, which has tests of its own."""
    del rows
    p, q = (jax.nn.log_softmax(logits_of(x[0], Head(*x[1:]))) for x in (policy, reference))
    return Metric((jax.numpy.exp(p) * (p - q)).sum(), TOKENS)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_head_of_the_reference_is_copied_once_for_all_batches(monkeypatch, with_bias):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    weight, bias = draw(VOCABULARY, WIDTH), draw(VOCABULARY) if with_bias else None
    hidden = [draw(1, 1, TOKENS, WIDTH) for _ in range(2)]
    change = draw(VOCABULARY, WIDTH)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    response = jax.device_put(np.zeros((1, 1, TOKENS), np.int32), device)
    rows = types.SimpleNamespace(response=response)
    programs = KLPrograms(
        head=lambda params: Head(weight + params, bias),
        hidden=lambda params, rows: hidden[batch],
        divergence=kl_of_rows,
    )
    copied, put = [], sharding.put
    monkeypatch.setattr(sharding, "put", lambda x, how: copied.append(np.shape(x)) or put(x, how))

    measure = HeldOutKL(programs, hidden, (weight, bias), (device, device)).begin()
    for batch in range(2):
        metric = measure(batch, change, rows)[KL]
        weights = (weight + change, weight)
        logits = [hidden[batch] @ w.T + (bias if with_bias else 0) for w in weights]
        p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits)
        np.testing.assert_allclose(metric.total, (p * np.log(p / q)).sum(), rtol=1e-5)
    assert measure(2, change, rows) == {}  # a batch beyond those that have hidden states
    assert copied.count(weight.shape) == 1
    assert copied.count(hidden[0].shape) == 2
