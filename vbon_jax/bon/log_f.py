"""Ranks among reference rewards, and the estimators of log F based on them.

A response y with reward r has k = #{reference rewards < r} (``num_below``) and e = #{reference
rewards = r} (``num_equal``) among the m rewards of reference samples of the same prompt.
F(y) = P_ref(r(y') < r(y)). Only ranks are used, so a strictly increasing transform of the rewards
changes no bit of the result. The exception is ``exponential``, which fits a curve to the rewards;
see ``bon.exponential``.

Ties may be broken at random, where g in formula (1) of ``bon.distribution`` is the mass of the tie
group, or by a fixed total order of responses that extends ``<`` (App. C of the vBoN paper), where
g = pi_ref(y). ``ordered_ranks`` ranks by such an order, given as the keys of ``response_order``;
``log_mass`` is log g in both cases.

k, e and m are whole numbers, or real ones where a prior stands for samples: see ``bon.amortised``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma
from jax.typing import ArrayLike

from vbon_jax.bon.checks import check_choice, check_m, check_n, is_readable
from vbon_jax.bon.distribution import log1mexp, log_bon_ratio

LOG_F_ESTIMATORS = ("smoothed", "strict", "harmonic")
ESTIMATORS = (*LOG_F_ESTIMATORS, "interval", "exponential")
TIES = ("random", "order")

# From this rank on, three terms of the digamma series are exact in float32.
_SERIES_FROM = 8


@jax.jit
def _reference_ranks(sorted_PxM: jax.Array, rewards_PxB: jax.Array) -> tuple[jax.Array, jax.Array]:
    def count(side: str) -> jax.Array:
        search = functools.partial(jnp.searchsorted, side=side)
        return jax.vmap(search)(sorted_PxM, rewards_PxB).astype(jnp.int32)

    below_PxB = count("left")
    return below_PxB, count("right") - below_PxB


def _check_rewards(name: str, rewards: ArrayLike) -> None:
    if not is_readable(rewards):
        return
    num_nan = int(np.isnan(np.asarray(rewards)).sum())
    if num_nan:
        raise ValueError(
            f"{name} holds {num_nan} NaN among {np.size(rewards)} rewards; a NaN has no rank, "
            "so find the responses that the reward cannot score"
        )


def _check_shapes(
    name: str, references_PxM: ArrayLike, other_name: str, rewards_PxB: ArrayLike
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape, other = np.shape(references_PxM), np.shape(rewards_PxB)
    if len(shape) != 2 or len(other) != 2 or shape[0] != other[0]:
        raise ValueError(
            f"{name} and {other_name} must be matrices with one row a prompt, "
            f"got shapes {shape} and {other}"
        )
    if shape[1] == 0:
        raise ValueError(
            f"{name} has m=0 reference rewards a prompt (shape {shape}); "
            "draw at least one reference sample"
        )
    return shape, other


def reference_ranks(
    sorted_rewards_PxM: ArrayLike, rewards_PxB: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Counts the reference rewards of the same prompt below, and equal to, each reward.

    Rewards are compared in float32. A prompt with fewer than M reference rewards may be padded with
    +inf at the end, as long as its own m is then passed to the estimators.

    Values are checked only where they can be read: not under tracing (jit, vmap), nor in an array
    with shards on other hosts. Check them before entering such code.

    Args:
      sorted_rewards_PxM: reference rewards of P prompts, each row ascending, M >= 1.
      rewards_PxB: the rewards to rank, B of each prompt.

    Returns:
      (num_below_PxB, num_equal_PxB), int32.

    Raises:
      ValueError: if shapes do not fit, M is 0, a reward is NaN (the message counts them), or a row
        of reference rewards is not ascending.
    """
    shape, _ = _check_shapes("sorted_rewards_PxM", sorted_rewards_PxM, "rewards_PxB", rewards_PxB)
    _check_rewards("sorted_rewards_PxM", sorted_rewards_PxM)
    _check_rewards("rewards_PxB", rewards_PxB)
    if is_readable(sorted_rewards_PxM):
        references = np.asarray(sorted_rewards_PxM)
        unsorted = (references[:, 1:] < references[:, :-1]).any(axis=1)
        if unsorted.any():
            raise ValueError(
                f"sorted_rewards_PxM must be ascending in each row, but {int(unsorted.sum())} of "
                f"{shape[0]} rows are not, the first of them row {int(unsorted.argmax())}; "
                "sort along the last axis"
            )
    return _reference_ranks(
        jnp.asarray(sorted_rewards_PxM, jnp.float32), jnp.asarray(rewards_PxB, jnp.float32)
    )


