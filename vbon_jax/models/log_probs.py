"""What models give the tokens of responses, teacher-forced, with logits of few tokens at once."""

from typing import Any

import jax
import jax.numpy as jnp

from vbon_jax.models import decoder
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.rl import chunked
from vbon_jax.rl.next_token import NextToken, log_prob, next_token, temper

CHUNK = 1_024  # tokens whose logits are held at once, where nobody says otherwise


def hidden(
    params: Any,
    config: DecoderConfig,
    tokens_BxS: jax.Array,
    mask_BxS: jax.Array,
    response_len: int,
) -> jax.Array:
    """Hidden states [B, T, D] that predict the last ``response_len`` tokens.

    Args:
      tokens_BxS: prompt and response in one row (left-padded prompt, then the response slots).
      mask_BxS: bool, True on real tokens of both.
    """
    return before(decoder.hidden(params, config, tokens_BxS, mask_BxS), response_len)


def before(hidden_BxSxD: jax.Array, response_len: int) -> jax.Array:
    """Of the states of whole rows those *before* each response token, which predict it."""
    return hidden_BxSxD[:, -response_len - 1 : -1]


def project(
    head: jax.Array, config: DecoderConfig, hidden: jax.Array, temperature: jax.Array | float
) -> jax.Array:
    """Tempered logits of hidden states: the distribution that tokens are sampled from."""
    return temper(decoder.project(head, config, hidden), temperature)


def flat(x_BxT: jax.Array) -> jax.Array:
    """[B, T, ...] -> [B * T, ...]: one row a token."""
    return x_BxT.reshape(-1, *x_BxT.shape[2:])


def against(
    heads: tuple[jax.Array, ...],
    configs: tuple[DecoderConfig, ...],
    hidden: tuple[jax.Array, ...],
    tokens_BxT: jax.Array,
    temperature: jax.Array | float,
    chunk: int = CHUNK,
) -> NextToken:
    """``next_token`` of policy and reference, [B, T] each, from their hidden states [B, T, D]."""

    def both(heads: Any, states: Any) -> Any:
        return tuple(
            project(h, c, x, temperature) for h, c, x in zip(heads, configs, states, strict=True)
        )

    found = chunked.map_logits(
        lambda logits, tokens: next_token(*logits, tokens),
        both,
        heads,
        (flat(hidden[0]), flat(hidden[1])),
        (flat(tokens_BxT),),
        chunk,
    )
    return NextToken(*(x.reshape(tokens_BxT.shape) for x in found))


def log_probs(
    params: Any,
    config: DecoderConfig,
    tokens_BxS: jax.Array,
    mask_BxS: jax.Array,
    response_len: int,
    temperature: jax.Array | float,
    chunk: int = CHUNK,
) -> jax.Array:
    """Log p of each of the last ``response_len`` tokens, float32 nats [B, T]; arguments as
    ``hidden``. Differentiable in params; the backward pass makes the logits once more.
    """
    head = decoder.head(params)

    @jax.checkpoint
    def of_chunk(states: jax.Array, tokens: jax.Array) -> jax.Array:
        return log_prob(project(head, config, states, temperature), tokens)

    tokens_BxT = tokens_BxS[:, -response_len:]
    found = chunked.map_logits(
        of_chunk,
        lambda _, states: states,
        (),
        flat(hidden(params, config, tokens_BxS, mask_BxS, response_len)),
        (flat(tokens_BxT),),
        chunk,
    )
    return found.reshape(jnp.shape(tokens_BxT))
