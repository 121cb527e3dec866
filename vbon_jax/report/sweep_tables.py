"""The tables of a sweep, for the page."""

from collections.abc import Sequence
from typing import Any

from vbon_jax.report.results import chosen, matched, over_seeds
from vbon_jax.report.style import Looks, method_looks, method_name
from vbon_jax.report.table import Column, Table
from vbon_jax.report.tables import number, with_interval

Rows = Sequence[dict[str, Any]]

_MEASURED = (
    ("reward", "reward"),
    ("win rate", "win_rate"),
    ("KL(·‖ref)", "kl_ref"),
    ("KL(·‖BoN)", "kl_bon"),
    ("evaluator\nreward", "evaluator_reward"),
    ("evaluator\nwin rate", "evaluator_win_rate"),
)
_PLAIN = (
    ("EOS\nrate", "eos_rate", ".3f"),
    ("tokens", "length", ".1f"),
    ("training,\nseconds", "seconds", ".1f"),
)
_EXACT = (
    ("KL(policy‖target)", "kl_target"),
    ("KL(policy‖BoN)", "kl_bon"),
    ("KL(policy‖ref)", "kl_ref"),
    ("win rate", "win_rate"),
    ("KL(target‖BoN)", "target_kl_bon"),
    ("target's\nwin rate", "target_win_rate"),
)


def _columns(titles: Sequence[str], text: int = 1) -> tuple[Column, ...]:
    """Columns of which the first ``text`` hold text and the others numbers."""
    return tuple(Column(title, "left" if at < text else "right") for at, title in enumerate(titles))


def matched_table(sweep: Rows, n: float, looks: Looks) -> Table:
    """Returns one row per method: its setting in the sweep that is nearest to n.

    Args:
        sweep: The rows of ``sweep.jsonl``.
        n: The n of best-of-n.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        Means over the seeds of each setting, on the split "test" of the study "front".
    """
    rows = chosen(sweep, study="front", split="test")
    near = {row["method"]: [row] for row in chosen(rows, method="reference")} | matched(rows, n)
    cells = []
    for method in method_looks(near, looks):
        own = near[method]
        first = own[0]
        spread = over_seeds(own, "win_rate")
        cells.append(
            (
                method_name(method, looks),
                number(first["n"], "g"),
                number(first["beta"], ".3g"),
                str(len({row["seed"] for row in own})),
                *(_mean_with_interval(own, key) for _, key in _MEASURED),
                number(spread.sd if spread and spread.seeds > 1 else None),
                *(_mean(own, key, form) for _, key, form in _PLAIN),
            )
        )
    head = ("method", "n", "beta", "seeds", *(name for name, _ in _MEASURED), "SD of\nwin rate",
            *(name for name, _, _ in _PLAIN))  # fmt: skip
    caption = (
        f"For each method the setting of the sweep nearest to n = {n:g} (of a beta: to best-of-n's "
        "KL bound), mean over its seeds, on held-out prompts; after ± half the 95% interval "
        "over prompts (mean over seeds); SD: standard deviation over seeds; KL in nats per "
        "response, BoN's by Beirami et al.'s estimate; tokens and EOS rate per response."
    )
    return Table(_columns(head), tuple(cells), caption=caption)


def _mean(rows: Rows, key: str, form: str) -> str:
    spread = over_seeds(rows, key)
    return number(None if spread is None else spread.mean, form)


def _mean_with_interval(rows: Rows, key: str) -> str:
    spread = over_seeds(rows, key)
    intervals = [row[f"{key}_ci95"] for row in rows if row[f"{key}_ci95"] is not None]
    if spread is None or not intervals:
        return number(None if spread is None else spread.mean)
    half = sum(high - low for low, high in intervals) / (2 * len(intervals))
    return f"{spread.mean:.3f} ± {half:.3f}"


def sweep_table(sweep: Rows, looks: Looks) -> Table:
    """Returns every row of the sweep, by study, split, temperature, method and setting.

    Args:
        sweep: The rows of ``sweep.jsonl``.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The table, one row for each row of the sweep.
    """
    methods = method_looks({row["method"] for row in sweep}, looks)
    place = {method: at for at, method in enumerate(methods)}
    studies = {study: at for at, study in enumerate(("front", "m", "temperature"))}

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return (studies.get(row["study"], len(studies)), row["study"], row["split"] != "test",
                row["temperature"], place[row["method"]], row["n"] or 0.0, row["beta"] or 0.0,
                row["m"] or 0, row["seed"])  # fmt: skip

    cells = [
        (
            method_name(row["method"], looks),
            row["study"],
            row["split"],
            number(row["temperature"], "g"),
            number(row["n"], "g"),
            number(row["beta"], ".3g"),
            number(row["m"], "g"),
            number(row["seed"], "g"),
            *(with_interval(row[key], row[f"{key}_ci95"]) for _, key in _MEASURED),
            *(number(row[key], form) for _, key, form in _PLAIN),
        )
        for row in sorted(sweep, key=order)
    ]
    head = ("method", "study", "split", "T", "n", "beta", "m", "seed",
            *(name for name, _ in _MEASURED), *(name for name, _, _ in _PLAIN))  # fmt: skip
    caption = "Every policy measured; after ± half the 95% interval over prompts; KL in nats."
    return Table(_columns(head, text=3), tuple(cells), caption=caption)


