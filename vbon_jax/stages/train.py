"""Stage ``train``: the policy, by the chosen method."""

from collections.abc import Sequence
from typing import Any

from vbon_jax import methods
from vbon_jax.config import as_dict
from vbon_jax.methods import learning, starting
from vbon_jax.progress import log
from vbon_jax.stages import loading
from vbon_jax.stages.base import Run
from vbon_jax.training import loop
from vbon_jax.training.learner import Member
from vbon_jax.training.state import TrainState


def run(run: Run) -> None:
    """Trains from the newest checkpoint, if there is one; first what the policy starts from."""
    s, workdir = run.config, run.workdir
    if s.method.name == methods.BEST_OF_N:
        log("train: best-of-n itself (method.name=bon) trains nothing")
        return
    task, samples = loading.task(run, s.method.estimator)
    job = loading.job(run, task.sampler.model.config, len(task.prompts))
    last = loop.Place(
        workdir.checkpoints("train"), workdir.root, s.train.keep, {"config": as_dict(s)},
        loading.wandb_arguments(run),
    )  # fmt: skip
    first = loop.Place(workdir.checkpoints("start"), workdir.start, 1, {})

    def fit(of: learning.Job, members: Sequence[Member], own: Any) -> TrainState:
        (member,), is_last = members, of is job
        state, step = learning.single(of, task, member, samples)
        if own is not None:
            state = starting.begun(state, own)
        title, profile = ("train", run.profile) if is_last else ("start", None)
        return loop.resume(
            state,
            step,
            loop.Schedule(title, of.iterations, s.train.checkpoint_every, profile),
            last if is_last else first,
            lambda fresh: starting.valued(fresh, of, task, members, samples),
        )

    starting.trained(job, [loading.member(s)], fit)
