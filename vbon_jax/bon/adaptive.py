"""How well m reference rewards tell the density of best-of-n, and so how many are enough."""

import numpy as np
from numpy.typing import ArrayLike

from vbon_jax.bon.checks import check_n

Z = 1.959964  # of a 95% interval


def half_width(rewards_PxM: ArrayLike, n: float) -> np.ndarray:
    """Computes half the width of the 95% band of log(pi_bon / pi_ref), where it matters for n.

    A reward that m samples tie with up to the fraction F, and below it up to G, has the density
    ratio (F^n - G^n) / (F - G), formula (1) of ``bon.distribution``. F and G are means of m draws:
    their variances and covariance are F (1 - F) / m, G (1 - G) / m and G (1 - F) / m, which the
    delta method carries to the ratio's logarithm. The result is the root mean square over
    best-of-n's own responses, each of which has the mass F^n - G^n. Above the best sample a mass of
    1 / (m + 1) is left for better rewards that none of the m has shown: without it a prompt whose
    first few samples tie would seem to be known.

    Without ties the mean of the variances tends to (n - 1) / m, whatever the rewards: then all
    prompts need the same m. Half of it is the expected KL(bon || its estimate) in nats.

    Args:
      rewards_PxM: m rewards of the reference for each of P prompts, in any order.
      n: of best-of-n, >= 1.

    Returns:
      float64 [P], nats.

    Raises:
      ValueError: if n is below 1.
    """
    check_n(n)
    rewards = np.asarray(rewards_PxM)
    m = rewards.shape[1]
    found = []
    for row in rewards:
        upto = np.cumsum(np.unique(row, return_counts=True)[1]) / (m + 1)
        below = np.concatenate([[0.0], upto[:-1]])
        mass, share = upto**n - below**n, upto - below
        with np.errstate(divide="ignore", invalid="ignore"):
            by_upto = n * upto ** (n - 1) / mass - 1 / share
            by_below = 1 / share - n * below ** (n - 1) / mass
        variance = by_upto**2 * upto * (1 - upto) + by_below**2 * below * (1 - below)
        variance += 2 * by_upto * by_below * below * (1 - upto)
        real = mass > 0  # far below best-of-n's responses a power of n is 0
        found.append(np.average(variance[real], weights=mass[real]) / m)
    return Z * np.sqrt(np.maximum(found, 0.0))
