"""What a family of checkpoints is: a reader of its configs and a table of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vbon_jax.models.config import Rotary
from vbon_jax.models.hf.layouts import Layout


class Tensor(NamedTuple):
    """One row of a family's table.

    name: of the file, the family's prefix left out; "{i}" stands for the layer.
    paths: "/"-joined paths of the leaves in our tree; leaves of a name with "{i}" have a leading
      layer axis, which the layout does not see.
    """

    name: str
    paths: tuple[str, ...]
    layout: Layout


class Family(NamedTuple):
    """How checkpoints of one ``model_type`` are read and written.

    config: transformers' config object (which fills in its own defaults) -> ours: a DecoderConfig
      or an EncoderConfig. Raises ValueError naming the key and its value where the file asks for
      something we do not compute.
    tensors: our config -> the table of the bare model, without any head; paths from its root.
    prefix: of the bare model's names in files with a head; may be absent in files without.
    head: the name of the untied output matrix, [V, D]; "" for encoders.
    classifier: the rows of a sequence classifier's head, without prefix; paths below "score/".
    buffers: a regular expression of names (prefix left out) that old files carry and nobody needs.
    causal, sequence: transformers' class names, for ``architectures``.
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
    """Refuses settings we do not compute: each must have the value given, or one of a tuple.

    Raises ValueError naming the key, its value and what is supported.
    """
    for key, allowed in supported.items():
        values = allowed if isinstance(allowed, tuple) else (allowed,)
        value = getattr(hf, key, values[0])
        if value not in values:
            raise ValueError(f"{key} is {value!r}: only {values[0]!r} is supported")


def rotary(rope: dict[str, Any]) -> Rotary:
    """``rope_parameters`` of a transformers config.

    Raises ValueError on a rope_type other than default, linear and llama3.
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
