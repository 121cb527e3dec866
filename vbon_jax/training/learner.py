"""One policy in training: it draws responses, has them scored and takes an update."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vbon_jax import sharding
from vbon_jax.data.prompts import Prompt
from vbon_jax.models import family, trainable
from vbon_jax.rewards.base import counts_of
from vbon_jax.sampling import prefixes
from vbon_jax.sampling.decode import Rollout
from vbon_jax.sampling.requests import Prompts, Request, bucket_length, index
from vbon_jax.sampling.responses import Batch, ScoredRollout
from vbon_jax.sampling.sampler import named_key
from vbon_jax.training.loop import Task, batch_requests
from vbon_jax.training.stored import Stored

# (state, reference params, one scored rollout a source, references, n, beta) -> (state, metrics)
Update = Callable[..., tuple[Any, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Program:
    """What an online method computes, compiled for a run.

    Attributes:
      update: (state, reference params, scored rollouts, references, n, beta) -> (state, metrics).
      sources: the entries of ``state.params`` that respond to an iteration's prompts, in order: the
        policy alone, ("decoder",), for PPO.
      batch_size: responses of each source.
      learning_rate: iteration -> rate, for the log.
      group: responses of each source to each prompt.
      prefixes: whether the update reads the rewards of prefixes.
      lookahead: of how many of the likeliest next tokens it does as well.
      replay: stored samples of each prompt beside the responses to it.
      trunk_layers: of a frozen trunk, whose output the update takes from the rollout; 0 for none.
      from_store: prompts, the first, whose stored samples take the place of responses; 0 where
        responses are drawn.
      rows: that the responses of a source take in turns; 0 for a row each.
    """

    update: Update
    sources: tuple[str, ...]
    batch_size: int
    learning_rate: Callable[[int], float]
    group: int = 1
    prefixes: bool = False
    lookahead: int = 0
    replay: int = 0
    trunk_layers: int = 0
    from_store: int = 0
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class Member:
    """The values that tell one policy of a method from another; data, not structure.

    Attributes:
      n: of best-of-n; of a family of policies the largest.
      beta: KL coefficient, of the methods that have one.
      seed: of its training.
      m: reference samples a prompt that its log F is estimated from.
      low: of a family, the least n that it is trained for; None of one policy.
    """

    n: float
    beta: float
    seed: int
    m: int
    low: float | None = None

    def n_of(self, step: int, groups: int) -> np.ndarray | None:
        """The n of each group of responses of iteration ``step``; None where all have one.

        log n is uniform between its ends, one draw in each of as many equal parts as there are
        groups, in random order: less noise than draws that may fall together.
        """
        if self.low is None:
            return None
        low, high = np.log((self.low, self.n))
        rng = np.random.default_rng((self.seed, step, groups))
        parts = (rng.permutation(groups) + rng.random(groups)) / groups
        return np.exp(low + (high - low) * parts).astype(np.float32)


class Learner:
    """Trains one policy: `roll_out`, `score` and `update` make an iteration, in this order."""

    def __init__(self, task: Task, program: Program, member: Member, samples: Stored | None = None):
        """Places what the updates read on the task's mesh.

        Args:
          task: what it learns from.
          program: what an iteration computes.
          member: n, beta and seed.
          samples: those that ``program.replay`` is taken from.
        """
        mesh = task.sampler.mesh
        self.task, self.program, self.member = task, program, member
        self._samples = samples
        self._sampler = task.sampler.at(
            likeliest=program.lookahead, trunk_layers=program.trunk_layers
        )
        self._key = named_key(member.seed, "rollout")
        self._length = prompt_length(task)
        self._references = sharding.place(task.references, mesh)
        self._n, self._beta = (
            sharding.place(jnp.float32(v), mesh) for v in (member.n, member.beta)
        )
        self._clock = Clock()

    def roll_out(self, state: Any, step: int) -> list[Batch]:
        """One response of each source to each of the iteration's prompts."""
        self._clock.start()
        program = self.program
        if program.from_store:
            return []
        base = batch_requests(
            self.task.prompts, program.batch_size, step, self.member.seed, program.group
        )
        batches = []
        for i, source in enumerate(program.sources):
            own = state.params[source]
            if (n_G := self._n_of(step)) is not None:
                own = _opened(own, sharding.place(n_G, self.task.sampler.mesh), self.member.n)
            params = trainable.join(self.task.sampler.model.params, own)
            batches.append(
                self._sampler.with_params(params).draw(
                    self._key, step, requests_of(base, i, program), self._length, program.rows
                )
            )
        tokens = sum(int(jnp.sum(b.rollout.mask_BxT)) for b in batches)  # waits for the rollouts
        self._clock.lap("rollout", tokens)
        return batches

    def _n_of(self, step: int) -> np.ndarray | None:
        return self.member.n_of(step, self.program.batch_size // self.program.group)

    def score(self, batches: Sequence[Batch], step: int) -> tuple[ScoredRollout, ...]:
        """The rewards of the responses of iteration ``step``, and the stored samples beside them.

        Raises:
          InputError: a reward is not finite.
        """
        by_id, row_of = index(self.task.prompts)
        scored = []
        if self.program.from_store:
            row_G = stored_prompts(self.task, self.program, self.member.seed, step)
            found = self._beside(row_G, self.program.group, step)
            scored.append(sharding.place(found, self.task.sampler.mesh, "batch"))
        for batch in batches:
            prompts = [by_id[r.prompt_id] for r in batch.requests]
            drawn = (batch.prompts, batch.rollout)
            of_prefixes = prefix_rewards(self.task, self.program, prompts, *drawn)
            rewards = self.task.sampler.rewards(
                self.task.reward, prompts, batch.prompts, batch.rollout
            )
            rows = np.array([row_of[r.prompt_id] for r in batch.requests], np.int32)
            beside = self._beside(rows[:: self.program.group], self.program.replay, step)
            n_G = self._n_of(step)
            n_B = None if n_G is None else np.repeat(n_G, self.program.group)
            reward_B, row_B, of, of_candidates, beside, n_B = sharding.place(
                (rewards, rows, *of_prefixes, beside, n_B), self.task.sampler.mesh, "batch"
            )
            scored.append(
                ScoredRollout(
                    batch.prompts.tokens_BxP,
                    batch.prompts.mask_BxP,
                    batch.rollout,
                    reward_B,
                    row_B,
                    batch.temperature,
                    of,
                    of_candidates,
                    beside,
                    n_B,
                )
            )
        self._clock.lap("reward")
        return tuple(scored)

    def _beside(self, row_G: np.ndarray, count: int, step: int) -> ScoredRollout | None:
        """Stored samples of prompts, scored as responses are."""
        if self._samples is None:
            return None
        of, program = self.member, self.program
        found = self._samples.beside(row_G, count, of.m, of.seed, step)
        if (n_G := self._n_of(step)) is not None:
            found = dataclasses.replace(found, n_B=np.repeat(n_G, count))
        return with_prefixes(self.task, program, found)

    def update(
        self, state: Any, scored: tuple[ScoredRollout, ...], step: int
    ) -> tuple[Any, dict[str, Any]]:
        """The method's jitted update; ``state`` is donated.

        Returns:
          (state one step on, the iteration's metrics on the host: numbers by name).
        """
        state, metrics = self.program.update(
            state, self.task.reference, scored, self._references, self._n, self._beta
        )
        values = {name: float(value) for name, value in sharding.fetch(metrics).items()}
        self._clock.lap("update")
        values |= {"learning_rate": self.program.learning_rate(step), **self._clock.metrics()}
        return state, values | counts_of(self.task.reward)


_opened = jax.jit(family.opened, static_argnames="top")


class Clock:
    """Seconds of an iteration's phases, by the names they have in the metrics."""

    def __init__(self) -> None:
        """No phase has begun."""
        self._began = self._last = 0.0
        self._seconds: dict[str, float] = {}
        self._tokens = 0

    def start(self) -> None:
        """An iteration begins."""
        self._began = self._last = time.monotonic()
        self._seconds = {}

    def lap(self, phase: str, tokens: int = 0) -> None:
        """``phase`` ends now; ``tokens`` were drawn in it."""
        now = time.monotonic()
        self._seconds[f"seconds_{phase}"] = now - self._last
        self._last = now
        self._tokens = tokens or self._tokens

    def metrics(self) -> dict[str, float]:
        """Seconds of each phase, and tokens drawn a second of the whole iteration."""
        return {
            **self._seconds,
            "tokens_per_second": self._tokens / (self._last - self._began),
        }


def prefix_rewards(
    task: Task, program: Program, prompts: Sequence[Prompt], rows: Prompts, rollout: Rollout
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Rewards of prefixes [B, T] and of candidates [B, T, K], those that the update reads."""
    of = of_candidates = None
    if program.prefixes:
        tokens_and_mask = (rollout.tokens_BxT, rollout.mask_BxT)
        of = prefixes.rewards(task.sampler, task.reward, prompts, rows, *tokens_and_mask)
    if program.lookahead:
        of_candidates = prefixes.of_candidates(task.sampler, task.reward, prompts, rows, rollout)
    return of, of_candidates


def stored_prompts(task: Task, program: Program, seed: int, step: int) -> np.ndarray:
    """Rows of the prompts whose stored samples iteration ``step`` learns from, one a group."""
    prompts = task.prompts[: program.from_store]
    _, row_of = index(prompts)
    requests = batch_requests(prompts, program.batch_size, step, seed, program.group)
    return np.array([row_of[r.prompt_id] for r in requests[:: program.group]], np.int32)


def with_prefixes(task: Task, program: Program, rows: ScoredRollout) -> ScoredRollout:
    """Stored rows on the host with the rewards of their prefixes, if the update reads them."""
    prompts = [task.prompts[row] for row in rows.row_B]
    left = Prompts(rows.prompt_BxP, rows.prompt_mask_BxP)
    of, _ = prefix_rewards(task, program, prompts, left, rows.rollout)
    return dataclasses.replace(rows, prefix_reward_BxT=of)


def prompt_length(task: Task) -> int:
    """The padded length that all of a task's prompts share, tokens."""
    return bucket_length(max(len(p.tokens) for p in task.prompts))


def requests_of(base: Sequence[Request], i: int, program: Program) -> list[Request]:
    """The requests of source i: sample indices of their own, so that sources differ."""
    count = len(program.sources)
    return [Request(r.prompt_id, r.sample * count + i, r.tokens) for r in base]
