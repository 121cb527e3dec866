"""What a decoder is: one small frozen configuration for every family."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

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
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021) of the first ``fraction`` of a head, in halves.

    theta: base of the wave lengths. scaling: "none", "linear" (positions divided by ``factor``) or
    "llama3" (long waves divided by ``factor``, short ones kept, a ramp between: those that turn
    less than ``low`` and more than ``high`` times in ``original`` positions).
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
        """Radians a position, float64, one for each pair of rotated dimensions."""
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
    """The shape and the arithmetic of a decoder. The defaults are GPT-2's.

    Attributes:
      vocab_size: V, rows of the embedding.
      positions: the longest context, in tokens.
      layers: L.
      width: D.
      heads: H.
      kv_heads, head_width: None is as many as heads, and width / heads; so these follow when
        dataclasses.replace changes the others. Read key_heads and key_width, which are numbers.
      mlp_width: F.
      norm: "layer" or "rms"; norm_eps: its epsilon; norm_offset: the stored scale is one less than
        the factor (Gemma).
      place: of the norms: "pre" (x + f(norm(x)), attention then MLP), "sandwich" (a second norm
        on each result), "parallel" (x + attention(ln_1(x)) + mlp(ln_2(x))).
      rotary: None for learned positions. rotary_window: that of windowed layers, where it differs.
      window: a token of a windowed layer sees this many, itself included; None sees all.
        windowed: which layers are; empty for all.
      activation: a key of ACTIVATIONS. gated: down(activation(gate(x)) * up(x)).
      qkv_bias, out_bias, mlp_bias: which projections have a bias.
      qk_norm: an RMS norm over each head's queries and keys.
      tied: the output matrix is the embedding.
      embed_scale: multiplies embeddings. query_scale: multiplies scores (None: K ** -0.5).
      attention_cap, logit_cap: scores and logits become cap * tanh(x / cap).
      compute_dtype: of activations, float32 or bfloat16.
      remat: what the backward pass finds stored of a block: "none" recomputes nothing, "dots" keeps
        the products with weights, "full" only the block's input.
      lora_alpha: adapters of rank r are added with the factor lora_alpha / r (Hu et al. 2021).
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
        """G, the heads of the keys and of the values; a divisor of H."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def key_width(self) -> int:
        """K, the width of a head."""
        return self.width // self.heads if self.head_width is None else self.head_width

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer sees only ``window`` tokens."""
        return self.window is not None and (not self.windowed or self.windowed[layer])

    @property
    def mixed(self) -> bool:
        """Whether layers differ in what they see."""
        return len({self.is_windowed(i) for i in range(self.layers)}) > 1


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}: give a positive number")
