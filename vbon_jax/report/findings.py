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
from vbon_jax.report.style import method_looks, method_name
from vbon_jax.report.sweep_figures import EVALUATOR_WIN_RATE, sample_size_rows, temperature_rows

Rows = Sequence[dict[str, Any]]


def share_rows(rows: Rows, bon: Rows) -> list[dict[str, Any]]:
    """Who holds the fronts of a figure, and how far below best-of-n each method lies.

    Args:
      rows: the fine-tuned policies of the figure.
      bon: best-of-n in order of n; may be empty.

    Returns:
      One dict a method: "method", "points", and for each of "win_rate" and "reward" the number of
      its points "on_<q>", its share "share_<q>" of the front, and "below_<q>", the median of how
      far it lies below best-of-n at the same KL (None without best-of-n in that range).
    """
    methods = [row["method"] for row in rows]
    result: dict[str, dict[str, Any]] = {
        method: {"method": method, "points": methods.count(method)}
        for method in method_looks(methods)
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
    """How far each policy lies below best-of-n at the same KL, [N]; NaN off its range of KL."""
    if not bon:
        return np.full(len(rows), np.nan)
    return pareto.shortfall(
        [row["kl_ref"] for row in rows],
        [row[quantity.key] for row in rows],
        [row["kl_ref"] for row in bon],
        [row[quantity.key] for row in bon],
    )


def findings(sweep: Rows, n: float | None) -> list[str]:
    """The headline sentences, most important first.

    Args:
      sweep: rows of ``sweep.jsonl``.
      n: the run's n of best-of-n; None where it is not known.
    """
    rows = front_rows(sweep, "front")
    found: list[str] = []
    if rows:
        held = share_rows(rows, bon_rows(sweep))
        for quantity in QUANTITIES:
            found += [_front_sentence(held, quantity), *_shortfall_sentence(held, quantity)]
    if n is not None:
        found += _matched_sentence(chosen(sweep, study="front", split="test"), n)
    return found + _bound_sentence(sweep) + _size_sentence(sweep) + _temperature_sentences(sweep)


def _front_sentence(held: list[dict[str, Any]], quantity: Quantity) -> str:
    total = sum(entry[f"on_{quantity.key}"] for entry in held)
    if len(held) == 1:
        return (f"{quantity.name.capitalize()} against KL: only {method_name(held[0]['method'])} "
                "was swept, so the share of the front says nothing.")  # fmt: skip
    ranked = sorted(held, key=lambda entry: -entry[f"on_{quantity.key}"])
    most = ranked[0][f"on_{quantity.key}"]
    first = [entry for entry in ranked if entry[f"on_{quantity.key}"] == most]
    names = " and ".join(method_name(entry["method"]) for entry in first)
    verb, each = ("holds", "") if len(first) == 1 else ("hold", "each ")
    rest = "; ".join(
        f"{method_name(e['method'])} {e[f'share_{quantity.key}']:.0%}" for e in ranked[len(first) :]
    )
    return (
        f"{quantity.name.capitalize()} against KL: {names} {verb} the largest share of the front "
        f"among fine-tuned methods, {each}{most} of its {total} points "
        f"({first[0][f'share_{quantity.key}']:.0%}){'; ' + rest if rest else ''}."
    )


def _shortfall_sentence(held: list[dict[str, Any]], quantity: Quantity) -> list[str]:
    key = f"below_{quantity.key}"
    ranked = sorted((e for e in held if e[key] is not None), key=lambda entry: entry[key])
    if len(ranked) < 2:
        return []
    named = [f"{method_name(e['method'])} {e[key]:.3f}" for e in ranked]
    return [
        f"Median shortfall in {quantity.name} below BoN at equal KL, least first: "
        f"{', '.join(named)}."
    ]


def _matched_sentence(rows: Rows, n: float) -> list[str]:
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
        f"fine-tuned method with the highest win rate, {method_name(best)} ({steered}), "
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


def _size_sentence(sweep: Rows) -> list[str]:
    rows = chosen(sample_size_rows(sweep), method="vbon")
    sizes = sorted({row["m"] for row in rows})
    if len(sizes) < 2:
        return []
    few, many = (over_seeds(chosen(rows, m=m), "win_rate") for m in (sizes[0], sizes[-1]))
    assert few is not None and many is not None  # each size comes from a row
    spread = f", standard deviation {many.sd:.3f} over {many.seeds} seeds" if many.seeds > 1 else ""
    return [
        f"From m = {sizes[0]} to m = {sizes[-1]} reference samples a prompt, vBoN's win rate goes "
        f"from {few.mean:.3f} to {many.mean:.3f}{spread}."
    ]


def _temperature_sentences(sweep: Rows) -> list[str]:
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
                 for m in method_looks([row["method"] for row in own])}  # fmt: skip
        if len(means) > 1:
            ranked = sorted(means, key=lambda method: -means[method])
            named = [f"{method_name(m)} {means[m]:.3f}" for m in ranked]
            found.append(f"Win rate by the separate evaluator, mean over temperatures and seeds, "
                         f"{where}: {', '.join(named)}.")  # fmt: skip
    return found


def run_sentence(rows: Rows) -> list[str]:
    """What the run's own policy reached beside best-of-n, from the rows of ``evaluation.json``, at
    the first temperature that has both."""
    for bon in chosen(rows, policy="bon"):
        own = [row for row in chosen(rows, temperature=bon["temperature"])
               if row["policy"] not in ("reference", "bon")]  # fmt: skip
        if own:
            named = (f"{method_name(row['policy'])} (n = {row['n']:g}) {row['win_rate']:.3f} at "
                     f"{row['kl_ref']:.2f} nats" for row in (*own, bon))  # fmt: skip
            return [
                f"The run's own policy at temperature {bon['temperature']:g}, win rate over the "
                f"reference and KL from it: {'; '.join(named)}."
            ]
    return []
