"""Win rate and reward against KL over a sweep: Figures 2, 6 and 7 of the paper.

Each point is one fine-tuned policy. The front is taken among the fine-tuned methods of the figure;
best-of-n, which needs no training and n times the samples, is drawn as a curve beside them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vbon_jax.bon import theory
from vbon_jax.errors import InputError
from vbon_jax.evaluation import pareto
from vbon_jax.report import labels
from vbon_jax.report.results import chosen, over_seeds, read_sweep
from vbon_jax.report.style import (
    BON_COLOR,
    REFERENCE_COLOR,
    Looks,
    dress,
    method_looks,
    new_figure,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FADED = 0.25  # opacity of a point off the front
BON_LABELS = 12  # values of n written on the curve of best-of-n, at most


class Quantity(NamedTuple):
    """What is on the vertical axis.

    Attributes:
        key: Its column in ``sweep.jsonl``.
        name: Its name in a sentence.
        label: The label of the axis.
    """

    key: str
    name: str
    label: str


WIN_RATE = Quantity("win_rate", "win rate", "win rate over the reference (a tie is half)")
REWARD = Quantity("reward", "reward", "reward, mean per response")
QUANTITIES = (WIN_RATE, REWARD)


def front_rows(sweep: Sequence[dict[str, Any]], which: str, looks: Looks) -> list[dict[str, Any]]:
    """Selects the fine-tuned policies of a figure: study "front", split "test".

    Args:
        sweep: The rows of ``sweep.jsonl``.
        which: "front" (Figure 2: every method whose look says ``in_front``, without the lower
            bound), "bound" (Figure 6: vBoN's exact objective and its lower bound), or "sft"
            (Figure 7: Figure 2 with BoN-SFT).
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The rows of the figure.
    """
    rows = chosen(sweep, study="front", split="test")
    if which == "bound":
        wanted = {"vbon", "lower_bound"}
    else:
        known = method_looks([row["method"] for row in rows], looks)
        wanted = {method for method, look in known.items() if look.in_front} - {"lower_bound"}
        wanted |= {"bon_sft"} if which == "sft" else set()
    return [row for row in rows if row["method"] in wanted]


def bon_rows(sweep: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Selects best-of-n itself: study "front", split "test".

    Args:
        sweep: The rows of ``sweep.jsonl``.

    Returns:
        The rows of best-of-n in order of n.
    """
    rows = chosen(sweep, study="front", split="test", method="bon")
    return sorted(rows, key=lambda row: row["n"])


def on_front(rows: Sequence[dict[str, Any]], quantity: Quantity) -> np.ndarray:
    """Finds the Pareto front of a quantity against the KL to the reference.

    Args:
        rows: N policies.
        quantity: What should be large at a small KL.

    Returns:
        Whether each row is on the front, a bool array [N].
    """
    return pareto.front([row["kl_ref"] for row in rows], [row[quantity.key] for row in rows])


def draw_front(
    rows: Sequence[dict[str, Any]],
    bon: Sequence[dict[str, Any]],
    reference: float | None,
    quantity: Quantity,
    looks: Looks,
) -> "Figure":
    """Draws a quantity against KL(policy || ref) in nats, one point per fine-tuned policy.

    Points off the front are faint, thin bars are 95% intervals, and the legend gives each method's
    share of the front. Best-of-n is a curve through its measured points, labelled with n, and a
    dashed one at the bound log n - (n-1)/n on its KL (for the win rate, at n/(n+1)).

    Args:
        rows: Policies of the sweep, at least one.
        bon: Rows of best-of-n in order of n; may be empty.
        reference: The reference's own value, a dotted line; None leaves it out.
        quantity: What is drawn.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The figure.

    Raises:
        InputError: There is no policy to draw.
    """
    if not rows:
        raise InputError("no fine-tuned policy in sweep.jsonl to draw; run `vbon sweep`")
    front = on_front(rows, quantity)
    methods = [row["method"] for row in rows]
    shown = method_looks(methods, looks)
    shares = pareto.shares(methods, front)

    figure = new_figure(5.8, 5.2)
    ax = figure.subplots()
    if reference is not None:
        ax.axhline(reference, color=REFERENCE_COLOR, lw=1, ls=":", label="reference")
    curve = _bon_curve(ax, bon, quantity)
    for method, look in shown.items():
        for solid in (False, True):
            own = [r for r, f in zip(rows, front) if r["method"] == method and f == solid]
            _points(ax, own, quantity, look.color, look.marker, 1.0 if solid else FADED)
        at = np.array(methods) == method
        label = f"{look.name}: {shares[method]:.0%} of the front ({front[at].sum()}/{sum(at)})"
        ax.plot([], [], look.marker, color=look.color, ms=7, mec="white", mew=0.6, label=label)
    _kl_axis(ax, rows, front, bon)
    dress(ax, f"{quantity.name.capitalize()} against KL divergence", ax.get_xlabel(),
          quantity.label)  # fmt: skip
    figure.legend(loc="outside lower left", ncols=2, fontsize=8.3, frameon=False,
                  handlelength=1.6, columnspacing=1.2)  # fmt: skip

    points = np.stack(_columns(rows, "kl_ref", quantity.key), axis=1)
    labels.place(figure, ax, _n_labels(bon, quantity), np.concatenate([curve, points]))
    return figure


def _bon_curve(ax: "Axes", bon: Sequence[dict[str, Any]], quantity: Quantity) -> np.ndarray:
    """Draws best-of-n and its bound; returns points along both curves, [k, 2]."""
    if not bon:
        return np.zeros((0, 2))
    x, y = _columns(bon, "kl_ref", quantity.key)
    ax.plot(x, y, ".-", color=BON_COLOR, lw=1.4, ms=6, zorder=3,
            label="BoN, KL by Beirami et al.'s estimate")  # fmt: skip
    if quantity is WIN_RATE:
        n = np.geomspace(1.0, max(row["n"] for row in bon), 200)
        bound_x, bound_y = np.asarray(theory.kl_upper_bound(n)), np.asarray(theory.win_rate(n))
        label = "BoN in theory: log n - (n-1)/n, n/(n+1)"
    else:
        bound_x, bound_y = _columns(bon, "kl_bound", quantity.key)
        label = "BoN at the bound log n - (n-1)/n on its KL"
    ax.plot(bound_x, bound_y, "--", color=BON_COLOR, lw=1.1, alpha=0.7, zorder=2, label=label)
    steps = np.linspace(0, len(bound_x) - 1, 300)
    at = np.arange(len(bound_x))
    along = np.stack([np.interp(steps, at, bound_x), np.interp(steps, at, bound_y)], axis=1)
    return np.concatenate([np.stack([x, y], axis=1), along])


def _columns(rows: Sequence[dict[str, Any]], *keys: str) -> list[np.ndarray]:
    return [np.array([row[key] for row in rows], dtype=float) for key in keys]


def _points(
    ax: "Axes",
    rows: Sequence[dict[str, Any]],
    quantity: Quantity,
    color: str,
    marker: str,
    opacity: float,
) -> None:
    if not rows:
        return
    x, y = _columns(rows, "kl_ref", quantity.key)
    for values, key, bars in ((x, "kl_ref", "xerr"), (y, quantity.key, "yerr")):
        low, high = np.array([row[f"{key}_ci95"] or [v, v] for row, v in zip(rows, values)]).T
        lengths: dict[str, Any] = {bars: np.maximum([values - low, high - values], 0)}
        ax.errorbar(x, y, **lengths, fmt="none", ecolor=color, elinewidth=0.7,
                    alpha=0.45 * opacity, zorder=3)  # fmt: skip
    ax.plot(x, y, marker, color=color, ms=7, mec="white", mew=0.6, alpha=opacity,
            zorder=5 if opacity == 1 else 4)  # fmt: skip


def _kl_axis(
    ax: "Axes", rows: Sequence[dict[str, Any]], front: np.ndarray, bon: Sequence[dict[str, Any]]
) -> None:
    """Ends the KL axis beyond the front and best-of-n's curve, and counts what lies further out.

    A square-root axis is used where the front itself reaches far beyond best-of-n.
    """
    (kl,) = _columns(rows, "kl_ref")
    usual = max((row["kl_ref"] for row in bon or rows), default=0.0)
    end = 1.15 * max(usual, float(kl[front].max()))
    label = "KL(policy ‖ reference), nats per response"
    root = end > 3.5 * usual > 0
    if root:
        ax.set_xscale("function", functions=(_signed_root, _signed_square))
        label += " (square-root axis)"
    ax.set_xlabel(label)
    beyond = kl[kl > end]
    if beyond.size:
        ax.set_xlim(-(0.04**2 if root else 0.04) * end, end)
        text = f"{beyond.size} off the front beyond the right edge, up to {beyond.max():.3g} nats"
        ax.text(0.98, 0.02, text, transform=ax.transAxes, ha="right", fontsize=7.5)


def _signed_root(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)


def _n_labels(bon: Sequence[dict[str, Any]], quantity: Quantity) -> list[labels.Text]:
    """The values of n to write: evenly spread over the curve, its end included."""
    every = max(1, -(-len(bon) // BON_LABELS))
    return [
        ([np.array([row["kl_ref"], row[quantity.key]])], f"n={row['n']:g}", BON_COLOR, 8.5)
        for row in bon[::-1][::every]
    ]


def front_figure(workdir: Path, which: str, quantity: Quantity, looks: Looks) -> Path:
    """Writes ``figures/<which>_<quantity>.png`` from ``sweep.jsonl``.

    Args:
        workdir: The folder of the run.
        which: The figure, as in `front_rows`.
        quantity: What is drawn.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The path of the figure.

    Raises:
        InputError: The file is missing, a row is at fault, or no policy of the figure is there.
    """
    sweep = read_sweep(workdir)
    reference = over_seeds(
        chosen(sweep, study="front", split="test", method="reference"), quantity.key
    )
    rows = front_rows(sweep, which, looks)
    figure = draw_front(rows, bon_rows(sweep), reference and reference.mean, quantity, looks)
    return save(figure, workdir, f"{which}_{quantity.key}")
