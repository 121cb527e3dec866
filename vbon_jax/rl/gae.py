"""Generalized advantage estimation and whitening over padded batches."""

import jax
import jax.numpy as jnp

from vbon_jax.rl.masking import masked, masked_mean


def gae(
    rewards_BxT: jax.Array,
    values_BxT: jax.Array,
    mask_BxT: jax.Array,
    gamma: jax.Array | float,
    lam: jax.Array | float,
) -> tuple[jax.Array, jax.Array]:
    """Computes generalized advantage estimates (Schulman et al., 2016, Eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1}

    t runs over the tokens inside the mask only; padding at either end or in between is skipped. The
    value after the last token is 0, even for a response truncated at the length limit: the response
    is the whole episode, and R(y) has been paid.

    Args:
      rewards_BxT: reward for emitting token t.
      values_BxT: value of the state in which token t is emitted.
      mask_BxT: True (or 1) at response tokens.
      gamma: discount in [0, 1].
      lam: lambda in [0, 1]; 1 gives Monte Carlo returns, 0 one-step temporal differences.

    Returns:
      (advantages_BxT, returns_BxT), float32, 0 outside the mask; returns are advantages + values.
    """
    mask_BxT = mask_BxT.astype(bool)
    rewards_BxT = rewards_BxT.astype(jnp.float32)
    values_BxT = masked(values_BxT, mask_BxT)

    def step(
        later: tuple[jax.Array, jax.Array], now: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        later_advantage_B, later_value_B = later
        reward_B, value_B, mask_B = now
        delta_B = reward_B + gamma * later_value_B - value_B
        advantage_B = delta_B + gamma * lam * later_advantage_B
        later = (
            jnp.where(mask_B, advantage_B, later_advantage_B),
            jnp.where(mask_B, value_B, later_value_B),
        )
        return later, advantage_B

    end_B = jnp.zeros(rewards_BxT.shape[0], jnp.float32)
    _, advantages_TxB = jax.lax.scan(
        step, (end_B, end_B), (rewards_BxT.T, values_BxT.T, mask_BxT.T), reverse=True
    )
    advantages_BxT = masked(advantages_TxB.T, mask_BxT)
    return advantages_BxT, advantages_BxT + values_BxT


def whiten(x: jax.Array, mask: jax.Array, epsilon: float = 1e-8) -> jax.Array:
    """Standardizes values over a mask, (x - mean) / sqrt(variance + epsilon).

    The variance is the biased one (divided by the count), so that a single token gives 0 and not
    NaN.

    Args:
      x: values, any shape.
      mask: same shape, True (or 1) where x counts.
      epsilon: added to the variance, so that a constant x gives finite values.

    Returns:
      float32 array of x's shape, 0 outside the mask.
    """
    x = masked(x, mask)
    centred = masked(x - masked_mean(x, mask), mask)
    return centred / deviation(x, mask, epsilon)


def deviation(x: jax.Array, mask: jax.Array, epsilon: float = 1e-8) -> jax.Array:
    """Computes sqrt(variance + epsilon) over a mask, the divisor of ``whiten``.

    Args:
      x: values, any shape.
      mask: same shape, True (or 1) where x counts.
      epsilon: added to the variance.

    Returns:
      float32 scalar, from the biased variance (divided by the count).
    """
    x = masked(x, mask)
    centred = masked(x - masked_mean(x, mask), mask)
    return jnp.sqrt(masked_mean(jnp.square(centred), mask) + epsilon)
