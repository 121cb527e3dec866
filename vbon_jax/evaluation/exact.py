"""Exact figures of worlds small enough that every response is enumerated."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import sharding
from vbon_jax.bon import correction, enumeration
from vbon_jax.models import log_probs
from vbon_jax.models.lm import LanguageModel


class World(NamedTuple):
    """A task whose responses are enumerated.

    Attributes:
      prompts: token ids of P prompts of one length.
      strings_SxT: int32, every possible response, all of T tokens.
      rewards_PxS: float64, the reward of each response to each prompt.
      order_S: the responses' places in the total order that breaks ties; None breaks them at
        random.
      temperature: of policy and reference.
    """

    prompts: Sequence[tuple[int, ...]]
    strings_SxT: np.ndarray
    rewards_PxS: np.ndarray
    order_S: np.ndarray | None
    temperature: float


@partial(jax.jit, static_argnames=("config", "length"))
def _teacher_forced(params, tokens_SxL, length, temperature, *, config):
    found = log_probs.log_probs(
        params, config, tokens_SxL, jnp.ones_like(tokens_SxL, bool), length, temperature
    )
    return jnp.sum(found, axis=-1)


def string_log_probs(
    model: LanguageModel, prompt: tuple[int, ...], strings_SxT: np.ndarray, temperature: float
) -> np.ndarray:
    """Log p(string | prompt) of every string, float64 nats [S], normalised over the strings."""
    count, length = strings_SxT.shape
    tokens = np.concatenate([np.tile(np.array(prompt, np.int32), (count, 1)), strings_SxT], axis=1)
    found = _teacher_forced(model.params, tokens, length, temperature, config=model.config)
    log_p = np.asarray(sharding.fetch(found), np.float64)
    # The world is closed, so what is missing from 1 is float32 rounding (about 1e-6).
    return log_p - np.logaddexp.reduce(log_p)


def figures(
    policy: LanguageModel,
    reference: LanguageModel,
    world: World,
    n: float,
    bound: float = correction.BOUND,
) -> dict[str, float]:
    """Exact figures of a policy, averaged over the prompts; nats.

    Args:
      policy: a model of the world.
      reference: likewise.
      world: its prompts, responses and rewards.
      n: of best-of-n.
      bound: of ``bon.correction``.

    Returns:
      "kl_bon" KL(policy || bon), "kl_ref" KL(policy || ref), "win_rate" of the policy over the
      reference, "bon_win_rate" of best-of-n, "bon_kl" KL(bon || ref), "reference_kl_bon"
      KL(ref || bon), where training starts; "corrected_kl_bon" KL(kept proposals || bon) and
      "corrected_proposals" a response, of the policy's responses as ``bon.correction`` keeps them.
    """
    sums: dict[str, float] = {}
    for tokens, rewards in zip(world.prompts, world.rewards_PxS, strict=True):
        log_p, log_ref = (
            string_log_probs(x, tokens, world.strings_SxT, world.temperature)
            for x in (policy, reference)
        )
        order_S = world.order_S
        ranked = rewards if order_S is None else np.argsort(np.lexsort((order_S, rewards)))
        log_bon = enumeration.log_bon(log_ref, ranked, n)
        log_kept, proposals = correction.exact(log_p, log_bon, bound)
        for name, value in {
            "corrected_kl_bon": enumeration.kl(log_kept, log_bon),
            "corrected_proposals": proposals,
            "kl_bon": enumeration.kl(log_p, log_bon),
            "kl_ref": enumeration.kl(log_p, log_ref),
            "win_rate": enumeration.win_rate(log_p, log_ref, rewards),
            "bon_win_rate": enumeration.win_rate(log_bon, log_ref, rewards),
            "bon_kl": enumeration.kl(log_bon, log_ref),
            "reference_kl_bon": enumeration.kl(log_ref, log_bon),
        }.items():
            sums[name] = sums.get(name, 0.0) + value / len(world.prompts)
    return sums


class Optimum(NamedTuple):
    """What a policy is held against.

    Attributes:
      method: the label of its rows.
      formula: of the optimum, for tables.
      log_probs: (log pi_ref [S], rewards [S]) -> log-probabilities of the method's own optimum,
        float64 nats [S]; None where it has none.
      n: whose pi_bon "kl_bon" is about.
      beta: the method's own; None where it has none.
    """

    method: str
    formula: str
    log_probs: Callable[[np.ndarray, np.ndarray], np.ndarray | None]
    n: float
    beta: float | None


def fixed_point(
    policy: LanguageModel, reference: LanguageModel, world: World, optimum: Optimum
) -> dict[str, Any]:
    """How far a policy is from its method's optimum, exactly; see ``row``."""
    log_p, log_ref = (
        [string_log_probs(x, p, world.strings_SxT, world.temperature) for p in world.prompts]
        for x in (policy, reference)
    )
    return row(optimum, log_p, log_ref, world.rewards_PxS)


def row(
    optimum: Optimum,
    log_p_PxS: Sequence[np.ndarray],
    log_ref_PxS: Sequence[np.ndarray],
    rewards_PxS: np.ndarray,
) -> dict[str, Any]:
    """Exact figures of a policy against its method's optimum, means over the P prompts; nats.

    Args:
      optimum: of the method.
      log_p_PxS: normalised log-probabilities of every response under the policy.
      log_ref_PxS: likewise under the reference.
      rewards_PxS: of every response.

    Returns:
      "method", "n", "beta", "target" (the optimum's formula), "kl_target" KL(policy || own
      optimum), "kl_bon" KL(policy || pi_bon), "kl_ref", "win_rate", and "target_kl_bon" KL(own
      optimum || pi_bon), "target_win_rate": what would be left with training perfect. None where a
      method has no optimum, and where a number is infinite, as "kl_target" of the lower bound,
      whose optimum never says the worst response.
    """
    sums: dict[str, float] = {}
    for log_p, log_ref, rewards in zip(log_p_PxS, log_ref_PxS, rewards_PxS, strict=True):
        aim = optimum.log_probs(log_ref, rewards)
        log_bon = enumeration.log_bon(log_ref, rewards, optimum.n)
        for name, value in {
            "kl_target": np.nan if aim is None else enumeration.kl(log_p, aim),
            "kl_bon": enumeration.kl(log_p, log_bon),
            "kl_ref": enumeration.kl(log_p, log_ref),
            "win_rate": enumeration.win_rate(log_p, log_ref, rewards),
            "target_kl_bon": np.nan if aim is None else enumeration.kl(aim, log_bon),
            "target_win_rate": np.nan
            if aim is None
            else enumeration.win_rate(aim, log_ref, rewards),
        }.items():
            sums[name] = sums.get(name, 0.0) + value / len(rewards_PxS)
    finite = {name: value if np.isfinite(value) else None for name, value in sums.items()}
    return {
        "method": optimum.method, "n": optimum.n, "beta": optimum.beta, "target": optimum.formula
    } | finite  # fmt: skip
