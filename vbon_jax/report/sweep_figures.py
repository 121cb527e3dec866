"""What samples and temperature do: Figures 3, 4 and 5 of the paper, and columns of the metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vbon_jax.errors import InputError
from vbon_jax.report.front_figures import Quantity
from vbon_jax.report.results import chosen, over_seeds, read_convergence, read_metrics, read_sweep
from vbon_jax.report.style import BON_COLOUR, LOOKS, dress, method_looks, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVALUATOR_WIN_RATE = Quantity(
    "evaluator_win_rate", "win rate by the evaluator", "win rate over the reference (a tie is half)"
)
EVALUATOR_REWARD = Quantity(
    "evaluator_reward", "reward by the evaluator", "evaluator's reward, mean a response"
)
EVALUATOR_QUANTITIES = (EVALUATOR_WIN_RATE, EVALUATOR_REWARD)
SPLITS = {"test": ("-", "in distribution"), "ood": ("--", "out of distribution")}


# --- Figure 3: log F against the reward ---------------------------------------------------------


def draw_log_f(examples: Sequence[dict[str, Any]]) -> "Figure":
    """One panel a prompt: the estimate of log F against the reward, a line for each m.

    Args:
      examples: ``{"prompt", "kind", "curves": [{"m", "rewards", "log_f"}, ...]}``, as in
        ``convergence.json``; log_f in nats, null where it is -inf.

    Raises InputError: there is no example.
    """
    from matplotlib import colormaps

    if not examples:
        raise InputError("convergence.json has no example to draw; run `vbon convergence` again")
    sizes = sorted({curve["m"] for example in examples for curve in example["curves"]})
    # Few samples light, many dark; the palest end of the map is left out.
    shades = colormaps["viridis_r"](np.linspace(0.12, 1.0, len(sizes)))
    colours = dict(zip(sizes, shades))
    figure = new_figure(4.2 * len(examples) + 0.4, 4.4)
    axes = figure.subplots(1, len(examples), sharey=True, squeeze=False)[0]
    for ax, example in zip(axes, examples):
        for curve in sorted(example["curves"], key=lambda c: c["m"]):
            rewards = np.array(curve["rewards"], dtype=float)
            log_f = np.array(curve["log_f"], dtype=float)  # null becomes NaN, a gap in the line
            order = np.argsort(rewards)
            size = curve["m"]
            ax.plot(rewards[order], log_f[order], color=colours[size], lw=1.6, label=f"m = {size}")
        dress(ax, "", "reward", "log F, nats" if ax is axes[0] else "")
        # A prompt is text: its "$" must not start a formula.
        title = f"{example['kind']}-reward prompt\n“{_shortened(example['prompt'], 44)}”"
        ax.set_title(title, fontsize=10, loc="left", parse_math=False)
        ax.tick_params(labelleft=True)
    handles = {h.get_label(): h for ax in axes for h in ax.get_legend_handles_labels()[0]}
    wanted = [f"m = {size}" for size in sizes]
    figure.legend(handles=[handles[label] for label in wanted], loc="outside lower center",
                  ncols=min(len(sizes), 9), fontsize=9, frameon=False)  # fmt: skip
    return figure


def _shortened(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def log_f_curves(workdir: Path) -> Path:
    """Writes ``figures/log_f_curves.png`` from ``convergence.json``.

    Raises InputError: the file is missing or at fault, or has no example.
    """
    return save(draw_log_f(read_convergence(workdir)["examples"]), workdir, "log_f_curves")


# --- Figure 4: quality against the number of samples --------------------------------------------


def sample_size_rows(sweep: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of Figure 4: study "m", split "test"."""
    return chosen(sweep, study="m", split="test")


