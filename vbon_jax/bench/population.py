"""Seconds of a population of policies beside as many single runs, measured in one process."""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import sharding
from vbon_jax.bon import references
from vbon_jax.data.prompts import Prompt
from vbon_jax.models import decoder, heads
from vbon_jax.sampling.sampler import Sampling
from vbon_jax.training import loop, population, ppo, state
from vbon_jax.training.population import Member

TEMPERATURE = 1.0


def _reward(vocabulary: int, prompts: Any, *batch: Any) -> np.ndarray:
    """A fixed reward that a policy can raise: small ids are good."""
    del prompts
    tokens, mask = jax.device_get(batch[2:])
    return np.where(mask, 1 - 2 * tokens / vocabulary, 0).mean(axis=1, dtype=np.float32)


def population_times(
    members: int = 8,
    iterations: int = 4,
    batch_size: int = 128,
    at_once: int = 1,
    layers: int = 2,
    width: int = 96,
    vocabulary: int = 1300,
    new_tokens: int = 32,
) -> dict[str, float]:
    """Times PPO iterations of vBoN for K values of n: one population, and one run after another.

    Args:
      members: K. iterations: timed, after one that compiles. at_once: as ``sweep.at_once``.
      batch_size: responses an iteration and member, four minibatches, two PPO epochs.
      layers, width, vocabulary, new_tokens: of the model and its responses; random weights.

    Returns:
      "singles_s" and "population_s": seconds of K x iterations, medians of an iteration times their
      number; "ratio" of the two; "singles_compile_s", "population_compile_s": the first iteration's
      extra seconds (K single commands pay it K times); "difference": the largest difference in
      log-probs between the members and their single runs after all iterations, nats.
    """
    mesh = sharding.make_mesh()
    config = decoder.DecoderConfig(
        vocab_size=vocabulary, positions=64, layers=layers, width=width, heads=4,
        mlp_width=4 * width, initializer_range=0.1,
    )  # fmt: skip
    reference = {"decoder": jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))}
    rng = np.random.default_rng(0)
    prompts = [Prompt(i, str(i), tuple(rng.integers(1, vocabulary, 8).tolist())) for i in range(64)]
    world = loop.World(
        prompts,
        references.references(rng.normal(0, 0.1, (64, 64)).astype(np.float32), "interval"),
        partial(_reward, vocabulary),
        str,
        Sampling(TEMPERATURE, new_tokens, 0, 0),
        mesh,
        sharding.place(reference, mesh),
        config,
    )
    plan = ppo.PPOPlan(
        epochs=2, minibatch_size=batch_size // 4, penalty="full", temperature=TEMPERATURE
    )
    optimizer = state.adamw(lambda step: 3e-4, 1e-5, 0.0, 1.0)

    def iteration(train_state, ref, batches, table, n, beta):
        return ppo.iteration(
            train_state, ref, batches[0], table, n, beta, config=config, plan=plan,
            optimizer=optimizer,
        )  # fmt: skip

    def fresh() -> state.TrainState:
        params = reference | {"value": {"head": heads.init_value(config, jax.random.key(1))}}
        return state.create(jax.tree.map(np.array, params), optimizer, jax.random.key(2))

    def timed(first: state.TrainState, step: loop.Step) -> tuple[state.TrainState, list[float]]:
        seconds = []
        for i in range(iterations + 1):
            began = time.monotonic()
            first, _, _ = step(first, i)
            jax.block_until_ready(first.params)
            seconds.append(time.monotonic() - began)
        return first, seconds

    everyone = [Member(2.0**i, 0.1, i, 64) for i in range(members)]
    keys = jnp.stack([jax.random.key(m.seed) for m in everyone])
    together, population_s = timed(
        population.repeated(fresh(), jnp.stack([jax.random.key(2)] * members), mesh),
        population.online(
            world, iteration, loop.POLICY, everyone, keys, batch_size, at_once, lambda step: 3e-4
        ),
    )
    singles, single_s = [], []
    for i, m in enumerate(everyone):

        def update(n, s, batches):
            return iteration(s, world.reference, batches, world.references, n, jnp.float32(0.1))

        one = loop.online(
            world,
            partial(update, jnp.float32(m.n)),
            loop.POLICY,
            batch_size,
            m.seed,
            keys[i],
            lambda step: 3e-4,
        )
        trained, seconds = timed(sharding.place(fresh(), mesh), one)
        singles.append(trained)
        single_s.append(seconds)

    tokens = jnp.asarray(rng.integers(1, vocabulary, (8, 40)), jnp.int32)

    def log_probs(params: Any) -> np.ndarray:
        hidden = decoder.hidden(params["decoder"], config, tokens, jnp.ones_like(tokens, bool))
        return np.asarray(jax.nn.log_softmax(decoder.logits(params["decoder"], config, hidden)))

    difference = max(
        float(
            np.abs(log_probs(alone.params) - log_probs(population.member(together.params, i))).max()
        )
        for i, alone in enumerate(singles)
    )
    warm_single = float(np.median([s for run in single_s for s in run[1:]]))
    warm_population = float(np.median(population_s[1:]))
    return {
        "singles_s": warm_single * members * iterations,
        "population_s": warm_population * iterations,
        "ratio": warm_single * members / warm_population,
        "singles_compile_s": single_s[0][0] - warm_single,
        "population_compile_s": population_s[0] - warm_population,
        "difference": difference,
    }
