"""The PPO iteration on the vBoN objective: one jitted, donated update (the paper's Algorithm 1)."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vbon_jax import sharding
from vbon_jax.bon import distribution
from vbon_jax.bon import log_f as lf
from vbon_jax.bon import references as bon_references
from vbon_jax.bon.references import References
from vbon_jax.models import decoder, heads
from vbon_jax.rl import gae, kl, ppo, shaping
from vbon_jax.rl.masking import masked_mean
from vbon_jax.rl.next_token import NextToken, next_token
from vbon_jax.sampling import decode
from vbon_jax.sampling import logits as lg
from vbon_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class PPOPlan:
    """What the update does. The defaults are the paper's table of PPO hyperparameters.

    objective, estimator: of ``bon.distribution`` and ``bon.log_f``.
    epochs: passes over a rollout; minibatch_size: responses a gradient step.
    clip_policy, clip_value, value_coef, gamma, lam: PPO's and GAE's constants.
    whiten: advantages to zero mean and unit variance over the rollout.
    penalty: how KL(policy || ref), and the entropy of ``jensen_bound``, enter: "sampled" as the
      log-ratio of each sampled token in its reward (the usual way), "full" as the KL of the whole
      next-token distributions, differentiated exactly (see ``loss``): the same objective and the
      same expected gradient, with less noise.
    temperature: of the rollouts, and so of every log-prob.
    """

    objective: str = "exact"
    estimator: str = "interval"
    epochs: int = 4
    minibatch_size: int = 32
    clip_policy: float = 0.2
    clip_value: float = 0.2
    value_coef: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    penalty: str = "sampled"
    temperature: float = 0.7


class RolloutBatch(NamedTuple):
    """A scored rollout, rows first.

    prompt_BxP, prompt_mask_BxP: int32 ids padded on the left, bool mask.
    rollout: decode.Rollout with T response slots.
    reward_B: float32 rewards. row_B: int32, the prompt's row in the References.
    """

    prompt_BxP: jax.Array
    prompt_mask_BxP: jax.Array
    rollout: decode.Rollout
    reward_B: jax.Array
    row_B: jax.Array


class Experience(NamedTuple):
    """What the PPO epochs read: tokens and masks of the whole rows [B, S], and of the response
    slots [B, T] the log-probs and values of the policy that sampled, advantages and returns.
    ref_hidden_BxTxD: the reference's hidden states there, from which its logits follow.
    kl_weight_B, entropy_weight_B: weights of the "full" penalty in the loss, one value repeated."""

    tokens_BxS: jax.Array
    mask_BxS: jax.Array
    response_mask_BxT: jax.Array
    log_probs_BxT: jax.Array
    values_BxT: jax.Array
    advantages_BxT: jax.Array
    returns_BxT: jax.Array
    ref_hidden_BxTxD: jax.Array
    kl_weight_B: jax.Array
    entropy_weight_B: jax.Array


def experience(
    params: Any,
    ref_params: Any,
    batch: RolloutBatch,
    references: References,
    n: jax.Array,
    beta: jax.Array,
    *,
    config: decoder.DecoderConfig,
    plan: PPOPlan,
) -> tuple[Experience, dict[str, jax.Array]]:
    """Log-probs, values, the objective's per-token rewards and advantages of a rollout.

    The policy's log-probs come from the same full forward the epochs use, so that the PPO ratio is
    1 before the first step whatever the rounding of the decode loop.
    """
    rollout = batch.rollout
    mask = rollout.mask_BxT
    response_len = mask.shape[1]
    tokens = jnp.concatenate([batch.prompt_BxP, rollout.tokens_BxT], axis=1)
    token_mask = jnp.concatenate([batch.prompt_mask_BxP, mask], axis=1)

    with jax.named_scope("score"):
        logits, hidden = decode.response_logits(
            params["decoder"], config, tokens, token_mask, response_len, plan.temperature
        )
        ref_logits, ref_hidden = decode.response_logits(
            ref_params["decoder"], config, tokens, token_mask, response_len, plan.temperature
        )
        found = NextToken(
            *(jnp.where(mask, x, 0.0) for x in next_token(logits, ref_logits, rollout.tokens_BxT))
        )
        log_policy, log_ref, full_kl_BxT, entropy_BxT = found
        values = jnp.where(mask, heads.value(params["value"], hidden), 0.0)
        full_kl = kl.sequence_sum(full_kl_BxT, mask)

    with jax.named_scope("log_f"):
        by_order = references.order_PxM is not None
        density = bon_references.density(
            references,
            batch.row_B,
            batch.reward_B,
            lf.response_order(rollout.tokens_BxT, mask) if by_order else None,
            jnp.sum(log_ref, axis=-1),
            n,
            estimator=plan.estimator,
        )
        sequence_reward = distribution.sequence_reward(
            plan.objective,
            n=n,
            log_f=density.log_f_B,
            log_ratio=density.log_ratio_B,
            log_up_to=density.log_up_to_B,
            reward=batch.reward_B,
        )
        kl_coef = distribution.kl_coefficient(plan.objective, n, beta)
        entropy_coef = distribution.entropy_coefficient(plan.objective, n)

    if plan.penalty == "full":
        rewards = shaping.token_rewards(sequence_reward, log_policy, log_ref, mask, 0.0)
        rewards += entropy_coef * entropy_BxT - kl_coef * full_kl_BxT
    else:
        rewards = shaping.token_rewards(
            sequence_reward, log_policy, log_ref, mask, kl_coef, entropy_coef
        )
    advantages, returns = gae.gae(rewards, values, mask, plan.gamma, plan.lam)
    explained = ppo.explained_variance(values, returns, mask)
    scale = jnp.float32(1.0)
    if plan.whiten:
        # The exact penalty must shrink with the advantages, or whitening would change the optimum.
        scale = gae.deviation(advantages, mask)
        advantages = gae.whiten(advantages, mask)
    weight = plan.penalty == "full"
    rows = mask.shape[0]

    tokens_drawn = jnp.maximum(jnp.sum(mask), 1)
    metrics = {
        "objective": jnp.mean(jnp.sum(rewards, axis=-1)),
        "sequence_reward": jnp.mean(sequence_reward),
        "kl_ref": jnp.mean(full_kl),
        "kl_ref_k1": jnp.mean(kl.k1(log_policy, log_ref, mask)),
        "kl_bon": jnp.mean(full_kl) - jnp.mean(density.log_ratio_B),
        "reward": jnp.mean(batch.reward_B),
        "response_length": jnp.mean(jnp.sum(mask, axis=-1).astype(jnp.float32)),
        "eos_rate": jnp.mean(rollout.finished_B.astype(jnp.float32)),
        "truncation_rate": jnp.mean(1.0 - rollout.finished_B.astype(jnp.float32)),
        "entropy": jnp.sum(entropy_BxT) / tokens_drawn,
        "explained_variance": explained,
        "value_mean": jnp.sum(values) / tokens_drawn,
        # How far the decode loop's log-probs are from the full forward's.
        "rollout_log_prob_error": jnp.max(jnp.abs(log_policy - rollout.log_probs_BxT)),
    }
    return (
        Experience(
            tokens,
            token_mask,
            mask,
            log_policy,
            values,
            advantages,
            returns,
            ref_hidden,
            jnp.full(rows, weight * kl_coef / scale, jnp.float32),
            jnp.full(rows, weight * entropy_coef / scale, jnp.float32),
        ),
        metrics,
    )


def loss(
    params: Any,
    ref_params: Any,
    exp: Experience,
    *,
    config: decoder.DecoderConfig,
    plan: PPOPlan,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Clipped policy loss + value_coef * clipped value loss of a minibatch.

    With the "full" penalty, mean_t [kl_coef KL_t - entropy_coef H_t] of the whole next-token
    distributions is added. For J = E[R - c sum_t KL_t], with KL_t a function of the state,

        grad J = E sum_t [ grad log pi(a_t) (R - c sum_{t' > t} KL_t') - c grad KL_t ]:

    the first part is what the advantages carry (the KL_t' of later states are in the rewards), the
    second is this term. The sampled penalty estimates it from one token instead.
    """
    response_len = exp.response_mask_BxT.shape[1]
    logits, hidden = decode.response_logits(
        params["decoder"], config, exp.tokens_BxS, exp.mask_BxS, response_len, plan.temperature
    )
    ref_logits = decoder.logits(ref_params["decoder"], config, exp.ref_hidden_BxTxD)
    found = next_token(
        logits, lg.temper(ref_logits, plan.temperature), exp.tokens_BxS[:, -response_len:]
    )
    values = heads.value(params["value"], hidden)
    mask = exp.response_mask_BxT
    policy_loss, policy_info = ppo.policy_loss(
        found.log_prob, exp.log_probs_BxT, exp.advantages_BxT, mask, plan.clip_policy
    )
    value_loss, value_info = ppo.value_loss(
        values, exp.values_BxT, exp.returns_BxT, mask, plan.clip_value
    )
    total = policy_loss + plan.value_coef * value_loss
    if plan.penalty == "full":
        penalty_BxT = exp.kl_weight_B[:, None] * found.kl
        penalty_BxT -= exp.entropy_weight_B[:, None] * found.entropy
        total += masked_mean(penalty_BxT, mask)
    return total, {
        "loss": total,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "approx_kl": policy_info["approx_kl"],
        "policy_clip_fraction": policy_info["clip_fraction"],
        "value_clip_fraction": value_info["clip_fraction"],
    }


