"""The sections of the page that show the run's own policy.

Each returns a section, what is missing for it, or None where the run has no such part.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vbon_jax.report import choose as choosing
from vbon_jax.report import figures, training_figures
from vbon_jax.report.findings import run_sentence
from vbon_jax.report.page import (
    Block,
    Code,
    Figure,
    Figures,
    Folded,
    Heading,
    Missing,
    Paragraph,
    Section,
    Tables,
)
from vbon_jax.report.results import (
    Results,
    display_name,
    policies_in_order,
    read_metrics,
    read_samples,
)
from vbon_jax.report.style import Looks, method_name
from vbon_jax.report.sweep_tables import tabular_table
from vbon_jax.report.table import Column, Table
from vbon_jax.report.tables import exact_family_table, exact_table, kl_parts_table, results_table

PROMPTS_SHOWN = 6
EVALUATE = Missing("evaluate", "evaluate")


def evaluation_tables(rows: Sequence[dict[str, Any]], looks: Looks, prompts: str) -> Tables:
    """Returns the rows of ``evaluation.json`` with the names of the methods.

    Args:
        rows: The rows of a split.
        looks: The looks of the fine-tuned methods, by label.
        prompts: What the captions call the split's prompts.

    Returns:
        `results_table`, and `kl_parts_table` where there is one, with names for labels.
    """
    names = {display_name(row["policy"]): method_name(row["policy"], looks) for row in rows}
    shown = []
    for table in (results_table(rows), kl_parts_table(rows)):
        if table is not None:
            named = tuple((names[cells[0]], *cells[1:]) for cells in table.rows)
            caption = table.caption.replace("Held-out prompts", prompts)
            shown.append(replace(table, rows=named, caption=caption))
    return Tables(tuple(shown))


def this_run(results: Results) -> Section | Missing:
    """Returns the run's own policy beside best-of-n and the reference.

    Args:
        results: What the workdir holds.

    Returns:
        The section, or that the policy was not evaluated.
    """
    evaluation, looks = results.evaluation, results.looks
    if evaluation is None:
        return EVALUATE
    rows = evaluation["rows"]
    names = ", ".join(dict.fromkeys(method_name(row["policy"], looks) for row in rows))
    shown = [
        Figure(
            figures.win_rate_vs_kl(results.workdir, looks),
            f"Win rate over the reference against KL from it, a point each for {names}, with the "
            "curve of best-of-n in theory.",
            "Win rate over the reference against KL from it on held-out prompts, with 95% "
            "intervals over prompts; the curve is best-of-n in theory.",
        )
    ]
    if (path := figures.family(results.workdir, looks)) is not None:
        shown.append(
            Figure(
                path,
                "Win rate and reward against KL from the reference, a curve over n of the family "
                "of policies and of best-of-n.",
                "One policy for every n: its curves over n on held-out prompts, beside those of "
                "best-of-n; the numbers are n, the bars 95% intervals over prompts.",
            )
        )
    if (results.workdir / "evaluation_samples.jsonl").exists():
        shown.append(
            Figure(
                figures.reward_histograms(results.workdir, looks),
                f"Densities of the rewards of the responses of {names}.",
                "Rewards of responses to held-out prompts; vertical lines are means.",
            )
        )
    blocks: list[Block] = [Paragraph(text) for text in run_sentence(rows, looks)]
    blocks += [
        evaluation_tables(rows, looks, "Held-out prompts"),
        Figures(tuple(shown), wide=True),
    ]
    if evaluation.get("ood"):
        out = evaluation_tables(evaluation["ood"], looks, "Out-of-distribution prompts")
        blocks += [Heading("Out of distribution"), out]
    return Section("run", "This run", tuple(blocks))


def training(results: Results) -> Section | Missing | None:
    """Returns the training curves.

    Args:
        results: What the workdir holds.

    Returns:
        The section, that no policy was trained, or None for best-of-n, which trains none.
    """
    method = results.config["method"]["name"] if results.config else None
    if method == "bon":
        return None
    if not (results.workdir / "metrics.jsonl").exists():
        return Missing("train", "train")
    metrics = read_metrics(results.workdir)
    if results.n is not None:
        path = training_figures.any_curves(results.workdir, results.n)
    else:
        path = training_figures.metric_columns(results.workdir)
    name = method_name(method, results.looks) if method else "the run's method"
    steps = len(metrics["step"]) if "step" in metrics else 0
    figure = Figure(
        path,
        f"Panels of the metrics of {name} against its {steps} training steps.",
        f"Metrics of {name}, the run's own method, over {steps} training steps.",
    )
    return Section("training", "Training curves", (Figures((figure,), wide=True),))


def choose(results: Results) -> Section | Missing | None:
    """Returns which n of best-of-n the evaluator trusts.

    Args:
        results: What the workdir holds.

    Returns:
        The section; that it was not asked; or None for a run without an evaluator.
    """
    found = results.choose
    if found is None:
        evaluator = (results.config or {}).get("evaluator") or {}
        has = any(evaluator.get(key) for key in ("train", "path", "function"))
        return Missing("choose", "choose") if has else None
    figure = Figure(
        choosing.figure(results.workdir, results.looks),
        "The evaluator's mean and win rate under best-of-n against n and against KL to the "
        f"reference; peak at n = {found['peak']}, recommended n = {found['recommended']}.",
        "Best-of-n chooses by the reward and is judged by the evaluator, with bands over prompts "
        "that hold at all n at once; beside it best-of-Poisson, soft best-of-n and the run's own "
        "policies.",
    )
    own = choosing.policies(results.workdir, found["temperature"])
    tables = Tables((choosing.table(found, own, results.looks),))
    blocks = (Paragraph(found["why"]), Figures((figure,), wide=True), tables)
    return Section("choose", "Which n to trust", blocks)


def exact(results: Results) -> Section | Missing | None:
    """Returns the exact results where every response can be enumerated.

    Args:
        results: What the workdir holds.

    Returns:
        The section; that a sweep lacks it; or None where responses cannot be enumerated.
    """
    tables = []
    if results.tabular:
        tables.append(tabular_table(results.tabular, results.looks))
    if results.evaluation is not None and results.evaluation.get("exact"):
        tables.append(exact_table(results.evaluation["exact"]))
    if results.evaluation is not None and results.evaluation.get("exact_family"):
        tables.append(exact_family_table(results.evaluation["exact_family"]))
    if tables:
        title = "Exact results where every response can be enumerated"
        return Section("tabular", title, (Tables(tuple(tables)),))
    data = (results.config or {}).get("data") or {}
    if results.sweep and data.get("corpus") == "tabular":
        return Missing("exact results of the sweep (tabular.json)", "sweep")
    return None


def responses(results: Results) -> Section | Missing:
    """Returns some prompts with a response of each policy.

    Args:
        results: What the workdir holds.

    Returns:
        The section, or that there are no samples.
    """
    workdir = results.workdir
    samples = []
    if (workdir / "sweep_samples.jsonl").exists():
        samples = read_samples(workdir, "sweep_samples.jsonl", "sweep")
    if (workdir / "evaluation_samples.jsonl").exists():  # has reference and best-of-n as well
        known = {sample["policy"] for sample in samples}
        samples += [sample for sample in read_samples(workdir) if sample["policy"] not in known]
    if not samples:
        return EVALUATE if results.evaluation is None else Missing("sample responses", "evaluate")
    note = (
        f"Temperature {samples[0]['temperature']:g}; the first response of each policy. The "
        "responses continue the prompt."
    )
    tables = responses_tables(samples, PROMPTS_SHOWN, results.looks)
    return Section("responses", "Sample responses", (Paragraph(note, "note"), Tables(tables)))


def responses_tables(
    samples: Sequence[dict[str, Any]], count: int, looks: Looks
) -> tuple[Table, ...]:
    """Returns the first response of each policy to the first prompts by id, with its reward.

    Of several temperatures the first in ``samples`` is shown.

    Args:
        samples: Scored responses, as `vbon_jax.report.results.read_samples` returns them.
        count: The number of prompts; all of them where there are fewer.
        looks: The looks of the fine-tuned methods, by label.

    Returns:
        A table for each prompt.
    """
    temperature = samples[0]["temperature"]
    samples = [sample for sample in samples if sample["temperature"] == temperature]
    policies = policies_in_order(samples)
    first: dict[Any, dict[str, dict[str, Any]]] = {}
    for sample in samples:
        where = sample["prompt_id"], sample["prompt"]
        first.setdefault(where, {}).setdefault(sample["policy"], sample)
    columns = (Column("policy", "left"), Column("response", "left"), Column("reward"))
    tables = []
    for prompt_id, prompt in sorted(first)[:count]:
        own = first[prompt_id, prompt]
        rows = tuple(
            (method_name(name, looks), own[name]["response"].strip(), f"{own[name]['reward']:.2f}")
            for name in policies
            if name in own
        )
        tables.append(Table(columns, rows, f"Prompt: {prompt}", kind="responses"))
    return tuple(tables)


def config(results: Results) -> Section | Missing:
    """Returns the settings of the run, folded away.

    Args:
        results: What the workdir holds.

    Returns:
        The section, or that there is no ``config.json``.
    """
    if results.config is None:
        return Missing("config.json", "run")
    text = json.dumps(results.config, indent=2, ensure_ascii=False)
    code = Code(text, label="config.json")
    return Section("config", "Config", (Folded("config.json", code),))
