"""Stage ``reward``: the reward model."""

from vbon_jax.stages import fitting, loading
from vbon_jax.stages.base import Run


def run(run: Run) -> None:
    """Trains the reward model on the labels, or checks the user's own."""
    r = run.config.reward
    if r.function or r.path:
        loading.reward(run, loading.tokenizer(run))
    else:
        fitting.classifier(run, "reward", r, run.workdir.reward, run.config.seed)
