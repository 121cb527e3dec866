"""The figures of a run's evaluation, from the files its stages leave in the workdir.

Each figure is two functions: ``draw_*`` makes it from plain values, and the one named after the
file reads the workdir and writes ``figures/<name>.png``. A policy has one color everywhere:
reference gray, best-of-n vermilion, each method its own (see `style`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vbon_jax.bon import theory
from vbon_jax.data import jsonl
from vbon_jax.errors import InputError
from vbon_jax.report import labels
from vbon_jax.report.results import policies_in_order, read_evaluation, read_samples
from vbon_jax.report.style import (
    BON_COLOR,
    REFERENCE_COLOR,
    Look,
    Looks,
    dress,
    method_looks,
    new_figure,
    save,
)
from vbon_jax.report.training_figures import any_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "osD^vP*X"  # one shape a temperature
BINS = 40

# --- Rewards -----------------------------------------------------------------------------------


def draw_reward_histograms(samples: Sequence[dict[str, Any]], looks: Looks) -> "Figure":
    """Draws the density of the rewards of each policy, one panel for each temperature.

    The panels share their bins, and a vertical line marks each policy's mean.

    Args:
        samples: ``{"policy", "temperature", "reward", ...}``, as `read_samples` returns them.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The figure.
    """
    temperatures = sorted({sample["temperature"] for sample in samples})
    # Best-of-n last, so that its line is on top of the policy's it should coincide with.
    policies = policies_in_order(samples)
    shown = method_looks(policies, looks)
    rewards = np.array([sample["reward"] for sample in samples], dtype=float)
    edges = np.histogram_bin_edges(rewards, bins=BINS)

    columns = (
        len(temperatures) if len(temperatures) <= 3 else int(np.ceil(len(temperatures) ** 0.5))
    )
    lines = -(-len(temperatures) // columns)
    figure = new_figure(max(9.0, 5.0 * columns), 4.2 * lines + 0.3)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    head = 1.15 + 0.08 * len(policies)  # room for the legend above the highest density
    highest = 0.0
    for ax, temperature in zip(axes, temperatures):
        for name in policies:
            own = rewards[
                [s["policy"] == name and s["temperature"] == temperature for s in samples]
            ]
            if not own.size:
                continue
            density, _ = np.histogram(own, bins=edges, density=True)
            highest = max(highest, density.max())
            look = shown[name]
            label = f"{look.name}, mean {own.mean():.2f}"
            _steps(ax, density, edges, name, look.color, label)
            style = "--" if name == "bon" else ":"
            ax.axvline(own.mean(), 0, 1 / head, color=look.color, lw=1.3, ls=style)
        dress(ax, f"T = {temperature:g}", "reward of a response", "density")
        ax.tick_params(labelbottom=True, labelleft=True)
        ax.legend(fontsize=9, framealpha=0.85, edgecolor="none", loc="upper left")
    for ax in axes[len(temperatures) :]:
        ax.remove()
    axes[0].set_ylim(0, head * highest)
    figure.suptitle("Rewards on held-out prompts (vertical lines: means)", fontsize=12)
    return figure


def _steps(
    ax: "Axes", density: np.ndarray, edges: np.ndarray, policy: str, color: str, label: str
) -> None:
    if policy == "reference":
        ax.stairs(density, edges, color=color, fill=True, alpha=0.35, label=label)
    else:
        style = "--" if policy == "bon" else "-"
        ax.stairs(density, edges, color=color, lw=1.8, ls=style, label=label)


def reward_histograms(workdir: Path, looks: Looks) -> Path:
    """Writes ``figures/reward_histograms.png`` from ``evaluation_samples.jsonl``.

    Args:
        workdir: The folder of the run.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The path of the figure.

    Raises:
        InputError: The file is missing, or a line of it is at fault.
    """
    return save(draw_reward_histograms(read_samples(workdir), looks), workdir, "reward_histograms")


# --- Win rate against KL -----------------------------------------------------------------------


def draw_win_rate_vs_kl(rows: Sequence[dict[str, Any]], looks: Looks) -> "Figure":
    """Draws each policy's win rate over the reference against its KL from it.

    Each point has its 95% intervals. The curve is that of best-of-n in theory, at
    (log n - (n-1)/n, n/(n+1)) for n from 1 to four times the run's.

    Args:
        rows: The rows of ``evaluation.json``; each temperature has its own marker.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The figure.

    Raises:
        InputError: A row lacks a key, or has no finite KL or win rate.
    """
    rows = [_checked(row, number) for number, row in enumerate(rows)]
    temperatures = sorted({row["temperature"] for row in rows})
    shapes = {t: MARKERS[i % len(MARKERS)] for i, t in enumerate(temperatures)}
    shown = method_looks([row["policy"] for row in rows], looks)

    figure = new_figure(9, 6)
    ax = figure.subplots()
    largest = 4 * max(float(row["n"]) for row in rows)
    curve_n = np.geomspace(1.0, largest, 400)
    curve = _theory_points(curve_n)
    ax.plot(*curve.T, color=BON_COLOR, lw=1.4, alpha=0.7, label="BoN in theory (no ties)")
    ax.axhline(0.5, color=REFERENCE_COLOR, lw=1, ls=":", label="no better than the reference")
    ticks_n = 2.0 ** np.arange(int(np.log2(largest) + 1e-9) + 1)
    ticks = _theory_points(ticks_n)
    ax.plot(*ticks.T, "|", color=BON_COLOR, ms=9, mew=1.4)

    obstacles = [*curve, *((x, 0.5) for x in np.linspace(*ax.get_xlim(), 200))]
    for row in rows:
        x, y = row["kl_ref"], row["win_rate"]
        bars: dict[str, Any] = {
            "xerr": _bars(x, row["kl_ref_ci95"]),
            "yerr": _bars(y, row["win_rate_ci95"]),
        }
        ax.errorbar(x, y, **bars, fmt=shapes[row["temperature"]], color=shown[row["policy"]].color,
                    ms=8, mec="white", mew=0.8, elinewidth=1.3, capsize=3, zorder=4)  # fmt: skip
        obstacles += _cross(x, y, **bars)
    for name, temperature in dict.fromkeys((r["policy"], r["temperature"]) for r in rows):
        own = [r for r in rows if (r["policy"], r["temperature"]) == (name, temperature)]
        if len(own) > 1 and name != "bon":  # a family: one policy for every n
            own.sort(key=lambda row: row["n"])
            line = [[r["kl_ref"] for r in own], [r["win_rate"] for r in own]]
            ax.plot(*line, color=shown[name].color, lw=1.4, zorder=3)
    for temperature, shape in shapes.items():
        ax.plot([], [], shape, color="#333333", ms=7, label=f"T = {temperature:g}")
    dress(ax, "Win rate against KL divergence", "KL(· ‖ reference), nats per response",
           "win rate over the reference (a tie is half)")  # fmt: skip
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)

    texts = [([point], f"n={n:g}", BON_COLOR, 8.5) for point, n in zip(ticks, ticks_n)]
    labels.place(figure, ax, texts + _point_texts(rows, shown), np.array(obstacles))
    return figure


def _checked(row: dict[str, Any], number: int) -> dict[str, Any]:
    where = f"row {number} of evaluation.json"
    for key in ("policy", "n", "temperature", "kl_ref", "kl_ref_ci95", "win_rate", "win_rate_ci95"):
        jsonl.field(row, key, where)
    for key in ("kl_ref", "win_rate"):
        if row[key] is None or not np.isfinite(row[key]):
            raise InputError(f"{where}: {key} of {row['policy']!r} is {row[key]}, not finite; "
                             "run `vbon evaluate` again")  # fmt: skip
    return row


def _theory_points(n: np.ndarray) -> np.ndarray:
    """(KL bound, win rate) of best-of-n for each n, [len(n), 2]."""
    return np.stack([np.asarray(theory.kl_upper_bound(n)), np.asarray(theory.win_rate(n))], axis=1)


def _bars(centre: float, interval: Sequence[float] | None) -> list[list[float]] | None:
    """Lengths below and above the point, as matplotlib's errorbar wants them."""
    if interval is None:
        return None
    return [[max(0.0, centre - interval[0])], [max(0.0, interval[1] - centre)]]


