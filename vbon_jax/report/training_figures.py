"""Training curves: the columns of ``metrics.jsonl`` against the training step."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vbon_jax.bon import theory
from vbon_jax.errors import InputError
from vbon_jax.report.results import read_evaluation, read_metrics, run_n
from vbon_jax.report.style import (
    BON_COLOR,
    FIRST_COLOR,
    SECOND_COLOR,
    dress,
    new_figure,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASE_COLORS = {"rollout": "#56b4e9", "reward": "#f0e442", "update": "#cc79a7"}
PPO_COLUMNS = {"objective", "policy_clip_fraction", "explained_variance"}  # of metrics.jsonl


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the centred moving average of a series, over its finite values.

    At the ends the window holds fewer values, so the last one is not pulled to anything unseen.

    Args:
        values: The series, a float array [steps].
        window: The width of the window, in steps; odd.

    Returns:
        The mean over the finite values within ``window // 2`` of each step, [steps]; NaN where
        there is none.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


# --- PPO ----------------------------------------------------------------------------------------


class _Panels:
    """The grid of training curves, which hands out panels and draws columns of the metrics."""

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
        color: str = FIRST_COLOR,
        style: str = "-",
        floor: float = -np.inf,
    ) -> None:
        """Draws each step faint and the moving average over it; values below floor count as it."""
        values = np.maximum(self.column(name), floor)
        mark = "o" if len(values) <= 30 else ""  # a lone step has no line
        if self.window > 1:
            ax.plot(self.step, values, color=color, alpha=0.25, linewidth=0.8)
        smooth = running_mean(values, self.window)
        ax.plot(self.step, smooth, style, marker=mark, ms=3, color=color, lw=1.8, label=label)
        if not np.isfinite(values).any():
            ax.text(0.5, 0.5, "no finite value", transform=ax.transAxes, ha="center", fontsize=9)

    def legend(self, ax: "Axes", *others: "Axes") -> None:
        handles = [h for a in (ax, *others) for h in a.get_legend_handles_labels()[0]]
        ax.legend(handles=handles, fontsize=8.5, frameon=True, framealpha=0.85, edgecolor="none")


def draw_training_curves(metrics: dict[str, np.ndarray], n: float) -> "Figure":
    """Draws nine panels of a training run with PPO against its step.

    Args:
        metrics: Columns [steps] of ``metrics.jsonl``; KLs in nats per response, entropy in nats
            per token.
        n: The n of best-of-n, for the bound log n - (n-1)/n on KL(bon || ref).

    Returns:
        The figure.

    Raises:
        InputError: A column is missing.
    """
    panels = _Panels(metrics)
    ax = panels.panel("Objective", "sum of token rewards, mean per response")
    panels.line(ax, "objective", "objective")

    ax = panels.panel("KL divergence from the reference", "nats per response")
    panels.line(ax, "kl_ref", "KL(policy ‖ ref)")
    bound = float(theory.kl_upper_bound(n))
    ax.axhline(bound, color=BON_COLOR, ls="--", lw=1.4, label=f"BoN bound, n = {n:g}: {bound:.2f}")
    panels.legend(ax)

    ax = panels.panel("Estimated KL divergence from BoN", "nats per response")
    panels.line(ax, "kl_bon", "KL(policy ‖ BoN)")
    ax.axhline(0.0, color=BON_COLOR, ls="--", lw=1.4, label="BoN itself: 0")
    panels.legend(ax)

    panels.line(panels.panel("Reward", "reward, mean per response"), "reward", "reward")
    _length_panel(panels)
    panels.line(panels.panel("Entropy", "nats per token"), "entropy", "entropy")

    ax = panels.panel("Clipped by PPO", "fraction of tokens")
    panels.line(ax, "policy_clip_fraction", "policy ratio")
    panels.line(ax, "value_clip_fraction", "value", SECOND_COLOR, "--")
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
    ax = panels.panel("Response length and EOS rate", "tokens per response")
    panels.line(ax, "response_length", "length (left)")
    right = ax.twinx()
    panels.line(right, "eos_rate", "EOS rate (right)", SECOND_COLOR, "--")
    right.set_ylabel("fraction of responses with EOS", fontsize=9.5, color=SECOND_COLOR)
    right.tick_params(labelsize=9, labelcolor=SECOND_COLOR)
    right.spines["top"].set_visible(False)
    right.set_ylim(-0.03, 1.03)
    panels.legend(ax, right)


def _seconds_panel(panels: _Panels) -> None:
    ax = panels.panel("Time a step", "seconds")
    seconds = np.stack([np.nan_to_num(panels.column(f"seconds_{p}")) for p in PHASE_COLORS])
    total = seconds.sum(axis=0)
    shares = seconds.sum(axis=1) / max(total.sum(), 1e-9)
    edges = np.append(panels.step - 0.5, panels.step[-1] + 0.5)
    tops = np.cumsum(seconds, axis=0)
    for (phase, color), row, top, share in zip(PHASE_COLORS.items(), seconds, tops, shares):
        label = f"{phase} ({share:.0%})"
        ax.stairs(top, edges, baseline=top - row, fill=True, color=color, lw=0, label=label)
    highest = 3 * float(np.median(total))
    if 0 < highest < total.max():  # steps that compile would flatten the rest
        ax.set_ylim(0, highest)
        _off_scale(ax, 0.6, f"longest: {total.max():.3g} s, off scale")
    panels.legend(ax)


def training_curves(workdir: Path, n: float | None = None) -> Path:
    """Writes ``figures/training_curves.png`` of a run with PPO from ``metrics.jsonl``.

    Args:
        workdir: The folder of the run.
        n: The n of best-of-n; None takes it from ``evaluation.json``.

    Returns:
        The path of the figure.

    Raises:
        InputError: A file or a column is missing.
    """
    metrics = read_metrics(workdir)
    if n is None:
        n = run_n(read_evaluation(workdir)["rows"])
    return save(draw_training_curves(metrics, n), workdir, "training_curves")


# --- Methods without PPO ------------------------------------------------------------------------


def draw_columns(metrics: dict[str, np.ndarray]) -> "Figure":
    """Draws a panel for each column of ``metrics.jsonl`` against the step.

    This is for methods trained without PPO, whose columns differ from one method to the next.

    Args:
        metrics: Columns [steps], one of them named "step".

    Returns:
        The figure.

    Raises:
        InputError: There is no "step", or no other column with a finite value.
    """
    names = [name for name, values in metrics.items() if name != "step" and
             np.isfinite(values).any()]  # fmt: skip
    if "step" not in metrics or not names:
        raise InputError("metrics.jsonl needs 'step' and another number a line; run `vbon train`")
    lines = -(-len(names) // 3)
    figure = new_figure(13.5, 3.2 * lines)
    axes = figure.subplots(lines, 3, squeeze=False).flatten()
    for ax, name in zip(axes, names):
        ax.plot(metrics["step"], metrics[name], color=FIRST_COLOR, lw=1.3)
        dress(ax, name, "training step", "")
    for ax in axes[len(names) :]:
        ax.remove()
    return figure


def metric_columns(workdir: Path) -> Path:
    """Writes ``figures/training_curves.png`` from whatever columns ``metrics.jsonl`` has.

    Args:
        workdir: The folder of the run.

    Returns:
        The path of the figure.

    Raises:
        InputError: The file is missing or has no column to draw.
    """
    return save(draw_columns(read_metrics(workdir)), workdir, "training_curves")


def any_curves(workdir: Path, n: float | None = None) -> Path:
    """Writes ``figures/training_curves.png`` in the form that fits the columns.

    Args:
        workdir: The folder of the run.
        n: The n of best-of-n; None takes it from ``evaluation.json``, for PPO only.

    Returns:
        The path of the figure.

    Raises:
        InputError: ``metrics.jsonl`` is missing or has no column to draw.
    """
    if read_metrics(workdir).keys() >= PPO_COLUMNS:
        return training_curves(workdir, n)
    return metric_columns(workdir)
