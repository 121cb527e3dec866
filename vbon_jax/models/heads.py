"""Heads on a decoder's hidden states: a value for each token, label scores for each sequence."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vbon_jax.models.decoder import DecoderConfig

Params = dict[str, Any]

_VALUE = nn.Dense(1, kernel_init=nn.initializers.zeros)


def init_value(config: DecoderConfig, key: jax.Array) -> Params:
    """Returns the value head {kernel [D, 1], bias [1]}, float32, all zero.

    Zero makes the first values exactly 0, so the first advantages are those of the returns alone
    and the value loss sends no gradient into the decoder before the head itself has learned. The
    head learns from zero because its gradient is the hidden states; `key` is used by nothing and
    kept for the common signature of an initializer.
    """
    return _VALUE.init(key, jnp.zeros((1, config.width)))["params"]


def value(params: Params, hidden_BxTxD: jax.Array) -> jax.Array:
    """Returns value_BxT, float32: the predicted return from each token on."""
    with jax.named_scope("value"):
        hidden_NxD = hidden_BxTxD.astype(jnp.float32).reshape(-1, hidden_BxTxD.shape[-1])
        return _VALUE.apply({"params": params}, hidden_NxD).reshape(hidden_BxTxD.shape[:-1])


def _score(num_labels: int, stddev: float) -> nn.Dense:
    # No bias, as in transformers' GPT2ForSequenceClassification.
    return nn.Dense(num_labels, use_bias=False, kernel_init=nn.initializers.normal(stddev))


def init_score(config: DecoderConfig, num_labels: int, key: jax.Array) -> Params:
    """Returns the classifier head {kernel [D, num_labels]}, float32, normal at initializer_range.

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
      params: {kernel [D, num_labels]}.
      hidden_BxTxD: hidden states after the final layer norm.
      mask_BxT: bool, True at real tokens. A row with none is scored at its last column.

    Returns:
      score_BxC, float32 logits over the labels.
    """
    with jax.named_scope("score"):
        length = mask_BxT.shape[1]
        last_B = length - 1 - jnp.argmax(mask_BxT.astype(bool)[:, ::-1], axis=1)
        last_BxD = jnp.take_along_axis(hidden_BxTxD, last_B[:, None, None], axis=1)[:, 0]
        return last_BxD.astype(jnp.float32) @ params["kernel"]
