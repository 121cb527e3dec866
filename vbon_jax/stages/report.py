"""Stage ``report``: everything the workdir holds, on one page."""

from vbon_jax import methods, processes
from vbon_jax.methods.base import Series
from vbon_jax.progress import log
from vbon_jax.stages import units
from vbon_jax.stages.base import Run


def looks() -> dict[str, Series]:
    """How each method appears in figures and tables, by the label of its rows."""
    return {label: series for label, (_, series) in methods.SERIES.items()}


def run(run: Run) -> None:
    """Writes ``report.html``, which needs no other file.

    Of a sweep that is not complete, the table is made first of the units that are done.
    """
    from vbon_jax.report import document

    for stage in ("evaluate", "convergence", "choose"):  # whichever were done
        run.workdir.refuse_damage(stage)
    processes.by_first(lambda: _merge(run))
    if processes.first():
        log(f"report: {document.write(run.workdir.root, looks())}")


def _merge(run: Run) -> None:
    """The table of a sweep that is not complete, from its units that are done."""
    if run.workdir.unfinished("sweep"):
        every = units.of(run.config)
        done = sum(units.done(run, unit) for unit in every)
        log(f"report: {done} of {len(every)} units of the sweep are done")
        if done:
            units.write_table(run)
