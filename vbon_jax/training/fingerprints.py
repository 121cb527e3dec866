"""Fingerprints of arrays: numbers that change when any bit of them does, the same on any mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vbon_jax import sharding

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes an element


def of_tree(tree: Any) -> dict[str, list[Any]]:
    """The fingerprint of each array of a tree, computed where the arrays lie.

    An array's is the sum, modulo 2^32, of its elements' bits times odd weights of their positions:
    a change of one element always changes it, any other damage but for one time in 4 billion.

    Args:
      tree: of JAX arrays, of at most 32 bits an element, or random keys.

    Returns:
      By the path of each array: [dtype, shape, fingerprint], as JSON has it.
    """
    paths, leaves = _leaves(tree)
    found = sharding.fetch(_sums(leaves)).tolist() if leaves else []
    shapes = described(tree)
    return {path: [*shapes[path], value] for path, value in zip(paths, found, strict=True)}


def described(tree: Any) -> dict[str, list[Any]]:
    """Path -> [dtype, shape] of each array of a tree, as `of_tree` names them."""
    paths, leaves = _leaves(tree)
    return {p: [str(x.dtype), list(x.shape)] for p, x in zip(paths, leaves, strict=True)}


def _leaves(tree: Any) -> tuple[list[str], list[Any]]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, _ in found], [leaf for _, leaf in found]


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_weighted_sum(_bits(leaf)) for leaf in leaves])


def _bits(x: jax.Array) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    return lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)


def _weighted_sum(words: jax.Array) -> jax.Array:
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):  # not by a reshape: that would gather what is sharded
        along = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position += along * np.uint32(stride % 2**32)
        stride *= words.shape[axis]
    # The finalizer of MurmurHash3: weights of neighbours have nothing to do with each other.
    position = (position ^ (position >> 16)) * np.uint32(0x85EBCA6B)
    position = (position ^ (position >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.sum(words * ((position ^ (position >> 16)) | 1), dtype=jnp.uint32)
