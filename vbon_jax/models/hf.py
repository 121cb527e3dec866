"""Hugging Face GPT-2 directories: config.json and safetensors, read strictly and written back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from vbon_jax.models import hf_names
from vbon_jax.models.decoder import DecoderConfig, Params

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A model directory that cannot be used: the text names the file, the fault and the remedy."""


# Reading


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


def _read_config(directory: Path) -> tuple[DecoderConfig, dict[str, Any]]:
    path = directory / "config.json"
    raw = _read_json(path)
    try:
        return hf_names.config_from_json(raw), raw
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


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
    raise CheckpointError(f"no {_WEIGHTS} and no {_INDEX} in {directory}")


class _Found(NamedTuple):
    """A tensor in a file, not yet read."""

    file: Path
    raw_name: str
    shape: tuple[int, ...]
    dtype: str


def _scan(files: Iterable[Path], promised: set[str] | None, where: str) -> dict[str, _Found]:
    """All tensors of all files by name without prefix; faults of the files themselves raise."""
    found: dict[str, _Found] = {}
    raw_names: set[str] = set()
    duplicate = []
    for file in files:
        try:
            with safetensors.safe_open(file, framework="np") as handle:
                for raw_name in handle.keys():  # noqa: SIM118 (a handle, not a dict)
                    view = handle.get_slice(raw_name)
                    name = raw_name.removeprefix(hf_names.PREFIX)
                    if name in found:
                        duplicate.append(name)
                    raw_names.add(raw_name)
                    found[name] = _Found(file, raw_name, tuple(view.get_shape()), view.get_dtype())
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
    faults = [f"duplicate: {_listed(duplicate)}"] if duplicate else []
    if promised is not None:
        if lost := promised - raw_names:
            faults.append(f"missing, though the index names them: {_listed(lost)}")
        if extra := raw_names - promised:
            faults.append(f"unexpected, as the index does not name them: {_listed(extra)}")
    if faults:
        raise CheckpointError(f"{where}: tensors {'; '.join(faults)}")
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _read_tensor(found: _Found) -> np.ndarray:
    # NumPy has no bfloat16 of its own; jax does.
    framework = "flax" if found.dtype == "BF16" else "np"
    with safetensors.safe_open(found.file, framework=framework) as handle:
        return np.asarray(handle.get_tensor(found.raw_name)).astype(np.float32)


def _check(found: dict[str, _Found], wanted: dict[str, tuple[int, ...]], where: str) -> None:
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
    if mistyped := [
        f"{name} {found[name].dtype}"
        for name in present
        if found[name].dtype not in ("F32", "F16", "BF16")
    ]:
        faults.append(f"of a dtype other than F32, F16 and BF16: {_listed(mistyped)}")
    if faults:
        raise CheckpointError(f"{where}: tensors {'; '.join(faults)}")


def _load(directory: Path, config: DecoderConfig, num_labels: int | None) -> Params:
    table = hf_names.tensors(config, num_labels)
    wanted = {tensor.name: tensor.shape for tensor in table}
    files, promised = _weight_files(directory)
    found = _scan(files, promised, str(directory))
    found = {name: f for name, f in found.items() if not hf_names.BUFFER.fullmatch(name)}
    if num_labels is None and "lm_head.weight" in found:
        wanted["lm_head.weight"] = wanted["wte.weight"]
    _check(found, wanted, str(directory))

    tree = {
        path: np.empty(shape, np.float32)
        for path, shape in hf_names.leaf_shapes(config, num_labels).items()
    }
    for tensor in table:
        array = _read_tensor(found[tensor.name])
        leaf = tree[tensor.path] if tensor.layer is None else tree[tensor.path][tensor.layer]
        leaf[...] = array.T if tensor.name == "score.weight" else array.reshape(leaf.shape)
    if "lm_head.weight" in wanted and not np.array_equal(
        _read_tensor(found["lm_head.weight"]), tree["decoder/wte"]
    ):
        raise CheckpointError(
            f"{directory}: lm_head.weight differs from wte.weight: untied embeddings are not"
            " supported"
        )
    return unflatten_dict(tree, sep="/")


def load_decoder(path: str | os.PathLike[str]) -> tuple[DecoderConfig, Params]:
    """Reads a GPT-2 language model directory.

    Args:
      path: a local directory with config.json and model.safetensors, or the shards that
        model.safetensors.index.json names; tensor names with or without "transformer.".

    Returns:
      (config with compute_dtype float32, the decoder's tree of float32 NumPy arrays; float16 and
      bfloat16 files are cast).

    Raises:
      CheckpointError: if a file is absent or unreadable, a setting is not supported, or a tensor
        is missing, unexpected, duplicate, misshapen, of another dtype, or untied.
    """
    config, _ = _read_config(Path(path))
    return config, _load(Path(path), config, None)["decoder"]


