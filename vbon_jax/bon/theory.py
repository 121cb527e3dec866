"""Theoretical values and bounds of best-of-N: KL divergence from the reference, and win rate.

Beirami et al., "Theoretical guarantees on the best-of-n alignment policy" (2024).
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from vbon_jax.bon.checks import check_n
from vbon_jax.bon.distribution import log1mexp


def kl_upper_bound(n: ArrayLike) -> jax.Array:
    """Computes log n - (n - 1) / n, an upper bound on KL(bon || ref) in nats.

    The bound is nearly attained if no single response has a large probability.

    Args:
      n: the N of best-of-N, a real number >= 1, concrete or traced, any shape.

    Returns:
      float32 array of n's shape, >= 0.

    Raises:
      ValueError: if a concrete n is below 1, NaN or infinite.
    """
    check_n(n)
    more = jnp.asarray(n, jnp.float32) - 1
    # Both terms start with `more`, so the sum may round below 0 next to n = 1.
    return jnp.maximum(jnp.log1p(more) - more / (more + 1), 0.0)


def kl_estimate(log_mass: ArrayLike, n: ArrayLike) -> jax.Array:
    """Estimates KL(bon || ref) from the winner's probability (Beirami et al., 2024).

    With e = pi_ref(y*), the estimate is

        (1-e)^n (log n + (n-1) log(1-e) - (n-1)/n) + (1-(1-e)^n) log((1-(1-e)^n) / e).

    It is evaluated from log e, so that it stays accurate where e underflows, and lies in [0,
    ``kl_upper_bound(n)``]. Average it over the winners of several draws of best-of-n.

    Args:
      log_mass: log e in nats, <= 0, any shape.
      n: the N of best-of-N, a real number >= 1, concrete or traced; broadcasts with log_mass.

    Returns:
      float32 array of the broadcast shape, in nats; NaN where log_mass is NaN.

    Raises:
      ValueError: if a concrete n is below 1, NaN or infinite.
    """
    check_n(n)
    n = jnp.asarray(n, jnp.float32)
    log_e = jnp.minimum(jnp.asarray(log_mass, jnp.float32), 0.0)
    log_rest = log1mexp(-log_e)  # log(1 - e)
    log_none = n * log_rest  # log of the probability that n draws all miss y*
    bound = kl_upper_bound(n)
    spread = jnp.exp(log_none) * jnp.where(log_none < -80, 0.0, bound + (n - 1) * log_rest)
    hit = -jnp.expm1(log_none)
    # Where `hit` underflows its logarithm is -inf, but the product has long been 0.
    peak = jnp.where(hit < 1e-30, 0.0, hit * (log1mexp(-log_none) - log_e))
    return jnp.clip(spread + peak, 0.0, bound)  # rounding only; the exact value is inside


def win_rate(n: ArrayLike) -> jax.Array:
    """Computes n / (n + 1), the win rate of best-of-n over the reference, a tie counting one half.

    It is exact for a continuous reward; with ties the true rate is smaller.

    Args:
      n: the N of best-of-N, a real number >= 1, concrete or traced, any shape.

    Returns:
      float32 array of n's shape, in [0.5, 1).

    Raises:
      ValueError: if a concrete n is below 1, NaN or infinite.
    """
    check_n(n)
    n = jnp.asarray(n, jnp.float32)
    return n / (n + 1)
