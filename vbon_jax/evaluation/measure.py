"""Measuring a policy on held-out prompts: against the reference, and against true best-of-n."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import sharding
from vbon_jax.bon import jackknife, quantiles, theory
from vbon_jax.bon import pool as bon_pool
from vbon_jax.bon import references as bon_references
from vbon_jax.bon.references import References
from vbon_jax.data.samples import PromptSamples
from vbon_jax.errors import InputError
from vbon_jax.evaluation import compare, kl_parts
from vbon_jax.models import decoder, log_probs
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.models.lm import LanguageModel
from vbon_jax.rl import kl
from vbon_jax.sampling.decode import Rollout
from vbon_jax.sampling.requests import Prompts
from vbon_jax.sampling.responses import Batch, Response

REPEATS = 5  # of each timing; the median counts


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """What the responses of a split are held against at one temperature.

    references: m rewards of fresh reference responses to each prompt.
    evaluator_PxM: those of a second reward model, ascending; None without one.
    n, estimator: of best-of-n, and of the density ratio in the estimated KL(policy || bon).
    """

    references: References
    evaluator_PxM: np.ndarray | None
    n: float
    estimator: str
    temperature: float

    @property
    def m(self) -> int:
        """Reference responses to each prompt."""
        return int(self.references.m)

    def ranks(self, responses: "Responses") -> tuple[np.ndarray, np.ndarray]:
        """How many reference responses are below, and equal to, each response; [P, S] each."""
        below, equal = bon_references.ranks(self.references, *_flat(responses))
        shape = responses.rewards.shape
        return np.asarray(below).reshape(shape), np.asarray(equal).reshape(shape)

    def density(self, responses: "Responses", n: float) -> tuple[np.ndarray, np.ndarray]:
        """Estimated log(pi_bon / pi_ref) and log g of responses, float64 nats [P, S] each.

        Of the ``interval`` estimator, the bias of order 1 / m is taken out.
        """
        shape = responses.rewards.shape
        density = bon_references.density(
            self.references,
            *_flat(responses),
            np.asarray(responses.log_ref, np.float32).ravel(),
            n,
            estimator=self.estimator,
        )
        mass = np.asarray(density.log_mass_B, float).reshape(shape)
        if self.estimator == "interval" and self.m > 1:
            return jackknife.log_ratio(*self.ranks(responses), self.m, n), mass
        return np.asarray(density.log_ratio_B, float).reshape(shape), mass

    def bon_parts(self) -> quantiles.Parts:
        """What best-of-n itself has in each bin of F."""
        table = self.references
        return quantiles.best_of_n(table.rewards_PxM, self.n, kl_parts.EDGES, table.order_PxM)


@dataclasses.dataclass(frozen=True)
class Responses:
    """S responses to each of P prompts, float64 [P, S] each.

    log_ref in nats; order: uint32 places in the total order of responses, None where ties are
    broken at random; evaluator: rewards of the second model, None without one; kl: each response's
    estimate of KL(policy || ref) that counts, kl_k1 the plain log-ratio, None where there is none.
    """

    rewards: np.ndarray
    order: np.ndarray | None
    evaluator: np.ndarray | None
    log_ref: np.ndarray
    finished: np.ndarray
    length: np.ndarray
    kl: np.ndarray
    kl_k1: np.ndarray | None


def _flat(responses: Responses) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Prompt, reward and place in the order of each response, [P * S] each."""
    prompts, count = responses.rewards.shape
    return (
        np.repeat(np.arange(prompts), count),
        np.asarray(responses.rewards, np.float32).ravel(),
        None if responses.order is None else responses.order.ravel(),
    )


