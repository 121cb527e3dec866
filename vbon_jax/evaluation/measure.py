"""Measuring a policy on held-out prompts: against the reference, and against true best-of-n."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax.bon import enumeration, theory
from vbon_jax.bon import log_f as lf
from vbon_jax.evaluation import compare
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.responses import Response
from vbon_jax.rl import kl
from vbon_jax.sampling import decode, engine
from vbon_jax.sampling import logits as lg

REPEATS = 5  # of each timing; the median counts


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What rewards are held against at one temperature.

    sorted_rewards_PxM: float32, m reference rewards of each held-out prompt, ascending.
    n, estimator: of best-of-n, and of the density ratio in the estimated KL(policy || bon).
    """

    sorted_rewards_PxM: np.ndarray
    n: float
    estimator: str
    temperature: float

    def log_ratios(self, rewards_PxS: np.ndarray, log_ref_PxS: np.ndarray) -> np.ndarray:
        """Estimated log(pi_bon / pi_ref) of responses, float64 nats [P, S]."""
        below, equal = lf.reference_ranks(
            self.sorted_rewards_PxM, np.asarray(rewards_PxS, np.float32)
        )
        m = self.sorted_rewards_PxM.shape[1]
        ratio = lf.log_ratio(self.estimator, below, equal, m, self.n, log_mass=log_ref_PxS)
        return np.asarray(ratio, np.float64)


@dataclasses.dataclass(frozen=True)
class Measured:
    """P prompts x S responses of one policy, and each response's KL(policy || ref) in nats.

    kl_PxS is the estimate that counts; kl_k1_PxS is the plain log-ratio, None where there is none.
    """

    responses: list[list[Response]]
    log_ref_PxS: np.ndarray
    kl_PxS: np.ndarray
    kl_k1_PxS: np.ndarray | None

    @property
    def rewards_PxS(self) -> np.ndarray:
        return np.array([[r.reward for r in row] for row in self.responses], np.float32)


@partial(jax.jit, static_argnames=("config", "ref_config"))
def sequence_kls(
    params: Any,
    ref_params: Any,
    prompts: engine.Prompts,
    rollout: decode.Rollout,
    temperature: jax.Array | float,
    *,
    config: DecoderConfig,
    ref_config: DecoderConfig,
) -> dict[str, jax.Array]:
    """KL(policy || ref) of responses sampled from the policy, and their log pi_ref; nats, [B].

    "kl_k1" is the log-ratio of the sampled tokens, "kl" the sum over positions of the KL of the
    whole next-token distributions: the same mean, far less variance.
    """
    tokens = jnp.concatenate([prompts.tokens_BxP, rollout.tokens_BxT], axis=1)
    mask = jnp.concatenate([prompts.mask_BxP, rollout.mask_BxT], axis=1)
    length = rollout.mask_BxT.shape[1]

    def log_softmax(p: Any, c: DecoderConfig) -> jax.Array:
        logits, _ = decode.response_logits(p, c, tokens, mask, length, temperature)
        return jax.nn.log_softmax(logits, axis=-1)

    policy, ref = log_softmax(params, config), log_softmax(ref_params, ref_config)
    chosen, chosen_ref = (
        jnp.take_along_axis(x, rollout.tokens_BxT[..., None], axis=-1)[..., 0]
        for x in (policy, ref)
    )
    m = rollout.mask_BxT
    return {
        "kl": kl.sequence_sum(kl.full_kl(policy, ref, m), m),
        "kl_k1": kl.k1(chosen, chosen_ref, m),
        "log_ref": kl.sequence_sum(chosen_ref, m),
    }


def grouped(responses: Sequence[Response], size: int) -> list[list[Response]]:
    """Responses in prompt order as rows of ``size``."""
    return [list(responses[i : i + size]) for i in range(0, len(responses), size)]


def of_policy(rows: list[list[Response]]) -> Measured:
    """Responses drawn with ``sequence_kls`` beside them."""

    def extra(name: str) -> np.ndarray:
        return np.array([[r.extra[name] for r in row] for row in rows])

    return Measured(rows, extra("log_ref"), extra("kl"), extra("kl_k1"))


def of_reference(rows: list[list[Response]]) -> Measured:
    """Responses of the reference itself: its KL to itself is 0, exactly."""
    log_ref = np.array([[r.log_prob for r in row] for row in rows])
    return Measured(rows, log_ref, np.zeros_like(log_ref), np.zeros_like(log_ref))


def of_bon(rows: list[list[Response]], n: int) -> Measured:
    """Best of each n consecutive reference responses; KL by Beirami et al. from log pi_ref(y*)."""
    rewards = np.array([[r.reward for r in row] for row in rows])
    winners = [[row[i] for i in columns] for row, columns in zip(rows, compare.best_of(rewards, n))]
    log_ref = np.array([[r.log_prob for r in row] for row in winners])
    return Measured(winners, log_ref, np.asarray(theory.kl_estimate(log_ref, n), np.float64), None)


