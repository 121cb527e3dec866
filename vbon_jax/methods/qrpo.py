"""QRPO (Matrenok et al., 2025): regression of log-ratios on the quantiles of stored samples."""

import dataclasses

import jax
import numpy as np

from vbon_jax.bon import pool, targets
from vbon_jax.methods.base import (
    Method,
    Offline,
    Options,
    Series,
    beta_key,
    taken,
)
from vbon_jax.rl import pointwise
from vbon_jax.training import offline
from vbon_jax.training.learner import Member
from vbon_jax.training.options import Offline as OfflineKeys


@dataclasses.dataclass(frozen=True, kw_only=True)
class QRPO(Options):
    """Options of QRPO.

    Attributes:
      beta: coefficient of KL(policy || reference); under ``offline.transform`` = "log", 1/(n-1)
        gives best-of-n.
      n: of the best-of-n that the policy is compared with; QRPO itself has none.
      estimator: of log F, for the KL to best-of-n in the evaluation.
      ties: "order" takes quantiles in the total order of responses; "random" ties equal rewards.
    """

    beta: float = beta_key()


def choose(
    rewards_PxM: np.ndarray,
    member: Member,
    settings: OfflineKeys,
    order_PxM: np.ndarray | None = None,
) -> offline.Choices:
    """``offline.pairs`` of each prompt's samples, and the log-ratio that each should have.

    The samples come in random order, all m once before any of them twice. Quantiles are those of
    the m samples, each counted itself: exp(log-ratio) has mean 1 over them.

    Raises:
      InputError: fewer than one example a prompt.
    """
    rewards_PxM = np.asarray(rewards_PxM, np.float64)
    prompts, m = rewards_PxM.shape
    offline.check_pairs(settings.pairs)
    low_PxM, high_PxM = pool.quantiles(rewards_PxM, order_PxM)
    with np.errstate(divide="ignore"):  # F = 0 of the lowest
        log_f_PxM = np.log(low_PxM)
    ratio_PxM = targets.qrpo_log_ratio(
        log_f_PxM, np.log(high_PxM - low_PxM), member.beta, settings.transform
    )
    rng = np.random.default_rng(member.seed)
    rounds = -(-settings.pairs // m)
    columns_PxRxM = np.broadcast_to(np.arange(m), (prompts, rounds, m))
    chosen = rng.permuted(columns_PxRxM, axis=-1).reshape(prompts, -1)[:, : settings.pairs]
    return offline.examples(m, chosen, chosen, np.take_along_axis(ratio_PxM, chosen, axis=1))


def loss(
    log_policy_B: jax.Array,
    log_ratio_B: jax.Array,
    worst_B: None,
    target_B: jax.Array,
    beta: jax.Array,
    alpha: jax.Array,
) -> jax.Array:
    """``rl.pointwise.qrpo_loss``, [B]."""
    del log_policy_B, worst_B, alpha
    return pointwise.qrpo_loss(log_ratio_B, target_B, beta)


METHOD = Method(
    name="qrpo",
    options=QRPO,
    from_config=lambda config: taken(QRPO, config.method),
    learns=Offline(choose=choose, loss=loss, pairs=False),
    series=(
        Series(
            label="qrpo", name="QRPO", color="#6a3d9a", marker="p",
            doc="Values of beta of qrpo with the log of the quantile.", varies="beta",
            offline={"transform": "log"}, variant="log",
            optimum=lambda log_ref, rewards, n, beta, _: targets.qrpo(
                log_ref, rewards, beta, "log"
            ),
            formula="pi_ref q^(1 / beta) / Z",
        ),
        Series(
            label="qrpo_identity", name="QRPO, identity", color="#b15928", marker="h",
            doc="Values of beta of qrpo with the quantile itself.", varies="beta",
            offline={"transform": "identity"}, variant="identity", in_front=False,
            optimum=lambda log_ref, rewards, n, beta, _: targets.qrpo(
                log_ref, rewards, beta, "identity"
            ),
            formula="pi_ref exp(q / beta) / Z",
        ),
    ),
)  # fmt: skip
