"""The optimum of each training method, exactly, where all S possible strings can be enumerated.

Computed in float64 NumPy, as in ``bon.enumeration``. ``bon.enumeration.log_bon`` is the optimum of
vBoN's exact objective and of maximum likelihood on best-of-n winners.
"""

import numpy as np
from numpy.typing import ArrayLike

from vbon_jax.bon.checks import check_beta, check_choice, check_n
from vbon_jax.bon.enumeration import log_bon_ratio, log_f_and_mass

TRANSFORMS = ("log", "identity")  # f of QRPO's quantile reward
_STEPS = 500  # of Newton's method; a few dozen are taken
_GRADIENT_WITHIN = 1e-8


def _tilted(log_ref_S: ArrayLike, log_tilt_S: np.ndarray) -> np.ndarray:
    """Computes log pi_ref + log_tilt, normalized."""
    log_weight_S = np.asarray(log_ref_S, np.float64) + log_tilt_S
    if np.isneginf(log_weight_S).all():
        raise ValueError(
            "no string has any weight: every string that log_ref_S allows has F = 0 (all their "
            "rewards are equal), so this objective has no optimum for n > 1"
        )
    return log_weight_S - np.logaddexp.reduce(log_weight_S)


def _power(log_p_S: np.ndarray, exponent: float) -> np.ndarray:
    """Computes log p^exponent with 0^0 = 1."""
    return np.zeros_like(log_p_S) if exponent == 0 else exponent * log_p_S


def _check_positive(beta: float) -> None:
    check_beta(beta)
    if beta == 0:
        raise ValueError("beta must be > 0: without a KL penalty the best string takes all")


def tilted(log_ref_S: ArrayLike, score_S: ArrayLike, beta: float) -> np.ndarray:
    """Computes log(pi_ref exp(score / beta) / Z), the maximizer of E[score] - beta KL(p || ref).

    With score = reward this is the optimum of PPO, and of DPO with soft labels, the Bradley-Terry
    probabilities of the rewards.

    Args:
      log_ref_S: log pi_ref of every string, in nats, normalized.
      score_S: finite scores of the same strings.
      beta: weight of the KL penalty, > 0.

    Returns:
      float64 vector [S], in nats, normalized.

    Raises:
      ValueError: as ``enumeration.log_f_and_mass`` does, if a score is infinite, or if beta is not
        positive.
    """
    _check_positive(beta)
    log_f_and_mass(log_ref_S, score_S)  # its checks
    score_S = np.asarray(score_S, np.float64)
    if not np.isfinite(score_S).all():
        raise ValueError(f"score_S must be finite, got {score_S[~np.isfinite(score_S)][0]}")
    return _tilted(log_ref_S, score_S / beta)


def lower_bound(log_ref_S: ArrayLike, rewards_S: ArrayLike, n: float) -> np.ndarray:
    """Computes log(pi_ref F^(n-1) / Z), the maximizer of the bound L (Eq. 8 of the vBoN paper).

    F is strict: for n > 1 the strings of the lowest reward have probability 0.

    Args:
      log_ref_S: log pi_ref of every string, in nats, normalized.
      rewards_S: rewards of the same strings.
      n: the N of best-of-N, a real number >= 1.

    Returns:
      float64 vector [S], in nats, normalized; -inf is probability 0.

    Raises:
      ValueError: as ``enumeration.log_bon`` does, or if all rewards are equal and n > 1.
    """
    check_n(n)
    log_f_S, _ = log_f_and_mass(log_ref_S, rewards_S)
    return _tilted(log_ref_S, _power(log_f_S, n - 1))


