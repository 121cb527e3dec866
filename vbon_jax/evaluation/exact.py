"""What each method should reach on the tabular world, and how far from it a policy is; exact."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vbon_jax.bon import enumeration, targets
from vbon_jax.rl import preference

# What a method's optimum is, by the name it has in the sweep's table.
FORMULAS = {
    "bon": "pi_bon",
    "vbon": "pi_bon",
    "bon_sft": "pi_bon",
    "lower_bound": "pi_ref F^(n-1) / Z",
    "bond": "pi_ref p_<=^(n-1) / Z",
    "ppo": "pi_ref exp(r / beta) / Z",
    "dpo": "pi_ref exp(r / beta) / Z",
    "bonbon": "argmin of its loss",
}


def target(
    method: str,
    log_ref_S: np.ndarray,
    rewards_S: np.ndarray,
    n: float,
    beta: float,
    labels: str = "soft",
) -> np.ndarray | None:
    """log-probabilities of the optimum of a method, float64 nats [S]; see ``FORMULAS``.

    None where there is none to be had: of dpo under hard labels (it reaches its optimum under soft,
    Bradley-Terry ones), of bonbon where rewards tie.

    Raises ValueError: a method without a formula.
    """
    if method in ("bon", "vbon", "bon_sft"):
        return enumeration.log_bon(log_ref_S, rewards_S, n)
    if method == "lower_bound":
        return targets.lower_bound(log_ref_S, rewards_S, n)
    if method == "bond":
        return targets.bond_backward(log_ref_S, rewards_S, n)
    if method == "dpo" and labels == "hard":
        return None
    if method in ("ppo", "dpo"):
        return targets.tilted(log_ref_S, rewards_S, beta)
    if method == "bonbon":
        if len(np.unique(rewards_S)) < len(rewards_S):
            return None
        log_bon_S = enumeration.log_bon(log_ref_S, rewards_S, n)
        nll = -float(np.sum(np.exp(log_bon_S) * log_ref_S))
        alpha = preference.bonbon_alpha(nll, preference.bonbon_beta(int(n)))
        return targets.bonbon(log_ref_S, rewards_S, int(n), alpha)
    raise ValueError(f"method={method!r} has no known optimum: choose one of {', '.join(FORMULAS)}")


def row(
    method: str,
    n: float,
    beta: float | None,
    log_p_PxS: Sequence[np.ndarray],
    log_ref_PxS: Sequence[np.ndarray],
    rewards_PxS: np.ndarray,
    matched_n: float,
    labels: str = "soft",
) -> dict[str, Any]:
    """Exact figures of a policy, means over the P prompts; nats.

    Args:
      n, beta: the method's own; beta None where it has none.
      log_p_PxS, log_ref_PxS: normalised log-probabilities of every response, policy and reference.
      matched_n: the n whose pi_bon "kl_bon" is about. labels: of dpo.

    Returns:
      "method", "n", "beta", "target" (its formula), "kl_target" KL(policy || own optimum), "kl_bon"
      KL(policy || pi_bon), "kl_ref", "win_rate", and "target_kl_bon" KL(own optimum || pi_bon),
      "target_win_rate": what would be left with training perfect. None where a method has no
      optimum, and where a number is infinite, as "kl_target" of the lower bound, whose optimum
      never says the worst response.
    """
    sums: dict[str, float] = {}
    for log_p, log_ref, rewards in zip(log_p_PxS, log_ref_PxS, rewards_PxS, strict=True):
        aim = target(method, log_ref, rewards, n, 0.0 if beta is None else beta, labels)
        log_bon = enumeration.log_bon(log_ref, rewards, matched_n)
        for name, value in {
            "kl_target": np.nan if aim is None else enumeration.kl(log_p, aim),
            "kl_bon": enumeration.kl(log_p, log_bon),
            "kl_ref": enumeration.kl(log_p, log_ref),
            "win_rate": enumeration.win_rate(log_p, log_ref, rewards),
            "target_kl_bon": np.nan if aim is None else enumeration.kl(aim, log_bon),
            "target_win_rate": np.nan
            if aim is None
            else enumeration.win_rate(aim, log_ref, rewards),
        }.items():
            sums[name] = sums.get(name, 0.0) + value / len(rewards_PxS)
    finite = {name: value if np.isfinite(value) else None for name, value in sums.items()}
    return {"method": method, "n": matched_n, "beta": beta, "target": FORMULAS[method]} | finite