def load_classifier(
    path: str | os.PathLike[str],
) -> tuple[DecoderConfig, Params, tuple[str, ...]]:
    """Reads a GPT2ForSequenceClassification directory.

    Returns:
      (config, {"decoder", "score"} of float32 NumPy arrays, the label names in the order of the
      scores). Without id2label they are LABEL_0 and LABEL_1, transformers' default.

    Raises:
      CheckpointError: as load_decoder, or if id2label does not number its labels 0, 1, ....
    """
    directory = Path(path)
    config, raw = _read_config(directory)
    id2label = raw.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    ids = [str(i) for i in range(len(id2label))] if isinstance(id2label, dict) else []
    if not ids or set(id2label) != set(ids) or not all(type(id2label[i]) is str for i in ids):
        raise CheckpointError(
            f"{directory / 'config.json'}: id2label is {id2label!r}: its keys must be"
            ' "0", "1", ... and its values label names'
        )
    labels = tuple(id2label[i] for i in ids)
    return config, _load(directory, config, len(labels)), labels


# Writing


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside `path` and renames, so `path` holds the old file or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _file_tensors(
    config: DecoderConfig, params: Params, num_labels: int | None
) -> dict[str, np.ndarray]:
    """The tensors of a model file under their full names."""
    flat = flatten_dict(params, sep="/")
    wanted = hf_names.leaf_shapes(config, num_labels)
    faults = [f"{path} missing" for path in wanted.keys() - flat.keys()]
    faults += [f"{path} unexpected" for path in flat.keys() - wanted.keys()]
    faults += [
        f"{path} has shape {tuple(flat[path].shape)}, expected {wanted[path]}"
        for path in wanted.keys() & flat.keys()
        if tuple(flat[path].shape) != wanted[path]
    ]
    if faults:
        raise ValueError(f"params do not fit the config: {_listed(faults)}")
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in flat.items()}
    tensors = {}
    for name, path, layer, shape in hf_names.tensors(config, num_labels):
        array = flat[path] if layer is None else flat[path][layer]
        if name == "score.weight":
            tensors[name] = np.ascontiguousarray(array.T)
        else:
            tensors[hf_names.PREFIX + name] = np.ascontiguousarray(array).reshape(shape)
    return tensors


def _save(
    directory: Path, tensors: dict[str, np.ndarray], files: dict[str, dict[str, Any]]
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _replace(
        directory / _WEIGHTS,
        lambda temporary: safetensors.numpy.save_file(tensors, temporary, {"format": "pt"}),
    )
    for name, value in files.items():
        _write_json(directory / name, value)


def save_decoder(
    path: str | os.PathLike[str],
    config: DecoderConfig,
    params: Params,
    *,
    bos_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    temperature: float = 1.0,
) -> None:
    """Writes a directory that transformers.AutoModelForCausalLM loads.

    config.json, generation_config.json and model.safetensors (float32), each under a temporary
    name that then takes the final one. Existing files of these names are replaced.

    Args:
      path: the directory, made if absent.
      config: the decoder's configuration.
      params: the decoder's tree, of JAX or NumPy arrays.
      bos_id: the token id that starts a text, or None; likewise eos_id and pad_id.
      temperature: what `generate` of transformers samples at by default, from the whole
        distribution (its own default keeps the 50 likeliest tokens: another distribution).

    Raises:
      ValueError: if params do not fit the config, or an id is outside the vocabulary.
    """
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    config_json = {"architectures": ["GPT2LMHeadModel"], **hf_names.config_to_json(config, ids)}
    generation = {**ids, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    tensors = _file_tensors(config, {"decoder": params}, None)
    _save(Path(path), tensors, {"generation_config.json": generation, "config.json": config_json})


def save_classifier(
    path: str | os.PathLike[str],
    config: DecoderConfig,
    params: Params,
    labels: tuple[str, ...],
    *,
    bos_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
) -> None:
    """Writes a directory that transformers.AutoModelForSequenceClassification loads.

    transformers scores a row at its last token that is not pad_id, we at the last True of a mask:
    the same where pad_id never ends a text. Without a pad_id it takes only batches of one.

    Args:
      path: the directory, made if absent.
      config: the decoder's configuration.
      params: {"decoder", "score"}, of JAX or NumPy arrays.
      labels: a distinct name for each column of the score.
      bos_id: the token id that starts a text, or None; likewise eos_id and pad_id.

    Raises:
      ValueError: if params do not fit the config and labels, labels repeat, or an id is outside
        the vocabulary.
    """
    if len(set(labels)) != len(labels):
        raise ValueError(f"labels are {labels!r}: give a distinct name for each")
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    config_json = {
        "architectures": ["GPT2ForSequenceClassification"],
        **hf_names.config_to_json(config, ids),
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    tensors = _file_tensors(config, params, len(labels))
    _save(Path(path), tensors, {"config.json": config_json})
