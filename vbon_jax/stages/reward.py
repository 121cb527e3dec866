"""Stages ``reward`` and ``evaluator``: the models that score responses."""

from vbon_jax.progress import log
from vbon_jax.stages import fitting, loading
from vbon_jax.stages.base import Run, Stage

EVALUATOR_SEED = 500_000_000  # added to the run's seed: no other split draws from it


def run(run: Run) -> None:
    """Trains the reward model on the labels, or checks the user's own."""
    r = run.config.reward
    if r.function or r.path:
        loading.reward(run, loading.tokenizer(run))
    else:
        fitting.classifier(run, "reward", r, run.workdir.reward, run.config.seed)


def run_evaluator(run: Run) -> None:
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


STAGE = Stage(
    name="reward",
    help="reward model",
    run=run,
    depends=("reward.path", "reward.function", "reward.model", "reward.fit"),
    after=("sft",),
    leaves=("reward", "checkpoints/reward"),
)
EVALUATOR = Stage(
    name="evaluator",
    help="a second reward model, which only measures",
    run=run_evaluator,
    depends=(
        "evaluator.train", "evaluator.path", "evaluator.function", "evaluator.model",
        "evaluator.fit",
    ),
    after=("sft",),
    leaves=("evaluator", "checkpoints/evaluator"),
)  # fmt: skip
