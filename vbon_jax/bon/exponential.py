"""The ``exponential`` estimator of log F, a smooth curve fitted to the estimates of each prompt.

    log F(r) = -a exp(-b r),  a, b > 0

It is fitted to the pairs (r_(i), log F_i) of a prompt's reference rewards by non-linear least
squares (Section 6 of the vBoN paper). Unlike the other estimators it depends on the values of the
rewards and not only on their ranks, and it extrapolates beyond the largest reference reward.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from vbon_jax.bon.log_f import log_f, reference_ranks

# What float32 can tell apart; at 1e-6 the steps of some fits never get small enough.
_TOLERANCE = 1e-5
_MAX_STEPS = 100
# Standardised rewards seldom ask for more; its square still fits in float32, many times over.
_MAX_EXPONENT_IN_FIT = 30.0
# log F stays above -1e30, so that n times it is finite for every n in use.
_MAX_EXPONENT = 69.0


class ExponentialFit(NamedTuple):
    """Fitted curves log F(r) = -exp(log_a - b r) of P prompts, in the units of their rewards.

    Attributes:
      log_a_P: float32 [P]; NaN where the fit did not converge.
      b_P: float32 [P], > 0; NaN where the fit did not converge.
      converged_P: bool [P].
    """

    log_a_P: jax.Array
    b_P: jax.Array
    converged_P: jax.Array


def _fit_standardised(z_M: jax.Array, log_f_M: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fits one prompt by Levenberg-Marquardt; returns (log a, b, converged)."""
    import optimistix

    # The line through log(-log F) is the same curve with other weights; these weights are what
    # makes it nearly the least squares of log F, and a start close to the end.
    weight_M, line_M = jnp.square(log_f_M), jnp.log(-log_f_M)
    total = jnp.sum(weight_M)
    mean_z, mean_line = jnp.sum(weight_M * z_M) / total, jnp.sum(weight_M * line_M) / total
    spread = jnp.sum(weight_M * jnp.square(z_M - mean_z))
    b = -jnp.sum(weight_M * (z_M - mean_z) * (line_M - mean_line)) / spread

    def residuals(log_a_and_b: jax.Array, _: None) -> jax.Array:
        exponent_M = log_a_and_b[0] - log_a_and_b[1] * z_M
        return -jnp.exp(jnp.minimum(exponent_M, _MAX_EXPONENT_IN_FIT)) - log_f_M

    solution: Any = optimistix.least_squares(
        residuals,
        optimistix.LevenbergMarquardt(rtol=_TOLERANCE, atol=_TOLERANCE),
        jnp.stack([mean_line + b * mean_z, b]),
        max_steps=_MAX_STEPS,
        throw=False,
    )
    succeeded = solution.result == optimistix.RESULTS.successful
    return solution.value[0], solution.value[1], succeeded


@jax.jit
def _fit(sorted_PxM: jax.Array, below_PxM: jax.Array) -> ExponentialFit:
    m = sorted_PxM.shape[1]
    log_f_PxM = log_f(below_PxM, m, "smoothed")

    varied_P = jnp.isfinite(sorted_PxM).all(axis=1) & (sorted_PxM[:, 0] < sorted_PxM[:, -1])
    # A stand-in keeps the solver busy with numbers where there is nothing to fit.
    rewards_PxM = jnp.where(varied_P[:, None], sorted_PxM, jnp.linspace(0.0, 1.0, m))
    # By the range first: the squares of rewards may overflow or vanish where rewards do not.
    low_P, range_P = rewards_PxM[:, 0], rewards_PxM[:, -1] - rewards_PxM[:, 0]
    unit_PxM = (rewards_PxM - low_P[:, None]) / range_P[:, None]
    mean_P, deviation_P = unit_PxM.mean(axis=1), unit_PxM.std(axis=1)
    z_PxM = (unit_PxM - mean_P[:, None]) / deviation_P[:, None]
    log_a_P, b_P, solved_P = jax.vmap(_fit_standardised)(z_PxM, log_f_PxM)

    b_P = b_P / deviation_P  # per range of the prompt's rewards
    log_a_P = log_a_P + b_P * mean_P
    b_P = b_P / range_P  # per unit of reward
    log_a_P = log_a_P + b_P * low_P
    finite_P = jnp.isfinite(log_a_P) & jnp.isfinite(b_P)
    converged_P = varied_P & solved_P & finite_P & (b_P > 0)
    nan = jnp.float32(jnp.nan)
    return ExponentialFit(
        jnp.where(converged_P, log_a_P, nan), jnp.where(converged_P, b_P, nan), converged_P
    )


