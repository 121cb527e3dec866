"""The fit of the head that predicts rewards' distributions, on the stored samples of all prompts.

FOLDS heads are fitted side by side, each on the prompts of all folds but its own, so that what a
head says of a stored prompt owes nothing to that prompt's samples: these are evidence of their own,
and tell how good the heads are. Of a prompt never seen the mean of the heads is taken.
"""

import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vbon_jax import sharding
from vbon_jax.bon import amortised
from vbon_jax.bon.amortised import Prior
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.models import decoder, reward_head
from vbon_jax.rewards.base import Reward
from vbon_jax.sampling.requests import bucket_length, pad_left
from vbon_jax.sampling.sampler import Sampler

FOLDS = 5
BINS = 64
TERMS = 12
BARE_TERMS = 3  # polynomials of the rank of the bare prompt's reward
LOOKS, STEPS = 40, 25  # gradient steps between two looks at the held-out likelihood
PROMPTS = 256  # of a gradient step
RATE = 1e-2
RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)  # nats, half of which times |kernel|^2 is the penalty


class Features(NamedTuple):
    """What the heads read of P prompts, float32 on the host.

    Attributes:
      state_PxD: the reference's hidden state at the last token, after the final norm.
      words_PxD: the mean of the embeddings of the tokens.
      bare_P: the reward of the prompt with an empty response; None where that has none.
    """

    state_PxD: np.ndarray
    words_PxD: np.ndarray
    bare_P: np.ndarray | None

    def at(self, rows: np.ndarray) -> "Features":
        """Those of some of the prompts."""
        bare_P = None if self.bare_P is None else self.bare_P[rows]
        return Features(self.state_PxD[rows], self.words_PxD[rows], bare_P)


class Heads(NamedTuple):
    """FOLDS fitted heads and what they are read with, arrays on the host.

    Attributes:
      params: of ``models.reward_head``, with FOLDS in front.
      mean_D: of the state and words that they learned from.
      scale_D: what these are divided by, so that each of the two has a mean square norm of 1.
      bare_N: the rewards of the bare prompts, ascending; empty where these have none.
      pool_N: of ``bon.amortised.pooled``.
      edges_E: of ``bon.amortised.edges``.
      concentration: c, float64.
    """

    params: Any
    mean_D: np.ndarray
    scale_D: np.ndarray
    bare_N: np.ndarray
    pool_N: np.ndarray
    edges_E: np.ndarray
    concentration: float

    def inputs(self, features: Features) -> np.ndarray:
        """What the heads are applied to: float32 [P, D]."""
        x = np.concatenate([features.state_PxD, features.words_PxD], axis=1)
        parts = [(x - self.mean_D) / self.scale_D]
        if features.bare_P is not None:
            low = np.searchsorted(self.bare_N, features.bare_P, "left")
            high = np.searchsorted(self.bare_N, features.bare_P, "right")
            rank_P = (low + high) / (2 * len(self.bare_N))
            parts.append(reward_head.legendre(rank_P, BARE_TERMS))
        return np.concatenate(parts, axis=1).astype(np.float32)

    def prior(self, features: Features, fold_P: np.ndarray | None = None) -> Prior:
        """What the heads say of prompts.

        Args:
          features: of P prompts.
          fold_P: of each prompt, whose own head is read; where it is negative, as for all without
            it, the mean of the heads is.
        """
        masses = _masses(self.params, self.inputs(features), *_bins(self.edges_E))
        mass_FxPxK = np.asarray(masses, np.float64)
        mass_PxK = mass_FxPxK.mean(axis=0)
        if fold_P is not None:
            own_PxK = mass_FxPxK[fold_P, np.arange(len(fold_P))]
            mass_PxK = np.where(fold_P[:, None] < 0, mass_PxK, own_PxK)
        cumulative = np.pad(np.cumsum(mass_PxK, axis=1), ((0, 0), (1, 0)))
        cumulative /= cumulative[:, -1:]
        return Prior(
            jnp.asarray(self.pool_N), jnp.asarray(self.edges_E),
            jnp.asarray(cumulative, jnp.float32), jnp.float32(self.concentration),
        )  # fmt: skip

    def save(self, path: Path) -> None:
        """Writes them as an ``.npz`` file."""
        arrays: dict[str, Any] = {x: getattr(self, x) for x in self._fields[1:]}
        with path.open("wb") as file:
            np.savez(file, **arrays | self.params)

    @classmethod
    def load(cls, path: Path) -> "Heads":
        """Reads what `save` wrote."""
        with np.load(path) as found:
            arrays = {x: found[x] for x in cls._fields[1:]}
            params = {x: found[x] for x in found.files if x not in arrays}
        return cls(params, **arrays | {"concentration": float(arrays["concentration"])})


