"""The tables of the report, as HTML."""

from collections.abc import Sequence
from typing import Any

from vbon_jax.report import page
from vbon_jax.report import tables as table
from vbon_jax.report.results import chosen, matched, over_seeds
from vbon_jax.report.style import LOOKS, method_looks, method_name

Rows = Sequence[dict[str, Any]]


def number(value: float | None, form: str = ".3f") -> str:
    """A number, or "n/a" where it was not measured."""
    return table.MISSING if value is None else format(value, form)


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """The number and half the width of its 95% interval."""
    if value is None or interval is None:
        return number(value)
    return f"{value:.3f} ± {(interval[1] - interval[0]) / 2:.3f}"


def evaluation_table(evaluation: dict[str, Any]) -> str:
    """The rows of ``evaluation.json``."""
    caption = "Held-out prompts; after ± half the 95% interval over prompts; KL in nats a response."
    rows = evaluation["rows"]
    cells = [
        [method_name(row["policy"]), *cells[1:]]
        for row, cells in zip(rows, table.results_cells(rows))
    ]
    return page.table(table.COLUMNS, cells, caption)


_MEASURED = (
    ("reward", "reward"),
    ("win rate", "win_rate"),
    ("KL(·‖ref)", "kl_ref"),
    ("KL(·‖BoN)", "kl_bon"),
    ("evaluator\nreward", "evaluator_reward"),
    ("evaluator\nwin rate", "evaluator_win_rate"),
)


def matched_table(sweep: Rows, n: float) -> str:
    """One row a method: the setting of the sweep nearest to n, mean over its seeds."""
    rows = chosen(sweep, study="front", split="test")
    near = {row["method"]: [row] for row in chosen(rows, method="reference")} | matched(rows, n)
    cells = []
    for method in method_looks(near):
        own = near[method]
        first = own[0]
        spread = over_seeds(own, "win_rate")
        cells.append(
            [
                method_name(method),
                number(first["n"], "g"),
                number(first["beta"], ".3g"),
                str(len({row["seed"] for row in own})),
                *(_averaged(own, key) for _, key in _MEASURED),
                number(spread.sd if spread and spread.seeds > 1 else None),
                *(_mean(own, key, form) for key, form in _PLAIN),
            ]
        )
    head = ["method", "n", "beta", "seeds", *(name for name, _ in _MEASURED),
            "SD of\nwin rate", "EOS\nrate", "tokens", "training,\nseconds"]  # fmt: skip
    caption = (
        f"For each method the setting of the sweep nearest to n = {n:g} (of a beta: to best-of-n's "
        "KL bound), mean over its seeds, on held-out prompts; after ± half the 95% interval "
        "over prompts (mean over seeds); SD: standard deviation over seeds; KL in nats a response, "
        "BoN's by Beirami et al.'s estimate; tokens and EOS rate of a response."
    )
    return page.table(head, cells, caption)


_PLAIN = (("eos_rate", ".3f"), ("length", ".1f"), ("seconds", ".1f"))


def _mean(rows: Rows, key: str, form: str) -> str:
    spread = over_seeds(rows, key)
    return number(None if spread is None else spread.mean, form)


def _averaged(rows: Rows, key: str) -> str:
    spread = over_seeds(rows, key)
    intervals = [row[f"{key}_ci95"] for row in rows if row[f"{key}_ci95"] is not None]
    if spread is None or not intervals:
        return number(None if spread is None else spread.mean)
    half = sum(high - low for low, high in intervals) / (2 * len(intervals))
    return f"{spread.mean:.3f} ± {half:.3f}"


def sweep_table(sweep: Rows) -> str:
    """Every row of the sweep, by study, split, temperature, method and setting."""
    place = {method: at for at, method in enumerate(method_looks({r["method"] for r in sweep}))}
    studies = {study: at for at, study in enumerate(("front", "m", "temperature"))}

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        return (studies.get(row["study"], len(studies)), row["study"], row["split"] != "test",
                row["temperature"], place[row["method"]], row["n"] or 0.0, row["beta"] or 0.0,
                row["m"] or 0, row["seed"])  # fmt: skip

    cells = [
        [
            method_name(row["method"]),
            row["study"],
            row["split"],
            number(row["temperature"], "g"),
            number(row["n"], "g"),
            number(row["beta"], ".3g"),
            number(row["m"], "g"),
            number(row["seed"], "g"),
            *(with_interval(row[key], row[f"{key}_ci95"]) for _, key in _MEASURED),
            *(number(row[key], form) for key, form in _PLAIN),
        ]
        for row in sorted(sweep, key=order)
    ]
    head = ["method", "study", "split", "T", "n", "beta", "m", "seed",
            *(name for name, _ in _MEASURED),
            "EOS\nrate", "tokens", "training,\nseconds"]  # fmt: skip
    caption = "Every policy measured; after ± half the 95% interval over prompts; KL in nats."
    return page.table(head, cells, caption, left=3)


