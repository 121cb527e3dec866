"""Stage ``report``: everything the workdir holds, on one page."""

from vbon_jax import methods, processes
from vbon_jax.methods.base import Series
from vbon_jax.progress import log
from vbon_jax.stages.base import Run


def looks() -> dict[str, Series]:
    """How each method appears in figures and tables, by the label of its rows."""
    return {label: series for label, (_, series) in methods.SERIES.items()}


def run(run: Run) -> None:
    """Writes ``report.html``, which needs no other file."""
    from vbon_jax.report import document

    for stage in ("evaluate", "convergence"):  # whichever were done
        run.workdir.refuse_damage(stage)
    if processes.first():
        log(f"report: {document.write(run.workdir.root, looks())}")
