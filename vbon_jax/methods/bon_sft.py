"""Maximum likelihood on the winners of best-of-n among the stored samples (BoN-SFT)."""

import dataclasses

import numpy as np

from vbon_jax.bon import enumeration, pool
from vbon_jax.methods.base import (
    Method,
    Offline,
    Options,
    Series,
    taken,
)
from vbon_jax.training import offline
from vbon_jax.training.learner import Member
from vbon_jax.training.options import Offline as OfflineKeys


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoNSFT(Options):
    """Options of maximum likelihood on best-of-n's winners.

    Attributes:
      n: of best-of-n, a whole number of at most the samples stored.
      estimator: of log F, for the KL to best-of-n in the evaluation.
      ties: how best-of-n chooses among equal rewards.
    """


def choose(
    rewards_PxM: np.ndarray,
    member: Member,
    settings: OfflineKeys,
    order_PxM: np.ndarray | None = None,
) -> offline.Choices:
    """The best of n of each prompt's m samples, drawn ``offline.pairs`` times a prompt.

    The n are drawn without replacement; tied rewards are broken at random, or by ``order_PxM``.

    Raises:
      InputError: n or the number of pairs is one that m samples cannot serve.
    """
    rewards_PxM = np.asarray(rewards_PxM, np.float64)
    m = rewards_PxM.shape[1]
    offline.check_pairs(settings.pairs)
    offline.check_n("bon_sft", member.n, m, 1)
    rng = np.random.default_rng(member.seed)
    best = pool.sample_winners(rng, rewards_PxM, int(member.n), settings.pairs, order_PxM)
    return offline.examples(m, best, best, np.ones(best.shape))


METHOD = Method(
    name="bon_sft",
    options=BoNSFT,
    from_config=lambda config: taken(BoNSFT, config.method),
    learns=Offline(choose=choose),
    whole_n=True,
    series=(
        Series(
            label="bon_sft", name="BoN-SFT", color="#1a1a1a", marker="X",
            doc="Values of n of bon_sft.",
            in_front=False,
            optimum=lambda log_ref, rewards, n, *_: enumeration.log_bon(log_ref, rewards, n),
            formula="pi_bon",
        ),
    ),
)  # fmt: skip
