"""Where every tensor of a Hugging Face checkpoint goes, as data read in both directions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Weight(NamedTuple):
    """One of their tensors and the arrays of ours that it holds.

    name: `{layer}` stands for the layer number. paths: several when their tensor is these arrays
    joined. layout: our axes, an arrow, and their axes, where letters that stand together are one
    axis of theirs: "dnh -> nh d" is our [D, heads, head_dim] as their [heads * head_dim, D]. An
    asterisk stands before the axis along which several arrays are joined: "dnh -> *nh d" has all
    heads of the first array, then all of the second; "dnh -> n*h d" has, for each head in turn,
    its part of every array.
    """

    name: str
    paths: tuple[str, ...]
    layout: str

    def their_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of their tensor, from those of our arrays (without the axis of layers)."""
        sizes = dict(zip(self._theirs(), self._joined_shape(shapes)))
        groups = self.layout.split(" -> ")[1].replace("*", "").split()
        return tuple(int(np.prod([sizes[axis] for axis in group])) for group in groups)

    def split(self, tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """Our arrays, as views of their tensor."""
        axis, order = self._join_axis(), self._order()
        ends = np.cumsum([shape[order[axis]] for shape in shapes])
        pieces = np.split(tensor.reshape(self._joined_shape(shapes)), ends[:-1], axis=axis)
        return [piece.transpose(np.argsort(order)) for piece in pieces]

    def join(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Their tensor, from our arrays."""
        order = self._order()
        pieces = [array.transpose(order) for array in arrays]
        joined = np.concatenate(pieces, axis=self._join_axis())
        return joined.reshape(self.their_shape([array.shape for array in arrays]))

    def _theirs(self) -> str:
        """Their axes, none merged."""
        return self.layout.split(" -> ")[1].replace(" ", "").replace("*", "")

    def _order(self) -> list[int]:
        ours = self.layout.split(" -> ")[0]
        return [ours.index(axis) for axis in self._theirs()]

    def _join_axis(self) -> int:
        return max(0, self.layout.split(" -> ")[1].replace(" ", "").find("*"))

    def _joined_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of all arrays joined, their axes in order but none merged."""
        order, axis = self._order(), self._join_axis()
        sizes = [shapes[0][place] for place in order]
        sizes[axis] = sum(shape[order[axis]] for shape in shapes)
        return tuple(sizes)


def table(theirs: str, ours: str) -> Weight:
    """A matrix with a row per token, position or label, the same in both."""
    return Weight(theirs, (ours,), "vd -> v d")


def affine(theirs: str, ours: str, kernel: str, bias: str) -> tuple[Weight, Weight]:
    """The kernel and bias of an affine map, with the layout of each."""
    return (
        Weight(f"{theirs}.weight", (f"{ours}/kernel",), kernel),
        Weight(f"{theirs}.bias", (f"{ours}/bias",), bias),
    )


def norm(theirs: str, ours: str) -> tuple[Weight, Weight]:
    """The scale and bias of a norm."""
    return (
        Weight(f"{theirs}.weight", (f"{ours}/scale",), "d -> d"),
        Weight(f"{theirs}.bias", (f"{ours}/bias",), "d -> d"),
    )


def fused(theirs: str, leaf: str, parts: tuple[str, ...], layout: str) -> Weight:
    """One tensor that holds the same leaf of several parts."""
    return Weight(theirs, tuple(f"{part}/{leaf}" for part in parts), layout)


ATTENTION = "blocks/attention"
QKV = tuple(f"{ATTENTION}/{part}" for part in ("query", "key", "value"))
GATE_UP = ("blocks/mlp/gate", "blocks/mlp/up")
SCORE = table("score.weight", "score/kernel")
