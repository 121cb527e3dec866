"""Writing models as Hugging Face directories, by the tables of ``models.hf.families``.

Tensors are fetched from their devices and written one at a time: beside the arrays themselves the
host holds about one tensor.
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

from vbon_jax.models.config import DecoderConfig, Params
from vbon_jax.models.hf import config_files, pieces, tables, tensor_files
from vbon_jax.models.hf.config_files import Config
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
    """Raises ValueError if params are not a tree of these shapes."""
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


def _dtype_of(params: Params) -> str:
    halves = all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    return "bfloat16" if halves else "float32"


def save_decoder(
    path: str | os.PathLike[str],
    config: DecoderConfig,
    params: Params,
    *,
    bos_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    temperature: float = 1.0,
    like: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that transformers.AutoModelForCausalLM loads.

    config.json, generation_config.json and the weights, each under a temporary name that then takes
    the final one. Existing files of these names are replaced, weights of another split removed.

    Args:
      path: the directory, made if absent.
      config: the decoder's configuration.
      params: the decoder's tree, of JAX arrays (sharded ones too) or NumPy arrays; bfloat16 leaves
        are written as they are, all others as float32.
      bos_id: the token id that starts a text, or None; likewise eos_id and pad_id.
      temperature: what `generate` of transformers samples at by default, from the whole
        distribution (its own default keeps the 50 likeliest tokens: another distribution).
      like: the config.json of the directory that the model came from, written back with its own
        settings. None: a GPT-2 made from scratch.
      shard_bytes: weights above this many bytes are split into several files.

    Raises:
      ValueError: if params do not fit the config, config is not what `like` describes, or an id is
        outside the vocabulary.
    """
    ids = config_files.token_ids(config, bos_id, eos_id, pad_id)
    family, value = config_files.describe(like, config, {"dtype": _dtype_of(params), **ids})
    value["architectures"] = [family.causal]
    generation = {**ids, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    jsons = {"generation_config.json": generation, "config.json": value}
    _save(Path(path), family, config, {"decoder": params}, None, jsons, shard_bytes)
    # transformers would put an adapter it finds beside the weights on top of its own base.
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (Path(path) / name).unlink(missing_ok=True)


def save_classifier(
    path: str | os.PathLike[str],
    config: Config,
    params: Params,
    labels: tuple[str, ...],
    *,
    bos_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    like: Mapping[str, Any] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that transformers.AutoModelForSequenceClassification loads.

    Of a decoder, transformers scores a row at its last token that is not pad_id, we at the last
    True of a mask: the same where pad_id never ends a text. Without a pad_id it takes only batches
    of one.

    Args:
      path: the directory, made if absent.
      config: the configuration of the decoder or encoder.
      params: {"decoder" or "encoder", "score"}, of arrays as save_decoder takes them.
      labels: a distinct name for each column of the score.
      bos_id: the token id that starts a text, or None; likewise eos_id and pad_id.
      like, shard_bytes: as of save_decoder.

    Raises:
      ValueError: if params do not fit the config and labels, labels repeat, config is not what
        `like` describes, or an id is outside the vocabulary.
    """
    if len(set(labels)) != len(labels):
        raise ValueError(f"labels are {labels!r}: give a distinct name for each")
    ids = config_files.token_ids(config, bos_id, eos_id, pad_id)
    changes = {
        "dtype": _dtype_of(params),
        **ids,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    family, value = config_files.describe(like, config, changes)
    value["architectures"] = [family.sequence]
    _save(Path(path), family, config, params, len(labels), {"config.json": value}, shard_bytes)
