"""Losses of offline alignment from pairs of responses: DPO and BoNBoN.

A log-ratio is log policy(y) - log ref(y) of a whole response, in nats, the sum over its tokens.
"""

import jax
import jax.numpy as jnp


def dpo_loss(
    log_ratio_best_B: jax.Array,
    log_ratio_worst_B: jax.Array,
    beta: jax.Array | float,
    preferred_B: jax.Array | float = 1.0,
) -> jax.Array:
    """Computes the loss of direct preference optimization with label probabilities.

        -p log sigmoid(z) - (1 - p) log sigmoid(-z),  z = beta (log-ratio(best) - log-ratio(worst))

    Rafailov et al., 2023, Eq. 7. p = 1 are hard labels, from a single comparison that best won.
    p = sigmoid(r(best) - r(worst)) gives the expected loss under Bradley-Terry labels. If the pairs
    connect all responses, its minimizer is pi_ref exp(r / beta) / Z, whatever the frequencies of
    the pairs. With hard labels from a deterministic comparison, there is no finite minimizer.

    Args:
      log_ratio_best_B: log-ratio of the preferred response of each pair.
      log_ratio_worst_B: log-ratio of the other response.
      beta: weight of the implied KL penalty, > 0; may be traced.
      preferred_B: p, the probability in [0, 1] that best is preferred; broadcasts.

    Returns:
      float32 losses [B] in nats, not reduced.
    """
    z_B = beta * (log_ratio_best_B.astype(jnp.float32) - log_ratio_worst_B.astype(jnp.float32))
    # p softplus(-z) + (1 - p) softplus(z), where softplus(-z) = softplus(z) - z.
    return jax.nn.softplus(z_B) - preferred_B * z_B


def bonbon_beta(n: int) -> float:
    """Computes beta_n = 1 / (2 (n - 1) sum_{k=1}^{n-1} 1/k) of BoNBoN (Gui et al., 2024).

    1 / (2 beta_n) = (n - 1) H_{n-1} is the mean of log-ratio(best) - log-ratio(worst) under exact
    best-of-n of a continuous reward, where log-ratio = log n + (n - 1) log F.

    Args:
      n: number of draws, a whole number >= 2.

    Returns:
      beta_n, > 0.

    Raises:
      ValueError: if n is not a whole number >= 2 (with a single draw, best and worst are the same).
    """
    if not (n >= 2 and n % 1 == 0):
        raise ValueError(f"n must be a whole number >= 2 (best and worst of n draws), got n={n}")
    n = int(n)
    return 1 / (2 * (n - 1) * sum(1 / k for k in range(1, n)))


def bonbon_alpha(mean_nll: float, beta_n: float) -> float:
    """Computes the weight alpha that balances the two terms of ``bonbon_loss`` at policy = ref.

    There the second term is (1 / (2 beta_n))^2 for every pair, so alpha solves alpha mean_nll = (1
    - alpha) (1 / (2 beta_n))^2.

    Args:
      mean_nll: mean of -log ref(best) over the training set, in nats per response, > 0.
      beta_n: ``bonbon_beta`` of n, > 0.

    Returns:
      alpha, in (0, 1).

    Raises:
      ValueError: if mean_nll or beta_n is not positive.
    """
    if not (mean_nll > 0 and beta_n > 0):
        raise ValueError(
            f"mean_nll and beta_n must be > 0, got mean_nll={mean_nll}, beta_n={beta_n}"
        )
    squared = (1 / (2 * beta_n)) ** 2
    return squared / (mean_nll + squared)


def bonbon_loss(
    log_policy_best_B: jax.Array,
    log_ratio_best_B: jax.Array,
    log_ratio_worst_B: jax.Array,
    beta_n: jax.Array | float,
    alpha: jax.Array | float,
) -> jax.Array:
    """Computes the loss of BoNBoN alignment for the best and the worst of n draws.

    Gui et al., 2024:

        alpha (-log policy(best))
          + (1 - alpha) (log-ratio(best) - log-ratio(worst) - 1 / (2 beta_n))^2

    Args:
      log_policy_best_B: log-probability of the best response under the policy, in nats, summed over
        its tokens.
      log_ratio_best_B: log-ratio of the best response.
      log_ratio_worst_B: log-ratio of the worst response.
      beta_n: ``bonbon_beta`` of n; may be traced.
      alpha: weight of the first term, in [0, 1]; may be traced.

    Returns:
      float32 losses [B], not reduced.
    """
    gap_B = log_ratio_best_B.astype(jnp.float32) - log_ratio_worst_B.astype(jnp.float32)
    squared_B = jnp.square(gap_B - 1 / (2 * beta_n))
    return -alpha * log_policy_best_B.astype(jnp.float32) + (1 - alpha) * squared_B
