"""Reading and writing of low-rank adapters as directories that the peft package loads.

Where one torch module holds several of our projections (``c_attn`` of GPT-2, ``query_key_value`` of
GPT-NeoX), the adapters of those projections become a single one whose rank is the sum of theirs:
the A matrices are stacked, and B is zero except in the outputs of its own projection. This computes
the same function. ``rank_pattern`` and ``alpha_pattern`` keep the module's scaling alpha / r the
same.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from vbon_jax import sharding
from vbon_jax.models import decoder, hf, trainable
from vbon_jax.models.config import DecoderConfig, Params
from vbon_jax.models.hf import hub, tensor_files
from vbon_jax.models.hf.family import Family, Tensor
from vbon_jax.models.hf.layouts import CONV1D, CONV1D_HEADS, CONV1D_QKV, Shape

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# [in, out] in the file; a torch Linear is [out, in]. B is always [out, r].
_CONV1D = (CONV1D, CONV1D_HEADS, CONV1D_QKV)
_DTYPES = ("float32", "bfloat16")
# What a file says of its adapters beside r and lora_alpha; another value is another computation.
_SAME = (
    "peft_type", "bias", "use_rslora", "use_dora", "fan_in_fan_out", "target_modules",
    "rank_pattern", "alpha_pattern",
)  # fmt: skip


class _Module(NamedTuple):
    """A torch module with an adapter.

    Attributes:
      name: name of the module, with "{i}" for the layer.
      short: end of the name, unique among the model's modules.
      row: row of the family's table for the module's weight.
      outs: for each leaf of the row the shape of its outputs.
      parts: indices of the leaves that have adapters, in the order in which they are stacked.
    """

    name: str
    short: str
    row: Tensor
    outs: tuple[Shape, ...]
    parts: tuple[int, ...]

    def path(self, part: int) -> str:
        """Returns the path of a leaf's adapter in our tree, up to "lora_a" and "lora_b"."""
        return self.row.paths[part].removesuffix("kernel")

    def leaf_shapes(self, rank: int) -> list[Shape]:
        """Returns the shapes of B as the row's layout sees it: kernels whose input is the rank."""
        inner = (1,) if self.row.paths[0].endswith("/out/kernel") else ()  # two axes, as H and K
        return [(rank, *inner, *out) for out in self.outs]


def _modules(family: Family, config: DecoderConfig, targets: tuple[str, ...]) -> list[_Module]:
    shapes = flatten_dict(_shapes(config), sep="/")
    rows = [row for row in family.tensors(config) if row.paths[0].endswith("/kernel")]
    names = [row.name.removesuffix(".weight") for row in rows]
    modules = []
    for name, row in zip(names, rows, strict=True):
        words = name.split(".")
        # GPT-2 has two c_proj in a block: then the word before is needed too.
        alike = sum(words[-1] == other.split(".")[-1] for other in names)
        short = words[-1] if alike == 1 else ".".join(words[-2:])
        inputs = 2 if row.paths[0].endswith("/out/kernel") else 1
        outs = tuple(shapes[path].shape[1 + inputs :] for path in row.paths)
        parts = tuple(i for i, path in enumerate(row.paths) if path.split("/")[-2] in targets)
        if parts:
            modules.append(_Module(name, short, row, outs, parts))
    return modules


def _shapes(config: DecoderConfig) -> Params:
    return jax.eval_shape(lambda key: decoder.init(config, key), jax.random.key(0))


