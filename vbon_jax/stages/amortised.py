"""The head of the rewards' distributions: fitted, calibrated and kept beside the samples."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from vbon_jax import processes
from vbon_jax.bon.amortised import Prior
from vbon_jax.data.prompts import Prompt
from vbon_jax.data.samples import PromptSamples
from vbon_jax.errors import writing
from vbon_jax.evaluation import calibration
from vbon_jax.evaluation.calibration import Calibration
from vbon_jax.evaluation.heldout import Models
from vbon_jax.progress import log
from vbon_jax.stages.base import Run
from vbon_jax.training import amortised
from vbon_jax.training.amortised import Features, Heads

Read = Callable[[], tuple[Sequence[Prompt], Sequence[PromptSamples]]]


def of_training(
    run: Run, models: Models, prompts: Sequence[Prompt], stored: Sequence[PromptSamples]
) -> Prior:
    """What the head says of the training prompts, of each without having seen its samples.

    Raises:
      InputError: the head is not calibrated, or there are too few prompts for one.
    """
    known = _features(run, models, prompts)
    heads = _heads(run, models, lambda: (prompts, stored))
    return heads.prior(known, _folds(run, prompts, stored))


def of_new(run: Run, models: Models, prompts: Sequence[Prompt], read: Read) -> Prior:
    """What the head says of other prompts; ``read``: the training prompts and their samples.

    Raises:
      InputError: as `of_training`.
    """
    return _heads(run, models, read).prior(_features(run, models, prompts))


def _features(run: Run, models: Models, prompts: Sequence[Prompt]) -> Features:
    """What the head reads; a callable may have no score of an empty response and is not asked."""
    r = run.config.reward
    own = None if any(x.function for x in (r, *r.others.values())) else models.reward
    return amortised.features(models.reference, prompts, run.config.sampling.batch_size, own)


def _folds(run: Run, prompts: Sequence[Prompt], stored: Sequence[PromptSamples]) -> np.ndarray:
    return amortised.folds(prompts, [x.rewards for x in stored], run.config.seed)


def _heads(run: Run, models: Models, read: Read) -> Heads:
    """The run's heads: those in the workdir, or fitted and put there; refused if not calibrated."""
    path = run.workdir.reward_head
    told = path.with_suffix(".json")
    if not processes.by_first(lambda: path.exists() and told.exists()):
        prompts, stored = read()
        found, figures = _fitted(run, models, prompts, stored)
        processes.by_first(partial(_save, found, path))  # the same in every process
        run.workdir.write_json(told, figures.as_json() | {"concentration": found.concentration})
        processes.wait()
        log(figures.line(found.concentration))
    figures = json.loads(told.read_text())
    Calibration.of_json(figures).refuse()
    return Heads.load(path)


def _fitted(
    run: Run, models: Models, prompts: Sequence[Prompt], stored: Sequence[PromptSamples]
) -> tuple[Heads, Calibration]:
    """Heads of the first samples.m samples of each prompt, and how good they are where held out."""
    m, seed = run.config.samples.m, run.config.seed
    known = _features(run, models, prompts)
    rewards = [np.asarray(x.rewards[:m], np.float32) for x in stored]
    fold_P = _folds(run, prompts, stored)
    heads = amortised.fit(known, rewards, fold_P, seed)
    return heads, calibration.of_prior(heads.prior(known, fold_P), rewards, seed)


def _save(heads: Heads, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        heads.save(temporary)
        temporary.replace(path)
