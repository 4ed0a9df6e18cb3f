"""A tiny Llama, ten pairs, and their rows, shared by the tests of training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.data.examples import Example
from dpojax.data.packing import plan
from dpojax.data.rows import collate
from dpojax.methods import preference
from dpojax.models import decoder
from dpojax.models.config import LLAMA, DecoderConfig
from dpojax.training.forward import build_score

VOCABULARY = 32  # so that every axis of the model is really sharded


def make_pairs(count: int, seed: int = 0, responses: int = 2) -> list[Example]:
    rng = np.random.default_rng(seed)
    ids = lambda most: rng.integers(0, VOCABULARY, rng.integers(1, most + 1)).astype(np.int32)
    return [
        Example(
            f"file:{i + 1}", ids(6), tuple(ids(9) for _ in range(responses)), (False,) * 2, None
        )
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def model():
    config = DecoderConfig(
        **LLAMA,
        vocab_size=VOCABULARY,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        mlp_width=24,
        max_positions=32,
        initializer_range=0.3,
    )
    return decoder.build(config)


@pytest.fixture(scope="session")
def params(model):
    return jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="session")
def reference_params(model):
    return jax.jit(model.init)(jax.random.key(1))


@pytest.fixture(scope="session")
def score(model):
    return jax.jit(build_score(model))


@pytest.fixture(scope="session")
def pairs():
    return make_pairs(10)


@pytest.fixture(scope="session")
def rows(pairs, score, reference_params):
    """All ten pairs in one batch [1, 8, ...] with the reference's log-probs."""
    shape = plan(pairs, [range(10)], length=32, multiple=8)
    rows = collate(pairs, range(10), shape)
    return rows._replace(reference=np.asarray(score(reference_params, rows).logprob))


@pytest.fixture(scope="session")
def objective():
    return preference.objective("dpo", {})


@pytest.fixture(scope="session")
def hyper():
    values = {"learning_rate": 0.1, "beta": 0.5, "label_smoothing": 0.1}
    return jax.tree.map(jnp.float32, values)
