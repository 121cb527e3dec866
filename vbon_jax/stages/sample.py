"""Stage ``sample``: prompts, and m scored reference responses to each training prompt."""

from functools import partial

import numpy as np

from vbon_jax.bon.adaptive import half_width
from vbon_jax.config import Config
from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import samples as sample_files
from vbon_jax.progress import log
from vbon_jax.sampling import adaptive, samples
from vbon_jax.stages import adoption, loading, sources
from vbon_jax.stages.base import Run


def run(run: Run) -> None:
    """Makes the prompts of each split, then draws and scores the samples, or copies the user's."""
    s, workdir = run.config, run.workdir
    reference = loading.reference(run)
    score = loading.reward(run, reference.tokenizer)
    adopted, found = None, None
    if s.samples.path:
        adopted, found = adoption.adopt(
            run, sample_files.read(s.samples.path, scored=False), reference
        )
    prompts = sources.make_prompts(run, reference.tokenizer, adopted)
    for split, chosen in prompts.items():
        loading.check_lengths(run, chosen, reference, score)
        workdir.prompts(split).parent.mkdir(parents=True, exist_ok=True)
        prompt_files.write_jsonl(workdir.prompts(split), chosen)
    if found is not None:
        batch_size = s.sampling.batch_size
        found = adoption.scored(prompts["train"], found, reference, score, batch_size)
        adoption.check_scores(s.samples.path, prompts["train"], found, reference, score)
        adoption.write(workdir.train_samples, found)
        log(f"sample: {len(found)} prompts with their samples from {s.samples.path}")
        return
    asked = prompts["train"][: s.samples.prompts or None]
    where = workdir.train_samples, reference, run.key("sample"), asked
    if s.samples.adaptive:
        rule = adaptive.Rule(s.samples.m, partial(_enough, s))
        drawn, wide = adaptive.write(*where, rule, s.sampling.batch_size, score)
        whole = len(asked) * s.samples.m
        log(
            f"sample: {drawn} of {whole} responses were drawn, {1 - drawn / whole:.0%} saved; "
            f"{wide} of {len(asked)} prompts are not within samples.adaptive="
            f"{s.samples.adaptive:g} nats with all samples.m={s.samples.m}"
        )
        return
    samples.write(*where, range(s.samples.m), s.sampling.batch_size, (score, None), "sample")


def _enough(s: Config, rewards_PxM: np.ndarray) -> np.ndarray:
    """Whether so many rewards of each prompt tell best-of-n well enough."""
    return half_width(rewards_PxM, s.samples.adaptive_n) <= s.samples.adaptive
