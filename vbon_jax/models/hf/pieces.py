"""Arrays on their devices, written and read in pieces so that the host never holds a whole one."""

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

from vbon_jax import sharding
from vbon_jax.models.hf import tensor_files
from vbon_jax.models.hf.layouts import Shape

Where = NamedSharding | SingleDeviceSharding | None


@functools.lru_cache(maxsize=4096)
def _zeros(shape: Shape, dtype: str, sharding: Where) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def zeros(shape: Shape, dtype: str, sharding: Where) -> jax.Array:
    """Creates an array of zeros directly on its devices.

    Args:
      shape: shape of the array.
      dtype: its dtype.
      sharding: where it is placed; None for the default device.
    """
    return _zeros(shape, dtype, sharding)()


@functools.lru_cache(maxsize=4096)
def _updater(sharding: Where) -> Callable[..., jax.Array]:
    """Returns a jitted (leaf, piece, at) -> leaf that writes the piece at an index of each shard.

    The leaf is donated. The index is the same on every device, so no device needs another's data.
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
    """Writes rows to one layer of a leaf, or to all of it.

    About ``tensor_files.PIECE`` bytes are transferred at a time.

    Args:
      leaf: array [L, N, ...] or, if layer is None, [N, ...]. It is donated.
      sharding: the leaf's sharding; None for the default device.
      layer: the index on the leading axis; None if there is no axis of layers.
      rows: maps (start, stop) to the rows [stop - start, ...] of the N, in any float dtype.

    Returns:
      The updated leaf.

    Raises:
      ValueError: if there is a layer, and the axis of layers is sharded.
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
        """Returns the piece's data at an index, ``start`` being its first row within each shard."""
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
    """Copies one layer of a leaf, or all of it, to the host.

    JAX caches the host copy with the array it was made from. The copy here is therefore made from a
    temporary array, so that it is freed with it.

    Args:
      leaf: a JAX array, or any object that is indexed like a NumPy array.
      layer: the index on the leading axis; None for the whole leaf.
    """
    if isinstance(leaf, jax.Array):
        return sharding.fetch(_copy(leaf) if layer is None else _layer(leaf, np.int32(layer)))
    return np.asarray(leaf[...] if layer is None else leaf[layer])
