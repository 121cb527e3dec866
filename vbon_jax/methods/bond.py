"""BOND, backward form (Sessa et al., 2024): PPO on log p_<=(y), KL coefficient 1/(n-1)."""

import dataclasses
from functools import partial

from vbon_jax.bon import targets
from vbon_jax.methods import vbon
from vbon_jax.methods.base import (
    Method,
    Online,
    Options,
    Series,
    taken,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BOND(Options):
    """Options of BOND's backward form.

    Attributes:
      n: of best-of-n, above 1.
      estimator: of log F.
      ties: how best-of-n chooses among equal rewards.
    """


def check_n(n: float) -> str:
    """Why n cannot be that, "" where it can."""
    return "" if n > 1 else "bond has the KL coefficient 1/(n-1), so n must be above 1"


METHOD = Method(
    name="bond",
    options=BOND,
    from_config=lambda config: taken(BOND, config.method),
    learns=Online(
        build=lambda options, setup: partial(vbon.update, setup=setup),
        iteration=vbon.iteration,
        objective=lambda options: "backward",
    ),
    when=lambda config: config.bond.form == "backward",
    check_n=check_n,
    series=(
        Series(
            label="bond", name="BOND", color="#56b4e9", marker="v",
            doc="Values of n of bond in its backward form.", variant="backward",
            optimum=lambda log_ref, rewards, n, *_: targets.bond_backward(log_ref, rewards, n),
            formula="pi_ref p_<=^(n-1) / Z",
        ),
    ),
)  # fmt: skip
