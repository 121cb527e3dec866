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
    trunk_BxSxD: what the lower layers made of prompt and response, S = P + T columns, in the
      compute dtype, as ``decoder.trunk`` gives it but for rounding. The last column is 0: nothing
      is predicted from it. None where no one asks for it.
    """

    tokens_BxT: jax.Array
    mask_BxT: jax.Array
    log_probs_BxT: jax.Array
    finished_B: jax.Array
    likeliest: Likeliest | None = None
    trunk_BxSxD: jax.Array | None = None


@jax.jit
def identity_keys(
    key: jax.Array, step: jax.Array | int, prompt_id_B: jax.Array, sample_B: jax.Array
) -> jax.Array:
    """One key a response: a function of (key, step, prompt id, sample index) alone."""
    base = jax.random.fold_in(key, step)
    return jax.vmap(lambda p, s: jax.random.fold_in(jax.random.fold_in(base, p), s))(
        prompt_id_B, sample_B
    )


def uniforms(keys_B: jax.Array, t_B: jax.Array) -> jax.Array:
    """The number in [0, 1) that decides token t of each response."""
    return jax.vmap(lambda key, t: jax.random.uniform(jax.random.fold_in(key, t)))(keys_B, t_B)


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
      trunk_layers: lower layers whose output is told as well; 0 for none.
    """

    max_new_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int
    top_k: int = 0
    top_p: float = 1.0
    likeliest: int = 0
    trunk_layers: int = 0


class Picked(NamedTuple):
    """What one slot of each row has: the token, its log-prob, the likeliest beside it."""

    token: jax.Array
    log_prob: jax.Array
    likeliest: Likeliest | None


def pick(
    params: Any,
    hidden_BxD: jax.Array,
    uniform_B: jax.Array,
    temperature: jax.Array | float,
    config: decoder.DecoderConfig,
    limits: Limits,
) -> Picked:
    """Draws the next token of each row.

    Args:
      params: decoder parameters.
      hidden_BxD: hidden states that predict the tokens.
      uniform_B: numbers in [0, 1) that decide them.
      temperature: > 0, divides the logits.
      config: the decoder's configuration.
      limits: filters of the distribution drawn from, and how many likeliest tokens to tell.

    Returns:
      Picked.
    """
    tempered = temper(decoder.logits(params, config, hidden_BxD), temperature)
    filtered = lg.filter_top_p(lg.filter_top_k(tempered, limits.top_k), limits.top_p)
    token = lg.sample(uniform_B, filtered)
    chosen = log_prob(tempered, token)
    if not limits.likeliest:
        return Picked(token, chosen, None)
    logits, ids = jax.lax.top_k(tempered, limits.likeliest)
    log_z = jnp.take_along_axis(tempered, token[:, None], axis=-1) - chosen[:, None]
    others = Likeliest(ids, logits - log_z, lm.is_end(ids, limits.end_ids))
    return Picked(token, chosen, others)