def draw_sample_size(
    rows: Sequence[dict[str, Any]], bon: float | None, quantity: Quantity
) -> "Figure":
    """The quantity against m, the reference samples a prompt: mean and standard deviation over
    seeds, each seed as a small point; the minutes that drawing and scoring them took stand under
    each m.

    Args:
      rows: policies trained with several m and seeds at one n.
      bon: what best-of-n itself reaches at that n, a dashed line; None leaves it out.

    Raises InputError: there is no row.
    """
    if not rows:
        raise InputError('sweep.jsonl has no row of study "m"; run `vbon sweep` with that study')
    methods = method_looks({row["method"] for row in rows})
    figure = new_figure(5.8, 4.4)
    ax = figure.subplots()
    if bon is not None:
        label = f"BoN, n = {_only(rows, 'n')}"
        ax.axhline(bon, color=BON_COLOUR, ls="--", lw=1.3, label=label)
    sizes = sorted({row["m"] for row in rows})
    for method, look in methods.items():
        own = [row for row in rows if row["method"] == method]
        x = np.array([row["m"] for row in own])
        y = np.array([row[quantity.key] for row in own])
        ax.plot(x, y, look.marker, color=look.colour, ms=4, alpha=0.35, mew=0)
        spreads = {m: over_seeds(chosen(own, m=m), quantity.key) for m in sizes}
        found = [(m, s.mean, s.sd) for m, s in spreads.items() if s is not None]
        mean_x, mean_y, sd = np.array(found, dtype=float).T
        ax.errorbar(mean_x, mean_y, yerr=np.nan_to_num(sd), fmt=f"{look.marker}-", lw=1.7, ms=6,
                    color=look.colour, capsize=3, elinewidth=1.2, label=look.name)  # fmt: skip
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xticks(sizes, [f"{m:g}\n{_minutes(chosen(rows, m=m))}" for m in sizes])
    xlabel = "m, reference samples a prompt (below: time to draw and score them)"
    dress(ax, f"{quantity.name.capitalize()} against m", xlabel, quantity.label)
    ax.legend(fontsize=9, frameon=False, loc="best")
    return figure


def _only(rows: Sequence[dict[str, Any]], key: str) -> str:
    return ", ".join(f"{value:g}" for value in sorted({row[key] for row in rows}))


def _minutes(rows: Sequence[dict[str, Any]]) -> str:
    spread = over_seeds(rows, "sample_seconds")
    if spread is None:
        return ""
    minutes = spread.mean / 60
    if minutes < 0.1:
        return f"{spread.mean:.2g} s"
    return f"{minutes:.2f} min" if minutes < 10 else f"{minutes:.0f} min"


def sample_size(workdir: Path, quantity: Quantity) -> Path:
    """Writes ``figures/m_<quantity>.png`` from the study "m" of ``sweep.jsonl``.

    Raises InputError: the file is missing or at fault, or has no row of that study.
    """
    sweep = read_sweep(workdir)
    rows = sample_size_rows(sweep)
    same_n = [
        row
        for row in chosen(sweep, study="front", split="test", method="bon")
        if row["n"] in {r["n"] for r in rows}
    ]
    bon = over_seeds(same_n, quantity.key)
    return save(draw_sample_size(rows, bon and bon.mean, quantity), workdir, f"m_{quantity.key}")


# --- Figure 5: quality against the temperature --------------------------------------------------


