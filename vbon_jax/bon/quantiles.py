"""Where along F, the quantile of a response's reward under the reference, best-of-n has its mass.

A response whose reward is above k of m reference rewards and ties with c of them is spread evenly
over F from k / m to (k + c) / m: inside a tie group best-of-n, like any policy seen through its
rewards, is as likely as the reference says. In float64 NumPy on the host.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import xlogy

from vbon_jax.bon import pool
from vbon_jax.bon.checks import check_n


class Parts(NamedTuple):
    """A distribution of responses divided by quantiles of F, of P prompts and Q bins.

    Attributes:
      share_PxQ: its probability in each bin; rows sum to 1.
      log_ratio_PxQ: what each bin adds to its mean of log(pi_bon / pi_ref), in nats.
    """

    share_PxQ: np.ndarray
    log_ratio_PxQ: np.ndarray


def overlaps(low: ArrayLike, high: ArrayLike, edges: ArrayLike) -> np.ndarray:
    """Computes which part of the span [low, high] lies in each bin.

    Args:
      low: where spans of F begin, any shape.
      high: where they end, above low.
      edges: of the Q bins, Q + 1 numbers ascending from 0 to 1.

    Returns:
      float64 of that shape and a last axis Q, whose sums are 1.
    """
    low, high = (np.asarray(x, np.float64)[..., None] for x in (low, high))
    edges = np.asarray(edges, np.float64)
    inside = np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1])
    return np.maximum(inside, 0) / (high - low)


def best_of_n(
    rewards_PxM: ArrayLike, n: float, edges: Sequence[float], order_PxM: ArrayLike | None = None
) -> Parts:
    """Computes the parts of best-of-n, by formula (1) of ``bon.distribution``.

    Without ties F is uniform under the reference and F^n the distribution function of best-of-n, so
    that every part is an exact integral and the rewards do not matter: their sum is KL(bon || ref)
    = log n - (n-1)/n, with no variance, where weighting a pool of m samples has the variance of m
    samples. Tied groups have the masses that the samples give them.

    Args:
      rewards_PxM: reference rewards, M of each of P prompts, in any order.
      n: the N of best-of-N, a real number >= 1.
      edges: as of ``overlaps``.
      order_PxM: keys that break ties; None breaks them at random.

    Returns:
      The parts; log_ratio_PxQ sums to KL(bon || ref).

    Raises:
      ValueError: if n is below 1, NaN or infinite.
    """
    check_n(n)
    groups = pool.tie_groups(np.asarray(rewards_PxM), order_PxM)
    group_low, group_high = groups.low_PxM, groups.high_PxM
    m = group_low.shape[1]
    places = np.arange(m + 1) / m  # the spans of single samples begin and end here
    size = group_high - group_low
    ratio = m * ((group_high / m) ** n - (group_low / m) ** n) / size  # over the group
    gain = xlogy(ratio, ratio)

    shares, log_ratios = [], []
    for low, high in itertools.pairwise(edges):
        at = np.clip(places, low, high)
        shares.append(np.where(size == 1, np.diff(at**n), ratio * np.diff(at)).sum(axis=1))
        inside = np.where(size == 1, np.diff(_integral(at, n)), gain * np.diff(at))
        log_ratios.append(inside.sum(axis=1))
    return Parts(np.stack(shares, axis=1), np.stack(log_ratios, axis=1))


def _integral(u: np.ndarray, n: float) -> np.ndarray:
    """The integral from 0 to u of n f^(n-1) log(n f^(n-1)) df."""
    power = u**n
    return power * (np.log(n) - (n - 1) / n) + (n - 1) * xlogy(power, u)
