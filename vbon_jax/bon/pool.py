"""Best-of-n computed from a stored pool of m reference samples a prompt, for every n <= m.

If n of the m samples are drawn without replacement, their best is the i-th smallest of the pool
with probability C(i-1, n-1) / C(m, n). Weighting the pool by these probabilities averages over all
C(m, n) subsets and is unbiased for every n <= m, so no new samples have to be drawn. Computed in
float64 NumPy on the host.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln, pdtrc, xlogy

POISSON_TAIL = 1e-6  # most probable that best-of-Poisson may want more samples than there are


def check_whole(n: Any, m: int, lowest: int = 1) -> None:
    """Raises ValueError unless n is a whole number in [lowest, m]."""
    if not (isinstance(n, int | float | np.number) and float(n).is_integer() and lowest <= n <= m):
        raise ValueError(
            f"n must be a whole number from {lowest} to m={m}, the number of samples in the pool "
            f"(n samples are drawn from it without replacement), got n={n!r}"
        )


def check_rewards(rewards_PxM: ArrayLike) -> np.ndarray:
    """Returns the rewards as an array; raises ValueError unless a matrix [P, M] without NaN."""
    rewards_PxM = np.asarray(rewards_PxM)
    if rewards_PxM.ndim != 2 or rewards_PxM.shape[1] == 0:
        raise ValueError(
            "rewards_PxM must be a matrix with one row a prompt and at least one sample in it, "
            f"got shape {rewards_PxM.shape}"
        )
    num_nan = int(np.isnan(rewards_PxM).sum())
    if num_nan:
        raise ValueError(
            f"rewards_PxM holds {num_nan} NaN among {rewards_PxM.size} rewards; a NaN has no rank, "
            "so find the responses that the reward cannot score"
        )
    return rewards_PxM


class TieGroups(NamedTuple):
    """Columns of the pool from worst to best, and the tie group [low, high) of each position."""

    column_PxM: np.ndarray
    low_PxM: np.ndarray
    high_PxM: np.ndarray


def tie_groups(rewards_PxM: np.ndarray, order_PxM: ArrayLike | None) -> TieGroups:
    """Sorts a pool and finds its groups of tied samples; arguments as of ``winner_weights``."""
    if order_PxM is None:
        keys = [rewards_PxM]
        column_PxM = np.argsort(rewards_PxM, axis=1)
    else:
        keys = [rewards_PxM, np.asarray(order_PxM)]
        if keys[1].shape != rewards_PxM.shape:
            raise ValueError(
                f"order_PxM must have one key a sample, shape {rewards_PxM.shape}, "
                f"got shape {keys[1].shape}"
            )
        column_PxM = np.lexsort((keys[1], keys[0]), axis=-1)
    begins_PxM = np.zeros(rewards_PxM.shape, bool)
    begins_PxM[:, 0] = True
    for key_PxM in keys:
        sorted_PxM = np.take_along_axis(key_PxM, column_PxM, axis=1)
        begins_PxM[:, 1:] |= sorted_PxM[:, 1:] != sorted_PxM[:, :-1]

    m = rewards_PxM.shape[1]
    place_M = np.arange(m)
    low_PxM = np.maximum.accumulate(np.where(begins_PxM, place_M, 0), axis=1)
    ends_PxM = np.concatenate([begins_PxM[:, 1:], np.ones((len(begins_PxM), 1), bool)], axis=1)
    ends_PxM = np.where(ends_PxM, place_M + 1, m)
    high_PxM = np.minimum.accumulate(ends_PxM[:, ::-1], axis=1)[:, ::-1]
    return TieGroups(column_PxM, low_PxM, high_PxM)


def order_weights(m: int, n: int) -> np.ndarray:
    """Computes the probability C(i-1, n-1) / C(m, n) that the i-th smallest of m is the best of n.

    Computed in log space from the largest down, w_m = n / m and w_{i-1} / w_i = (i - n) / (i - 1),
    so that no binomial coefficient overflows; relative errors are below 1e-12 at m = 10,000.

    Args:
      m: the number of samples in the pool.
      n: how many of them are drawn without replacement, a whole number in [1, m].

    Returns:
      float64 weights [m] for i = 1..m, ascending, 0 for i < n, with sum 1.

    Raises:
      ValueError: if n is not a whole number in [1, m].
    """
    check_whole(n, m)
    n = int(n)
    weights_M = np.zeros(m)
    i = np.arange(m, n, -1)  # the weights below the best, as far down as they are not 0
    log_steps = np.log1p(-(n - 1) / (i - 1))
    weights_M[n - 1 :] = (n / m) * np.exp(np.cumsum(np.append(0.0, log_steps)))[::-1]
    return weights_M


def all_order_weights(m: int) -> np.ndarray:
    """``order_weights(m, n)`` for n = 1..m, a row each: float64 [m, m]."""
    return np.stack([order_weights(m, n) for n in range(1, m + 1)])


def poisson_tail(m: int, rate: float) -> float:
    """The probability that best-of-Poisson of a rate draws more than m responses."""
    return float(pdtrc(m - 1, rate))


def poisson_order_weights(m: int, rate: float) -> np.ndarray:
    """Computes the probability that the i-th smallest of m wins best-of-Poisson.

    Best-of-Poisson (Khalaf et al., "Inference-time reward hacking in large language models", 2025)
    takes the best of n responses, n = 1 + k with k drawn from the Poisson distribution of the rate:
    the mixture sum_k e^-rate rate^k / k! of ``order_weights(m, k + 1)``, exact in the pool.

    Args:
      m: the number of samples in the pool.
      rate: the mean of k, so that 1 + rate responses are drawn on average; >= 0.

    Returns:
      float64 weights [m], ascending, with sum 1. What probability n > m has, at most
      `POISSON_TAIL`, is given to n = m.

    Raises:
      ValueError: if the rate is negative or not finite, or n > m is more probable than that.
    """
    if not (np.isfinite(rate) and rate >= 0):
        raise ValueError(f"rate must be finite and >= 0, the mean of n - 1, got rate={rate!r}")
    tail = poisson_tail(m, rate)
    if tail > POISSON_TAIL:
        raise ValueError(
            f"rate={rate:g} draws more than the pool's m={m} samples with probability {tail:.2g}, "
            f"more than {POISSON_TAIL:g}: give a lower rate or a larger pool"
        )
    k = np.arange(m)
    mass_N = np.exp(xlogy(k, rate) - rate - gammaln(k + 1))
    mass_N[-1] += tail
    return mass_N @ all_order_weights(m)


def winner_weights(
    rewards_PxM: ArrayLike, n: int, order_PxM: ArrayLike | None = None
) -> np.ndarray:
    """Computes each sample's probability to be the best of n drawn without replacement.

    Args:
      rewards_PxM: rewards of the pool, M samples of each of P prompts, in any order.
      n: the N of best-of-N, a whole number in [1, M].
      order_PxM: None breaks ties at random, so that tied samples have equal weights. Otherwise
        keys, as from ``bon.log_f.response_order``, of which the larger wins a tie; samples with
        equal rewards and equal keys are the same response and share their weight equally.

    Returns:
      float64 weights [P, M] in the order of the pool's columns; each row sums to 1.

    Raises:
      ValueError: if rewards_PxM is not a matrix or contains NaN (the message counts them),
        order_PxM has another shape, or n is not a whole number in [1, M].
    """
    rewards_PxM = check_rewards(rewards_PxM)
    weights_M = order_weights(rewards_PxM.shape[1], n)
    places = tie_groups(rewards_PxM, order_PxM)
    below_M = np.append(0.0, np.cumsum(weights_M))
    share_PxM = (below_M[places.high_PxM] - below_M[places.low_PxM]) / (
        places.high_PxM - places.low_PxM
    )
    weights_PxM = np.empty(rewards_PxM.shape)
    np.put_along_axis(weights_PxM, places.column_PxM, share_PxM, axis=1)
    return weights_PxM


def place_means(
    values_PxM: ArrayLike, rewards_PxM: ArrayLike, order_PxM: ArrayLike | None = None
) -> np.ndarray:
    """Computes a quantity at each place of the pool, from the worst sample to the best.

    Tied samples share the mean of their values, as any of them may be the one that is chosen. Its
    product with ``order_weights`` is the expectation of the quantity under best-of-n, that of
    ``best_mean`` and ``winner_weights``; one matrix product gives it for every n.

    Args:
      values_PxM: any finite quantity of each sample in the pool.
      rewards_PxM: rewards of the pool, M samples of each of P prompts, in any order.
      order_PxM: as of ``winner_weights``.

    Returns:
      float64 [P, M].

    Raises:
      ValueError: as ``winner_weights`` does, or if the two have different shapes.
    """
    rewards_PxM, values_PxM = check_rewards(rewards_PxM), np.asarray(values_PxM, np.float64)
    if values_PxM.shape != rewards_PxM.shape:
        raise ValueError(
            f"values_PxM must have one value a sample, shape {rewards_PxM.shape}, "
            f"got shape {values_PxM.shape}"
        )
    places = tie_groups(rewards_PxM, order_PxM)
    sorted_PxM = np.take_along_axis(values_PxM, places.column_PxM, axis=1)
    below_PxM = np.pad(np.cumsum(sorted_PxM, axis=1), ((0, 0), (1, 0)))
    sums_PxM = np.take_along_axis(below_PxM, places.high_PxM, axis=1) - np.take_along_axis(
        below_PxM, places.low_PxM, axis=1
    )
    size_PxM = places.high_PxM - places.low_PxM
    return np.where(size_PxM == 1, sorted_PxM, sums_PxM / size_PxM)  # untied: no rounding


def quantiles(
    rewards_PxM: ArrayLike, order_PxM: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the quantiles (low, high] that each sample's tie group takes up in its pool.

    low is the share of the pool below the sample, high - low that of its ties, itself counted: the
    F and g of the pool. The groups of a pool divide (0, 1] among them.

    Args:
      rewards_PxM: rewards of the pool, M samples of each of P prompts, in any order.
      order_PxM: as of ``winner_weights``; None ties all equal rewards.

    Returns:
      (low_PxM, high_PxM), float64, in the order of the pool's columns.

    Raises:
      ValueError: as ``winner_weights`` does.
    """
    rewards_PxM = check_rewards(rewards_PxM)
    places = tie_groups(rewards_PxM, order_PxM)
    bounds = []
    for place_PxM in (places.low_PxM, places.high_PxM):
        bound_PxM = np.empty(rewards_PxM.shape)
        np.put_along_axis(bound_PxM, places.column_PxM, place_PxM / rewards_PxM.shape[1], axis=1)
        bounds.append(bound_PxM)
    return bounds[0], bounds[1]