def temperature_rows(sweep: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of Figure 5: study "temperature", both splits, and the rows of study "front" of the
    same settings at temperatures that were measured there only."""

    def setting(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in ("method", "n", "beta", "m"))

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return (*setting(row), row["seed"], row["temperature"], row["split"])

    rows = chosen(sweep, study="temperature")
    settings, places = {setting(row) for row in rows}, {place(row) for row in rows}
    return rows + [
        row
        for row in chosen(sweep, study="front")
        if setting(row) in settings and place(row) not in places
    ]


def draw_temperature(rows: Sequence[dict[str, Any]], quantity: Quantity) -> "Figure":
    """The quantity against the sampling temperature, mean and standard deviation over seeds:
    solid on prompts of the training distribution, dashed on the others.

    Args:
      rows: see `temperature_rows`; rows without the quantity (null) are left out.

    Raises InputError: no row has the quantity.
    """
    rows = [row for row in rows if row[quantity.key] is not None]
    if not rows:
        raise InputError(
            f'no row of study "temperature" in sweep.jsonl has {quantity.key}; run `vbon sweep` '
            "with that study and an evaluator reward"
        )
    figure = new_figure(5.8, 4.9)
    ax = figure.subplots()
    methods = method_looks({row["method"] for row in rows})
    temperatures = sorted({row["temperature"] for row in rows})
    step = min(np.diff(temperatures), default=1.0)
    for at, (method, look) in enumerate(methods.items()):
        # Shifted a little, so that the bars of methods that do equally well stay apart.
        shift = 0.25 * step * (at / max(len(methods) - 1, 1) - 0.5)
        for split, (style, _) in SPLITS.items():
            own = chosen(rows, method=method, split=split)
            spreads = [over_seeds(chosen(own, temperature=t), quantity.key) for t in temperatures]
            found = [(t, s.mean, s.sd) for t, s in zip(temperatures, spreads) if s is not None]
            if not found:
                continue
            x, y, sd = np.array(found, dtype=float).T
            ax.errorbar(x + shift, y, yerr=np.nan_to_num(sd), fmt=look.marker + style, ms=5.5,
                        lw=1.5, elinewidth=1.0, capsize=2, color=look.colour,
                        mfc=look.colour if split == "test" else "white")  # fmt: skip
        ax.plot([], [], f"{look.marker}-", color=look.colour, ms=5.5, label=look.name)
    for split, (style, name) in SPLITS.items():
        if chosen(rows, split=split):
            ax.plot([], [], style, color="#333333", lw=1.5, label=name)
    ax.set_xticks(temperatures, [f"{t:g}" for t in temperatures])
    title = quantity.name[0].upper() + quantity.name[1:]
    dress(ax, f"{title} against temperature", "sampling temperature", quantity.label)
    figure.legend(loc="outside lower left", ncols=4, fontsize=8.5, frameon=False)
    return figure


def temperature(workdir: Path, quantity: Quantity) -> Path:
    """Writes ``figures/temperature_<quantity>.png`` from ``sweep.jsonl``.

    Raises InputError: the file is missing or at fault, or no row of the study has the quantity.
    """
    figure = draw_temperature(temperature_rows(read_sweep(workdir)), quantity)
    return save(figure, workdir, f"temperature_{quantity.key}")


# --- Metrics of methods without PPO -------------------------------------------------------------


def draw_columns(metrics: dict[str, np.ndarray]) -> "Figure":
    """A panel a column of ``metrics.jsonl`` against the step: for methods trained without PPO,
    whose columns differ from one method to the next.

    Args:
      metrics: columns [steps]; one named "step".

    Raises InputError: there is no "step", or nothing but it.
    """
    names = [name for name, values in metrics.items() if name != "step" and
             np.isfinite(values).any()]  # fmt: skip
    if "step" not in metrics or not names:
        raise InputError("metrics.jsonl needs 'step' and another number a line; run `vbon train`")
    lines = -(-len(names) // 3)
    figure = new_figure(13.5, 3.2 * lines)
    axes = figure.subplots(lines, 3, squeeze=False).flatten()
    for ax, name in zip(axes, names):
        ax.plot(metrics["step"], metrics[name], color=LOOKS["vbon"].colour, lw=1.3)
        dress(ax, name, "training step", "")
    for ax in axes[len(names) :]:
        ax.remove()
    return figure


def metric_columns(workdir: Path) -> Path:
    """Writes ``figures/training_curves.png`` from whatever columns ``metrics.jsonl`` has.

    Raises InputError: the file is missing or has no column to draw.
    """
    return save(draw_columns(read_metrics(workdir)), workdir, "training_curves")