def bond_backward(log_ref_S: ArrayLike, rewards_S: ArrayLike, n: float) -> np.ndarray:
    """Computes log(pi_ref p_<=^(n-1) / Z) with p_<= = F + g, the optimum of BOND's backward KL.

    This is the objective ``backward`` of ``bon.distribution.sequence_reward``.

    Args:
      log_ref_S: log pi_ref of every string, in nats, normalized.
      rewards_S: rewards of the same strings; they may all be equal.
      n: the N of best-of-N, a real number >= 1.

    Returns:
      float64 vector [S], in nats, normalized.

    Raises:
      ValueError: as ``enumeration.log_bon`` does.
    """
    check_n(n)
    log_f_S, log_mass_S = log_f_and_mass(log_ref_S, rewards_S)
    return _tilted(log_ref_S, _power(np.logaddexp(log_f_S, log_mass_S), n - 1))


def jensen_bound(log_ref_S: ArrayLike, rewards_S: ArrayLike, n: float) -> np.ndarray:
    """Computes log(pi_ref^beta F^gamma / Z), the maximizer of the bound L1.

    Theorem 3 of the vBoN paper.

    In L1 = gamma E[log F] - alpha H - beta KL, alpha = beta - 1, so the log p terms have weight -1
    in sum: L1 = E[gamma log F + beta log ref - log p], which is the negative KL divergence from p
    to this distribution up to a constant. beta = n(n+1)/2 and gamma = n(n-1)/2.

    Args:
      log_ref_S: log pi_ref of every string, in nats, normalized.
      rewards_S: rewards of the same strings.
      n: the N of best-of-N, a real number >= 1.

    Returns:
      float64 vector [S], in nats, normalized; -inf is probability 0.

    Raises:
      ValueError: as ``enumeration.log_bon`` does, or if all rewards are equal and n > 1.
    """
    check_n(n)
    log_f_S, _ = log_f_and_mass(log_ref_S, rewards_S)
    log_ref_S = np.asarray(log_ref_S, np.float64)
    sharper_S = _power(log_ref_S, n * (n + 1) / 2 - 1)
    return _tilted(log_ref_S, sharper_S + _power(log_f_S, n * (n - 1) / 2))


def qrpo_log_ratio(
    log_f: np.ndarray, log_mass: np.ndarray, beta: float, transform: str
) -> np.ndarray:
    """Computes the log-ratio that QRPO regresses to, f(q) / beta - log Z, in nats.

    Matrenok et al., 2025: the quantile reward q is uniform on (0, 1) under the reference, so the
    partition function Z = E[exp(f(q) / beta)] is known,

        log:       f(q) = log q,  Z = beta / (1 + beta)
        identity:  f(q) = q,      Z = beta (exp(1 / beta) - 1).

    The paper's q is P_ref(r(y') <= r(y)), which is uniform for a continuous reward only. Here
    exp(f(q) / beta) is averaged over the quantiles (F, F + g) of the response's tie group: this
    tends to the paper's for g -> 0, and the ratio has mean 1 under the reference whatever the ties
    and, with ranks among stored samples, for any number of them. The log form is formula (1) with
    n = 1 + 1 / beta.

    Args:
      log_f: log F, in nats; -inf for a lowest reward.
      log_mass: log g, in nats, finite.
      beta: weight of the KL penalty, > 0.
      transform: f, "log" or "identity".

    Returns:
      float64, in nats, of the shape of the arguments.

    Raises:
      ValueError: if beta is not positive, or the transform is unknown.
    """
    _check_positive(beta)
    check_choice("transform", transform, TRANSFORMS)
    if transform == "log":
        return log_bon_ratio(log_f, log_mass, 1 + 1 / beta)
    below_top = (np.exp(np.logaddexp(log_f, log_mass)) - 1) / beta
    width = -np.expm1(-np.exp(log_mass) / beta)
    return below_top + np.log(width) - np.log(-np.expm1(-1 / beta)) - log_mass


