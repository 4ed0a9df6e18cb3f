"""Which array of ours each tensor of a Hugging Face checkpoint is; used to load and to save."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Weight(NamedTuple):
    """One tensor of a checkpoint ("theirs") and the arrays of ours that it holds.

    Attributes:
      name: of their tensor; `{layer}` stands for the number of the layer.
      paths: of our arrays; several if their tensor is these arrays joined.
      layout: our axes, an arrow, their axes. Letters that stand together are one axis of theirs:
        "dnh -> nh d" is our [D, heads, head_dim] as their [heads * head_dim, D]. An asterisk marks
        the axis along which several arrays are joined. "dnh -> *nh d" has all heads of the first
        array, then all heads of the second. "dnh -> n*h d" has, for each head in turn, its part of
        every array.
    """

    name: str
    paths: tuple[str, ...]
    layout: str

    def their_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Compute the shape of their tensor from those of our arrays (without layers)."""
        sizes = dict(zip(self._theirs(), self._joined_shape(shapes)))
        groups = self.layout.split(" -> ")[1].replace("*", "").split()
        return tuple(int(np.prod([sizes[axis] for axis in group])) for group in groups)

    def split(self, tensor: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
        """Cut their tensor into our arrays, which are views of it."""
        axis, order = self._join_axis(), self._order()
        ends = np.cumsum([shape[order[axis]] for shape in shapes])
        pieces = np.split(tensor.reshape(self._joined_shape(shapes)), ends[:-1], axis=axis)
        return [piece.transpose(np.argsort(order)) for piece in pieces]

    def join(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Make their tensor of our arrays."""
        order = self._order()
        pieces = [array.transpose(order) for array in arrays]
        joined = np.concatenate(pieces, axis=self._join_axis())
        return joined.reshape(self.their_shape([array.shape for array in arrays]))

    def _theirs(self) -> str:
        """Their axes, none merged: "nhd" of "dnh -> nh d"."""
        return self.layout.split(" -> ")[1].replace(" ", "").replace("*", "")

    def _order(self) -> list[int]:
        """For each of their axes, its place among ours."""
        ours = self.layout.split(" -> ")[0]
        return [ours.index(axis) for axis in self._theirs()]

    def _join_axis(self) -> int:
        """The place of the joined axis among theirs, none merged; 0 if there is one array."""
        return max(0, self.layout.split(" -> ")[1].replace(" ", "").find("*"))

    def _joined_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of all arrays joined, their axes in order but none merged."""
        order, axis = self._order(), self._join_axis()
        sizes = [shapes[0][place] for place in order]
        sizes[axis] = sum(shape[order[axis]] for shape in shapes)
        return tuple(sizes)


def table(theirs: str, ours: str) -> Weight:
    """A matrix with one row for each token, position or label; the same in both."""
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
