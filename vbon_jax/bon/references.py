"""The reference rewards of all prompts, and the estimated density of best-of-n at given responses.

Training, evaluation and best-of-n share this definition: ranks under the chosen rule for ties, then
the chosen estimator.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vbon_jax.bon import amortised, exponential
from vbon_jax.bon import log_f as lf
from vbon_jax.bon.checks import check_choice


class References(NamedTuple):
    """m reference rewards of each of P prompts.

    Attributes:
      rewards_PxM: float32, each row ascending. Rows may be padded with +inf at the end; only the
        first m rewards count.
      order_PxM: uint32 keys of the responses in the total order that breaks ties, in the same
        column order as rewards_PxM; None if ties are broken at random.
      fit: fitted curves of the ``exponential`` estimator; None for every other estimator.
      m: int32, the number of rewards that count: a scalar, or [P] where prompts differ.
      prior: what a head says of each prompt beside its rewards, of which there may then be none
        (m = 0, a row of +inf); None without one.
    """

    rewards_PxM: jax.Array
    order_PxM: jax.Array | None
    fit: exponential.ExponentialFit | None
    m: jax.Array
    prior: amortised.Prior | None = None

    def m_at(self, row_B: ArrayLike) -> jax.Array:
        """The number of rewards that count in rows: a scalar, or of their shape."""
        return self.m if jnp.ndim(self.m) == 0 else self.m[row_B]


class Counts(NamedTuple):
    """What k, e and m of ``bon.log_f`` are: whole numbers, or real ones with a prior.

    Attributes:
      below: k, [B] or [B, X].
      equal: e, likewise.
      m: a scalar, or [B] or [B, 1].
    """

    below: jax.Array
    equal: jax.Array
    m: jax.Array


class Density(NamedTuple):
    """The estimated density of best-of-n at B responses, float32 [B], in nats.

    Attributes:
      log_ratio_B: log(pi_bon / pi_ref).
      log_f_B: log F; None for the ``interval`` estimator, which does not use it.
      log_mass_B: log g.
      log_up_to_B: log P_ref(r(y') <= r(y)), smoothed: log((k + e + 1) / (m + 1)).
    """

    log_ratio_B: jax.Array
    log_f_B: jax.Array | None
    log_mass_B: jax.Array
    log_up_to_B: jax.Array


def references(
    rewards_PxM: np.ndarray,
    estimator: str,
    order_PxM: np.ndarray | None = None,
    m_P: np.ndarray | None = None,
    prior: amortised.Prior | None = None,
) -> References:
    """Sorts reference rewards and, for the ``exponential`` estimator, fits its curves.

    Args:
      rewards_PxM: finite rewards of P prompts, in any order.
      estimator: one of ``bon.log_f.ESTIMATORS``.
      order_PxM: uint32 keys of the responses, from ``bon.log_f.response_order``, if ties are broken
        by a total order; None if they are broken at random.
      m_P: how many rewards of each prompt count, where rows are padded with +inf at the end; None
        if all do. Without a prior each has at least one.
      prior: of the same prompts; None for none.

    Returns:
      The table that ``density`` looks rewards up in.

    Raises:
      ValueError: if the estimator is unknown, or shapes differ, ``exponential`` is to fit rows that
        are padded, or a prior comes with it or with a total order, or a row without a prior is
        empty.
    """
    check_choice("estimator", estimator, lf.ESTIMATORS)
    if m_P is not None and estimator == "exponential":
        raise ValueError("estimator 'exponential' fits rows of one length, got m_P")
    if prior is not None and (estimator == "exponential" or order_PxM is not None):
        raise ValueError(
            f"a prior goes with ties at random and an estimator of ranks, got estimator="
            f"{estimator!r}" + ("" if order_PxM is None else " and order_PxM")
        )
    if prior is None and m_P is not None and not np.all(np.asarray(m_P) >= 1):
        raise ValueError("m_P has a prompt without a reward: give at least one, or a prior")
    rewards = np.asarray(rewards_PxM, np.float32)
    if order_PxM is None:
        rewards, order = np.sort(rewards, axis=1), None
    else:
        if np.shape(order_PxM) != rewards.shape:
            raise ValueError(
                f"order_PxM must have the rewards' shape {rewards.shape}, got {np.shape(order_PxM)}"
            )
        columns = np.lexsort((order_PxM, rewards), axis=1)
        rewards = np.take_along_axis(rewards, columns, axis=1)
        order = jnp.asarray(np.take_along_axis(np.asarray(order_PxM, np.uint32), columns, axis=1))
    fit = exponential.fit(rewards) if estimator == "exponential" else None
    m = jnp.int32(rewards.shape[1]) if m_P is None else jnp.asarray(m_P, jnp.int32)
    return References(jnp.asarray(rewards), order, fit, m, prior)


def ranks(
    table: References, row_B: ArrayLike, reward_B: ArrayLike, order_B: ArrayLike | None
) -> tuple[jax.Array, jax.Array]:
    """Counts the reference samples below, and equal to, responses with the given rewards.

    Args:
      table: the reference rewards, from ``references``.
      row_B: as of ``density``.
      reward_B: as of ``density``.
      order_B: as of ``density``.

    Returns:
      (num_below_B, num_equal_B), int32.

    Raises:
      ValueError: if the table breaks ties by order and order_B is None.
    """
    row_B, reward_B = jnp.asarray(row_B), jnp.asarray(reward_B)
    rewards_BxM = table.rewards_PxM[row_B]
    if table.order_PxM is None:
        below, equal = lf.reference_ranks(rewards_BxM, reward_B[:, None])
    else:
        if order_B is None:
            raise ValueError("the table breaks ties by order: order_B is needed, got None")
        below, equal = lf.ordered_ranks(
            rewards_BxM, table.order_PxM[row_B], reward_B[:, None], jnp.asarray(order_B)[:, None]
        )
    m = table.m_at(row_B)
    below = jnp.minimum(below[:, 0], m)  # a reward of +inf meets the padding
    return below, jnp.minimum(equal[:, 0], m - below)


def counts(
    table: References, row_B: ArrayLike, reward_B: ArrayLike, order_B: ArrayLike | None
) -> Counts:
    """Counts as ``ranks``, with what the prior adds: c F0, c g0 and c samples of its own.

    Args:
      table: as of ``ranks``.
      row_B: as of ``density``.
      reward_B: as of ``density``.
      order_B: as of ``density``.

    Returns:
      The counts that the estimators of ``bon.log_f`` take, [B].

    Raises:
      ValueError: as ``ranks`` does.
    """
    below, equal = ranks(table, row_B, reward_B, order_B)
    found = Counts(below, equal, table.m_at(row_B))
    if table.prior is None:
        return found
    f0, mass = amortised.f0_and_mass(table.prior, row_B, jnp.asarray(reward_B)[:, None])
    return _with_prior(found, table.prior, f0[:, 0], mass[:, 0])


def prefix_counts(table: References, row_B: ArrayLike, reward_BxX: ArrayLike) -> Counts:
    """Counts as ``counts``, at X rewards of each row and with ties at random: [B, X].

    Args:
      table: as of ``ranks``.
      row_B: as of ``density``.
      reward_BxX: rewards.
    """
    below, equal = lf.reference_ranks(table.rewards_PxM[row_B], reward_BxX)
    m = table.m_at(row_B)
    found = Counts(below, equal, m if m.ndim == 0 else m[:, None])
    if table.prior is None:
        return found
    own = jnp.minimum(found.below, found.m)  # a reward of +inf would meet the padding
    found = found._replace(below=own, equal=jnp.minimum(found.equal, found.m - own))
    return _with_prior(found, table.prior, *amortised.f0_and_mass(table.prior, row_B, reward_BxX))


def _with_prior(found: Counts, prior: amortised.Prior, f0: jax.Array, mass: jax.Array) -> Counts:
    c = prior.concentration
    return Counts(found.below + c * f0, found.equal + c * mass, found.m + c)


def density(
    table: References,
    row_B: ArrayLike,
    reward_B: ArrayLike,
    order_B: ArrayLike | None,
    log_ref_B: ArrayLike,
    n: ArrayLike,
    *,
    estimator: str,
) -> Density:
    """Estimates the density of best-of-n at responses with the given rewards.

    Args:
      table: the reference rewards, from ``references``.
      row_B: int32, the row of ``table`` that belongs to the prompt of each response.
      reward_B: rewards of the responses.
      order_B: uint32 keys of the responses; needed if the table breaks ties by order, else ignored.
      log_ref_B: log pi_ref of the whole responses, in nats.
      n: the N of best-of-N, a real number >= 1, concrete or traced.
      estimator: the estimator that the table was made for.

    Returns:
      The density at each response.

    Raises:
      ValueError: if the estimator is unknown, the table lacks the fits that it needs, or order_B is
        needed and None.
    """
    row_B, reward_B, log_ref_B = map(jnp.asarray, (row_B, reward_B, log_ref_B))
    below, equal, m = counts(table, row_B, reward_B, order_B)
    log_f = None
    if estimator == "exponential":
        if table.fit is None:
            raise ValueError("estimator 'exponential' needs a table with its fits, got fit=None")
        log_f = exponential.log_f_with_fallback(
            table.fit.log_a_P[row_B], table.fit.b_P[row_B], table.fit.converged_P[row_B],
            reward_B, below, m,
        )  # fmt: skip
    elif estimator != "interval":
        log_f = lf.log_f(below, m, estimator)
    ties = "random" if table.order_PxM is None else "order"
    log_mass = lf.log_mass(ties, equal, m, log_ref_B)
    log_ratio = lf.log_ratio(estimator, below, equal, m, n, log_mass=log_mass, log_f=log_f)
    up_to = lf.log_f(below + equal, m, "smoothed")
    return Density(log_ratio, log_f, log_mass, up_to)
