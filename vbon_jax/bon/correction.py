"""Best-of-n out of a policy that is near it: rejection sampling by the density ratio.

A proposal y of the policy is kept with probability min(1, w(y) / c), where w = pi_bon / policy. Up
to the constant this is a draw from min(policy, pi_bon / c) (von Neumann, 1951): pi_bon itself where
w is at most c everywhere, at c proposals a response; where it is not, what the policy gives up by
more than c times stays too rare. Best-of-n takes n proposals of the reference.
"""

import numpy as np
from numpy.typing import ArrayLike

from vbon_jax.bon import enumeration

BOUND = 2.0  # c, where no one gives another


def accepts(log_weight_B: ArrayLike, bound: float, uniform_B: ArrayLike) -> np.ndarray:
    """Decides which proposals are kept.

    Args:
      log_weight_B: log(pi_bon / policy) of the proposals, nats.
      bound: c, at least 1.
      uniform_B: a number in [0, 1) for each.

    Returns:
      bool [B].

    Raises:
      ValueError: if bound is less than 1, since no constant below bounds a ratio of densities.
    """
    if not bound >= 1:
        raise ValueError(f"bound is {bound}: give at least 1, a bound of pi_bon / policy")
    with np.errstate(divide="ignore"):
        log_uniform_B = np.log(np.asarray(uniform_B, np.float64))
    return log_uniform_B < np.asarray(log_weight_B, np.float64) - np.log(bound)


def resampled(log_weight_K: ArrayLike, uniform: float) -> int:
    """Chooses among proposals in proportion to their weights (Rubin, 1987).

    Args:
      log_weight_K: log(pi_bon / policy), nats; may be -inf.
      uniform: a number in [0, 1) that decides.

    Returns:
      The index of the one chosen; of the first where no weight is above 0.
    """
    log_weight_K = np.asarray(log_weight_K, np.float64)
    weight_K = np.exp(log_weight_K - max(float(np.max(log_weight_K)), np.finfo(np.float64).min))
    total_K = np.cumsum(weight_K)
    return int(np.searchsorted(total_K, uniform * total_K[-1], side="right")) if total_K[-1] else 0


def exact(log_policy_S: ArrayLike, log_bon_S: ArrayLike, bound: float) -> tuple[np.ndarray, float]:
    """Computes the distribution of kept proposals where all S responses are enumerated.

    Args:
      log_policy_S: log-probabilities of the policy, nats, normalized.
      log_bon_S: those of best-of-n.
      bound: c, at least 1.

    Returns:
      (log-probabilities [S] of a kept proposal, the expected number of proposals for one).

    Raises:
      ValueError: if shapes differ, or a distribution is not normalized.
    """
    log_policy_S, log_bon_S = (
        enumeration.normalized(name, x)
        for name, x in (("log_policy_S", log_policy_S), ("log_bon_S", log_bon_S))
    )
    if log_policy_S.shape != log_bon_S.shape:
        raise ValueError(
            f"log_policy_S has {log_policy_S.size} responses and log_bon_S {log_bon_S.size}: give "
            "both for the same"
        )
    kept_S = np.minimum(log_policy_S, log_bon_S - np.log(bound))
    log_rate = float(np.logaddexp.reduce(kept_S))
    return kept_S - log_rate, float(np.exp(-log_rate))
