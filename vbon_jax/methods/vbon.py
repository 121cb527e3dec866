"""Variational best-of-N (Amini et al., 2024, Algorithm 1): PPO on KL(policy || best-of-n)."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vbon_jax.bon import distribution, enumeration, references, targets
from vbon_jax.bon import log_f as lf
from vbon_jax.bon.references import References
from vbon_jax.keys import key
from vbon_jax.methods.base import (
    Method,
    Online,
    Options,
    Series,
    taken,
)
from vbon_jax.rl import prefix, replay
from vbon_jax.rl.masking import masked
from vbon_jax.sampling.responses import ScoredRollout
from vbon_jax.training import ppo, scoring, stored
from vbon_jax.training.state import TrainState

KEEP = 0.8  # of the returns of earlier iterations, each iteration, in the values of prefixes
OBJECTIVES = ("exact", distribution.JEFFREYS, "lower_bound", "jensen_bound")
RATIO = ("exact", distribution.JEFFREYS)  # which read the density ratio of best-of-n, not log F


def objective_key() -> Any:
    """The objective of vBoN."""
    return key("exact", "Of vbon: the exact objective, KL from policy to best-of-n; jeffreys, the "
               "sum of this and the KL from best-of-n to policy, with `train.replay`; or a bound "
               "of the first.",
               choices=OBJECTIVES)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class VBoN(Options):
    """Options of vBoN.

    Attributes:
      n: of best-of-n, a real number of at least 1.
      objective: "exact" (Eq. 5); "jeffreys", the sum of that KL and its reverse; or a bound:
        "lower_bound" (Eq. 8), "jensen_bound" (Theorem 3).
      estimator: of log F.
      ties: how best-of-n chooses among equal rewards.
    """

    objective: str = objective_key()


def iteration(learner: Any, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
    """One iteration of Algorithm 1, of one policy or of a population of them."""
    responses = learner.roll_out(state, step)  # y ~ pi(. | x), a response to each prompt
    scored = learner.score(responses, step)  # r(y)
    return learner.update(state, scored, step)  # the rest, one compiled program: `update`


@partial(jax.jit, static_argnames=("setup",), donate_argnums=0)
def update(
    state: TrainState,
    ref_params: Any,
    scored: tuple[ScoredRollout],
    table: References,
    n: jax.Array,
    beta: jax.Array,
    *,
    setup: scoring.Setup,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Log F of a scored rollout, its advantages, and the PPO epochs.

    Args:
      state: donated. params are {"decoder", "value"}: what ``models.trainable`` trains of the
        reference, and {"head"} of the values, beside it "decoder" for a network of their own.
      ref_params: {"decoder"} of the reference, which holds all that is not trained.
      scored: one rollout of B rows, B a multiple of ``train.minibatch_size``.
      table: each prompt's reference rewards.
      n: float32 scalar; data, not structure, so another value needs no compile. Of a family each
        row of ``scored`` has its own in place of it.
      beta: likewise, for the objectives that have a KL coefficient of their own.
      setup: what is static.

    Returns:
      (state one step on, float32 metrics).
    """
    batch = stored.joined(scored[0])
    if batch.n_B is not None:  # of a family
        n = batch.n_B
    seen, metrics = experience(state.params, ref_params, batch, table, n, beta, setup=setup)
    state, info = ppo.epochs(state, ref_params, seen, setup)
    if batch.prefix_reward_BxT is not None:
        ranks = prefix_ranks(table, batch)
        values = prefix.updated(
            state.params["prefix"], ranks, seen.returns_BxT, seen.value_mask_BxT, KEEP
        )
        state = state._replace(params=state.params | {"prefix": values})
    return state, metrics | info


def experience(
    params: Any,
    ref_params: Any,
    batch: ScoredRollout,
    table: References,
    n: jax.Array,
    beta: jax.Array,
    *,
    setup: scoring.Setup,
) -> tuple[scoring.Experience, dict[str, jax.Array]]:
    """What the epochs of `update` read, and the metrics of the rollout; arguments as there."""
    found = scoring.score(params, ref_params, batch, setup)  # log pi, log pi_ref and values
    density = best_of_n_density(table, batch, found.log_ref_B, n, setup.estimator)  # log F
    target = objective(setup.objective, density, batch.reward_B, n, beta)
    target = _weighted(target, found.log_policy_ratio_B, density.log_ratio_B, n, setup)
    ahead = None
    if batch.prefix_reward_BxT is not None:
        values = prefix.values(params["prefix"], prefix_ranks(table, batch))
        if batch.candidate_reward_BxTxK is not None:
            ahead = _lookahead(params["prefix"], table, batch, setup, n, beta)
            own = target.entropy_coef * found.found.entropy - target.kl_coef * found.found.kl
            values = ahead.value_BxT + own  # what the prefix itself is paid, whatever token follows
        found = found._replace(values_BxT=masked(values, found.response_mask_BxT))
    seen, metrics = scoring.advantages(found, batch, target, setup, ahead)
    metrics["kl_bon"] = target.mean(found.kl_ref_B - density.log_ratio_B)
    return seen, metrics


