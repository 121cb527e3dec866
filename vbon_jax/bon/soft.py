"""Soft best-of-n: of n responses, one is drawn in proportion to exp(reward / temperature).

Verdun et al., "Soft best-of-n sampling for model alignment" (2025). At temperature 0 it is
best-of-n, at infinity the reference. Computed from a stored pool in float64 NumPy on the host.

With a = exp(r / T), the sample i of n has the chance a_i / sum_j a_j, and 1 / x is the integral of
e^(-t x) over t > 0: what depends on all n becomes a product of terms that depend on one each. The
integral is taken over log t by the trapezoidal rule, whose error falls as e^(-pi^2 / step).
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln

from vbon_jax.bon.pool import check_rewards, check_whole

STEP = 0.4  # of log t; the sums are off by less than 1e-9
HIGHEST = 6.0  # of log(t a): e^(-t a) is 1e-175 there, and 0 to all ends beyond
BLOCK = 2**22  # numbers held at once, 32 MiB


def weights(rewards_PxM: ArrayLike, n: int, temperature: float) -> np.ndarray:
    """Computes each sample's probability to be soft best-of-n of n drawn without replacement.

    The mean over all C(M, n) subsets S of the pool of 1[i in S] a_i / sum_{j in S} a_j, by

        n / M  integral  a_i e^(-t a_i)  E_{n-1}[prod_j e^(-t a_j)]  dt,

    where E_{n-1} is the mean over the subsets of n - 1 of the other samples. It is unbiased for
    every n <= M, as ``pool.winner_weights`` is for best-of-n. Of the whole pool, n = M, it is
    softmax(r / T).

    Args:
      rewards_PxM: finite rewards of the pool, M samples of each of P prompts, in any order.
      n: how many are drawn, a whole number in [1, M].
      temperature: T, > 0, in units of the reward.

    Returns:
      float64 weights [P, M]; each row sums to 1.

    Raises:
      ValueError: if rewards_PxM is no matrix or not finite, n is not a whole number in [1, M], or
        the temperature is not finite and above 0.
    """
    logit_PxM = _logits(rewards_PxM, temperature)
    prompts, m = logit_PxM.shape
    check_whole(n, m)
    n = int(n)
    if n == m:
        found_PxM = np.exp(logit_PxM)
        return found_PxM / found_PxM.sum(axis=1, keepdims=True)
    if n == 1:
        return np.full(logit_PxM.shape, 1 / m)
    log_t_S = _grid(logit_PxM, n)
    rows = max(1, BLOCK // ((m + 1) * n * len(log_t_S)))
    found = [_leave_one_out(logit_PxM[i : i + rows], n, log_t_S).T for i in range(0, prompts, rows)]
    found_PxM = np.concatenate(found)
    return found_PxM / found_PxM.sum(axis=1, keepdims=True)  # 1 but for the rule's error


def kl(rewards_PxM: ArrayLike, n: float, temperature: float) -> np.ndarray:
    """Estimates KL(soft best-of-n || ref) of each prompt, with the pool for its reference.

    The n responses are drawn from the pool with replacement: sample i is the one returned with
    probability p_i = n / M integral a_i e^(-t a_i) phi(t)^(n-1) dt, phi(t) the mean of e^(-t a)
    over the pool, and the estimate is sum_i p_i log(M p_i). Rewards between those of the pool are
    not told apart, which makes it too low where only few samples matter: at T -> 0 and M = 50 by
    0.0004 nats at n = 5 and by 0.04 at n = 50.

    Args:
      rewards_PxM: as of ``weights``.
      n: of soft best-of-n, >= 1.
      temperature: T, > 0, in units of the reward.

    Returns:
      float64 [P], nats, in [0, log M].

    Raises:
      ValueError: as ``weights`` does, or if n is below 1.
    """
    logit_PxM = _logits(rewards_PxM, temperature)
    if not (np.isfinite(n) and n >= 1):
        raise ValueError(f"n must be finite and >= 1 (the N of soft best-of-N), got n={n!r}")
    m = logit_PxM.shape[1]
    density_PxM = np.zeros(logit_PxM.shape)
    for log_t in _grid(logit_PxM, n):
        ta_PxM = np.exp(np.minimum(log_t + logit_PxM, HIGHEST))
        x_PxM = np.exp(-ta_PxM)
        density_PxM += ta_PxM * x_PxM * x_PxM.mean(axis=1, keepdims=True) ** (n - 1)
    p_PxM = density_PxM / density_PxM.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        gain_PxM = np.where(p_PxM > 0, p_PxM * np.log(m * p_PxM), 0.0)
    return np.maximum(gain_PxM.sum(axis=1), 0.0)  # rounding only


def _logits(rewards_PxM: ArrayLike, temperature: float) -> np.ndarray:
    """Rewards / T, less the largest of each prompt."""
    if not (np.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"temperature must be finite and > 0, in units of the reward, got {temperature!r}"
        )
    rewards_PxM = check_rewards(rewards_PxM).astype(np.float64)
    if not np.isfinite(rewards_PxM).all():
        raise ValueError("rewards_PxM holds infinite rewards, which have no exp(reward / T)")
    return (rewards_PxM - rewards_PxM.max(axis=1, keepdims=True)) / temperature


def _grid(logit_PxM: np.ndarray, n: float) -> np.ndarray:
    """Values of log t outside of which the integrands of all prompts are below 1e-15 of the sum."""
    return np.arange(-35.0 - np.log(n), 4.0 - logit_PxM.min() + STEP, STEP)


def _leave_one_out(logit_PxM: np.ndarray, n: int, log_t_S: np.ndarray) -> np.ndarray:
    """The integral of ``weights`` for some prompts, [M, P].

    The mean over subsets of the others is put together from those of the samples before and after:
    with k of n - 1 among the i before, at the probability of the hypergeometric distribution.
    """
    m = logit_PxM.shape[1]
    ta_MxPxS = np.exp(np.minimum(logit_PxM.T[:, :, None] + log_t_S, HIGHEST))
    x_MxPxS = np.exp(-ta_MxPxS)
    before = _subset_means(x_MxPxS, n - 1)
    after = _subset_means(x_MxPxS[::-1], n - 1)[::-1]
    k = np.arange(n)
    found_MxP = np.empty(logit_PxM.T.shape)
    for i in range(m):
        log_ways_K = _log_choose(i, k) + _log_choose(m - 1 - i, n - 1 - k)
        chance_K = np.exp(log_ways_K - _log_choose(m - 1, n - 1))
        others = np.einsum("k,kps,kps->ps", chance_K, before[i], after[i + 1][::-1])
        found_MxP[i] = (ta_MxPxS[i] * x_MxPxS[i] * others).sum(axis=1)
    return found_MxP * (STEP * n / m)


def _subset_means(x_MxPxS: np.ndarray, most: int) -> np.ndarray:
    """Means of the product over all subsets of k of the first i, [M + 1, most + 1, P, S] by i, k.

    Every term is positive and no binomial coefficient appears: nothing cancels or overflows. What
    has k > i is 0.
    """
    found = np.zeros((len(x_MxPxS) + 1, most + 1, *x_MxPxS.shape[1:]))
    found[:, 0] = 1.0
    for i, x_PxS in enumerate(x_MxPxS, start=1):
        share_K = np.minimum(np.arange(1, most + 1) / i, 1.0)[:, None, None]  # of subsets with i
        found[i, 1:] = (1 - share_K) * found[i - 1, 1:] + share_K * x_PxS * found[i - 1, :-1]
    return found


def _log_choose(m: int, k: np.ndarray | int) -> np.ndarray:
    """The logarithm of C(m, k), -inf where k is not in [0, m]."""
    k = np.asarray(k)
    inside = np.clip(k, 0, m)
    found = gammaln(m + 1) - gammaln(inside + 1) - gammaln(m - inside + 1)
    return np.where(k == inside, found, -np.inf)
