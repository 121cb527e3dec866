"""The head that predicts the distribution of the reward from what is known of a prompt.

With u in [0, 1] the rank of a reward in the pool of all prompts' samples, the density of u is an
exponential family around the pool's own, which is uniform:

    p(u | x) = exp(sum_j a_j(x) phi_j(u)) / Z(x),

phi_j the Legendre polynomials of degree 1 to J on [0, 1] with mean square 1, and a(x) affine in the
features x of the prompt. a = 0 is the pool's distribution, where the head begins. The density is
constant within a bin (``bon.amortised``), so Z is a sum and CDF and likelihood are exact.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]


def legendre(u: np.ndarray, terms: int) -> np.ndarray:
    """The polynomials phi_1 to phi_J at u in [0, 1]: float32, one more axis of J = ``terms``."""
    of_degree = np.polynomial.legendre.legvander(2 * np.asarray(u) - 1.0, terms)[..., 1:]
    return (of_degree * np.sqrt(2 * np.arange(1, terms + 1) + 1)).astype(np.float32)


def init(width: int, terms: int) -> Params:
    """Initializes a head to the pool's own distribution.

    Args:
      width: D, of the features.
      terms: J.

    Returns:
      {kernel [D, J], bias [J]}, float32 zeros.
    """
    return {"kernel": jnp.zeros((width, terms)), "bias": jnp.zeros(terms)}


def log_masses(
    params: Params, x_PxD: jax.Array, basis_KxJ: jax.Array, log_base_K: jax.Array
) -> jax.Array:
    """The log mass of each bin, float32 [P, K].

    Args:
      params: of `init`.
      x_PxD: features of prompts.
      basis_KxJ: the polynomials in the middle of each bin.
      log_base_K: log masses of the bins in the pool.
    """
    with jax.named_scope("reward_head"):
        a_PxJ = x_PxD @ params["kernel"] + params["bias"]
        return jax.nn.log_softmax(a_PxJ @ basis_KxJ.T + log_base_K)