def row(
    policy: str, n: float, measured: Measured, yardstick: Yardstick, speed: tuple[float, float]
) -> dict[str, Any]:
    """One row of evaluation.json.

    kl_bon is the mean of KL(policy || ref) - log ratio, that is KL(policy || bon) by the
    estimator of the yardstick. For best-of-n itself the true value is 0, so what stands there is
    the bias of the estimate.
    """
    rewards = measured.rewards_PxS
    reward = compare.over_prompts(rewards)
    win = compare.over_prompts(compare.win_rates(rewards, yardstick.sorted_rewards_PxM))
    kl_ref = compare.over_prompts(measured.kl_PxS)
    kl_bon = compare.over_prompts(
        measured.kl_PxS - yardstick.log_ratios(rewards, measured.log_ref_PxS)
    )
    k1 = None if measured.kl_k1_PxS is None else compare.over_prompts(measured.kl_k1_PxS)
    flat = list(itertools.chain.from_iterable(measured.responses))
    return {
        "policy": policy,
        "n": n,
        "temperature": yardstick.temperature,
        "reward": reward.mean,
        "reward_ci95": reward.ci95,
        "win_rate": win.mean,
        "win_rate_ci95": win.ci95,
        "kl_ref": kl_ref.mean,
        "kl_ref_ci95": kl_ref.ci95,
        "kl_ref_k1": None if k1 is None else k1.mean,
        "kl_ref_k1_ci95": None if k1 is None else k1.ci95,
        "kl_bon": kl_bon.mean,
        "kl_bon_ci95": kl_bon.ci95,
        "eos_rate": float(np.mean([r.finished for r in flat])),
        "length": float(np.mean([len(r.tokens) for r in flat])),
        "responses_per_second": speed[0],
        "tokens_per_second": speed[1],
    }


def throughput(
    draw: Callable[[], engine.Batch],
    pick: Callable[[engine.Batch], Any] | None,
    calls: int,
) -> tuple[float, float]:
    """Responses and tokens delivered a second, from the median time of REPEATS batches.

    Args:
      draw: draws one batch.
      pick: what best-of-n does to a batch before it can deliver (scoring); None for a policy, which
        delivers every response it draws.
      calls: batches drawn for each batch delivered: n for best-of-n, 1 for a policy. One is timed,
        and counted ``calls`` times.
    """

    def once() -> tuple[float, int, int]:
        began = time.monotonic()
        batch = draw()
        if pick is not None:
            jax.block_until_ready(pick(batch))
        mask = jax.device_get(batch.rollout.mask_BxT)
        return time.monotonic() - began, len(mask), int(mask.sum())

    once()  # compiles
    seconds, responses, tokens = np.median([once() for _ in range(REPEATS)], axis=0)
    return float(responses / (seconds * calls)), float(tokens / (seconds * calls))


def exact(
    params: Any,
    ref_params: Any,
    prompt_tokens: Sequence[tuple[int, ...]],
    strings_SxT: np.ndarray,
    rewards_PxS: np.ndarray,
    n: float,
    temperature: float,
    *,
    config: DecoderConfig,
    ref_config: DecoderConfig,
) -> dict[str, float]:
    """Exact figures of a world small enough to enumerate, averaged over its prompts; nats.

    Args:
      params, ref_params: decoder parameters of policy and reference.
      prompt_tokens: P prompts of one length.
      strings_SxT: int32, every possible response, all of T tokens.
      rewards_PxS: the reward of each response to each prompt.

    Returns:
      "kl_bon" KL(policy || bon), "kl_ref" KL(policy || ref), "win_rate" of the policy over the
      reference, "bon_win_rate" of best-of-n, "bon_kl" KL(bon || ref), "reference_kl_bon"
      KL(ref || bon), where training starts.
    """
    sums: dict[str, float] = {}
    for tokens, rewards in zip(prompt_tokens, rewards_PxS, strict=True):
        log_p, log_ref = (
            _string_log_probs(p, c, tokens, strings_SxT, temperature)
            for p, c in ((params, config), (ref_params, ref_config))
        )
        log_bon = enumeration.log_bon(log_ref, rewards, n)
        for name, value in {
            "kl_bon": enumeration.kl(log_p, log_bon),
            "kl_ref": enumeration.kl(log_p, log_ref),
            "win_rate": enumeration.win_rate(log_p, log_ref, rewards),
            "bon_win_rate": enumeration.win_rate(log_bon, log_ref, rewards),
            "bon_kl": enumeration.kl(log_bon, log_ref),
            "reference_kl_bon": enumeration.kl(log_ref, log_bon),
        }.items():
            sums[name] = sums.get(name, 0.0) + value / len(prompt_tokens)
    return sums


@partial(jax.jit, static_argnames=("config", "length"))
def _teacher_forced(params, tokens_SxL, length, temperature, *, config):
    logits, _ = decode.response_logits(
        params, config, tokens_SxL, jnp.ones_like(tokens_SxL, bool), length, temperature
    )
    return jnp.sum(lg.log_prob(logits, tokens_SxL[:, -length:]), axis=-1)


def _string_log_probs(
    params: Any,
    config: DecoderConfig,
    prompt: tuple[int, ...],
    strings_SxT: np.ndarray,
    temperature: float,
) -> np.ndarray:
    """log p(string | prompt) of every string, float64 nats, normalised over the strings."""
    count, length = strings_SxT.shape
    tokens = np.concatenate([np.tile(np.array(prompt, np.int32), (count, 1)), strings_SxT], axis=1)
    log_p = np.asarray(
        _teacher_forced(params, tokens, length, temperature, config=config), np.float64
    )
    # The world is closed, so what is missing from 1 is float32 rounding (about 1e-6).
    return log_p - np.logaddexp.reduce(log_p)
