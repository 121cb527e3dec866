"""Reading models from Hugging Face directories, by the tables of ``models.hf.families``.

Tensors are read one at a time into arrays that are already on their devices, so the host holds
about one tensor at a time. Every tensor in the files must be accounted for.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, SingleDeviceSharding

from vbon_jax.models.config import DTYPES, DecoderConfig, Params
from vbon_jax.models.hf import config_files, pieces, tables, tensor_files
from vbon_jax.models.hf.config_files import Config, Labels, read_config
from vbon_jax.models.hf.family import Family
from vbon_jax.models.hf.layouts import Shape
from vbon_jax.models.hf.tables import Entry
from vbon_jax.models.hf.tensor_files import CheckpointError

# The matrix of a head's scores, of a decoder and of encoders: [labels, D] in the files.
_SCORES = ("score/kernel", "score/out/kernel")

Place = Callable[[str, Shape], NamedSharding | SingleDeviceSharding]


def _slice(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    return array[start:stop]


def _fill(
    leaves: dict[str, jax.Array],
    shardings: Mapping[str, pieces.Where],
    entry: Entry,
    found: tensor_files.Found,
    shapes: list[Shape],
) -> None:
    """Reads one tensor into its leaves; host memory is released on return."""
    rows = functools.partial(tensor_files.read_rows, found)
    if entry.row.layout.rows:
        getters: list[Callable[[int, int], np.ndarray]] = [rows]
    else:
        views = entry.row.layout.read(rows(0, found.shape[0]), shapes)
        getters = [functools.partial(_slice, view) for view in views]
    for path, getter in zip(entry.row.paths, getters, strict=True):
        leaves[path] = pieces.fill(leaves[path], shardings[path], entry.layer, getter)


def _load(
    directory: Path,
    found: Mapping[str, tensor_files.Found],
    family: Family,
    config: Config,
    num_labels: int | None,
    place: Place | None,
    dtype: str,
) -> Params:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: give one of {list(DTYPES)}")
    shapes = tables.leaf_shapes(config, num_labels)
    entries = tables.entries(family, config, num_labels, shapes)
    wanted = {e.name: e.row.layout.shape(tables.row_shapes(e, shapes)) for e in entries}
    tied = num_labels is None and family.head in found and family.head not in wanted
    if tied:
        wte = next(e.name for e in entries if e.row.paths == ("decoder/wte",))
        wanted[family.head] = wanted[wte]
    tensor_files.check(found, wanted, directory)
    if tied and not tensor_files.equal(found[wte], found[family.head]):
        raise CheckpointError(
            f"{directory}: {family.head} differs from {wte}, but config.json ties them:"
            " tie_word_embeddings must be false in it for an untied model"
        )
    shardings = {p: None if place is None else place(p, shape) for p, shape in shapes.items()}
    leaves = {p: pieces.zeros(shape, dtype, shardings[p]) for p, shape in shapes.items()}
    for entry in sorted(entries, key=lambda e: found[e.name][:2]):  # as they lie on the disk
        _fill(leaves, shardings, entry, found[entry.name], tables.row_shapes(entry, shapes))
    return unflatten_dict(leaves, sep="/")


def load_decoder(
    path: str | os.PathLike[str], *, place: Place | None = None, dtype: str = "float32"
) -> tuple[DecoderConfig, Params]:
    """Reads a causal language model from a Hugging Face directory.

    Args:
      path: a local directory with config.json and model.safetensors, or with the shards that
        model.safetensors.index.json lists. Tensor names may have the family's prefix or not.
      place: maps the path of a leaf, such as "decoder/wte", and its shape to its sharding; the axis
        of layers must not be sharded. None places all leaves on the default device.
      dtype: dtype of all parameters, "float32" or "bfloat16". That of the files may be float32,
        float16 or bfloat16.

    Returns:
      (configuration with compute_dtype float32, the decoder's tree of JAX arrays).

    Raises:
      CheckpointError: if a file is absent or unreadable, a setting is not supported, a tensor is
        missing, unexpected, duplicate, or of another shape or dtype, or a tied output matrix
        differs from the embedding.
      ValueError: if dtype is not supported, or ``place`` shards the axis of layers.
    """
    family, config, raw = read_config(path)
    where = str(Path(path) / "config.json")
    if not isinstance(config, DecoderConfig):
        raise CheckpointError(
            f"{where}: model_type is {raw['model_type']!r}, an encoder: a causal language model is"
            " needed here"
        )
    is_classifier = family.sequence in (raw.get("architectures") or ())
    config_files.check_architecture(raw, not is_classifier, family.causal, where)
    found = tensor_files.scan(Path(path), family.prefix, family.buffers)
    return config, _load(Path(path), found, family, config, None, place, dtype)["decoder"]


def load_classifier(
    path: str | os.PathLike[str], *, place: Place | None = None, dtype: str = "float32"
) -> tuple[Config, Params, Labels]:
    """Reads a sequence classifier from a Hugging Face directory.

    It is a decoder with a score head, or an encoder.

    Args:
      path: a local directory, as for ``load_decoder``.
      place: as for ``load_decoder``, with paths that start with "decoder/", "encoder/" or "score/".
      dtype: as for ``load_decoder``.

    Returns:
      (configuration, tree {"decoder" or "encoder", "score"} of JAX arrays, labels of the scores;
      see ``config_files.labels``). A scalar reward model has one label.

    Raises:
      CheckpointError: as ``load_decoder`` does, if config.json does not say what each score of the
        weights is, or if ``architectures`` names another kind of model.
      ValueError: as ``load_decoder`` does.
    """
    family, config, raw = read_config(path)
    where = str(Path(path) / "config.json")
    fits = family.sequence in (raw.get("architectures") or (family.sequence,))
    config_files.check_architecture(raw, fits, family.sequence, where)
    found = tensor_files.scan(Path(path), family.prefix, family.buffers)
    head = next(row.name for row in family.classifier if row.paths[0] in _SCORES)
    rows = next(iter(found[head].shape), None) if head in found else None  # _load refuses None
    labels = config_files.labels(raw, where, rows)
    params = _load(Path(path), found, family, config, len(labels.names), place, dtype)
    return config, params, labels
