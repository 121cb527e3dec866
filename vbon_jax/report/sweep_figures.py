"""Quality against reference samples and temperature: Figures 3, 4 and 5 of the paper."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vbon_jax.errors import InputError
from vbon_jax.report.front_figures import Quantity
from vbon_jax.report.results import chosen, over_seeds, read_convergence, read_sweep
from vbon_jax.report.style import BON_COLOR, Looks, dress, method_looks, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVALUATOR_WIN_RATE = Quantity(
    "evaluator_win_rate", "win rate by the evaluator", "win rate over the reference (a tie is half)"
)
EVALUATOR_REWARD = Quantity(
    "evaluator_reward", "reward by the evaluator", "evaluator's reward, mean per response"
)
EVALUATOR_QUANTITIES = (EVALUATOR_WIN_RATE, EVALUATOR_REWARD)
SPLITS = {"test": ("-", "in distribution"), "ood": ("--", "out of distribution")}


# --- Figure 3: log F against the reward ---------------------------------------------------------


def draw_log_f(examples: Sequence[dict[str, Any]]) -> "Figure":
    """Draws the estimate of log F against the reward, a panel per prompt and a line per m.

    Args:
        examples: ``{"prompt", "kind", "curves": [{"m", "rewards", "log_f"}, ...]}``, as in
            ``convergence.json``; log_f in nats, null where it is -inf.

    Returns:
        The figure.

    Raises:
        InputError: There is no example.
    """
    from matplotlib import colormaps

    if not examples:
        raise InputError("convergence.json has no example to draw; run `vbon convergence` again")
    sizes = sorted({curve["m"] for example in examples for curve in example["curves"]})
    # Few samples light, many dark; the palest end of the map is left out.
    shades = colormaps["viridis_r"](np.linspace(0.12, 1.0, len(sizes)))
    colors = dict(zip(sizes, shades))
    figure = new_figure(4.2 * len(examples) + 0.4, 4.4)
    axes = figure.subplots(1, len(examples), sharey=True, squeeze=False)[0]
    for ax, example in zip(axes, examples):
        for curve in sorted(example["curves"], key=lambda c: c["m"]):
            rewards = np.array(curve["rewards"], dtype=float)
            log_f = np.array(curve["log_f"], dtype=float)  # null becomes NaN, a gap in the line
            order = np.argsort(rewards)
            size = curve["m"]
            ax.plot(rewards[order], log_f[order], color=colors[size], lw=1.6, label=f"m = {size}")
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

    Args:
        workdir: The folder of the run.

    Returns:
        The path of the figure.

    Raises:
        InputError: The file is missing or at fault, or has no example.
    """
    return save(draw_log_f(read_convergence(workdir)["examples"]), workdir, "log_f_curves")


# --- Figure 4: quality against the number of samples --------------------------------------------


