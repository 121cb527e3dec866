"""Maximum likelihood on best-of-n (BoN-SFT): the stored samples, each by its weight as the winner.

The weights are those of the order statistics, so the loss is KL(best-of-n || policy) up to a
constant, and nothing is left to the chance of which samples met in a draw of n.
"""

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
    """``offline.pairs`` of each prompt's samples, in proportion to their weights.

    Sample i comes ``offline.pairs`` times its weight, rounded up or down at random.

    Raises:
      InputError: n or the number of pairs is one that m samples cannot serve.
    """
    rewards_PxM = np.asarray(rewards_PxM, np.float64)
    offline.check_pairs(settings.pairs)
    offline.check_n("bon_sft", member.n, member.m, 1)
    rng = np.random.default_rng(member.seed)
    chosen = pool.resample(rng, weights(rewards_PxM, member, order_PxM), settings.pairs)
    return offline.examples(rewards_PxM.shape[1], chosen, chosen, np.ones(chosen.shape))


def weights(
    rewards_PxM: np.ndarray, member: Member, order_PxM: np.ndarray | None = None
) -> np.ndarray:
    """The probability of each of the member's stored samples to be the best of n, [P, M]."""
    m = member.m
    order = None if order_PxM is None else order_PxM[:, :m]
    own = pool.winner_weights(rewards_PxM[:, :m], int(member.n), order)
    return np.pad(own, ((0, 0), (0, rewards_PxM.shape[1] - m)))


METHOD = Method(
    name="bon_sft",
    options=BoNSFT,
    from_config=lambda config: taken(BoNSFT, config.method),
    learns=Offline(choose=choose, weights=weights),
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
