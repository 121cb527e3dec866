"""Where an online method starts from: the reference, or a policy learned from the stored samples.

The m scored samples a prompt that log F is estimated from are on-policy rollouts for the first
steps of a policy, which so need no new ones.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vbon_jax.methods import bon_sft
from vbon_jax.methods.learning import Job
from vbon_jax.training import policies
from vbon_jax.training.learner import Member
from vbon_jax.training.options import REFERENCE
from vbon_jax.training.state import TrainState


def job(online: Job) -> Job | None:
    """The training that a policy starts with; None where it starts as the reference.

    It is maximum likelihood on best-of-n, `methods.bon_sft`, under the keys of ``offline``.
    """
    options = online.options
    if not online.method.online or online.training.train.start == REFERENCE:
        return None
    likelihood = bon_sft.BoNSFT(n=options.n, estimator=options.estimator, ties=options.ties)
    return dataclasses.replace(online, method=bon_sft.METHOD, options=likelihood, value=None)


def member(of: Member) -> Member:
    """Whom the start of ``of`` is trained for: best of the nearest whole n that m samples have."""
    return dataclasses.replace(of, n=float(min(max(round(of.n), 1), of.m)))


def policy(found: TrainState) -> Any:
    """What ``models.trainable`` trains of the reference, in the last state of `job`."""
    return policies.policy(found.params)


def begun(fresh: TrainState, own: Any) -> TrainState:
    """A first state, of one policy or of a population, that begins with the policy ``own``.

    Both are used up: no array of theirs stays in memory beside those of the state.
    """
    copies = {
        name: jax.tree.map(jnp.copy, own)
        for name in (policies.AVERAGE, "anchor")
        if name in fresh.params
    }
    begins = {"decoder": own} | copies
    for x in jax.tree.leaves([fresh.params[name] for name in begins]):
        x.delete()
    return fresh._replace(params=fresh.params | begins)
