"""Which n of a family spends a budget of KL, or reaches a reward, on held-out prompts."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.evaluation import measure
from vbon_jax.progress import log
from vbon_jax.rewards.base import Reward
from vbon_jax.sampling.family import Family
from vbon_jax.sampling.requests import requests_for
from vbon_jax.sampling.sampler import Sampler

CLOSE = 0.02  # of log n: a narrower interval is not divided further


@dataclasses.dataclass(frozen=True)
class HeldOutMeans:
    """What a policy has on held-out prompts, by the same random numbers for every n.

    Attributes:
      reference: of the KL.
      prompts: held-out ones.
      reward: of responses.
      each: responses a prompt.
      batch_size: responses drawn at once.
      key: of the draws.
    """

    reference: Sampler
    prompts: Sequence[Prompt]
    reward: Reward
    each: int
    batch_size: int
    key: jax.Array

    def of(self, policy: Sampler) -> dict[str, float]:
        """KL(policy || reference), nats a response, as "kl", and the mean "reward"."""
        kls: list[float] = []
        rewards: list[float] = []
        for group in policy.responses(
            self.key, self.prompts, requests_for(self.prompts, self.each), self.batch_size,
            self.reward, lambda batch: measure.sequence_kls(
                policy.model, self.reference.model, batch)
        ):  # fmt: skip
            kls += [r.extra["kl"] for r in group]
            rewards += [r.reward for r in group]
        return {"kl": float(np.mean(kls)), "reward": float(np.mean(rewards))}


def n_for(family: Family, means: HeldOutMeans, name: str, target: float) -> float:
    """The n at which a mean that grows with n is what is asked for.

    By bisection of log n: where noise or training leaves the mean not quite monotone, one of the
    crossings.

    Args:
      family: the policies.
      means: how they are measured.
      name: "kl" or "reward".
      target: its value.

    Returns:
      n, from 1 to the family's largest.

    Raises:
      InputError: the target is below that of the reference or above that of the largest n.
    """

    def value(n: float) -> float:
        found = means.of(family.at(n))
        log(f"n={n:.3g}: KL to ref {found['kl']:.3f} nats, reward {found['reward']:.3f}")
        return found[name]

    return crossing(value, target, family.n[1], name)


def crossing(value: Callable[[float], float], target: float, top: float, name: str) -> float:
    """The n in [1, top] where ``value``, which grows, is ``target``; see ``n_for``."""
    low, high = 0.0, math.log(top)
    ends = value(1.0), value(top)
    if not ends[0] <= target <= ends[1]:
        raise InputError(
            f"--{name}={target:g}: the family has {ends[0]:.3g} at n=1 and {ends[1]:.3g} at "
            f"n={top:g} on the held-out prompts; give a value between, or train with a larger "
            "method.n"
        )
    below, above = ends
    while high - low > CLOSE:
        middle = (low + high) / 2
        here = value(math.exp(middle))
        if here < target:
            low, below = middle, here
        else:
            high, above = middle, here
    share = 0.5 if above == below else (target - below) / (above - below)
    return math.exp(low + min(max(share, 0.0), 1.0) * (high - low))
