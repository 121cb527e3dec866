"""The tensors of a model's files and the leaves of its parameter tree, for a given configuration.

The table of a family (``models.hf.families``) is the same for every model of the family. Here it is
expanded for one model: one entry for each layer, plus the head or classifier that the model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
from flax.traverse_util import flatten_dict

from vbon_jax.models import decoder, encoder, heads
from vbon_jax.models.config import Params
from vbon_jax.models.encoder import EncoderConfig
from vbon_jax.models.hf.config_files import Config
from vbon_jax.models.hf.family import Family, Tensor
from vbon_jax.models.hf.layouts import AS_IS, Shape


class Entry(NamedTuple):
    """One tensor of a model's files.

    Attributes:
      name: name in the file, without the family's prefix.
      row: the row of the family's table that it belongs to.
      layer: index of its layer; None for a tensor outside the blocks.
    """

    name: str
    row: Tensor
    layer: int | None


def leaf_shapes(config: Config, num_labels: int | None) -> dict[str, Shape]:
    """Returns the shape of every leaf of a model's parameter tree, without creating arrays.

    Args:
      config: the configuration of the decoder or encoder.
      num_labels: number of labels of a classifier; None for a causal language model.

    Returns:
      Shapes by path, such as "decoder/wte".
    """

    def init(key: jax.Array) -> Params:
        if isinstance(config, EncoderConfig):
            return encoder.init(config, num_labels or 1, key)
        tree = {"decoder": decoder.init(config, key)}
        if num_labels is not None:
            tree["decoder"].pop("head", None)  # it predicts no tokens
            tree["score"] = heads.init_score(config, num_labels, key)
        return tree

    tree = jax.eval_shape(init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def entries(
    family: Family, config: Config, num_labels: int | None, shapes: Mapping[str, Shape]
) -> list[Entry]:
    """Returns all tensors of a model's files.

    Args:
      family: the model's family.
      config: its configuration.
      num_labels: number of labels of a classifier; None for a causal language model.
      shapes: ``leaf_shapes`` of the same model.

    Returns:
      Entries whose paths start at the root of our tree: "decoder/", "encoder/" or "score/".
    """
    root = "decoder" if family.head else "encoder"
    rows = [
        row._replace(paths=tuple(f"{root}/{path}" for path in row.paths))
        for row in family.tensors(config)
    ]
    if "decoder/head" in shapes:
        rows.append(Tensor(family.head, ("decoder/head",), AS_IS))
    if num_labels is not None:
        rows += family.classifier
    paths = [path for row in rows for path in row.paths]
    assert sorted(paths) == sorted(shapes), set(paths) ^ set(shapes)  # a hole in a family's table
    return [
        Entry(row.name.format(i=i), row, i)
        for row in rows
        for i in (range(config.layers) if "{i}" in row.name else (None,))
    ]


def row_shapes(entry: Entry, shapes: Mapping[str, Shape]) -> list[Shape]:
    """Returns the shapes of an entry's leaves, without the layer axis."""
    return [shapes[path][entry.layer is not None :] for path in entry.row.paths]
