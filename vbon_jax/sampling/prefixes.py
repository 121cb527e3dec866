"""Rewards of prefixes of responses, each taken as if the response ended there.

`rl.prefix` reads values off them. Shape suffixes: B responses, T tokens, K candidates.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vbon_jax import sharding
from vbon_jax.data.prompts import Prompt
from vbon_jax.rewards.base import Reward, checked, counts_of
from vbon_jax.sampling.decode import Rollout
from vbon_jax.sampling.requests import Prompts
from vbon_jax.sampling.sampler import Sampler

PREFIXES = 32  # of a response, at most, whose rewards stand for those of all its prefixes


def rewards(
    sampler: Sampler,
    reward: Reward,
    prompts: Sequence[Prompt],
    rows: Prompts,
    tokens_BxT: Any,
    mask_BxT: Any,
) -> np.ndarray:
    """Scores the tokens before each token of responses.

    A reward that scores them at once (`of_prefixes`, see ``rewards.base``) is asked for all. Of any
    other at most `PREFIXES` are scored, evenly spaced; at the tokens in between stands the reward
    of the last that was.

    Args:
      sampler: names texts in messages.
      reward: scores.
      prompts: B of them.
      rows: their padded ids, at least B rows.
      tokens_BxT: ids of the responses.
      mask_BxT: True on the responses' tokens.

    Returns:
      float32 [B, T], at token t the reward of the t tokens before it, as if they were all.

    Raises:
      InputError: a reward is not finite; names prompt and prefix.
    """
    T = tokens_BxT.shape[1]
    of_prefixes = getattr(reward, "of_prefixes", None)
    at_once = None if of_prefixes is None else of_prefixes(prompts, *rows, tokens_BxT, mask_BxT)
    if at_once is not None:
        values = np.asarray(sharding.fetch(at_once), np.float32)[: len(prompts)]
        for at in np.flatnonzero(~np.isfinite(values).all(axis=0)).tolist():  # to be named
            seen = mask_BxT & (np.arange(T) < at)
            _checked(sampler, prompts, values[:, at], tokens_BxT, seen)
        return values
    every = -(-T // PREFIXES)
    found = np.zeros((len(prompts), T), np.float32)
    for t in range(0, T, every):
        seen = mask_BxT & (np.arange(T) < t)
        values = _finite(sampler, reward, prompts, rows, tokens_BxT, seen)
        found[:, t : t + every] = values[:, None]
    counts_of(reward)  # these are no responses, and count as none
    return found


def of_candidates(
    sampler: Sampler, reward: Reward, prompts: Sequence[Prompt], rows: Prompts, rollout: Rollout
) -> np.ndarray:
    """Scores the tokens before each token of responses with each of the likeliest tokens after.

    A reward that scores them at once (`of_candidates`, see ``rewards.base``) is asked for all.

    Args:
      sampler: names texts in messages.
      reward: scores.
      prompts: B of them.
      rows: their padded ids, B rows.
      rollout: B responses with their likeliest tokens.

    Returns:
      float32 [B, T, K], at token t the reward of the t tokens before it and one of the K likeliest
      in its place, as if they were all.

    Raises:
      InputError: a reward is not finite; names prompt and prefix.
    """
    assert rollout.likeliest is not None
    ids, tokens, drawn_mask = sharding.fetch(
        (rollout.likeliest.ids_BxTxK, rollout.tokens_BxT, rollout.mask_BxT)
    )
    T, K = ids.shape[1:]
    of = getattr(reward, "of_candidates", None)
    drawn = (rollout.tokens_BxT, rollout.mask_BxT, rollout.likeliest.ids_BxTxK)
    at_once = None if of is None else of(prompts, *rows, *drawn)
    if at_once is not None:
        values = np.asarray(sharding.fetch(at_once), np.float32)[: len(prompts)]
        for t, k in np.argwhere(~np.isfinite(values).all(axis=0)).tolist():  # to be named
            tokens_here = np.where(np.arange(T) == t, ids[:, t, k, None], tokens)
            seen = drawn_mask[:, t : t + 1] & (np.arange(T) <= t)
            _checked(sampler, prompts, values[:, t, k], tokens_here, seen)
        return values
    each = [prompt for prompt in prompts for _ in range(K)]
    of_each = Prompts(*(np.repeat(x, K, axis=0) for x in sharding.fetch(tuple(rows))))
    mask, tokens = (np.repeat(x, K, axis=0) for x in (drawn_mask, tokens))
    found = np.zeros(ids.shape, np.float32)
    for t in range(T):
        tokens_here = np.where(np.arange(T) == t, ids[:, t].reshape(-1, 1), tokens)
        seen = mask[:, t : t + 1] & (np.arange(T) <= t)
        found[:, t] = _finite(sampler, reward, each, of_each, tokens_here, seen).reshape(-1, K)
    counts_of(reward)
    return found


def _finite(
    sampler: Sampler,
    reward: Reward,
    prompts: Sequence[Prompt],
    rows: Prompts,
    tokens_BxT: Any,
    seen_BxT: Any,
) -> np.ndarray:
    """Float32 rewards of what is ``seen`` of each of the first rows."""
    found = reward(prompts, *rows, tokens_BxT, seen_BxT)
    values = np.asarray(sharding.fetch(found), np.float32)[: len(prompts)]
    return _checked(sampler, prompts, values, tokens_BxT, seen_BxT)


def _checked(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    values_B: np.ndarray,
    tokens_BxT: Any,
    seen_BxT: Any,
) -> np.ndarray:
    """The rewards of what is ``seen``, if they are finite."""

    def text_of(row: int) -> str:
        tokens, seen = sharding.fetch((tokens_BxT[row], seen_BxT[row]))
        ids = tokens[seen].tolist()
        return sampler.texts([prompts[row].tokens], [ids])[0]

    return checked(values_B, "the reward of a prefix is", [p.text for p in prompts], text_of)
