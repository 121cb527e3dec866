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


def _cells(rank_BxT: jax.Array, ahead: int = 0) -> tuple[jax.Array, jax.Array]:
    T = rank_BxT.shape[1]
    position_T = jnp.minimum(jnp.arange(T) + ahead, T - 1) * POSITIONS // T
    position_T = position_T.reshape(-1, *[1] * (rank_BxT.ndim - 2))
    rank = jnp.clip((rank_BxT * RANKS).astype(jnp.int32), 0, RANKS - 1)
    return jnp.broadcast_to(position_T, rank.shape), rank


def values(table: Table, rank_BxT: jax.Array, ahead: int = 0) -> jax.Array:
    """Looks up the value of each prefix.

    Args:
      table: of returns.
      rank_BxT: [B, T] or [B, T, ...], at token t the ranks in [0, 1] of rewards of t + ``ahead``
        tokens.
      ahead: how many tokens more than those before token t were ranked.

    Returns:
      float32, of the ranks' shape: means of the returns seen, shrunk towards the mean of their
      position; 0 where the position has seen none.
    """
    total, count = table.total.sum(-1, keepdims=True), table.weight.sum(-1, keepdims=True)
    mean = total / jnp.maximum(count, 1e-9)
    value = (table.total + PRIOR * mean) / (table.weight + PRIOR)
    return value[_cells(rank_BxT, ahead)]


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


class Lookahead(NamedTuple):
    """Values of the next tokens, as a baseline of actions whose expectation is known.

    Attributes:
      ids_BxTxK: int32, the candidates for each token.
      credit_BxTxK: value of the prefix with a candidate, less that with any other token.
      value_BxT: expected value of the prefix with the policy's next token.
      drawn_BxT: value with the token drawn, less ``value_BxT``.
    """

    ids_BxTxK: jax.Array
    credit_BxTxK: jax.Array
    value_BxT: jax.Array
    drawn_BxT: jax.Array


def lookahead(
    candidate_BxTxK: jax.Array,
    other_BxT: jax.Array,
    ids_BxTxK: jax.Array,
    log_probs_BxTxK: jax.Array,
    tokens_BxT: jax.Array,
) -> Lookahead:
    r"""Makes an action-dependent baseline of the values of next tokens.

    For any q(s, a), the gradient of the policy is (Gu et al., "Q-Prop", 2017, Section 3)

        E_a[ grad log pi(a|s) (A(s, a) - q(s, a)) ] + grad sum_a pi(a|s) q(s, a),

    of which the second part has no noise of sampling. Here q is the value of the prefix with a,
    which is known of the likeliest tokens; any other token is taken for one that leaves the
    prefix's reward as it is. Up to a constant of the state the second part is
    grad sum_k pi(k|s) credit_k.

    Args:
      candidate_BxTxK: value of the prefix before token t and a candidate in its place.
      other_BxT: that with any other token.
      ids_BxTxK: the candidates, of each slot different ones.
      log_probs_BxTxK: nats, their log-probs under the policy.
      tokens_BxT: the tokens drawn.

    Returns:
      The baseline; ``drawn_BxT`` is what the advantages are to be lessened by.
    """
    credit = candidate_BxTxK - other_BxT[..., None]
    expected_BxT = jnp.sum(jnp.exp(log_probs_BxTxK) * credit, axis=-1)
    drawn_BxT = jnp.sum(jnp.where(ids_BxTxK == tokens_BxT[..., None], credit, 0.0), axis=-1)
    return Lookahead(ids_BxTxK, credit, other_BxT + expected_BxT, drawn_BxT - expected_BxT)
