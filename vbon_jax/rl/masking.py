"""Sums and means over the real tokens of a padded batch.

Padded positions are replaced by 0 before any arithmetic, so that NaN or inf in them reaches neither
a value nor a gradient.
"""

import jax
import jax.numpy as jnp


def masked(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns x as float32 where the mask is True, and 0 elsewhere.

    Args:
      x: values, any shape.
      mask: bool or 0/1, same shape.
    """
    return jnp.where(mask.astype(bool), x.astype(jnp.float32), 0.0)


def masked_mean(x: jax.Array, mask: jax.Array, count: jax.Array | None = None) -> jax.Array:
    """Computes the mean of x over all positions where the mask is True.

    Args:
      x: values, any shape.
      mask: bool or 0/1, same shape.
      count: float32 scalar to divide the sum by, in place of the number of such positions. If each
        part of a batch is given the count of the whole batch, the results add up to the mean of the
        batch.

    Returns:
      float32 scalar; 0 if the mask is False everywhere.
    """
    if count is None:
        count = jnp.sum(mask.astype(bool).astype(jnp.float32))
    return jnp.sum(masked(x, mask)) / jnp.maximum(count, 1.0)