def fit(sorted_rewards_PxM: ArrayLike) -> ExponentialFit:
    """Fits log F(r) = -exp(log_a - b r) to the reference rewards of each prompt.

    The points are the reference rewards, each with the ``smoothed`` estimate of log F at its rank;
    the rank counts rewards strictly below, so tied rewards share one value. Rewards are
    standardized for each prompt, the least-squares problem is solved in float32 by
    Levenberg-Marquardt, and log_a and b are converted back to the rewards' units. A prompt counts
    as not converged if the solver did not converge, if b <= 0, if all its rewards are equal, or if
    anything is not finite (which includes rows padded with +inf).

    Args:
      sorted_rewards_PxM: reference rewards of P prompts, each row ascending, M >= 1.

    Returns:
      The fits, with NaN in log_a_P and b_P where converged_P is False.

    Raises:
      ValueError: as ``bon.log_f.reference_ranks`` does, where values can be read.
    """
    below_PxM, _ = reference_ranks(sorted_rewards_PxM, sorted_rewards_PxM)
    return _fit(jnp.asarray(sorted_rewards_PxM, jnp.float32), below_PxM)


def exponential_log_f(log_a: ArrayLike, b: ArrayLike, rewards: ArrayLike) -> jax.Array:
    """Evaluates fitted curves, log F(r) = -exp(log_a - b r), elementwise.

    Args:
      log_a: log a of the fit, any shape.
      b: b of the fit; broadcasts with log_a.
      rewards: r, in the units of the rewards of the fit; broadcasts with log_a.

    Returns:
      float32 array of the broadcast shape, in nats, in [-1e30, 0]: the exponent is clipped at 69,
      which only rewards far below every reference reward reach. NaN in an argument propagates.
    """
    exponent = jnp.asarray(log_a, jnp.float32) - jnp.asarray(b, jnp.float32) * jnp.asarray(
        rewards, jnp.float32
    )
    return -jnp.exp(jnp.minimum(exponent, _MAX_EXPONENT))


def log_f_with_fallback(
    fit_log_a: ArrayLike,
    fit_b: ArrayLike,
    converged: ArrayLike,
    rewards: ArrayLike,
    num_below: ArrayLike,
    m: ArrayLike,
) -> jax.Array:
    """Evaluates log F by the fitted curve where it converged, else by ``smoothed``, elementwise.

    Args:
      fit_log_a: ``log_a_P`` of an ``ExponentialFit``, in a shape that broadcasts with rewards; with
        one prompt a row, ``fit.log_a_P[:, None]``.
      fit_b: ``b_P`` of the same fit, in the same shape.
      converged: ``converged_P`` of the same fit, in the same shape.
      rewards: r of the responses, any shape.
      num_below: k of the same responses, integers in [0, m]; broadcasts with rewards.
      m: the number of reference rewards, >= 1, concrete or traced; broadcasts with rewards.

    Returns:
      float32 array of the broadcast shape, in nats, <= 0 and finite.

    Raises:
      ValueError: if a concrete m is below 1.
    """
    return jnp.where(
        jnp.asarray(converged),
        exponential_log_f(fit_log_a, fit_b, rewards),
        log_f(num_below, m, "smoothed"),
    )
