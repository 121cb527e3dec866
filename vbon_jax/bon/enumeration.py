"""Exact best-of-N quantities where all S possible strings can be enumerated.

Computed in float64 NumPy on the host. These are the values that training is compared with, so they
share no code with the float32 formulas that they check.
"""

import numpy as np
from numpy.typing import ArrayLike

from vbon_jax.bon.checks import check_n

# float32 log-probabilities of some thousand strings add up to 1 within this.
_NORMALISED_WITHIN = 1e-3


def normalized(name: str, log_p_S: ArrayLike) -> np.ndarray:
    """Checks a distribution over all S strings.

    Args:
      name: of the argument, for the message.
      log_p_S: its log-probabilities, nats.

    Returns:
      The same, float64.

    Raises:
      ValueError: if it is not a vector, or does not add up to 1.
    """
    log_p_S = np.asarray(log_p_S, np.float64)
    if log_p_S.ndim != 1 or log_p_S.size == 0:
        raise ValueError(f"{name} must be a vector of log-probabilities, got shape {log_p_S.shape}")
    total = float(np.exp(log_p_S).sum())
    if not abs(total - 1) <= _NORMALISED_WITHIN:
        raise ValueError(f"{name} must hold every string's log-probability, but sums to {total}")
    return log_p_S


def _rewards(rewards_S: ArrayLike, size: int) -> np.ndarray:
    rewards_S = np.asarray(rewards_S)
    if rewards_S.shape != (size,):
        raise ValueError(
            f"rewards_S must have one reward a string, shape ({size},), got {rewards_S.shape}"
        )
    num_nan = int(np.isnan(rewards_S).sum())
    if num_nan:
        raise ValueError(f"rewards_S holds {num_nan} NaN among {size} rewards; a NaN has no rank")
    return rewards_S


def log_f_and_mass(log_ref_S: ArrayLike, rewards_S: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Computes exact log F and log g of every string.

    F(y) = P_ref(r(y') < r(y)); g(y) = P_ref(r(y') = r(y)) is the mass of all strings tied with y,
    which is pi_ref(y) if no two rewards are equal. For ties broken by a fixed total order (App. C
    of the vBoN paper), pass each string's rank in that order as its reward.

    Args:
      log_ref_S: log pi_ref of every string, in nats, normalized.
      rewards_S: rewards of the same strings.

    Returns:
      (log_f_S, log_mass_S), float64, in nats. log_f_S is -inf for the lowest reward.

    Raises:
      ValueError: if log_ref_S is not normalized, shapes differ, or a reward is NaN (the message
        counts them).
    """
    log_ref_S = normalized("log_ref_S", log_ref_S)
    _, group_S = np.unique(_rewards(rewards_S, log_ref_S.size), return_inverse=True)
    log_mass_G = np.full(group_S.max() + 1, -np.inf)
    np.logaddexp.at(log_mass_G, group_S, log_ref_S)
    log_upper_G = np.logaddexp.accumulate(log_mass_G)
    log_f_G = np.concatenate([[-np.inf], log_upper_G[:-1]])
    return log_f_G[group_S], log_mass_G[group_S]


def log_bon_ratio(log_f: np.ndarray, log_mass: np.ndarray, n: float) -> np.ndarray:
    """Computes log(pi_bon / pi_ref) by formula (1), ``bon.distribution.log_bon_ratio`` in float64.

    Args:
      log_f: log F, in nats; -inf for a lowest reward.
      log_mass: log g, in nats, finite.
      n: the N of best-of-N, a real number >= 1.

    Returns:
      float64, in nats, of the shape of the arguments.
    """
    x = n * np.logaddexp(0.0, log_mass - log_f)
    return n * np.logaddexp(log_f, log_mass) + np.log(-np.expm1(-x)) - log_mass


def log_bon(log_ref_S: ArrayLike, rewards_S: ArrayLike, n: float) -> np.ndarray:
    """Computes log pi_bon of every string by formula (1), ties broken uniformly at random.

    Formula (1) is that of ``bon.distribution``.

    Args:
      log_ref_S: log pi_ref of every string, in nats, normalized.
      rewards_S: rewards of the same strings.
      n: the N of best-of-N, a real number >= 1.

    Returns:
      float64 vector [S], in nats, normalized as well as log_ref_S is.

    Raises:
      ValueError: as ``log_f_and_mass`` does, or if n is below 1, NaN or infinite.
    """
    check_n(n)
    log_f_S, log_mass_S = log_f_and_mass(log_ref_S, rewards_S)
    # -inf - -inf belongs to a string that the reference never says: pi_bon = 0 there as well.
    possible_S = np.isfinite(log_mass_S)
    log_bon_S = np.full(log_f_S.shape, -np.inf)
    log_ratio = log_bon_ratio(log_f_S[possible_S], log_mass_S[possible_S], n)
    log_bon_S[possible_S] = np.asarray(log_ref_S, np.float64)[possible_S] + log_ratio
    return log_bon_S


def kl(log_p_S: ArrayLike, log_q_S: ArrayLike) -> float:
    """Computes KL(p || q) = sum_y p(y) (log p(y) - log q(y)).

    Args:
      log_p_S: log p of every string, in nats, normalized.
      log_q_S: log q of the same strings, in nats, normalized.

    Returns:
      The divergence in nats; inf if a string has p > 0 and q = 0.

    Raises:
      ValueError: if an argument is not normalized, or shapes differ.
    """
    log_p_S = normalized("log_p_S", log_p_S)
    log_q_S = normalized("log_q_S", log_q_S)
    if log_p_S.shape != log_q_S.shape:
        raise ValueError(
            f"log_p_S and log_q_S must list the same strings, got {log_p_S.size} and {log_q_S.size}"
        )
    said_S = log_p_S > -np.inf
    p_S = np.exp(log_p_S[said_S])
    return float(np.sum(p_S * (log_p_S[said_S] - log_q_S[said_S])))


def win_rate(log_p_S: ArrayLike, log_ref_S: ArrayLike, rewards_S: ArrayLike) -> float:
    """Computes the win rate of a distribution over the reference.

    The win rate is P(r(y) > r(y')) + P(r(y) = r(y')) / 2 with y drawn from p and y' from pi_ref.

    Args:
      log_p_S: log p of every string, in nats, normalized.
      log_ref_S: log pi_ref of the same strings, in nats, normalized.
      rewards_S: rewards of the same strings.

    Returns:
      The win rate in [0, 1], a tie counting one half.

    Raises:
      ValueError: if a distribution is not normalized, shapes differ, or a reward is NaN (the
        message counts them).
    """
    log_p_S = normalized("log_p_S", log_p_S)
    log_f_S, log_mass_S = log_f_and_mass(log_ref_S, rewards_S)
    if log_p_S.shape != log_f_S.shape:
        raise ValueError(
            f"log_p_S and log_ref_S must list the same strings, got {log_p_S.size} and "
            f"{log_f_S.size}"
        )
    return float(np.sum(np.exp(log_p_S) * (np.exp(log_f_S) + np.exp(log_mass_S) / 2)))
