"""Estimators of KL(policy || ref) = E_policy[log policy - log ref] from samples of the *policy*.

Sign convention: positive means that the policy has moved away; log-ratios are log policy - log ref.
k1 and k3 are named after Schulman's note "Approximating KL divergence" (2020). All log-probs must
be of the same tempered, unfiltered distributions that tokens were sampled from.
"""

import jax
import jax.numpy as jnp

from vbon_jax.rl.masking import masked


def sequence_sum(per_token_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Sum over the tokens of each response inside the mask, float32 of shape B."""
    return jnp.sum(masked(per_token_BxT, mask_BxT), axis=-1)


def k1(log_policy_BxT: jax.Array, log_ref_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """sum_t (log policy_t - log ref_t) for each response: unbiased, may be negative.

    Args:
        log_policy_BxT: log-probability of each sampled token under the policy, in nats.
        log_ref_BxT: the same under the reference.
        mask_BxT: true (or 1) at response tokens.

    Returns:
        float32 array of shape B, in nats a response.
    """
    log_ratio_BxT = masked(log_policy_BxT, mask_BxT) - masked(log_ref_BxT, mask_BxT)
    return sequence_sum(log_ratio_BxT, mask_BxT)


def k3(log_policy_BxT: jax.Array, log_ref_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """sum_t (q_t - 1 - log q_t), q_t = ref_t / policy_t, for each response: never negative.

    Unbiased too, where the reference's support lies in the policy's; its variance is that of q_t,
    which is large once the two are far apart.

    Args:
        log_policy_BxT: log-probability of each sampled token under the policy, in nats.
        log_ref_BxT: the same under the reference.
        mask_BxT: true (or 1) at response tokens.

    Returns:
        float32 array of shape B, in nats a response.
    """
    log_q_BxT = masked(log_ref_BxT, mask_BxT) - masked(log_policy_BxT, mask_BxT)
    return sequence_sum(jnp.expm1(log_q_BxT) - log_q_BxT, mask_BxT)


def full_kl(
    policy_log_probs_BxTxV: jax.Array, ref_log_probs_BxTxV: jax.Array, mask_BxT: jax.Array
) -> jax.Array:
    """KL of the whole next-token distribution at each token, sum_v p_v (log p_v - log q_v).

    Exact given the prefix; only the prefixes are sampled, so its `sequence_sum` is an unbiased
    estimate of the KL of responses, with far less variance than k1.

    Args:
        policy_log_probs_BxTxV: normalised log-probabilities, in nats; -inf is probability 0.
        ref_log_probs_BxTxV: the same under the reference; -inf where the policy is not -inf gives
            inf, the true value.
        mask_BxT: true (or 1) at response tokens.

    Returns:
        float32 array BxT, in nats a token, 0 outside the mask.
    """
    # 0 (log 0 - log q) = 0; replacing both logs keeps NaN out of the gradient too.
    counts_BxTxV = mask_BxT.astype(bool)[..., None] & ~jnp.isneginf(policy_log_probs_BxTxV)
    log_p_BxTxV = masked(policy_log_probs_BxTxV, counts_BxTxV)
    log_q_BxTxV = masked(ref_log_probs_BxTxV, counts_BxTxV)
    p_BxTxV = jnp.where(counts_BxTxV, jnp.exp(log_p_BxTxV), 0.0)
    return jnp.sum(p_BxTxV * (log_p_BxTxV - log_q_BxTxV), axis=-1)
