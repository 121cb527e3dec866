"""Losses of J-BOND, iterated best-of-n distillation (Sessa et al., 2024).

p_<=(y) = P(r(y') <= r(y)). The non-iterative form of BOND, the backward KL divergence at a single
n, is the objective ``backward`` of ``bon.distribution.sequence_reward``. J-BOND distills best-of-2
of an anchor policy by a mix of forward and backward KL (a Jeffreys divergence). The anchor is an
exponential moving average of the policy, so n grows over the course of training.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


def jbond_reward(reward_B: jax.Array, anchor_rewards_Bxm: jax.Array) -> jax.Array:
    """Estimates log p_<=(y) from m samples of the anchor.

    * m = 2 (J-BOND): -log 16 where the reward is below that of both samples, else 0. At the
      anchor's median, where p_<= = 1/2, its expectation is -log(16) / 4 = log p_<=.
    * m > 2: log((k + 1) / (m + 1)), k being the number of samples whose reward is at most the
      response's.

    Args:
      reward_B: rewards of the policy's responses.
      anchor_rewards_Bxm: rewards of m anchor samples for the same prompts.

    Returns:
      float32 rewards [B] in nats, <= 0.

    Raises:
      ValueError: if m < 2.
    """
    m = anchor_rewards_Bxm.shape[-1]
    if m < 2:
        raise ValueError(f"anchor_rewards_Bxm must hold m >= 2 anchor samples a row, got m={m}")
    count_B = jnp.sum(anchor_rewards_Bxm <= reward_B[..., None], axis=-1)
    if m == 2:
        return jnp.where(count_B == 0, jnp.float32(-math.log(16)), 0.0)
    return jnp.log((count_B + 1) / (m + 1)).astype(jnp.float32)


def leave_one_out(x_K: jax.Array) -> jax.Array:
    """Subtracts from each element the mean of the others along the last axis.

    Subtracting this leave-one-out baseline from returns adds no bias to the policy gradient.

    Args:
      x_K: returns of K >= 2 responses along the last axis, any leading shape: [B] for the whole
        batch, [P, K] for K responses a prompt.

    Returns:
      float32 array of the same shape, with mean 0 along the last axis.

    Raises:
      ValueError: if K < 2, where there are no others.
    """
    k = x_K.shape[-1]
    if k < 2:
        raise ValueError(f"a leave-one-out baseline needs K >= 2 responses, got K={k}")
    x_K = x_K.astype(jnp.float32)
    return (x_K - jnp.mean(x_K, axis=-1, keepdims=True)) * (k / (k - 1))


def regularised(
    reward_B: jax.Array,
    log_policy_B: jax.Array,
    log_anchor_B: jax.Array,
    kl_coef: jax.Array | float,
) -> jax.Array:
    """Computes the return R(y) - kl_coef (log policy(y) - log anchor(y)) of each response.

    The coefficient is 1 / (n - 1) = 1 for the best-of-2 that J-BOND distills, plus the weight of an
    additional penalty KL(policy || anchor), if there is one, in the backward part of the loss.

    Args:
      reward_B: sequence rewards, such as those of ``jbond_reward``.
      log_policy_B: log-probabilities of the whole responses under the policy, in nats.
      log_anchor_B: the same under the anchor.
      kl_coef: weight of the KL penalty, >= 0; may be traced.

    Returns:
      float32 returns [B]. No gradient flows through them.
    """
    log_ratio_B = log_policy_B.astype(jnp.float32) - log_anchor_B.astype(jnp.float32)
    return jax.lax.stop_gradient(reward_B.astype(jnp.float32) - kl_coef * log_ratio_B)


def policy_gradient_loss(log_policy_B: jax.Array, advantage_B: jax.Array) -> jax.Array:
    """Computes the REINFORCE loss -A log policy(y) (Williams, 1992).

    Its gradient is an unbiased estimate of that of -E_policy[A].

    Args:
      log_policy_B: log-probabilities, in nats, of responses that were sampled from the policy
        itself.
      advantage_B: A, such as ``leave_one_out(regularised(...))``; no gradient flows through it.

    Returns:
      float32 losses [B], not reduced. Only their gradient is meaningful.
    """
    advantage_B = jax.lax.stop_gradient(advantage_B.astype(jnp.float32))
    return -advantage_B * log_policy_B.astype(jnp.float32)


def jbond_loss(
    log_policy_best_anchor_B: jax.Array,
    log_policy_B: jax.Array,
    advantage_B: jax.Array,
    jeffreys: jax.Array | float,
) -> jax.Array:
    """Computes the loss of J-BOND, a Jeffreys divergence to best-of-n of the anchor.

        jeffreys (-log policy(best of the anchor's samples))        forward KL(bon || policy)
          + (1 - jeffreys) (-A log policy(y)),  y from the policy   backward KL(policy || bon)

    Args:
      log_policy_best_anchor_B: log-probabilities under the policy of the best of the anchor's
        samples, in nats.
      log_policy_B: log-probabilities of the policy's own responses, as in ``policy_gradient_loss``.
      advantage_B: advantages of the policy's own responses, as in ``policy_gradient_loss``.
      jeffreys: weight of the forward part, in [0, 1]; 0.5 in the paper; may be traced.

    Returns:
      float32 losses [B], not reduced.
    """
    forward_B = -log_policy_best_anchor_B.astype(jnp.float32)
    backward_B = policy_gradient_loss(log_policy_B, advantage_B)
    return jeffreys * forward_B + (1 - jeffreys) * backward_B


def ema(anchor: Any, params: Any, rate: jax.Array | float) -> Any:
    """Updates an exponential moving average, (1 - rate) anchor + rate params, leaf by leaf.

    Args:
      anchor: pytree of arrays, the average so far.
      params: pytree of the same structure.
      rate: in [0, 1]; 0 keeps the anchor, 1 replaces it by params; may be traced.

    Returns:
      The updated pytree.
    """
    return jax.tree.map(lambda a, p: (1 - rate) * a + rate * p, anchor, params)