def shares_table(held: Sequence[dict[str, Any]]) -> str:
    """Who holds the front, from `vbon_jax.report.findings.share_rows`."""
    cells = [
        [
            method_name(entry["method"]),
            str(entry["points"]),
            *(
                text
                for key in ("win_rate", "reward")
                for text in (
                    f"{entry[f'on_{key}']} ({entry[f'share_{key}']:.0%})",
                    number(entry[f"below_{key}"]),
                )
            ),
        ]
        for entry in held
    ]
    head = ["method", "policies", "on the front,\nwin rate", "below BoN,\nwin rate",
            "on the front,\nreward", "below BoN,\nreward"]  # fmt: skip
    caption = (
        "Points on the Pareto front, and in brackets the method's share of all points on it; below "
        "BoN: median distance to BoN's curve at the same KL, over the policies in its range of KL."
    )
    return page.table(head, cells, caption)


def convergence_table(found: dict[str, Any]) -> str:
    """Table 1 of the paper, from ``convergence.json``."""
    cells = [
        [
            str(row["m"]),
            f"{row['rejected']:.2%}",
            number(row["statistic"]),
            number(row["p_value"]),
            number(row["mean_statistic"]),
        ]
        for row in found["rows"]
    ]
    head = ["m", "rejected", "statistic,\nrejected", "p-value,\nrejected",
            "statistic,\nall prompts"]  # fmt: skip
    caption = (
        f"Table 1: two-sample Kolmogorov-Smirnov test of m against {found['m_full']} samples at "
        f"level {found['level']:g} and temperature {found['temperature']:g}, over "
        f"{found['prompts']} prompts; n/a: no prompt was rejected."
    )
    return page.table(head, cells, caption, left=0)


def sample_size_table(rows: Rows) -> str:
    """The numbers of Figure 4."""
    sizes = sorted({row["m"] for row in rows})
    cells = []
    for method in method_looks({row["method"] for row in rows}):
        for m in sizes:
            own = chosen(rows, m=m, method=method)
            if own:
                cells.append([method_name(method), f"{m:g}", str(len(own)), *_four(own)])
    head = ["method", "m", "seeds", "win rate", "SD", "reward", "SD", "preprocessing,\nseconds"]
    caption = "Mean and standard deviation (SD) over seeds; preprocessing: to draw and score m."
    return page.table(head, cells, caption)


def _four(rows: Rows) -> list[str]:
    texts = []
    for key in ("win_rate", "reward"):
        spread = over_seeds(rows, key)
        assert spread is not None  # the reader has checked that every row has the number
        texts += [number(spread.mean), number(spread.sd if spread.seeds > 1 else None)]
    return [*texts, _mean(rows, "sample_seconds", ".1f")]


def bon_kl_table(rows: Rows) -> str:
    """KL(bon || ref) by the bound, by Beirami et al.'s estimate and directly."""
    cells = [
        [
            number(row["n"], "g"),
            number(row["kl_bound"], ".4f"),
            number(row["kl_beirami"], ".4f"),
            with_interval(row["kl_direct"], row.get("kl_direct_ci95")),
            number(row["win_rate"]),
            number(row["n"] / (row["n"] + 1)),
        ]
        for row in rows
    ]
    head = ["n", "bound,\nlog n - (n-1)/n", "Beirami\net al.", "direct,\nE[log ratio]", "win rate",
            "n/(n+1)"]  # fmt: skip
    caption = (
        "KL(BoN‖ref) in nats a response; direct: mean of log(BoN/ref) over BoN's winners, after ± "
        "half its 95% interval. Beside it the measured win rate and its limit without ties."
    )
    return page.table(head, cells, caption, left=0)


_EXACT = (
    ("KL(policy‖target)", "kl_target"),
    ("KL(policy‖BoN)", "kl_bon"),
    ("KL(policy‖ref)", "kl_ref"),
    ("win rate", "win_rate"),
    ("KL(target‖BoN)", "target_kl_bon"),
    ("target's\nwin rate", "target_win_rate"),
)


def tabular_table(rows: Rows) -> str:
    """The rows of ``tabular.json``, mean over the seeds of a setting; the target's own distance to
    best-of-n is what would be left if training were perfect."""
    place = {method: at for at, method in enumerate(LOOKS)}
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        where = (row["method"], row["target"], row["n"], row["beta"], row.get("m"))
        settings.setdefault(where, []).append(row)
    shown = [(name, key) for name, key in _EXACT if all(key in row for row in rows)]
    cells = [
        [
            method_name(method),
            target,
            number(n, "g"),
            number(beta, ".3g"),
            str(len(own)),
            *(_mean(own, key, ".4f") for _, key in shown),
        ]
        for (method, target, n, beta, _), own in sorted(
            settings.items(),
            key=lambda item: (place.get(item[0][0], len(place)), item[0][2] or 0.0,
                              item[0][3] or 0.0),
        )
    ]  # fmt: skip
    head = ["method", "its target", "n", "beta", "seeds", *(name for name, _ in shown)]
    caption = "Exact, by enumeration of every response, mean over seeds; KL in nats."
    return page.table(head, cells, caption, left=2)


def exact_table(exact: dict[str, float]) -> str:
    """What enumeration gives of the run's own policy ("exact" of ``evaluation.json``)."""
    cells = [[table.EXACT_LABELS.get(key, key), number(exact[key], ".4f")] for key in exact]
    caption = "This run's own policy, exact by enumeration of every response."
    return page.table(["quantity", "value"], cells, caption)
