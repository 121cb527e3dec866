"""Many policies in one program: values of n, beta, m and seeds are data, not structure.

Every array of a population has the members first, [K, ...]. On one device, ``at_once`` members are
vmapped side by side and the others follow in the same program; several devices share the members
out among themselves and never talk to each other.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vbon_jax import sharding
from vbon_jax.bon.references import References
from vbon_jax.models import trainable
from vbon_jax.models.decoder import DecoderConfig
from vbon_jax.sampling import decode
from vbon_jax.sampling import sampler as engine
from vbon_jax.sampling.responses import check_rewards, counts_of
from vbon_jax.sampling.sampler import Request, Sampling
from vbon_jax.training import loop, ppo, state
from vbon_jax.training.loop import Step, World

AXIS = "population"


@dataclasses.dataclass(frozen=True)
class Member:
    """One policy of a population: n of best-of-n, beta, the seed of its training, and m."""

    n: float
    beta: float
    seed: int
    m: int


def padded(members: Sequence[Member], mesh: Mesh) -> list[Member]:
    """The members, the last repeated until the devices can share them evenly."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return [*members, *[members[-1]] * (-len(members) % ways)]


def repeated(one: state.TrainState, keys_K: jax.Array, mesh: Mesh) -> state.TrainState:
    """K copies of a fresh state on the mesh, each with its own key."""
    count = keys_K.shape[0]
    copies = jax.tree.map(
        lambda x: np.broadcast_to(x, (count, *np.shape(x))),
        jax.device_get(one._replace(key=jnp.zeros(()))),
    )
    return sharding.place(copies._replace(key=keys_K), mesh, AXIS)


def member(tree: Any, index: int) -> Any:
    """The tree of one member."""
    return jax.tree.map(lambda x: x[index], tree)


def over_members(
    f: Callable[..., Any], mesh: Mesh, at_once: int, donate: bool = False
) -> Callable[..., Any]:
    """f(shared, *own) -> out, for all members: own and out have the members first; jitted.

    Args:
      f: computes one member. Inside, ``AXIS`` names the axis of those computed side by side, unless
        at_once is 1: then there is no such axis.
      at_once: how many that is at most, on each device; 0 for all.
      donate: the first of ``own`` is donated.
    """

    def local(shared: Any, *own: Any) -> Any:
        if at_once == 1:  # a vmap of one would still make every product a batched one, slow on CPU
            return jax.lax.map(lambda args: f(shared, *args), own)
        side_by_side = jax.vmap(partial(f, shared), axis_name=AXIS)
        count = jax.tree.leaves(own)[0].shape[0]
        width = count if at_once == 0 else _divisor(count, at_once)
        if width == count:
            return side_by_side(*own)
        rows = jax.tree.map(lambda x: x.reshape(count // width, width, *x.shape[1:]), own)
        out = jax.lax.map(lambda args: side_by_side(*args), rows)
        return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), out)

    def everywhere(shared: Any, *own: Any) -> Any:
        if mesh.size == 1:
            return local(shared, *own)
        members = P(sharding.BATCH)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), *[members] * len(own)),
            out_specs=members,
            check_vma=False,
        )(shared, *own)

    return jax.jit(everywhere, donate_argnums=(1,) if donate else ())


def _divisor(count: int, most: int) -> int:
    """The largest divisor of count that is at most ``most``."""
    return next(d for d in range(min(count, most), 0, -1) if count % d == 0)


def _drawer(config: DecoderConfig, sampling: Sampling, mesh: Mesh, at_once: int) -> Callable:
    def draw(shared, params, key, tokens_BxP, mask_BxP, ids_B, samples_B):
        step, base = shared
        return decode.rollout(
            trainable.join(base, params), tokens_BxP, mask_BxP,
            decode.identity_keys(key, step, ids_B, samples_B),
            sampling.temperature, config=config, max_new_tokens=sampling.max_new_tokens,
            eos_id=sampling.eos_id, pad_id=sampling.pad_id,
            together=None if at_once == 1 else AXIS,
        )  # fmt: skip

    return over_members(draw, mesh, at_once)


def _rows(world: World, batches: Sequence[Sequence[Request]], length: int) -> tuple:
    """Padded prompts [K, B, P] with masks, ids and sample numbers [K, B], on the mesh."""
    padded_rows = [
        engine.pad_left([r.tokens for r in batch], length, world.sampling.pad_id)
        for batch in batches
    ]
    arrays = (
        np.stack([rows.tokens_BxP for rows in padded_rows]),
        np.stack([rows.mask_BxP for rows in padded_rows]),
        np.array([[r.prompt_id for r in batch] for batch in batches], np.int32),
        np.array([[r.sample for r in batch] for batch in batches], np.int32),
    )
    return sharding.place(arrays, world.mesh, AXIS)


