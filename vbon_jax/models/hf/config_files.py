"""config.json: read strictly into our configurations, and written to describe them."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vbon_jax.models.config import DecoderConfig
from vbon_jax.models.encoder import EncoderConfig
from vbon_jax.models.hf import families
from vbon_jax.models.hf.family import Family
from vbon_jax.models.hf.tensor_files import CheckpointError, read_json, refuse_adapter

Config = DecoderConfig | EncoderConfig

# Fields of our configs that are how to compute, of which a config.json says nothing.
_NOT_IN_FILES = ("compute_dtype", "remat", "lora_alpha")


class TokenIds(NamedTuple):
    """The ids of a model's special tokens.

    Attributes:
      bos: the id that starts a text; None if there is none.
      eos: the ids that end a text; None or () if there is none. One is written as a number,
        several as a list.
      pad: the id of padding; None if there is none.
    """

    bos: int | None
    eos: int | Sequence[int] | None
    pad: int | None


class _Read:
    """A transformers config that records the values of the keys that are read from it."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self.values: dict[str, Any] = {}

    def __getattr__(self, key: str) -> Any:
        return self.values.setdefault(key, getattr(self._config, key))

    def explain(self, fault: str) -> str:
        """Adds to a fault about a field of ours the name of the corresponding key in the file.

        That is the key that was read and has the value that the fault gives.
        """
        match = re.match(r"(\w+) is (.+?):", fault)
        if match is None or match[1] in self.values:
            return fault
        keys = [key for key, value in self.values.items() if repr(value) == match[2]]
        return f"{match[1]} (here {', '.join(keys)}){fault[match.end(1) :]}" if keys else fault


def _parse(raw: Mapping[str, Any]) -> tuple[Family, Config]:
    """Parses a config.json.

    Raises:
      ValueError: naming the key and its value, if it describes something that is not supported.
    """
    from transformers import AutoConfig  # slow to import

    model_type = raw.get("model_type")
    family = families.family(model_type)  # type: ignore[arg-type]  # anything: it refuses
    if raw.get("quantization_config") is not None:
        raise ValueError(
            f"quantization_config is {raw['quantization_config']!r}: quantized weights are not"
            " supported; give the float32, float16 or bfloat16 model"
        )
    # transformers fills in its defaults and respells what older versions of it wrote.
    left_out = ("model_type", "id2label", "label2id", "num_labels")  # labels are read by `labels`
    rest = copy.deepcopy({key: value for key, value in raw.items() if key not in left_out})
    try:
        theirs = _Read(AutoConfig.for_model(model_type, **rest))
    except Exception as error:  # whatever its validators raise
        said = " ".join(str(error).split())
        raise ValueError(f"transformers does not accept it: {said}") from error
    try:
        return family, family.config(theirs)
    except ValueError as error:
        raise ValueError(theirs.explain(str(error))) from error