def _expected(config: DecoderConfig, rank: int, targets: tuple[str, ...]) -> dict[str, Shape]:
    """Returns the shapes of the adapters' tree, by path.

    Raises:
      ValueError: if a target is unknown.
    """
    what = trainable.Trainable(rank=rank, targets=targets)
    tree = jax.eval_shape(
        lambda base, key: trainable.start(base, what, key), _shapes(config), jax.random.key(0)
    )
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def _family(base: str | os.PathLike[str], config: DecoderConfig) -> Family:
    """Returns the family of the base model, after checking that its directory describes ``config``.

    Raises:
      ValueError: if the directory is that of another model.
    """
    family, described, _ = hf.read_config(base)
    theirs, ours = dataclasses.asdict(described), dataclasses.asdict(config)
    computed = ("compute_dtype", "remat", "lora_alpha")  # files say nothing of these
    differ = [
        f"{key} {theirs.get(key)!r}, not {ours.get(key)!r}"
        for key in sorted(theirs.keys() | ours.keys())
        if key not in computed and theirs.get(key) != ours.get(key)
    ]
    if differ:
        raise ValueError(
            f"{base} describes another model than config: {', '.join(differ)}; give the directory"
            " of the model that the adapters were trained on"
        )
    return family


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _described(modules: list[_Module], rank: int, alpha: float) -> dict[str, Any]:
    """Returns adapter_config.json, except for the name of the base model."""
    stacked = {m.short: len(m.parts) for m in modules if len(m.parts) > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": 0.0,
        "target_modules": sorted(m.short for m in modules),
        "rank_pattern": {name: count * rank for name, count in stacked.items()},
        "alpha_pattern": {name: _number(count * alpha) for name, count in stacked.items()},
        "fan_in_fan_out": any(m.row.layout in _CONV1D for m in modules),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }


def _names(family: Family, module: _Module, layer: int) -> tuple[str, str]:
    name = f"base_model.model.{family.prefix}{module.name.format(i=layer)}"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def save(
    path: str | os.PathLike[str],
    own: Params,
    alpha: float,
    *,
    base: str | os.PathLike[str],
    config: DecoderConfig,
) -> None:
    """Writes adapters as a directory that ``peft.PeftModel.from_pretrained`` loads.

    The files are adapter_config.json and adapter_model.safetensors, each written under a temporary
    name and then renamed.

    Args:
      path: the directory, made if absent.
      own: the adapters, as ``trainable.start`` creates them, of JAX or NumPy arrays. They are
        written in their own dtype, float32 or bfloat16.
      alpha: adapters of rank r are added with the factor alpha / r.
      base: directory of the base model, or its name on the hub. peft will look for it by its
        absolute path, or by that name and the commit that is used here.
      config: configuration of the base model.

    Raises:
      CheckpointError: if the config.json of the base cannot be read, or path holds a whole model.
      ValueError: if the base is not what config describes, ``own`` are not adapters of it, or alpha
        is not positive.
    """
    directory = Path(path)
    if (directory / "config.json").exists():
        raise hf.CheckpointError(
            f"{directory} holds a whole model, and some programs would read that and some the"
            " adapters: remove it, or give another directory"
        )
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is {alpha!r}: give a positive number")
    family = _family(hub.resolve(os.fspath(base)), config)
    flat = sharding.fetch(flatten_dict(own, sep="/"))
    rank, targets = _adapters(flat, config)
    modules = _modules(family, config, targets)
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        for layer in range(config.layers):
            names = _names(family, module, layer)
            tensors |= dict(zip(names, _stacked(module, flat, layer, rank), strict=True))
    name, revision = hub.origin(os.fspath(base))
    described = _described(modules, rank, alpha) | {
        "base_model_name_or_path": name,
        "revision": revision,
    }
    # A stack does not say whose it is: the file's metadata does.
    metadata = {"format": "pt", "targets": ",".join(targets)}
    directory.mkdir(parents=True, exist_ok=True)
    tensor_files.replace_all(
        {
            directory / WEIGHTS: lambda at: safetensors.numpy.save_file(tensors, at, metadata),
            directory / CONFIG: lambda at: at.write_text(json.dumps(described, indent=2) + "\n"),
        }
    )


