"""The key-value cache of a decoder, an explicit argument and an explicit result.

All rows of a batch are written at the same slot, which left-padded prompts allow: slot s holds the
s-th column of the padded batch, and the mask says which slots hold a real token of a row.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from vbon_jax.models.decoder import DecoderConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, one array per layer so that a step updates each in place.

    Attributes:
      k: keys, a tuple of ``layers`` arrays [B, G, S, K] in the compute dtype. Heads come before
        slots, or every step would transpose the whole cache for its matrix products.
      v: values, likewise.
      mask_BxS: bool, True at slots that hold a token to attend to.
      index: int32 scalar, the slot that the next step writes; S when the cache is full.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    mask_BxS: jax.Array
    index: jax.Array

    @property
    def length(self) -> int:
        """S, the number of slots."""
        return self.mask_BxS.shape[1]


def init(config: DecoderConfig, batch: int, length: int) -> KVCache:
    """Creates an empty cache.

    Args:
      config: the decoder's configuration.
      batch: B, the number of rows.
      length: S, the number of slots: prompt columns plus new tokens.

    Returns:
      A cache of zeros in the compute dtype, with index 0.

    Raises:
      ValueError: if batch or length is less than 1.
    """
    for name, value in (("batch", batch), ("length", length)):
        if value < 1:
            raise ValueError(f"cache {name} is {value}: give at least 1")
    shape = (batch, config.key_heads, length, config.key_width)

    def zeros() -> tuple[jax.Array, ...]:
        # One buffer a layer, never one shared: a donated buffer may be given away only once.
        return tuple(jnp.zeros(shape, config.compute_dtype) for _ in range(config.layers))

    return KVCache(
        k=zeros(),
        v=zeros(),
        mask_BxS=jnp.zeros((batch, length), bool),
        index=jnp.zeros((), jnp.int32),
    )
