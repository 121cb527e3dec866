"""Many policies in one program: values of n, beta, m and seeds are data, not structure.

Every array of a population has the members first, [K, ...]. On one device, ``at_once`` members are
vmapped side by side and the others follow in the same program; several devices share the members
out among themselves and never talk to each other.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vbon_jax import sharding
from vbon_jax.models import trainable
from vbon_jax.rewards.base import counts_of
from vbon_jax.sampling import decode
from vbon_jax.sampling.decode import Rollout
from vbon_jax.sampling.requests import Prompts, Request, adjacent, index, pad_left
from vbon_jax.sampling.responses import ScoredRollout
from vbon_jax.sampling.sampler import Sampler, named_key, respond
from vbon_jax.training import state
from vbon_jax.training.learner import (
    Clock,
    Member,
    Program,
    Update,
    prefix_rewards,
    prompt_length,
    requests_of,
    stored_prompts,
    with_prefixes,
)
from vbon_jax.training.loop import Task, batch_requests
from vbon_jax.training.stored import Stored

AXIS = "population"


def padded(members: Sequence[Member], mesh: Mesh) -> list[Member]:
    """The members, the last repeated until the devices can share them evenly."""
    return [*members, *[members[-1]] * (-len(members) % sharding.ways(mesh))]


def repeated(one: state.TrainState, keys_K: jax.Array, mesh: Mesh) -> state.TrainState:
    """K copies of a fresh state on the mesh, each with its own key."""
    count = keys_K.shape[0]
    copies = jax.tree.map(
        lambda x: np.broadcast_to(x, (count, *np.shape(x))),
        sharding.fetch(one._replace(key=jnp.zeros(()))),
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
      mesh: of the devices that share the members out.
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


def _guarded(update: Update, own_references: bool) -> Callable[..., Any]:
    """A method's update for one member: refused where its loss or gradient is not finite."""

    def one(shared, state, scored, references, n, beta):
        reference, common = shared
        new, metrics = update(
            state, reference, scored, references if own_references else common, n, beta
        )
        return keep_finite(state, new, metrics)

    return one


