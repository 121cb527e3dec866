"""Values of prefixes of a response, from where their own rewards rank.

The reward of a prefix, taken as if the response ended there, tells much of what the reward of the
whole will be: a table of mean returns by position and by the prefix's rank among the prompt's
reference rewards is a value function that needs no training of a network and is right for the next
rollout at once. As a baseline it adds no bias; by GAE with a small lambda it gives each token the
credit of the change that it made, where one reward a response gives all tokens the same.

Shape suffixes: B responses, T tokens, I intervals of position, K intervals of rank.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vbon_jax.rl.masking import masked

POSITIONS, RANKS = 16, 16
PRIOR = 4.0  # returns at the mean of the position that each cell counts as having seen


class Table(NamedTuple):
    """Sums of returns, older ones counting less, float32 [I, K] each.

    Attributes:
      total: of the returns.
      weight: of what they count.
    """

    total: jax.Array
    weight: jax.Array


def empty() -> Table:
    """A table that has seen nothing: all values are 0."""
    return Table(*jnp.zeros((2, POSITIONS, RANKS), jnp.float32))


def _cells(rank_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    T = rank_BxT.shape[1]
    position_T = jnp.arange(T) * POSITIONS // T
    rank = jnp.clip((rank_BxT * RANKS).astype(jnp.int32), 0, RANKS - 1)
    return jnp.broadcast_to(position_T, rank.shape), rank


def values(table: Table, rank_BxT: jax.Array) -> jax.Array:
    """Looks up the value of each prefix.

    Args:
      table: of returns.
      rank_BxT: at token t the rank in [0, 1] of the reward of the t tokens before it.

    Returns:
      float32 [B, T]: means of the returns seen, shrunk towards the mean of their position; 0 where
      the position has seen none.
    """
    total, count = table.total.sum(-1, keepdims=True), table.weight.sum(-1, keepdims=True)
    mean = total / jnp.maximum(count, 1e-9)
    value = (table.total + PRIOR * mean) / (table.weight + PRIOR)
    return value[_cells(rank_BxT)]


def updated(
    table: Table, rank_BxT: jax.Array, returns_BxT: jax.Array, mask_BxT: jax.Array, keep: float
) -> Table:
    """Adds the returns of a batch.

    Args:
      table: the sums so far.
      rank_BxT: as for `values`.
      returns_BxT: sums of the rewards from token t on.
      mask_BxT: True (or 1) at response tokens.
      keep: weight of what was seen before, in [0, 1].

    Returns:
      The sums with the batch.
    """
    cells, here = _cells(rank_BxT), masked(jnp.ones_like(rank_BxT), mask_BxT)
    return Table(
        (keep * table.total).at[cells].add(masked(returns_BxT, mask_BxT)),
        (keep * table.weight).at[cells].add(here),
    )
