"""Stage ``train``: the policy, by the chosen method."""

from vbon_jax import methods
from vbon_jax.config import as_dict
from vbon_jax.methods import learning
from vbon_jax.progress import log
from vbon_jax.stages import loading
from vbon_jax.stages.base import Run
from vbon_jax.training import loop
from vbon_jax.training.checkpoint import Checkpointer
from vbon_jax.training.metrics import MetricsWriter


def run(run: Run) -> None:
    """Trains from the newest checkpoint, if there is one."""
    s, workdir = run.config, run.workdir
    if s.method.name == methods.BEST_OF_N:
        log("train: best-of-n itself (method.name=bon) trains nothing")
        return
    task, samples = loading.task(run, s.method.estimator)
    job = loading.job(run, task.sampler.model.config, len(task.prompts))
    state, step = learning.single(job, task, loading.member(s), samples)
    total = job.iterations
    checkpointer = Checkpointer(workdir.checkpoints("train"), s.train.keep)
    try:
        restored = checkpointer.restore(state)
        start = checkpointer.latest_step or 0  # now that what is damaged is set aside
        if restored is not None:
            state = restored[0]
            log(f"train: going on after iteration {start} of {total}")
        writer = MetricsWriter(workdir.root, start, loading.wandb_arguments(run))
        try:
            schedule = loop.Schedule("train", total, s.train.checkpoint_every, run.profile)
            record = loop.Record(checkpointer, writer, {"config": as_dict(s)}, workdir.root)
            loop.run(state, start, step, schedule, record)
        finally:
            writer.close()
    finally:
        checkpointer.close()
