"""Simultaneous confidence bands for many means over the same prompts: pure functions of arrays.

The means of a curve, such as an evaluator's under best-of-n for every n, are taken over one set of
prompts, so their errors go together. A band that holds at all points at once follows from the
distribution of the largest error in standard errors,

    T = max_k |mean_k - truth_k| / se_k,    se_k = sd_k / sqrt(P),

and so do bands for the differences of all pairs of points. It is estimated by the bootstrap-t
(Efron; Hall, 1988, "Theoretical comparison of bootstrap confidence intervals"): prompts, the
independent units, are drawn with replacement, and each resample's errors are divided by its own
standard deviations, which accounts for skewed figures, to which a normal limit is too narrow.

Where only few prompts have another figure at one point than at another, as best-of-n at two
neighbouring n, their standard deviation is known badly and may come out far too small. So none is
taken for less than `FLOOR` times the largest, in the data and in the resamples alike: points
that hardly differ have bands wider than need be.

Even so, with skewed figures of 50 to 400 prompts, bands at the bootstrap's own level fall short of
it by up to one percent, measured in populations that are enumerated. So a fifth of the probability
of an error is kept back (`SPENT`).
"""

from typing import NamedTuple

import numpy as np

DRAWS = 2000  # of the bootstrap: a critical value near 3 is known to about 0.05
FLOOR = 0.3  # of the largest standard deviation
SPENT = 0.8  # of 1 - level
ROUNDING = 1e-12  # of the largest value


class Bands(NamedTuple):
    """Means over prompts and what is known of them, all points at once.

    Attributes:
      mean_K: the mean at each of K points.
      half_K: half the width of the simultaneous band of the means.
      difference_KxK: mean[j] - mean[k] in row j and column k; 0 where only rounding differs.
      difference_half_KxK: half the width of its band, simultaneous over all pairs: the two points
        may be chosen after seeing the means.
    """

    mean_K: np.ndarray
    half_K: np.ndarray
    difference_KxK: np.ndarray
    difference_half_KxK: np.ndarray


def simultaneous(
    values_PxK: np.ndarray, rng: np.random.Generator, level: float = 0.95, draws: int = DRAWS
) -> Bands:
    """Computes means over prompts with bands that hold at all points, and for all pairs, at once.

    Args:
      values_PxK: a figure of each prompt at each of K points, unbiased for what the prompt has
        there; prompts are independent, points of a prompt need not be.
      rng: source of the resamples.
      level: of the bands, in (0, 1).
      draws: of the bootstrap.

    Returns:
      The means and their bands.

    Raises:
      ValueError: for fewer than two prompts, which have no spread, values that are not finite, or a
        level out of range.
    """
    values_PxK = np.asarray(values_PxK, np.float64)
    if values_PxK.ndim != 2 or len(values_PxK) < 2:
        raise ValueError(
            f"values_PxK must be a matrix of at least 2 prompts, got shape {values_PxK.shape}"
        )
    if not np.isfinite(values_PxK).all():
        raise ValueError(f"{int((~np.isfinite(values_PxK)).sum())} of the values are not finite")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got level={level!r}")
    prompts, points = values_PxK.shape
    mean_K = values_PxK.mean(axis=0)
    deviation_PxK = values_PxK - mean_K
    share_DxP = rng.multinomial(prompts, np.full(prompts, 1 / prompts), draws) / prompts
    even_1xP = np.full((1, prompts), 1 / prompts)

    spread_K = _moments(even_1xP, deviation_PxK)[1][0]
    pair_spread_KxK = np.stack([
        _moments(even_1xP, deviation_PxK[:, k, None] - deviation_PxK)[1][0] for k in range(points)
    ])  # fmt: skip
    floor, pair_floor = FLOOR * spread_K.max(), FLOOR * pair_spread_KxK.max()

    largest_D = _largest(share_DxP, deviation_PxK, floor)
    pair_largest_D = np.zeros(draws)
    for k in range(points - 1):
        later_PxK = deviation_PxK[:, k, None] - deviation_PxK[:, k + 1 :]
        np.maximum(pair_largest_D, _largest(share_DxP, later_PxK, pair_floor), out=pair_largest_D)
    critical, pair_critical = (
        np.quantile(x, 1 - SPENT * (1 - level), method="higher") / np.sqrt(prompts)
        for x in (largest_D, pair_largest_D)
    )
    difference_KxK = mean_K[:, None] - mean_K
    rounding = ROUNDING * np.abs(values_PxK).max()
    return Bands(
        mean_K,
        critical * np.maximum(spread_K, floor),
        np.where(np.abs(difference_KxK) <= rounding, 0.0, difference_KxK),
        pair_critical * np.maximum(pair_spread_KxK, pair_floor),
    )


def _moments(share_DxP: np.ndarray, deviation_PxK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, [D, K] each, of samples in which prompts have these shares."""
    prompts = len(deviation_PxK)
    mean_DxK = share_DxP @ deviation_PxK
    variance_DxK = share_DxP @ np.square(deviation_PxK) - np.square(mean_DxK)
    return mean_DxK, np.sqrt(np.maximum(variance_DxK, 0) * prompts / (prompts - 1))


def _largest(share_DxP: np.ndarray, deviation_PxK: np.ndarray, floor: float) -> np.ndarray:
    """T of each resample, the largest |error| in standard errors; [D]."""
    if floor == 0:  # no prompt differs from another anywhere
        return np.zeros(len(share_DxP))
    error_DxK, spread_DxK = _moments(share_DxP, deviation_PxK)
    t_DxK = np.abs(error_DxK) / np.maximum(spread_DxK, floor)
    return np.sqrt(len(deviation_PxK)) * t_DxK.max(axis=1)