def read_config(path: str | os.PathLike[str]) -> tuple[Family, Config, dict[str, Any]]:
    """Reads the config.json of a model directory, without network access.

    Args:
      path: a local directory.

    Returns:
      (the family of its model_type, our configuration with compute_dtype float32, the file's
      contents unchanged).

    Raises:
      CheckpointError: if the file is absent or unreadable, or describes something that is not
        supported, or the directory has an adapter.
    """
    file = Path(path) / "config.json"
    refuse_adapter(file.parent)
    raw = read_json(file)
    try:
        return *_parse(raw), raw
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the scores of a classifier are.

    Attributes:
      names: the label of each score, in their order.
      problem: one of PROBLEMS: the scores are logits of one softmax; or of a sigmoid each; or
        numbers that are no logits.
    """

    names: tuple[str, ...]
    problem: str = PROBLEMS[0]

    @property
    def independent(self) -> bool:
        """Whether each label has a sigmoid of its own."""
        return self.problem == PROBLEMS[1]


def labels(raw: Mapping[str, Any], where: str, rows: int | None = None) -> Labels:
    """Returns the labels of a classifier's config.json.

    Args:
      raw: contents of the file. Without id2label, or with only a count of labels, the names are
        LABEL_0 and so on, as in transformers; without a count there are two.
      where: path of the file, with which messages start.
      rows: number of scores that the weights give; None if it is not known.

    Returns:
      The labels; without a problem_type those of one softmax, or where there is only one, of
      regression, as in transformers.

    Raises:
      CheckpointError: if the labels are not numbered 0, 1, ..., are not as many as the scores, or
        problem_type is unknown.
    """
    count = raw.get("num_labels")
    if count is not None and (type(count) is not int or count < 1):
        raise CheckpointError(f"{where}: num_labels is {count!r}: give an integer of at least 1")
    id2label = raw.get("id2label") or {str(i): f"LABEL_{i}" for i in range(count or 2)}
    ids = [str(i) for i in range(len(id2label))] if isinstance(id2label, dict) else []
    if not ids or set(id2label) != set(ids) or not all(type(id2label[i]) is str for i in ids):
        raise CheckpointError(
            f'{where}: id2label is {id2label!r}: its keys must be "0", "1", ... and its values'
            " label names"
        )
    if count not in (None, len(ids)):
        raise CheckpointError(f"{where}: num_labels is {count!r}, but id2label names {len(ids)}")
    if rows not in (None, len(ids)):
        told = [f"{key} says {len(ids)}" for key in ("id2label", "num_labels") if raw.get(key)]
        raise CheckpointError(
            f"{where}: {' and '.join(told) or 'id2label and num_labels are missing, which says 2'},"
            f" but the weights have {rows} rows of scores: set id2label to the {rows} names, or"
            f" without it num_labels to {rows}"
        )
    problem = raw.get("problem_type") or (PROBLEMS[0] if len(ids) > 1 else PROBLEMS[2])
    if problem not in PROBLEMS:
        raise CheckpointError(
            f"{where}: problem_type is {problem!r}: give one of {', '.join(PROBLEMS)}, or none"
        )
    return Labels(tuple(id2label[i] for i in ids), problem)


def check_architecture(raw: Mapping[str, Any], fits: bool, needed: str, where: str) -> None:
    """Checks the ``architectures`` of a config.json.

    Args:
      raw: contents of the file.
      fits: whether they fit.
      needed: the class name that is needed, for the message.
      where: path of the file, with which the message starts.

    Raises:
      CheckpointError: if they do not fit.
    """
    if not fits:
        raise CheckpointError(
            f"{where}: architectures is {raw.get('architectures')!r}: a {needed} is needed here"
        )


def _gpt2_json(config: Config) -> dict[str, Any]:
    """Returns the config.json of a GPT-2 trained from scratch."""
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


def describe(
    like: Mapping[str, Any] | None, config: Config, changes: Mapping[str, Any]
) -> tuple[Family, dict[str, Any]]:
    """Composes the config.json of a model that is to be written.

    Args:
      like: the config.json of the directory that the model came from; None for a GPT-2 from
        scratch.
      config: the configuration that the result must describe.
      changes: keys written in place of those of ``like``.

    Returns:
      The family, and the config.json except for ``architectures``.

    Raises:
      ValueError: if the result would not describe ``config``.
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


def token_ids(config: Config, ids: TokenIds) -> dict[str, int | list[int] | None]:
    """Returns the config.json keys of special tokens.

    Args:
      config: the model's configuration.
      ids: the ids of the special tokens.

    Raises:
      ValueError: if an id is outside the vocabulary.
    """
    ends = [ids.eos] if isinstance(ids.eos, int) else list(ids.eos or ())
    named = [("bos_token_id", ids.bos), ("pad_token_id", ids.pad)]
    for name, token_id in [*named, *(("eos_token_id", end) for end in ends)]:
        if token_id is not None and not 0 <= token_id < config.vocab_size:
            raise ValueError(
                f"{name} is {token_id}: give None or an id below vocab_size, {config.vocab_size}"
            )
    eos: int | list[int] | None = ends if len(ends) > 1 else next(iter(ends), None)
    keys = {"bos_token_id": ids.bos, "eos_token_id": eos, "pad_token_id": ids.pad}
    return keys  # None too is written: where the key is absent transformers assumes its default
