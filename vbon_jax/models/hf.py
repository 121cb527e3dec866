"""Hugging Face directories, read strictly and written back, by the tables of ``models.families``.

Tensors are read one at a time into arrays that already lie on their devices, and written one at a
time: beside the arrays themselves the host holds about one tensor.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from vbon_jax.models import decoder, encoder, families, heads
from vbon_jax.models.config import DecoderConfig, Params
from vbon_jax.models.encoder import EncoderConfig
from vbon_jax.models.layouts import AS_IS, Family, Shape, Tensor

Config = DecoderConfig | EncoderConfig
_Where = NamedSharding | SingleDeviceSharding | None
Place = Callable[[str, Shape], NamedSharding | SingleDeviceSharding]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_PARAMETER_DTYPES = ("float32", "bfloat16")
# Fields of our configs that are how to compute, of which a config.json says nothing.
_NOT_IN_FILES = ("compute_dtype", "remat", "lora_alpha")
# Bytes of a leaf that are on their way at a time, on all devices together.
_PIECE = 4 * 2**20


class CheckpointError(ValueError):
    """A model directory that cannot be used: the text names the file, the fault and the remedy."""


# Configuration


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"no file {path}: give a directory written by save_pretrained, holding config.json"
            f" and {_WEIGHTS}"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}: a JSON object is needed")
    return value


def _parse(raw: Mapping[str, Any]) -> tuple[Family, Config]:
    """Raises ValueError naming the key and its value, if we do not compute what raw describes."""
    from transformers import AutoConfig  # slow to import

    model_type = raw.get("model_type")
    family = families.family(model_type)  # type: ignore[arg-type]  # anything: it refuses
    if raw.get("quantization_config") is not None:
        raise ValueError(
            f"quantization_config is {raw['quantization_config']!r}: quantized weights are not"
            " supported; give the float32, float16 or bfloat16 model"
        )
    # transformers fills in its defaults and respells what older versions of it wrote.
    left_out = ("model_type", "id2label", "label2id", "num_labels")  # labels are read by _labels
    rest = copy.deepcopy({key: value for key, value in raw.items() if key not in left_out})
    try:
        theirs = AutoConfig.for_model(model_type, **rest)
    except Exception as error:  # whatever its validators raise
        said = " ".join(str(error).split())
        raise ValueError(f"transformers does not accept it: {said}") from error
    return family, family.config(theirs)


def read_config(path: str | os.PathLike[str]) -> tuple[Family, Config, dict[str, Any]]:
    """Reads config.json of a directory, without network.

    Returns:
      (the family of its model_type, our configuration with compute_dtype float32, the file as it
      is).

    Raises:
      CheckpointError: if the file is absent or unreadable, or asks for what we do not compute.
    """
    file = Path(path) / "config.json"
    raw = _read_json(file)
    try:
        return *_parse(raw), raw
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _labels(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    count = raw.get("num_labels")
    id2label = raw.get("id2label") or {str(i): f"LABEL_{i}" for i in range(count or 2)}
    ids = [str(i) for i in range(len(id2label))] if isinstance(id2label, dict) else []
    if not ids or set(id2label) != set(ids) or not all(type(id2label[i]) is str for i in ids):
        raise CheckpointError(
            f'{where}: id2label is {id2label!r}: its keys must be "0", "1", ... and its values'
            " label names"
        )
    if count not in (None, len(ids)):
        raise CheckpointError(f"{where}: num_labels is {count!r}, but id2label names {len(ids)}")
    return tuple(id2label[i] for i in ids)


def _check_architecture(raw: Mapping[str, Any], fits: bool, needed: str, where: str) -> None:
    if not fits:
        raise CheckpointError(
            f"{where}: architectures is {raw.get('architectures')!r}: a {needed} is needed here"
        )


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


def _weight_files(directory: Path) -> tuple[list[Path], set[str] | None]:
    """The safetensors files, and the tensor names that a sharded index promises."""
    if (directory / _WEIGHTS).exists():
        return [directory / _WEIGHTS], None
    if (directory / _INDEX).exists():
        index = _read_json(directory / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
            raise CheckpointError(
                f"{directory / _INDEX}: weight_map must map tensor names to file names"
            )
        files = [directory / name for name in sorted(set(index.values()))]
        absent = [str(file) for file in files if not file.exists()]
        if absent:
            raise CheckpointError(
                f"{directory / _INDEX} names files that are not there: {', '.join(absent)}"
            )
        return files, set(index)
    if list(directory.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{directory} holds only pytorch_model.bin, whose pickle can run code: convert it once"
            " with transformers and torch, AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            f" of the right Auto class, which writes {_WEIGHTS}"
        )
    raise CheckpointError(
        f"no {_WEIGHTS} and no {_INDEX} in {directory}: weights of another kind (.bin) have to be"
        " converted once, by from_pretrained and save_pretrained of transformers"
    )


class _Found(NamedTuple):
    """A tensor in a file, not yet read; offset in bytes from the start of the file."""

    file: Path
    offset: int
    shape: Shape
    dtype: str


def _header(file: Path) -> dict[str, _Found]:
    try:
        with safetensors.safe_open(file, framework="np"):
            pass  # that checks the header, and that the offsets fit the file
        with open(file, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(size))
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
    header.pop("__metadata__", None)
    return {
        name: _Found(file, 8 + size + t["data_offsets"][0], tuple(t["shape"]), t["dtype"])
        for name, t in header.items()
    }


def _scan(directory: Path, family: Family) -> dict[str, _Found]:
    """All tensors of all files, by name without prefix; faults of the files themselves raise."""
    files, promised = _weight_files(directory)
    found: dict[str, _Found] = {}
    raw_names: set[str] = set()
    duplicate = []
    for file in files:
        for raw_name, tensor in _header(file).items():
            name = raw_name.removeprefix(family.prefix)
            if name in found:
                duplicate.append(name)
            raw_names.add(raw_name)
            found[name] = tensor
    faults = [f"duplicate: {_listed(duplicate)}"] if duplicate else []
    if promised is not None:
        if lost := promised - raw_names:
            faults.append(f"missing, though the index names them: {_listed(lost)}")
        if extra := raw_names - promised:
            faults.append(f"unexpected, as the index does not name them: {_listed(extra)}")
    if faults:
        raise CheckpointError(f"{directory}: tensors {'; '.join(faults)}")
    return {name: t for name, t in found.items() if not re.fullmatch(family.buffers, name)}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _check(found: Mapping[str, _Found], wanted: Mapping[str, Shape], where: Path) -> None:
    faults = []
    if missing := wanted.keys() - found.keys():
        faults.append(f"missing: {_listed(missing)}")
    if unexpected := found.keys() - wanted.keys():
        faults.append(f"unexpected: {_listed(unexpected)}")
    present = wanted.keys() & found.keys()
    if misshapen := [
        f"{name} {found[name].shape}, expected {wanted[name]}"
        for name in present
        if found[name].shape != wanted[name]
    ]:
        faults.append(f"misshapen: {_listed(misshapen)}")
    if mistyped := [f"{name} {found[name].dtype}" for name in present if _mistyped(found[name])]:
        faults.append(f"of a dtype other than {', '.join(_DTYPES)}: {_listed(mistyped)}")
    if faults:
        raise CheckpointError(f"{where}: tensors {'; '.join(faults)}")


def _mistyped(found: _Found) -> bool:
    return found.dtype not in _DTYPES


def _read_rows(found: _Found, start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a tensor, in the file's dtype.

    The file is read, not mapped: its pages would count as ours for as long as it is open. The
    memory is the system's own, because malloc keeps what it is given back of this size.
    """
    dtype, shape = _DTYPES[found.dtype], (stop - start, *found.shape[1:])
    row_bytes = dtype.itemsize * math.prod(shape[1:])
    memory = mmap.mmap(-1, shape[0] * row_bytes)
    with open(found.file, "rb", buffering=0) as file:
        file.seek(found.offset + start * row_bytes)
        done = 0
        while done < len(memory):  # the system reads at most 2 GB at a time
            if not (count := file.readinto(memoryview(memory)[done:])):
                raise CheckpointError(f"{found.file} ended while it was read: is it being written?")
            done += count
    return np.frombuffer(memory, dtype).reshape(shape)