def _weighted(
    target: scoring.Target,
    log_policy_ratio_B: jax.Array,
    log_ratio_B: jax.Array,
    n: jax.Array,
    setup: scoring.Setup,
) -> scoring.Target:
    """The target with what each row counts for, where some are stored samples."""
    group, count = setup.train.group, setup.train.replay
    if not count and not setup.from_store:
        return target
    share = 1.0 if setup.from_store else count / (group + count)
    if setup.from_store:  # no response is n times likelier under best-of-n
        log_policy_ratio_B = jnp.minimum(log_policy_ratio_B, jnp.log(n))
    forward_B = None
    if setup.objective == distribution.JEFFREYS:
        forward_B = replay.forward(log_ratio_B, log_policy_ratio_B, share) / n
    return target._replace(weight_B=replay.balance(log_policy_ratio_B, share), forward_B=forward_B)


def prefix_ranks(table: References, batch: ScoredRollout) -> jax.Array:
    """The rank in [0, 1] of the reward of each prefix among the prompt's reference rewards."""
    return _ranks(table, batch.row_B, batch.prefix_reward_BxT)


def _ranks(table: References, row_B: jax.Array, reward_BxX: jax.Array) -> jax.Array:
    below, equal, m = references.prefix_counts(table, row_B, reward_BxX)
    return (below + 0.5 * equal) / m


def _lookahead(
    values: prefix.Table,
    table: References,
    batch: ScoredRollout,
    setup: scoring.Setup,
    n: jax.Array,
    beta: jax.Array,
) -> prefix.Lookahead:
    """The values of the likeliest next tokens; of those that end a response, its own reward."""
    likeliest = batch.rollout.likeliest
    assert likeliest is not None
    # Any other token is taken for one that changes nothing: the prefix's own reward.
    rewards = jnp.concatenate(
        [batch.candidate_reward_BxTxK, batch.prefix_reward_BxT[..., None]], axis=-1
    )
    B, T, _ = rewards.shape
    flat = rewards.reshape(B, -1)
    value = prefix.values(values, _ranks(table, batch.row_B, flat).reshape(rewards.shape), ahead=1)
    rows, flat = jnp.repeat(batch.row_B, flat.shape[1]), flat.reshape(-1)
    density = references.density(
        table, rows, flat, None, jnp.zeros_like(flat), n, estimator=setup.estimator
    )
    final = objective(setup.objective, density, flat, n, beta).sequence_reward_B
    last = jnp.broadcast_to((jnp.arange(T) == T - 1)[:, None], (B, T, 1))
    ends = jnp.concatenate([likeliest.end_BxTxK | last, last], axis=-1)
    value = jnp.where(ends, final.reshape(rewards.shape), value)
    return prefix.lookahead(
        value[..., :-1], value[..., -1], likeliest.ids_BxTxK, likeliest.log_probs_BxTxK,
        batch.rollout.tokens_BxT,
    )  # fmt: skip


def best_of_n_density(
    table: References, batch: ScoredRollout, log_ref_B: jax.Array, n: jax.Array, estimator: str
) -> references.Density:
    """Log F and log(pi_bon / pi_ref) of each response, by its rank among the reference rewards."""
    rollout = batch.rollout
    with jax.named_scope("log_f"):
        by_order = table.order_PxM is not None
        order = lf.response_order(rollout.tokens_BxT, rollout.mask_BxT) if by_order else None
        return references.density(
            table, batch.row_B, batch.reward_B, order, log_ref_B, n, estimator=estimator
        )


def objective(
    name: str,
    density: references.Density,
    reward_B: jax.Array,
    n: jax.Array,
    beta: jax.Array,
) -> scoring.Target:
    """The sequence reward and coefficients of an objective of ``bon.distribution``."""
    with jax.named_scope("objective"):
        reward = distribution.sequence_reward(
            name,
            n=n,
            log_f=density.log_f_B,
            log_ratio=density.log_ratio_B,
            log_up_to=density.log_up_to_B,
            reward=reward_B,
        )
        return scoring.Target(
            reward,
            distribution.kl_coefficient(name, n, beta),
            distribution.entropy_coefficient(name, n),
        )


def _check(options: VBoN) -> str:
    if options.estimator in ("strict", "interval") and options.objective not in RATIO:
        return (
            f"method.estimator={options.estimator} gives no finite log F for "
            f"method.objective={options.objective}: choose smoothed, harmonic or exponential"
        )
    return ""


METHOD = Method(
    name="vbon",
    options=VBoN,
    from_config=lambda config: taken(VBoN, config.method),
    learns=Online(
        build=lambda options, setup: partial(update, setup=setup),
        iteration=iteration,
        objective=lambda options: options.objective,
    ),
    check=_check,
    series=(
        Series(
            label="vbon", name="vBoN", color="#0072b2", marker="o",
            doc="Values of n of vbon with the exact objective.",
            fixed={"objective": "exact"},
            optimum=lambda log_ref, rewards, n, *_: enumeration.log_bon(log_ref, rewards, n),
            formula="pi_bon",
        ),
        Series(
            label="lower_bound", name="vBoN, bound L", color="#882255", marker="P",
            doc="Values of n of vbon with its lower bound.",
            fixed={"objective": "lower_bound"}, variant="lower_bound",
            estimators=("harmonic", "smoothed", "exponential"),
            optimum=lambda log_ref, rewards, n, *_: targets.lower_bound(log_ref, rewards, n),
            formula="pi_ref F^(n-1) / Z",
        ),
    ),
)  # fmt: skip
