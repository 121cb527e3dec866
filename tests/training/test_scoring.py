"""A rollout scored by policy and reference, and its advantages."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vbon_jax.rl import gae
from vbon_jax.training import scoring
from vbon_jax.training.options import Train


@pytest.fixture(scope="module")
def batch(world, mesh):
    return world.rollout_batch(mesh, world.fresh(mesh))


def test_rollout_log_probs_are_those_of_the_update(world, mesh, batch):
    _, metrics = world.experience(mesh, batch)
    assert float(metrics["rollout_log_prob_error"]) < 1e-5


def test_the_policy_that_is_its_reference_has_no_kl(world, mesh, batch):
    _, metrics = world.experience(mesh, batch)
    assert float(metrics["kl_ref"]) == 0
    assert float(metrics["kl_ref_k1"]) == 0


def test_padding_of_the_rollout_does_not_matter(world, mesh, batch):
    exp, metrics = world.experience(mesh, batch)
    rollout = batch.rollout
    noise = jax.random.randint(jax.random.key(4), rollout.tokens_BxT.shape, 0, 37)
    dirty = dataclasses.replace(
        batch,
        rollout=rollout._replace(tokens_BxT=jnp.where(rollout.mask_BxT, rollout.tokens_BxT, noise)),
        prompt_BxP=jnp.where(batch.prompt_mask_BxP, batch.prompt_BxP, 11),
    )
    other, other_metrics = world.experience(mesh, dirty)
    np.testing.assert_allclose(exp.advantages_BxT, other.advantages_BxT, atol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], other_metrics[name], atol=1e-5, err_msg=name)


def slow_baseline(rewards, values, lengths, train):
    """(advantages, returns) response by response and token by token, gamma = 1.

    Where there are stored samples they come last, those of a prompt in a row.
    """
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    group, lam = train.group, train.lam
    own = len(rewards) * group // (group + train.replay)
    for i, length in enumerate(lengths):
        base = values[i].copy()
        if train.baseline == "group":
            base[:], lam = 0.0, 1.0
        prompt = i // group if i < own else (i - own) // train.replay
        others = [j for j in range(prompt * group, prompt * group + group) if j != i]
        excess = 0.0
        if train.baseline == "group":
            excess = np.mean([rewards[j].sum() for j in others])
        elif train.baseline == "both":
            excess = np.mean([rewards[j].sum() - values[j, 0] for j in others])
        base = base + excess
        running = 0.0
        for t in reversed(range(length)):
            after = base[t + 1] if t + 1 < length else 0.0
            running = rewards[i, t] + after - base[t] + lam * running
            advantages[i, t], returns[i, t] = running, running + base[t]
    return advantages, returns


@pytest.mark.parametrize(
    ("baseline", "group", "replay"),
    [
        ("value", 1, 0), ("value", 3, 0), ("group", 2, 0), ("group", 4, 0), ("both", 2, 0),
        ("both", 3, 0), ("group", 2, 2), ("group", 3, 1), ("both", 2, 4), ("value", 1, 1),
    ],
)  # fmt: skip
def test_baselines_are_those_of_slow_loops(rng, baseline, group, replay):
    lengths = rng.integers(1, 6, size=12)
    mask = np.arange(5) < lengths[:, None]
    rewards, values = (np.where(mask, rng.normal(size=mask.shape), 0.0) for _ in range(2))
    train = Train(baseline=baseline, group=group, replay=replay, lam=0.8)
    scored = types.SimpleNamespace(
        values_BxT=jnp.asarray(values, jnp.float32), response_mask_BxT=jnp.asarray(mask)
    )
    given = jnp.asarray(rewards, jnp.float32)
    found = gae.gae(given, *scoring._baseline(given, scored, train))
    for a, b in zip(found, slow_baseline(rewards, values, lengths, train), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
