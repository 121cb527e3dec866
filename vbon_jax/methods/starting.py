"""Where an online method starts from: the reference, or a policy learned from the stored samples.

The m scored samples a prompt that log F is estimated from are on-policy rollouts for the first
steps of a policy, which so need no new ones.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vbon_jax.errors import InputError
from vbon_jax.methods import bon_sft
from vbon_jax.methods.learning import Job
from vbon_jax.training import policies
from vbon_jax.training.options import REFERENCE
from vbon_jax.training.state import TrainState


def job(online: Job) -> Job | None:
    """The training that a policy starts with; None where it starts as the reference.

    It is maximum likelihood on best-of-n, `methods.bon_sft`, under the keys of ``offline``.

    Raises:
      InputError: n is no whole number.
    """
    options, begins = online.options, online.training.train.start
    if not online.method.online or begins == REFERENCE:
        return None
    if options.n % 1:
        raise InputError(
            f"train.start={begins} needs a whole number n, and method.n is {options.n:g}: set "
            f"train.start={REFERENCE}"
        )
    likelihood = bon_sft.BoNSFT(n=options.n, estimator=options.estimator, ties=options.ties)
    return dataclasses.replace(online, method=bon_sft.METHOD, options=likelihood, value=None)


def policy(found: TrainState) -> Any:
    """What ``models.trainable`` trains of the reference, in the last state of `job`."""
    return policies.policy(found.params)


def begun(fresh: TrainState, own: Any) -> TrainState:
    """A first state, of one policy or of a population, that begins with the policy ``own``."""
    copies = {
        name: jax.tree.map(jnp.copy, own)
        for name in ("decoder", policies.AVERAGE, "anchor")
        if name in fresh.params
    }
    return fresh._replace(params=fresh.params | copies)