def _equal(first: _Found, second: _Found) -> bool:
    step = max(1, _PIECE // (4 * math.prod(first.shape[1:])))
    for start in range(0, first.shape[0], step):
        stop = min(start + step, first.shape[0])
        rows = _read_rows(first, start, stop).astype(np.float32)
        if not np.array_equal(rows, _read_rows(second, start, stop).astype(np.float32)):
            return False
    return True


# Filling arrays on their devices


@functools.lru_cache(maxsize=4096)
def _zeros(shape: Shape, dtype: str, sharding: _Where) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=4096)
def _updater(sharding: _Where) -> Callable[..., jax.Array]:
    """(leaf, piece, at) -> leaf with the piece at that index of every device's own shard.

    The leaf is donated. The same index on every device: no device needs another's data.
    """

    def update(leaf: jax.Array, piece: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(leaf, piece, [at[i] for i in range(leaf.ndim)])

    if isinstance(sharding, NamedSharding):
        spec = sharding.spec
        update = jax.shard_map(
            update, mesh=sharding.mesh, in_specs=(spec, spec, P()), out_specs=spec
        )
    return jax.jit(update, donate_argnums=0)


def _write(
    leaf: jax.Array,
    sharding: _Where,
    layer: int | None,
    rows: Callable[[int, int], np.ndarray],
) -> jax.Array:
    """The leaf, which is donated, with `rows` written to one layer of it (None: to all of it).

    Args:
      leaf: [L, N, ...] or, without a layer, [N, ...].
      sharding: the leaf's; None for the default device.
      layer: the index on the leading axis.
      rows: (start, stop) -> [stop - start, ...] of the N rows, in any float dtype.
    """
    axis = 0 if layer is None else 1
    local = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    if layer is not None and local[0] != leaf.shape[0]:
        raise ValueError(f"place gave {sharding} for layers: their axis must not be sharded")
    count = local[axis]
    shards = leaf.shape[axis] // count
    row_bytes = leaf.dtype.itemsize * math.prod(leaf.shape[axis + 1 :])
    step = min(count, max(1, _PIECE // (row_bytes * shards)))
    # The piece that is under way holds `step` rows for each of the shards of the row axis.
    shape = (*leaf.shape[:axis], shards * step, *leaf.shape[axis + 1 :])
    shape = shape if layer is None else (1, *shape[1:])
    dtype, fetch = leaf.dtype, functools.lru_cache(maxsize=shards)(rows)  # devices may share rows

    def part(start: int, index: Any) -> np.ndarray:
        """What lies at an index of the piece whose first row is `start` in every shard."""
        first = (index[axis].start or 0) // step * count + start
        values = fetch(first, first + step)[(slice(None), *index[axis + 1 :])]
        values = np.ascontiguousarray(values, dtype)
        return values if layer is None else values[None]

    for start in range(0, count, step):
        start = min(start, count - step)  # the last overlaps: one shape, one compilation
        if sharding is None:
            piece = jnp.asarray(part(start, (slice(None),) * leaf.ndim))
        else:
            piece = jax.make_array_from_callback(shape, sharding, functools.partial(part, start))
        at = np.array([layer or 0] * axis + [start] + [0] * (leaf.ndim - axis - 1), np.int32)
        leaf = _updater(sharding)(leaf, piece, at)
        leaf.block_until_ready()  # or pieces would pile up behind the devices
    return leaf


def _slice(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    return array[start:stop]


def _fill(
    leaves: dict[str, jax.Array],
    shardings: Mapping[str, _Where],
    entry: _Entry,
    found: _Found,
    shapes: list[Shape],
) -> None:
    """Reads one tensor into its leaves. What it holds on the host is let go when it returns."""
    if entry.row.layout.rows:
        getters: list[Callable[[int, int], np.ndarray]] = [functools.partial(_read_rows, found)]
    else:
        views = entry.row.layout.read(_read_rows(found, 0, found.shape[0]), shapes)
        getters = [functools.partial(_slice, view) for view in views]
    for path, getter in zip(entry.row.paths, getters, strict=True):
        leaves[path] = _write(leaves[path], shardings[path], entry.layer, getter)


def _load(
    directory: Path,
    family: Family,
    config: Config,
    num_labels: int | None,
    place: Place | None,
    dtype: str,
) -> Params:
    if dtype not in _PARAMETER_DTYPES:
        raise ValueError(f"dtype is {dtype!r}: give one of {list(_PARAMETER_DTYPES)}")
    shapes = _leaf_shapes(config, num_labels)
    entries = _entries(family, config, num_labels, shapes)
    found = _scan(directory, family)
    wanted = {e.name: e.row.layout.shape(_row_shapes(e, shapes)) for e in entries}
    tied = num_labels is None and family.head in found and family.head not in wanted
    if tied:
        wte = next(e.name for e in entries if e.row.paths == ("decoder/wte",))
        wanted[family.head] = wanted[wte]
    _check(found, wanted, directory)
    if tied and not _equal(found[wte], found[family.head]):
        raise CheckpointError(
            f"{directory}: {family.head} differs from {wte}, but config.json ties them:"
            " tie_word_embeddings must be false in it for an untied model"
        )
    shardings = {p: None if place is None else place(p, shape) for p, shape in shapes.items()}
    leaves = {p: _zeros(shape, dtype, shardings[p])() for p, shape in shapes.items()}
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
    _check_architecture(raw, not is_classifier, family.causal, where)
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
    _check_architecture(raw, fits, family.sequence, where)
    labels = _labels(raw, where)
    return config, _load(Path(path), family, config, len(labels), place, dtype), labels


# Writing


def _replace(files: Mapping[Path, Callable[[Path], object]]) -> None:
    """Writes all files beside their names, then renames: each is the old one or the new one whole.

    If one cannot be written, none is replaced.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, write in files.items():
            write(temporary[path])
            with open(temporary[path], "rb") as file:
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _json_writer(value: Mapping[str, Any]) -> Callable[[Path], object]:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


_layer = jax.jit(lambda leaf, i: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False))
_copy = jax.jit(jnp.copy)


def _fetch(leaf: Any, layer: int | None) -> np.ndarray:
    """One layer of a leaf (None: all of it) on the host.

    JAX keeps the host's copy with the array it was made from: so fetch from arrays that go at once.
    """
    if isinstance(leaf, jax.Array):
        return np.asarray(_copy(leaf) if layer is None else _layer(leaf, np.int32(layer)))
    return np.asarray(leaf[...] if layer is None else leaf[layer])


class _Planned(NamedTuple):
    """A tensor to be written: its full name, where it comes from, what it will be."""

    name: str
    entry: _Entry
    shape: Shape
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


def _plan(
    family: Family,
    entries: Sequence[_Entry],
    shapes: Mapping[str, Shape],
    leaves: Mapping[str, Any],
    shard_bytes: int,
) -> list[list[_Planned]]:
    """The tensors of each file; a tensor larger than shard_bytes has a file of its own."""
    files: list[list[_Planned]] = [[]]
    for entry in entries:
        headed = entry.name == family.head or entry.row.paths[0].startswith("score/")
        halves = all(leaves[path].dtype == jnp.bfloat16 for path in entry.row.paths)
        planned = _Planned(
            entry.name if headed else family.prefix + entry.name,
            entry,
            entry.row.layout.shape(_row_shapes(entry, shapes)),
            "BF16" if halves else "F32",
        )
        if files[-1] and sum(p.nbytes for p in files[-1]) + planned.nbytes > shard_bytes:
            files.append([])
        files[-1].append(planned)
    return files


def _write_tensors(path: Path, tensors: list[_Planned], leaves: Mapping[str, Any]) -> None:
    """A safetensors file: length of the header, header as JSON, the tensors one after the other.

    safetensors' own writer wants all of a file in memory, and copies it.
    """
    tensors = sorted(tensors, key=lambda t: -_DTYPES[t.dtype].itemsize)  # that keeps all aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        offsets = [end, end := end + t.nbytes]
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            parts = [_fetch(leaves[p], t.entry.layer) for p in t.entry.row.paths]
            array = t.entry.row.layout.write(parts)
            assert array.shape == t.shape, (t.name, array.shape, t.shape)
            step = max(1, _PIECE * len(array) // t.nbytes)
            for start in range(0, len(array), step):
                rows = np.ascontiguousarray(array[start : start + step], _DTYPES[t.dtype])
                file.write(rows.view(np.uint8).data)


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
        raise ValueError(f"params do not fit the config: {_listed(faults)}")
    return leaves


def _gpt2_json(config: Config) -> dict[str, Any]:
    """The config.json of a GPT-2 made from scratch."""
    if not isinstance(config, DecoderConfig):
        raise ValueError("like is None, which is for a GPT-2 from scratch: give a config.json")
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.positions,
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": config.activation,
        "initializer_range": config.initializer_range,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        # The models are trained without dropout.
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _described(
    like: Mapping[str, Any] | None, config: Config, changes: Mapping[str, Any]
) -> tuple[Family, dict[str, Any]]:
    """The family and the config.json to write.

    Raises:
      ValueError: if it would not describe `config`.
    """
    value = copy.deepcopy(dict(_gpt2_json(config) if like is None else like))
    for key in ("torch_dtype", "auto_map", "num_labels"):  # dtype's old name; code we do not copy
        value.pop(key, None)
    value |= changes
    family, described = _parse(value)
    computed = {f: getattr(config, f) for f in _NOT_IN_FILES if hasattr(config, f)}
    if type(described) is type(config):
        described = dataclasses.replace(described, **computed)
    if described != config:
        source = "a GPT-2 from scratch (like is None)" if like is None else "like"
        theirs, ours = dataclasses.asdict(described), dataclasses.asdict(config)
        differ = [
            f"{key} {theirs.get(key)!r}, not {ours.get(key)!r}"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]
        raise ValueError(
            f"{source} describes another model than config: {', '.join(differ)}; give the"
            " config.json of the directory that the parameters came from"
        )
    return family, value


def _token_ids(config: Config, **ids: int | None) -> dict[str, int | None]:
    for name, token_id in ids.items():
        if token_id is not None and not 0 <= token_id < config.vocab_size:
            raise ValueError(
                f"{name} is {token_id}: give None or an id below vocab_size, {config.vocab_size}"
            )
    return ids  # None too is written: where the key is absent transformers assumes its default


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
    files = _plan(family, entries, shapes, leaves, shard_bytes)
    n = len(files)
    names = [_WEIGHTS] if n == 1 else [
        f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)
    ]  # fmt: skip
    writers: dict[Path, Callable[[Path], object]] = {
        directory / name: functools.partial(_write_tensors, tensors=tensors, leaves=leaves)
        for name, tensors in zip(names, files, strict=True)
    }
    if n > 1:
        weight_map = {t.name: name for name, file in zip(names, files, strict=True) for t in file}
        total = sum(t.nbytes for file in files for t in file)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        writers[directory / _INDEX] = _json_writer(index)
    directory.mkdir(parents=True, exist_ok=True)
    _replace(writers)
    for path in directory.iterdir():
        if _OURS.fullmatch(path.name) and path not in writers:
            path.unlink()
    _replace({directory / name: _json_writer(value) for name, value in jsons.items()})


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
    ids = _token_ids(config, bos_token_id=bos_id, eos_token_id=eos_id, pad_token_id=pad_id)
    family, value = _described(like, config, {"dtype": _dtype_of(params), **ids})
    value["architectures"] = [family.causal]
    generation = {**ids, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    jsons = {"generation_config.json": generation, "config.json": value}
    _save(Path(path), family, config, {"decoder": params}, None, jsons, shard_bytes)


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
    ids = _token_ids(config, bos_token_id=bos_id, eos_token_id=eos_id, pad_token_id=pad_id)
    changes = {
        "dtype": _dtype_of(params),
        **ids,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    family, value = _described(like, config, changes)
    value["architectures"] = [family.sequence]
    _save(Path(path), family, config, params, len(labels), {"config.json": value}, shard_bytes)
