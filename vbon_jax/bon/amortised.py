"""Log F with a prior: what the samples of other prompts say of a prompt's own rewards.

A head (``models.reward_head``) predicts F0, the distribution of the reward of the reference's
responses to a prompt. F of the prompt is taken to be drawn from a Dirichlet process of mean F0 and
concentration c (Ferguson, 1973), so that with k of the prompt's own m samples below a reward the
posterior mean of F there is

    (c F0 + k) / (c + m).                                                                   (2)

This is what c more samples would say, c F0 of them below. So every estimator of ``bon.log_f`` takes
c F0 + k, c g0 + e and c + m in place of k, e and m: with c = 0 it is what it was, with m = 0 it is
the head alone. ``harmonic`` then is the posterior mean of log F under Beta(k' + 1, m' - k'), and
``interval`` formula (1) at the posterior mean once y itself has been added to the samples.

F0 is known at the edges of K bins of the pool, the rewards of all prompts' samples, and is linear
in the rank in the pool within a bin. Only ranks in the pool are used: a strictly increasing
transform of the reward changes nothing. No tie group straddles an edge, and one as large as a bin
is a bin of its own, so that rewards of few values, as a verifier's, are exact: the mass g0 of a
tie group is its share of its bin.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

MOST_POOLED = 65_536  # rewards of the pool that are kept, evenly among its ranks
CONCENTRATIONS = (1.0, 10_000.0)  # between which c is fitted


class Prior(NamedTuple):
    """The head's distribution of each of P prompts.

    Attributes:
      pool_N: float32, rewards of the samples of all prompts, ascending.
      edges_E: int32, places in the pool where bins begin and the last one ends, from 0 to N; E is
        one more than the number of bins.
      cumulative_PxE: float32, F0 at the edges, from 0 to 1.
      concentration: float32 scalar, c: how many samples of its own F0 of a prompt is worth.
    """

    pool_N: jax.Array
    edges_E: jax.Array
    cumulative_PxE: jax.Array
    concentration: jax.Array


def pooled(rewards: ArrayLike) -> np.ndarray:
    """Sorts the rewards of all prompts' samples; of more than ``MOST_POOLED`` keeps as many.

    Args:
      rewards: finite, any shape, at least one.

    Returns:
      float32 [N], ascending.

    Raises:
      ValueError: if there is none, or one is not finite.
    """
    pool_N = np.sort(np.asarray(rewards, np.float32).ravel())
    if not pool_N.size or not np.isfinite(pool_N).all():
        raise ValueError(f"rewards must be finite and at least one, got {pool_N.size} of them")
    if pool_N.size <= MOST_POOLED:
        return pool_N
    place = (np.arange(MOST_POOLED) + 0.5) * (pool_N.size / MOST_POOLED)
    return pool_N[place.astype(np.int64)]


def edges(pool_N: ArrayLike, bins: int) -> np.ndarray:
    """Divides a pool into about ``bins`` bins of equal mass whose edges fall between tie groups.

    A tie group that a quantile j / bins falls into has an edge below it, and above it as well where
    it is at least a quarter of a bin.

    Args:
      pool_N: from ``pooled``.
      bins: how many, at least 1.

    Returns:
      int32 [E], ascending places in the pool, from 0 to N.
    """
    pool_N = np.asarray(pool_N)
    inner = pool_N[(np.arange(1, bins) * pool_N.size) // bins]
    low, high = (np.searchsorted(pool_N, inner, side) for side in ("left", "right"))
    wide = (high - low > 1) & (4 * bins * (high - low) >= pool_N.size)
    return np.unique(np.concatenate([[0, pool_N.size], low, high[wide]])).astype(np.int32)


def bin_counts(pool_N: np.ndarray, edges_E: np.ndarray, rewards: ArrayLike) -> np.ndarray:
    """Counts rewards in each bin: int64 [K], K = E - 1.

    A reward beyond the pool is in its first or last bin; one between two bins is in the upper one.
    """
    below = np.searchsorted(pool_N, np.asarray(rewards, np.float32), "left")
    of = np.searchsorted(edges_E, below, "right") - 1
    return np.bincount(np.minimum(of, len(edges_E) - 2), minlength=len(edges_E) - 1)


@jax.jit
def _f0(prior: Prior, row_B: jax.Array, reward_BxX: jax.Array) -> tuple[jax.Array, jax.Array]:
    cumulative_BxE = prior.cumulative_PxE[row_B]

    def at(place_BxX: jax.Array) -> jax.Array:
        last = prior.edges_E.shape[0] - 2
        of = jnp.minimum(jnp.searchsorted(prior.edges_E, place_BxX, side="right") - 1, last)
        low, high = prior.edges_E[of], prior.edges_E[of + 1]
        begins, ends = (jnp.take_along_axis(cumulative_BxE, x, axis=1) for x in (of, of + 1))
        share = (place_BxX - low).astype(jnp.float32) / (high - low).astype(jnp.float32)
        return begins * (1 - share) + ends * share

    lower, upper = (
        at(jnp.searchsorted(prior.pool_N, reward_BxX, side=side).astype(jnp.int32))
        for side in ("left", "right")
    )
    return lower, jnp.maximum(upper - lower, 0.0)


def f0_and_mass(
    prior: Prior, row_B: ArrayLike, reward_BxX: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Reads the head's distribution at rewards.

    Args:
      prior: of P prompts.
      row_B: int32, the row of each response's prompt.
      reward_BxX: X rewards of each.

    Returns:
      (F0, g0), float32 [B, X]: the mass below each reward, and of those equal to it, which is 0
      where the pool has no equal.
    """
    return _f0(prior, jnp.asarray(row_B), jnp.asarray(reward_BxX, jnp.float32))


def concentration(cumulative_PxE: ArrayLike, counts_PxK: ArrayLike) -> float:
    """Fits c by the likelihood of how many samples of held-out prompts lie below each edge.

    With F below an edge drawn from Beta(c F0, c (1 - F0)), as under the Dirichlet process, the
    number below it of m samples is beta-binomial. The log-likelihoods of all inner edges and
    prompts are added up, a composite likelihood (Lindsay, 1988), and maximised over log c.

    Args:
      cumulative_PxE: F0 at the edges, of heads that have not learned from the prompt's samples.
      counts_PxK: samples of each prompt in each bin. A prompt with fewer than 2 says nothing.

    Returns:
      c, within ``CONCENTRATIONS``.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import betaln

    f0 = np.clip(np.asarray(cumulative_PxE, np.float64)[:, 1:-1], 1e-6, 1 - 1e-6)
    counts = np.asarray(counts_PxK, np.float64)
    m = counts.sum(axis=1, keepdims=True)
    below = np.cumsum(counts, axis=1)[:, :-1]

    def nats(log_c: float) -> float:
        c = np.exp(log_c)
        a, b = c * f0, c * (1 - f0)
        return -float(np.sum(betaln(a + below, b + m - below) - betaln(a, b)))

    bounds = tuple(np.log(CONCENTRATIONS))
    return float(np.exp(minimize_scalar(nats, bounds=bounds, method="bounded").x))
