"""Responses of like length together, so that short ones are not computed as padded to the limit.

Shapes are static: each part of a batch runs at the shortest of a few lengths that holds it, all of
which are compiled. Shape suffixes: B rows, T response tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vbon_jax import sharding


def order(mask_BxT: jax.Array, parts: int, together: int = 1) -> jax.Array:
    """The order of rows in which those of `scoring.in_parts` have responses of like length.

    Args:
      mask_BxT: True on the responses' tokens.
      parts: into how many B is divided.
      together: adjacent rows that stay so; the longest of them counts.

    Returns:
      int32 [B], a permutation: part p, every ``parts``-th row (or so many together) from p on,
      holds rows that follow one another by length.
    """
    length_G = jnp.max(jnp.sum(mask_BxT, axis=1).reshape(-1, together), axis=1)
    by_length_G = jnp.argsort(length_G).reshape(parts, -1).swapaxes(0, 1).reshape(-1)
    return rows_of(by_length_G, together)


def rows_of(group_G: jax.Array, together: int) -> jax.Array:
    """Indices [G * together] of the rows of groups of adjacent ones, in the groups' order."""
    return (group_G[:, None] * together + jnp.arange(together)).reshape(-1)


def at_shortest(f: Callable[[Any], Any], rows: Any, mask_BxT: jax.Array, lengths: int) -> Any:
    """Applies f to rows whose responses are cut to the shortest length that holds them all.

    Args:
      f: of ``rows`` with response columns of any number; its results have one shape for all.
      rows: pytree of arrays with rows first; in those of more axes the second ends with the
        response's T columns, of which only padding is cut.
      mask_BxT: True on the responses' tokens, which are their first.
      lengths: how many there are, T / lengths apart; each is a program of its own.

    Returns:
      f of the rows that were cut.
    """
    T = mask_BxT.shape[1]
    each = sorted({-(-T * (i + 1) // lengths) for i in range(lengths)})

    def at(length: int) -> Callable[[Any], Any]:
        def cut(x: jax.Array) -> jax.Array:
            return x[:, : x.shape[1] - (T - length)] if x.ndim > 1 else x

        return lambda rows: f(jax.tree.map(cut, rows))

    longest = sharding.in_step(jnp.max(jnp.sum(mask_BxT, axis=1)))
    fits = jnp.sum(longest > jnp.array(each[:-1], jnp.int32))
    return jax.lax.switch(fits, [at(length) for length in each], rows)


def padded(x: jax.Array, columns: int) -> jax.Array:
    """The array with zeros after its second axis, to that many columns."""
    return jnp.pad(x, [(0, 0), (0, columns - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
