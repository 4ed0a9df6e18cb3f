"""The shapes of models that are known by name give the published numbers of parameters."""

import jax
import jax.numpy as jnp
import pytest

from dpojax.models import decoder, encoder
from dpojax.models.config import DecoderConfig
from dpojax.models.published import PUBLISHED, published_config

PARAMETERS = {  # of the safetensors files on the hub
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "siebert/sentiment-roberta-large-english": 355_361_794,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_shape_has_the_published_number_of_parameters(name):
    config = published_config(name)
    if isinstance(config, DecoderConfig):
        model = decoder.build(config, compute_dtype=jnp.float32)
    else:
        model = encoder.build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == PARAMETERS[name]


def test_a_name_that_is_not_known_has_no_shape():
    assert published_config("nobody/nothing") is None