def sample_size_rows(sweep: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Selects the rows of Figure 4: study "m", split "test".

    Args:
        sweep: The rows of ``sweep.jsonl``.

    Returns:
        The rows of the figure.
    """
    return chosen(sweep, study="m", split="test")


def draw_sample_size(
    rows: Sequence[dict[str, Any]], bon: float | None, quantity: Quantity, looks: Looks
) -> "Figure":
    """Draws a quantity against m, the number of reference samples per prompt.

    Lines are means and bars standard deviations over seeds; each seed is a small point. Below each
    m stands how long it took to draw and score the samples.

    Args:
        rows: Policies trained with several m and seeds at one n.
        bon: What best-of-n itself reaches at that n, a dashed line; None leaves it out.
        quantity: What is drawn.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The figure.

    Raises:
        InputError: There is no row.
    """
    if not rows:
        raise InputError('sweep.jsonl has no row of study "m"; run `vbon sweep` with that study')
    methods = method_looks({row["method"] for row in rows}, looks)
    figure = new_figure(5.8, 4.4)
    ax = figure.subplots()
    if bon is not None:
        label = f"BoN, n = {_only(rows, 'n')}"
        ax.axhline(bon, color=BON_COLOR, ls="--", lw=1.3, label=label)
    sizes = sorted({row["m"] for row in rows})
    for method, look in methods.items():
        own = [row for row in rows if row["method"] == method]
        x = np.array([row["m"] for row in own])
        y = np.array([row[quantity.key] for row in own])
        ax.plot(x, y, look.marker, color=look.color, ms=4, alpha=0.35, mew=0)
        spreads = {m: over_seeds(chosen(own, m=m), quantity.key) for m in sizes}
        found = [(m, s.mean, s.sd) for m, s in spreads.items() if s is not None]
        mean_x, mean_y, sd = np.array(found, dtype=float).T
        ax.errorbar(mean_x, mean_y, yerr=np.nan_to_num(sd), fmt=f"{look.marker}-", lw=1.7, ms=6,
                    color=look.color, capsize=3, elinewidth=1.2, label=look.name)  # fmt: skip
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xticks(sizes, [f"{m:g}\n{_minutes(chosen(rows, m=m))}" for m in sizes])
    xlabel = "m, reference samples per prompt (below: time to draw and score them)"
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


def sample_size(workdir: Path, quantity: Quantity, looks: Looks) -> Path:
    """Writes ``figures/m_<quantity>.png`` from the study "m" of ``sweep.jsonl``.

    Args:
        workdir: The folder of the run.
        quantity: What is drawn.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The path of the figure.

    Raises:
        InputError: The file is missing or at fault, or has no row of that study.
    """
    sweep = read_sweep(workdir)
    rows = sample_size_rows(sweep)
    same_n = [
        row
        for row in chosen(sweep, study="front", split="test", method="bon")
        if row["n"] in {r["n"] for r in rows}
    ]
    bon = over_seeds(same_n, quantity.key)
    figure = draw_sample_size(rows, bon and bon.mean, quantity, looks)
    return save(figure, workdir, f"m_{quantity.key}")


# --- Figure 5: quality against the temperature --------------------------------------------------


def temperature_rows(sweep: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Selects the rows of Figure 5.

    Args:
        sweep: The rows of ``sweep.jsonl``.

    Returns:
        The rows of the study "temperature" on both splits, and those of the study "front" with the
        same settings at temperatures that were measured there only.
    """

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


def draw_temperature(rows: Sequence[dict[str, Any]], quantity: Quantity, looks: Looks) -> "Figure":
    """Draws a quantity against the sampling temperature, mean and standard deviation over seeds.

    Lines are solid on prompts of the training distribution and dashed on the others.

    Args:
        rows: See `temperature_rows`; rows without the quantity (null) are left out.
        quantity: What is drawn.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The figure.

    Raises:
        InputError: No row has the quantity.
    """
    rows = [row for row in rows if row[quantity.key] is not None]
    if not rows:
        raise InputError(
            f'no row of study "temperature" in sweep.jsonl has {quantity.key}; run `vbon sweep` '
            "with that study and an evaluator reward"
        )
    figure = new_figure(5.8, 4.9)
    ax = figure.subplots()
    methods = method_looks({row["method"] for row in rows}, looks)
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
                        lw=1.5, elinewidth=1.0, capsize=2, color=look.color,
                        mfc=look.color if split == "test" else "white")  # fmt: skip
        ax.plot([], [], f"{look.marker}-", color=look.color, ms=5.5, label=look.name)
    for split, (style, name) in SPLITS.items():
        if chosen(rows, split=split):
            ax.plot([], [], style, color="#333333", lw=1.5, label=name)
    ax.set_xticks(temperatures, [f"{t:g}" for t in temperatures])
    title = quantity.name[0].upper() + quantity.name[1:]
    dress(ax, f"{title} against temperature", "sampling temperature", quantity.label)
    figure.legend(loc="outside lower left", ncols=4, fontsize=8.5, frameon=False)
    return figure


def temperature(workdir: Path, quantity: Quantity, looks: Looks) -> Path:
    """Writes ``figures/temperature_<quantity>.png`` from ``sweep.jsonl``.

    Args:
        workdir: The folder of the run.
        quantity: What is drawn.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The path of the figure.

    Raises:
        InputError: The file is missing or at fault, or no row of the study has the quantity.
    """
    figure = draw_temperature(temperature_rows(read_sweep(workdir)), quantity, looks)
    return save(figure, workdir, f"temperature_{quantity.key}")
