"""KL(policy || best-of-n), its two parts, and where along F the second is lost.

    KL(policy || bon) = [KL(policy || ref) - KL(bon || ref)] + [E_bon[w] - E_policy[w]],
                         excess                                 lost

w = log(pi_bon / pi_ref). The excess is divergence from the reference beyond best-of-n's own; what
is lost is the gain that a policy of best-of-n's own divergence would have. Best-of-n's terms are
exact integrals (``bon.quantiles.best_of_n``), with no variance where no rewards tie, so that all
noise is the policy's.

The log ratios of a policy's responses come from their ranks among the m opponents of the prompt,
by the jackknife of ``interval`` (``bon.jackknife``, whose table says what bias is left; other
estimators keep theirs). The variance is then reduced by a control variate: the log-ratio
k1 = log pi / pi_ref of a response less its KL summed over positions has mean 0, and where the
policy is near best-of-n its noise is that of w. Ranks blur F, by sqrt(F (1 - F) / m), which moves
up to 0.008 nats between bins at m = 160 (0.02 at 64) and changes no sum.

Intervals are over prompts (``compare.over_prompts``). Each prompt has its own responses and its own
opponents, so that the spread between prompts holds the noise of both, and of the prompts
themselves. It does not hold what all prompts share: the training seed and the reward model. The
mean over prompts is near enough to normal in spite of the tails (w reaches -29 nats at the lowest
of 64 ranks, n = 8): with 0.2, 2 or 10% of a policy's responses drawn from the reference, the
interval covers 93 to 97% of the time with 128 prompts and more, of 4 to 32 responses each, as do
Hall's transformed t and the bootstrap-t. With 20 prompts of 4 it covers 87 to 93%.
"""

import itertools
from typing import Any

import numpy as np

from vbon_jax.bon import quantiles
from vbon_jax.evaluation import compare

EDGES = (0.0, 0.5, 0.75, 0.9, 1.0)  # of the bins of F
NAMES = ("kl_excess", "kl_excess_ci95", "kl_lost", "kl_lost_ci95", "kl_lost_by_quantile")


def without_noise(values: np.ndarray, noise_PxS: np.ndarray) -> np.ndarray:
    """Subtracts the multiple of a noise of mean 0 that leaves the least variance.

    It is linear in the values, so that parts of a sum stay parts of it. The multiple comes from the
    same responses, which biases means by order 1 / (P S).

    Args:
      values: of responses, [P, S] or [P, S, Q].
      noise_PxS: of the same responses; its expectation is 0 for each prompt.
    """
    power = np.mean(noise_PxS**2)
    if not power:
        return values
    centred = values - values.mean(axis=(0, 1))
    noise = noise_PxS.reshape(noise_PxS.shape + (1,) * (values.ndim - 2))
    return values - np.mean(centred * noise, axis=(0, 1)) / power * noise


def parts(
    kl: np.ndarray,
    kl_k1: np.ndarray,
    log_ratio: np.ndarray,
    spans: tuple[np.ndarray, np.ndarray],
    bon: quantiles.Parts,
) -> dict[str, Any]:
    """The parts of KL(policy || bon) of P prompts with S responses each.

    Args:
      kl: estimates [P, S] of KL(policy || ref), those of least variance, nats.
      kl_k1: log pi / pi_ref of the same responses.
      log_ratio: their estimated log(pi_bon / pi_ref).
      spans: where on F each response begins and ends, [P, S] each.
      bon: best-of-n's own parts in the bins ``EDGES``.

    Returns:
      "kl_bon", "kl_excess" and "kl_lost", each with "_ci95", the last two with the first as sum;
      "kl_lost_by_quantile": of each bin of F its "from" and "to", the shares "policy" and "bon" of
      responses in it, and "lost" and "lost_ci95", which sum to kl_lost.
    """
    inside = quantiles.overlaps(*spans, EDGES)
    by_bin = without_noise(inside * log_ratio[..., None], kl_k1 - kl)  # [P, S, Q]
    ratio_P, kl_P = by_bin.sum(axis=2).mean(axis=1), kl.mean(axis=1)
    own_P = bon.log_ratio_PxQ.sum(axis=1)
    named = {"kl_bon": kl_P - ratio_P, "kl_excess": kl_P - own_P, "kl_lost": own_P - ratio_P}
    out: dict[str, Any] = {}
    for name, values in named.items():
        estimate = compare.over_prompts(values)
        out |= {name: estimate.mean, f"{name}_ci95": estimate.ci95}
    lost = [compare.over_prompts(x) for x in (bon.log_ratio_PxQ - by_bin.mean(axis=1)).T]
    out["kl_lost_by_quantile"] = [
        {
            "from": low,
            "to": high,
            "policy": float(inside[..., at].mean()),
            "bon": float(bon.share_PxQ[:, at].mean()),
            "lost": lost[at].mean,
            "lost_ci95": lost[at].ci95,
        }
        for at, (low, high) in enumerate(itertools.pairwise(EDGES))
    ]
    return out
