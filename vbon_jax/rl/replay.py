"""Learning from stored samples of the reference beside the policy's own responses.

For each prompt, a share a of the rows are samples of the reference and the others responses of the
policy: together they are drawn from the mixture a pi_ref + (1 - a) pi. An expectation under the
policy is that of the rows times

    r(y) = pi(y) / (a pi_ref(y) + (1 - a) pi(y)),

the balance heuristic of multiple importance sampling (Veach and Guibas, 1995), which is at most
1 / (1 - a): no row counts for many. Bad responses, which a policy near best-of-n draws seldom, are
half of the reference's; what they weigh there is small, and known well.
"""

import jax
import jax.numpy as jnp


def balance(log_policy_ratio_B: jax.Array, share: float) -> jax.Array:
    """Computes the weights r(y) of rows as samples of the policy.

    Args:
      log_policy_ratio_B: log(pi / pi_ref) of whole responses, nats.
      share: a, of the rows that are the reference's, in [0, 1]. At 1 the weights are pi / pi_ref.

    Returns:
      float32 [B], in [0, 1 / (1 - a)].
    """
    return 1.0 / (share * jnp.exp(-log_policy_ratio_B) + (1.0 - share))


def forward(log_ratio_B: jax.Array, log_policy_ratio_B: jax.Array, share: float) -> jax.Array:
    """Computes what the gradient of the forward KL adds to the weighted advantages of rows.

        -grad KL(pi_bon || pi) = E[ (pi_bon(y) - pi(y)) / q(y) grad log pi(y) ],
        q(y) = a pi_ref(y) + (1 - a) pi(y),

    over the rows. Without pi(y), which adds nothing to the expectation, it were the gradient of
    weighted likelihood; with it, it is 0 on every row where the policy is best-of-n.

    Args:
      log_ratio_B: log(pi_bon / pi_ref), nats.
      log_policy_ratio_B: log(pi / pi_ref), nats.
      share: a, in (0, 1]: above 0, or a response that the policy seldom draws counts without limit.

    Returns:
      float32 [B], between -1 / (1 - a) and exp(log_ratio) / a.
    """
    of_reference_B = 1.0 / (share + (1.0 - share) * jnp.exp(log_policy_ratio_B))
    return jnp.exp(log_ratio_B) * of_reference_B - balance(log_policy_ratio_B, share)
