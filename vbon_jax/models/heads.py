"""Heads on a decoder's hidden states: values of tokens and label scores of sequences."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import sharding
from vbon_jax.models.decoder import DecoderConfig

Params = dict[str, Any]

_VALUE = nn.Dense(1, kernel_init=nn.initializers.zeros)


def init_value(config: DecoderConfig, key: jax.Array) -> Params:
    """Initializes a value head to zero.

    With zeros, the first values are exactly 0: the first advantages are those of the returns alone,
    and the value loss sends no gradient into the decoder before the head itself has learned. The
    head learns from zero because its gradient is proportional to the hidden states.

    Args:
      config: the decoder's configuration.
      key: not used; kept for the common signature of an initializer.

    Returns:
      {kernel [D, 1], bias [1]}, float32.
    """
    return _VALUE.init(key, jnp.zeros((1, config.width)))["params"]


def value(params: Params, hidden_BxTxD: jax.Array) -> jax.Array:
    """Predicts the return from each token on.

    Args:
      params: {kernel [D, 1], bias [1]}.
      hidden_BxTxD: hidden states after the final norm; any leading shape.

    Returns:
      float32 values [B, T].
    """
    with jax.named_scope("value"):
        hidden_NxD = hidden_BxTxD.astype(jnp.float32).reshape(-1, hidden_BxTxD.shape[-1])
        return _VALUE.apply({"params": params}, hidden_NxD).reshape(hidden_BxTxD.shape[:-1])


class Moments(NamedTuple):
    """Second moments of tokens' hidden states and returns: all that least squares reads of them.

    Attributes:
      gram: float32 [D + 1, D + 1], sums of x x^T, x being a hidden state and a 1 after it.
      cross: float32 [D + 1], sums of x times the return.
      square: float32, sum of squared returns.
    """

    gram: jax.Array
    cross: jax.Array
    square: jax.Array


def moments(hidden_BxTxD: jax.Array, return_BxT: jax.Array, mask_BxT: jax.Array) -> Moments:
    """Computes the moments of the tokens where the mask is True."""
    hidden_NxD = hidden_BxTxD.astype(jnp.float32).reshape(-1, hidden_BxTxD.shape[-1])
    here_N, return_N = (x.astype(jnp.float32).reshape(-1) for x in (mask_BxT, return_BxT))
    x_NxE = jnp.pad(hidden_NxD, ((0, 0), (0, 1)), constant_values=1.0) * here_N[:, None]
    return Moments(x_NxE.T @ x_NxE, x_NxE.T @ return_N, jnp.sum(here_N * jnp.square(return_N)))


def fit_value(found: Moments) -> Params:
    """Fits a value head by ridge regression, on the host in float64.

    With N tokens the penalty is D / N of the hidden states' mean variance: nothing where tokens
    abound, and most of the variance where they are few.

    Args:
      found: moments of the tokens.

    Returns:
      {kernel [D, 1], bias [1]}, float32.
    """
    gram, cross = (np.asarray(x, np.float64) for x in sharding.fetch(found[:2]))
    count, width = max(gram[-1, -1], 1.0), len(cross) - 1
    mean_D, mean = gram[-1, :-1] / count, cross[-1] / count
    covariance = gram[:-1, :-1] / count - np.outer(mean_D, mean_D)
    ridge = np.trace(covariance) / count + 1e-12  # D / N of trace / D
    kernel_D = np.linalg.solve(
        covariance + ridge * np.eye(width), cross[:-1] / count - mean_D * mean
    )
    bias = mean - mean_D @ kernel_D
    return {"kernel": jnp.float32(kernel_D)[:, None], "bias": jnp.float32(bias)[None]}


def explained_variance(params: Params, found: Moments) -> float:
    """The share of the returns' variance that a value head explains; 0 where they do not vary."""
    gram, cross, square = (np.asarray(x, np.float64) for x in sharding.fetch(tuple(found)))
    w_E = np.append(np.asarray(params["kernel"], np.float64), np.asarray(params["bias"]))
    count = max(gram[-1, -1], 1.0)
    variance = square / count - (cross[-1] / count) ** 2
    error = (square - 2 * w_E @ cross + w_E @ gram @ w_E) / count
    error -= ((cross[-1] - w_E @ gram[:, -1]) / count) ** 2  # as `rl.ppo.explained_variance`
    return float(1 - error / variance) if variance > 0 else 0.0


def _score(num_labels: int, stddev: float) -> nn.Dense:
    # No bias, as in transformers' GPT2ForSequenceClassification.
    return nn.Dense(num_labels, use_bias=False, kernel_init=nn.initializers.normal(stddev))


def init_score(config: DecoderConfig, num_labels: int, key: jax.Array) -> Params:
    """Initializes a classifier head, normal with standard deviation ``initializer_range``.

    Args:
      config: the decoder's configuration.
      num_labels: C, the number of labels.
      key: random key.

    Returns:
      {kernel [D, C]}, float32, without a bias as in transformers' GPT2ForSequenceClassification.

    Raises:
      ValueError: if num_labels is less than 1.
    """
    if num_labels < 1:
        raise ValueError(f"num_labels is {num_labels}: give at least 1")
    head = _score(num_labels, config.initializer_range)
    return head.init(key, jnp.zeros((1, config.width)))["params"]


def score(params: Params, hidden_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Scores each sequence by the hidden state of its last real token.

    Args:
      params: {kernel [D, C]}.
      hidden_BxTxD: hidden states after the final norm.
      mask_BxT: bool, True at real tokens. A row of padding only is scored at its last column.

    Returns:
      float32 logits [B, C] over the labels.
    """
    with jax.named_scope("score"):
        length = mask_BxT.shape[1]
        last_B = length - 1 - jnp.argmax(mask_BxT.astype(bool)[:, ::-1], axis=1)
        last_BxD = jnp.take_along_axis(hidden_BxTxD, last_B[:, None, None], axis=1)[:, 0]
        return last_BxD.astype(jnp.float32) @ params["kernel"]
