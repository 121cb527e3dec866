"""Where an online method starts from: its policy and its values, both from the stored samples.

The m scored samples a prompt that log F is estimated from are on-policy rollouts for the first
steps of a policy, which so need no new ones.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import sharding
from vbon_jax.bon.pool import resample, winner_weights
from vbon_jax.data import samples as sample_files
from vbon_jax.data.samples import PromptSamples
from vbon_jax.methods import vbon
from vbon_jax.methods.learning import Job
from vbon_jax.models import decoder, heads, log_probs, trainable
from vbon_jax.progress import log
from vbon_jax.rl import prefix
from vbon_jax.rl.ppo import explained_variance
from vbon_jax.sampling import prefixes
from vbon_jax.sampling.decode import Rollout
from vbon_jax.sampling.requests import Prompts, pad_left
from vbon_jax.sampling.responses import ScoredRollout
from vbon_jax.training import offline, policies, population
from vbon_jax.training.learner import Member, prompt_length
from vbon_jax.training.loop import Task
from vbon_jax.training.options import REFERENCE, WEIGHTED
from vbon_jax.training.state import TrainState

Fit = Callable[[Job, Sequence[Member], Any], TrainState]
STORED = 2_048  # samples, at least, that values are learned from
TENTH = 10  # one prompt in as many is held out; none where there are fewer


def job(online: Job) -> Job | None:
    """The training that a policy starts with; None where it starts as the reference.

    It is maximum likelihood on best-of-n, `methods.bon_sft`, under the keys of ``offline``; or the
    method's own update on stored samples, as many and as often as these keys say.
    """
    train, offline_keys = online.training.train, online.training.offline
    if not online.method.online or train.start == REFERENCE:
        return None
    if train.start == WEIGHTED:
        return online.likelihood
    found = dataclasses.replace(online, from_store=True)
    rows = offline_keys.epochs * (online.prompts - found.held_out) * offline_keys.pairs
    iterations = max(1, rows // train.batch_size)
    own = dataclasses.replace(
        train, iterations=iterations, warmup=min(train.warmup, iterations - 1), replay=0,
        lookahead=0, average_half_life=0.0,
        minibatch_size=math.gcd(train.minibatch_size, train.batch_size),
    )  # fmt: skip
    return dataclasses.replace(found, training=dataclasses.replace(online.training, train=own))


def trained(online: Job, members: Sequence[Member], fit: Fit) -> TrainState:
    """Trains what the policies start from, where that is not the reference, and then them.

    Args:
      online: the method.
      members: those that are trained.
      fit: (job, members, policies to begin with or None) -> the last state. Its first state is
        `begun` with these policies, and `valued`.

    Returns:
      The last state of ``online``.
    """
    begin, own = job(online), None
    if begin is not None:
        own = policy(fit(begin, [member(x) for x in members], None))
    return fit(online, members, own)


def member(of: Member) -> Member:
    """Whom the start of ``of`` is trained for: best of the nearest whole n that m samples have."""
    return dataclasses.replace(of, n=float(min(max(round(of.n), 1), of.m)))


def policy(found: TrainState) -> Any:
    """What ``models.trainable`` trains of the reference, in the last state of `job`."""
    return policies.policy(found.params)


def begun(fresh: TrainState, own: Any) -> TrainState:
    """A first state, of one policy or of a population, that begins with the policy ``own``.

    Both are used up: no array of theirs stays in memory beside those of the state.
    """
    copies = {
        name: jax.tree.map(jnp.copy, own)
        for name in (policies.AVERAGE, "anchor")
        if name in fresh.params
    }
    begins = {"decoder": own} | copies
    for x in jax.tree.leaves([fresh.params[name] for name in begins]):
        x.delete()
    return fresh._replace(params=fresh.params | begins)


def valued(
    fresh: TrainState,
    job: Job,
    task: Task,
    members: Sequence[Member],
    samples: Sequence[PromptSamples],
) -> TrainState:
    """A first state, of one policy or of a population, whose values know the stored samples.

    These are rollouts of the policy's first steps: some of each prompt, at random, or where the
    policy starts as best-of-n of them, in proportion to their weights as its winner. Their returns
    fill the table of values of prefixes (see ``rl.prefix``), or fit the head of another value
    function (`heads.fit_value`). A line says what share of the returns' variance the values explain
    on the last tenth of the prompts, before they learn from these too; a head that explains none of
    it is left as it was, as where there are fewer than ten prompts.
    """
    if not job.method.values or job.training.train.baseline == "group":
        return fresh  # nothing reads them
    if not job.reads_prefixes and len(samples) < TENTH:
        return fresh
    alone = fresh.step.ndim == 0

    def own(i: int) -> Any:
        return fresh.params if alone else jax.tree.map(lambda x: x[i], fresh.params)

    learned = [_values(job, task, i, of, samples, own) for i, of in enumerate(members)]
    found = learned[0] if alone else jax.tree.map(lambda *x: jnp.stack(x), *learned)
    placed = sharding.place(found, task.sampler.mesh, "" if alone else population.AXIS)
    if "head" in placed:
        placed = {"value": fresh.params["value"] | placed}
    return fresh._replace(params=fresh.params | placed)


def _values(
    job: Job,
    task: Task,
    i: int,
    of: Member,
    samples: Sequence[PromptSamples],
    own: Callable[[int], Any],
) -> dict[str, Any]:
    """What member i has learned from stored samples: its table "prefix", or its "head"."""
    table = task.references
    if table.rewards_PxM.ndim == 3:
        table = jax.tree.map(lambda x: x[i], table)
    samples = [x for x in samples if x.rewards]  # the first, where some prompts have none
    m = sample_files.fewest(samples, of.m)
    rewards = sample_files.rewards(samples, m)
    weights = np.full(rewards.shape, 1 / m)
    if job.training.train.start != REFERENCE:
        weights = winner_weights(rewards, int(member(of).n))
    each = -(-STORED // len(rewards))
    columns = resample(np.random.default_rng(of.seed), weights, each)
    batch, log_ref_B = _stored(job, task, samples, columns, rewards)
    n, beta = jnp.float32(of.n), jnp.float32(of.beta)
    density = vbon.best_of_n_density(table, batch, log_ref_B, n, job.options.estimator)
    return_B = vbon.objective(job.objective, density, batch.reward_B, n, beta).sequence_reward_B
    held_B = np.asarray(batch.row_B) >= len(rewards) - len(rewards) // TENTH
    if not job.reads_prefixes:
        return {"head": _head(job, task, own(i), batch, return_B, held_B)}
    mask, ranks = batch.rollout.mask_BxT, vbon.prefix_ranks(table, batch)
    returns = jnp.broadcast_to(return_B[:, None], ranks.shape)
    held = held_B[:, None]
    learned = prefix.updated(prefix.empty(), ranks, returns, mask & ~held, 1.0)
    if held_B.any():
        share = explained_variance(prefix.values(learned, ranks), returns, mask & held)
        log(f"values of prefixes explain {float(share):.2f} of the variance on held-out prompts")
    return {"prefix": prefix.updated(learned, ranks, returns, mask & held, 1.0)}


def _head(
    job: Job, task: Task, params: Any, batch: ScoredRollout, return_B: jax.Array, held_B: np.ndarray
) -> Any:
    """The value head of member's ``params`` after the returns of stored samples."""
    if job.value is None:
        config, own = job.config, trainable.join(task.reference["decoder"], params["decoder"])
    else:
        config, own = job.value.config, params["value"]["decoder"]
    rollout, size = batch.rollout, job.training.score_batch
    arrays = sharding.fetch((
        (batch.prompt_BxP, rollout.tokens_BxT), (batch.prompt_mask_BxP, rollout.mask_BxT), return_B
    ))  # fmt: skip
    tokens, mask = (np.concatenate(x, axis=1) for x in arrays[:2])
    parts: list[list[heads.Moments]] = [[], []]  # of the prompts to learn from, of those held out
    for start in range(0, len(tokens), size):
        rows = np.minimum(np.arange(start, start + size), len(tokens) - 1)
        real = np.arange(start, start + size) < len(tokens)
        for part, here in zip(parts, (~held_B[rows] & real, held_B[rows] & real), strict=True):
            if here.any():
                row = (tokens[rows], mask[rows], arrays[1][1][rows] & here[:, None])
                part.append(_moments(own, *row, arrays[2][rows], config=config))
    before = params["value"]["head"]
    learned, held = (jax.tree.map(lambda *x: sum(x), *part) for part in parts)
    share = heads.explained_variance(heads.fit_value(learned), held)
    log(f"values explain {share:.2f} of the variance on held-out prompts")
    if share <= 0:
        return before
    whole = jax.tree.map(jnp.add, learned, held)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), heads.fit_value(whole), before)