def qrpo(log_ref_S: ArrayLike, rewards_S: ArrayLike, beta: float, transform: str) -> np.ndarray:
    """Computes log(pi_ref exp(f(q) / beta) / Z), where QRPO's loss is 0; see ``qrpo_log_ratio``.

    With transform = "log" and beta = 1 / (n - 1) this is pi_bon, ties broken at random.

    Args:
      log_ref_S: log pi_ref of every string, in nats, normalized.
      rewards_S: rewards of the same strings; they may be tied.
      beta: weight of the KL penalty, > 0.
      transform: f, "log" or "identity".

    Returns:
      float64 vector [S], in nats, normalized; -inf where log_ref_S is -inf.

    Raises:
      ValueError: as ``enumeration.log_f_and_mass`` and ``qrpo_log_ratio`` do.
    """
    log_f_S, log_mass_S = log_f_and_mass(log_ref_S, rewards_S)
    log_ratio_S = np.zeros(log_f_S.shape)
    possible_S = np.isfinite(log_mass_S)
    log_ratio_S[possible_S] = qrpo_log_ratio(
        log_f_S[possible_S], log_mass_S[possible_S], beta, transform
    )
    return _tilted(log_ref_S, log_ratio_S)


def best_and_worst(log_ref_S: ArrayLike, rewards_S: ArrayLike, n: int) -> np.ndarray:
    """Computes P(best of n draws = i, worst of the same draws = j) for an injective reward.

    For r(i) > r(j), with U = F + g, inclusion and exclusion of the two ends gives

        (U_i - F_j)^n - (F_i - F_j)^n - (U_i - U_j)^n + (F_i - U_j)^n,

    and the diagonal is g_i^n. The absolute error of each entry is about 1e-15.

    Args:
      log_ref_S: log pi_ref of every string, in nats, normalized.
      rewards_S: rewards of the same strings, no two of them equal. To break ties by a fixed order,
        pass each string's rank in it.
      n: number of draws, a whole number >= 1.

    Returns:
      float64 matrix [S, S] of best and worst, non-negative, with sum 1.

    Raises:
      ValueError: as ``enumeration.log_f_and_mass`` does, if n is not whole, or if two rewards are
        equal.
    """
    check_n(n)
    if n != int(n):
        raise ValueError(f"n must be a whole number of draws, got n={n}")
    log_ref_S = np.asarray(log_ref_S, np.float64)
    log_f_S, _ = log_f_and_mass(log_ref_S, rewards_S)
    rewards_S = np.asarray(rewards_S)
    distinct = np.unique(rewards_S).size
    if distinct < rewards_S.size:
        raise ValueError(
            f"rewards_S must be injective, but its {rewards_S.size} rewards have {distinct} values;"
            " pass each string's place in an order that breaks the ties"
        )
    below_S = np.exp(log_f_S)
    up_to_S = below_S + np.exp(log_ref_S)

    def all_within(top_S: np.ndarray, bottom_S: np.ndarray) -> np.ndarray:
        return np.maximum(top_S[:, None] - bottom_S, 0.0) ** n

    joint_SxS = all_within(up_to_S, below_S) - all_within(below_S, below_S)
    joint_SxS -= all_within(up_to_S, up_to_S) - all_within(below_S, up_to_S)
    joint_SxS = np.where(rewards_S[:, None] > rewards_S, np.maximum(joint_SxS, 0.0), 0.0)
    np.fill_diagonal(joint_SxS, np.exp(n * log_ref_S))
    return joint_SxS


