"""The configuration of a decoder, one small frozen dataclass for every family."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vbon_jax import sharding

Params = dict[str, Any]

_gelu_tanh: Callable[[jax.Array], jax.Array] = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

DTYPES = ("float32", "bfloat16")
NORMS = ("layer", "rms")
PLACES = ("pre", "sandwich", "parallel")
# What of a block is kept for its backward pass: all, its weight products, nothing.
REMAT: dict[str, Any] = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(sharding.GATHERED),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al., 2021), in the split-half convention.

    Attributes:
      theta: base of the wavelengths.
      fraction: fraction of each head's dimensions that is rotated, the first ones.
      scaling: "none"; "linear", which divides positions by ``factor``; or "llama3", which divides
        the frequencies of long waves by ``factor``, keeps those of short waves and interpolates
        between.
      factor: see ``scaling``.
      low: with "llama3", waves that turn fewer times than this in ``original`` positions are long.
      high: with "llama3", waves that turn more times than this in ``original`` positions are short.
      original: with "llama3", the context length that the model was first trained with, in tokens.

    Raises:
      ValueError: on construction, if a field has a value that is not allowed.
    """

    theta: float = 10_000.0
    fraction: float = 1.0
    scaling: str = "none"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8_192

    def __post_init__(self) -> None:
        if self.scaling not in ("none", "linear", "llama3"):
            raise ValueError(f"rotary scaling is {self.scaling!r}: give none, linear or llama3")
        if not (self.theta > 0 and self.factor > 0 and 0 < self.fraction <= 1):
            raise ValueError(f"{self}: theta and factor must be positive, fraction in (0, 1]")

    def frequencies(self, head_width: int) -> np.ndarray:
        """Computes the angular frequencies.

        Args:
          head_width: K, the width of a head.

        Returns:
          float64 array of radians per position, one for each pair of rotated dimensions.
        """
        rotated = int(head_width * self.fraction)
        frequency = self.theta ** (-np.arange(0, rotated, 2) / rotated)
        if self.scaling == "linear":
            return frequency / self.factor
        if self.scaling == "llama3":
            turns = self.original * frequency / (2 * np.pi)
            kept = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
            return frequency * (kept + (1 - kept) / self.factor)
        return frequency


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The architecture of a decoder, and how it is computed. The defaults are those of GPT-2.

    Attributes:
      vocab_size: V, rows of the embedding.
      positions: the longest context, in tokens.
      layers: L, the number of blocks.
      width: D, the width of the residual stream.
      heads: H, the number of query heads.
      mlp_width: F, the width of the MLP's hidden layer.
      kv_heads: G, the number of key-value heads; None means as many as heads, and then follows them
        when ``dataclasses.replace`` changes them. Read ``key_heads``, which is always a number.
      head_width: K, the width of a head; None means width / heads. Read ``key_width``.
      norm: "layer" or "rms".
      norm_eps: epsilon of the norms.
      norm_offset: whether the stored scale is one less than the factor, as in Gemma.
      place: where the norms are: "pre" is x + f(norm(x)), attention then MLP; "sandwich" adds a
        second norm on each of the two outputs; "parallel" is x + attention(ln_1(x)) + mlp(ln_2(x)).
      rotary: rotary position embedding; None for learned positions.
      rotary_window: rotary position embedding of windowed layers; None if it is the same.
      window: number of tokens that a windowed layer attends to, the current one included; None for
        full attention in all layers.
      windowed: which layers are windowed, one entry a layer; empty if all are.
      activation: a key of ``ACTIVATIONS``.
      gated: whether the MLP is down(activation(gate(x)) * up(x)).
      qkv_bias: whether the query, key and value projections have a bias.
      out_bias: whether the output projection of attention has a bias.
      mlp_bias: whether the projections of the MLP have a bias.
      qk_norm: whether an RMS norm is applied to the queries and keys of each head.
      tied: whether the output projection is the embedding.
      embed_scale: factor of the embeddings.
      query_scale: factor of the attention scores; None means K ** -0.5.
      attention_cap: if not None, attention scores become cap * tanh(score / cap).
      logit_cap: if not None, logits become cap * tanh(logit / cap).
      compute_dtype: dtype of activations, "float32" or "bfloat16".
      remat: what is stored of a block for the backward pass: "none" recomputes nothing, "dots"
        stores the products with weights, "full" stores only the block's input.
      lora_alpha: adapters of rank r are added with the factor lora_alpha / r (Hu et al., 2021).
      initializer_range: standard deviation of the random initial weights.

    Raises:
      ValueError: on construction, naming the field, its value and what is allowed.
    """

    vocab_size: int
    positions: int
    layers: int
    width: int
    heads: int
    mlp_width: int
    kv_heads: int | None = None
    head_width: int | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    norm_offset: bool = False
    place: str = "pre"
    rotary: Rotary | None = None
    rotary_window: Rotary | None = None
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    activation: str = "gelu_new"
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    tied: bool = True
    embed_scale: float = 1.0
    query_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    compute_dtype: str = "float32"
    remat: str = "dots"
    lora_alpha: float = 1.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "positions", "layers", "width", "heads", "mlp_width", "kv_heads",
            "head_width",
        ):  # fmt: skip
            value = getattr(self, name)
            derived = value is None and name in ("kv_heads", "head_width")
            if not derived and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}: give an integer of at least 1")
        if self.head_width is None and self.width % self.heads:
            raise ValueError(f"width is {self.width}: give a multiple of heads, {self.heads}")
        if self.heads % self.key_heads:
            raise ValueError(f"kv_heads is {self.kv_heads}: give a divisor of heads, {self.heads}")
        for rotary in (self.rotary, self.rotary_window):
            pairs = 0 if rotary is None else -(-int(self.key_width * rotary.fraction) // 2)
            if 2 * pairs > self.key_width:
                raise ValueError(
                    f"head_width is {self.key_width}, and all of it is to be rotated, in pairs: "
                    "give an even number"
                )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}: give None or at least 1")
        if self.windowed and len(self.windowed) != self.layers:
            raise ValueError(
                f"windowed has {len(self.windowed)} entries: give one a layer, {self.layers}"
            )
        for name in ("norm_eps", "initializer_range", "embed_scale"):
            _check_positive(name, getattr(self, name))
        for name in ("query_scale", "attention_cap", "logit_cap"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        for name, allowed in (
            ("activation", ACTIVATIONS), ("compute_dtype", DTYPES), ("norm", NORMS),
            ("place", PLACES), ("remat", REMAT),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: give one of {list(allowed)}")

    @property
    def key_heads(self) -> int:
        """G, the number of key-value heads, a divisor of H."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def key_width(self) -> int:
        """K, the width of a head."""
        return self.width // self.heads if self.head_width is None else self.head_width

    def is_windowed(self, layer: int) -> bool:
        """Returns whether a layer attends to ``window`` tokens only.

        Args:
          layer: index of the layer.
        """
        return self.window is not None and (not self.windowed or self.windowed[layer])

    @property
    def mixed(self) -> bool:
        """Whether some layers are windowed and others are not."""
        return len({self.is_windowed(i) for i in range(self.layers)}) > 1


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}: give a positive number")