@partial(jax.jit, static_argnames=("config",))
def _moments(
    params: Any,
    tokens_BxS: jax.Array,
    mask_BxS: jax.Array,
    mask_BxT: jax.Array,
    return_B: jax.Array,
    *,
    config: decoder.DecoderConfig,
) -> heads.Moments:
    hidden = log_probs.hidden(params, config, tokens_BxS, mask_BxS, mask_BxT.shape[1])
    returns = jnp.broadcast_to(return_B[:, None], mask_BxT.shape)
    return heads.moments(hidden, returns, mask_BxT)


def _stored(
    job: Job,
    task: Task,
    samples: Sequence[PromptSamples],
    columns: np.ndarray,
    rewards: np.ndarray,
) -> tuple[ScoredRollout, jax.Array]:
    """Stored samples as a rollout, [P, each] ``columns`` of them, and their log pi_ref."""
    sampler, T = task.sampler, task.sampler.settings.max_new_tokens
    pad_id, row_B = sampler.settings.pad_id, np.repeat(np.arange(len(columns)), columns.shape[1])
    at = list(zip(row_B.tolist(), columns.ravel().tolist(), strict=True))
    asked = [task.prompts[row] for row, _ in at]
    prompts = pad_left([p.tokens for p in asked], prompt_length(task), pad_id)
    tokens, mask = np.full((len(asked), T), pad_id, np.int32), np.zeros((len(asked), T), bool)
    for b, (row, column) in enumerate(at):
        ids = sampler.stored_ids(samples[row], column, task.prompts[row].tokens)[:T]
        tokens[b, : len(ids)], mask[b, : len(ids)] = ids, True
    stored = [x.log_probs for x in samples if x.log_probs and x.response_tokens]
    if len(stored) == len(samples):
        log_ref_B = np.array([stored[row][column] for row, column in at], np.float32)
    else:  # encoded texts may have other ids than were sampled
        log_ref_B = offline.log_ref(
            task.reference, np.concatenate([prompts.tokens_BxP, tokens], axis=1),
            np.concatenate([prompts.mask_BxP, mask], axis=1), mask, job.training.score_batch,
            config=job.config, temperature=sampler.settings.temperature,
        )  # fmt: skip
    found = None
    if job.reads_prefixes:
        found = prefixes.rewards(sampler, task.reward, asked, Prompts(*prompts), tokens, mask)
    none = jnp.zeros(len(asked), bool)
    rollout = Rollout(jnp.array(tokens), jnp.array(mask), jnp.zeros(mask.shape), none)
    batch = ScoredRollout(
        prompts.tokens_BxP, prompts.mask_BxP, rollout,
        np.take_along_axis(rewards, columns, axis=1).ravel().astype(np.float32), row_B,
        sampler.settings.temperature, found,
    )  # fmt: skip
    return batch, jnp.asarray(log_ref_B)
