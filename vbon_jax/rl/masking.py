"""Sums and means over the real tokens of a padded batch.

Padded slots are replaced before any arithmetic, so that NaN or inf in them reaches neither a value
nor a gradient.
"""

import jax
import jax.numpy as jnp


def masked(x: jax.Array, mask: jax.Array) -> jax.Array:
    """X in float32 where `mask` is true, 0 elsewhere; `mask` is bool or 0/1 and has x's shape."""
    return jnp.where(mask.astype(bool), x.astype(jnp.float32), 0.0)


def masked_mean(x: jax.Array, mask: jax.Array, count: jax.Array | None = None) -> jax.Array:
    """Mean of x over all slots where `mask` is true, a float32 scalar; 0 when there are none.

    With `count`, a float32 scalar, the sum is divided by it instead of by the number of those
    slots: what the parts of a batch give, each with the count of the whole, adds up to its mean.
    """
    if count is None:
        count = jnp.sum(mask.astype(bool).astype(jnp.float32))
    return jnp.sum(masked(x, mask)) / jnp.maximum(count, 1.0)
