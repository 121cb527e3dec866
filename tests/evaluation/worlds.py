"""A population of prompts whose responses are listed: what best-of-n has there is known exactly."""

import numpy as np

from vbon_jax.bon import enumeration

TYPES, RESPONSES, TOP = 60, 12, 6.0


def population(kind):
    """Probabilities, rewards (with ties) and evaluator's values of every response, [Q, S] each.

    Of "hacked" the evaluator rises with the reward and falls at the highest one, which is rare; of
    "flat" it has the same mean at every reward, so that every n is as good.
    """
    rng = np.random.default_rng(7)
    rewards_QxS = rng.integers(0, TOP + 1, (TYPES, RESPONSES)).astype(np.float32)
    p_QxS = rng.dirichlet(np.full(RESPONSES, 0.7), TYPES)
    p_QxS *= np.where(rewards_QxS == TOP, 0.2, 1.0)
    p_QxS /= p_QxS.sum(axis=1, keepdims=True)
    noise_QxS = rng.exponential(1.0, (TYPES, RESPONSES))
    if kind == "hacked":
        return p_QxS, rewards_QxS, np.where(rewards_QxS < TOP, rewards_QxS, -1.0) + noise_QxS
    tied_QxSxS = rewards_QxS[:, :, None] == rewards_QxS[:, None]
    mass_QxS = (tied_QxSxS * p_QxS[:, None]).sum(axis=2)
    within_QxS = (tied_QxSxS * (p_QxS * noise_QxS)[:, None]).sum(axis=2) / mass_QxS
    return p_QxS, rewards_QxS, noise_QxS - within_QxS + rng.exponential(1.0, (TYPES, 1))


def true_curve(world, m):
    """The evaluator's mean under best-of-n over the population, n = 1..m, by enumeration."""
    return np.array([
        np.mean([np.exp(enumeration.log_bon(np.log(p), r, n)) @ v for p, r, v in zip(*world)])
        for n in range(1, m + 1)
    ])  # fmt: skip


def drawn(world, prompts, m, rng):
    """Rewards and evaluator's values [prompts, m] of fresh prompts and responses."""
    p_QxS, rewards_QxS, values_QxS = world
    type_P = rng.integers(0, TYPES, prompts)
    upto_PxS = np.cumsum(p_QxS, axis=1)[type_P, :-1]
    column_PxM = (rng.random((prompts, m))[:, :, None] > upto_PxS[:, None]).sum(axis=2)
    return tuple(
        np.take_along_axis(table[type_P], column_PxM, axis=1) for table in (rewards_QxS, values_QxS)
    )
