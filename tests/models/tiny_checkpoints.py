"""Tiny random checkpoints, made and run by transformers' own torch models."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpojax.models import decoder, huggingface
from dpojax.models.attention import plain_rows

NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LANGUAGE = "AutoModelForCausalLM"


def make(model_type: str, *, seed: int = 0, kind: str = LANGUAGE, **settings):
    """A torch model in eval mode whose every parameter, norms and biases too, is random."""
    torch = pytest.importorskip("torch", reason="the expected values come from torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **NO_IDS | settings)
    torch.manual_seed(seed)
    model = getattr(transformers, kind).from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return model.eval()


def from_pretrained(folder: pathlib.Path, kind: str = LANGUAGE):
    """The torch model in a folder, every tensor accounted for."""
    pytest.importorskip("torch", reason="transformers builds its models with torch")
    transformers = pytest.importorskip("transformers")
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def assert_same_tensors(one, other):
    """Two torch models have the same tensors, bit for bit."""
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert (tensor == other[name]).all(), name


def torch_logits(model, tokens: np.ndarray) -> np.ndarray:
    """Float32 [R, T, V]."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def our_logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    """Float32 [R, T, V] of the checkpoint in a folder."""
    config, params, _ = huggingface.load(folder)
    model = decoder.build(config)
    logits = jax.jit(lambda params, rows: decoder.logits(model, params, rows))
    return np.asarray(logits(params, plain_rows(jnp.asarray(tokens))))


def random_tokens(vocab_size: int, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape)


def random_params(config, seed: int = 0):
    """Params with noise everywhere (no norm is one, no bias zero), made by NumPy for speed."""
    shapes = jax.eval_shape(decoder.build(config).init, jax.random.key(0))
    rng = np.random.default_rng(seed)

    def leaf(keys, shape):
        center = 1.0 if keys[-1].key == "scale" else 0.0
        return jnp.asarray(center + 0.25 * rng.standard_normal(shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
