"""The reference rewards of all prompts, and the density of best-of-n read off them.

One definition for training, evaluation and best-of-n itself: ranks under the chosen rule for ties,
then the chosen estimator.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vbon_jax.bon import exponential
from vbon_jax.bon import log_f as lf
from vbon_jax.bon.checks import check_choice


class References(NamedTuple):
    """m reference rewards of each of P prompts.

    rewards_PxM: float32, each row ascending. Rows may be padded with +inf at the end: m counts.
    order_PxM: uint32, the place of each response in the total order that breaks ties, in the
      columns of rewards_PxM; None where ties are broken at random.
    fit: the exponential curves; None for every other estimator.
    m: int32 scalar, the number of rewards that count.
    """

    rewards_PxM: jax.Array
    order_PxM: jax.Array | None
    fit: exponential.ExponentialFit | None
    m: jax.Array


class Density(NamedTuple):
    """Of each response, in nats, float32 [B]: log(pi_bon / pi_ref); log F, None for `interval`,
    which does without; log g; log P_ref(r(y') <= r(y)), smoothed as log((k + e + 1) / (m + 1))."""

    log_ratio_B: jax.Array
    log_f_B: jax.Array | None
    log_mass_B: jax.Array
    log_up_to_B: jax.Array


def references(
    rewards_PxM: np.ndarray, estimator: str, order_PxM: np.ndarray | None = None
) -> References:
    """Sorts the rewards (and their places in the order with them) and fits what there is to fit.

    Args:
      rewards_PxM: finite rewards in any order.
      estimator: one of ``log_f.ESTIMATORS``.
      order_PxM: uint32 places in the total order, for ties broken by it.

    Raises ValueError: unknown estimator, or shapes that differ.
    """
    check_choice("estimator", estimator, lf.ESTIMATORS)
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
    return References(jnp.asarray(rewards), order, fit, jnp.int32(rewards.shape[1]))


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
    """The estimated density of best-of-n at responses with these rewards.

    Args:
      row_B: int32, the row of ``table`` of each response's prompt.
      reward_B: their rewards.
      order_B: uint32 places in the total order; needed where the table has them.
      log_ref_B: log pi_ref of the whole response in nats.
      n: the N of best-of-N, a real number >= 1, concrete or traced.
      estimator: the one the table was made for.

    Raises ValueError: unknown estimator, or a table without what it needs.
    """
    row_B, reward_B, log_ref_B = map(jnp.asarray, (row_B, reward_B, log_ref_B))
    rewards_BxM = table.rewards_PxM[row_B]
    if table.order_PxM is None:
        ties = "random"
        below, equal = lf.reference_ranks(rewards_BxM, reward_B[:, None])
    else:
        ties = "order"
        if order_B is None:
            raise ValueError("the table breaks ties by order: order_B is needed, got None")
        below, equal = lf.ordered_ranks(
            rewards_BxM, table.order_PxM[row_B], reward_B[:, None], jnp.asarray(order_B)[:, None]
        )
    below = jnp.minimum(below[:, 0], table.m)  # a reward of +inf meets the padding
    equal = jnp.minimum(equal[:, 0], table.m - below)
    log_f = None
    if estimator == "exponential":
        if table.fit is None:
            raise ValueError("estimator 'exponential' needs a table with its fits, got fit=None")
        log_f = exponential.log_f_with_fallback(
            table.fit.log_a_P[row_B], table.fit.b_P[row_B], table.fit.converged_P[row_B],
            reward_B, below, table.m,
        )  # fmt: skip
    elif estimator != "interval":
        log_f = lf.log_f(below, table.m, estimator)
    log_mass = lf.log_mass(ties, equal, table.m, log_ref_B)
    log_ratio = lf.log_ratio(estimator, below, equal, table.m, n, log_mass=log_mass, log_f=log_f)
    up_to = lf.log_f(below + equal, table.m, "smoothed")
    return Density(log_ratio, log_f, log_mass, up_to)
