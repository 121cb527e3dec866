"""Heads on a decoder's hidden states: values of tokens and label scores of sequences."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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