def features(
    sampler: Sampler, prompts: Sequence[Prompt], batch_size: int, reward: Reward | None
) -> Features:
    """Reads the reference, and the reward, at prompts alone.

    Args:
      sampler: the reference.
      prompts: P prompts.
      batch_size: prompts at once.
      reward: of the samples; None where it cannot score an empty response.
    """
    length = bucket_length(max(len(p.tokens) for p in prompts))
    rows = pad_left([p.tokens for p in prompts], length, sampler.settings.pad_id)
    parts: list[tuple[Any, ...]] = []
    for start in range(0, len(prompts), batch_size):
        at = np.minimum(np.arange(start, start + batch_size), len(prompts) - 1)
        own = (rows.tokens_BxP[at], rows.mask_BxP[at])
        batch = sharding.place(own, sampler.mesh, "batch")
        found = _read(sampler.model.params, *batch, config=sampler.model.config)
        if reward is not None:
            none = np.full((batch_size, 1), sampler.settings.pad_id, np.int32)
            empty = sharding.place((none, np.zeros(none.shape, bool)), sampler.mesh, "batch")
            found = (*found, reward([prompts[i] for i in at], *batch, *empty))
        parts.append(tuple(np.asarray(x)[: len(prompts) - start] for x in sharding.fetch(found)))
    state, words, *bare = (np.concatenate(x).astype(np.float32) for x in zip(*parts, strict=True))
    return Features(state, words, bare[0] if bare else None)


@partial(jax.jit, static_argnames="config")
def _read(
    params: Any, tokens_BxP: jax.Array, mask_BxP: jax.Array, *, config: decoder.DecoderConfig
) -> tuple[jax.Array, jax.Array]:
    hidden = decoder.hidden(params, config, tokens_BxP, mask_BxP)
    words = params["wte"][tokens_BxP].astype(jnp.float32) * mask_BxP[..., None]
    count = jnp.sum(mask_BxP, axis=1, keepdims=True)
    return hidden[:, -1].astype(jnp.float32), jnp.sum(words, axis=1) / jnp.maximum(count, 1)


def folds(prompts: Sequence[Prompt], rewards: Sequence[Sequence[float]], seed: int) -> np.ndarray:
    """The fold of each prompt that has samples, -1 of the others: int64 [P].

    Prompts of the same tokens are in one fold: what holds one out holds out all of them.

    Raises:
      InputError: fewer different prompts with samples than folds.
    """
    sampled = [p for p, found in zip(prompts, rewards, strict=True) if len(found)]
    different = sorted({p.tokens for p in sampled}, key=lambda x: zlib.crc32(repr(x).encode()))
    if len(different) < FOLDS:
        raise InputError(
            f"samples.amortised: {len(different)} different prompts have samples, a head of their "
            f"rewards needs at least {FOLDS}: give more prompts, or set samples.amortised=False"
        )
    order = np.random.default_rng(seed).permutation(len(different)) % FOLDS
    of = dict(zip(different, order.tolist(), strict=True))
    return np.array([of[p.tokens] if len(r) else -1 for p, r in zip(prompts, rewards)])


def fit(known: Features, rewards: Sequence[Any], fold_P: np.ndarray, seed: int) -> Heads:
    """Fits the heads by penalized likelihood, and the concentration on the prompts they leave out.

    Of the ridges, and of the looks during the fit, those are taken where the likelihood of the
    samples left out is highest. The same arguments give the same heads.

    Args:
      known: features of P prompts.
      rewards: of each prompt's samples; those of prompts without any are predicted alone.
      fold_P: of `folds`.
      seed: of the order of prompts.
    """
    pool_N = amortised.pooled(np.concatenate([np.asarray(x, np.float32) for x in rewards]))
    edges_E = amortised.edges(pool_N, BINS)
    rows = np.flatnonzero(fold_P >= 0)
    counts_PxK = np.stack(
        [amortised.bin_counts(pool_N, edges_E, rewards[i]) for i in rows.tolist()]
    )
    known, fold = known.at(rows), fold_P[rows]
    both = (known.state_PxD, known.words_PxD)
    mean = np.concatenate([x.mean(axis=0) for x in both])
    scale = [(x.std(axis=0) + 1e-6) * np.sqrt(x.shape[1]) for x in both]
    bare = np.zeros(0, np.float32) if known.bare_P is None else np.sort(known.bare_P)
    heads = Heads({}, mean, np.concatenate(scale), bare, pool_N, edges_E, 1.0)
    found = _fitted(
        jax.random.key(seed), heads.inputs(known), counts_PxK.astype(np.float32), fold,
        *_bins(edges_E),
    )  # fmt: skip
    heads = heads._replace(params=sharding.fetch(found))
    held_out = heads.prior(known, fold).cumulative_PxE
    return heads._replace(concentration=amortised.concentration(held_out, counts_PxK))


