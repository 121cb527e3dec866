"""Proximal policy optimization (Schulman et al., 2017): clipped losses over response tokens."""

import jax
import jax.numpy as jnp

from vbon_jax.rl.masking import masked, masked_mean


def policy_loss(
    log_prob: jax.Array,
    old_log_prob: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    clip: jax.Array | float,
    count: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the clipped surrogate loss, Eq. 7 of the PPO paper, negated so as to be minimized.

        -mean_t min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t),  rho_t = pi(t) / pi_old(t)

    Args:
      log_prob: log-probability of each token under the policy being trained, [B, T], in nats.
      old_log_prob: the same under the policy that sampled it; no gradient flows through it.
      advantages: A_t, [B, T]; no gradient flows through them.
      mask: True (or 1) at response tokens, [B, T].
      clip: the clip range, 0.2 in the paper.
      count: divisor of the sums; None for the number of tokens (see ``masked_mean``).

    Returns:
      (loss, info). The loss is the mean over all tokens inside the mask. info has the float32
      scalars ``clip_fraction``, the fraction of tokens whose ratio is outside [1 - clip, 1 + clip];
      ``approx_kl``, the mean of rho - 1 - log rho, an estimate of KL(pi_old || pi) in nats per
      token; and ``ratio_mean``, the mean of rho.
    """
    advantages = jax.lax.stop_gradient(masked(advantages, mask))
    log_ratio = masked(log_prob, mask) - jax.lax.stop_gradient(masked(old_log_prob, mask))
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    loss = -masked_mean(jnp.minimum(ratio * advantages, clipped * advantages), mask, count)
    info = {
        "clip_fraction": masked_mean(jnp.abs(ratio - 1) > clip, mask, count),
        "approx_kl": masked_mean(jnp.expm1(log_ratio) - log_ratio, mask, count),
        "ratio_mean": masked_mean(ratio, mask, count),
    }
    return loss, jax.lax.stop_gradient(info)


def value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    clip: jax.Array | float,
    count: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the clipped squared error of the value head, to be minimized.

        1/2 mean_t max((V_t - R_t)^2, (V_old_t + clip(V_t - V_old_t, -clip, clip) - R_t)^2)

    Args:
      values: V_t of the network being trained, [B, T].
      old_values: V_t at the time of the rollout, [B, T]; no gradient flows through it.
      returns: R_t, [B, T]; no gradient flows through it.
      mask: True (or 1) at response tokens, [B, T].
      clip: the clip range, in units of the value.
      count: divisor of the sums; None for the number of tokens (see ``masked_mean``).

    Returns:
      (loss, info). The loss is the mean over all tokens inside the mask. info has the float32
      scalar ``clip_fraction``, the fraction of tokens whose value has changed by more than clip.
    """
    values = masked(values, mask)
    old_values = jax.lax.stop_gradient(masked(old_values, mask))
    returns = jax.lax.stop_gradient(masked(returns, mask))
    moved = values - old_values
    clipped = old_values + jnp.clip(moved, -clip, clip)
    worst = jnp.maximum(jnp.square(values - returns), jnp.square(clipped - returns))
    info = {"clip_fraction": masked_mean(jnp.abs(moved) > clip, mask, count)}
    return masked_mean(worst, mask, count) / 2, jax.lax.stop_gradient(info)


def token_entropy(log_probs_BxTxV: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Computes the entropy of the next-token distribution at each token, -sum_v p_v log p_v.

    Args:
      log_probs_BxTxV: normalized log-probabilities of the tempered distribution, in nats; -inf is
        probability 0.
      mask_BxT: True (or 1) at response tokens.

    Returns:
      float32 array [B, T], in nats per token, in [0, log V], 0 outside the mask.
    """
    # 0 log 0 = 0, without a NaN in the gradient.
    counts_BxTxV = mask_BxT.astype(bool)[..., None] & ~jnp.isneginf(log_probs_BxTxV)
    log_p_BxTxV = masked(log_probs_BxTxV, counts_BxTxV)
    return -jnp.sum(jnp.where(counts_BxTxV, jnp.exp(log_p_BxTxV), 0.0) * log_p_BxTxV, axis=-1)


def explained_variance(values: jax.Array, returns: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes 1 - Var(returns - values) / Var(returns) over a mask.

    1 means perfect predictions, 0 no better than a constant. If the returns are constant there is
    no variance to explain: the result is then 1 if the error is constant too, else 0, so that it is
    always finite.

    Args:
      values: predicted values, [B, T].
      returns: the returns they predict, [B, T].
      mask: True (or 1) at response tokens, [B, T].

    Returns:
      float32 scalar, <= 1.
    """

    def variance(x: jax.Array) -> jax.Array:
        return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)

    returns = masked(returns, mask)
    total = variance(returns)
    error = variance(returns - masked(values, mask))
    constant = jnp.where(error == 0, 1.0, 0.0)
    return jnp.where(total == 0, constant, 1 - error / jnp.where(total == 0, 1.0, total))
