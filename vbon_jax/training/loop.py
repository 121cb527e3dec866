"""The training loop: roll out, score, update, write, save; one pass of it is one iteration."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vbon_jax import sharding
from vbon_jax.bon.references import References
from vbon_jax.data.prompts import Prompt
from vbon_jax.errors import InputError
from vbon_jax.models import trainable
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.progress import Stopped, StopSignal, reporting
from vbon_jax.sampling import sampler as engine
from vbon_jax.sampling.decode import Rollout
from vbon_jax.sampling.responses import Reward, check_rewards, counts_of
from vbon_jax.sampling.sampler import Request, Sampling
from vbon_jax.training import ppo
from vbon_jax.training.checkpoint import Checkpointer
from vbon_jax.training.metrics import MetricsWriter

POLICY = ("decoder",)


class World(NamedTuple):
    """What online training reads and never changes.

    prompts: P of them; row i of ``references`` holds the reference rewards of prompts[i].
    reward: (prompts, prompt ids and mask, response ids and mask) -> float rewards [B].
    response_text: token ids -> text, for messages.
    reference: params {"decoder"} on ``mesh``, of ``config``.
    """

    prompts: Sequence[Prompt]
    references: References
    reward: Reward
    response_text: Callable[[Sequence[int]], str]
    sampling: Sampling
    mesh: Mesh
    reference: Any
    config: DecoderConfig


@dataclasses.dataclass(frozen=True)
class LoopPlan:
    """iterations: passes of the loop; a checkpoint every checkpoint_every of them."""

    title: str
    iterations: int
    checkpoint_every: int


# (state, step) -> (state one step on, what to write, a few words for the progress line)
Step = Callable[[Any, int], tuple[Any, dict[str, Any], str]]


def run(
    state: Any,
    start: int,
    one: Step,
    plan: LoopPlan,
    checkpointer: Checkpointer,
    writer: MetricsWriter,
    metadata: dict[str, Any],
) -> Any:
    """The one loop of every method: from ``start`` to ``plan.iterations``.

    Args:
      one: does an iteration; the state may be donated. What it writes are numbers, or lists of
        numbers where several policies are trained at once.
      metadata: JSON saved with every checkpoint.

    Returns the final state, which is also the newest checkpoint.
    Raises Stopped after a signal, once the state is saved; InputError on a loss or gradient that is
    not finite, naming the step and the last good checkpoint. Of a population ("refused" is written)
    only where no member's step was accepted: one that diverges must not stop the others.
    """
    with reporting(plan.title, plan.iterations, start) as report, StopSignal() as stop:
        for step in range(start, plan.iterations):
            state, values, note = one(state, step)
            writer.write(step + 1, values)
            _refuse_not_finite(values, step + 1, checkpointer)
            report.update(step + 1, note)
            last = step + 1 == plan.iterations
            if last or (step + 1) % plan.checkpoint_every == 0 or stop.signum is not None:
                checkpointer.save(step + 1, state, {**metadata, "step": step + 1})
            if stop.signum is not None:
                checkpointer.wait()
                raise Stopped(
                    stop.signum,
                    f"the state after iteration {step + 1} of {plan.iterations} is saved in "
                    f"{checkpointer.directory}; the same command goes on from it",
                )
    checkpointer.wait()
    return state


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


def scored_batch(
    world: World, params: Any, key: jax.Array, step: int, requests: Sequence[Request]
) -> tuple[ppo.RolloutBatch, dict[str, float]]:
    """Draws and scores one batch; the seconds each took, and the number of tokens drawn.

    Raises InputError on a NaN reward.
    """
    began = time.monotonic()
    length = engine.bucket_length(max(len(p.tokens) for p in world.prompts))
    rows, rollout = engine.draw(
        params, world.config, world.sampling, world.mesh, key, step, requests, length
    )
    tokens_drawn = int(jnp.sum(rollout.mask_BxT))  # waits for the rollout
    drawn = time.monotonic()
    by_id, row_of = index(world.prompts)
    prompts = [by_id[r.prompt_id] for r in requests]
    rewards = np.asarray(
        world.reward(prompts, *rows, rollout.tokens_BxT, rollout.mask_BxT), np.float32
    )
    check_rewards(rewards, prompts, functools.partial(_text, rollout, world.response_text))
    numbers = np.array([row_of[r.prompt_id] for r in requests], np.int32)
    batch = ppo.RolloutBatch(
        rows.tokens_BxP,
        rows.mask_BxP,
        rollout,
        *sharding.place((rewards, numbers), world.mesh, "batch"),
    )
    return batch, {
        "seconds_rollout": drawn - began,
        "seconds_reward": time.monotonic() - drawn,
        "tokens": tokens_drawn,
    }


def index(prompts: Sequence[Prompt]) -> tuple[dict[int, Prompt], dict[int, int]]:
    """Each prompt and its row by its id."""
    return {p.id: p for p in prompts}, {p.id: i for i, p in enumerate(prompts)}


def online(
    world: World,
    update: Callable[[Any, tuple[ppo.RolloutBatch, ...]], tuple[Any, dict[str, jax.Array]]],
    sources: Sequence[str],
    batch_size: int,
    seed: int,
    key: jax.Array,
    learning_rate: Callable[[int], float],
) -> Step:
    """The step of an online method: a rollout from each of ``sources``, rewards, an update.

    Args:
      update: (state, one scored batch a source) -> (state, metrics); the state is donated.
      sources: the entries of ``state.params`` that respond to the iteration's prompts, in order:
        the policy alone for PPO.
      batch_size: responses of each source; seed: of the order of prompts; key: of the rollouts.
      learning_rate: iteration -> rate, for the log.
    """

    def one(state: Any, step: int) -> tuple[Any, dict[str, Any], str]:
        began = time.monotonic()
        requests = batch_requests(world.prompts, batch_size, step, seed)
        batches, seconds = [], {"seconds_rollout": 0.0, "seconds_reward": 0.0, "tokens": 0.0}
        for i, source in enumerate(sources):
            own = [Request(r.prompt_id, r.sample * len(sources) + i, r.tokens) for r in requests]
            params = trainable.join(world.reference["decoder"], state.params[source])
            batch, took = scored_batch(world, params, key, step, own)
            batches.append(batch)
            seconds = {name: value + took[name] for name, value in seconds.items()}
        scored = time.monotonic()
        state, metrics = update(state, tuple(batches))
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        updated = time.monotonic()
        tokens = seconds.pop("tokens")
        values |= {
            "learning_rate": learning_rate(step),
            **seconds,
            "seconds_update": updated - scored,
            "tokens_per_second": tokens / (updated - began),
            **counts_of(world.reward),
        }
        return state, values, note(values)

    return one


def note(values: dict[str, Any]) -> str:
    """The words of the progress line; of several policies, the means."""

    def mean(name: str) -> float:
        return float(np.mean(values[name]))

    text = f"reward {mean('reward'):.3f}  KL to ref {mean('kl_ref'):.3f}"
    return f"{text}  to BoN {mean('kl_bon'):.3f} nats" if "kl_bon" in values else f"{text} nats"


def _text(rollout: Rollout, response_text: Callable[[Sequence[int]], str], row: int) -> str:
    return response_text(rollout.tokens_BxT[row][rollout.mask_BxT[row]].tolist())


def _refuse_not_finite(values: dict[str, Any], step: int, checkpointer: Checkpointer) -> None:
    if "refused" in values and not all(values["refused"]):
        return
    for name in ("loss", "grad_norm"):
        bad = [v for v in np.atleast_1d(values[name]).tolist() if not math.isfinite(v)]
        if bad:
            checkpointer.wait()
            good = checkpointer.latest_step
            where = (
                f"the last good checkpoint is {checkpointer.directory / str(good)}"
                if good is not None
                else "there is no checkpoint yet"
            )
            raise InputError(
                f"{name} is {bad[0]} at iteration {step}; {where}: lower the learning rate or "
                "train.max_grad_norm and train anew, or look for rewards that are not finite"
            )