@partial(jax.jit, static_argnames=("config", "plan", "optimizer"), donate_argnums=0)
def iteration(
    state: TrainState,
    ref_params: Any,
    batch: RolloutBatch,
    references: References,
    n: jax.Array,
    beta: jax.Array,
    *,
    config: decoder.DecoderConfig,
    plan: PPOPlan,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One PPO iteration: experience of a scored rollout, then epochs of minibatch steps.

    Args:
      state: donated. params are {"decoder", "value"}.
      ref_params: {"decoder"} of the reference.
      batch: B rows, B a multiple of plan.minibatch_size.
      references: each prompt's reference rewards.
      n, beta: float32 scalars; data, not structure, so another value needs no compile.

    Returns:
      (state one step on, metrics: float32 scalars; those of the loss are means over the gradient
      steps, ``grad_norm`` is the largest, ``first_approx_kl`` that of the first step, which must
      be 0).
    """
    exp, metrics = experience(
        state.params, ref_params, batch, references, n, beta, config=config, plan=plan
    )
    rows = exp.tokens_BxS.shape[0]
    minibatches = rows // plan.minibatch_size

    def epoch_order(epoch: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), epoch)
        return jax.random.permutation(key, rows).reshape(minibatches, plan.minibatch_size)

    order = jax.vmap(epoch_order)(jnp.arange(plan.epochs))
    order = order.reshape(plan.epochs * minibatches, plan.minibatch_size)

    def gradient_step(carry, rows_of_step):
        params, opt_state = carry
        # Gathered rows would be whole on every device: each would do all of the minibatch.
        minibatch = sharding.constrain(jax.tree.map(lambda x: x[rows_of_step], exp), "batch")
        grads, info = jax.grad(loss, has_aux=True)(
            params, ref_params, minibatch, config=config, plan=plan
        )
        updates, opt_state = optimizer.update(grads, opt_state, params)
        info["grad_norm"] = optax.tree.norm(grads)
        return (optax.apply_updates(params, updates), opt_state), info

    with jax.named_scope("ppo"):
        (params, opt_state), info = jax.lax.scan(
            gradient_step, (state.params, state.opt_state), order
        )
    metrics |= {name: jnp.mean(value) for name, value in info.items()}
    metrics["grad_norm"] = jnp.max(info["grad_norm"])
    metrics["first_approx_kl"] = info["approx_kl"][0]
    # Left to the compiler, small leaves drift from the table, and the next call compiles anew.
    new_state = TrainState(state.step + 1, params, opt_state, state.key)
    return sharding.constrain(new_state, ""), metrics
