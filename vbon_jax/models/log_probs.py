"""Log-probabilities of responses, with the logits of a chunk of tokens at a time.

Everything is teacher-forced: prompt and response go through the model in one pass. Shape suffixes:
B batch, S columns of prompt and response, T response tokens, D width, V vocabulary.
"""

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
    same: decoder.Adjacent | None = None,
) -> jax.Array:
    """Computes the hidden states that predict the response tokens.

    Args:
      params: the decoder's tree.
      config: its configuration.
      tokens_BxS: int32 token ids, prompt and response in one row: the left-padded prompt, then the
        response, padded on the right to ``response_len`` tokens.
      mask_BxS: bool, True at real tokens of both.
      response_len: T, the number of columns of the response.
      same: which rows share a prompt; see ``decoder.hidden``.

    Returns:
      Hidden states [B, T, D] after the final norm, in the compute dtype.
    """
    return before(decoder.hidden(params, config, tokens_BxS, mask_BxS, same), response_len)


def before(hidden_BxSxD: jax.Array, response_len: int) -> jax.Array:
    """Selects, from the hidden states of whole rows, those that predict the response tokens.

    They are the states one column before each response token.

    Args:
      hidden_BxSxD: hidden states of prompt and response.
      response_len: T, the number of columns of the response.

    Returns:
      Hidden states [B, T, D].
    """
    return hidden_BxSxD[:, -response_len - 1 : -1]


def project(
    head: jax.Array, config: DecoderConfig, hidden: jax.Array, temperature: jax.Array | float
) -> jax.Array:
    """Computes the tempered logits of hidden states, those that tokens are sampled from.

    Args:
      head: the output matrix [V, D].
      config: the decoder's configuration.
      hidden: hidden states [..., D].
      temperature: sampling temperature, > 0; may be traced.

    Returns:
      float32 logits [..., V].
    """
    return temper(decoder.project(head, config, hidden), temperature)


def flat(x_BxT: jax.Array) -> jax.Array:
    """Merges the two leading axes, [B, T, ...] to [B * T, ...]: one row per token."""
    return x_BxT.reshape(-1, *x_BxT.shape[2:])


def against(
    heads: tuple[jax.Array, ...],
    configs: tuple[DecoderConfig, ...],
    hidden: tuple[jax.Array, ...],
    tokens_BxT: jax.Array,
    temperature: jax.Array | float,
    chunk: int = CHUNK,
) -> NextToken:
    """Computes statistics of the policy's next-token distributions against those of the reference.

    Meant for scoring; a loss uses ``rl.chunked.sum_logits``.

    Args:
      heads: output matrices [V, D] of policy and reference.
      configs: configurations of policy and reference.
      hidden: hidden states [B, T, D] of policy and reference that predict the tokens; their widths
        may differ.
      tokens_BxT: int32 ids of the response tokens.
      temperature: sampling temperature, > 0; may be traced.
      chunk: maximum number of tokens whose logits are held at a time.

    Returns:
      The statistics of ``rl.next_token.next_token``, float32 [B, T], in nats.
    """

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
    """Computes the log-probability of each response token.

    Differentiable with respect to params; the backward pass computes the logits once more.

    Args:
      params: the decoder's tree.
      config: its configuration.
      tokens_BxS: int32 token ids of prompt and response, as in ``hidden``.
      mask_BxS: bool, True at real tokens of both.
      response_len: T, the number of columns of the response.
      temperature: sampling temperature, > 0; may be traced.
      chunk: maximum number of tokens whose logits are held at a time.

    Returns:
      float32 log-probabilities [B, T], in nats. At padding they are finite but meaningless.
    """
    head = decoder.head(params, config)

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
