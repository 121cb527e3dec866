"""Which n of best-of-n the evaluator trusts: the table and the figure of ``choose.json``.

Both show best-of-n, soft best-of-n and best-of-Poisson, and the run's own policies where they were
evaluated with an evaluator.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vbon_jax.report.results import read_choose, read_evaluation
from vbon_jax.report.style import (
    BON_COLOR,
    REFERENCE_COLOR,
    Looks,
    dress,
    method_looks,
    method_name,
    new_figure,
    save,
)
from vbon_jax.report.table import Column, Table
from vbon_jax.report.tables import number, with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]


class Quantity(NamedTuple):
    """A figure of the evaluator: its key in rows, and what a panel says of it."""

    key: str
    title: str
    ylabel: str


QUANTITIES = (
    Quantity("evaluator_reward", "Evaluator's mean", "evaluator's reward, mean per response"),
    Quantity("evaluator_win_rate", "Win rate", "win rate over the reference (a tie is half)"),
)
POISSON_COLOR = "#44aa99"
SOFT_COLORS = ("#aa4499", "#332288")


def policies(workdir: Path, temperature: float) -> list[Row]:
    """Reads the rows of the run's own policies that an evaluator has scored.

    Args:
        workdir: The folder of the run.
        temperature: That of the rows.

    Returns:
        Rows of ``evaluation.json``; none where the run was not evaluated, or without an evaluator.

    Raises:
        InputError: The file is at fault.
    """
    if not (Path(workdir) / "evaluation.json").exists():
        return []
    return [
        row
        for row in read_evaluation(workdir)["rows"]
        if row["policy"] not in ("reference", "bon")
        and row["temperature"] == temperature
        and row.get("evaluator_reward") is not None
    ]


# --- Table --------------------------------------------------------------------------------------


def table(result: dict[str, Any], own: Sequence[Row], looks: Looks) -> Table:
    """Returns best-of-n at the powers of two and at the n that are spoken of, and what is beside.

    Of best-of-Poisson and of soft best-of-n the setting with the highest mean of the evaluator is
    shown. The recommended n stands out.

    Args:
        result: The content of ``choose.json``.
        own: Rows of the run's own policies, as `policies` returns them.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The table.
    """
    last = result["n_max"]
    named = (result["recommended"], result["peak"], result["over_optimised_from"], last)
    shown = sorted({2**i for i in range(int(last).bit_length())} | set(filter(None, named)))
    rows = [row for row in family(result, "bon") if row["n"] in shown]
    strong = [at for at, row in enumerate(rows) if row["n"] == result["recommended"]]
    rules = [len(rows)]
    for group in (family(result, "poisson"), *soft_lines(result)):
        rows += sorted(group, key=lambda row: row["evaluator_reward"])[-1:]
    cells = [_cells(row) for row in rows]
    if own:
        rules.append(len(cells))
    for row in own:
        cells.append(
            (
                method_name(row["policy"], looks),
                "",
                number(row["kl_ref"]),
                with_interval(row["evaluator_reward"], row["evaluator_reward_ci95"]),
                "",
                with_interval(row["evaluator_win_rate"], row["evaluator_win_rate_ci95"]),
            )
        )
    said = (
        f"{result['prompts']:,} held-out prompts with {last} samples each, T = "
        f"{result['temperature']:g}"
    )
    return Table(
        columns=(
            Column("policy", "left"),
            Column("n"),
            Column("KL(·‖ref),\nnats"),
            Column("evaluator"),
            Column("below the\npeak"),
            Column("evaluator\nwin rate"),
        ),
        rows=tuple(cells),
        title=f"Best-of-n by the evaluator: {said} (±: half the 95% band)",
        caption=f"{said}; after ± half the 95% band over prompts, which holds for all n and "
        "settings at once (of the run's own policies: the 95% interval of each); below the peak: "
        "how much lower the evaluator's mean is than at the n where it is highest; n of "
        "best-of-Poisson: its mean.",
        row_heads=2,
        rules=tuple(rules),
        strong=tuple(strong),
    )


def _cells(row: Row) -> tuple[str, ...]:
    mean, low, high = row["below_peak"]
    return (
        setting_name(row),
        number(row["n"], "g"),
        number(row["kl_ref"]),
        with_interval(row["evaluator_reward"], row["evaluator_reward_band"]),
        with_interval(mean, (low, high)) if high > low else "the peak",
        with_interval(row["evaluator_win_rate"], row["evaluator_win_rate_band"]),
    )


def setting_name(row: Row) -> str:
    """Returns what a row is of, such as "soft BoN, T = 0.5"."""
    if row["family"] == "soft":
        return f"soft BoN, T = {row['temperature']:.3g}"
    return "BoN" if row["family"] == "bon" else f"BoPoisson, rate {row['rate']:g}"


def family(result: dict[str, Any], name: str) -> list[Row]:
    """Returns the rows of a family, by what it goes along: n, rate, or falling temperature."""
    return [row for row in result["rows"] if row["family"] == name]


def soft_lines(result: dict[str, Any]) -> list[list[Row]]:
    """Returns the rows of soft best-of-n, a list for each n."""
    rows = family(result, "soft")
    return [[r for r in rows if r["n"] == n] for n in sorted({row["n"] for row in rows})]


# --- Figure -------------------------------------------------------------------------------------


def draw(result: dict[str, Any], own: Sequence[Row], looks: Looks) -> "Figure":
    """Draws the evaluator's mean and win rate against n, and against KL to the reference.

    The bands of best-of-n hold at all n at once. Grey is where it is over-optimised.

    Args:
        result: The content of ``choose.json``.
        own: Rows of the run's own policies, as `policies` returns them.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The figure, a row of panels for each quantity.
    """
    figure = new_figure(11, 8)
    panels = figure.subplots(2, 2, sharey="row")
    for (by_n, by_kl), quantity in zip(panels, QUANTITIES):
        for ax, x in ((by_n, "n"), (by_kl, "kl_ref")):
            _best_of_n(ax, result, quantity, x)
            _line(ax, family(result, "poisson"), quantity, x, POISSON_COLOR, "best-of-Poisson", "s")
        for rows, color in zip(soft_lines(result), SOFT_COLORS):
            label = f"soft BoN of {rows[0]['n']:g}, by temperature"
            _line(by_kl, rows, quantity, "kl_ref", color, label, "^")
        _policies(by_kl, own, quantity, looks)
        by_n.set_xscale("log", base=2)
        by_n.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        dress(by_n, f"{quantity.title} against n", "n (of best-of-Poisson: its mean)",
              quantity.ylabel)  # fmt: skip
        title = f"{quantity.title} against KL divergence"
        dress(by_kl, title, "KL(· ‖ reference), nats per response", quantity.ylabel)
        by_kl.tick_params(labelleft=True)
    handles: dict[str, Any] = {}
    for ax in panels.flatten():
        for handle, label in zip(*ax.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3,
                  fontsize=9, frameon=False)  # fmt: skip
    return figure


def _best_of_n(ax: "Axes", result: dict[str, Any], quantity: Quantity, x: str) -> None:
    rows = family(result, "bon")
    at = [row[x] for row in rows]
    low, high = np.array([row[f"{quantity.key}_band"] for row in rows]).T
    ax.fill_between(at, low, high, color=BON_COLOR, alpha=0.18, lw=0,
                    label="its 95% band, all n at once")  # fmt: skip
    means = [row[quantity.key] for row in rows]
    ax.plot(at, means, color=BON_COLOR, lw=1.8, marker=".", ms=5, label="BoN")
    if quantity.key == "evaluator_win_rate":
        ax.plot(at, [row["win_rate"] for row in rows], color=BON_COLOR, lw=1.2, ls="--",
                label="BoN, win rate by the reward itself")  # fmt: skip
        ax.axhline(0.5, color=REFERENCE_COLOR, lw=1, ls=":", label="no better than the reference")
    worse, last = result["over_optimised_from"], result["over_optimised_to"]
    if worse is not None:
        ax.axvspan(at[worse - 1], at[last - 1], color="#444444", alpha=0.12, lw=0,
                   label="over-optimised")  # fmt: skip
    for key, marker, size in (("peak", "*", 13), ("recommended", "o", 8)):
        row = rows[result[key] - 1]
        ax.plot([row[x]], [row[quantity.key]], marker, color=BON_COLOR, ms=size, mec="white",
                mew=0.9, zorder=5, label=f"BoN, {key} n = {result[key]}")  # fmt: skip


def _line(
    ax: "Axes", rows: Sequence[Row], quantity: Quantity, x: str, color: str, label: str, marker: str
) -> None:
    at, means = [row[x] for row in rows], [row[quantity.key] for row in rows]
    ax.plot(at, means, color=color, lw=1.2, marker=marker, ms=4, label=label)


def _policies(ax: "Axes", own: Sequence[Row], quantity: Quantity, looks: Looks) -> None:
    shown = method_looks([row["policy"] for row in own], looks)
    for row in own:
        look, mean = shown[row["policy"]], row[quantity.key]
        low, high = row[f"{quantity.key}_ci95"]
        ax.errorbar(row["kl_ref"], mean, yerr=[[mean - low], [high - mean]], fmt=look.marker,
                    color=look.color, ms=8, mec="white", mew=0.8, elinewidth=1.3, capsize=3,
                    zorder=6, label=f"{look.name} (its own 95% interval)")  # fmt: skip


def figure(workdir: Path, looks: Looks) -> Path:
    """Writes ``figures/choose.png`` from ``choose.json``, and ``evaluation.json`` if it is there.

    Args:
        workdir: The folder of the run.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The path of the figure.

    Raises:
        InputError: A file is missing or at fault.
    """
    result = read_choose(workdir)
    return save(draw(result, policies(workdir, result["temperature"]), looks), workdir, "choose")
