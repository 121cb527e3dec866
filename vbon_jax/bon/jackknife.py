"""The estimated log ratio of best-of-n with its bias of order 1/m taken out, to measure with.

The ``interval`` estimator (``bon.log_f.log_ratio_interval``) is normalized under the reference,
which training wants, but its mean is too low by (n - 1) / (2m) nats wherever F is not near 0:
KL(policy || bon) comes out 0.035 too high at n = 8 and m = 100. Leaving out one reference sample at
a time tells that bias. What is left of it in KL(policy || bon), n = 8, in nats, exact by summing
over ranks (``harmonic`` and ``smoothed`` are the plug-in estimators of log F):

| policy, F continuous        | m   | interval | smoothed | harmonic | jackknife |
|-----------------------------|-----|----------|----------|----------|-----------|
| best-of-8 itself            | 32  |  0.105   | -0.015   |  0.000   |  0.0047   |
|                             | 100 |  0.034   | -0.005   |  0.000   |  0.0005   |
|                             | 200 |  0.017   | -0.003   |  0.000   |  0.0001   |
| 98% of it, 2% the reference | 32  |  0.099   | -0.026   | -0.004   |  0.0044   |
|                             | 100 |  0.033   | -0.009   | -0.001   |  0.0005   |
|                             | 200 |  0.016   | -0.005   | -0.001   |  0.0001   |
| the reference               | 32  | -0.200   | -0.566   | -0.212   | -0.0081   |
|                             | 100 | -0.066   | -0.224   | -0.069   | -0.0009   |
|                             | 200 | -0.033   | -0.124   | -0.035   | -0.0002   |

In float64 NumPy on the host: differences of close numbers are multiplied by m.
"""

import numpy as np
from numpy.typing import ArrayLike

from vbon_jax.bon.checks import check_n


def log_ratio(num_below: ArrayLike, num_equal: ArrayLike, m: int, n: float) -> np.ndarray:
    """Estimates log(pi_bon / pi_ref) from a rank: the jackknife of ``interval``, elementwise.

    With L(k, e, m) the ``interval`` estimate, it is m L(k, e, m) - (m - 1) times the mean of L over
    the m ways to leave one reference sample out, of which k were below and e equal.

    Args:
      num_below: k, integers in [0, m], any shape.
      num_equal: e, integers with k + e <= m; of the same shape.
      m: the number of reference rewards, >= 2.
      n: the N of best-of-N, a real number >= 1.

    Returns:
      float64 array of the same shape, in nats, always finite; unlike ``interval`` it may lie a
      little above log n.

    Raises:
      ValueError: if m is below 2, or n is below 1, NaN or infinite.
    """
    check_n(n)
    if m < 2:
        raise ValueError(f"m must be at least 2 reference rewards to leave one out, got m={m!r}")
    k, e = np.asarray(num_below, np.float64), np.asarray(num_equal, np.float64)
    whole = _interval(k, e, m, n)
    # Where there is none of a kind to leave out, its weight is 0 and any finite value does.
    without = (
        k * _interval(np.maximum(k - 1, 0), e, m - 1, n)
        + e * _interval(k, np.maximum(e - 1, 0), m - 1, n)
        + (m - k - e) * _interval(np.minimum(k, m - 1 - e), e, m - 1, n)
    )
    return m * whole - (m - 1) / m * without if n != 1 else np.zeros_like(whole)


def _interval(k: np.ndarray, e: np.ndarray, m: int, n: float) -> np.ndarray:
    """``log_f.log_ratio_interval`` in float64; k = -1 stands where k + e = m leaves nothing."""
    k = np.maximum(k, 0)
    shrinks = -np.expm1(n * (np.log(np.maximum(k, 1)) - np.log(k + e + 1)))
    at = np.where(k > 0, shrinks, 1.0)
    return n * np.log((k + e + 1) / (m + 1)) + np.log(at) - np.log((e + 1) / (m + 1))
