"""Seconds of training a population of policies, against as many single runs, in one process."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import sharding
from vbon_jax.bench.machine import Row
from vbon_jax.bon import references
from vbon_jax.data.prompts import Prompt
from vbon_jax.methods import learning, vbon
from vbon_jax.methods.learning import Job, Training
from vbon_jax.models import decoder
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.models.lm import LanguageModel
from vbon_jax.sampling.responses import Sampling
from vbon_jax.sampling.sampler import Sampler
from vbon_jax.training import population
from vbon_jax.training.learner import Member
from vbon_jax.training.loop import Step, Task
from vbon_jax.training.options import Train
from vbon_jax.training.state import TrainState

PROMPTS, SAMPLES = 64, 64


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
    """Times vBoN for K values of n: trained as one population, and one run after another.

    Args:
      members: K, the number of policies.
      iterations: iterations timed, after one that compiles.
      batch_size: responses per iteration and policy, in four minibatches; two PPO epochs.
      at_once: policies vmapped side by side, as config key ``sweep.at_once``.
      layers: of the model, whose weights are random.
      width: of the model, a multiple of its 4 heads.
      vocabulary: tokens of the vocabulary.
      new_tokens: tokens per response.

    Returns:
      "singles_s" and "population_s": seconds of K x ``iterations`` iterations, the median iteration
      times their number; "ratio": singles_s / population_s; "singles_compile_s" and
      "population_compile_s": extra seconds of the first iteration, which compiles (K runs of their
      own pay it K times); "difference": the largest absolute difference between next-token
      log-probs of a policy trained in the population and of its single run, nats.
    """
    config = DecoderConfig(
        vocab_size=vocabulary, positions=64, layers=layers, width=width, heads=4,
        mlp_width=4 * width, initializer_range=0.1,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    task = _task(config, new_tokens, rng)
    train = Train(
        batch_size=batch_size, minibatch_size=batch_size // 4, ppo_epochs=2, learning_rate=3e-4
    )
    job = Job(vbon.METHOD, vbon.VBoN(), Training(train), config, PROMPTS)
    everyone = [Member(2.0**i, 0.1, i, SAMPLES) for i in range(members)]
    singles: list[Any] = []
    single_s: list[list[float]] = []
    with jax.set_mesh(task.sampler.mesh):
        together, population_s = _timed(
            iterations, *learning.many(job, task, everyone, (), at_once)
        )
        for member in everyone:
            alone, seconds = _timed(iterations, *learning.single(job, task, member, ()))
            singles.append(alone.params)
            single_s.append(seconds)
        tokens = jnp.asarray(rng.integers(1, vocabulary, (8, 40)), jnp.int32)
        difference = _difference(config, tokens, singles, together.params)
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


def _task(config: DecoderConfig, new_tokens: int, rng: np.random.Generator) -> Task:
    """Random prompts, reference rewards and reference model."""
    mesh = sharding.make_mesh()
    prompts = [
        Prompt(i, str(i), tuple(rng.integers(1, config.vocab_size, 8).tolist()))
        for i in range(PROMPTS)
    ]
    rewards_PxM = rng.normal(0, 0.1, (PROMPTS, SAMPLES)).astype(np.float32)
    params = jax.jit(decoder.init, static_argnums=0)(config, jax.random.key(0))
    model = LanguageModel(config, sharding.place(params, mesh, "decoder"), tokenizer=None)
    return Task(
        prompts,
        references.references(rewards_PxM, "interval"),
        partial(_reward, config.vocab_size),
        Sampler(model, mesh, Sampling(1.0, new_tokens, end_ids=(0,), pad_id=0)),
    )


def _reward(vocabulary: int, prompts: Any, *batch: Any) -> np.ndarray:
    """A fixed reward that a policy can raise: small ids are good. It reads ids, not text."""
    del prompts
    tokens, mask = jax.device_get(batch[2:])
    return np.where(mask, 1 - 2 * tokens / vocabulary, 0).mean(axis=1, dtype=np.float32)


def _timed(iterations: int, state: TrainState, step: Step) -> tuple[TrainState, list[float]]:
    """The state after ``iterations`` + 1 iterations, and the seconds of each."""
    seconds = []
    for i in range(iterations + 1):
        began = time.monotonic()
        state, _, _ = step(state, i)
        jax.block_until_ready(state.params)
        seconds.append(time.monotonic() - began)
    return state, seconds


def _difference(
    config: DecoderConfig, tokens_BxS: jax.Array, singles: Sequence[Any], together: Any
) -> float:
    """The largest difference in next-token log-probs between single runs and members, nats."""

    def log_probs(params: Any) -> np.ndarray:
        own = params["decoder"]
        hidden = decoder.hidden(own, config, tokens_BxS, jnp.ones_like(tokens_BxS, bool))
        return np.asarray(jax.nn.log_softmax(decoder.logits(own, config, hidden)))

    return max(
        float(np.abs(log_probs(alone) - log_probs(population.member(together, i))).max())
        for i, alone in enumerate(singles)
    )


def rows(times: Mapping[str, float], members: int = 8) -> list[Row]:
    """Makes the lines of the table.

    Args:
      times: what `population_times` returns.
      members: number of policies it was measured with.

    Returns:
      The seconds of both ways, of their compilation, and how far the policies differ.
    """
    single = f"{members} single runs"
    compiled = times["population_compile_s"], times["singles_compile_s"]
    return [
        Row("population", single, times["singles_s"], "s"),
        Row(
            "population", f"{members} policies as one population", times["population_s"], "s",
            1 / times["ratio"], single,
        ),
        Row("population", "compilation of a single run", compiled[1], "s"),
        Row(
            "population", "compilation of the population", compiled[0], "s",
            compiled[0] / compiled[1], "that of a single run",
        ),
        Row("population", "largest difference of a log-prob", times["difference"], "nats"),
    ]  # fmt: skip
