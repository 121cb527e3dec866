"""The tables of a run: its evaluation, exact results, log F study and sample responses."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vbon_jax.data import jsonl
from vbon_jax.errors import InputError
from vbon_jax.report.results import display_name, policies_in_order, read_samples
from vbon_jax.report.table import Column, Table, markdown

Row = dict[str, Any]

MISSING = "n/a"
RESULTS_COLUMNS = (
    Column("policy", "left"),
    Column("n"),
    Column("T"),
    Column("reward"),
    Column("win rate"),
    Column("KL(·‖ref),\nnats"),
    Column("KL(·‖BoN),\nnats"),
    Column("responses\n/s", narrow="resp.\n/s"),
    Column("tokens\n/s"),
)
EXACT_LABELS = {
    "kl_bon": "KL(policy‖BoN), nats",
    "reference_kl_bon": "KL(reference‖BoN), nats",
    "kl_ref": "KL(policy‖ref), nats",
    "bon_kl": "KL(BoN‖ref), nats",
    "win_rate": "win rate of the policy",
    "bon_win_rate": "win rate of BoN",
    "corrected_kl_bon": "KL(corrected‖BoN), nats",
    "corrected_proposals": "proposals a corrected response",
}


def number(value: float | None, form: str = ".3f") -> str:
    """Formats a number.

    Args:
        value: The number; None where it was not measured.
        form: A format specification of `format`.

    Returns:
        The number, or "n/a" for None.
    """
    return MISSING if value is None else format(value, form)


def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """Formats a number and half the width of its 95% interval.

    Args:
        value: The number; None where it was not measured.
        interval: The lower and upper end of its interval; None where there is none.

    Returns:
        Such as "1.740 ± 0.046", the number alone without an interval, "n/a" without a number.
    """
    if value is None or interval is None:
        return number(value)
    return f"{value:.3f} ± {(interval[1] - interval[0]) / 2:.3f}"


def results_table(rows: Sequence[Row]) -> Table:
    """Returns the rows of ``evaluation.json`` as a table, grouped by temperature.

    After "±" stands half the width of the 95% interval over prompts; "n/a" is a number that was not
    measured (null in the file). The columns of speed are left out where no row has one.

    Args:
        rows: The rows of a split, in the order of the file.

    Returns:
        The table, one row for each of ``rows``.

    Raises:
        InputError: A row lacks a key.
    """
    cells: list[tuple[str, ...]] = []
    for at, row in enumerate(rows):
        value = partial(jsonl.field, row, where=f"row {at} of evaluation.json")
        cells.append(
            (
                display_name(value("policy")),
                number(value("n"), "g"),
                number(value("temperature"), "g"),
                with_interval(value("reward"), value("reward_ci95")),
                with_interval(value("win_rate"), value("win_rate_ci95")),
                with_interval(value("kl_ref"), value("kl_ref_ci95")),
                with_interval(value("kl_bon"), row.get("kl_bon_ci95")),
                number(value("responses_per_second"), ",.1f"),
                number(value("tokens_per_second"), ",.0f"),
            )
        )
    columns: tuple[Column, ...] = RESULTS_COLUMNS
    if all(row["responses_per_second"] is None for row in rows):  # speed was not measured
        columns, cells = columns[:-2], [cell[:-2] for cell in cells]
    return Table(
        columns=columns,
        rows=tuple(cells),
        title="Held-out prompts (±: half the 95% interval)",
        caption="Held-out prompts; after ± half the 95% interval over prompts; KL in nats per "
        "response; T: sampling temperature.",
        row_heads=3,
        rules=tuple(
            at
            for at in range(1, len(rows))
            if rows[at]["temperature"] != rows[at - 1]["temperature"]
        ),
    )


def kl_parts_table(rows: Sequence[Row]) -> Table | None:
    """Returns KL(policy || BoN) of each trained policy and its parts.

    Args:
        rows: The rows of a split, in the order of the file; those of an older file have no parts.

    Returns:
        The table, a group of rows for each policy and temperature; None where no row has parts.
    """
    cells: list[tuple[str, ...]] = []
    rules = []
    for row in rows:
        if row["policy"] in ("reference", "bon") or row.get("kl_lost_by_quantile") is None:
            continue
        rules.append(len(cells))
        head = (display_name(row["policy"]), number(row["n"], "g"), number(row["temperature"], "g"))
        for name, key in (("KL(·‖BoN)", "kl_bon"), ("excess", "kl_excess"), ("lost", "kl_lost")):
            cells.append((*head, name, with_interval(row[key], row[f"{key}_ci95"]), "", ""))
        cells += [
            (
                *head,
                f"lost, F {part['from']:g} to {part['to']:g}",
                with_interval(part["lost"], part["lost_ci95"]),
                f"{part['policy']:.1%}",
                f"{part['bon']:.1%}",
            )
            for part in row["kl_lost_by_quantile"]
        ]
    if not cells:
        return None
    return Table(
        columns=(
            *RESULTS_COLUMNS[:3],
            Column("part", "left"),
            Column("nats"),
            Column("its responses"),
            Column("BoN's"),
        ),
        rows=tuple(cells),
        title="KL to best-of-n and its parts (±: half the 95% interval)",
        caption="KL(·‖BoN) is the sum of the excess, KL(·‖ref) - KL(BoN‖ref), and of what is lost, "
        "the mean of log(BoN/ref) over BoN's responses less that over its own; the latter also by "
        "F, the quantile of a response's reward under the reference, with the shares of responses "
        "there. After ± half the 95% interval over prompts; nats per response.",
        row_heads=4,
        rules=tuple(rules[1:]),
    )


def markdown_table(rows: Sequence[Row]) -> str:
    """Returns `results_table` as Markdown.

    Args:
        rows: The rows of a split, in the order of ``evaluation.json``.

    Returns:
        A Markdown table that ends with a newline.

    Raises:
        InputError: A row lacks a key.
    """
    return markdown(results_table(rows))


def bon_kls(rows: Sequence[Row]) -> str:
    """Returns KL(BoN || ref) estimated in three ways, for each row of best-of-n.

    The three are the bound log n - (n-1)/n, the estimate of Beirami et al., and E_bon[log ratio]
    with half its 95% interval over prompts.

    Args:
        rows: The rows of a split of ``evaluation.json``.

    Returns:
        A line for each row of best-of-n; empty where there is none.
    """
    texts = []
    for row in rows:
        if row["policy"] == "bon":
            direct = with_interval(row["kl_direct"], row["kl_direct_ci95"])
            texts.append(
                f"KL(BoN‖ref), n = {row['n']:g}, T = {row['temperature']:g}, nats: bound "
                f"{row['kl_bound']:.3f}, Beirami et al. {row['kl_beirami']:.3f}, "
                f"direct (mean log ratio) {direct}\n"
            )
    return "\n".join(texts)


def exact_family_table(rows: Sequence[dict[str, float]]) -> Table:
    """Returns the exact results of a family of policies, a row for each n.

    Args:
        rows: "n" and the figures of `evaluation.exact.figures`, of each n.

    Returns:
        The table.
    """
    keys = ("kl_bon", "reference_kl_bon", "kl_ref", "bon_kl", "win_rate", "bon_win_rate")
    heads = {"win_rate": "win rate", "bon_win_rate": "BoN's"}
    columns = [
        Column(heads.get(key, EXACT_LABELS[key].replace(", nats", ",\nnats"))) for key in keys
    ]
    return Table(
        columns=(Column("n"), *columns),
        rows=tuple((number(row["n"], "g"), *(number(row[key]) for key in keys)) for row in rows),
        title="One policy for every n (exact)",
        caption="Exact figures of the policies of one family, by enumeration of all responses; "
        "KL in nats.",
    )


def exact_table(exact: dict[str, float]) -> Table:
    """Returns what enumerating every response gives for the run's own policy.

    Args:
        exact: The value of "exact" in ``evaluation.json``.

    Returns:
        A table of quantities and values; quantities without a known label come last, by their key.
    """
    known = [key for key in EXACT_LABELS if key in exact]
    keys = [*known, *(key for key in exact if key not in EXACT_LABELS)]
    return Table(
        columns=(Column("quantity", "left"), Column("value")),
        rows=tuple((EXACT_LABELS.get(key, key), number(exact[key], ".4f")) for key in keys),
        title="Exact, by enumeration",
        caption="This run's own policy, exact by enumeration of every response.",
    )


def convergence_table(result: dict[str, Any]) -> Table:
    """Returns Table 1 of the paper: how many reference samples are enough to estimate log F.

    The columns "rejected, statistic" and "rejected, p-value" are means over the prompts for which
    the test rejects, "n/a" where there is none. The recommended m stands out.

    Args:
        result: The content of ``convergence.json``.

    Returns:
        The table, one row for each m.
    """
    rows = result["rows"]
    return Table(
        columns=(
            Column("m"),
            Column("rejected"),
            Column("statistic,\nrejected"),
            Column("p-value,\nrejected"),
            Column("statistic,\nall prompts"),
        ),
        rows=tuple(
            (
                str(row["m"]),
                f"{row['rejected']:.2%}",
                number(row["statistic"]),
                number(row["p_value"]),
                number(row["mean_statistic"]),
            )
            for row in rows
        ),
        title=f"m samples per prompt against all {result['m_full']}, "
        f"{result['prompts']:,} prompts, T = {result['temperature']:g}",
        caption=f"Table 1: two-sample Kolmogorov-Smirnov test of m against {result['m_full']} "
        f"samples at level {result['level']:g} and temperature {result['temperature']:g}, over "
        f"{result['prompts']:,} prompts; n/a: no prompt was rejected.",
        strong=tuple(at for at, row in enumerate(rows) if row["m"] == result["recommended"]),
    )


def samples_table(workdir: Path, count: int) -> str:
    """Returns one response of each policy to the first prompts, side by side, as Markdown.

    The policies are in the order reference, trained, BoN. Of several temperatures the first in the
    file is shown, of several responses to a prompt the first. Nothing is cut: line ends become
    ``<br>`` and characters that Markdown would act on are escaped.

    Args:
        workdir: The folder that holds ``evaluation_samples.jsonl``.
        count: The number of prompts, by id, at least 1; all of them where there are fewer.

    Returns:
        A line with the temperature and the table, which ends with a newline.

    Raises:
        InputError: The file is missing or at fault, a policy has no response to one of the prompts,
            or ``count`` is below 1.
    """
    if count < 1:
        raise InputError(f"count={count} prompts to show: give at least 1")
    samples = read_samples(workdir)
    temperature = samples[0]["temperature"]
    samples = [sample for sample in samples if sample["temperature"] == temperature]
    policies = policies_in_order(samples)
    first: dict[Any, Row] = {}
    for sample in samples:
        first.setdefault((sample["prompt_id"], sample["policy"]), sample)
    rows = []
    for prompt_id in sorted({sample["prompt_id"] for sample in samples})[:count]:
        missing = [name for name in policies if (prompt_id, name) not in first]
        if missing:
            path = Path(workdir) / "evaluation_samples.jsonl"
            raise InputError(
                f"{path}: prompt {prompt_id!r} has no response of {missing[0]!r} at temperature "
                f"{temperature:g}; run `vbon evaluate` again"
            )
        answers = [first[prompt_id, name] for name in policies]
        cells = [(answer["response"], f"{answer['reward']:.2f}") for answer in answers]
        rows.append((answers[0]["prompt"], *(cell for pair in cells for cell in pair)))
    heads = [head for name in policies for head in (display_name(name), "reward")]
    columns = tuple(Column(head, "left") for head in ("prompt", *heads))
    return f"Temperature {temperature:g}.\n\n{markdown(Table(columns, tuple(rows)))}"