def best_mean(values_PxM: ArrayLike, weights_PxM: ArrayLike) -> np.ndarray:
    """Computes the expectation of a quantity under best-of-n, the weighted sum over the pool.

    Args:
      values_PxM: any quantity of each sample in the pool.
      weights_PxM: weights of the samples, from ``winner_weights``. A sample of weight 0 contributes
        nothing, even if its value is infinite.

    Returns:
      float64 means [P].

    Raises:
      ValueError: if the arguments are not matrices of the same shape.
    """
    values_PxM, weights_PxM = np.asarray(values_PxM, np.float64), np.asarray(weights_PxM)
    if values_PxM.ndim != 2 or values_PxM.shape != weights_PxM.shape:
        raise ValueError(
            "values_PxM and weights_PxM must be matrices of the same shape, one row a prompt, "
            f"got shapes {values_PxM.shape} and {weights_PxM.shape}"
        )
    won_PxM = weights_PxM != 0
    return np.multiply(values_PxM, weights_PxM, out=np.zeros(values_PxM.shape), where=won_PxM).sum(
        1
    )


def resample(rng: np.random.Generator, weights_PxM: ArrayLike, count: int) -> np.ndarray:
    """Draws ``count`` columns a prompt in proportion to their weights, by systematic resampling.

    Sample i comes floor(count w_i) or ceil(count w_i) times, count w_i in expectation: the noise of
    independent draws, as of ``sample_winners``, is left out.

    Args:
      rng: source of randomness, one number a prompt.
      weights_PxM: weights of the samples, from ``winner_weights``; each row sums to 1.
      count: columns drawn for each prompt.

    Returns:
      int64 column indices [P, count], ascending.
    """
    cumulative_PxM = np.cumsum(np.asarray(weights_PxM, np.float64), axis=1)
    prompts, m = cumulative_PxM.shape
    at_PxC = (np.arange(count) + rng.random((prompts, 1))) / count
    found = [np.searchsorted(row, at, side="right") for row, at in zip(cumulative_PxM, at_PxC)]
    return np.minimum(np.array(found, np.int64), m - 1)  # the sums may round to just below 1


