"""Stage ``sample``: prompts, and m scored reference responses to each training prompt."""

from vbon_jax.data import prompts as prompt_files
from vbon_jax.data import samples as sample_files
from vbon_jax.progress import log
from vbon_jax.sampling import samples
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
    samples.write(
        workdir.train_samples, reference, run.key("sample"), prompts["train"], s.samples.m,
        s.sampling.batch_size, (score, None), "sample",
    )  # fmt: skip
