"""The jitted rollout: prefill, then a decode loop that ends when every row has emitted EOS."""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vbon_jax import sharding
from vbon_jax.models import cache as kv_cache
from vbon_jax.models import decoder, lm
from vbon_jax.rl.next_token import log_prob, temper
from vbon_jax.sampling import logits as lg


class Likeliest(NamedTuple):
    """The K likeliest tokens at each slot of responses, [B, T, K] each.

    ids_BxTxK: int32.
    log_probs_BxTxK: float32 nats under the distribution that the response's own token is of.
    end_BxTxK: bool, True where the token ends a response.
    """

    ids_BxTxK: jax.Array
    log_probs_BxTxK: jax.Array
    end_BxTxK: jax.Array


class Rollout(NamedTuple):
    """Responses of a batch.

    tokens_BxT: int32 sampled ids; the slots after a row's EOS hold ``pad_id``.
    mask_BxT: bool, True on the response's tokens, its first EOS included.
    log_probs_BxT: float32 nats of each sampled token under the tempered, unfiltered distribution;
      0 outside the mask.
    finished_B: bool, True where EOS came before the length limit.
    likeliest: the likeliest tokens at each slot; None where no one asks for them.
    """

    tokens_BxT: jax.Array
    mask_BxT: jax.Array
    log_probs_BxT: jax.Array
    finished_B: jax.Array
    likeliest: Likeliest | None = None


@jax.jit
def identity_keys(
    key: jax.Array, step: jax.Array | int, prompt_id_B: jax.Array, sample_B: jax.Array
) -> jax.Array:
    """One key a response: a function of (key, step, prompt id, sample index) alone."""
    base = jax.random.fold_in(key, step)
    return jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(base, p), s))(
        prompt_id_B, sample_B
    )


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a rollout is compiled for beside the model; hashes by value.

    Attributes:
      max_new_tokens: T, the length limit in tokens, EOS included.
      end_ids: each ends a response; none for responses of exactly T tokens.
      pad_id: fills the slots after EOS.
      top_k: keeps the k likeliest tokens, for generation only: it changes the distribution sampled
        from, while ``log_probs_BxT`` stays that of the unfiltered one; 0 keeps all.
      top_p: likewise keeps the smallest set of tokens of this mass; 1.0 keeps all.
      likeliest: how many of the likeliest tokens at each slot are told beside the one drawn.
    """

    max_new_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int
    top_k: int = 0
    top_p: float = 1.0
    likeliest: int = 0


class _Picked(NamedTuple):
    """What one slot of each row has: the token, its log-prob, the likeliest beside it."""

    token: jax.Array
    log_prob: jax.Array
    likeliest: Likeliest | None


@partial(jax.jit, static_argnames=("config", "limits", "together"))
def rollout(
    params: Any,
    prompt_BxP: jax.Array,
    prompt_mask_BxP: jax.Array,
    keys_B: jax.Array,
    temperature: jax.Array | float,
    *,
    config: decoder.DecoderConfig,
    limits: Limits,
    together: str | None = None,
) -> Rollout:
    """Samples one response a row: prefill and decode loop in one program.

    Args:
      params: decoder parameters.
      prompt_BxP: int32 ids, padded on the left.
      prompt_mask_BxP: bool, True on prompt tokens.
      keys_B: one key a row (``identity_keys``): a row's response does not depend on the others.
      temperature: > 0, divides the logits; data, so another value needs no compile.
      config: the decoder's shape.
      limits: length, end and filters of the responses.
      together: under ``jax.vmap(..., axis_name=together)``, that axis: its members leave the loop
        together. A loop that each left by itself would copy every cache at every step.

    Returns:
      Rollout with T = ``limits.max_new_tokens`` slots a row.
    """
    max_new_tokens, pad_id = limits.max_new_tokens, limits.pad_id
    params = decoder.unstacked(params)
    batch, prompt_len = prompt_BxP.shape
    uniform_TxB = jax.vmap(
        lambda t: jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, t)))(keys_B)
    )(jnp.arange(max_new_tokens))

    def pick(hidden_BxD: jax.Array, t: jax.Array) -> _Picked:
        tempered = temper(decoder.logits(params, config, hidden_BxD), temperature)
        filtered = lg.filter_top_p(lg.filter_top_k(tempered, limits.top_k), limits.top_p)
        token = lg.sample(uniform_TxB[t], filtered)
        chosen = log_prob(tempered, token)
        if not limits.likeliest:
            return _Picked(token, chosen, None)
        logits, ids = jax.lax.top_k(tempered, limits.likeliest)
        log_z = jnp.take_along_axis(tempered, token[:, None], axis=-1) - chosen[:, None]
        others = Likeliest(ids, logits - log_z, lm.is_end(ids, limits.end_ids))
        return _Picked(token, chosen, others)

    cache = kv_cache.init(config, batch, prompt_len + max_new_tokens)
    cache = sharding.constrain(cache, "cache")
    hidden, cache = decoder.prefill(params, config, prompt_BxP, prompt_mask_BxP, cache)
    first = pick(hidden[:, -1], jnp.int32(0))
    prompt_lengths = jnp.sum(prompt_mask_BxP, axis=-1, dtype=jnp.int32)

    picked = jax.tree.map(
        lambda x: jnp.zeros((max_new_tokens, *x.shape), x.dtype).at[0].set(x), first
    )
    picked = picked._replace(token=jnp.full_like(picked.token, pad_id).at[0].set(first.token))
    mask = jnp.zeros((max_new_tokens, batch), bool).at[0].set(True)

    def someone_goes_on(done_B: jax.Array) -> jax.Array:
        here = ~jnp.all(done_B)
        return here if together is None else jax.lax.pmax(here.astype(jnp.int32), together) > 0

    def cond(carry):
        t, goes_on, *_ = carry
        return (t < max_new_tokens) & goes_on

    def body(carry):
        t, _, token, done, cache, picked, mask = carry
        hidden, cache = decoder.step(params, config, token, prompt_lengths + t - 1, cache)
        found = pick(hidden, t)
        token = found.token
        found = found._replace(
            token=jnp.where(done, pad_id, token), log_prob=jnp.where(done, 0.0, found.log_prob)
        )
        picked = jax.tree.map(lambda all_, here: all_.at[t].set(here), picked, found)
        mask = mask.at[t].set(~done)
        done |= lm.is_end(token, limits.end_ids)
        return t + 1, someone_goes_on(done), token, done, cache, picked, mask

    done = lm.is_end(first.token, limits.end_ids)
    carry = (jnp.int32(1), someone_goes_on(done), first.token, done, cache, picked, mask)
    _, _, _, done, _, picked, mask = jax.lax.while_loop(cond, body, carry)
    tokens, log_probs, likeliest = jax.tree.map(lambda x: x.swapaxes(0, 1), picked)
    return sharding.constrain(Rollout(tokens, mask.T, log_probs, done, likeliest), "batch")
