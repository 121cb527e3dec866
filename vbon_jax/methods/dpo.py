"""DPO (Rafailov et al., 2023) on pairs of the stored samples."""

import dataclasses
import itertools

import jax
import numpy as np

from vbon_jax.bon import targets
from vbon_jax.errors import InputError
from vbon_jax.methods.base import (
    Method,
    Offline,
    Options,
    Series,
    beta_key,
    taken,
)
from vbon_jax.rl import preference
from vbon_jax.training import offline
from vbon_jax.training.learner import Member
from vbon_jax.training.options import LABELS
from vbon_jax.training.options import Offline as OfflineKeys


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO(Options):
    """Options of DPO.

    Attributes:
      beta: coefficient of the implied KL(policy || reference).
      n: of the best-of-n that the policy is compared with; DPO itself has none.
      estimator: of log F, for the KL to best-of-n in the evaluation.
      ties: how that best-of-n chooses among equal rewards.
    """

    beta: float = beta_key()


def choose(
    rewards_PxM: np.ndarray,
    member: Member,
    settings: OfflineKeys,
    order_PxM: np.ndarray | None = None,
) -> offline.Choices:
    """Of the pairs that the first ``offline.responses`` samples of a prompt make, some at random.

    Each of the ``offline.pairs`` pairs of a prompt is another one; best is the one of higher
    reward. Under "hard" labels it is preferred with probability 1 (1/2 at a tie), under "soft" ones
    with the Bradley-Terry probability sigmoid(r(best) - r(worst)).

    Raises:
      InputError: numbers that m samples cannot serve; names them.
    """
    del order_PxM
    rewards_PxM = np.asarray(rewards_PxM, np.float64)
    m, responses = rewards_PxM.shape[1], settings.responses
    if not 2 <= responses <= m:
        raise InputError(
            f"responses = {responses} must be between 2 and the m = {m} samples of a prompt"
        )
    if settings.labels not in LABELS:
        raise InputError(f"labels = {settings.labels!r} must be one of {', '.join(LABELS)}")
    offline.check_pairs(settings.pairs, responses * (responses - 1) // 2, responses)
    rng = np.random.default_rng(member.seed)
    combinations_Cx2 = np.array(list(itertools.combinations(range(responses), 2)))
    order_PxC = np.argsort(rng.random((len(rewards_PxM), len(combinations_Cx2))), axis=1)
    first, second = np.moveaxis(combinations_Cx2[order_PxC[:, : settings.pairs]], -1, 0)
    lead = np.take_along_axis(rewards_PxM, first, 1) - np.take_along_axis(rewards_PxM, second, 1)
    best, worst = np.where(lead >= 0, (first, second), (second, first))
    soft = 1 / (1 + np.exp(-np.abs(lead)))  # 1/2 at a tie
    hard = np.where(lead == 0, 0.5, 1.0)
    return offline.examples(m, best, worst, soft if settings.labels == "soft" else hard)


def loss(
    log_policy_best_B: jax.Array,
    best_B: jax.Array,
    worst_B: jax.Array,
    target_B: jax.Array,
    beta: jax.Array,
    alpha: jax.Array,
) -> jax.Array:
    """``rl.preference.dpo_loss``, [B]."""
    del log_policy_best_B, alpha
    return preference.dpo_loss(best_B, worst_B, beta, target_B)


def optimum(
    log_ref_S: np.ndarray, rewards_S: np.ndarray, n: float, beta: float, settings: OfflineKeys
) -> np.ndarray | None:
    """pi_ref exp(r / beta) / Z, reached under soft labels; None under hard ones."""
    del n
    return None if settings.labels == "hard" else targets.tilted(log_ref_S, rewards_S, beta)


def _check_samples(settings: OfflineKeys, m: int) -> str:
    most = settings.responses * (settings.responses - 1) // 2
    if settings.pairs > most:
        return (
            f"offline.pairs={settings.pairs} is more than the {most} pairs of "
            f"offline.responses={settings.responses}"
        )
    if settings.responses > m:
        return f"offline.responses={settings.responses} is more than samples.m={m}"
    return ""


METHOD = Method(
    name="dpo",
    options=DPO,
    from_config=lambda config: taken(DPO, config.method),
    learns=Offline(choose=choose, loss=loss),
    check_samples=_check_samples,
    series=(
        Series(
            label="dpo", name="DPO", color="#cc79a7", marker="^",
            doc="Values of beta of dpo.", varies="beta",
            optimum=optimum, formula="pi_ref exp(r / beta) / Z",
        ),
    ),
)  # fmt: skip