def _cross(x: float, y: float, xerr: Any, yerr: Any) -> list[tuple[float, float]]:
    """Points along a marker's error bars."""
    steps = np.linspace(0, 1, 25)
    (left,), (right,) = xerr or [[0.0], [0.0]]
    (down,), (up,) = yerr or [[0.0], [0.0]]
    across = [(x - left + s * (left + right), y) for s in steps]
    return across + [(x, y - down + s * (down + up)) for s in steps]


def _point_texts(rows: Sequence[dict[str, Any]], shown: dict[str, Look]) -> list[labels.Text]:
    """One label for each policy (and n of best-of-n); markers tell its temperatures apart."""
    texts: dict[str, labels.Text] = {}
    for row in rows:
        look = shown[row["policy"]]
        name = f"{look.name} n={row['n']:g}" if row["policy"] == "bon" else look.name
        points = texts.setdefault(name, ([], name, look.color, 10.0))[0]
        points.append(np.array([row["kl_ref"], row["win_rate"]]))
    return list(texts.values())


def win_rate_vs_kl(workdir: Path, looks: Looks) -> Path:
    """Writes ``figures/win_rate_vs_kl.png`` from ``evaluation.json``.

    Args:
        workdir: The folder of the run.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The path of the figure.

    Raises:
        InputError: The file is missing or a row is at fault.
    """
    rows = read_evaluation(workdir)["rows"]
    return save(draw_win_rate_vs_kl(rows, looks), workdir, "win_rate_vs_kl")


