"""Losses of offline alignment from single responses and their rewards: QRPO.

A log-ratio is log policy(y) - log ref(y) of a whole response, in nats, the sum over its tokens.
"""

import jax
import jax.numpy as jnp


def qrpo_loss(log_ratio_B: jax.Array, target_B: jax.Array, beta: jax.Array | float) -> jax.Array:
    """Computes the loss of quantile reward policy optimization (QRPO), divided by beta.

        1/beta (f(q) - beta log Z - beta log-ratio)^2 = beta (target - log-ratio)^2

    with target = f(q) / beta - log Z, as ``bon.targets.qrpo_log_ratio`` computes it. Matrenok et
    al., 2025, without the division: targets are of the size of 1/beta, so at policy = ref
    their gradient goes to 0 with beta, and this one's does not. It is 0 where policy = ref exp(f(q)
    / beta) / Z, whatever the frequencies of the responses.

    Args:
      log_ratio_B: log-ratio of each response.
      target_B: the log-ratio that it has at the optimum.
      beta: weight of the KL penalty, > 0; may be traced.

    Returns:
      float32 losses [B], not reduced.
    """
    return beta * jnp.square(target_B - log_ratio_B.astype(jnp.float32))