@partial(jax.jit, static_argnames=("config", "limits", "together"))
def rollout(
    params: Any,
    prompt_NxP: jax.Array,
    prompt_mask_NxP: jax.Array,
    keys_B: jax.Array,
    temperature: jax.Array | float,
    *,
    config: decoder.DecoderConfig,
    limits: Limits,
    together: str | None = None,
) -> Rollout:
    """Samples B / N responses to each of N prompts: prefill and decode loop in one program.

    A prompt runs once, and its keys and values are held once, for all of its rows.

    Args:
      params: decoder parameters.
      prompt_NxP: int32 ids, padded on the left.
      prompt_mask_NxP: bool, True on prompt tokens.
      keys_B: one key a row (``identity_keys``), those of a prompt adjacent: a row's response does
        not depend on the others.
      temperature: > 0, divides the logits; data, so another value needs no compile.
      config: the decoder's shape.
      limits: length, end and filters of the responses.
      together: under ``jax.vmap(..., axis_name=together)``, that axis: its members leave the loop
        together. A loop that each left by itself would copy every cache at every step.

    Returns:
      Rollout of B rows with T = ``limits.max_new_tokens`` slots each.
    """
    T, pad_id = limits.max_new_tokens, limits.pad_id
    params = decoder.for_decoding(params, config)
    each = len(keys_B) // len(prompt_NxP)
    uniform_TxB = jax.vmap(lambda t: uniforms(keys_B, jnp.full(len(keys_B), t)))(jnp.arange(T))

    # The last token of each prompt is the first that its rows run by themselves.
    kept = limits.trunk_layers
    prefix = prompts_before(params, config, prompt_NxP, prompt_mask_NxP, each, kept)
    token_B = jnp.repeat(prompt_NxP[:, -1], each)
    before_B = jnp.repeat(jnp.sum(prompt_mask_NxP, axis=-1, dtype=jnp.int32) - 1, each)
    cache = sharding.constrain(kv_cache.init(config, len(keys_B), T, kept), "cache")

    def someone_goes_on(done_B: jax.Array) -> jax.Array:
        here = ~jnp.all(done_B)
        return here if together is None else jax.lax.pmax(here.astype(jnp.int32), together) > 0

    def cond(carry):
        t, goes_on, *_ = carry
        return (t < T) & goes_on

    def body(carry):
        t, _, token, done, cache, picked, mask = carry
        hidden, cache = decoder.step(params, config, token, before_B + t, cache, prefix)
        found = pick(params, hidden, uniform_TxB[t], temperature, config, limits)
        token = found.token
        found = found._replace(
            token=jnp.where(done, pad_id, token), log_prob=jnp.where(done, 0.0, found.log_prob)
        )
        picked = jax.tree.map(lambda all_, here: all_.at[t].set(here), picked, found)
        mask = mask.at[t].set(~done)
        done |= lm.is_end(token, limits.end_ids)
        return t + 1, someone_goes_on(done), token, done, cache, picked, mask

    shapes = jax.eval_shape(
        lambda: pick(
            params, jnp.zeros((len(keys_B), config.width)), uniform_TxB[0], temperature, config,
            limits,
        )
    )  # fmt: skip
    picked = jax.tree.map(lambda x: jnp.zeros((T, *x.shape), x.dtype), shapes)
    picked = picked._replace(token=jnp.full_like(picked.token, pad_id))
    mask = jnp.zeros((T, len(keys_B)), bool)
    done = jnp.zeros_like(mask[0])
    carry = (jnp.int32(0), someone_goes_on(done), token_B, done, cache, picked, mask)
    _, _, _, done, cache, picked, mask = jax.lax.while_loop(cond, body, carry)
    tokens, log_probs, likeliest = jax.tree.map(lambda x: x.swapaxes(0, 1), picked)
    trunk = _trunk(prefix, cache.trunk_BxSxD, each)
    return sharding.constrain(Rollout(tokens, mask.T, log_probs, done, likeliest, trunk), "batch")


def _trunk(
    prefix: kv_cache.Prefix | None, own_BxTxD: jax.Array | None, each: int
) -> jax.Array | None:
    """Of whole rows: all prompt tokens but the last, then it and the response, but its last."""
    if own_BxTxD is None:
        return None
    columns = [own_BxTxD, jnp.zeros_like(own_BxTxD[:, :1])]
    if prefix is not None and prefix.trunk_NxPxD is not None:
        columns.insert(0, jnp.repeat(prefix.trunk_NxPxD[:, 1:], each, axis=0))
    return jnp.concatenate(columns, axis=1)


def prompts_before(
    params: Any,
    config: decoder.DecoderConfig,
    tokens_NxP: jax.Array,
    mask_NxP: jax.Array,
    each: int,
    trunk_layers: int = 0,
) -> kv_cache.Prefix | None:
    """Runs all tokens of prompts but the last, for ``each`` adjacent rows that go on from one.

    The output of the first ``trunk_layers`` layers is kept beside keys and values.

    Returns:
      Their keys and values in P slots: with an empty one in place of the last token they remain a
      multiple of 8 for long prompts, which products on all kinds of devices are fastest for, and
      on CPU give the same bits at any place of a batch. None for prompts of one token.
    """
    prompts, length = tokens_NxP.shape
    if length == 1:
        return None
    tokens, mask = (jnp.pad(x[:, :-1], ((0, 0), (1, 0))) for x in (tokens_NxP, mask_NxP))
    cache = sharding.constrain(kv_cache.init(config, prompts, length, trunk_layers), "cache")
    _, kept = decoder.prefill(params, config, tokens, mask, cache)
    mask_BxP, position_BxP = (
        jnp.repeat(x, each, axis=0) for x in (kept.mask_BxS, kept.position_BxS)
    )
    return kv_cache.Prefix(kept.k, kept.v, mask_BxP, position_BxP, trunk_NxPxD=kept.trunk_BxSxD)