def sample_winners(
    rng: np.random.Generator,
    rewards_PxM: ArrayLike,
    n: int,
    count: int,
    order: ArrayLike | None = None,
) -> np.ndarray:
    """Draws independent best-of-n winners from a pool, distributed as ``winner_weights``.

    Args:
      rng: source of randomness.
      rewards_PxM: rewards of the pool, M samples of each of P prompts.
      n: the N of best-of-N, a whole number in [1, M].
      count: number of winners to draw for each prompt, each the best of its own n samples.
      order: ``order_PxM`` of ``winner_weights``.

    Returns:
      int64 column indices [P, count] into rewards_PxM.

    Raises:
      ValueError: as ``winner_weights`` does, or if count is negative.
    """
    rewards_PxM = check_rewards(rewards_PxM)
    prompts, m = rewards_PxM.shape
    cumulative_M = np.cumsum(order_weights(m, n))
    places = tie_groups(rewards_PxM, order)
    place_PxC = np.searchsorted(cumulative_M, rng.random((prompts, count)), side="right")
    place_PxC = np.minimum(place_PxC, m - 1)  # the sum may round to just below 1
    low_PxC = np.take_along_axis(places.low_PxM, place_PxC, axis=1)
    high_PxC = np.take_along_axis(places.high_PxM, place_PxC, axis=1)
    place_PxC = rng.integers(low_PxC, high_PxC)  # any of those tied with it
    return np.take_along_axis(places.column_PxM, place_PxC, axis=1)