def _scores(world: World, batches: Sequence[Sequence[Request]], rows: tuple, rollout: Any) -> Any:
    """Rewards [K, B], all members' responses scored as one batch."""
    by_id, _ = loop.index(world.prompts)
    prompts = [by_id[r.prompt_id] for batch in batches for r in batch]
    flat = [x.reshape(-1, x.shape[-1]) for x in (*rows[:2], rollout.tokens_BxT, rollout.mask_BxT)]
    rewards = np.asarray(world.reward(prompts, *flat), np.float32)
    check_rewards(rewards, prompts, lambda i: world.response_text(flat[2][i][flat[3][i]].tolist()))
    return rewards.reshape(len(batches), -1)


def keep_finite(old: state.TrainState, new: state.TrainState, metrics: dict) -> tuple:
    """``new``, or where its loss or gradient is not finite ``old`` again, one step on.

    One member that diverges must not take the others with it: its step is refused and counted.
    """
    fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda a, b: jnp.where(fine, b, a), (old.params, old.opt_state),
                        (new.params, new.opt_state))  # fmt: skip
    return new._replace(params=kept[0], opt_state=kept[1]), metrics | {
        "refused": 1.0 - fine.astype(jnp.float32)
    }


def online(
    world: World,
    iteration: Callable[..., tuple[state.TrainState, dict[str, jax.Array]]],
    sources: Sequence[str],
    members: Sequence[Member],
    keys_K: jax.Array,
    batch_size: int,
    at_once: int,
    learning_rate: Callable[[int], float],
) -> Step:
    """The step of an online method for a whole population; compare ``loop.online``.

    Args:
      world: its references serve every member, [P, M], or stand for each, [K, P, M].
      iteration: (state, reference params, batches, references, n, beta) -> (state, metrics) of one
        member.
      sources, learning_rate: as for ``loop.online``.
      members: K of them; a multiple of the devices (``padded``). keys_K: of their rollouts.
      at_once: see ``over_members``.

    Member k does what a run of its own with its seed would do: same prompts, keys and updates.
    """
    own_references = world.references.rewards_PxM.ndim == 3

    def update(shared, state, batches, references, n, beta):
        reference, common = shared
        new, metrics = iteration(
            state, reference, batches, references if own_references else common, n, beta
        )
        return keep_finite(state, new, metrics)

    draw = _drawer(world.config, world.sampling, world.mesh, at_once)
    update_all = over_members(update, world.mesh, at_once, donate=True)

    def on_members(tree: Any) -> Any:
        return sharding.place(tree, world.mesh, AXIS)

    keys_K = on_members(keys_K)
    n_K = on_members(np.array([m.n for m in members], np.float32))
    beta_K = on_members(np.array([m.beta for m in members], np.float32))
    none = on_members(np.zeros((len(members), 1), np.float32))
    common: References | None = None
    if not own_references:
        common = sharding.place(world.references, world.mesh)
    own = on_members(world.references) if own_references else none
    length = engine.bucket_length(max(len(p.tokens) for p in world.prompts))
    _, row_of = loop.index(world.prompts)

    def one(state: Any, step: int) -> tuple[Any, dict[str, Any], str]:
        began = time.monotonic()
        base = [loop.batch_requests(world.prompts, batch_size, step, m.seed) for m in members]
        whole = trainable.trains_head(state.params[sources[0]])
        shared = {} if whole else world.reference["decoder"]
        scored, seconds, tokens = [], {"rollout": 0.0, "reward": 0.0}, 0
        for i, source in enumerate(sources):
            batches = [
                [Request(r.prompt_id, r.sample * len(sources) + i, r.tokens) for r in batch]
                for batch in base
            ]
            start = time.monotonic()
            rows = _rows(world, batches, length)
            rollout = draw((np.int32(step), shared), state.params[source], keys_K, *rows)
            tokens += int(jnp.sum(rollout.mask_BxT))  # waits for the rollout
            drawn = time.monotonic()
            rewards = _scores(world, batches, rows, rollout)
            numbers = np.array([[row_of[r.prompt_id] for r in b] for b in batches], np.int32)
            placed = on_members((rewards, numbers))
            scored.append(ppo.RolloutBatch(rows[0], rows[1], rollout, *placed))
            seconds["rollout"] += drawn - start
            seconds["reward"] += time.monotonic() - drawn
        ready = time.monotonic()
        state, metrics = update_all(
            (world.reference, common), state, tuple(scored), own, n_K, beta_K
        )
        values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        updated = time.monotonic()
        values |= {
            "learning_rate": learning_rate(step),
            "seconds_rollout": seconds["rollout"],
            "seconds_reward": seconds["reward"],
            "seconds_update": updated - ready,
            "tokens_per_second": tokens / (updated - began),
            **counts_of(world.reward),  # of all members together
        }
        return state, values, loop.note(values)

    return one
