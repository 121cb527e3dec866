"""The figures of a run, from the files its stages leave in the workdir.

Each figure is two functions: ``draw_*`` makes it from plain values, and the one named after the
file reads the workdir and writes ``figures/<name>.png``. A role has one colour everywhere:
reference grey, best-of-n vermilion, each method its own (see `style`).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vbon_jax.bon import theory
from vbon_jax.data import jsonl
from vbon_jax.errors import InputError
from vbon_jax.report import labels
from vbon_jax.report.results import display_name, read_evaluation, read_metrics, read_samples, run_n
from vbon_jax.report.style import (
    BON_COLOUR,
    REFERENCE_COLOUR,
    dress,
    method_looks,
    new_figure,
    save,
)
from vbon_jax.report.sweep_figures import metric_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIRST_COLOUR = "#0072b2"  # of the lines of a training panel
SECOND_COLOUR = "#009e73"  # the other line of a training panel
PHASE_COLOURS = {"rollout": "#56b4e9", "reward": "#f0e442", "update": "#cc79a7"}
MARKERS = "osD^vP*X"  # one shape a temperature
BINS = 40
PPO_COLUMNS = {"objective", "policy_clip_fraction", "explained_variance"}  # of metrics.jsonl


def role_colours(policies: Iterable[str]) -> dict[str, str]:
    """The colour of each policy name, as `style` has it for every figure."""
    looks = method_looks({"reference", "bon", *policies})
    return {name: look.colour for name, look in looks.items()}


# --- Shared pieces -----------------------------------------------------------------------------


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the finite values within window // 2 of each; NaN where there is none.

    At the ends the window holds fewer values, so the last one is not pulled to anything unseen.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


# --- Training curves ---------------------------------------------------------------------------


class _Panels:
    """The grid of training curves: hands out panels, and draws columns of the metrics on them."""

    def __init__(self, metrics: dict[str, np.ndarray]):
        from matplotlib.ticker import MaxNLocator

        self._metrics = metrics
        self.step = self.column("step")
        self.window = max(1, len(self.step) // 20) | 1  # odd, about a twentieth of the run
        self.figure = new_figure(13.5, 10)
        self._axes = iter(self.figure.subplots(3, 3, sharex=True).flat)
        self._locator = lambda: MaxNLocator(6, integer=True, min_n_ticks=1)

    def column(self, name: str) -> np.ndarray:
        if name not in self._metrics:
            raise InputError(f"metrics.jsonl has no {name!r} in any line; run `vbon train` again")
        return self._metrics[name]

    def panel(self, title: str, ylabel: str) -> "Axes":
        ax = next(self._axes)
        dress(ax, title, "training step", ylabel)
        ax.xaxis.set_major_locator(self._locator())
        ax.tick_params(labelbottom=True)
        return ax

    def line(
        self,
        ax: "Axes",
        name: str,
        label: str,
        colour: str = FIRST_COLOUR,
        style: str = "-",
        floor: float = -np.inf,
    ) -> None:
        """Each step faint, and the running mean over it; values under the floor are drawn on it."""
        values = np.maximum(self.column(name), floor)
        mark = "o" if len(values) <= 30 else ""  # a lone step has no line
        if self.window > 1:
            ax.plot(self.step, values, color=colour, alpha=0.25, linewidth=0.8)
        smooth = running_mean(values, self.window)
        ax.plot(self.step, smooth, style, marker=mark, ms=3, color=colour, lw=1.8, label=label)
        if not np.isfinite(values).any():
            ax.text(0.5, 0.5, "no finite value", transform=ax.transAxes, ha="center", fontsize=9)

    def legend(self, ax: "Axes", *others: "Axes") -> None:
        handles = [h for a in (ax, *others) for h in a.get_legend_handles_labels()[0]]
        ax.legend(handles=handles, fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none")


def draw_training_curves(metrics: dict[str, np.ndarray], n: float) -> "Figure":
    """Nine panels of a training run, against its step.

    Args:
      metrics: columns [steps] of ``metrics.jsonl``; KLs in nats a response, entropy a token.
      n: the N of best-of-n, for the bound log n - (n-1)/n on KL(bon || ref).

    Raises InputError: a column is missing.
    """
    panels = _Panels(metrics)
    ax = panels.panel("Objective", "sum of token rewards, mean a response")
    panels.line(ax, "objective", "objective")

    ax = panels.panel("KL divergence from the reference", "nats a response")
    panels.line(ax, "kl_ref", "KL(policy ‖ ref)")
    bound = float(theory.kl_upper_bound(n))
    ax.axhline(bound, color=BON_COLOUR, ls="--", lw=1.4, label=f"BoN bound, n = {n:g}: {bound:.2f}")
    panels.legend(ax)

    ax = panels.panel("Estimated KL divergence from BoN", "nats a response")
    panels.line(ax, "kl_bon", "KL(policy ‖ BoN)")
    ax.axhline(0.0, color=BON_COLOUR, ls="--", lw=1.4, label="BoN itself: 0")
    panels.legend(ax)

    panels.line(panels.panel("Reward", "reward, mean a response"), "reward", "reward")
    _length_panel(panels)
    panels.line(panels.panel("Entropy", "nats a token"), "entropy", "entropy")

    ax = panels.panel("Clipped by PPO", "fraction of tokens")
    panels.line(ax, "policy_clip_fraction", "policy ratio")
    panels.line(ax, "value_clip_fraction", "value", SECOND_COLOUR, "--")
    ax.set_ylim(bottom=0.0)
    panels.legend(ax)

    ax = panels.panel("Explained variance of the value", "fraction of the returns' variance")
    panels.line(ax, "explained_variance", "explained variance", floor=-1.0)
    lowest = float(np.nanmin(panels.column("explained_variance"), initial=0.0))
    if lowest < -1:  # one bad first step would flatten the rest
        ax.set_ylim(-1.05, 1.05)
        _off_scale(ax, 0.06, f"below -1 drawn as -1; lowest {lowest:.3g}")

    _seconds_panel(panels)
    first, last = panels.step[[0, -1]]
    edge = max(0.5, 0.03 * (last - first))
    ax.set_xlim(first - edge, last + edge)  # the panels share it
    width = panels.window
    how = f"faint: each step; strong: mean of {width} steps" if width > 1 else "each step"
    panels.figure.suptitle(f"Training curves ({how})", fontsize=13)
    return panels.figure


def _off_scale(ax: "Axes", y: float, text: str) -> None:
    ax.text(0.98, y, text, transform=ax.transAxes, ha="right", va="center", fontsize=8.5)


def _length_panel(panels: _Panels) -> None:
    ax = panels.panel("Response length and EOS rate", "tokens a response")
    panels.line(ax, "response_length", "length (left)")
    right = ax.twinx()
    panels.line(right, "eos_rate", "EOS rate (right)", SECOND_COLOUR, "--")
    right.set_ylabel("fraction of responses with EOS", fontsize=9.5, color=SECOND_COLOUR)
    right.tick_params(labelsize=9, labelcolor=SECOND_COLOUR)
    right.spines["top"].set_visible(False)
    right.set_ylim(-0.03, 1.03)
    panels.legend(ax, right)


def _seconds_panel(panels: _Panels) -> None:
    ax = panels.panel("Time a step", "seconds")
    seconds = np.stack([np.nan_to_num(panels.column(f"seconds_{p}")) for p in PHASE_COLOURS])
    total = seconds.sum(axis=0)
    shares = seconds.sum(axis=1) / max(total.sum(), 1e-9)
    edges = np.append(panels.step - 0.5, panels.step[-1] + 0.5)
    tops = np.cumsum(seconds, axis=0)
    for (phase, colour), row, top, share in zip(PHASE_COLOURS.items(), seconds, tops, shares):
        label = f"{phase} ({share:.0%})"
        ax.stairs(top, edges, baseline=top - row, fill=True, color=colour, lw=0, label=label)
    highest = 3 * float(np.median(total))
    if 0 < highest < total.max():  # steps that compile would flatten the rest
        ax.set_ylim(0, highest)
        _off_scale(ax, 0.6, f"longest: {total.max():.3g} s, off scale")
    panels.legend(ax)


def training_curves(workdir: Path, n: float | None = None) -> Path:
    """Writes ``figures/training_curves.png`` from ``metrics.jsonl``.

    Args:
      n: the N of best-of-n; None takes it from ``evaluation.json``.

    Raises InputError: a file or a column is missing.
    """
    metrics = read_metrics(workdir)
    if n is None:
        n = run_n(read_evaluation(workdir)["rows"])
    return save(draw_training_curves(metrics, n), workdir, "training_curves")


# --- Rewards -----------------------------------------------------------------------------------


def draw_reward_histograms(samples: Sequence[dict[str, Any]]) -> "Figure":
    """One panel a temperature: the density of the rewards of each policy, in bins all panels share,
    with its mean as a vertical line.

    Args:
      samples: ``{"policy", "temperature", "reward", ...}``, as `read_samples` gives them.
    """
    temperatures = sorted({sample["temperature"] for sample in samples})
    policies = list(dict.fromkeys(sample["policy"] for sample in samples))
    # Best-of-n last, so that its line is on top of the policy's it should coincide with.
    policies.sort(key=lambda name: {"reference": 0, "bon": 2}.get(name, 1))
    colours = role_colours(policies)
    rewards = np.array([sample["reward"] for sample in samples], dtype=float)
    edges = np.histogram_bin_edges(rewards, bins=BINS)

    columns = (
        len(temperatures) if len(temperatures) <= 3 else int(np.ceil(len(temperatures) ** 0.5))
    )
    lines = -(-len(temperatures) // columns)
    figure = new_figure(max(6.0, 5.0 * columns), 4.2 * lines + 0.3)
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
            label = f"{display_name(name)}, mean {own.mean():.2f}"
            _steps(ax, density, edges, name, colours[name], label)
            style = "--" if name == "bon" else ":"
            ax.axvline(own.mean(), 0, 1 / head, color=colours[name], lw=1.3, ls=style)
        dress(ax, f"T = {temperature:g}", "reward of a response", "density")
        ax.tick_params(labelbottom=True, labelleft=True)
        ax.legend(fontsize=9, framealpha=0.85, edgecolor="none", loc="upper left")
    for ax in axes[len(temperatures) :]:
        ax.remove()
    axes[0].set_ylim(0, head * highest)
    figure.suptitle("Rewards on held-out prompts (vertical lines: means)", fontsize=12)
    return figure


def _steps(
    ax: "Axes", density: np.ndarray, edges: np.ndarray, policy: str, colour: str, label: str
) -> None:
    if policy == "reference":
        ax.stairs(density, edges, color=colour, fill=True, alpha=0.35, label=label)
    else:
        style = "--" if policy == "bon" else "-"
        ax.stairs(density, edges, color=colour, lw=1.8, ls=style, label=label)


def reward_histograms(workdir: Path) -> Path:
    """Writes ``figures/reward_histograms.png`` from ``evaluation_samples.jsonl``.

    Raises InputError: the file is missing, or a line of it is at fault.
    """
    return save(draw_reward_histograms(read_samples(workdir)), workdir, "reward_histograms")


# --- Win rate against KL -----------------------------------------------------------------------


def draw_win_rate_vs_kl(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Each row as a point (KL to the reference, win rate over it) with its 95% intervals, over
    the curve (log n - (n-1)/n, n/(n+1)) of best-of-n for n from 1 to four times the run's.

    Args:
      rows: the rows of ``evaluation.json``; a marker shape is a temperature.

    Raises InputError: a row lacks a key.
    """
    rows = [_checked(row, number) for number, row in enumerate(rows)]
    temperatures = sorted({row["temperature"] for row in rows})
    shapes = {t: MARKERS[i % len(MARKERS)] for i, t in enumerate(temperatures)}
    colours = role_colours(row["policy"] for row in rows)

    figure = new_figure(9, 6)
    ax = figure.subplots()
    largest = 4 * max(float(row["n"]) for row in rows)
    curve_n = np.geomspace(1.0, largest, 400)
    curve = _theory_points(curve_n)
    ax.plot(*curve.T, color=BON_COLOUR, lw=1.4, alpha=0.7, label="BoN in theory (no ties)")
    ax.axhline(0.5, color=REFERENCE_COLOUR, lw=1, ls=":", label="no better than the reference")
    ticks_n = 2.0 ** np.arange(int(np.log2(largest) + 1e-9) + 1)
    ticks = _theory_points(ticks_n)
    ax.plot(*ticks.T, "|", color=BON_COLOUR, ms=9, mew=1.4)

    obstacles = [*curve, *((x, 0.5) for x in np.linspace(*ax.get_xlim(), 200))]
    for row in rows:
        x, y = row["kl_ref"], row["win_rate"]
        bars: dict[str, Any] = {
            "xerr": _bars(x, row["kl_ref_ci95"]),
            "yerr": _bars(y, row["win_rate_ci95"]),
        }
        ax.errorbar(x, y, **bars, fmt=shapes[row["temperature"]], color=colours[row["policy"]],
                    ms=8, mec="white", mew=0.8, elinewidth=1.3, capsize=3, zorder=4)  # fmt: skip
        obstacles += _cross(x, y, **bars)
    for temperature, shape in shapes.items():
        ax.plot([], [], shape, color="#333333", ms=7, label=f"T = {temperature:g}")
    dress(ax, "Win rate against KL divergence", "KL(· ‖ reference), nats a response",
           "win rate over the reference (a tie is half)")  # fmt: skip
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)

    texts = [([point], f"n={n:g}", BON_COLOUR, 8.5) for point, n in zip(ticks, ticks_n)]
    labels.place(figure, ax, texts + _point_texts(rows, colours), np.array(obstacles))
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
    """(KL bound, win rate) of best-of-n, [len(n), 2]."""
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


