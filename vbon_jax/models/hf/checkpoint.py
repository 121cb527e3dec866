"""Hugging Face directories, read strictly and written back, by the tables of ``models.families``.

Tensors are read one at a time into arrays that already lie on their devices, and written one at a
time: beside the arrays themselves the host holds about one tensor.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, SingleDeviceSharding

from vbon_jax.models import decoder, encoder, heads
from vbon_jax.models.config import DTYPES, DecoderConfig, Params
from vbon_jax.models.encoder import EncoderConfig
from vbon_jax.models.hf import config_files, pieces, tensor_files
from vbon_jax.models.hf.config_files import Config, read_config
from vbon_jax.models.hf.family import Family, Tensor
from vbon_jax.models.hf.layouts import AS_IS, Shape
from vbon_jax.models.hf.tensor_files import CheckpointError

Place = Callable[[str, Shape], NamedSharding | SingleDeviceSharding]


# The tensors of a model


class _Entry(NamedTuple):
    """One tensor of a file: its name without prefix, its row, its layer where it has one."""

    name: str
    row: Tensor
    layer: int | None


def _leaf_shapes(config: Config, num_labels: int | None) -> dict[str, Shape]:
    """Shapes of our tree, by path, without making any array; num_labels None for a decoder."""

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


def _entries(
    family: Family, config: Config, num_labels: int | None, shapes: Mapping[str, Shape]
) -> list[_Entry]:
    """All tensors of a model's files, with paths that start at the root of our tree."""
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
        _Entry(row.name.format(i=i), row, i)
        for row in rows
        for i in (range(config.layers) if "{i}" in row.name else (None,))
    ]


def _row_shapes(entry: _Entry, shapes: Mapping[str, Shape]) -> list[Shape]:
    """Shapes of an entry's leaves, without the layer axis."""
    return [shapes[path][entry.layer is not None :] for path in entry.row.paths]


# Reading


def _slice(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    return array[start:stop]


def _fill(
    leaves: dict[str, jax.Array],
    shardings: Mapping[str, pieces.Where],
    entry: _Entry,
    found: tensor_files.Found,
    shapes: list[Shape],
) -> None:
    """Reads one tensor into its leaves. What it holds on the host is let go when it returns."""
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
    family: Family,
    config: Config,
    num_labels: int | None,
    place: Place | None,
    dtype: str,
) -> Params:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: give one of {list(DTYPES)}")
    shapes = _leaf_shapes(config, num_labels)
    entries = _entries(family, config, num_labels, shapes)
    found = tensor_files.scan(directory, family.prefix, family.buffers)
    wanted = {e.name: e.row.layout.shape(_row_shapes(e, shapes)) for e in entries}
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
        _fill(leaves, shardings, entry, found[entry.name], _row_shapes(entry, shapes))
    return unflatten_dict(leaves, sep="/")


def load_decoder(
    path: str | os.PathLike[str], *, place: Place | None = None, dtype: str = "float32"
) -> tuple[DecoderConfig, Params]:
    """Reads the directory of a causal language model.

    Args:
      path: a local directory with config.json and model.safetensors, or the shards that
        model.safetensors.index.json names; tensor names with or without the family's prefix.
      place: (path of a leaf, such as "decoder/wte", its shape) -> where it lives; the axis of the
        layers must not be sharded. None: on the default device.
      dtype: of all parameters, float32 or bfloat16; the file's may be float32, float16 or
        bfloat16.

    Returns:
      (config with compute_dtype float32, the decoder's tree of JAX arrays).

    Raises:
      CheckpointError: if a file is absent or unreadable, a setting is not supported, a tensor is
        missing, unexpected, duplicate, misshapen or of another dtype, or a tied head differs.
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
    return config, _load(Path(path), family, config, None, place, dtype)["decoder"]


def load_classifier(
    path: str | os.PathLike[str], *, place: Place | None = None, dtype: str = "float32"
) -> tuple[Config, Params, tuple[str, ...]]:
    """Reads the directory of a sequence classifier: a decoder with a score head, or an encoder.

    Args:
      path, place, dtype: as of load_decoder; paths start with "decoder/", "encoder/" or "score/".

    Returns:
      (config, {"decoder" or "encoder", "score"} of JAX arrays, the label names in the order of the
      scores). Without id2label they are LABEL_0 and LABEL_1, transformers' default. A scalar
      reward model has one label.

    Raises:
      CheckpointError: as load_decoder, if id2label does not number its labels 0, 1, ..., or if
        `architectures` names another kind of model.
    """
    family, config, raw = read_config(path)
    where = str(Path(path) / "config.json")
    fits = family.sequence in (raw.get("architectures") or (family.sequence,))
    config_files.check_architecture(raw, fits, family.sequence, where)
    labels = config_files.labels(raw, where)
    return config, _load(Path(path), family, config, len(labels), place, dtype), labels


# Writing


def _array(entry: _Entry, leaves: Mapping[str, Any]) -> np.ndarray:
    parts = [pieces.fetch(leaves[path], entry.layer) for path in entry.row.paths]
    return entry.row.layout.write(parts)


def _plan(
    family: Family, entry: _Entry, shapes: Mapping[str, Shape], leaves: Mapping[str, Any]
) -> tensor_files.Planned:
    headed = entry.name == family.head or entry.row.paths[0].startswith("score/")
    halves = all(leaves[path].dtype == jnp.bfloat16 for path in entry.row.paths)
    return tensor_files.Planned(
        entry.name if headed else family.prefix + entry.name,
        entry.row.layout.shape(_row_shapes(entry, shapes)),
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
    shapes = _leaf_shapes(config, num_labels)
    leaves = _leaves(params, shapes)
    entries = _entries(family, config, num_labels, shapes)
    planned = [_plan(family, entry, shapes, leaves) for entry in entries]
    tensor_files.write(directory, planned, shard_bytes)
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