@partial(jax.jit, static_argnames=("config", "ref_config"))
def _sequence_kls(
    params: Any,
    ref_params: Any,
    prompts: Prompts,
    rollout: Rollout,
    temperature: jax.Array | float,
    *,
    config: DecoderConfig,
    ref_config: DecoderConfig,
) -> dict[str, jax.Array]:
    tokens = jnp.concatenate([prompts.tokens_BxP, rollout.tokens_BxT], axis=1)
    mask = jnp.concatenate([prompts.mask_BxP, rollout.mask_BxT], axis=1)
    length = rollout.mask_BxT.shape[1]

    states = tuple(
        log_probs.hidden(p, c, tokens, mask, length)
        for p, c in ((params, config), (ref_params, ref_config))
    )
    found = log_probs.against(
        (decoder.head(params, config), decoder.head(ref_params, ref_config)),
        (config, ref_config), states,
        rollout.tokens_BxT, temperature,
    )  # fmt: skip
    m = rollout.mask_BxT
    return {
        "kl": kl.sequence_sum(found.kl, m),
        "kl_k1": kl.k1(found.log_prob, found.log_ref, m),
        "log_ref": kl.sequence_sum(found.log_ref, m),
    }


def sequence_kls(
    policy: LanguageModel, reference: LanguageModel, batch: Batch
) -> dict[str, jax.Array]:
    """KL(policy || ref) of responses sampled from the policy, and their log pi_ref; nats, [B].

    "kl_k1" is the log-ratio of the sampled tokens, "kl" the sum over positions of the KL of the
    whole next-token distributions: the same mean, far less variance. Both are taken at the
    temperature of the batch.
    """
    return _sequence_kls(
        policy.params, reference.params, batch.prompts, batch.rollout,
        np.float32(batch.temperature), config=policy.config, ref_config=reference.config,
    )  # fmt: skip


def grouped(responses: Sequence[Response], size: int) -> list[list[Response]]:
    """Responses in prompt order as rows of ``size``."""
    return [list(responses[i : i + size]) for i in range(0, len(responses), size)]


def of_policy(rows: list[list[Response]], order: np.ndarray | None) -> Responses:
    """Responses drawn with ``sequence_kls`` beside them."""

    def extra(name: str) -> np.ndarray:
        return np.array([[r.extra[name] for r in row] for row in rows])

    return Responses(
        np.array([[r.reward for r in row] for row in rows]),
        order,
        extra("evaluator") if "evaluator" in rows[0][0].extra else None,
        extra("log_ref"),
        np.array([[r.finished for r in row] for row in rows], float),
        np.array([[len(r.tokens) for r in row] for row in rows], float),
        extra("kl"),
        extra("kl_k1"),
    )


def of_reference(
    samples: Sequence[PromptSamples], order: np.ndarray | None, count: int | None = None
) -> Responses:
    """Figures of responses of the reference itself, whose KL to itself is exactly 0.

    Args:
      samples: of each prompt.
      order: places in the total order that breaks ties; None breaks them at random.
      count: responses of each prompt, the first ones; None for all.

    Raises:
      InputError: the samples have no log-probs, so another program made them.
    """

    def matrix(name: str, of: Callable[[Any], float] = float) -> np.ndarray:
        values = [getattr(x, name) for x in samples]
        if any(v is None for v in values):
            raise InputError(
                f"the held-out samples have no {name!r}: remove the file and sample anew"
            )
        return np.array([[of(v) for v in row[:count]] for row in values], np.float64)

    rewards = matrix("rewards")
    evaluated = samples[0].evaluator_rewards is not None
    return Responses(
        rewards,
        None if order is None else order[:, :count],
        matrix("evaluator_rewards") if evaluated else None,
        matrix("log_probs"),
        matrix("finished"),
        matrix("response_tokens", len),
        np.zeros_like(rewards),
        np.zeros_like(rewards),
    )