def sample_best_and_worst(
    rng: np.random.Generator, rewards_PxM: ArrayLike, n: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the best and the worst of n samples of a pool, ties broken at random.

    The n samples are drawn without replacement. These are the training pairs of BoNBoN (Gui et al.,
    2024).

    Args:
      rng: source of randomness.
      rewards_PxM: rewards of the pool, M samples of each of P prompts.
      n: how many samples are drawn, a whole number in [2, M].
      count: number of independent draws for each prompt.

    Returns:
      (best_PxC, worst_PxC), int64 column indices [P, count] into rewards_PxM. The two are never the
      same column.

    Raises:
      ValueError: if rewards_PxM is not a matrix or contains NaN (the message counts them), n is not
        a whole number in [2, M], or count is negative.
    """
    rewards_PxM = check_rewards(rewards_PxM)
    prompts, m = rewards_PxM.shape
    check_whole(n, m, lowest=2)
    best_PxC = np.empty((prompts, count), np.int64)
    worst_PxC = np.empty((prompts, count), np.int64)
    columns_PxM = np.broadcast_to(np.arange(m, dtype=np.int32), rewards_PxM.shape)
    for draw in range(count):
        drawn_PxN = rng.permuted(columns_PxM, axis=1)[:, : int(n)]
        drawn_rewards_PxN = np.take_along_axis(rewards_PxM, drawn_PxN, axis=1)
        # In random order, the first of the tied is any of them. The worst is looked for from the
        # other end, so that two tied samples are never both the first.
        best_P = drawn_rewards_PxN.argmax(axis=1)
        worst_P = int(n) - 1 - drawn_rewards_PxN[:, ::-1].argmin(axis=1)
        best_PxC[:, draw] = np.take_along_axis(drawn_PxN, best_P[:, None], axis=1)[:, 0]
        worst_PxC[:, draw] = np.take_along_axis(drawn_PxN, worst_P[:, None], axis=1)[:, 0]
    return best_PxC, worst_PxC
