"""How leaves of our parameter tree are stored as tensors in Hugging Face files.

Each layout knows the shape of the file's tensor, and converts it into our leaves and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """One way of storing one or several leaves as a tensor.

    Attributes:
      shape: maps the shapes of the leaves to the shape of the file's tensor.
      read: maps the file's tensor and the shapes of the leaves to the leaves, as views if possible.
      write: maps the leaves to the file's tensor.
      rows: whether slices of the tensor's first axis are slices of the leaf's first axis, so that a
        large tensor can be read piece by piece.
    """

    shape: Callable[[Sequence[Shape]], Shape]
    read: Callable[[np.ndarray, Sequence[Shape]], list[np.ndarray]]
    write: Callable[[Sequence[np.ndarray]], np.ndarray]
    rows: bool = False


def _linear(in_axes: int) -> Layout:
    """Returns the layout of a torch.nn.Linear weight [out, in].

    The leaf is [*in, *out] with ``in_axes`` input axes, the transpose of the file's tensor.
    """

    def shape(leaves: Sequence[Shape]) -> Shape:
        (leaf,) = leaves
        return (math.prod(leaf[in_axes:]), math.prod(leaf[:in_axes]))

    return Layout(
        shape,
        lambda array, leaves: [array.T.reshape(leaves[0])],
        lambda leaves: leaves[0].reshape(math.prod(leaves[0].shape[:in_axes]), -1).T,
    )


def _conv1d(in_axes: int) -> Layout:
    """Returns the layout of GPT-2's Conv1D weight [in, out].

    The leaf is [*in, *out] with ``in_axes`` input axes, a reshape of the file's tensor.
    """

    def shape(leaves: Sequence[Shape]) -> Shape:
        (leaf,) = leaves
        return (math.prod(leaf[:in_axes]), math.prod(leaf[in_axes:]))

    return Layout(
        shape,
        lambda array, leaves: [array.reshape(leaves[0])],
        lambda leaves: leaves[0].reshape(math.prod(leaves[0].shape[:in_axes]), -1),
    )


AS_IS = Layout(
    lambda leaves: leaves[0], lambda array, leaves: [array], lambda leaves: leaves[0], rows=True
)
# A bias over heads: ours is [H, K], the file's [H * K].
FLAT = Layout(
    lambda leaves: (math.prod(leaves[0]),),
    lambda array, leaves: [array.reshape(leaves[0])],
    lambda leaves: leaves[0].reshape(-1),
)
LINEAR = _linear(1)  # [D, ...] from [..., D]
LINEAR_HEADS = _linear(2)  # the projection out of the heads, [H, K, D] from [D, H * K]
CONV1D = _conv1d(1)
CONV1D_HEADS = _conv1d(2)

# Queries, keys and values in one tensor. GPT-2: [D, 3 * H * K], the three one after the other.
CONV1D_QKV = Layout(
    lambda leaves: (leaves[0][0], sum(math.prod(leaf[1:]) for leaf in leaves)),
    lambda array, leaves: [
        part.reshape(leaf) for part, leaf in zip(np.split(array, 3, axis=1), leaves, strict=True)
    ],
    lambda leaves: np.concatenate([x.reshape(x.shape[0], -1) for x in leaves], axis=1),
)
FLAT_QKV = Layout(
    lambda leaves: (sum(math.prod(leaf) for leaf in leaves),),
    lambda array, leaves: [
        part.reshape(leaf) for part, leaf in zip(np.split(array, 3), leaves, strict=True)
    ],
    lambda leaves: np.concatenate([x.reshape(-1) for x in leaves]),
)
# GPT-NeoX: [H * 3 * K, D] and [H * 3 * K], the three side by side within each head.
LINEAR_HEAD_QKV = Layout(
    lambda leaves: (3 * math.prod(leaves[0][1:]), leaves[0][0]),
    lambda array, leaves: [
        array.reshape(leaves[0][1], 3, leaves[0][2], leaves[0][0])[:, i].transpose(2, 0, 1)
        for i in range(3)
    ],
    lambda leaves: np.stack([x.transpose(1, 2, 0) for x in leaves], axis=1).reshape(
        -1, leaves[0].shape[0]
    ),
)
FLAT_HEAD_QKV = Layout(
    lambda leaves: (3 * math.prod(leaves[0]),),
    lambda array, leaves: [array.reshape(leaves[0][0], 3, leaves[0][1])[:, i] for i in range(3)],
    lambda leaves: np.stack(leaves, axis=1).reshape(-1),
)
