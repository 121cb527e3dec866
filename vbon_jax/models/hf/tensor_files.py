"""The files of a model directory: JSON, and safetensors read by rows and written in shards.

Only the host side: what the name of a tensor means is defined in ``models.hf.tables``, and on which
devices it is placed in ``models.hf.pieces``.
"""

from __future__ import annotations

import functools
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from vbon_jax import processes
from vbon_jax.errors import InputError, writing
from vbon_jax.models.hf.layouts import Shape

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
# Bytes that are on their way at a time: from a file, to a file, or to all devices together.
PIECE = 4 * 2**20


class CheckpointError(InputError):
    """A model directory that cannot be used; the message names file, fault and remedy."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Args:
      path: path of the file.

    Raises:
      CheckpointError: if the file is absent, unreadable, or holds something other than a JSON
        object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"no file {path}: give a directory written by save_pretrained, which has it"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}: a JSON object is needed")
    return value


def listed(names: Iterable[str]) -> str:
    """Joins names in sorted order, for a message."""
    return ", ".join(sorted(names))


def adapter_files(directory: Path) -> list[Path]:
    """Returns the files of a PEFT adapter in a directory, in order of their names."""
    return sorted([*directory.glob("adapter_config.json"), *directory.glob("adapter_model*")])


def refuse_adapter(directory: Path) -> None:
    """Checks that a directory has no PEFT adapter, beside the weights of a whole model or alone.

    transformers puts an adapter that it finds beside the weights on top of the model; without it,
    the directory would be read as another model.

    Args:
      directory: of the model.

    Raises:
      CheckpointError: if it has one; names its files and the remedies.
    """
    found = [path.name for path in adapter_files(directory)]
    if not found:
        return
    names = " and ".join(found)
    merge = "with peft, merge_and_unload() and save_pretrained(NEW_DIR)"
    if (directory / "config.json").exists():
        raise CheckpointError(
            f"{directory} holds a whole model and an adapter ({names}), which transformers would "
            f"add to it: merge the two {merge}, or remove the adapter's files to have the model "
            "without it"
        )
    raise CheckpointError(
        f"{directory} holds an adapter alone ({names}), and a whole model is needed: merge it into "
        f"its base model {merge}"
    )


# Finding


class Found(NamedTuple):
    """The location of a tensor in a file.

    Attributes:
      file: path of the file.
      offset: offset of the tensor's data in bytes from the start of the file.
      shape: shape of the tensor.
      dtype: its dtype as safetensors names it, such as "F32".
    """

    file: Path
    offset: int
    shape: Shape
    dtype: str


def scan(directory: Path, prefix: str, buffers: str) -> dict[str, Found]:
    """Locates all tensors of a directory's weight files, without reading their data.

    Args:
      directory: contains model.safetensors, or the shards named in model.safetensors.index.json.
      prefix: removed from the names that start with it.
      buffers: regular expression of names, without prefix, that are ignored.

    Returns:
      The tensors by name without prefix.

    Raises:
      CheckpointError: if there are no such files, one is unreadable, a name occurs twice, or the
        index does not list exactly the tensors that exist.
    """
    files, promised = _weight_files(directory)
    found: dict[str, Found] = {}
    raw_names: set[str] = set()
    duplicate = []
    for file in files:
        for raw_name, tensor in _header(file).items():
            name = raw_name.removeprefix(prefix)
            if name in found:
                duplicate.append(name)
            raw_names.add(raw_name)
            found[name] = tensor
    faults = [f"duplicate: {listed(duplicate)}"] if duplicate else []
    if promised is not None:
        if lost := promised - raw_names:
            faults.append(f"missing, though the index names them: {listed(lost)}")
        if extra := raw_names - promised:
            faults.append(f"unexpected, as the index does not name them: {listed(extra)}")
    if faults:
        raise CheckpointError(f"{directory}: tensors {'; '.join(faults)}")
    return {name: t for name, t in found.items() if not re.fullmatch(buffers, name)}


def _weight_files(directory: Path) -> tuple[list[Path], set[str] | None]:
    """Returns the safetensors files and, if there is an index of shards, the names in it."""
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS], None
    if (directory / INDEX).exists():
        index = read_json(directory / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
            raise CheckpointError(
                f"{directory / INDEX}: weight_map must map tensor names to file names"
            )
        files = [directory / name for name in sorted(set(index.values()))]
        absent = [str(file) for file in files if not file.exists()]
        if absent:
            raise CheckpointError(
                f"{directory / INDEX} names files that are not there: {', '.join(absent)}"
            )
        return files, set(index)
    if list(directory.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{directory} holds only pytorch_model.bin, whose pickle can run code: convert it once"
            " with transformers and torch, AutoModel.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            f" of the right Auto class, which writes {WEIGHTS}"
        )
    if others := sorted(path.name for path in directory.glob("*.safetensors")):
        raise CheckpointError(
            f"no {WEIGHTS} and no {INDEX} in {directory}, but {', '.join(others)}: rename the file"
            f" to {WEIGHTS} if it is the whole model as transformers writes it, or load it with"
            " transformers and save_pretrained it to another directory"
        )
    raise CheckpointError(
        f"no {WEIGHTS} and no {INDEX} in {directory}: weights of another kind (.bin) have to be"
        " converted once, by from_pretrained and save_pretrained of transformers"
    )


def _header(file: Path) -> dict[str, Found]:
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
        name: Found(file, 8 + size + t["data_offsets"][0], tuple(t["shape"]), t["dtype"])
        for name, t in header.items()
    }


def check(found: Mapping[str, Found], wanted: Mapping[str, Shape], where: Path) -> None:
    """Checks that the tensors found are those that are wanted.

    Args:
      found: tensors by name, from ``scan``.
      wanted: shapes by name.
      where: the directory, for the message.

    Raises:
      CheckpointError: listing all tensors that are missing, unexpected, of another shape, or of a
        dtype that is not supported.
    """
    faults = []
    if missing := wanted.keys() - found.keys():
        faults.append(f"missing: {listed(missing)}")
    if unexpected := found.keys() - wanted.keys():
        faults.append(f"unexpected: {listed(unexpected)}")
    present = wanted.keys() & found.keys()
    if misshapen := [
        f"{name} {found[name].shape}, expected {wanted[name]}"
        for name in present
        if found[name].shape != wanted[name]
    ]:
        faults.append(f"misshapen: {listed(misshapen)}")
    if mistyped := [
        f"{name} {found[name].dtype}" for name in present if found[name].dtype not in DTYPES
    ]:
        faults.append(f"of a dtype other than {', '.join(DTYPES)}: {listed(mistyped)}")
    if faults:
        raise CheckpointError(f"{where}: tensors {'; '.join(faults)}")


# Reading


def read_rows(found: Found, start: int, stop: int) -> np.ndarray:
    """Reads rows [start, stop) of a tensor.

    The file is read and not memory-mapped: mapped pages would count towards this process for as
    long as the file is open. The buffer is allocated by mmap, because malloc would not return
    blocks of this size to the system.

    Args:
      found: the tensor, from ``scan``.
      start: first row.
      stop: row after the last.

    Returns:
      Array [stop - start, ...] in the file's dtype.

    Raises:
      CheckpointError: if the file ends before the last row.
    """
    dtype, shape = DTYPES[found.dtype], (stop - start, *found.shape[1:])
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


def equal(first: Found, second: Found) -> bool:
    """Returns whether two tensors of the same shape are equal, comparing them piece by piece."""
    step = max(1, PIECE // (4 * math.prod(first.shape[1:])))
    for start in range(0, first.shape[0], step):
        stop = min(start + step, first.shape[0])
        rows = read_rows(first, start, stop).astype(np.float32)
        if not np.array_equal(rows, read_rows(second, start, stop).astype(np.float32)):
            return False
    return True


# Writing


class TensorToWrite(NamedTuple):
    """A tensor that is to be written.

    Attributes:
      name: full name in the file.
      shape: shape in the file.
      dtype: dtype in the file, a key of ``DTYPES``.
      array: returns the data, in ``shape`` and any float dtype, when its turn comes.
    """

    name: str
    shape: Shape
    dtype: str
    array: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of the data in the file, in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write(directory: Path, tensors: Sequence[TensorToWrite], shard_bytes: int) -> None:
    """Writes model.safetensors, or several shards and their index.

    Each file is written under a temporary name and then renamed. Weight files of another split,
    left from an earlier write, are removed.

    Args:
      directory: made if absent.
      tensors: in the order in which they are distributed over the shards.
      shard_bytes: maximum size of a shard in bytes; a larger tensor has a shard of its own.
    """
    files = _split(tensors, shard_bytes)
    if not processes.first():
        for each in files:
            for t in _in_order(each):  # all processes fetch what lies on the devices of all
                t.array()
        return
    n = len(files)
    names = [WEIGHTS] if n == 1 else [
        f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)
    ]  # fmt: skip
    writers: dict[Path, Callable[[Path], object]] = {
        directory / name: functools.partial(_write_file, tensors=file)
        for name, file in zip(names, files, strict=True)
    }
    if n > 1:
        weight_map = {t.name: name for name, file in zip(names, files, strict=True) for t in file}
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors)},
            "weight_map": weight_map,
        }
        writers[directory / INDEX] = _json_writer(index)
    directory.mkdir(parents=True, exist_ok=True)
    replace_all(writers)
    for path in directory.iterdir():
        if _OURS.fullmatch(path.name) and path not in writers:
            path.unlink()


def write_jsons(directory: Path, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes several JSON files; if one cannot be written, none is replaced.

    Args:
      directory: where they are written.
      values: contents by file name.
    """
    replace_all({directory / name: _json_writer(value) for name, value in values.items()})