@jax.jit
def _ordered_ranks(
    rewards_PxM: jax.Array, order_PxM: jax.Array, reward_PxB: jax.Array, order_PxB: jax.Array
) -> tuple[jax.Array, jax.Array]:
    rewards_Px1xM, order_Px1xM = rewards_PxM[:, None], order_PxM[:, None]
    reward_PxBx1, order_PxBx1 = reward_PxB[..., None], order_PxB[..., None]
    tied = rewards_Px1xM == reward_PxBx1
    below = (rewards_Px1xM < reward_PxBx1) | (tied & (order_Px1xM < order_PxBx1))
    equal = tied & (order_Px1xM == order_PxBx1)
    return below.sum(axis=-1, dtype=jnp.int32), equal.sum(axis=-1, dtype=jnp.int32)


def _order_keys(name: str, order: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    if np.shape(order) != shape:
        raise ValueError(
            f"{name} must have one key a reward, shape {shape}, got shape {np.shape(order)}"
        )
    dtype = order.dtype if hasattr(order, "dtype") else np.asarray(order).dtype
    if dtype != np.uint32:
        raise ValueError(f"{name} must be uint32 (see response_order), got dtype {dtype}")
    return jnp.asarray(order)


def ordered_ranks(
    rewards_PxM: ArrayLike, order_PxM: ArrayLike, reward_PxB: ArrayLike, order_PxB: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Counts the reference rewards below and equal, ties broken by a total order.

    This is ``reference_ranks`` for the rule of App. C of the vBoN paper.

    A reference response y' is below y if r' < r, or if r' = r and order' < order. It is equal if
    both are equal, in which case y' is y, except for a collision of keys. The reference rewards
    need not be sorted: each is compared with each reward. Rewards are compared in float32; values
    are checked only where they can be read, as in ``reference_ranks``.

    Args:
      rewards_PxM: reference rewards of P prompts, M >= 1; +inf may pad a row as in
        ``reference_ranks``.
      order_PxM: uint32 keys of the reference responses, from ``response_order``.
      reward_PxB: the rewards to rank, B of each prompt.
      order_PxB: uint32 keys of their responses.

    Returns:
      (num_below_PxB, num_equal_PxB), int32.

    Raises:
      ValueError: if shapes do not fit, M is 0, a reward is NaN (the message counts them), or the
        keys are not uint32.
    """
    shape, other = _check_shapes("rewards_PxM", rewards_PxM, "reward_PxB", reward_PxB)
    _check_rewards("rewards_PxM", rewards_PxM)
    _check_rewards("reward_PxB", reward_PxB)
    return _ordered_ranks(
        jnp.asarray(rewards_PxM, jnp.float32),
        _order_keys("order_PxM", order_PxM, shape),
        jnp.asarray(reward_PxB, jnp.float32),
        _order_keys("order_PxB", order_PxB, other),
    )


def _mix(x: jax.Array) -> jax.Array:
    """Applies MurmurHash3's finalizer, a bijection in which every bit depends on every bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def _response_order(tokens_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    place_BxT = jnp.cumsum(mask_BxT, axis=-1, dtype=jnp.uint32)
    # Mixed once each before they meet: a small token id and a place must not stand in for another.
    hash_BxT = _mix(_mix(tokens_BxT + jnp.uint32(0x9E3779B9)) + _mix(place_BxT))
    return _mix(jnp.sum(jnp.where(mask_BxT, hash_BxT, 0), axis=-1, dtype=jnp.uint32))


def response_order(tokens_BxT: ArrayLike, mask_BxT: ArrayLike) -> jax.Array:
    """Computes a key for each response, a fixed total order by which ties of the reward are broken.

    The key is a well-mixed 32-bit hash of the tokens inside the mask and their positions, so it is
    the same in every process and does not depend on padding. The order is unrelated to quality. Two
    given responses share a key with probability 2^-32; they then count as one response.

    Args:
      tokens_BxT: integer token ids of B responses.
      mask_BxT: True (or 1) for the tokens of the response; same shape.

    Returns:
      uint32 keys [B].

    Raises:
      ValueError: if shapes differ or are not two-dimensional, or the tokens are not integers.
    """
    shape, other = np.shape(tokens_BxT), np.shape(mask_BxT)
    if len(shape) != 2 or shape != other:
        raise ValueError(
            "tokens_BxT and mask_BxT must be matrices of the same shape, one row a response, "
            f"got shapes {shape} and {other}"
        )
    tokens_BxT = jnp.asarray(tokens_BxT)
    if not jnp.issubdtype(tokens_BxT.dtype, jnp.integer):
        raise ValueError(f"tokens_BxT must be integer token ids, got dtype {tokens_BxT.dtype}")
    return _response_order(tokens_BxT.astype(jnp.uint32), jnp.asarray(mask_BxT).astype(bool))


def _log_fraction(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes log(a / b) for counts 0 <= a <= b, precise even for a close to b."""
    fraction = a.astype(jnp.float32) / b.astype(jnp.float32)
    lacking = jnp.maximum(b - a, 0).astype(jnp.float32) / b.astype(jnp.float32)  # reals round
    return jnp.where(fraction < 0.5, jnp.log(fraction), jnp.log1p(-lacking))


def _harmonic(k: jax.Array, m: jax.Array) -> jax.Array:
    """Computes H_k - H_m; a difference of two digammas would lose precision for k close to m."""
    few = digamma(k.astype(jnp.float32) + 1) - digamma(m.astype(jnp.float32) + 1)
    # digamma(x + 1) = log y + 1 / (24 y^2) - 7 / (960 y^4) + ..., y = x + 1/2

    def series(x: jax.Array) -> jax.Array:
        z = 1 / jnp.square(jnp.maximum(x, _SERIES_FROM) + 0.5)
        return z * (1 / 24 - z * (7 / 960))

    many = _log_fraction(2 * k + 1, 2 * m + 1) + (series(k) - series(m))
    return jnp.where(k == m, 0.0, jnp.where(k < _SERIES_FROM, few, many))


@functools.partial(jax.jit, static_argnames="estimator")
def _log_f(k: jax.Array, m: jax.Array, estimator: str) -> jax.Array:
    if estimator == "smoothed":
        return _log_fraction(k + 1, m + 1)
    if estimator == "strict":
        return _log_fraction(k, m)
    return _harmonic(k, m)


def _counts(x: ArrayLike) -> jax.Array:
    """Counts of samples: int32, or float32 where some are those of a prior (``bon.amortised``)."""
    x = jnp.asarray(x)
    return x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)


def _rank_log_f(num_below: ArrayLike, m: ArrayLike, estimator: str) -> jax.Array:
    check_m(m)
    return _log_f(_counts(num_below), _counts(m), estimator)


def log_f(num_below: ArrayLike, m: ArrayLike, estimator: str) -> jax.Array:
    """Estimates log F from a rank, elementwise.

    With k = ``num_below``, the estimators are

    * ``smoothed``: log((k + 1) / (m + 1)), as in the code of the vBoN paper; never -inf.
    * ``strict``: log(k / m), Eq. 6 of the vBoN paper; -inf at k = 0.
    * ``harmonic``: digamma(k + 1) - digamma(m + 1) = H_k - H_m. Its expectation over the reference
      samples is -sum_{j=1..m} (1 - F)^j / j, the Taylor series of log F truncated after m terms, so
      its bias is only the remainder of that series; finite at k = 0.

    Args:
      num_below: k, integers in [0, m], any shape.
      m: the number of reference rewards, >= 1, concrete or traced; broadcasts with num_below.
      estimator: one of ``LOG_F_ESTIMATORS``.

    Returns:
      float32 array of the broadcast shape, in nats, <= 0.

    Raises:
      ValueError: if the estimator is unknown, or a concrete m is below 1.
    """
    check_choice("estimator", estimator, LOG_F_ESTIMATORS)
    return _rank_log_f(num_below, m, estimator)


def log_mass(ties: str, num_equal: ArrayLike, m: ArrayLike, log_ref: ArrayLike) -> jax.Array:
    """Estimates log g, the log mass of the responses that tie with y, elementwise.

    This is g of formula (1) in ``bon.distribution``. It depends on how ties are broken:

    * ``random``, uniformly at random: log max(pi_ref(y), e / m) with e = ``num_equal``. The tie
      group contains y itself and about e / m of the reference samples, so this tends to log g as m
      grows, and is still right where no reference sample was drawn from the group.
    * ``order``, by a fixed total order: log pi_ref(y). Ranks must then come from ``ordered_ranks``.

    Args:
      ties: one of ``TIES``.
      num_equal: e, integers in [0, m], any shape; its values are not used by ``order``.
      m: the number of reference rewards, >= 1, concrete or traced; broadcasts with num_equal.
      log_ref: log pi_ref(y) of the whole response, in nats; broadcasts with num_equal.

    Returns:
      float32 array of the broadcast shape, in nats.

    Raises:
      ValueError: if ties is unknown, or a concrete m is below 1.
    """
    check_choice("ties", ties, TIES)
    check_m(m)
    e, m = _counts(num_equal), _counts(m)
    log_ref = jnp.asarray(log_ref, jnp.float32)
    if ties == "order":
        return jnp.broadcast_to(log_ref, jnp.broadcast_shapes(e.shape, m.shape, log_ref.shape))
    return jnp.maximum(log_ref, _log_fraction(e, m))


@jax.jit
def _log_ratio_interval(k: jax.Array, e: jax.Array, m: jax.Array, n: jax.Array) -> jax.Array:
    upper = _log_fraction(k + e + 1, m + 1)
    log_mass = _log_fraction(e + 1, m + 1)
    # ((k+e+1)/k)^n = exp(x); x = inf at k = 0, where the lower end of the interval is 0.
    x = n * jnp.log1p((e + 1).astype(jnp.float32) / k.astype(jnp.float32))
    return jnp.where(n == 1, 0.0, n * upper + log1mexp(x) - log_mass)


def log_ratio_interval(
    num_below: ArrayLike, num_equal: ArrayLike, m: ArrayLike, n: ArrayLike
) -> jax.Array:
    """Estimates log(pi_bon / pi_ref) from a rank, elementwise, without log F or log pi_ref.

    The ``interval`` estimator is

        log[((k + e + 1) / (m + 1))^n - (k / (m + 1))^n] - log((e + 1) / (m + 1)),

    formula (1) of ``bon.distribution`` with y counted as one more sample of its own tie group: the
    density ratio averaged over the bin of its rank. The exponential of the estimate, averaged over
    which of the m + 1 exchangeable samples is y, is exactly 1, so the implied pi_bon is normalized
    under the reference. The estimate is at most min(log n, log(m + 1)) and at least -(n - 1) log(m
    + 1).

    Args:
      num_below: k, integers in [0, m], any shape.
      num_equal: e, integers with k + e <= m; broadcasts with num_below.
      m: the number of reference rewards, >= 1, concrete or traced; broadcasts with num_below.
      n: the N of best-of-N, a real number >= 1, concrete or traced; broadcasts with num_below.

    Returns:
      float32 array of the broadcast shape, in nats, always finite.

    Raises:
      ValueError: if a concrete m is below 1, or a concrete n is below 1, NaN or infinite.
    """
    check_m(m)
    check_n(n)
    return _log_ratio_interval(
        _counts(num_below), _counts(num_equal), _counts(m), jnp.asarray(n, jnp.float32)
    )


def log_ratio(
    estimator: str,
    num_below: ArrayLike,
    num_equal: ArrayLike,
    m: ArrayLike,
    n: ArrayLike,
    log_mass: ArrayLike | None = None,
    log_f: ArrayLike | None = None,
) -> jax.Array:
    """Estimates log(pi_bon / pi_ref) by any of the estimators, elementwise.

    ``interval`` estimates the ratio directly from the rank. The others estimate log F and insert it
    and log_mass into formula (1) of ``bon.distribution``. log F of ``exponential`` depends on the
    reward and not on its rank alone, so it must be computed beforehand.

    Args:
      estimator: one of ``ESTIMATORS``.
      num_below: k, integers in [0, m], any shape.
      num_equal: e, integers with k + e <= m; broadcasts with num_below.
      m: the number of reference rewards, >= 1, concrete or traced; broadcasts with num_below.
      n: the N of best-of-N, a real number >= 1, concrete or traced; broadcasts with num_below.
      log_mass: log g in nats, from the function ``log_mass``; needed by all estimators but
        ``interval``, which ignores it.
      log_f: log F in nats, from ``bon.exponential.log_f_with_fallback``; needed by ``exponential``,
        ignored by the others.

    Returns:
      float32 array of the broadcast shape, in nats.

    Raises:
      ValueError: if the estimator is unknown, log_mass or log_f is needed and None, or a concrete m
        or n is invalid.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    if estimator == "interval":
        return log_ratio_interval(num_below, num_equal, m, n)
    if log_mass is None:
        raise ValueError(f"estimator {estimator!r} needs log_mass, got log_mass=None")
    if estimator != "exponential":
        log_f = _rank_log_f(num_below, m, estimator)
    elif log_f is None:
        raise ValueError(
            "estimator 'exponential' needs log_f, got log_f=None; fit the curve and compute log F "
            "with vbon_jax.bon.exponential"
        )
    return log_bon_ratio(log_f, log_mass, n)
