"""Which n of best-of-n to trust, by a separate evaluator (the content of ``choose.json``).

Best-of-n maximises a reward that stands for what is wanted. From some n on, what it gains in that
reward may be lost in what is wanted: Gao et al., "Scaling laws for reward model overoptimization"
(2022). One pool of reference samples scored by both gives the evaluator's mean for every n, and
beside it that of two ways to hedge: soft best-of-n (Verdun et al., 2025) and best-of-Poisson
(Khalaf et al., 2025).

**The rule.** The peak is the n with the highest mean of the evaluator. An n is told apart from it
where the band of their difference leaves out 0; these bands hold for all pairs of settings at once
with probability 95%, so it does not matter that the peak is chosen by the same data. An n above
the peak that is told apart from it is *over-optimised*. *Recommended* is the smallest n that is not
told apart from the peak: any more draws buy nothing that the data can show, and move further from
the reference. Of fewer prompts, less is told apart: the recommended n gets smaller and the
over-optimised ones fewer, and the most that the recommended n may fall short of the peak, the upper
end of the band of their difference, gets larger.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vbon_jax.bon import pool, quantiles, soft
from vbon_jax.errors import InputError
from vbon_jax.evaluation import bands, compare
from vbon_jax.evaluation.bands import Bands

LEVEL = 0.95
FEWEST_PROMPTS = 10
DECIDES = "evaluator_reward"
QUANTITIES = ("reward", "win_rate", DECIDES, "evaluator_win_rate")
SOFTNESS = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125)  # temperatures, in standard deviations of the reward


@dataclasses.dataclass(frozen=True)
class Pool:
    """Reference samples scored by both rewards, M of each of P prompts, and their opponents.

    Attributes:
      rewards_PxM: of the reward that best-of-n maximises.
      evaluator_PxM: of the evaluator.
      opponents_PxO: rewards of other reference samples, ascending; win rates are over these.
      evaluator_opponents_PxO: the evaluator's of the same, ascending.
      order_PxM: keys that break ties of the reward; None breaks them at random.
    """

    rewards_PxM: np.ndarray
    evaluator_PxM: np.ndarray
    opponents_PxO: np.ndarray
    evaluator_opponents_PxO: np.ndarray
    order_PxM: np.ndarray | None = None

    def quantities(self) -> dict[str, np.ndarray]:
        """What is averaged under each setting: `QUANTITIES`, float64 [P, M] each."""
        return dict(
            zip(
                QUANTITIES,
                (
                    np.asarray(self.rewards_PxM, np.float64),
                    compare.win_rates(self.rewards_PxM, self.opponents_PxO),
                    np.asarray(self.evaluator_PxM, np.float64),
                    compare.win_rates(self.evaluator_PxM, self.evaluator_opponents_PxO),
                ),
                strict=True,
            )
        )


class Setting(NamedTuple):
    """A way to choose among responses of the reference.

    Attributes:
      family: "bon", "poisson" or "soft".
      n: responses drawn for one that is returned; their mean for "poisson".
      rate: of "poisson", the mean of n - 1; None for others.
      temperature: of "soft", in units of the reward; None for others.
      kl_P: KL to the reference of each prompt, nats.
      means: of each quantity, its mean under the setting, [P].
    """

    family: str
    n: float
    rate: float | None
    temperature: float | None
    kl_P: np.ndarray
    means: dict[str, np.ndarray]


def settings(samples: Pool, n: float) -> list[Setting]:
    """Computes every setting exactly in the pool.

    Best-of-n for n = 1..M; best-of-Poisson at the rates 1/2, 1, 2, ... that M samples are enough
    for; soft best-of-n at six temperatures, with n = M and with the n given.

    Args:
      samples: the pool.
      n: of soft best-of-n beside M; left out where it is not a whole number in [2, M).

    Returns:
      The settings, family by family.
    """
    rewards, order = samples.rewards_PxM, samples.order_PxM
    m = rewards.shape[1]
    values = samples.quantities()
    placed = {k: pool.place_means(v, rewards, order) for k, v in values.items()}

    def by_rank(weights_M: np.ndarray) -> dict[str, np.ndarray]:
        return {k: v @ weights_M for k, v in placed.items()}

    found = []
    for i, weights_M in enumerate(pool.all_order_weights(m), start=1):
        kl_P = quantiles.best_of_n(rewards, i, (0.0, 1.0), order).log_ratio_PxQ.sum(axis=1)
        found.append(Setting("bon", float(i), None, None, kl_P, by_rank(weights_M)))
    rate = 0.5
    while pool.poisson_tail(m, rate) <= pool.POISSON_TAIL:
        parts = quantiles.best_of_poisson(rewards, rate, (0.0, 1.0), order)
        means = by_rank(pool.poisson_order_weights(m, rate))
        kl_P = parts.log_ratio_PxQ.sum(axis=1)
        found.append(Setting("poisson", 1 + rate, rate, None, kl_P, means))
        rate *= 2
    scale = float(np.sqrt(np.var(rewards.astype(np.float64), axis=1).mean())) or 1.0
    own = [int(n)] if float(n).is_integer() and 1 < n < m else []
    for draws in dict.fromkeys([*own, m]):
        for softness in SOFTNESS:
            temperature = softness * scale
            weights_PxM = soft.weights(rewards, draws, temperature)
            means = {k: pool.best_mean(v, weights_PxM) for k, v in values.items()}
            kl_P = soft.kl(rewards, draws, temperature)
            found.append(Setting("soft", float(draws), None, temperature, kl_P, means))
    return found


def choose(samples: Pool, n: float, temperature: float, seed: int = 0) -> dict[str, Any]:
    """Says which n of best-of-n the evaluator trusts.

    Args:
      samples: the pool, of at least `FEWEST_PROMPTS` prompts.
      n: of soft best-of-n, as of ``settings``.
      temperature: at which the samples were drawn; passed on.
      seed: of the bootstrap.

    Returns:
      The content of ``choose.json``: "temperature", "prompts" (P), "n_max" (M), "level" (0.95);
      "peak", "recommended", "over_optimised_from" and "over_optimised_to" (see `Decision`);
      "falls_short", [mean, low, high] of how much higher the evaluator's mean is at the peak than
      at the recommended n; "why", in words; "win_rate", the first four by the evaluator's win
      rate; and "rows", of each setting "family", "n", "rate", "temperature" (as of `Setting`),
      "kl_ref" in nats, the mean of each of `QUANTITIES` with its simultaneous "_band", [low, high],
      and "below_peak", [mean, low, high] of how much higher the evaluator's mean is at the peak of
      best-of-n.

    Raises:
      InputError: for fewer prompts, or scores that are not finite.
    """
    prompts, m = samples.rewards_PxM.shape
    if prompts < FEWEST_PROMPTS:
        raise InputError(
            f"{prompts} held-out prompts: bands over prompts need at least {FEWEST_PROMPTS}; raise "
            "prompts.test"
        )
    for name, scores in (("reward", samples.rewards_PxM), ("evaluator", samples.evaluator_PxM)):
        wrong = int((~np.isfinite(scores)).sum())
        if wrong:
            raise InputError(
                f"{wrong} of {scores.size} scores of the {name} are not finite; find the responses "
                "that it cannot score"
            )
    every = settings(samples, n)
    rng = np.random.default_rng(seed)
    found = {
        name: bands.simultaneous(np.stack([s.means[name] for s in every], axis=1), rng, LEVEL)
        for name in QUANTITIES
    }
    decision = decide(found[DECIDES], m)
    peak = decision.peak - 1
    rows = [
        {
            "family": s.family,
            "n": s.n,
            "rate": s.rate,
            "temperature": s.temperature,
            "kl_ref": max(0.0, float(s.kl_P.mean())),  # at n = 1 rounding may leave -1e-17
            **_means(found, k),
            "below_peak": _difference(found[DECIDES], peak, k),
        }
        for k, s in enumerate(every)
    ]
    falls_short = rows[decision.recommended - 1]["below_peak"]
    return {
        "temperature": temperature,
        "prompts": prompts,
        "n_max": m,
        "level": LEVEL,
        **decision._asdict(),
        "falls_short": falls_short,
        "why": why(decision, m, found[DECIDES].mean_K, falls_short),
        "win_rate": decide(found["evaluator_win_rate"], m)._asdict(),
        "rows": rows,
    }


class Decision(NamedTuple):
    """Values of n by the rule above.

    Attributes:
      peak: where the mean is highest; the smallest such n.
      recommended: the smallest n that is not told apart from the peak.
      over_optimised_from: the first n above the peak that is told apart from it, if any.
      over_optimised_to: the last of the unbroken row of such n that begins there.
    """

    peak: int
    recommended: int
    over_optimised_from: int | None
    over_optimised_to: int | None


def decide(found: Bands, m: int) -> Decision:
    """Applies the rule to a curve whose first m points are best-of-n, n = 1..m."""
    peak = int(found.mean_K[:m].argmax())
    apart = found.difference_KxK[peak, :m] > found.difference_half_KxK[peak, :m]
    recommended = int(np.flatnonzero(~apart)[0]) + 1
    worse = np.flatnonzero(apart[peak:]) + peak + 1
    if not len(worse):
        return Decision(peak + 1, recommended, None, None)
    unbroken = worse[worse - np.arange(len(worse)) == worse[0]]
    return Decision(peak + 1, recommended, int(worse[0]), int(unbroken[-1]))


def why(decision: Decision, m: int, mean_K: np.ndarray, falls_short: Sequence[float]) -> str:
    """One sentence on over-optimisation, and one on what the recommended n follows from."""
    peak, best, worse, last = decision
    if worse is None:
        seen = f"No over-optimisation seen up to n = {m}"
    else:
        to = "on" if last == m else f"to n = {last}"
        seen = (
            f"Best-of-n is over-optimised from n = {worse} {to}: the evaluator's mean is lower "
            f"there than at its peak, n = {peak}"
        )
    near = (
        f"not told apart from the highest ({mean_K[peak - 1]:.3f}, at n = {peak}); it is at most "
        f"{falls_short[2]:.3f} lower"
    )
    mean = f"mean of the evaluator ({mean_K[best - 1]:.3f})"
    if best == peak == 1:
        reason = f"n = 1, the reference itself, has the highest {mean}"
    elif best == 1:
        reason = f"The {mean} of n = 1, the reference itself, is {near}"
    elif best == peak:
        reason = f"n = {best} has the highest {mean}, and every smaller n is told apart from it"
    else:
        reason = f"n = {best} is the smallest whose {mean} is {near}"
    if best == 1:
        reason += ", so that best-of-n is not seen to gain anything"
    return f"{seen}. {reason} (95% bands, all n at once)."


def _means(found: dict[str, Bands], k: int) -> dict[str, Any]:
    """The means of a setting with their bands."""
    out: dict[str, Any] = {}
    for name, b in found.items():
        mean, half = float(b.mean_K[k]), float(b.half_K[k])
        out |= {name: mean, f"{name}_band": [mean - half, mean + half]}
    return out


def _difference(found: Bands, at: int, k: int) -> list[float]:
    """How much higher the mean is at a point than at another: [mean, low, high]."""
    mean = float(found.difference_KxK[at, k])
    half = float(found.difference_half_KxK[at, k]) if at != k else 0.0
    return [mean, mean - half, mean + half]
