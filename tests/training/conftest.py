"""A tiny world to train in: random decoder, random rewards, a handful of prompts."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vbon_jax import sharding
from vbon_jax.bon import references as bon_references
from vbon_jax.data.prompts import Prompt
from vbon_jax.models import heads
from vbon_jax.sampling import sampler as engine
from vbon_jax.training import ppo, state

T = 6
N = 4.0
BATCH = 16


def token_reward(prompts, prompt_BxP, prompt_mask_BxP, response_BxT, response_mask_BxT):
    """A reward that a policy can raise: the share of small ids, made injective by the sum."""
    tokens, mask = jax.device_get((response_BxT, response_mask_BxT))
    small = np.sum((tokens < 18) & mask, axis=1)
    return (small + 1e-4 * np.sum(tokens * mask, axis=1)).astype(np.float32)


@pytest.fixture(scope="session")
def world(config, params):
    """Everything an iteration needs, on the mesh given."""
    rng = np.random.default_rng(2)
    prompts = [
        Prompt(10 + i, f"p{i}", tuple(int(t) for t in rng.integers(4, 37, size=1 + i % 4)))
        for i in range(8)
    ]
    sampling = engine.Sampling(temperature=0.9, max_new_tokens=T, eos_id=3, pad_id=0)
    table = np.sort(rng.normal(2, 1, size=(8, 32)).astype(np.float32), axis=1)
    references = bon_references.references(table, "harmonic")
    plan = ppo.PPOPlan(
        objective="exact", estimator="harmonic", epochs=2, minibatch_size=8, temperature=0.9
    )
    optimizer = state.adamw(optax.linear_schedule(5e-3, 0.0, 100), 1e-5, 0.01, 1.0)
    host = jax.device_get(params)
    value = rng.normal(size=(config.width, 1)).astype(np.float32) * 0.1

    def fresh(mesh):
        tree = {
            "decoder": jax.tree.map(np.array, host),
            "value": {
                "head": {**heads.init_value(config, jax.random.key(1)), "kernel": value.copy()}
            },
        }
        return sharding.place(
            state.create(sharding.place(tree, mesh), optimizer, jax.random.key(7)), mesh
        )

    def rollout_batch(mesh, train_state, step=0):
        """A scored rollout of the state's policy."""
        requests = [engine.Request(p.id, s, p.tokens) for s in range(BATCH // 8) for p in prompts]
        rows, rollout = engine.draw(
            train_state.params["decoder"], config, sampling, mesh, jax.random.key(9), step, requests
        )
        rewards = token_reward(None, *rows, rollout.tokens_BxT, rollout.mask_BxT)
        placed = sharding.place((rewards, np.arange(BATCH, dtype=np.int32) % 8), mesh, "batch")
        return ppo.RolloutBatch(rows.tokens_BxP, rows.mask_BxP, rollout, *placed)

    def arguments(mesh, train_state, batch, n=N, **changes):
        return (
            train_state, sharding.place({"decoder": host}, mesh), batch, references,
            jnp.float32(n), jnp.float32(0.1),
        ), {
            "config": config, "plan": dataclasses.replace(plan, **changes), "optimizer": optimizer,
        }  # fmt: skip

    def iterate(*args, **changes):
        """One iteration; the state is donated."""
        positional, static = arguments(*args, **changes)
        return ppo.iteration(*positional, **static)

    def lower(*args, **changes):
        """The iteration's program, not yet compiled."""
        positional, static = arguments(*args, **changes)
        return ppo.iteration.lower(*positional, **static)

    return SimpleNamespace(
        prompts=prompts, sampling=sampling, table=table, references=references, plan=plan,
        optimizer=optimizer, fresh=fresh,
        reference=lambda mesh: sharding.place({"decoder": host}, mesh),
        config=config, reward=token_reward, batch_size=BATCH, n=N,
        rollout_batch=rollout_batch, iterate=iterate, lower=lower,
    )  # fmt: skip
