"""When what is learned from stored samples has been learned well enough."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from vbon_jax import sharding
from vbon_jax.bon.pool import resample
from vbon_jax.methods.base import Offline
from vbon_jax.training import offline, policies, population
from vbon_jax.training.learner import Member

if TYPE_CHECKING:
    from vbon_jax.methods.learning import Job

LOOKS = 20  # at the held-out prompts over a training that is judged by them
PATIENCE = 3  # looks without a better one after which it ends
LOOKED_AT = 16  # samples of each of these prompts


class Judge:
    """Judges policies by KL(optimum || policy) on the samples of prompts they do not train on.

    The samples are resampled by their weights, so that each counts the same: the mean over them of
    log(m weight) + log pi_ref - log pi.
    """

    def __init__(
        self,
        job: "Job",
        shared: tuple[offline.Pool, Any],
        rewards_PxM: np.ndarray,
        order_PxM: np.ndarray | None,
        log_ref_N: np.ndarray,
        members: Sequence[Member],
        at_once: int | None,
        iterations: int,
    ):
        """Chooses the samples.

        Args:
          job: the method.
          shared: the pool and the reference's decoder.
          rewards_PxM: of all prompts, the last of which are held out.
          order_PxM: places of the samples in the total order; None where ties are random.
          log_ref_N: nats, log pi_ref of the pool's rows.
          members: those that are trained.
          at_once: how many of them side by side; None for one policy that is no population.
          iterations: of the training that is judged.
        """
        assert isinstance(job.method.learns, Offline) and job.method.learns.weights is not None
        m, first = rewards_PxM.shape[1], len(rewards_PxM) - job.held_out
        order = None if order_PxM is None else order_PxM[first:]
        self._shared, self._alone = shared, at_once is None
        self._every = max(1, iterations // LOOKS)
        self._last = iterations - 1
        rows, known = [], []
        for member in members:
            weights = job.method.learns.weights(rewards_PxM[first:], member, order)
            columns = resample(np.random.default_rng(member.seed), weights, LOOKED_AT)
            here = ((first + np.arange(job.held_out))[:, None] * m + columns).ravel()
            ratio = np.log(member.m * np.take_along_axis(weights, columns, axis=1).ravel())
            batch = job.training.offline.batch_size
            shape = (-(-len(here) // batch), batch)  # the last is filled with the first again
            rows.append(np.resize(here, shape))
            known.append(np.mean(np.resize(ratio + log_ref_N[here], shape)))
        of = partial(_judged, setup=job.offline_setup())
        if at_once is None:
            self._look: Callable[..., Any] = jax.jit(of, donate_argnums=1)
            self._rows, self._known = rows[0].astype(np.int32), np.array(known[0], np.float32)
            return
        # The population's own way of going through its members.
        self._look = population.over_members(of, jax.sharding.get_mesh(), at_once, donate=True)
        self._rows, self._known = np.array(rows, np.int32), np.array(known, np.float32)

    def __call__(self, state: Any, step: int) -> tuple[Any, dict[str, Any]]:
        """(the state with its best brought up to date, what to write) after ``step``."""
        if (step + 1) % self._every and step != self._last:
            return state, {}
        state, kl, looks = self._look(self._shared, state, self._rows, self._known)
        kl, looks = sharding.fetch((kl, looks))
        return state, {"kl_held_out": kl.tolist(), "ended": bool(np.all(looks >= PATIENCE))}


def words(found: dict[str, Any]) -> str:
    """Of the progress line, after a look."""
    if "kl_held_out" not in found:
        return ""
    return f"  held out {np.mean(found['kl_held_out']):.3f} nats from BoN"


def _judged(
    shared: Any, state: Any, rows: jax.Array, known: jax.Array, *, setup: offline.OfflineSetup
) -> tuple[Any, jax.Array, jax.Array]:
    """(state with its best, KL, looks since the best) of one policy."""
    pool, base = shared
    kl = known + offline.nll(state.params, pool, rows, base, setup=setup)
    state = policies.judged(state, kl, PATIENCE)
    return state, kl, state.params[policies.BEST]["looks"]
