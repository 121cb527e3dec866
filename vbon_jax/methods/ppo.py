"""PPO on the KL-regularised reward (Eq. 1 of the paper): the usual RLHF baseline."""

import dataclasses
from functools import partial

from vbon_jax.bon import targets
from vbon_jax.methods import vbon
from vbon_jax.methods.base import (
    Method,
    Online,
    Options,
    Series,
    beta_key,
    taken,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(Options):
    """Options of PPO.

    Attributes:
      beta: coefficient of KL(policy || reference).
      n: of the best-of-n that the metric KL(policy || best-of-n) is about; PPO itself has none.
      estimator: of log F, for that metric.
      ties: how that best-of-n chooses among equal rewards.
    """

    beta: float = beta_key()


METHOD = Method(
    name="ppo",
    options=PPO,
    from_config=lambda config: taken(PPO, config.method),
    learns=Online(
        build=lambda options, setup: partial(vbon.update, setup=setup),
        iteration=vbon.iteration,
        objective=lambda options: "reward",
    ),
    series=(
        Series(
            label="ppo", name="PPO", color="#009e73", marker="s",
            doc="Values of beta of ppo.", varies="beta",
            optimum=lambda log_ref, rewards, n, beta, _: targets.tilted(log_ref, rewards, beta),
            formula="pi_ref exp(r / beta) / Z",
        ),
    ),
)  # fmt: skip
