"""What a sweep found, in sentences whose every number comes from its rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vbon_jax.evaluation import pareto
from vbon_jax.report.front_figures import (
    QUANTITIES,
    REWARD,
    WIN_RATE,
    Quantity,
    bon_rows,
    front_rows,
    on_front,
)
from vbon_jax.report.results import chosen, matched, over_seeds
from vbon_jax.report.style import Looks, method_looks, method_name
from vbon_jax.report.sweep_figures import EVALUATOR_WIN_RATE, sample_size_rows, temperature_rows

Rows = Sequence[dict[str, Any]]


def share_rows(rows: Rows, bon: Rows, looks: Looks) -> list[dict[str, Any]]:
    """Computes each method's share of the fronts of a figure and its shortfall below best-of-n.

    Args:
        rows: The fine-tuned policies of the figure.
        bon: Best-of-n in order of n; may be empty.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        One dict per method, in the order of the legends: "method", "points", and for each of
        "win_rate" and "reward" the number of its points on the front "on_<q>", its share of the
        front "share_<q>", and "below_<q>", the median of how far it lies below best-of-n at the
        same KL (None without best-of-n in that range).
    """
    methods = [row["method"] for row in rows]
    result: dict[str, dict[str, Any]] = {
        method: {"method": method, "points": methods.count(method)}
        for method in method_looks(methods, looks)
    }
    for quantity in QUANTITIES:
        front = on_front(rows, quantity)
        shares = pareto.shares(methods, front)
        below = shortfalls(rows, bon, quantity)
        for method, entry in result.items():
            own = np.array(methods) == method
            known = below[own][np.isfinite(below[own])]
            entry[f"on_{quantity.key}"] = int(front[own].sum())
            entry[f"share_{quantity.key}"] = shares[method]
            entry[f"below_{quantity.key}"] = float(np.median(known)) if len(known) else None
    return list(result.values())


def shortfalls(rows: Rows, bon: Rows, quantity: Quantity) -> np.ndarray:
    """Computes how far each policy lies below best-of-n at the same KL.

    Args:
        rows: N policies.
        bon: Best-of-n in order of n; may be empty.
        quantity: What is compared.

    Returns:
        The differences, a float array [N]; NaN where best-of-n has no such KL.
    """
    if not bon:
        return np.full(len(rows), np.nan)
    return pareto.shortfall(
        [row["kl_ref"] for row in rows],
        [row[quantity.key] for row in rows],
        [row["kl_ref"] for row in bon],
        [row[quantity.key] for row in bon],
    )


def findings(sweep: Rows, n: float | None, looks: Looks) -> list[str]:
    """Says what a sweep found.

    Args:
        sweep: The rows of ``sweep.jsonl``.
        n: The run's n of best-of-n; None where it is not known.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        Sentences, the most important first.
    """
    rows = front_rows(sweep, "front", looks)
    found: list[str] = []
    if rows:
        held = share_rows(rows, bon_rows(sweep), looks)
        for quantity in QUANTITIES:
            found.append(_front_sentence(held, quantity, looks))
            found += _shortfall_sentence(held, quantity, looks)
    if n is not None:
        found += _matched_sentence(chosen(sweep, study="front", split="test"), n, looks)
    found += _bound_sentence(sweep)
    return found + _size_sentence(sweep, looks) + _temperature_sentences(sweep, looks)


def _front_sentence(held: list[dict[str, Any]], quantity: Quantity, looks: Looks) -> str:
    total = sum(entry[f"on_{quantity.key}"] for entry in held)
    if len(held) == 1:
        only = method_name(held[0]["method"], looks)
        return (f"{quantity.name.capitalize()} against KL: only {only} was swept, so the share of "
                "the front says nothing.")  # fmt: skip
    ranked = sorted(held, key=lambda entry: -entry[f"on_{quantity.key}"])
    most = ranked[0][f"on_{quantity.key}"]
    first = [entry for entry in ranked if entry[f"on_{quantity.key}"] == most]
    names = " and ".join(method_name(entry["method"], looks) for entry in first)
    verb, each = ("holds", "") if len(first) == 1 else ("hold", "each ")
    rest = "; ".join(
        f"{method_name(e['method'], looks)} {e[f'share_{quantity.key}']:.0%}"
        for e in ranked[len(first) :]
    )
    return (
        f"{quantity.name.capitalize()} against KL: {names} {verb} the largest share of the front "
        f"among fine-tuned methods, {each}{most} of its {total} points "
        f"({first[0][f'share_{quantity.key}']:.0%}){'; ' + rest if rest else ''}."
    )


def _shortfall_sentence(held: list[dict[str, Any]], quantity: Quantity, looks: Looks) -> list[str]:
    key = f"below_{quantity.key}"
    ranked = sorted((e for e in held if e[key] is not None), key=lambda entry: entry[key])
    if len(ranked) < 2:
        return []
    named = [f"{method_name(e['method'], looks)} {e[key]:.3f}" for e in ranked]
    return [
        f"Median shortfall in {quantity.name} below BoN at equal KL, least first: "
        f"{', '.join(named)}."
    ]


def _matched_sentence(rows: Rows, n: float, looks: Looks) -> list[str]:
    near = matched(rows, n)
    tuned = {m: r for m, r in near.items() if m not in ("bon", "reference")}
    if not tuned or "bon" not in near:
        return []

    def result(own: Rows) -> str:
        return f"a win rate of {_mean(own, 'win_rate'):.3f} at {_mean(own, 'kl_ref'):.2f} nats"

    best = max(tuned, key=lambda method: _mean(tuned[method], "win_rate"))
    first = tuned[best][0]
    steered = f"beta = {first['beta']:.3g}" if first["n"] is None else f"n = {first['n']:g}"
    return [
        f"Matched to n = {n:g}: BoN (n = {near['bon'][0]['n']:g}) has {result(near['bon'])}; the "
        f"fine-tuned method with the highest win rate, {method_name(best, looks)} ({steered}), "
        f"{result(tuned[best])} from the reference."
    ]


def _bound_sentence(sweep: Rows) -> list[str]:
    rows = chosen(sweep, study="front", split="test")
    both = []
    for n in sorted({row["n"] for row in chosen(rows, method="vbon")}):
        if bound := chosen(rows, method="lower_bound", n=n):
            both.append((chosen(rows, method="vbon", n=n), bound))
    if not both:
        return []
    gaps = {
        q.key: np.mean([abs(_mean(a, q.key) - _mean(b, q.key)) for a, b in both])
        for q in (WIN_RATE, REWARD)
    }
    return [
        f"Exact objective and lower bound L at the same n ({len(both)} values): they differ by "
        f"{gaps['win_rate']:.3f} in win rate and {gaps['reward']:.3f} in reward, mean of the "
        "absolute differences."
    ]


def _mean(rows: Rows, key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def _size_sentence(sweep: Rows, looks: Looks) -> list[str]:
    rows = chosen(sample_size_rows(sweep), method="vbon")
    sizes = sorted({row["m"] for row in rows})
    if len(sizes) < 2:
        return []
    few, many = (over_seeds(chosen(rows, m=m), "win_rate") for m in (sizes[0], sizes[-1]))
    assert few is not None and many is not None  # each size comes from a row
    spread = f", standard deviation {many.sd:.3f} over {many.seeds} seeds" if many.seeds > 1 else ""
    return [
        f"From m = {sizes[0]} to m = {sizes[-1]} reference samples per prompt, "
        f"{method_name('vbon', looks)}'s win rate goes from {few.mean:.3f} to {many.mean:.3f}"
        f"{spread}."
    ]


def _temperature_sentences(sweep: Rows, looks: Looks) -> list[str]:
    rows = [
        row
        for row in temperature_rows(sweep)
        if row[EVALUATOR_WIN_RATE.key] is not None and row["method"] not in ("reference", "bon")
    ]
    found = []
    for split, where in (("test", "on prompts of the training distribution"),
                         ("ood", "out of distribution")):  # fmt: skip
        own = chosen(rows, split=split)
        means = {m: _mean(chosen(own, method=m), EVALUATOR_WIN_RATE.key)
                 for m in method_looks([row["method"] for row in own], looks)}  # fmt: skip
        if len(means) > 1:
            ranked = sorted(means, key=lambda method: -means[method])
            named = [f"{method_name(m, looks)} {means[m]:.3f}" for m in ranked]
            found.append(f"Win rate by the separate evaluator, mean over temperatures and seeds, "
                         f"{where}: {', '.join(named)}.")  # fmt: skip
    return found


def run_sentence(rows: Rows, looks: Looks) -> list[str]:
    """Says what the run's own policy reached beside best-of-n.

    Args:
        rows: The rows of ``evaluation.json``.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        One sentence about the first temperature that has both, or nothing.
    """
    for bon in chosen(rows, policy="bon"):
        own = [row for row in chosen(rows, temperature=bon["temperature"])
               if row["policy"] not in ("reference", "bon")]  # fmt: skip
        if own:
            named = (f"{method_name(row['policy'], looks)} (n = {row['n']:g}) "
                     f"{row['win_rate']:.3f} at {row['kl_ref']:.2f} nats"
                     for row in (*own, bon))  # fmt: skip
            return [
                f"The run's own policy at temperature {bon['temperature']:g}, win rate over the "
                f"reference and KL from it: {'; '.join(named)}."
            ]
    return []
