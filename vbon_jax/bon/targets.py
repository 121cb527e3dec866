"""Where each method's training ends, exactly, in a world whose S strings are all listed.

float64 NumPy, like `enumeration`, whose `log_bon` is the target of vBoN's exact objective and of
maximum likelihood on best-of-n winners.
"""

import numpy as np
from numpy.typing import ArrayLike

from vbon_jax.bon.checks import check_beta, check_n
from vbon_jax.bon.enumeration import log_f_and_mass

_STEPS = 500  # of Newton's method; a few dozen are taken
_GRADIENT_WITHIN = 1e-8


def _tilted(log_ref_S: ArrayLike, log_tilt_S: np.ndarray) -> np.ndarray:
    """Normalised log pi_ref + log_tilt."""
    log_weight_S = np.asarray(log_ref_S, np.float64) + log_tilt_S
    if np.isneginf(log_weight_S).all():
        raise ValueError(
            "no string has any weight: every string that log_ref_S allows has F = 0 (all their "
            "rewards are equal), so this objective has no optimum for n > 1"
        )
    return log_weight_S - np.logaddexp.reduce(log_weight_S)


def _power(log_p_S: np.ndarray, exponent: float) -> np.ndarray:
    """log p^exponent with 0^0 = 1."""
    return np.zeros_like(log_p_S) if exponent == 0 else exponent * log_p_S


def tilted(log_ref_S: ArrayLike, score_S: ArrayLike, beta: float) -> np.ndarray:
    """log(pi_ref exp(score / beta) / Z), the maximum of E[score] - beta KL(p || ref).

    With score = reward: the target of PPO, and of DPO with soft labels, the Bradley-Terry
    probabilities of the rewards.

    Args:
        log_ref_S: log pi_ref of every string, in nats, normalised.
        score_S: finite scores.
        beta: > 0.

    Returns:
        float64 vector, in nats, normalised.

    Raises:
        ValueError: log_ref_S or scores as in `enumeration.log_f_and_mass`, infinite scores, or a
            beta that is not above 0.
    """
    check_beta(beta)
    if beta == 0:
        raise ValueError("beta must be > 0: without a KL penalty the best string takes all")
    log_f_and_mass(log_ref_S, score_S)  # its checks
    score_S = np.asarray(score_S, np.float64)
    if not np.isfinite(score_S).all():
        raise ValueError(f"score_S must be finite, got {score_S[~np.isfinite(score_S)][0]}")
    return _tilted(log_ref_S, score_S / beta)


def lower_bound(log_ref_S: ArrayLike, rewards_S: ArrayLike, n: float) -> np.ndarray:
    """log(pi_ref F^(n-1) / Z), the maximum of the bound L (Eq. 8 of the vBoN paper).

    F is strict: for n > 1 the strings of the lowest reward are at -inf.

    Args:
        log_ref_S: log pi_ref of every string, in nats, normalised.
        rewards_S: their rewards.
        n: the N of best-of-N, a real number >= 1.

    Returns:
        float64 vector, in nats, normalised.

    Raises:
        ValueError: as `enumeration.log_bon`, or no two rewards differ while n > 1.
    """
    check_n(n)
    log_f_S, _ = log_f_and_mass(log_ref_S, rewards_S)
    return _tilted(log_ref_S, _power(log_f_S, n - 1))


def bond_backward(log_ref_S: ArrayLike, rewards_S: ArrayLike, n: float) -> np.ndarray:
    """log(pi_ref p_<=^(n-1) / Z), p_<= = F + g: the maximum of `rl.bond.backward_reward`.

    Args, Returns and Raises as `lower_bound`, but rewards may all be equal.
    """
    check_n(n)
    log_f_S, log_mass_S = log_f_and_mass(log_ref_S, rewards_S)
    return _tilted(log_ref_S, _power(np.logaddexp(log_f_S, log_mass_S), n - 1))


def jensen_bound(log_ref_S: ArrayLike, rewards_S: ArrayLike, n: float) -> np.ndarray:
    """log(pi_ref^beta F^gamma / Z), the maximum of the bound L1 (Theorem 3 of the vBoN paper).

    In L1 = gamma E[log F] - alpha H - beta KL, alpha = beta - 1 leaves the log p terms a weight of
    -1: L1 = E[gamma log F + beta log ref - log p], which is -KL to the above. beta = n(n+1)/2 and
    gamma = n(n-1)/2.

    Args, Returns and Raises as `lower_bound`.
    """
    check_n(n)
    log_f_S, _ = log_f_and_mass(log_ref_S, rewards_S)
    log_ref_S = np.asarray(log_ref_S, np.float64)
    sharper_S = _power(log_ref_S, n * (n + 1) / 2 - 1)
    return _tilted(log_ref_S, sharper_S + _power(log_f_S, n * (n - 1) / 2))


def best_and_worst(log_ref_S: ArrayLike, rewards_S: ArrayLike, n: int) -> np.ndarray:
    """P(best of n draws = i, worst of the same draws = j), for an injective reward.

    For r(i) > r(j), with U = F + g, by inclusion and exclusion of the two ends:

        (U_i - F_j)^n - (F_i - F_j)^n - (U_i - U_j)^n + (F_i - U_j)^n

    and g_i^n on the diagonal. Entries are right to about 1e-15, absolutely.

    Args:
        log_ref_S: log pi_ref of every string, in nats, normalised.
        rewards_S: their rewards, no two of them equal (break ties by a fixed order: pass each
            string's place in it).
        n: a whole number >= 1.

    Returns:
        float64 [S, S], non-negative, adding up to 1.

    Raises:
        ValueError: as `enumeration.log_f_and_mass`, n is not whole, or two rewards are equal.
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
    """log of the distribution p that minimises BoNBoN's expected loss (Gui et al. 2024):

        alpha E_bon[-log p(y)] + (1 - alpha) E[(h(best) - h(worst) - 1 / (2 beta_n))^2]

    with h = log p - log ref, best and worst of the same n draws, 1 / (2 beta_n) = (n-1) H_{n-1}.

    Found in u = h + any constant. The second term is u' Q u - 2 c u' (b - w) + c^2 with b and w the
    distributions of best and worst, J their joint one, Q = diag(b + w) - J - J' and
    c = 1 / (2 beta_n); it does not see the constant. In place of alpha (log sum_y ref e^u - b'u),
    the first term, alpha (sum_y ref e^u - b'u) has the same minimum, where it fixes the constant to
    sum_y ref e^u = 1. That is strictly convex without a constraint, and Newton's method solves it.

    Args:
        log_ref_S, rewards_S: as in `best_and_worst`.
        n: a whole number >= 2.
        alpha: in (0, 1]; 1 gives pi_bon itself.

    Returns:
        float64 vector, in nats, normalised; -inf where log_ref_S is.

    Raises:
        ValueError: as `best_and_worst`, n < 2, or an alpha outside (0, 1].
        RuntimeError: no gradient below 1e-8 was reached.
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
    """The u of `bonbon`, for strings that all have mass."""
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
