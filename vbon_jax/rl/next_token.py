"""What the losses need of two next-token distributions, in few passes over the vocabulary.

Log-probs of the sampled token, the KL of the whole distributions and the entropy, all from logits,
with their gradient written out: no normalised array of the vocabulary's size is ever stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class NextToken(NamedTuple):
    """Of each token, float32 [B, T], nats: log-probs under policy and reference, KL(policy || ref)
    of the next-token distributions, entropy of the policy's.
    """

    log_prob: jax.Array
    log_ref: jax.Array
    kl: jax.Array
    entropy: jax.Array


def temper(logits: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """Logits / temperature in float32: the one definition of "at the sampling temperature".

    Sampler, PPO ratio, KL and log pi_ref all go through it, so they speak of one distribution.
    """
    return logits.astype(jnp.float32) / temperature


def log_prob(logits_BxV: jax.Array, token_B: jax.Array) -> jax.Array:
    """Log softmax(logits)[token], float32 nats, shape [B] (any leading shape)."""
    chosen = jnp.take_along_axis(logits_BxV, token_B[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits_BxV, axis=-1)


@jax.custom_vjp
def next_token(
    logits_BxTxV: jax.Array, ref_logits_BxTxV: jax.Array, tokens_BxT: jax.Array
) -> NextToken:
    """Statistics of softmax(logits) against softmax(ref_logits).

        KL = sum_v p_v (log p_v - log q_v),  H = -sum_v p_v log p_v

    Gradients flow into ``logits_BxTxV`` alone; the reference is a constant.

    Args:
        logits_BxTxV, ref_logits_BxTxV: float32, tempered, unfiltered and so finite.
        tokens_BxT: int32, the tokens sampled.
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
    """D log p_a = 1_a - p;  d KL = p (log p - log q - KL);  d H = -p (log p + H)."""
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
