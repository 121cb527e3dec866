"""The two-sample Kolmogorov-Smirnov test, vectorized over prompts.

It tests whether two sets of rewards of one prompt come from the same distribution: Section 5 of the
vBoN paper compares m reference samples with all of them to see how many are enough. Computed in
float64 NumPy on the host. Ties are treated as in ``scipy.stats.ks_2samp``, whose p-values are
reproduced.
"""

import math

import numpy as np
from numpy.typing import ArrayLike

# Above this size SciPy's method="auto" leaves the exact distribution for the asymptotic one.
_MAX_EXACT = 10_000
# Values held at once while statistics are computed, and values of h in one lattice.
_BLOCK_VALUES = 1 << 20
_BLOCK_H = 128


def _rewards(name: str, rewards: ArrayLike) -> np.ndarray:
    rewards = np.asarray(rewards)
    if rewards.ndim != 2 or rewards.shape[1] == 0:
        raise ValueError(
            f"{name} must be a matrix with one row a prompt and at least one reward in it, "
            f"got shape {rewards.shape}"
        )
    num_nan = int(np.isnan(rewards).sum())
    if num_nan:
        raise ValueError(
            f"{name} holds {num_nan} NaN among {rewards.size} rewards; a NaN has no rank, so find "
            "the responses that the reward cannot score"
        )
    return rewards


def _steps(num_a: int, num_b: int) -> tuple[int, int]:
    """Returns how far one sample of a, and one of b, moves (F_a - F_b) * lcm(num_a, num_b)."""
    divisor = math.gcd(num_a, num_b)
    return num_b // divisor, num_a // divisor


def _scaled_statistic(a_PxM: np.ndarray, b_PxK: np.ndarray) -> np.ndarray:
    """Computes max |F_a - F_b| * lcm(M, K), an integer, of each row."""
    num_a = a_PxM.shape[1]
    step_a, step_b = _steps(num_a, b_PxK.shape[1])
    pooled_PxL = np.concatenate([np.sort(a_PxM, axis=1), np.sort(b_PxK, axis=1)], axis=1)
    # A stable sort of two ascending runs merges them.
    order_PxL = np.argsort(pooled_PxL, axis=1, kind="stable")
    walk_PxL = np.cumsum(np.where(order_PxL < num_a, step_a, -step_b), axis=1)
    np.abs(walk_PxL, out=walk_PxL)
    merged_PxL = np.take_along_axis(pooled_PxL, order_PxL, axis=1)
    # Inside a group of equal rewards the walk is nowhere: only its end counts.
    walk_PxL[:, :-1][merged_PxL[:, 1:] == merged_PxL[:, :-1]] = 0
    return walk_PxL.max(axis=1)


def _exact_p_values(h_H: np.ndarray, num_a: int, num_b: int) -> np.ndarray:
    """Computes P(statistic * lcm >= h) for two samples of one continuous distribution.

    All orders of the pooled sample are equally likely, and each is a lattice path from (0, 0) to
    (num_a, num_b). Let A(i, j) be the probability that a path to (i, j) has passed a point where
    |i step_a - j step_b| >= h. It is 1 at such a point and otherwise
    i/(i+j) A(i-1, j) + j/(i+j) A(i, j-1). Nothing is subtracted, so p-values of 1e-200 keep their
    precision. The recursion goes over the anti-diagonals i + j, for all h at once, within the
    widest band |i step_a - j step_b| < max h.
    """
    step_a, step_b = _steps(num_a, num_b)
    reach = int(h_H.max())
    width = 2 * reach // (step_a + step_b) + 3
    window_W = np.arange(width)
    h_Hx1 = h_H[:, None]

    def first_i(diagonal: int) -> int:
        return (diagonal * step_b - reach) // (step_a + step_b)

    # One column of ones on either side: whatever lies outside the window lies outside the band.
    last_HxW2 = np.ones((h_H.size, width + 2))
    first = first_i(0)
    last_HxW2[:, 1:-1] = np.abs(first + window_W) * (step_a + step_b) >= h_Hx1
    for diagonal in range(1, num_a + num_b + 1):
        shift = first_i(diagonal) - first
        first += shift
        i_W = first + window_W
        # Clipped where i or j is negative: no path comes from there, and weights stay weights.
        from_a_W = np.clip(i_W / diagonal, 0.0, 1.0)
        touched_HxW = last_HxW2[:, shift : shift + width] * from_a_W
        touched_HxW += last_HxW2[:, shift + 1 : shift + 1 + width] * (1 - from_a_W)
        touched_HxW[np.abs(i_W * step_a - (diagonal - i_W) * step_b) >= h_Hx1] = 1.0
        last_HxW2[:, 1:-1] = touched_HxW
    return last_HxW2[:, 1 + num_a - first]


def _p_values(h_P: np.ndarray, num_a: int, num_b: int) -> np.ndarray:
    h_H, row_P = np.unique(h_P, return_inverse=True)
    if max(num_a, num_b) > _MAX_EXACT:
        from scipy.stats import kstwo

        effective = np.round(num_a * num_b / (num_a + num_b))
        p_H = kstwo.sf(h_H / math.lcm(num_a, num_b), effective)
    else:
        # h ascends, so the values of one block have bands of about the same width.
        blocks = range(0, h_H.size, _BLOCK_H)
        p_H = np.concatenate([_exact_p_values(h_H[k : k + _BLOCK_H], num_a, num_b) for k in blocks])
    return np.clip(p_H, 0.0, 1.0)[row_P]


def ks_test(a_PxM: ArrayLike, b_PxK: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Performs a two-sided two-sample Kolmogorov-Smirnov test for each pair of rows.

    Equals ``scipy.stats.ks_2samp(a, b)`` with its default ``method="auto"``: the exact p-value if
    both samples have at most 10,000 values, else the asymptotic one (``scipy.stats.kstwo`` with MK
    / (M + K) rounded). The p-value depends on the statistic and the sizes alone, so it is computed
    once for each distinct statistic. One difference: where rounding lifts SciPy's exact value above
    1, SciPy warns and falls back to the asymptotic formula; here that value is 1.

    Args:
      a_PxM: M >= 1 rewards of each of P >= 1 prompts, in any order.
      b_PxK: K >= 1 rewards of the same prompts, in any order.

    Returns:
      (statistic_P, p_value_P), float64, both in [0, 1].

    Raises:
      ValueError: if the arguments are not matrices with the same number of rows, there are no
        prompts or no rewards, or a reward is NaN (the message counts them).
    """
    a_PxM, b_PxK = _rewards("a_PxM", a_PxM), _rewards("b_PxK", b_PxK)
    (prompts, num_a), (others, num_b) = a_PxM.shape, b_PxK.shape
    if prompts != others or prompts == 0:
        raise ValueError(
            "a_PxM and b_PxK must have one row for each of the same prompts (at least one), "
            f"got {prompts} and {others} rows"
        )
    rows = max(1, _BLOCK_VALUES // (num_a + num_b))
    h_P = np.concatenate(
        [
            _scaled_statistic(a_PxM[k : k + rows], b_PxK[k : k + rows])
            for k in range(0, prompts, rows)
        ]
    )
    return h_P / math.lcm(num_a, num_b), _p_values(h_P, num_a, num_b)
