"""Stage ``convergence``: how many reference samples this task needs (Fig. 3, Table 1)."""

from rich.console import Console

from vbon_jax import processes
from vbon_jax.data import samples as sample_files
from vbon_jax.errors import InputError
from vbon_jax.evaluation import convergence as study
from vbon_jax.progress import log
from vbon_jax.sampling import samples
from vbon_jax.stages import loading
from vbon_jax.stages.base import Run


def run(run: Run) -> None:
    """Draws many samples of held-out prompts and writes ``convergence.json``."""
    from vbon_jax.report import tables

    s = run.config
    c = s.convergence
    reference = loading.reference(run)
    reward = loading.reward(run, reference.tokenizer)
    prompts = loading.prompts(run, "test")[: c.prompts]
    if len(prompts) < c.prompts:
        raise InputError(
            f"convergence.prompts={c.prompts} is more than the {len(prompts)} held-out prompts: "
            "lower it or raise prompts.test"
        )
    path = run.workdir.held_out("convergence", "test", s.sampling.temperature, c.m_full)
    samples.write(
        path, reference, run.key("convergence"), prompts, range(c.m_full), s.sampling.batch_size,
        (reward, None), "convergence",
    )  # fmt: skip
    found = sample_files.samples_of(path, prompts, c.m_full)
    result = study.convergence(
        [p.text for p in prompts], sample_files.rewards(found, c.m_full), c.m, c.level,
        s.sampling.temperature,
    )  # fmt: skip
    run.workdir.write_json(run.workdir.root / "convergence.json", result)
    Console(quiet=not processes.first()).print(tables.convergence_table(result))
    log(f"convergence: {result['why']}")