def _point_texts(rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> list[labels.Text]:
    """One label a policy (and n of best-of-n), whose shapes tell its temperatures apart."""
    texts: dict[str, labels.Text] = {}
    for row in rows:
        name = f"BoN n={row['n']:g}" if row["policy"] == "bon" else row["policy"]
        points = texts.setdefault(name, ([], name, colours[row["policy"]], 10.0))[0]
        points.append(np.array([row["kl_ref"], row["win_rate"]]))
    return list(texts.values())


def win_rate_vs_kl(workdir: Path) -> Path:
    """Writes ``figures/win_rate_vs_kl.png`` from ``evaluation.json``.

    Raises InputError: the file is missing or a row lacks a key.
    """
    return save(draw_win_rate_vs_kl(read_evaluation(workdir)["rows"]), workdir, "win_rate_vs_kl")


def all_figures(workdir: Path, trained: bool = True) -> list[Path]:
    """Writes every figure of a run; see each for what it needs and raises.

    Methods trained without PPO have columns of their own, drawn as they are; best-of-n itself
    (not ``trained``) has no curves."""
    curves = []
    if trained:
        by_ppo = read_metrics(workdir).keys() >= PPO_COLUMNS
        curves = [training_curves(workdir) if by_ppo else metric_columns(workdir)]
    return [*curves, reward_histograms(workdir), win_rate_vs_kl(workdir)]
