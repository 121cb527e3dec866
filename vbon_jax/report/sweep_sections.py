"""The sections of the page that show a sweep, and the study of how many samples log F needs.

Each returns a section, or what is missing for it.
"""

from vbon_jax.report import front_figures, sweep_figures, sweep_tables
from vbon_jax.report.findings import findings as sweep_findings
from vbon_jax.report.findings import run_sentence, share_rows
from vbon_jax.report.page import (
    Block,
    Figure,
    Figures,
    Folded,
    Heading,
    Items,
    Missing,
    Paragraph,
    Section,
    Tables,
)
from vbon_jax.report.results import Results, chosen
from vbon_jax.report.run_sections import EVALUATE, evaluation_tables
from vbon_jax.report.style import method_name
from vbon_jax.report.tables import convergence_table


def findings(results: Results) -> Section | None:
    """Returns the headline sentences.

    Args:
        results: What the workdir holds.

    Returns:
        The section; None where there is nothing to say.
    """
    texts = sweep_findings(results.sweep, results.n, results.looks)
    if results.evaluation is not None:
        texts += run_sentence(results.evaluation["rows"], results.looks)
    if results.convergence is not None:
        enough = results.convergence["recommended"]
        words = f"m = {enough} samples per prompt" if enough else "none of the m tried is enough"
        texts.append(f"Estimating log F: {words}. {results.convergence['why']}")
    return Section("findings", "Findings", (Items(tuple(texts)),)) if texts else None


def results(results: Results) -> tuple[Section | Missing, ...]:
    """Returns the tables of the sweep and of the run's own policy.

    Args:
        results: What the workdir holds, with a sweep.

    Returns:
        The section, and what is missing in it.
    """
    blocks: list[Block] = []
    missing = []
    if results.evaluation is not None:
        rows = results.evaluation["rows"]
        own = evaluation_tables(rows, results.looks, "Held-out prompts")
        blocks += [Heading("This run's own policy"), own]
    else:
        missing.append(EVALUATE)
    blocks.append(Heading("Every method of the sweep"))
    if results.n is not None:
        near = sweep_tables.matched_table(results.sweep, results.n, results.looks)
        blocks.append(Tables((near,)))
    every = sweep_tables.sweep_table(results.sweep, results.looks)
    blocks.append(Folded(f"All {len(results.sweep)} rows of the sweep", Tables((every,))))
    return Section("results", "Results", tuple(blocks)), *missing


def front(results: Results, which: str, title: str) -> Section | Missing:
    """Returns win rate and reward against KL: Figures 2, 6 and 7 of the paper.

    Args:
        results: What the workdir holds, with a sweep.
        which: The figure, as in `vbon_jax.report.front_figures.front_rows`.
        title: The title of the section.

    Returns:
        The section, or which policies the sweep lacks.
    """
    looks = results.looks
    rows = front_figures.front_rows(results.sweep, which, looks)
    wanted = {"bound": "lower_bound", "sft": "bon_sft"}.get(which)
    if not rows or (wanted and not chosen(rows, method=wanted)):
        what = method_name(wanted, looks) if wanted else "fine-tuned policies"
        return Missing(f"{what} in the sweep's study “front”", "sweep")
    held = share_rows(rows, front_figures.bon_rows(results.sweep), looks)
    pictures = []
    for letter, quantity in zip("ab", front_figures.QUANTITIES):
        shares = ", ".join(
            f"{method_name(e['method'], looks)} {e[f'share_{quantity.key}']:.0%}" for e in held
        )
        pictures.append(
            Figure(
                front_figures.front_figure(results.workdir, which, quantity, looks),
                f"Scatter plot of {quantity.name} against KL to the reference for {len(rows)} "
                f"fine-tuned policies, with the curve of best-of-n. Shares of the front: {shares}.",
                f"({letter}) One point per policy; faint points are off the Pareto front of the "
                "fine-tuned methods shown; thin bars are 95% intervals over prompts. BoN needs n "
                "samples per response and is not counted.",
            )
        )
    shown = sweep_tables.shares_table(held, looks)
    return Section(which, title, (Figures(tuple(pictures)), Tables((shown,))))