class PopulationLearner:
    """Trains K policies at once: `roll_out`, `score` and `update` as of ``learner.Learner``.

    Member k does what a run of its own with its seed would do: same prompts, keys and updates.
    """

    def __init__(
        self,
        task: Task,
        program: Program,
        members: Sequence[Member],
        at_once: int,
        samples: Stored | None = None,
    ):
        """Compiles nothing yet.

        Args:
          task: its references serve every member, [P, M], or stand for each, [K, P, M].
          program: of one member.
          members: K of them, a multiple of the devices (``padded``).
          at_once: see ``over_members``.
          samples: those that ``program.replay`` is taken from.
        """
        self._samples = samples
        self.task, self.program, self.members = task, program, members
        mesh, own = task.sampler.mesh, task.references.rewards_PxM.ndim == 3
        self._keys_K = self._place(jnp.stack([named_key(m.seed, "rollout") for m in members]))
        self._n_K = self._place(np.array([m.n for m in members], np.float32))
        self._beta_K = self._place(np.array([m.beta for m in members], np.float32))
        none = np.zeros((len(members), 1), np.float32)
        self._own = self._place(task.references if own else none)
        self._common = None if own else sharding.place(task.references, mesh)
        self._length = prompt_length(task)
        drawing = task.sampler.at(likeliest=program.lookahead)
        self._draw = over_members(partial(_draw, drawing, at_once), mesh, at_once)
        self._update = over_members(_guarded(program.update, own), mesh, at_once, donate=True)
        self._clock = Clock()

    def _place(self, tree: Any) -> Any:
        return sharding.place(tree, self.task.sampler.mesh, AXIS)

    def roll_out(self, state: Any, step: int) -> list[tuple[list[list[Request]], Prompts, Rollout]]:
        """Of each source: the requests of each member, their prompts and responses, [K, B, ...]."""
        self._clock.start()
        task, program = self.task, self.program
        if program.from_store:
            return []
        base = [
            batch_requests(task.prompts, program.batch_size, step, m.seed, program.group)
            for m in self.members
        ]
        whole = trainable.trains_head(state.params[program.sources[0]])
        frozen = {} if whole else task.sampler.model.params
        drawn = []
        for i, source in enumerate(program.sources):
            requests = [requests_of(rows, i, program) for rows in base]
            prompts, *identity = self._rows(requests)
            each = math.gcd(*map(adjacent, requests))
            own = (x[:, ::each] for x in prompts)
            rollout = self._draw(
                (np.int32(step), frozen), state.params[source], self._keys_K, *own, *identity
            )
            drawn.append((requests, prompts, rollout))
        tokens = sum(int(jnp.sum(rollout.mask_BxT)) for *_, rollout in drawn)  # waits for them
        self._clock.lap("rollout", tokens)
        return drawn

    def _rows(self, requests: Sequence[Sequence[Request]]) -> tuple[Prompts, Any, Any]:
        """Padded prompts [K, B, P], prompt ids and sample numbers [K, B], on the mesh."""
        pad_id = self.task.sampler.settings.pad_id
        rows = [pad_left([r.tokens for r in batch], self._length, pad_id) for batch in requests]
        arrays = (
            Prompts(*(np.stack(x) for x in zip(*rows, strict=True))),
            np.array([[r.prompt_id for r in batch] for batch in requests], np.int32),
            np.array([[r.sample for r in batch] for batch in requests], np.int32),
        )
        return self._place(arrays)

    def score(self, drawn: Sequence[Any], step: int) -> tuple[ScoredRollout, ...]:
        """The rewards of the responses, all members' scored as one batch.

        Raises:
          InputError: a reward is not finite.
        """
        task = self.task
        by_id, row_of = index(task.prompts)
        scored = []
        if self.program.from_store:
            row_KxG = np.array(
                [stored_prompts(task, self.program, m.seed, step) for m in self.members]
            )
            scored.append(self._place(self._beside(row_KxG, self.program.group, step)))
        for requests, prompts, rollout in drawn:
            of = [by_id[r.prompt_id] for batch in requests for r in batch]
            flat_prompts, flat = jax.tree.map(
                lambda x: x.reshape(-1, *x.shape[2:]), (prompts, rollout)
            )
            of_prefixes = [
                x if x is None else x.reshape(*rollout.tokens_BxT.shape, *x.shape[2:])
                for x in prefix_rewards(task, self.program, of, flat_prompts, flat)
            ]
            rewards = task.sampler.rewards(task.reward, of, flat_prompts, flat)
            rows = np.array([[row_of[r.prompt_id] for r in b] for b in requests], np.int32)
            beside = self._beside(rows[:, :: self.program.group], self.program.replay, step)
            reward_KxB, row_KxB, of_prefixes, of_candidates, beside = self._place(
                (rewards.reshape(rows.shape), rows, *of_prefixes, beside)
            )
            scored.append(
                ScoredRollout(
                    prompts.tokens_BxP,
                    prompts.mask_BxP,
                    rollout,
                    reward_KxB,
                    row_KxB,
                    task.sampler.settings.temperature,
                    of_prefixes,
                    of_candidates,
                    beside,
                )
            )
        self._clock.lap("reward")
        return tuple(scored)

    def _beside(self, row_KxG: np.ndarray, count: int, step: int) -> ScoredRollout | None:
        """Of each member, stored samples of prompts, scored as responses are."""
        if self._samples is None:
            return None
        found = []
        for row_G, of in zip(row_KxG, self.members, strict=True):
            rows = self._samples.beside(row_G, count, of.m, of.seed, step)
            found.append(with_prefixes(self.task, self.program, rows))
        return jax.tree.map(lambda *x: np.stack(x), *found)

    def update(
        self, state: Any, scored: tuple[ScoredRollout, ...], step: int
    ) -> tuple[Any, dict[str, Any]]:
        """The method's update of every member; ``state`` is donated.

        Returns:
          (state one step on, metrics: lists of K numbers, or one number of all members together).
        """
        state, metrics = self._update(
            (self.task.reference, self._common), state, scored, self._own, self._n_K, self._beta_K
        )
        values = {name: value.tolist() for name, value in sharding.fetch(metrics).items()}
        self._clock.lap("update")
        values |= {"learning_rate": self.program.learning_rate(step), **self._clock.metrics()}
        return state, values | counts_of(self.task.reward)


def _draw(
    sampler: Sampler, at_once: int, shared: Any, params: Any, key: jax.Array, *rows: Any
) -> Rollout:
    """Responses of one member: ``rows`` are prompts, mask, prompt ids and sample numbers."""
    step, base = shared
    tokens_NxP, mask_NxP, ids_B, samples_B = rows
    return respond(
        trainable.join(base, params),
        Prompts(tokens_NxP, mask_NxP),
        decode.identity_keys(key, step, ids_B, samples_B),
        sampler.model.config,
        sampler.settings,
        None if at_once == 1 else AXIS,
    )
