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


class Rollout(NamedTuple):
    """Responses of a batch.

    tokens_BxT: int32 sampled ids; the slots after a row's EOS hold ``pad_id``.
    mask_BxT: bool, True on the response's tokens, its first EOS included.
    log_probs_BxT: float32 nats of each sampled token under the tempered, unfiltered distribution;
      0 outside the mask.
    finished_B: bool, True where EOS came before the length limit.
    """

    tokens_BxT: jax.Array
    mask_BxT: jax.Array
    log_probs_BxT: jax.Array
    finished_B: jax.Array


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
    """

    max_new_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int
    top_k: int = 0
    top_p: float = 1.0


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

    def pick(hidden_BxD: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        tempered = temper(decoder.logits(params, config, hidden_BxD), temperature)
        filtered = lg.filter_top_p(lg.filter_top_k(tempered, limits.top_k), limits.top_p)
        token = lg.sample(uniform_TxB[t], filtered)
        return token, log_prob(tempered, token)

    cache = kv_cache.init(config, batch, prompt_len + max_new_tokens)
    cache = sharding.constrain(cache, "cache")
    hidden, cache = decoder.prefill(params, config, prompt_BxP, prompt_mask_BxP, cache)
    first, first_log_prob = pick(hidden[:, -1], jnp.int32(0))
    prompt_lengths = jnp.sum(prompt_mask_BxP, axis=-1, dtype=jnp.int32)

    tokens = jnp.full((max_new_tokens, batch), pad_id, jnp.int32).at[0].set(first)
    log_probs = jnp.zeros((max_new_tokens, batch), jnp.float32).at[0].set(first_log_prob)
    mask = jnp.zeros((max_new_tokens, batch), bool).at[0].set(True)

    def someone_goes_on(done_B: jax.Array) -> jax.Array:
        here = ~jnp.all(done_B)
        return here if together is None else jax.lax.pmax(here.astype(jnp.int32), together) > 0

    def cond(carry):
        t, goes_on, *_ = carry
        return (t < max_new_tokens) & goes_on

    def body(carry):
        t, _, token, done, cache, tokens, log_probs, mask = carry
        hidden, cache = decoder.step(params, config, token, prompt_lengths + t - 1, cache)
        token, log_prob_B = pick(hidden, t)
        tokens = tokens.at[t].set(jnp.where(done, pad_id, token))
        log_probs = log_probs.at[t].set(jnp.where(done, 0.0, log_prob_B))
        mask = mask.at[t].set(~done)
        done |= lm.is_end(token, limits.end_ids)
        return t + 1, someone_goes_on(done), token, done, cache, tokens, log_probs, mask

    done = lm.is_end(first, limits.end_ids)
    carry = (jnp.int32(1), someone_goes_on(done), first, done, cache, tokens, log_probs, mask)
    _, _, _, done, _, tokens, log_probs, mask = jax.lax.while_loop(cond, body, carry)
    return sharding.constrain(Rollout(tokens.T, mask.T, log_probs.T, done), "batch")
