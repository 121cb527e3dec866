"""Stage ``choose``: which n of best-of-n the evaluator trusts."""

import numpy as np
from rich.console import Console

from vbon_jax import processes
from vbon_jax.errors import InputError
from vbon_jax.evaluation import choose as study
from vbon_jax.progress import log
from vbon_jax.stages import evaluate, loading
from vbon_jax.stages.base import Run
from vbon_jax.stages.report import looks


def run(run: Run) -> None:
    """Writes ``choose.json`` and its figure from the pool that ``evaluate`` reads best-of-n off.

    The pool and its opponents are drawn where they are not there yet. What was evaluated of the
    run's own policy is shown beside best-of-n.
    """
    from vbon_jax.report import choose

    s, root = run.config, run.workdir.root
    e = s.evaluator
    if not (e.train or e.path or e.function):
        raise InputError(
            "stage choose: no evaluator (evaluator.train=False, no path, no function): it judges "
            "the n that the reward prefers by another score; set evaluator.train=True and run "
            "`vbon evaluator`, or set evaluator.path or evaluator.function"
        )
    run.workdir.refuse_damage("evaluate")
    temperature = s.sampling.temperature
    held = evaluate.open_split(run, loading.models(run), "test", temperature, s.evaluate.m)
    opponents = held.yardstick
    assert held.pool.evaluator is not None and opponents.evaluator_PxM is not None
    samples = study.Pool(
        held.pool.rewards.astype(np.float32),
        held.pool.evaluator.astype(np.float32),
        np.asarray(opponents.references.rewards_PxM),
        opponents.evaluator_PxM,
        held.pool.order,
    )
    result = study.choose(samples, s.method.top, temperature, s.seed)
    run.workdir.write_json(root / "choose.json", result)
    if not processes.first():
        return  # what follows is made of the files
    Console().print(choose.table(result, choose.policies(root, temperature), looks()))
    log(f"choose: {result['why']}")
    log(f"choose: {choose.figure(root, looks())}")
