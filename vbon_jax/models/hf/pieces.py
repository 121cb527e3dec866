"""Arrays on their devices, filled and fetched a part at a time: the host never holds one whole."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from vbon_jax.models.hf import tensor_files
from vbon_jax.models.hf.layouts import Shape

Where = NamedSharding | SingleDeviceSharding | None


@functools.lru_cache(maxsize=4096)
def _zeros(shape: Shape, dtype: str, sharding: Where) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def zeros(shape: Shape, dtype: str, sharding: Where) -> jax.Array:
    """An array of zeros that never was anywhere else; sharding None: on the default device."""
    return _zeros(shape, dtype, sharding)()


@functools.lru_cache(maxsize=4096)
def _updater(sharding: Where) -> Callable[..., jax.Array]:
    """(leaf, piece, at) -> leaf with the piece at that index of every device's own shard.

    The leaf is donated. The same index on every device: no device needs another's data.
    """

    def update(leaf: jax.Array, piece: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(leaf, piece, [at[i] for i in range(leaf.ndim)])

    if isinstance(sharding, NamedSharding):
        spec = sharding.spec
        update = jax.shard_map(
            update, mesh=sharding.mesh, in_specs=(spec, spec, P()), out_specs=spec
        )
    return jax.jit(update, donate_argnums=0)


def fill(
    leaf: jax.Array,
    sharding: Where,
    layer: int | None,
    rows: Callable[[int, int], np.ndarray],
) -> jax.Array:
    """The leaf, which is donated, with `rows` written to one layer of it (None: to all of it).

    About ``tensor_files.PIECE`` bytes are on their way at a time.

    Args:
      leaf: [L, N, ...] or, without a layer, [N, ...].
      sharding: the leaf's; None for the default device.
      layer: the index on the leading axis.
      rows: (start, stop) -> [stop - start, ...] of the N rows, in any float dtype.

    Raises:
      ValueError: if there is a layer, and the axis of the layers is sharded.
    """
    axis = 0 if layer is None else 1
    local = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    if layer is not None and local[0] != leaf.shape[0]:
        raise ValueError(f"place gave {sharding} for layers: their axis must not be sharded")
    count = local[axis]
    shards = leaf.shape[axis] // count
    row_bytes = leaf.dtype.itemsize * math.prod(leaf.shape[axis + 1 :])
    step = min(count, max(1, tensor_files.PIECE // (row_bytes * shards)))
    # The piece that is under way holds `step` rows for each of the shards of the row axis.
    shape = (*leaf.shape[:axis], shards * step, *leaf.shape[axis + 1 :])
    shape = shape if layer is None else (1, *shape[1:])
    dtype, shared = leaf.dtype, functools.lru_cache(maxsize=shards)(rows)  # by several devices

    def part(start: int, index: Any) -> np.ndarray:
        """What lies at an index of the piece whose first row is `start` in every shard."""
        first = (index[axis].start or 0) // step * count + start
        values = shared(first, first + step)[(slice(None), *index[axis + 1 :])]
        values = np.ascontiguousarray(values, dtype)
        return values if layer is None else values[None]

    for start in range(0, count, step):
        start = min(start, count - step)  # the last overlaps: one shape, one compilation
        if sharding is None:
            piece = jnp.asarray(part(start, (slice(None),) * leaf.ndim))
        else:
            piece = jax.make_array_from_callback(shape, sharding, functools.partial(part, start))
        at = np.array([layer or 0] * axis + [start] + [0] * (leaf.ndim - axis - 1), np.int32)
        leaf = _updater(sharding)(leaf, piece, at)
        leaf.block_until_ready()  # or pieces would pile up behind the devices
    return leaf


_layer = jax.jit(lambda leaf, i: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False))
_copy = jax.jit(jnp.copy)


def fetch(leaf: Any, layer: int | None) -> np.ndarray:
    """One layer of a leaf (None: all of it) on the host.

    JAX keeps the host's copy with the array it was made from: so fetch from arrays that go at once.
    """
    if isinstance(leaf, jax.Array):
        return np.asarray(_copy(leaf) if layer is None else _layer(leaf, np.int32(layer)))
    return np.asarray(leaf[...] if layer is None else leaf[layer])