def _adapters(flat: Mapping[str, np.ndarray], config: DecoderConfig) -> tuple[int, tuple[str, ...]]:
    """Returns the (rank, targets) of adapters.

    Raises:
      ValueError: if they do not fit the model.
    """
    ranks = {leaf.shape[-1] for name, leaf in flat.items() if name.endswith("/lora_a")}
    if len(ranks) != 1:
        raise ValueError(
            f"adapters of one rank are needed, not of ranks {sorted(ranks)}: give what"
            " trainable.start made with a rank"
        )
    there = {name.split("/")[-2] for name in flat}
    targets = tuple(target for target in trainable.TARGETS if target in there)
    (rank,) = ranks
    expected = _expected(config, rank, targets)
    faults = [f"{name} missing" for name in expected.keys() - flat.keys()]
    faults += [f"{name} unexpected" for name in flat.keys() - expected.keys()]
    for name in expected.keys() & flat.keys():
        if flat[name].shape != expected[name]:
            faults.append(f"{name} has shape {flat[name].shape}, expected {expected[name]}")
    dtypes = sorted({leaf.dtype.name for leaf in flat.values()})
    if len(dtypes) > 1 or dtypes[0] not in _DTYPES:
        faults.append(f"dtypes are {dtypes}: one of {', '.join(_DTYPES)} is needed")
    if faults:
        raise ValueError(f"own are not adapters of this model: {'; '.join(sorted(faults))}")
    return rank, targets


