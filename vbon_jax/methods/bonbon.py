"""BoNBoN (Gui et al., 2024): likelihood of the best, and a regression on best against worst."""

import dataclasses

import jax
import numpy as np

from vbon_jax.bon import enumeration, pool, targets
from vbon_jax.methods.base import (
    Method,
    Offline,
    Options,
    Series,
    taken,
)
from vbon_jax.rl import preference
from vbon_jax.training import offline
from vbon_jax.training.learner import Member
from vbon_jax.training.options import Offline as OfflineKeys


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoNBoN(Options):
    """Options of BoNBoN.

    Attributes:
      n: of best-of-n, a whole number of at least 2 and at most the samples stored.
      estimator: of log F, for the KL to best-of-n in the evaluation.
      ties: how the best-of-n of the evaluation chooses among equal rewards.
    """


def choose(
    rewards_PxM: np.ndarray,
    member: Member,
    settings: OfflineKeys,
    order_PxM: np.ndarray | None = None,
) -> offline.Choices:
    """Best and worst of the same n of each prompt's samples, ``offline.pairs`` times a prompt.

    The n are drawn without replacement; tied rewards are broken at random.

    Raises:
      InputError: n or the number of pairs is one that m samples cannot serve.
    """
    del order_PxM
    rewards_PxM = np.asarray(rewards_PxM, np.float64)
    m = rewards_PxM.shape[1]
    offline.check_pairs(settings.pairs)
    offline.check_n("bonbon", member.n, m, 2)  # a best, and a worst beside it
    rng = np.random.default_rng(member.seed)
    best, worst = pool.sample_best_and_worst(rng, rewards_PxM, int(member.n), settings.pairs)
    return offline.examples(m, best, worst, np.ones(best.shape))


def coefficients(member: Member, nll: float) -> tuple[float, float]:
    """beta_n, and the alpha at which both terms weigh alike while the policy is the reference."""
    beta = preference.bonbon_beta(int(member.n))
    return beta, preference.bonbon_alpha(nll, beta)


def loss(
    log_policy_best_B: jax.Array,
    best_B: jax.Array,
    worst_B: jax.Array,
    target_B: jax.Array,
    beta: jax.Array,
    alpha: jax.Array,
) -> jax.Array:
    """``rl.preference.bonbon_loss``, [B]."""
    del target_B
    return preference.bonbon_loss(log_policy_best_B, best_B, worst_B, beta, alpha)


def optimum(
    log_ref_S: np.ndarray, rewards_S: np.ndarray, n: float, beta: float, settings: OfflineKeys
) -> np.ndarray | None:
    """The minimiser of the loss over an enumerated world; None where rewards tie."""
    del beta, settings
    if len(np.unique(rewards_S)) < len(rewards_S):
        return None
    log_bon_S = enumeration.log_bon(log_ref_S, rewards_S, n)
    nll = -float(np.sum(np.exp(log_bon_S) * log_ref_S))
    alpha = preference.bonbon_alpha(nll, preference.bonbon_beta(int(n)))
    return targets.bonbon(log_ref_S, rewards_S, int(n), alpha)


METHOD = Method(
    name="bonbon",
    options=BoNBoN,
    from_config=lambda config: taken(BoNBoN, config.method),
    learns=Offline(choose=choose, coefficients=coefficients, loss=loss),
    whole_n=True,
    check_n=lambda n: "" if n >= 2 else "bonbon needs a best and a worst, n of at least 2",
    series=(
        Series(
            label="bonbon", name="BoNBoN", color="#e69f00", marker="D",
            doc="Values of n of bonbon.",
            optimum=optimum, formula="argmin of its loss",
        ),
    ),
)  # fmt: skip