# --- A family of policies ----------------------------------------------------------------------


def family_rows(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of the policies that were measured at several n, by policy, n ascending.

    Args:
        rows: The rows of ``evaluation.json``.

    Returns:
        Best-of-n's and a family's, of the first temperature; empty where no family was measured.
    """
    first = [row for row in rows if row["temperature"] == rows[0]["temperature"]]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(first, key=lambda row: float(row["n"])):
        found.setdefault(row["policy"], []).append(row)
    several = {name: own for name, own in found.items() if len(own) > 1}
    return several if set(several) - {"bon"} else {}


def draw_family(curves: dict[str, list[dict[str, Any]]], looks: Looks) -> "Figure":
    """Draws win rate and reward against KL from the reference, a curve over n for each policy.

    Args:
        curves: Of `family_rows`.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The figure.
    """
    shown = method_looks(list(curves), looks)
    figure = new_figure(12, 5.2)
    for ax, key, what in zip(
        figure.subplots(1, 2), ("win_rate", "reward"),
        ("win rate over the reference (a tie is half)", "mean reward"), strict=True,
    ):  # fmt: skip
        for name, rows in curves.items():
            x, y = ([row[k] for row in rows] for k in ("kl_ref", key))
            bars = [_bars(row[key], row[f"{key}_ci95"]) for row in rows]
            yerr = np.array([b or [[0.0], [0.0]] for b in bars])[:, :, 0].T
            style = "--" if name == "bon" else "-"
            ax.errorbar(x, y, yerr=yerr, fmt="o" + style, color=shown[name].color, ms=6, lw=1.5,
                        mec="white", mew=0.8, capsize=3, label=shown[name].name)  # fmt: skip
            for row in rows:
                below = name != "bon"
                ax.annotate(f"{row['n']:g}", (row["kl_ref"], row[key]), fontsize=9,
                            xytext=(5, -11) if below else (-5, 6), textcoords="offset points",
                            ha="left" if below else "right", color=shown[name].color)  # fmt: skip
        dress(ax, "", "KL(· ‖ reference), nats per response", what)
        ax.legend(fontsize=9, frameon=False, loc="lower right")
    figure.suptitle("One policy for every n, and best-of-n (numbers: n)", fontsize=12)
    return figure


def family(workdir: Path, looks: Looks) -> Path | None:
    """Writes ``figures/family.png`` from ``evaluation.json``.

    Args:
        workdir: The folder of the run.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The path of the figure; None where no family of policies was measured.

    Raises:
        InputError: The file is missing.
    """
    curves = family_rows(read_evaluation(workdir)["rows"])
    return save(draw_family(curves, looks), workdir, "family") if curves else None


def all_figures(workdir: Path, looks: Looks, trained: bool = True) -> list[Path]:
    """Writes every figure of a run.

    Args:
        workdir: The folder of the run.
        looks: The looks of the fine-tuned methods, by label.
        trained: Whether the run trained a policy; without one there are no training curves.

    Returns:
        The paths of the figures.

    Raises:
        InputError: A file that a figure needs is missing or at fault.
    """
    curves = [any_curves(workdir)] if trained else []
    more = [path for path in (family(workdir, looks),) if path is not None]
    return [*curves, reward_histograms(workdir, looks), win_rate_vs_kl(workdir, looks), *more]
