"""Estimators of KL(policy || ref) = E_policy[log policy - log ref] from samples of the *policy*.

Sign convention: log-ratios are log policy - log ref, so the divergence grows as the policy moves
away from the reference. k1 and k3 are named after Schulman's note "Approximating KL divergence"
(2020). All log-probabilities must be those of the tempered, unfiltered distribution that tokens
were sampled from.
"""

import jax
import jax.numpy as jnp

from vbon_jax.rl.masking import masked


def sequence_sum(per_token_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Sums per-token values over each response.

    Args:
      per_token_BxT: values of each token.
      mask_BxT: True (or 1) at response tokens.

    Returns:
      float32 sums [B] over the tokens inside the mask.
    """
    return jnp.sum(masked(per_token_BxT, mask_BxT), axis=-1)


def k1(log_policy_BxT: jax.Array, log_ref_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Computes the estimate sum_t (log policy_t - log ref_t) of each response.

    It is unbiased and may be negative.

    Args:
      log_policy_BxT: log-probability of each sampled token under the policy, in nats.
      log_ref_BxT: the same under the reference.
      mask_BxT: True (or 1) at response tokens.

    Returns:
      float32 estimates [B], in nats per response.
    """
    log_ratio_BxT = masked(log_policy_BxT, mask_BxT) - masked(log_ref_BxT, mask_BxT)
    return sequence_sum(log_ratio_BxT, mask_BxT)


def k3(log_policy_BxT: jax.Array, log_ref_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Computes the estimate sum_t (q_t - 1 - log q_t), q_t = ref_t / policy_t, of each response.

    It is never negative, and unbiased if the support of the reference lies within that of the
    policy. Its variance is that of q_t, which is large if the two distributions are far apart.

    Args:
      log_policy_BxT: log-probability of each sampled token under the policy, in nats.
      log_ref_BxT: the same under the reference.
      mask_BxT: True (or 1) at response tokens.

    Returns:
      float32 estimates [B], in nats per response.
    """
    log_q_BxT = masked(log_ref_BxT, mask_BxT) - masked(log_policy_BxT, mask_BxT)
    return sequence_sum(jnp.expm1(log_q_BxT) - log_q_BxT, mask_BxT)


def full_kl(
    policy_log_probs_BxTxV: jax.Array, ref_log_probs_BxTxV: jax.Array, mask_BxT: jax.Array
) -> jax.Array:
    """Computes the KL divergence of the whole next-token distribution at each token.

        sum_v p_v (log p_v - log q_v)

    It is exact given the prefix; only prefixes are sampled. Its ``sequence_sum`` is therefore an
    unbiased estimate of the KL divergence of responses, with much lower variance than ``k1``.

    Args:
      policy_log_probs_BxTxV: normalized log-probabilities of the policy, in nats; -inf is
        probability 0.
      ref_log_probs_BxTxV: the same of the reference. Where it is -inf and the policy is not, the
        result is inf, the true value.
      mask_BxT: True (or 1) at response tokens.

    Returns:
      float32 array [B, T], in nats per token, 0 outside the mask.
    """
    # 0 (log 0 - log q) = 0; replacing both logs keeps NaN out of the gradient too.
    counts_BxTxV = mask_BxT.astype(bool)[..., None] & ~jnp.isneginf(policy_log_probs_BxTxV)
    log_p_BxTxV = masked(policy_log_probs_BxTxV, counts_BxTxV)
    log_q_BxTxV = masked(ref_log_probs_BxTxV, counts_BxTxV)
    p_BxTxV = jnp.where(counts_BxTxV, jnp.exp(log_p_BxTxV), 0.0)
    return jnp.sum(p_BxTxV * (log_p_BxTxV - log_q_BxTxV), axis=-1)
