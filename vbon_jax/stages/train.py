"""Stage ``train``: the policy, by the chosen method."""

from vbon_jax import methods
from vbon_jax.config import as_dict
from vbon_jax.methods import learning, starting
from vbon_jax.progress import log
from vbon_jax.stages import loading
from vbon_jax.stages.base import Run
from vbon_jax.training import loop


def run(run: Run) -> None:
    """Trains from the newest checkpoint, if there is one; first what the policy starts from."""
    s, workdir = run.config, run.workdir
    if s.method.name == methods.BEST_OF_N:
        log("train: best-of-n itself (method.name=bon) trains nothing")
        return
    task, samples = loading.task(run, s.method.estimator)
    job, member = loading.job(run, task.sampler.model.config, len(task.prompts)), loading.member(s)
    begin, every = starting.job(job), s.train.checkpoint_every
    policy = None
    if begin is not None:
        found = loop.resume(
            *learning.single(begin, task, starting.member(member), samples),
            loop.Schedule("start", begin.iterations, every),
            loop.Place(workdir.checkpoints("start"), workdir.start, 1, {}),
        )
        policy = starting.policy(found)
        del found
    state, step = learning.single(job, task, member, samples)
    if policy is not None:
        state = starting.begun(state, policy)
    loop.resume(
        state,
        step,
        loop.Schedule("train", job.iterations, every, run.profile),
        loop.Place(
            workdir.checkpoints("train"), workdir.root, s.train.keep, {"config": as_dict(s)},
            loading.wandb_arguments(run),
        ),
        lambda fresh: starting.valued(fresh, job, task, [member], samples),
    )  # fmt: skip