def _bins(edges_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The polynomials in the middle of each bin [K, J], and the bins' log masses in the pool."""
    middle_K = (edges_E[1:] + edges_E[:-1]) / (2 * edges_E[-1])
    log_base_K = np.log(np.diff(edges_E) / edges_E[-1]).astype(np.float32)
    return reward_head.legendre(middle_K, TERMS), log_base_K


@jax.jit
def _masses(
    params: Any, x_PxD: jax.Array, basis_KxJ: jax.Array, log_base_K: jax.Array
) -> jax.Array:
    of = jax.vmap(reward_head.log_masses, (0, None, None, None))
    return jnp.exp(of(params, x_PxD, basis_KxJ, log_base_K))


@jax.jit
def _fitted(
    key: jax.Array,
    x_PxD: jax.Array,
    counts_PxK: jax.Array,
    fold_P: jax.Array,
    basis_KxJ: jax.Array,
    log_base_K: jax.Array,
) -> Any:
    """The parameters of the best ridge at its best look, [FOLDS, ...]; R ridges are fitted."""
    inside_FxP = (fold_P != jnp.arange(FOLDS)[:, None]).astype(jnp.float32)
    tx = optax.adam(RATE)

    def nats(params: Any, x: jax.Array, counts: jax.Array, weight: jax.Array) -> jax.Array:
        found = reward_head.log_masses(params, x, basis_KxJ, log_base_K)
        weighted = counts * weight[:, None]
        return -jnp.sum(weighted * found) / jnp.maximum(jnp.sum(weighted), 1.0)

    def penalized(params: Any, ridge: jax.Array, *of: jax.Array) -> jax.Array:
        return nats(params, *of) + 0.5 * ridge * jnp.sum(jnp.square(params["kernel"]))

    of_folds = jax.vmap(jax.grad(penalized), (0, None, None, None, 0))
    gradient = jax.vmap(of_folds, (0, 0, None, None, None))

    def held_out(params: Any) -> jax.Array:
        each = jax.vmap(jax.vmap(nats, (0, None, None, 0)), (0, None, None, None))
        return jnp.mean(each(params, x_PxD, counts_PxK, 1 - inside_FxP), axis=1)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, opt_state = carry
        at = jax.random.randint(key, (min(PROMPTS, len(x_PxD)),), 0, len(x_PxD))
        ridges = jnp.array(RIDGES)
        grads = gradient(params, ridges, x_PxD[at], counts_PxK[at], inside_FxP[:, at])
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def look(carry: Any, key: jax.Array) -> tuple[Any, None]:
        trained, best, lowest_R = carry
        trained, _ = jax.lax.scan(step, trained, jax.random.split(key, STEPS))
        now_R = held_out(trained[0])

        def kept(new: jax.Array, old: jax.Array) -> jax.Array:
            better = (now_R < lowest_R).reshape((-1,) + (1,) * (new.ndim - 1))
            return jnp.where(better, new, old)

        best = jax.tree.map(kept, trained[0], best)
        return (trained, best, jnp.minimum(now_R, lowest_R)), None

    one = reward_head.init(x_PxD.shape[1], TERMS)
    params = jax.tree.map(lambda x: jnp.zeros((len(RIDGES), FOLDS, *x.shape)) + x, one)
    first = ((params, tx.init(params)), params, held_out(params))
    (_, best, lowest_R), _ = jax.lax.scan(look, first, jax.random.split(key, LOOKS))
    return jax.tree.map(lambda x: x[jnp.argmin(lowest_R)], best)