def _stacked(
    module: _Module, flat: Mapping[str, np.ndarray], layer: int, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [count * r, in] and B [out, count * r] of one layer of a module, as in torch."""
    a = [flat[f"{module.path(part)}lora_a"][layer].T for part in module.parts]
    b = [flat[f"{module.path(part)}lora_b"][layer] for part in module.parts]
    leaves = [np.zeros(shape, b[0].dtype) for shape in module.leaf_shapes(len(b) * rank)]
    for place, part in enumerate(module.parts):
        rows = leaves[part][place * rank : (place + 1) * rank]
        rows[...] = b[place].reshape(rows.shape)
    weight = module.row.layout.write(leaves)
    weight = weight.T if module.row.layout in _CONV1D else weight
    return np.ascontiguousarray(np.concatenate(a)), np.ascontiguousarray(weight)


def load(
    path: str | os.PathLike[str],
    config: DecoderConfig,
    *,
    base: str | os.PathLike[str] | None = None,
) -> tuple[Params, float]:
    """Reads adapters that ``save`` wrote, bit for bit.

    Args:
      path: the directory.
      config: configuration of the base model.
      base: directory of the base model, of which only config.json is read, or its name on the hub;
        None for the one that adapter_config.json names.

    Returns:
      (the adapters as JAX arrays, for ``trainable.join``; alpha, for ``config.lora_alpha``).

    Raises:
      CheckpointError: if a file is absent or unreadable, is not what ``save`` writes, or a tensor
        is missing, unexpected, or of another shape or dtype.
      ValueError: if the base is not what config describes.
    """
    file = Path(path) / CONFIG
    raw = _read_config(file)
    rank, alpha = raw["r"], raw["lora_alpha"]
    if base is None:
        named, revision = raw["base_model_name_or_path"], raw.get("revision")
        base = named if revision is None else f"{named}@{revision}"
    family = _family(hub.resolve(os.fspath(base)), config)
    weights = Path(path) / WEIGHTS
    tensors, targets = _read_weights(weights)
    try:
        expected = _expected(config, rank, targets)
    except ValueError as error:
        raise hf.CheckpointError(f"{weights}: {error}") from error
    modules = _modules(family, config, targets)
    described = json.loads(json.dumps(_described(modules, rank, alpha)))
    _check_config(file, raw, described)
    wanted: dict[str, Shape] = {}
    for module in modules:
        count = len(module.parts) * rank
        size = expected[f"{module.path(module.parts[0])}lora_a"][1]
        shape = module.row.layout.shape(module.leaf_shapes(count))
        shape = shape[::-1] if module.row.layout in _CONV1D else shape
        for layer in range(config.layers):
            wanted |= dict(zip(_names(family, module, layer), [(count, size), shape], strict=True))
    _check_tensors(weights, tensors, wanted)
    dtype = next(iter(tensors.values())).dtype
    flat = {name: np.zeros(shape, dtype) for name, shape in expected.items()}
    for module in modules:
        for layer in range(config.layers):
            names = _names(family, module, layer)
            _unstack(module, flat, layer, rank, *(tensors[name] for name in names))
            again = _stacked(module, flat, layer, rank)[1]
            if not np.array_equal(again, tensors[names[1]]):
                raise hf.CheckpointError(
                    f"{weights}: {names[1]} is not a stack of adapters on {', '.join(targets)}: it"
                    " has values outside their own outputs"
                )
    own = {name: jnp.asarray(leaf) for name, leaf in flat.items()}
    return unflatten_dict(own, sep="/"), float(alpha)


def _unstack(
    module: _Module,
    flat: dict[str, np.ndarray],
    layer: int,
    rank: int,
    a: np.ndarray,
    b: np.ndarray,
) -> None:
    """Copies one layer of a module into our tree; the inverse of ``_stacked``."""
    weight = b.T if module.row.layout in _CONV1D else b
    leaves = module.row.layout.read(weight, module.leaf_shapes(b.shape[1]))
    for place, part in enumerate(module.parts):
        rows = slice(place * rank, (place + 1) * rank)
        flat[f"{module.path(part)}lora_a"][layer] = a[rows].T
        flat[f"{module.path(part)}lora_b"][layer] = leaves[part][rows].reshape(rank, -1)


def _read_config(file: Path) -> dict[str, Any]:
    raw = tensor_files.read_json(file)
    rank, alpha, base = (raw.get(key) for key in ("r", "lora_alpha", "base_model_name_or_path"))
    if type(rank) is not int or rank < 1:
        raise hf.CheckpointError(f"{file}: r is {rank!r}: an integer of at least 1 is needed")
    if type(alpha) not in (int, float) or not 0 < alpha < float("inf"):  # type: ignore[operator]
        raise hf.CheckpointError(f"{file}: lora_alpha is {alpha!r}: a positive number is needed")
    if not isinstance(base, str):
        raise hf.CheckpointError(f"{file}: base_model_name_or_path is {base!r}: a name is needed")
    return raw


def _check_config(file: Path, raw: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    faults = [
        f"{key} is {raw.get(key)!r}, expected {expected[key]!r}"
        for key in _SAME
        if raw.get(key) != expected[key]
    ]
    if faults:
        raise hf.CheckpointError(f"{file}: {'; '.join(faults)}")


def _read_weights(file: Path) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Returns the tensors, and the targets that the metadata names."""
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            names = (opened.metadata() or {}).get("targets")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise hf.CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
    if not names:
        raise hf.CheckpointError(
            f"{file}: its metadata names no targets, so vbon did not write it: adapters made"
            " elsewhere have to be merged into their model (merge_and_unload of peft)"
        )
    return tensors, tuple(names.split(","))


def _check_tensors(
    file: Path, tensors: Mapping[str, np.ndarray], wanted: Mapping[str, Shape]
) -> None:
    faults = [f"{name} missing" for name in wanted.keys() - tensors.keys()]
    faults += [f"{name} unexpected" for name in tensors.keys() - wanted.keys()]
    faults += [
        f"{name} has shape {tensors[name].shape}, expected {wanted[name]}"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name]
    ]
    dtypes = sorted({tensor.dtype.name for tensor in tensors.values()})
    if len(dtypes) != 1 or dtypes[0] not in _DTYPES:
        faults.append(f"dtypes are {dtypes}: one of {', '.join(_DTYPES)} is needed")
    if faults:
        raise hf.CheckpointError(f"{file}: tensors {'; '.join(sorted(faults))}")
