"""The Pareto front of a trade-off, and who holds it (Figures 2 and 7 of the paper)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def front(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Which points are on the Pareto front where a smaller x and a larger y are better.

    A point is on the front unless another is at least as good in both and better in one, so equal
    points are on it together or not at all. O(N log N).

    Args:
      x: the cost [N], e.g. the KL to the reference in nats.
      y: the gain [N], e.g. the win rate.

    Returns:
      bool [N].

    Raises ValueError: the two differ in shape, are not vectors, or hold a NaN.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x {x.shape} and y {y.shape} must be two vectors of the same length")
    if np.isnan(x).any() or np.isnan(y).any():
        raise ValueError("x or y holds a NaN, which is on no side of a front; leave the point out")
    if not len(x):
        return np.zeros(0, dtype=bool)
    order = np.lexsort((-y, x))  # by x, and the largest y of equal x first
    ordered_x, ordered_y = x[order], y[order]
    first = np.flatnonzero(np.append(True, np.diff(ordered_x) > 0))
    group = np.repeat(first, np.diff(np.append(first, len(x))))  # where each point's x begins
    highest = np.maximum.accumulate(ordered_y)
    beats_smaller_x = (group == 0) | (ordered_y > highest[group - 1])
    on_front = np.empty(len(x), dtype=bool)
    on_front[order] = (ordered_y == ordered_y[group]) & beats_smaller_x
    return on_front


def shares(methods: Sequence[str], on_front: ArrayLike) -> dict[str, float]:
    """Each method's share of the points on the front; the shares add up to 1.

    Args:
      methods: the method of each point [N].
      on_front: bool [N], as `front` gives it.

    Returns:
      method -> share, in order of first appearance; 0 for a method with no point on the front.

    Raises ValueError: the lengths differ.
    """
    on_front = np.asarray(on_front, dtype=bool)
    if on_front.shape != (len(methods),):
        raise ValueError(f"{len(methods)} methods for on_front {on_front.shape}: one a point")
    total = max(int(on_front.sum()), 1)
    names = np.asarray(methods, dtype=object)
    return {name: float(on_front[names == name].sum() / total) for name in dict.fromkeys(methods)}


def shortfall(x: ArrayLike, y: ArrayLike, curve_x: ArrayLike, curve_y: ArrayLike) -> np.ndarray:
    """How far each point lies below a curve at its own x: curve(x) - y.

    Between its points the curve is straight.

    Args:
      x: of the points [N].
      y: of the points [N].
      curve_x: of the curve's points [K], in any order, K >= 1.
      curve_y: of the curve's points [K].

    Returns:
      float64 [N]; NaN where x is off the curve's range.

    Raises:
      ValueError: the curve has no point.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    curve_x, curve_y = np.asarray(curve_x, dtype=float), np.asarray(curve_y, dtype=float)
    if not len(curve_x):
        raise ValueError("the curve has no point to measure a shortfall from")
    order = np.argsort(curve_x, kind="stable")
    at = np.interp(x, curve_x[order], curve_y[order], left=np.nan, right=np.nan)
    return at - y