def _split(tensors: Sequence[TensorToWrite], shard_bytes: int) -> list[list[TensorToWrite]]:
    files: list[list[TensorToWrite]] = [[]]
    for t in tensors:
        if files[-1] and sum(other.nbytes for other in files[-1]) + t.nbytes > shard_bytes:
            files.append([])
        files[-1].append(t)
    return files


def _in_order(tensors: list[TensorToWrite]) -> list[TensorToWrite]:
    """The tensors of a file as it has them: wide numbers first, which keeps all aligned."""
    return sorted(tensors, key=lambda t: -DTYPES[t.dtype].itemsize)


def _write_file(path: Path, tensors: list[TensorToWrite]) -> None:
    """Writes a safetensors file: length of the header, header as JSON, data of all tensors.

    The writer of the safetensors package would need all of it in memory, and copies it.
    """
    tensors = _in_order(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        offsets = [end, end := end + t.nbytes]
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with writing(path.parent, 8 + len(text) + end), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            array = t.array()
            assert array.shape == t.shape, (t.name, array.shape, t.shape)
            step = max(1, PIECE * len(array) // t.nbytes)
            for start in range(0, len(array), step):
                rows = np.ascontiguousarray(array[start : start + step], DTYPES[t.dtype])
                file.write(rows.view(np.uint8).data)


def _json_writer(value: Mapping[str, Any]) -> Callable[[Path], object]:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8")


def replace_all(files: Mapping[Path, Callable[[Path], object]]) -> None:
    """Writes files under temporary names and then renames them, so that each is either old or new.

    If one cannot be written, none is replaced. The first process of a run alone writes.

    Args:
      files: for each path a function that writes the file at the path it is given.
    """
    if not processes.first():
        return
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, writer in files.items():
            with writing(path):
                writer(temporary[path])
                with open(temporary[path], "rb") as file:
                    os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
