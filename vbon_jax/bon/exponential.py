"""The `exponential` estimator of log F: a smooth curve through the estimates of each prompt.

    log F(r) = -a exp(-b r),  a, b > 0

fitted to the pairs (r_(i), log F_i) of a prompt's reference rewards by non-linear least squares
(Section 6 of "Variational Best-of-N Alignment"). Unlike the other estimators it depends on the
rewards themselves, not on their ranks alone, and goes on past the best reference reward.
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
    """The curves log F(r) = -exp(log_a - b r) of P prompts, in the units of their rewards.

    Attributes:
        log_a_P: float32; NaN where the fit did not converge.
        b_P: float32, > 0; NaN where the fit did not converge.
        converged_P: bool.
    """

    log_a_P: jax.Array
    b_P: jax.Array
    converged_P: jax.Array


def _fit_standardised(z_M: jax.Array, log_f_M: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Levenberg-Marquardt for one prompt: (log a, b, converged)."""
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
    """Fits log F(r) = -exp(log_a - b r) to each prompt's reference rewards, all prompts at once.

    The points are the reference rewards with the `smoothed` estimate at their rank: k counts the
    references strictly below, so tied rewards share one value. Least squares in float32 on rewards
    standardised per prompt, by Levenberg-Marquardt; then log_a and b are brought back to the
    rewards' units. A prompt has not converged if the solver did not, if b <= 0, if all its rewards
    are equal, or if anything is not finite (rows padded with +inf among them).

    Args:
        sorted_rewards_PxM: reference rewards of P prompts, each row ascending, M >= 1.

    Returns:
        ExponentialFit, with NaN in log_a_P and b_P where converged_P is False.

    Raises:
        ValueError: as `vbon_jax.bon.log_f.reference_ranks`, where values can be read.
    """
    below_PxM, _ = reference_ranks(sorted_rewards_PxM, sorted_rewards_PxM)
    return _fit(jnp.asarray(sorted_rewards_PxM, jnp.float32), below_PxM)


def exponential_log_f(log_a: ArrayLike, b: ArrayLike, rewards: ArrayLike) -> jax.Array:
    """log F(r) = -exp(log_a - b r), elementwise (Section 6 of the paper).

    Args:
        log_a: log a of the fit, any shape.
        b: b of the fit; broadcasts.
        rewards: r, in the units of the fitted rewards; broadcasts.

    Returns:
        float32 array of the broadcast shape, in nats, in [-1e30, 0]: the exponent is cut off at 69,
        which only rewards far below every reference reach. NaN where an argument is.
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
    """log F by the fitted curve where it converged, by `smoothed` elsewhere, elementwise.

    Args:
        fit_log_a, fit_b, converged: the fields of `ExponentialFit`, in a shape that broadcasts with
            rewards (one prompt a row: fit_log_a[:, None]).
        rewards: r of the responses, any shape.
        num_below: k of the same responses, integers in [0, m]; broadcasts.
        m: the number of reference rewards, >= 1, concrete or traced; broadcasts.

    Returns:
        float32 array of the broadcast shape, in nats, <= 0 and finite.

    Raises:
        ValueError: a concrete m below 1.
    """
    return jnp.where(
        jnp.asarray(converged),
        exponential_log_f(fit_log_a, fit_b, rewards),
        log_f(num_below, m, "smoothed"),
    )