def convergence(results: Results) -> Section | Missing:
    """Returns the study of how many reference samples log F needs.

    Args:
        results: What the workdir holds.

    Returns:
        The section, or that the study was not run.
    """
    found = results.convergence
    if found is None:
        return Missing("convergence", "convergence")
    if found["recommended"]:
        advice = f"Recommended: m = {found['recommended']} samples per prompt. {found['why']}"
    else:
        advice = f"None of the m tried is enough. {found['why']}"
    blocks: list[Block] = [Paragraph(advice)]
    if found["examples"]:
        prompts = "; ".join(f"{e['kind']}: “{e['prompt']}”" for e in found["examples"])
        figure = Figure(
            sweep_figures.log_f_curves(results.workdir),
            "Estimates of log F against the reward, one panel per prompt and one line per m.",
            f"log F against the reward, for prompts with low, middle and high rewards ({prompts}).",
        )
        blocks.append(Figures((figure,), wide=True))
    blocks.append(Tables((convergence_table(found),)))
    title = "How many samples log F needs (Figure 3, Table 1)"
    return Section("convergence", title, tuple(blocks))


def sample_size(results: Results) -> Section | Missing:
    """Returns quality against the number of reference samples: Figure 4 of the paper.

    Args:
        results: What the workdir holds, with a sweep.

    Returns:
        The section, or that the sweep lacks the study.
    """
    rows = sweep_figures.sample_size_rows(results.sweep)
    if not rows:
        return Missing("the sweep's study “m”", "sweep")
    sizes = sorted({row["m"] for row in rows})
    pictures = tuple(
        Figure(
            sweep_figures.sample_size(results.workdir, quantity, results.looks),
            f"{quantity.name} against m from {sizes[0]:g} to {sizes[-1]:g}, mean and standard "
            "deviation over seeds.",
            f"{quantity.name.capitalize()}: mean and standard deviation over seeds (small points) "
            "against the reference samples per prompt that log F is estimated from.",
        )
        for quantity in front_figures.QUANTITIES
    )
    table = sweep_tables.sample_size_table(rows, results.looks)
    title = "Quality against m and preprocessing time (Figure 4)"
    return Section("samples", title, (Figures(pictures), Tables((table,))))


def temperature(results: Results) -> Section | Missing:
    """Returns quality against the sampling temperature: Figure 5 of the paper.

    Args:
        results: What the workdir holds, with a sweep.

    Returns:
        The section, or that the sweep lacks the study or an evaluator reward.
    """
    rows = sweep_figures.temperature_rows(results.sweep)
    if not rows:
        return Missing("the sweep's study “temperature”", "sweep")
    quantities = [
        quantity
        for quantity in sweep_figures.EVALUATOR_QUANTITIES
        if any(row[quantity.key] is not None for row in rows)
    ]
    if not quantities:
        return Missing(
            "scores by a separate evaluator reward, which the config must name, in the sweep's "
            "study “temperature”",
            "sweep",
        )
    splits = {row["split"] for row in rows}
    pictures = tuple(
        Figure(
            sweep_figures.temperature(results.workdir, quantity, results.looks),
            f"{quantity.name} against sampling temperature, a line for each method; solid in "
            "distribution, dashed out of distribution.",
            f"{quantity.name[0].upper()}{quantity.name[1:]}: mean and standard deviation over "
            "seeds, by a reward model that no method was trained on. Solid lines and filled "
            "markers: prompts like those trained on"
            + ("; dashed and open: out of distribution." if "ood" in splits else "."),
        )
        for quantity in quantities
    )
    title = "Quality against temperature (Figure 5)"
    return Section("temperature", title, (Figures(pictures),))


def bon_kl(results: Results) -> Section | Missing:
    """Returns KL(bon || ref) estimated in three ways.

    Args:
        results: What the workdir holds, with a sweep.

    Returns:
        The section, or that the sweep lacks best-of-n.
    """
    rows = front_figures.bon_rows(results.sweep)
    if not rows:
        return Missing("best-of-n in the sweep's study “front”", "sweep")
    table = sweep_tables.bon_kl_table(rows)
    return Section("bon-kl", "KL of best-of-n from the reference, three ways", (Tables((table,)),))
