"""Statistics of two next-token distributions, computed in few passes over the vocabulary.

The log-probabilities of the sampled token, the KL divergence of the whole distributions and the
entropy, all from logits and with a custom gradient: no normalized array of the vocabulary's size is
ever stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class NextToken(NamedTuple):
    """Statistics of each token, float32 [B, T], in nats.

    Attributes:
      log_prob: log-probability of the token under the policy.
      log_ref: log-probability of the token under the reference.
      kl: KL(policy || ref) of the next-token distributions.
      entropy: entropy of the policy's next-token distribution.
    """

    log_prob: jax.Array
    log_ref: jax.Array
    kl: jax.Array
    entropy: jax.Array


def temper(logits: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Computes logits / temperature in float32, the logits of the sampling distribution.

    The sampler, the PPO ratio, the KL divergence and log pi_ref all use this function, so that they
    refer to the same distribution.

    Args:
      logits: unnormalized log-probabilities, any shape and float dtype.
      temperature: sampling temperature, > 0; may be traced.
    """
    return logits.astype(jnp.float32) / temperature


def log_prob(logits_BxV: jax.Array, token_B: jax.Array) -> jax.Array:
    """Computes log softmax(logits)[token].

    Args:
      logits_BxV: float32 logits; any leading shape.
      token_B: integer token ids of that leading shape.

    Returns:
      float32 log-probabilities [B], in nats.
    """
    chosen = jnp.take_along_axis(logits_BxV, token_B[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits_BxV, axis=-1)


@jax.custom_vjp
def next_token(
    logits_BxTxV: jax.Array, ref_logits_BxTxV: jax.Array, tokens_BxT: jax.Array
) -> NextToken:
    """Computes statistics of softmax(logits) and softmax(ref_logits) at each token.

        KL = sum_v p_v (log p_v - log q_v),  H = -sum_v p_v log p_v

    Gradients flow into ``logits_BxTxV`` alone; the reference is a constant.

    Args:
      logits_BxTxV: float32 logits of the policy, tempered and unfiltered, and so finite.
      ref_logits_BxTxV: the same of the reference.
      tokens_BxT: int32 ids of the sampled tokens.

    Returns:
      The statistics, [B, T] each.
    """
    return _forward(logits_BxTxV, ref_logits_BxTxV, tokens_BxT)[0]


def _forward(logits: jax.Array, ref_logits: jax.Array, tokens: jax.Array):
    # logsumexp's own gradient is not needed, and its guards against inf cost passes.
    log_z, log_z_ref = (
        jnp.max(x, axis=-1) + jnp.log(jnp.sum(jnp.exp(x - jnp.max(x, -1, keepdims=True)), axis=-1))
        for x in (logits, ref_logits)
    )
    log_p = logits - log_z[..., None]
    log_q = ref_logits - log_z_ref[..., None]
    p = jnp.exp(log_p)
    kl = jnp.sum(p * (log_p - log_q), axis=-1)
    entropy = -jnp.sum(p * log_p, axis=-1)
    chosen, chosen_ref = (
        jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0] for x in (logits, ref_logits)
    )
    out = NextToken(chosen - log_z, chosen_ref - log_z_ref, kl, entropy)
    return out, (logits, ref_logits, tokens, log_z, log_z_ref, kl, entropy)


def _backward(saved: tuple, grad: NextToken):
    """Applies d log p_a = 1_a - p;  d KL = p (log p - log q - KL);  d H = -p (log p + H)."""
    logits, ref_logits, tokens, log_z, log_z_ref, kl, entropy = saved
    log_p = logits - log_z[..., None]
    log_q = ref_logits - log_z_ref[..., None]
    slope = (
        grad.kl[..., None] * (log_p - log_q - kl[..., None])
        - grad.entropy[..., None] * (log_p + entropy[..., None])
        - grad.log_prob[..., None]
    )
    is_token = jnp.arange(logits.shape[-1]) == tokens[..., None]
    return jnp.exp(log_p) * slope + jnp.where(is_token, grad.log_prob[..., None], 0.0), None, None


next_token.defvjp(_forward, _backward)