def shares_table(held: Rows, looks: Looks) -> Table:
    """Returns each method's share of the front and its shortfall below best-of-n.

    Args:
        held: What `vbon_jax.report.findings.share_rows` returns.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The table, one row per method.
    """
    cells = [
        (
            method_name(entry["method"], looks),
            str(entry["points"]),
            *(
                text
                for key in ("win_rate", "reward")
                for text in (
                    f"{entry[f'on_{key}']} ({entry[f'share_{key}']:.0%})",
                    number(entry[f"below_{key}"]),
                )
            ),
        )
        for entry in held
    ]
    head = ("method", "policies", "on the front,\nwin rate", "below BoN,\nwin rate",
            "on the front,\nreward", "below BoN,\nreward")  # fmt: skip
    caption = (
        "Points on the Pareto front, and in brackets the method's share of all points on it; below "
        "BoN: median distance to BoN's curve at the same KL, over the policies in its range of KL."
    )
    return Table(_columns(head), tuple(cells), caption=caption)


def sample_size_table(rows: Rows, looks: Looks) -> Table:
    """Returns the numbers of Figure 4.

    Args:
        rows: The rows of the study "m".
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The table, one row for each method and m.
    """
    sizes = sorted({row["m"] for row in rows})
    cells = []
    for method in method_looks({row["method"] for row in rows}, looks):
        for m in sizes:
            own = chosen(rows, m=m, method=method)
            if own:
                cells.append((method_name(method, looks), f"{m:g}", str(len(own)), *_four(own)))
    head = ("method", "m", "seeds", "win rate", "SD", "reward", "SD", "preprocessing,\nseconds")
    caption = (
        "Mean and standard deviation (SD) over seeds; preprocessing: to draw and score m samples "
        "per prompt."
    )
    return Table(_columns(head), tuple(cells), caption=caption)


def _four(rows: Rows) -> list[str]:
    texts = []
    for key in ("win_rate", "reward"):
        spread = over_seeds(rows, key)
        assert spread is not None  # the reader has checked that every row has the number
        texts += [number(spread.mean), number(spread.sd if spread.seeds > 1 else None)]
    return [*texts, _mean(rows, "sample_seconds", ".1f")]


def bon_kl_table(rows: Rows) -> Table:
    """Returns KL(bon || ref) by the bound, by Beirami et al.'s estimate and directly.

    Args:
        rows: The rows of best-of-n in the study "front", in order of n.

    Returns:
        The table, one row for each n.
    """
    cells = [
        (
            number(row["n"], "g"),
            number(row["kl_bound"], ".4f"),
            number(row["kl_beirami"], ".4f"),
            with_interval(row["kl_direct"], row.get("kl_direct_ci95")),
            number(row["win_rate"]),
            number(row["n"] / (row["n"] + 1)),
        )
        for row in rows
    ]
    head = ("n", "bound,\nlog n - (n-1)/n", "Beirami\net al.", "direct,\nE[log ratio]", "win rate",
            "n/(n+1)")  # fmt: skip
    caption = (
        "KL(BoN‖ref) in nats per response; direct: mean of log(BoN/ref) over BoN's winners, after "
        "± half its 95% interval. Beside it the measured win rate and its limit without ties."
    )
    return Table(_columns(head, text=0), tuple(cells), caption=caption)


def tabular_table(rows: Rows, looks: Looks) -> Table:
    """Returns the exact results where every response can be enumerated.

    The target's own distance to best-of-n is what would be left if training were perfect.

    Args:
        rows: The rows of ``tabular.json``.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        The table, one row for each setting, mean over its seeds.
    """
    methods = method_looks({row["method"] for row in rows}, looks)
    place = {method: at for at, method in enumerate(methods)}
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        where = (row["method"], row["target"], row["n"], row["beta"], row.get("m"))
        settings.setdefault(where, []).append(row)
    shown = [(name, key) for name, key in _EXACT if all(key in row for row in rows)]

    def order(setting: tuple[Any, ...]) -> tuple[Any, ...]:
        method, _, n, beta, _ = setting
        return place[method], n or 0.0, beta or 0.0

    cells = [
        (
            method_name(setting[0], looks),
            setting[1],
            number(setting[2], "g"),
            number(setting[3], ".3g"),
            str(len(settings[setting])),
            *(_mean(settings[setting], key, ".4f") for _, key in shown),
        )
        for setting in sorted(settings, key=order)
    ]
    head = ("method", "its target", "n", "beta", "seeds", *(name for name, _ in shown))
    caption = "Exact, by enumeration of every response, mean over seeds; KL in nats."
    return Table(_columns(head, text=2), tuple(cells), caption=caption)
