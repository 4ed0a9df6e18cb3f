"""Where every tensor of a Hugging Face checkpoint goes, as data read in both directions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Weight(NamedTuple):
    """One of their tensors and the arrays of ours that it holds.

    name: `{layer}` stands for the layer number. paths: several when their tensor is these arrays
    joined along its last axis. layout: our axes, an arrow, and their axes, where letters that
    stand together are one axis of theirs: "dnh -> nh d" is our [D, heads, head_dim] as their
    [heads * head_dim, D].
    """

    name: str
    paths: tuple[str, ...]
    layout: str

    def their_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of their tensor, from those of our arrays (without the axis of layers)."""
        pieces = [_their_piece(self.layout, shape) for shape in shapes]
        return (*pieces[0][:-1], sum(piece[-1] for piece in pieces))

    def split(self, tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """Our arrays, as views of their tensor."""
        ends = np.cumsum([_their_piece(self.layout, shape)[-1] for shape in shapes])
        pieces = np.split(tensor, ends[:-1], axis=-1)
        order = _order(self.layout)
        return [
            piece.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
            for piece, shape in zip(pieces, shapes)
        ]

    def join(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Their tensor, from our arrays."""
        order = _order(self.layout)
        pieces = [
            array.transpose(order).reshape(_their_piece(self.layout, array.shape))
            for array in arrays
        ]
        return np.concatenate(pieces, axis=-1)


def _order(layout: str) -> list[int]:
    ours, theirs = layout.split(" -> ")
    return [ours.index(axis) for axis in theirs.replace(" ", "")]


def _their_piece(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    ours, theirs = layout.split(" -> ")
    size = dict(zip(ours, shape, strict=True))
    return tuple(int(np.prod([size[axis] for axis in group])) for group in theirs.split())


def _affine(theirs: str, ours: str, kernel: str, bias: str) -> tuple[Weight, Weight]:
    return (
        Weight(f"{theirs}.weight", (f"{ours}/kernel",), kernel),
        Weight(f"{theirs}.bias", (f"{ours}/bias",), bias),
    )


def _norm(theirs: str, ours: str) -> tuple[Weight, Weight]:
    return (
        Weight(f"{theirs}.weight", (f"{ours}/scale",), "d -> d"),
        Weight(f"{theirs}.bias", (f"{ours}/bias",), "d -> d"),
    )


def _fused(theirs: str, leaf: str, layout: str) -> Weight:
    parts = ("query", "key", "value")
    return Weight(theirs, tuple(f"blocks/attention/{part}/{leaf}" for part in parts), layout)


_G, _L = "transformer.h.{layer}", "model.layers.{layer}"

# A table lists all that a family may hold; entries whose arrays a config lacks are left out.
GPT2_WEIGHTS = (
    Weight("transformer.wte.weight", ("embed/tokens",), "vd -> v d"),
    Weight("transformer.wpe.weight", ("embed/positions",), "vd -> v d"),
    *_norm(f"{_G}.ln_1", "blocks/attention_norm"),
    _fused(f"{_G}.attn.c_attn.weight", "kernel", "dnh -> d nh"),
    _fused(f"{_G}.attn.c_attn.bias", "bias", "nh -> nh"),
    *_affine(f"{_G}.attn.c_proj", "blocks/attention/out", "nhd -> nh d", "d -> d"),
    *_norm(f"{_G}.ln_2", "blocks/mlp_norm"),
    *_affine(f"{_G}.mlp.c_fc", "blocks/mlp/up", "df -> d f", "f -> f"),
    *_affine(f"{_G}.mlp.c_proj", "blocks/mlp/down", "fd -> f d", "d -> d"),
    *_norm("transformer.ln_f", "final_norm"),
    Weight("lm_head.weight", ("head/kernel",), "vd -> v d"),
)

LLAMA_WEIGHTS = (
    Weight("model.embed_tokens.weight", ("embed/tokens",), "vd -> v d"),
    *_norm(f"{_L}.input_layernorm", "blocks/attention_norm"),
    *_affine(f"{_L}.self_attn.q_proj", "blocks/attention/query", "dnh -> nh d", "nh -> nh"),
    *_affine(f"{_L}.self_attn.k_proj", "blocks/attention/key", "dnh -> nh d", "nh -> nh"),
    *_affine(f"{_L}.self_attn.v_proj", "blocks/attention/value", "dnh -> nh d", "nh -> nh"),
    *_affine(f"{_L}.self_attn.o_proj", "blocks/attention/out", "nhd -> d nh", "d -> d"),
    *_norm(f"{_L}.post_attention_layernorm", "blocks/mlp_norm"),
    *_affine(f"{_L}.mlp.gate_proj", "blocks/mlp/gate", "df -> f d", "f -> f"),
    *_affine(f"{_L}.mlp.up_proj", "blocks/mlp/up", "df -> f d", "f -> f"),
    *_affine(f"{_L}.mlp.down_proj", "blocks/mlp/down", "fd -> d f", "d -> d"),
    *_norm("model.norm", "final_norm"),
    Weight("lm_head.weight", ("head/kernel",), "vd -> v d"),
)
