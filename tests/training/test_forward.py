"""Which frozen weights a forward pass reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.models import lora
from dpojax.training.forward import FrozenWeights, adapted, build_score, language_model

CONFIG = lora.LoraConfig(rank=2, alpha=4.0, targets=("attention/(query|value)",))


@pytest.fixture(scope="module")
def part(rows):
    return jax.tree.map(lambda x: x[0], rows)


@pytest.fixture(scope="module")
def adapters(params):
    """Adapters that change nothing yet."""
    return lora.init(jax.random.key(0), params, CONFIG)


@pytest.mark.slow
def test_the_live_reference_of_adapters_is_their_base_unless_another_is_named(
    model, params, reference_params, part, adapters
):
    forward = adapted(language_model(model, statistics=("kl",)), CONFIG)
    scored = part.response >= 0
    of_base = forward(adapters, part, FrozenWeights(base=params)).kl
    np.testing.assert_allclose(of_base[scored], 0, atol=1e-5)
    frozen = FrozenWeights(base=params, reference=reference_params)
    of_other = forward(adapters, part, frozen).kl
    assert jnp.all(of_other[scored] > 1e-4)


@pytest.mark.slow
def test_scores_have_the_kl_of_a_named_reference_alone(model, params, reference_params, rows):
    score = build_score(model)
    assert score(params, rows).kl is None
    kl = score(params, rows, reference=reference_params).kl
    live = language_model(model, statistics=("kl",))
    part = jax.tree.map(lambda x: x[0], rows)
    want = live(params, part, FrozenWeights(reference=reference_params)).kl
    scored = part.response >= 0
    np.testing.assert_allclose(kl[0][scored], want[scored], rtol=1e-5, atol=1e-6)
