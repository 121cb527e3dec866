"""Where along F, the quantile of a response's reward under the reference, best-of-n has its mass.

A response whose reward is above k of m reference rewards and ties with c of them is spread evenly
over F from k / m to (k + c) / m: inside a tie group best-of-n, like any policy seen through its
rewards, is as likely as the reference says. In float64 NumPy on the host.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expi, xlogy

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
    return _parts(
        pool.tie_groups(np.asarray(rewards_PxM), order_PxM),
        edges,
        lambda u: u**n,
        lambda u: _integral(u, n),
    )


def best_of_poisson(
    rewards_PxM: ArrayLike,
    rate: float,
    edges: Sequence[float],
    order_PxM: ArrayLike | None = None,
) -> Parts:
    """Computes the parts of best-of-Poisson, the best of 1 + k responses, k ~ Poisson(rate).

    Its distribution function over F is E[F^(1+k)] = F e^(-rate (1 - F)) and its density
    (1 + rate F) e^(-rate (1 - F)) (Khalaf et al., 2025). Without ties KL(best-of-Poisson || ref) is

        log(1 + rate) - 1 + e^(-1 - rate) (Ei(1 + rate) - Ei(1)) / rate.

    Args:
      rewards_PxM: as of ``best_of_n``.
      rate: the mean of k, a real number > 0.
      edges: as of ``overlaps``.
      order_PxM: as of ``best_of_n``.

    Returns:
      The parts; log_ratio_PxQ sums to KL(best-of-Poisson || ref).

    Raises:
      ValueError: if the rate is not finite and above 0.
    """
    if not (np.isfinite(rate) and rate > 0):
        raise ValueError(f"rate must be finite and > 0, the mean of n - 1, got rate={rate!r}")

    def integral(u: np.ndarray) -> np.ndarray:
        """Of density times log density from 0 to u."""
        falls = np.exp(-rate * (1 - u))
        inner = u * falls * (np.log1p(rate * u) - rate * (1 - u) - 1)
        first = np.exp(-rate) * _scaled_ei(np.ones(()))
        return inner + (falls * _scaled_ei(1 + rate * u) - first) / rate

    groups = pool.tie_groups(np.asarray(rewards_PxM), order_PxM)
    return _parts(groups, edges, lambda u: u * np.exp(-rate * (1 - u)), integral)


def _scaled_ei(x: np.ndarray) -> np.ndarray:
    """e^-x Ei(x) for x >= 1; beyond 50, where Ei goes on to overflow, by its asymptotic series."""
    near, far = np.minimum(x, 50.0), np.maximum(x, 50.0)
    terms = [np.ones_like(far)]
    for k in range(1, 16):
        terms.append(terms[-1] * k / far)
    return np.where(x < 50, np.exp(-near) * expi(near), sum(terms) / far)


def _parts(
    groups: pool.TieGroups,
    edges: Sequence[float],
    cumulative: Callable[[np.ndarray], np.ndarray],
    integral: Callable[[np.ndarray], np.ndarray],
) -> Parts:
    """Parts of a choice by rank, of which both functions of F are given.

    ``cumulative`` is its distribution function, ``integral`` the integral from 0 of its density
    times the logarithm of that.
    """
    group_low, group_high = groups.low_PxM, groups.high_PxM
    m = group_low.shape[1]
    places = np.arange(m + 1) / m  # the spans of single samples begin and end here
    size = group_high - group_low
    ratio = m * (cumulative(group_high / m) - cumulative(group_low / m)) / size  # over the group
    gain = xlogy(ratio, ratio)

    shares, log_ratios = [], []
    for low, high in itertools.pairwise(edges):
        at = np.clip(places, low, high)
        shares.append(np.where(size == 1, np.diff(cumulative(at)), ratio * np.diff(at)).sum(axis=1))
        inside = np.where(size == 1, np.diff(integral(at)), gain * np.diff(at))
        log_ratios.append(inside.sum(axis=1))
    return Parts(np.stack(shares, axis=1), np.stack(log_ratios, axis=1))


def _integral(u: np.ndarray, n: float) -> np.ndarray:
    """The integral from 0 to u of n f^(n-1) log(n f^(n-1)) df."""
    power = u**n
    return power * (np.log(n) - (n - 1) / n) + (n - 1) * xlogy(power, u)
