"""How many reference samples a task needs to estimate log F (Section 5.1 of the paper).

Table 1: a two-sample Kolmogorov-Smirnov test of the first m rewards of each prompt against all M.
Figure 3: the estimate of log F from a few m, for three prompts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vbon_jax.bon.ks import ks_test
from vbon_jax.bon.log_f import log_f
from vbon_jax.errors import InputError

TOLERATED = 0.001  # share of prompts that may differ from all M samples where m is enough
TOP_SAMPLES = 10  # reference samples wanted among the top 1/n of rewards
CURVES = 4  # m of the list that are drawn, beside M
GRID = 200  # most points of a curve


def convergence(
    prompts: Sequence[str],
    rewards_PxM: np.ndarray,
    ms: Sequence[int],
    level: float,
    temperature: float,
) -> dict[str, Any]:
    """Says how many of M reference samples a prompt would have been enough.

    The first m rewards are a part of all M, as in the paper, so the two samples are not independent
    and the test rejects less often than its level even where m is small: a rejection is strong
    evidence that m is too few, its absence says that the curve hardly moves between m and M.

    Args:
      prompts: P >= 1 texts.
      rewards_PxM: finite rewards of their reference samples, in the order drawn.
      ms: numbers of samples to hold against all M, each from 1 to M - 1.
      level: of the test, in (0, 1): a p-value no larger rejects that the distributions are equal.
      temperature: at which the samples were drawn; passed on.

    Returns:
      The content of ``convergence.json``: "m_full" (M), "prompts" (P), "level", "temperature",
      "rows" (by m: "rejected", the share of prompts; "statistic" and "p_value", means over those
      prompts, None where there are none; "mean_statistic", over all prompts), "recommended" (the
      smallest m such that for it and every larger one of the list at most 0.1% of the prompts are
      rejected, hence none of fewer than 1000; None where there is no such m), "why" (a sentence),
      "examples" (the prompts of lowest, middle and highest mean reward as far as there are so many:
      "prompt", "kind", "curves" of "m", "rewards", at most 200 ascending, and "log_f" of these in
      nats, estimated as log((k + 1) / (m + 1)); all curves of a prompt have the same rewards).

    Raises:
      InputError: no rewards, other numbers of prompts than rows, rewards that are not finite, or an
        m or level out of range.
    """
    rewards_PxM = np.asarray(rewards_PxM)
    _check(prompts, rewards_PxM, ms, level)
    num_prompts, m_full = rewards_PxM.shape
    sizes = sorted({int(m) for m in ms})
    rows, counts = [], []
    for m in sizes:
        statistic_P, p_value_P = ks_test(rewards_PxM[:, :m], rewards_PxM)
        rejected_P = p_value_P <= level
        counts.append(int(rejected_P.sum()))
        rows.append(
            {
                "m": m,
                "rejected": float(rejected_P.mean()),
                "statistic": float(statistic_P[rejected_P].mean()) if counts[-1] else None,
                "p_value": float(p_value_P[rejected_P].mean()) if counts[-1] else None,
                "mean_statistic": float(statistic_P.mean()),
            }
        )
    enough = _enough(counts, num_prompts)
    return {
        "m_full": m_full,
        "prompts": num_prompts,
        "level": level,
        "temperature": temperature,
        "rows": rows,
        "recommended": None if enough is None else sizes[enough],
        "why": _why(sizes, counts, enough, num_prompts, m_full, level),
        "examples": _examples(prompts, rewards_PxM, sizes),
    }


def _check(prompts: Sequence[str], rewards: np.ndarray, ms: Sequence[int], level: float) -> None:
    if rewards.ndim != 2 or len(rewards) != len(prompts) or not rewards.size:
        raise InputError(
            f"rewards of shape {rewards.shape} for {len(prompts)} prompts: give a matrix with one "
            "row a prompt, at least one"
        )
    if not np.isfinite(rewards).all():
        raise InputError(
            f"{int((~np.isfinite(rewards)).sum())} of {rewards.size} rewards are not finite; find "
            "the responses that the reward cannot score"
        )
    wrong = [m for m in ms if not 1 <= m < rewards.shape[1]]
    if wrong or not ms:
        raise InputError(
            f"m = {wrong[0] if wrong else '()'} cannot be held against all {rewards.shape[1]} "
            f"samples a prompt: give numbers from 1 to {rewards.shape[1] - 1}"
        )
    if not 0 < level < 1:
        raise InputError(f"level = {level} of the test is not between 0 and 1; 0.05 is usual")


def _enough(counts: Sequence[int], num_prompts: int) -> int | None:
    """The first place from which on no count of rejected prompts is above what is tolerated."""
    first = None
    for at in reversed(range(len(counts))):
        if counts[at] / num_prompts > TOLERATED:
            break
        first = at
    return first


def _why(
    sizes: Sequence[int],
    counts: Sequence[int],
    enough: int | None,
    num_prompts: int,
    m_full: int,
    level: float,
) -> str:
    at = len(sizes) - 1 if enough is None else enough
    m = sizes[at]
    share = f"{counts[at]:,} of {num_prompts:,} prompts ({counts[at] / num_prompts:.2%})"
    differ = f"differ from all {m_full} by the Kolmogorov-Smirnov test at level {level:g}"
    if enough is None:
        return (
            f"Even with m = {m} samples, {share} {differ}, more than the {TOLERATED:.1%} tolerated"
            f": draw more than {m_full} samples and ask again."
        )
    n = m // TOP_SAMPLES
    supports = (
        f"it supports best-of-n up to n = {n}, where the top 1/n of rewards holds about "
        f"{TOP_SAMPLES} of the m samples or more"
        if n > 1
        else f"it is too few for any best-of-n to have {TOP_SAMPLES} of the m samples in the top "
        "1/n of rewards"
    )
    return f"With m = {m} samples, {share} {differ}; {supports}."


def _examples(
    prompts: Sequence[str], rewards_PxM: np.ndarray, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    order = np.argsort(rewards_PxM.mean(axis=1), kind="stable")
    places = {"low": 0, "middle": len(order) // 2, "high": len(order) - 1}
    if len(order) < 3:
        places = {"low": 0, "high": 1} if len(order) == 2 else {"middle": 0}
    # Evenly over the list, its smallest and largest included.
    chosen = {sizes[round(at)] for at in np.linspace(0, len(sizes) - 1, CURVES)}
    examples = []
    for kind, place in places.items():
        rewards_M = rewards_PxM[order[place]]
        distinct = np.unique(rewards_M)
        grid_G = distinct[
            np.linspace(0, len(distinct) - 1, min(GRID, len(distinct))).round().astype(int)
        ]
        curves = []
        for m in [*sorted(chosen), len(rewards_M)]:
            below_G = np.searchsorted(np.sort(rewards_M[:m]), grid_G, side="left")
            estimate_G = np.asarray(log_f(below_G, m, "smoothed"))
            curves.append({"m": m, "rewards": grid_G.tolist(), "log_f": estimate_G.tolist()})
        examples.append({"prompt": prompts[order[place]], "kind": kind, "curves": curves})
    return examples
