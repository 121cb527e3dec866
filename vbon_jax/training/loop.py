"""The training loop: roll out, score, update, write, save; one pass of it is one iteration."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vbon_jax import sharding
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.progress import Stopped, StopSignal, reporting
from vbon_jax.responses import check_rewards
from vbon_jax.sampling import engine
from vbon_jax.sampling.decode import Rollout
from vbon_jax.sampling.engine import Request, Sampling
from vbon_jax.training import ppo
from vbon_jax.training.checkpoint import Checkpointer
from vbon_jax.training.metrics import MetricsWriter
from vbon_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class LoopPlan:
    """iterations of batch_size rollouts; a checkpoint every checkpoint_every iterations; seed of
    the order of prompts; n and beta of the objective."""

    iterations: int
    batch_size: int
    checkpoint_every: int
    seed: int
    n: float
    beta: float


def batch_requests(
    prompts: Sequence[Prompt], batch_size: int, step: int, seed: int
) -> list[Request]:
    """The prompts of iteration ``step``: positions step * batch_size and on in an endless sequence
    of shuffled passes over the prompts.

    The sample index of a request is its pass, so a prompt met twice in a batch is drawn twice
    differently. A pure function of (step, seed): going on after a cut needs no stored order.
    """
    requests: list[Request] = []
    position = step * batch_size
    while len(requests) < batch_size:
        epoch, start = divmod(position + len(requests), len(prompts))
        order = _order(seed, epoch, len(prompts))
        for i in order[start : start + batch_size - len(requests)]:
            requests.append(Request(prompts[i].id, epoch, prompts[i].tokens))
    return requests


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The prompts' order in a pass; one prompt needs none, and passes over it are many."""
    if count == 1:
        return np.zeros(1, np.int64)
    return np.random.default_rng((seed, epoch)).permutation(count)


def train(
    state: TrainState,
    reference: Any,
    config: DecoderConfig,
    prompts: Sequence[Prompt],
    sorted_rewards_PxM: np.ndarray,
    reward: Callable[..., Any],
    response_text: Callable[[Sequence[int]], str],
    sampling: Sampling,
    plan: ppo.PPOPlan,
    loop: LoopPlan,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    mesh: Mesh,
    rollout_key: jax.Array,
    checkpointer: Checkpointer,
    writer: MetricsWriter,
    metadata: dict[str, Any],
) -> TrainState:
    """Algorithm 1 of the paper, from the state's step to ``loop.iterations``.

    Args:
      state: on ``mesh``; donated. reference: params {"decoder"} on ``mesh``.
      prompts: P of them, row i of sorted_rewards_PxM (float32, ascending) holding the reference
        rewards of prompts[i].
      reward: (prompt texts, prompt ids and mask, response ids and mask) -> float rewards [B].
      response_text: token ids -> text, for messages.
      learning_rate: the optimizer's schedule, for the log.
      metadata: JSON saved with every checkpoint.

    Returns the final state, which is also the newest checkpoint.
    Raises Stopped after a signal, once the state is saved; InputError on a NaN reward, and on a
    loss or gradient that is not finite, naming the step and the last good checkpoint.
    """
    texts = {p.id: p.text for p in prompts}
    row_of = {p.id: i for i, p in enumerate(prompts)}
    length = engine.bucket_length(max(len(p.tokens) for p in prompts))
    table = sharding.place(jnp.asarray(sorted_rewards_PxM), mesh)
    n, beta = (sharding.place(jnp.float32(value), mesh) for value in (loop.n, loop.beta))
    updates_a_step = plan.epochs * (loop.batch_size // plan.minibatch_size)
    start = int(state.step)

    def save(step: int, state: TrainState) -> None:
        checkpointer.save(
            step, state, {**metadata, "step": step, "data_position": step * loop.batch_size}
        )

    with reporting("train", loop.iterations, start) as report, StopSignal() as stop:
        for step in range(start, loop.iterations):
            began = time.monotonic()
            requests = batch_requests(prompts, loop.batch_size, step, loop.seed)
            rows, rollout = engine.draw(
                state.params["decoder"], config, sampling, mesh, rollout_key, step, requests, length
            )
            tokens_drawn = int(jnp.sum(rollout.mask_BxT))  # waits for the rollout
            drawn = time.monotonic()

            names = [texts[r.prompt_id] for r in requests]
            rewards = np.asarray(
                reward(names, *rows, rollout.tokens_BxT, rollout.mask_BxT), np.float32
            )
            check_rewards(rewards, names, functools.partial(_text, rollout, response_text))
            scored = time.monotonic()

            batch = ppo.RolloutBatch(
                rows.tokens_BxP,
                rows.mask_BxP,
                rollout,
                *sharding.place(
                    (rewards, np.array([row_of[r.prompt_id] for r in requests], np.int32)),
                    mesh,
                    "batch",
                ),
            )
            state, metrics = ppo.iteration(
                state, reference, batch, table, n, beta,
                config=config, plan=plan, optimizer=optimizer,
            )  # fmt: skip
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            updated = time.monotonic()

            values |= {
                "learning_rate": float(learning_rate(step * updates_a_step)),
                "seconds_rollout": drawn - began,
                "seconds_reward": scored - drawn,
                "seconds_update": updated - scored,
                "tokens_per_second": tokens_drawn / (updated - began),
            }
            writer.write(step + 1, values)
            _refuse_not_finite(values, step + 1, checkpointer)
            report.update(
                step + 1,
                f"reward {values['reward']:.3f}  KL to ref {values['kl_ref']:.3f}  "
                f"to BoN {values['kl_bon']:.3f} nats",
            )
            last = step + 1 == loop.iterations
            if last or (step + 1) % loop.checkpoint_every == 0 or stop.signum is not None:
                save(step + 1, state)
            if stop.signum is not None:
                checkpointer.wait()
                raise Stopped(
                    stop.signum,
                    f"the state after iteration {step + 1} of {loop.iterations} is saved in "
                    f"{checkpointer.directory}; the same command goes on from it",
                )
    checkpointer.wait()
    return state


def _text(rollout: Rollout, response_text: Callable[[Sequence[int]], str], row: int) -> str:
    return response_text(rollout.tokens_BxT[row][rollout.mask_BxT[row]].tolist())


def _refuse_not_finite(values: dict[str, float], step: int, checkpointer: Checkpointer) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            checkpointer.wait()
            good = checkpointer.latest_step
            where = (
                f"the last good checkpoint is {checkpointer.directory / str(good)}"
                if good is not None
                else "there is no checkpoint yet"
            )
            raise InputError(
                f"{name} is {values[name]} at iteration {step}; {where}: lower "
                "train.learning_rate or train.max_grad_norm and train anew, or look for rewards "
                "that are not finite"
            )
