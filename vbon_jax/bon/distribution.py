"""The best-of-N distribution and the objectives derived from it.

Notation: F(y) = P_ref(r(y') < r(y)), with a strict inequality, and g(y) = P_ref(r(y') = r(y)), the
probability mass of y's tie group. If the reward is injective, or if ties are broken by a fixed
total order (which then also extends ``<`` in F), g(y) is pi_ref(y). ``log_f`` = log F and
``log_mass`` = log g are in nats.

    pi_bon(y) / pi_ref(y) = ((F + g)^n - F^n) / g                                          (1)

Proposition 1 and Appendix C of "Variational Best-of-N Alignment" (Amini et al., 2024), called the
vBoN paper below.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from vbon_jax.bon.checks import check_beta, check_choice, check_n

JEFFREYS = "jeffreys"
OBJECTIVES = ("exact", JEFFREYS, "lower_bound", "jensen_bound", "backward", "reward")

# Below this, u^2 is lost beside u in float32, and one term of the series is exact.
_TINY = 1e-6


def log1mexp(x: jax.Array) -> jax.Array:
    """Computes log(1 - exp(-x)) elementwise without loss of precision.

    Args:
      x: non-negative array of any shape.

    Returns:
      Array of the same shape; -inf at x = 0.
    """
    near = jnp.log(-jnp.expm1(-x))
    far = jnp.log1p(-jnp.exp(-x))
    return jnp.where(x < 0.6931472, near, far)


def _log_expm1_over(x: jax.Array) -> jax.Array:
    """Computes log((exp(x) - 1) / x) for x >= 0, elementwise; 0 at x = 0."""
    clipped = jnp.clip(x, _TINY, 1.0)
    middle = jnp.log(jnp.expm1(clipped) / clipped)
    large = jnp.maximum(x, 1.0)
    far = large + jnp.log1p(-jnp.exp(-large)) - jnp.log(large)
    return jnp.where(x < _TINY, x / 2, jnp.where(x > 1.0, far, middle))


def _log_softplus_over_exp(u: jax.Array) -> jax.Array:
    """Computes log(log(1 + u) / u) for 0 <= u <= 1, elementwise; 0 at u = 0."""
    clipped = jnp.maximum(u, _TINY)
    return jnp.where(u < _TINY, -u / 2, jnp.log(jnp.log1p(clipped) / clipped))


@jax.jit
def _log_bon_ratio(log_f: jax.Array, log_mass: jax.Array, n: jax.Array) -> jax.Array:
    log_g = jnp.minimum(log_mass, 0.0)
    # F <= 1 - g always holds for the true F; an estimate above it is noise.
    log_f = jnp.minimum(log_f, log1mexp(-log_g))
    neither = jnp.isneginf(log_f) & jnp.isneginf(log_g)
    d = jnp.where(neither, 0.0, log_g - log_f)

    # With d = log g - log F, log(F + g) = log F + softplus(d), so that (1) is
    #   (n - 1) log F + log n + log(softplus(d) / e^d) + log((e^x - 1) / x),  x = n softplus(d).
    # Nothing here subtracts log g again, so log g = -300 costs no digits.
    u = jnp.exp(jnp.minimum(d, 0.0))
    x = n * jnp.log1p(u)
    small_mass = (n - 1) * log_f + jnp.log(n) + _log_softplus_over_exp(u) + _log_expm1_over(x)
    # The mirror image for g > F, which stays finite at F = 0:
    #   (n - 1) log g + n softplus(-d) + log(1 - e^-x),  x = n softplus(d) >= n log 2.
    up = jnp.maximum(d, 0.0)
    softplus_down = jnp.log1p(jnp.exp(-up))
    large_mass = (
        (n - 1) * log_g + n * softplus_down + jnp.log1p(-jnp.exp(-n * (up + softplus_down)))
    )

    ratio = jnp.where(d > 0, large_mass, small_mass)
    ratio = jnp.where(n == 1, 0.0, ratio)
    return jnp.where(jnp.isnan(log_f) | jnp.isnan(log_g), jnp.nan, ratio)


def log_bon_ratio(log_f: ArrayLike, log_mass: ArrayLike, n: ArrayLike) -> jax.Array:
    """Computes log(pi_bon(y) / pi_ref(y)) of best-of-N by formula (1), elementwise.

    The cost does not depend on n. The result is finite wherever the true value is: log_f = -inf
    (F = 0) gives (n - 1) log g; as g goes to 0, even where exp(log_mass) underflows in float32, it
    tends to log n + (n - 1) log F; n = 1 gives exactly 0.

    Inputs that are impossible, and arise only by rounding or from an estimated F, are clipped to
    the nearest possible value: log_mass > 0 counts as 0, and F > 1 - g as F = 1 - g. NaN in log_f
    or log_mass propagates.

    Args:
      log_f: log F in nats, <= 0 or -inf, any shape.
      log_mass: log g in nats, <= 0; broadcasts with log_f.
      n: the N of best-of-N, a real number >= 1, concrete or traced; broadcasts with log_f.

    Returns:
      float32 array of the broadcast shape, in nats. It is not meant to be differentiated.

    Raises:
      ValueError: if a concrete n is below 1, NaN or infinite.
    """
    check_n(n)
    return _log_bon_ratio(
        jnp.asarray(log_f, jnp.float32),
        jnp.asarray(log_mass, jnp.float32),
        jnp.asarray(n, jnp.float32),
    )


def log_bon_prob(log_f: ArrayLike, log_ref: ArrayLike, n: ArrayLike) -> jax.Array:
    """Computes log pi_bon(y) for an injective reward, where g(y) = pi_ref(y).

    Eq. 4 of the vBoN paper.

    Args:
      log_f: log F in nats, any shape.
      log_ref: log pi_ref(y) in nats; broadcasts with log_f.
      n: the N of best-of-N, as in ``log_bon_ratio``.

    Returns:
      float32 array of the broadcast shape, in nats.

    Raises:
      ValueError: if a concrete n is below 1, NaN or infinite.
    """
    return jnp.asarray(log_ref, jnp.float32) + log_bon_ratio(log_f, log_ref, n)


def _need(objective: str, name: str, value: ArrayLike | None) -> ArrayLike:
    if value is None:
        raise ValueError(f"objective {objective!r} needs {name}, got {name}=None")
    return value


def _times_log_f(weight: jax.Array, log_f: ArrayLike) -> jax.Array:
    """Computes weight * log_f with 0 * -inf = 0 (at n = 1 F does not matter); NaN propagates."""
    log_f = jnp.asarray(log_f, jnp.float32)
    unweighted = (weight == 0) & ~jnp.isnan(log_f)
    return jnp.where(unweighted, 0.0, weight * log_f)


def sequence_reward(
    objective: str,
    *,
    n: ArrayLike | None = None,
    log_f: ArrayLike | None = None,
    log_mass: ArrayLike | None = None,
    log_ratio: ArrayLike | None = None,
    log_up_to: ArrayLike | None = None,
    reward: ArrayLike | None = None,
) -> jax.Array:
    """Computes the reward R(y) of a whole response under one of the objectives.

    Every objective has the form

        J = E_policy[R(y)] - kl_coefficient * KL(policy || ref) + entropy_coefficient * H(policy),

    whose other two weights are given by ``kl_coefficient`` and ``entropy_coefficient``. Each
    objective is divided by a constant c. That changes no optimum, and makes the scale of R
    comparable between objectives and between values of n:

    | objective      | c        | R(y)                     | KL      | H                      |
    |----------------|----------|--------------------------|---------|------------------------|
    | `exact`        | n        | log ratio (1) / n        | 1/n     | 0                      |
    | `jeffreys`     | n        | log ratio (1) / n        | 1/n     | 0                      |
    | `lower_bound`  | n        | (n-1) log F / n          | 1/n     | 0                      |
    | `jensen_bound` | n(n+1)/2 | (n-1) log F / (n+1)      | 1       | -(n+2)(n-1) / (n(n+1)) |
    | `backward`     | n - 1    | log P_ref(r(y') <= r(y)) | 1/(n-1) | 0                      |
    | `reward`       | 1        | r(y)                     | beta    | 0                      |

    In order: Eq. 5 of the vBoN paper; the same, to which the gradient of the forward KL is added
    elsewhere (``rl.replay.forward``), so that the two are Jeffreys' divergence; Eq. 8 with Theorem
    2, and Theorem 3 of that paper; the backward KL of BOND (Sessa et al., 2024) at a single n; Eq.
    1 of the vBoN paper. The bound of ``jensen_bound`` is L1 = gamma E[log F] - alpha H - beta KL
    with gamma = n(n-1)/2, alpha = (n+2)(n-1)/2 = beta - 1 and beta = n(n+1)/2. Its c is that beta,
    so that at n = 1 it agrees with the other objectives.

    Args:
      objective: one of ``OBJECTIVES``. Arguments that it does not use are ignored.
      n: the N of best-of-N; needed by all objectives but ``reward`` and ``backward``.
      log_f: log F in nats; used by ``lower_bound`` and ``jensen_bound``, and by ``exact`` if
        log_ratio is None. -inf gives -inf in the two bounds (unless n = 1): clip it or choose an
        estimator that is always finite.
      log_mass: log g in nats; used by ``exact`` if log_ratio is None.
      log_ratio: log(pi_bon / pi_ref) if it is computed already; ``exact`` prefers it to log_f and
        log_mass.
      log_up_to: log P_ref(r(y') <= r(y)) in nats; used by ``backward``.
      reward: r(y); used by ``reward``.

    Returns:
      float32 array of the inputs' broadcast shape. NaN in an input that is used propagates.

    Raises:
      ValueError: if the objective is unknown, an argument it needs is None, or a concrete n is
        below 1, NaN or infinite.
    """
    check_choice("objective", objective, OBJECTIVES)
    if objective == "reward":
        return jnp.asarray(_need(objective, "reward", reward), jnp.float32)
    if objective == "backward":
        return jnp.asarray(_need(objective, "log_up_to", log_up_to), jnp.float32)
    check_n(n)
    n_f32 = jnp.asarray(n, jnp.float32)
    if objective in ("exact", JEFFREYS):
        if log_ratio is None:
            log_ratio = log_bon_ratio(
                _need(objective, "log_f (or log_ratio)", log_f),
                _need(objective, "log_mass (or log_ratio)", log_mass),
                n_f32,
            )
        return jnp.asarray(log_ratio, jnp.float32) / n_f32
    log_f = _need(objective, "log_f", log_f)
    if objective == "lower_bound":
        return _times_log_f((n_f32 - 1) / n_f32, log_f)
    return _times_log_f((n_f32 - 1) / (n_f32 + 1), log_f)


def kl_coefficient(
    objective: str, n: ArrayLike | None = None, beta: ArrayLike | None = None
) -> jax.Array:
    """Returns the weight of KL(policy || ref) in an objective; see ``sequence_reward``.

    Args:
      objective: one of ``OBJECTIVES``.
      n: the N of best-of-N; needed by all objectives but ``reward``. Above 1 for ``backward``,
        whose weight at n = 1 is inf.
      beta: the weight itself, for ``reward`` only; 1 / (n - 1) is comparable to best-of-n.

    Returns:
      float32 scalar, or array of n's shape, >= 0.

    Raises:
      ValueError: if the objective is unknown, or n or beta is missing or invalid.
    """
    check_choice("objective", objective, OBJECTIVES)
    if objective == "reward":
        beta = _need(objective, "beta", beta)
        check_beta(beta)
        return jnp.asarray(beta, jnp.float32)
    check_n(n)
    n_f32 = jnp.asarray(n, jnp.float32)
    if objective == "backward":
        return 1 / (n_f32 - 1)
    return jnp.ones_like(n_f32) if objective == "jensen_bound" else 1 / n_f32


def entropy_coefficient(objective: str, n: ArrayLike | None = None) -> jax.Array:
    """Returns the weight of the entropy H(policy) in an objective; see ``sequence_reward``.

    It is 0 for all objectives but ``jensen_bound``, where it is -alpha / beta = -(n+2)(n-1) /
    (n(n+1)): that bound penalizes entropy (Theorem 3 of the vBoN paper).

    Args:
      objective: one of ``OBJECTIVES``.
      n: the N of best-of-N, needed by ``jensen_bound``.

    Returns:
      float32 scalar, or array of n's shape, in (-1, 0].

    Raises:
      ValueError: if the objective is unknown, or n is missing or invalid.
    """
    check_choice("objective", objective, OBJECTIVES)
    if objective != "jensen_bound":
        return jnp.zeros((), jnp.float32)
    check_n(n)
    n_f32 = jnp.asarray(n, jnp.float32)
    return -(n_f32 + 2) * (n_f32 - 1) / (n_f32 * (n_f32 + 1))