def row(
    policy: str,
    n: float,
    responses: Responses,
    yardstick: Yardstick,
    speed: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """One row of evaluation.json.

    kl_bon is KL(policy || bon) by the estimator of the yardstick, bon being best-of-n of the
    yardstick's n; it and its parts are explained in ``kl_parts``.
    """
    ratios, _ = yardstick.density(responses, yardstick.n)
    below, equal = yardstick.ranks(responses)
    spans = below / (yardstick.m + 1), (below + equal + 1) / (yardstick.m + 1)
    kl_k1 = responses.kl if responses.kl_k1 is None else responses.kl_k1
    columns = _columns(responses, yardstick) | {
        "kl_ref": responses.kl,
        "kl_ref_k1": responses.kl_k1,
    }
    return {
        "policy": policy,
        "n": n,
        "temperature": yardstick.temperature,
        **_estimates(columns),
        **kl_parts.parts(responses.kl, kl_k1, ratios, spans, yardstick.bon_parts()),
        "eos_rate": float(responses.finished.mean()),
        "length": float(responses.length.mean()),
        "responses_per_second": None if speed is None else speed[0],
        "tokens_per_second": None if speed is None else speed[1],
    }


def bon_row(
    n: int, pool: Responses, yardstick: Yardstick, speed: tuple[float, float] | None = None
) -> dict[str, Any]:
    """The row of best-of-n read off a pool of reference samples by the order-statistics weights.

    KL(bon || ref) three ways: "kl_bound", log n - (n-1)/n; "kl_beirami", Beirami et al.'s estimate
    from log g of the winner (log pi_ref without ties), which is also "kl_ref"; "kl_direct", the
    mean of the estimated log ratio. kl_bon is what the estimator says of best-of-n's distance to
    itself, 0 in truth: Beirami's KL less the direct one, where n is the yardstick's; null for any
    other, as its parts are for all.
    """
    weights = bon_pool.winner_weights(pool.rewards, n, pool.order)
    direct, log_mass = yardstick.density(pool, float(n))
    beirami = np.asarray(theory.kl_estimate(log_mass, float(n)), np.float64)
    columns = _columns(pool, yardstick) | {
        "kl_ref": beirami,
        "kl_ref_k1": None,
        "kl_direct": direct,
        "kl_bon": beirami - direct if n == yardstick.n else None,
    }
    means = {k: None if v is None else bon_pool.best_mean(v, weights) for k, v in columns.items()}
    estimates = _estimates(means)
    return {
        "policy": "bon",
        "n": float(n),
        "temperature": yardstick.temperature,
        **estimates,
        **dict.fromkeys(kl_parts.NAMES),
        "kl_bound": float(theory.kl_upper_bound(float(n))),
        "kl_beirami": estimates["kl_ref"],
        "eos_rate": float(bon_pool.best_mean(pool.finished, weights).mean()),
        "length": float(bon_pool.best_mean(pool.length, weights).mean()),
        "responses_per_second": None if speed is None else speed[0],
        "tokens_per_second": None if speed is None else speed[1],
    }


def _columns(responses: Responses, yardstick: Yardstick) -> dict[str, np.ndarray | None]:
    """Rewards and comparisons won, by the reward and by the evaluator, [P, S] each."""
    columns: dict[str, np.ndarray | None] = {
        "reward": responses.rewards,
        "win_rate": compare.win_rates(
            np.asarray(responses.rewards, np.float32), np.asarray(yardstick.references.rewards_PxM)
        ),
        "evaluator_reward": None,
        "evaluator_win_rate": None,
    }
    if responses.evaluator is not None and yardstick.evaluator_PxM is not None:
        columns["evaluator_reward"] = responses.evaluator
        columns["evaluator_win_rate"] = compare.win_rates(
            np.asarray(responses.evaluator, np.float32), yardstick.evaluator_PxM
        )
    return columns


def _estimates(columns: dict[str, np.ndarray | None]) -> dict[str, Any]:
    """Name and name_ci95 of each column: mean over prompts and its interval; null for None."""
    out: dict[str, Any] = {}
    for name, values in columns.items():
        estimate = None if values is None else compare.over_prompts(values)
        out[name] = None if estimate is None else estimate.mean
        out[f"{name}_ci95"] = None if estimate is None else estimate.ci95
    return out


def throughput(
    draw: Callable[[], Batch],
    pick: Callable[[Batch], Any] | None,
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
        mask = sharding.fetch(batch.rollout.mask_BxT)
        return time.monotonic() - began, len(mask), int(mask.sum())

    once()  # compiles
    seconds, responses, tokens = np.median([once() for _ in range(REPEATS)], axis=0)
    return float(responses / (seconds * calls)), float(tokens / (seconds * calls))
