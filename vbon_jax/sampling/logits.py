"""From logits to a token: temperature, filters, and one uniform number a row."""

import jax
import jax.numpy as jnp

from vbon_jax import sharding

BLOCK = 256  # of the vocabulary, for the two scans of ``sample``


def filter_top_k(logits_BxV: jax.Array, k: int) -> jax.Array:
    """Keep the k largest logits of a row (more at a tie), the others become -inf; k=0 keeps all."""
    if k <= 0 or k >= logits_BxV.shape[-1]:
        return logits_BxV
    kth = jax.lax.top_k(logits_BxV, k)[0][..., -1:]
    return jnp.where(logits_BxV < kth, -jnp.inf, logits_BxV)


def filter_top_p(logits_BxV: jax.Array, p: float) -> jax.Array:
    """Keep the smallest set of tokens of mass p (Holtzman et al. 2020); p=1 keeps all."""
    if p >= 1.0:
        return logits_BxV
    sorted_logits = jnp.sort(logits_BxV, axis=-1, descending=True)
    mass_before = jnp.cumsum(jax.nn.softmax(sorted_logits, axis=-1), axis=-1)
    mass_before = jnp.concatenate(
        [jnp.zeros_like(mass_before[..., :1]), mass_before[..., :-1]], axis=-1
    )
    # The first token always stays: no mass stands before it.
    last_kept = jnp.min(jnp.where(mass_before < p, sorted_logits, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BxV < last_kept, -jnp.inf, logits_BxV)


def sample(uniform_B: jax.Array, logits_BxV: jax.Array) -> jax.Array:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds the uniform.

    One random number a row, where ``jax.random.categorical`` draws one a vocabulary entry. The
    cumulative sum goes over blocks of the vocabulary first, then inside the block that is hit: two
    short scans in place of one over the whole vocabulary.

    Args:
      uniform_B: float32 in [0, 1).
      logits_BxV: float32; -inf marks an impossible token, which is never returned.

    Returns:
      int32 tokens [B].
    """
    batch, vocab = logits_BxV.shape
    weights = jnp.exp(logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True))
    # Blocks of each device's own part of the vocabulary; only their masses are sent.
    parts = sharding.parts("tensor", vocab)
    part = vocab // parts
    weights = jnp.pad(weights.reshape(batch, parts, part), ((0, 0), (0, 0), (0, -part % BLOCK)))
    weights_BxNxK = weights.reshape(batch, -1, BLOCK)
    mass_BxN = sharding.held(jnp.sum(weights_BxNxK, axis=-1), sharding.BATCH)
    mass_BxN = jnp.cumsum(mass_BxN, axis=-1)
    block_B, rest_B = _first_above(mass_BxN, uniform_B * mass_BxN[:, -1])
    inside_BxK = jnp.take_along_axis(weights_BxNxK, block_B[:, None, None], axis=1)[:, 0]
    token_B, _ = _first_above(jnp.cumsum(inside_BxK, axis=-1), rest_B)
    before_B, own_B = jnp.divmod(block_B, weights_BxNxK.shape[1] // parts)
    return before_B * part + own_B * BLOCK + token_B


def _first_above(cdf_BxN: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index of the first entry above the target, and what of the target is left at its start."""
    # Rounding may lift the target to the total; below it, the index has mass.
    target_B = jnp.minimum(target_B, jnp.nextafter(cdf_BxN[:, -1], 0.0))
    index_B = jnp.sum(cdf_BxN <= target_B[:, None], axis=-1, dtype=jnp.int32)
    before_B = jnp.take_along_axis(cdf_BxN, jnp.maximum(index_B - 1, 0)[:, None], axis=-1)[:, 0]
    return index_B, target_B - jnp.where(index_B > 0, before_B, 0.0)
