"""Stage ``evaluator``: a second reward model, which only measures."""

from vbon_jax.progress import log
from vbon_jax.stages import fitting, loading
from vbon_jax.stages.base import Run

EVALUATOR_SEED = 500_000_000  # added to the run's seed: no other split draws from it


def run(run: Run) -> None:
    """Trains the reward that only measures, apart from the first, or checks the user's own.

    Of the embedded reviews it reads texts of a seed of its own. A user's labelled texts serve both.
    """
    e = run.config.evaluator
    if e.function or e.path:
        loading.evaluator(run, loading.tokenizer(run))
    elif e.train:
        seed = run.config.seed + EVALUATOR_SEED
        fitting.classifier(run, "evaluator", e, run.workdir.evaluator, seed)
    else:
        log("evaluator: none (evaluator.train=False, no path, no function)")
