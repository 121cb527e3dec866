"""What defines a family of checkpoints: a reader of its configs and a table of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vbon_jax.models.config import Rotary
from vbon_jax.models.hf.layouts import Layout


class Tensor(NamedTuple):
    """One row of a family's table: a tensor of the file and the leaves of our tree that it holds.

    Attributes:
      name: name in the file, without the family's prefix; "{i}" stands for the layer.
      paths: "/"-joined paths of the leaves in our tree. Leaves of a name with "{i}" have a leading
        layer axis, which the layout does not see.
      layout: how the leaves are stored in the tensor.
    """

    name: str
    paths: tuple[str, ...]
    layout: Layout


class Family(NamedTuple):
    """How checkpoints of one ``model_type`` are read and written.

    Attributes:
      config: maps transformers' config object, which fills in its own defaults, to a DecoderConfig
        or an EncoderConfig. It raises ValueError, naming the key and its value, if the file
        describes something that is not supported.
      tensors: maps our configuration to the table of the model without any head, its paths starting
        at the model's root.
      prefix: prefix of the model's tensor names in files with a head; files without one may omit
        it.
      head: name of the untied output matrix, [V, D]; "" for encoders.
      classifier: the rows of a sequence classifier's head, without prefix, with paths below
        "score/".
      buffers: regular expression of names, without prefix, of tensors in old files that are
        ignored.
      causal: class name of transformers' causal language model, for ``architectures``; "" for
        encoders.
      sequence: class name of transformers' sequence classifier, for ``architectures``.
    """

    config: Callable[[Any], Any]
    tensors: Callable[[Any], list[Tensor]]
    prefix: str
    head: str
    classifier: tuple[Tensor, ...]
    buffers: str
    causal: str
    sequence: str


def only(hf: Any, **supported: Any) -> None:
    """Checks that settings have supported values.

    Args:
      hf: transformers' config object.
      **supported: for each key the supported value, or a tuple of supported values. A key that the
        object lacks counts as supported.

    Raises:
      ValueError: naming the key, its value and what is supported.
    """
    for key, allowed in supported.items():
        values = allowed if isinstance(allowed, tuple) else (allowed,)
        value = getattr(hf, key, values[0])
        if value not in values:
            raise ValueError(f"{key} is {value!r}: only {values[0]!r} is supported")


def rotary(rope: dict[str, Any]) -> Rotary:
    """Reads the ``rope_parameters`` of a transformers config.

    Args:
      rope: the dictionary of parameters.

    Returns:
      The rotary position embedding.

    Raises:
      ValueError: if rope_type is none of default, linear and llama3.
    """
    kind = rope.get("rope_type", "default")
    base = {"theta": rope["rope_theta"], "fraction": rope.get("partial_rotary_factor", 1.0)}
    if kind == "default":
        return Rotary(**base)
    if kind == "linear":
        return Rotary(**base, scaling="linear", factor=rope["factor"])
    if kind == "llama3":
        return Rotary(
            **base,
            scaling="llama3",
            factor=rope["factor"],
            low=rope["low_freq_factor"],
            high=rope["high_freq_factor"],
            original=rope["original_max_position_embeddings"],
        )
    raise ValueError(f"rope_type is {kind!r}: supported are default, linear and llama3")
