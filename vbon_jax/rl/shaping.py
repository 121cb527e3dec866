"""Per-token rewards from one reward per response."""

import jax
import jax.numpy as jnp

from vbon_jax.rl.masking import masked


def token_rewards(
    sequence_reward_B: jax.Array,
    log_policy_BxT: jax.Array,
    log_ref_BxT: jax.Array,
    mask_BxT: jax.Array,
    kl_coef: jax.Array | float,
    entropy_coef: jax.Array | float = 0.0,
) -> jax.Array:
    """Distributes E[R(y)] - kl_coef KL(policy || ref) + entropy_coef H(policy) over the tokens.

        r_t = -kl_coef (log policy_t - log ref_t) - entropy_coef log policy_t  [+ R, last token]

    The rewards of a response sum to the Monte Carlo estimate of that objective. The last token is
    the last position where the mask is True, so R is never placed on padding; a row that is masked
    entirely gets only zeros.

    Args:
      sequence_reward_B: R(y).
      log_policy_BxT: log-probability of each token under the policy that sampled it, in nats.
      log_ref_BxT: the same under the reference.
      mask_BxT: True (or 1) at response tokens.
      kl_coef: weight of the KL penalty, >= 0.
      entropy_coef: weight of the entropy; negative to penalize it.

    Returns:
      float32 rewards [B, T], 0 outside the mask. No gradient flows through them.
    """
    mask_BxT = mask_BxT.astype(bool)
    log_policy_BxT = masked(log_policy_BxT, mask_BxT)
    log_ref_BxT = masked(log_ref_BxT, mask_BxT)
    per_token_BxT = -kl_coef * (log_policy_BxT - log_ref_BxT) - entropy_coef * log_policy_BxT
    rewards_BxT = per_token_BxT + at_last(sequence_reward_B, mask_BxT)
    return jax.lax.stop_gradient(masked(rewards_BxT, mask_BxT))


def at_last(reward_B: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Puts one reward a response at its last token.

    Args:
      reward_B: of each response.
      mask_BxT: True (or 1) at response tokens.

    Returns:
      float32 [B, T], the reward at the last position where the mask is True, 0 elsewhere.
    """
    mask_BxT = mask_BxT.astype(bool)
    T = mask_BxT.shape[-1]
    last_B = T - 1 - jnp.argmax(mask_BxT[:, ::-1], axis=-1)
    is_last_BxT = (jnp.arange(T) == last_B[:, None]) & mask_BxT
    return jnp.where(is_last_BxT, reward_B.astype(jnp.float32)[:, None], 0.0)
