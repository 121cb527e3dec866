"""The key-value cache of a decoder, an explicit argument and an explicit result.

The mask says which slots hold a real token of a row, and the positions which of its tokens.
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
      position_BxS: int32, the position id of each slot's token.
      index: int32, the slot that the next step writes, S when the cache is full: a scalar, or one
        of each row, [B].
      trunk_BxSxD: in the compute dtype, what the first ``trunk_layers`` layers make of each slot's
        token, the input of ``decoder.top`` where these are the trunk; None where no one asks.
      trunk_layers: how many; static.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    mask_BxS: jax.Array
    position_BxS: jax.Array
    index: jax.Array
    trunk_BxSxD: jax.Array | None = None
    trunk_layers: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def length(self) -> int:
        """S, the number of slots."""
        return self.mask_BxS.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys and values of prompts, held once for the B / N adjacent rows that go on from them.

    Attributes:
      k: keys, a tuple of ``layers`` arrays [N, G, J * P, K] in the compute dtype: J prompts side by
        side.
      v: values, likewise.
      mask_BxP: bool, True at the tokens of a row's prompt.
      position_BxP: int32, their position ids.
      slot_B: int32, which of the J prompts each row goes on from; None where J is 1.
      trunk_NxPxD: as in ``KVCache``.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    mask_BxP: jax.Array
    position_BxP: jax.Array
    slot_B: jax.Array | None = None
    trunk_NxPxD: jax.Array | None = None


def init(config: DecoderConfig, batch: int, length: int, trunk_layers: int = 0) -> KVCache:
    """Creates an empty cache.

    Args:
      config: the decoder's configuration.
      batch: B, the number of rows.
      length: S, the number of slots.
      trunk_layers: of which the output is kept as well, less than all; 0 for none.

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
        position_BxS=jnp.zeros((batch, length), jnp.int32),
        index=jnp.zeros((), jnp.int32),
        trunk_BxSxD=jnp.zeros((batch, length, config.width), config.compute_dtype)
        if trunk_layers
        else None,
        trunk_layers=trunk_layers,
    )
