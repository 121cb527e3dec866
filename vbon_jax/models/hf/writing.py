"""Writing models as Hugging Face directories, by the tables of ``models.hf.families``.

Tensors are copied from their devices and written one at a time, so the host holds about one tensor
at a time.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from vbon_jax import processes
from vbon_jax.models.config import DecoderConfig, Params
from vbon_jax.models.hf import config_files, pieces, tables, tensor_files
from vbon_jax.models.hf.config_files import Config, TokenIds
from vbon_jax.models.hf.family import Family
from vbon_jax.models.hf.layouts import Shape
from vbon_jax.models.hf.tables import Entry


def _array(entry: Entry, leaves: Mapping[str, Any]) -> np.ndarray:
    parts = [pieces.fetch(leaves[path], entry.layer) for path in entry.row.paths]
    return entry.row.layout.write(parts)


def _to_write(
    family: Family, entry: Entry, shapes: Mapping[str, Shape], leaves: Mapping[str, Any]
) -> tensor_files.TensorToWrite:
    headed = entry.name == family.head or entry.row.paths[0].startswith("score/")
    halves = all(leaves[path].dtype == jnp.bfloat16 for path in entry.row.paths)
    return tensor_files.TensorToWrite(
        entry.name if headed else family.prefix + entry.name,
        entry.row.layout.shape(tables.row_shapes(entry, shapes)),
        "BF16" if halves else "F32",
        functools.partial(_array, entry, leaves),
    )


def _leaves(params: Params, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns the leaves of params by path.

    Raises:
      ValueError: if params are not a tree of these shapes.
    """
    leaves = flatten_dict(params, sep="/")
    faults = [f"{path} missing" for path in shapes.keys() - leaves.keys()]
    faults += [f"{path} unexpected" for path in leaves.keys() - shapes.keys()]
    faults += [
        f"{path} has shape {tuple(leaves[path].shape)}, expected {shapes[path]}"
        for path in shapes.keys() & leaves.keys()
        if tuple(leaves[path].shape) != shapes[path]
    ]
    if faults:
        raise ValueError(f"params do not fit the config: {tensor_files.listed(faults)}")
    return leaves


def _save(
    directory: Path,
    family: Family,
    config: Config,
    params: Params,
    num_labels: int | None,
    jsons: Mapping[str, dict[str, Any]],
    shard_bytes: int,
) -> None:
    shapes = tables.leaf_shapes(config, num_labels)
    leaves = _leaves(params, shapes)
    entries = tables.entries(family, config, num_labels, shapes)
    tensors = [_to_write(family, entry, shapes, leaves) for entry in entries]
    tensor_files.write(directory, tensors, shard_bytes)
    tensor_files.write_jsons(directory, jsons)
    for adapter in tensor_files.adapter_files(directory) if processes.first() else ():
        adapter.unlink()  # transformers would put it on top of the model


def _dtype_of(params: Params) -> str:
    halves = all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    return "bfloat16" if halves else "float32"


def save_decoder(
    path: str | os.PathLike[str],
    config: DecoderConfig,
    params: Params,
    *,
    ids: TokenIds,
    temperature: float = 1.0,
    like: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that transformers.AutoModelForCausalLM loads.

    The files are config.json, generation_config.json and the weights, each written under a
    temporary name and then renamed. Existing files of these names are replaced, and weights of
    another split and adapters removed.

    Args:
      path: the directory, made if absent.
      config: the decoder's configuration.
      params: the decoder's tree, of JAX arrays (which may be sharded) or NumPy arrays. bfloat16
        leaves are written as they are, all others as float32.
      ids: the ids of the special tokens.
      temperature: the temperature at which transformers' ``generate`` samples by default, from the
        whole distribution. (By its own default it would keep the 50 likeliest tokens only.)
      like: the config.json of the directory that the model came from, whose other settings are
        written back; None for a GPT-2 trained from scratch.
      shard_bytes: maximum size of a weight file in bytes; larger models are written in several.

    Raises:
      ValueError: if params do not fit the config, config is not what ``like`` describes, or an id
        is outside the vocabulary.
    """
    keys = config_files.token_ids(config, ids)
    family, value = config_files.describe(like, config, {"dtype": _dtype_of(params), **keys})
    value["architectures"] = [family.causal]
    generation = {**keys, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    jsons = {"generation_config.json": generation, "config.json": value}
    _save(Path(path), family, config, {"decoder": params}, None, jsons, shard_bytes)


def save_classifier(
    path: str | os.PathLike[str],
    config: Config,
    params: Params,
    labels: tuple[str, ...],
    *,
    ids: TokenIds,
    like: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that transformers.AutoModelForSequenceClassification loads.

    With a decoder, transformers scores a row at its last token that is not the padding id, while
    ``heads.score`` uses the last True of the mask. They agree if the padding id never ends a text.
    Without a padding id transformers accepts only batches of one.

    Args:
      path: the directory, made if absent.
      config: the configuration of the decoder or encoder.
      params: {"decoder" or "encoder", "score"}, of arrays as for ``save_decoder``.
      labels: a distinct name for each column of the score.
      ids: the ids of the special tokens.
      like: as for ``save_decoder``.
      shard_bytes: as for ``save_decoder``.

    Raises:
      ValueError: if params do not fit the config and labels, labels repeat, config is not what
        ``like`` describes, or an id is outside the vocabulary.
    """
    if len(set(labels)) != len(labels):
        raise ValueError(f"labels are {labels!r}: give a distinct name for each")
    keys = config_files.token_ids(config, ids)
    changes = {
        "dtype": _dtype_of(params),
        **keys,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    family, value = config_files.describe(like, config, changes)
    value["architectures"] = [family.sequence]
    _save(Path(path), family, config, params, len(labels), {"config.json": value}, shard_bytes)