def bonbon(log_ref_S: ArrayLike, rewards_S: ArrayLike, n: int, alpha: float) -> np.ndarray:
    """Computes log p of the distribution that minimizes BoNBoN's expected loss.

    The loss (Gui et al., 2024) is

        alpha E_bon[-log p(y)] + (1 - alpha) E[(h(best) - h(worst) - 1 / (2 beta_n))^2]

    with h = log p - log ref, best and worst of the same n draws, and 1 / (2 beta_n) = (n-1)
    H_{n-1}.

    The unknown is u = h up to a constant. With b and w the distributions of best and worst, J their
    joint distribution, Q = diag(b + w) - J - J' and c = 1 / (2 beta_n), the second expectation is
    u' Q u - 2 c u' (b - w) + c^2, which does not depend on the constant. The first term, alpha (log
    sum_y ref e^u - b'u), is replaced by alpha (sum_y ref e^u - b'u): this has the same minimum, and
    there fixes the constant to sum_y ref e^u = 1. The resulting problem is unconstrained and
    strictly convex, and is solved by Newton's method.

    Args:
      log_ref_S: log pi_ref of every string, in nats, normalized.
      rewards_S: rewards of the same strings, no two of them equal; see ``best_and_worst``.
      n: number of draws, a whole number >= 2.
      alpha: weight of the first term, in (0, 1]; 1 gives pi_bon itself.

    Returns:
      float64 vector [S], in nats, normalized; -inf where log_ref_S is -inf.

    Raises:
      ValueError: as ``best_and_worst`` does, if n < 2, or if alpha is outside (0, 1].
      RuntimeError: if Newton's method does not reach a gradient below 1e-8.
    """
    if not n >= 2:
        raise ValueError(f"n must be a whole number >= 2 (best and worst of n draws), got n={n}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got alpha={alpha}")
    joint_SxS = best_and_worst(log_ref_S, rewards_S, n)
    log_ref_S = np.asarray(log_ref_S, np.float64)
    said_S = log_ref_S > -np.inf
    gap = (n - 1) * float(np.sum(1 / np.arange(1, n)))  # 1 / (2 beta_n)
    u_S = np.zeros_like(log_ref_S)
    u_S[said_S] = _newton(log_ref_S[said_S], joint_SxS[np.ix_(said_S, said_S)], gap, alpha)
    return _tilted(log_ref_S, u_S)


def _newton(log_ref_S: np.ndarray, joint_SxS: np.ndarray, gap: float, alpha: float) -> np.ndarray:
    """Solves for the u of ``bonbon``, for strings that all have positive mass."""
    best_S, worst_S = joint_SxS.sum(axis=1), joint_SxS.sum(axis=0)
    quadratic_SxS = np.diag(best_S + worst_S) - joint_SxS - joint_SxS.T
    linear_S = gap * (best_S - worst_S)

    def value(u_S: np.ndarray) -> float:
        with np.errstate(over="ignore"):  # a step too long is worth inf, and is halved
            first = np.sum(np.exp(log_ref_S + u_S)) - best_S @ u_S
        second = u_S @ quadratic_SxS @ u_S - 2 * linear_S @ u_S
        return float(alpha * first + (1 - alpha) * second)

    def gradient(u_S: np.ndarray) -> np.ndarray:
        second_S = 2 * (quadratic_SxS @ u_S - linear_S)
        return alpha * (np.exp(log_ref_S + u_S) - best_S) + (1 - alpha) * second_S

    u_S = np.zeros_like(log_ref_S)
    for _ in range(_STEPS):
        gradient_S = gradient(u_S)
        hessian_SxS = 2 * (1 - alpha) * quadratic_SxS
        hessian_SxS[np.diag_indices_from(hessian_SxS)] += alpha * np.exp(log_ref_S + u_S)
        # Masses differ by many orders of magnitude: with a unit diagonal that costs no digits.
        scale_S = np.sqrt(np.maximum(np.diag(hessian_SxS), np.finfo(np.float64).tiny))
        scaled_SxS = hessian_SxS / scale_S / scale_S[:, None]
        step_S = -np.linalg.solve(scaled_SxS, gradient_S / scale_S) / scale_S
        decrement = float(-gradient_S @ step_S)  # twice the distance to the minimum's value
        if np.max(np.abs(gradient_S)) < _GRADIENT_WITHIN and abs(decrement) < 1e-16:
            return u_S
        size, before = 1.0, value(u_S)
        while not value(u_S + size * step_S) <= before + 1e-15 * abs(before) and size > 1e-10:
            size /= 2
        u_S = u_S + size * step_S
    raise RuntimeError(
        f"BoNBoN's minimum was not reached in {_STEPS} Newton steps (S={log_ref_S.size}, "
        f"alpha={alpha}, 1/(2 beta_n)={gap}): the largest gradient is "
        f"{np.max(np.abs(gradient(u_S)))}, not below {_GRADIENT_WITHIN}"
    )
