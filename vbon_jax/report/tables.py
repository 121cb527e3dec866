"""Evaluation as tables: for the screen (rich) and as Markdown."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from vbon_jax.data import jsonl
from vbon_jax.errors import InputError
from vbon_jax.report.results import display_name, read_samples

COLUMNS = (
    "policy",
    "n",
    "T",
    "reward",
    "win rate",
    "KL(·‖ref), nats",
    "KL(·‖BoN), nats",
    "responses/s",
    "tokens/s",
)
MISSING = "n/a"
EXACT_LABELS = {
    "kl_bon": "KL(policy‖BoN), nats",
    "reference_kl_bon": "KL(reference‖BoN), nats",
    "kl_ref": "KL(policy‖ref), nats",
    "bon_kl": "KL(BoN‖ref), nats",
    "win_rate": "win rate of the policy",
    "bon_win_rate": "win rate of BoN",
}


def results_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One list of texts a row, in the order of `COLUMNS`.

    After "±" stands half the width of the 95% interval over prompts; "n/a" is a number that was not
    measured (null in the file).

    Args:
      rows: the rows of ``evaluation.json``.

    Raises InputError: a row lacks a key.
    """
    cells = []
    for number, row in enumerate(rows):
        value = partial(jsonl.field, row, where=f"row {number} of evaluation.json")
        cells.append(
            [
                display_name(value("policy")),
                _plain(value("n"), "g"),
                _plain(value("temperature"), "g"),
                _plus_minus(value("reward"), value("reward_ci95")),
                _plus_minus(value("win_rate"), value("win_rate_ci95")),
                _plus_minus(value("kl_ref"), value("kl_ref_ci95")),
                _plain(value("kl_bon"), ".3f"),
                _plain(value("responses_per_second"), ",.1f"),
                _plain(value("tokens_per_second"), ",.0f"),
            ]
        )
    return cells


def _plain(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _plus_minus(value: float | None, interval: Sequence[float] | None) -> str:
    if interval is None:
        return _plain(value, ".3f")
    return f"{_plain(value, '.3f')} ± {(interval[1] - interval[0]) / 2:.3f}"


def results_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of ``evaluation.json`` for the screen; a line between temperatures.

    Raises InputError: a row lacks a key.
    """
    title = "Held-out prompts (±: half the 95% interval)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.padding = (0, 1, 0, 0)
    for column in COLUMNS:
        # On 80 columns "1.000 ± 0.100" goes on two lines; no digit is ever cut.
        table.add_column(
            column.replace(", ", "\n").replace("responses/s", "resp.\n/s").replace("s/s", "s\n/s"),
            justify="left" if column == "policy" else "right",
            overflow="fold",
            no_wrap=column in ("n", "T"),
        )
    cells = results_cells(rows)
    for at, row in enumerate(cells):
        last = at + 1 == len(cells) or rows[at + 1]["temperature"] != rows[at]["temperature"]
        table.add_row(*(escape(cell) for cell in row), end_section=last)
    return table


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """The same cells as `results_table`, as a Markdown table that ends with a newline.

    Raises InputError: a row lacks a key.
    """
    cells = [[escape_markdown(cell) for cell in row] for row in results_cells(rows)]
    return _markdown(list(COLUMNS), cells, left=1)


def bon_kls(rows: Sequence[dict[str, Any]]) -> str:
    """KL(BoN || ref) of each row of best-of-n three ways, a line each; "" where there is none.

    The bound log n - (n-1)/n, the estimate of Beirami et al., and E_bon[log ratio] with half its
    95% interval over prompts.
    """
    lines = []
    for row in rows:
        if row["policy"] == "bon":
            direct = _plus_minus(row["kl_direct"], row["kl_direct_ci95"])
            lines.append(
                f"KL(BoN‖ref), n = {row['n']:g}, T = {row['temperature']:g}, nats: bound "
                f"{row['kl_bound']:.3f}, Beirami et al. {row['kl_beirami']:.3f}, "
                f"direct (mean log ratio) {direct}\n"
            )
    return "\n".join(lines)


def exact_table(exact: dict[str, float]) -> Table:
    """What enumeration of every response gives ("exact" of ``evaluation.json``), for the screen."""
    table = Table(title="Exact, by enumeration", title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    known = [key for key in EXACT_LABELS if key in exact]
    for key in [*known, *(key for key in exact if key not in EXACT_LABELS)]:
        table.add_row(escape(EXACT_LABELS.get(key, key)), _plain(exact[key], ".4f"))
    return table


def samples_table(workdir: Path, count: int) -> str:
    """One response of each policy to the first ``count`` prompts by id, with rewards, as Markdown.

    The policies stand side by side: reference, trained ones, BoN. Of several temperatures, the
    first of the file; of several responses to a prompt, the first. Nothing is cut: line ends become
    ``<br>`` and characters that Markdown would act on are escaped.

    Args:
      workdir: holds ``evaluation_samples.jsonl``.
      count: prompts shown, at least 1; all of them where there are fewer.

    Raises InputError: the file is missing or at fault, a policy has no response to one of the
      prompts, or count is below 1.
    """
    if count < 1:
        raise InputError(f"count={count} prompts to show: give at least 1")
    samples = read_samples(workdir)
    temperature = samples[0]["temperature"]
    samples = [sample for sample in samples if sample["temperature"] == temperature]
    policies = list(dict.fromkeys(sample["policy"] for sample in samples))
    policies.sort(key=lambda name: {"reference": 0, "bon": 2}.get(name, 1))
    first: dict[Any, dict[str, Any]] = {}
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
        row = [escape_markdown(answers[0]["prompt"])]
        for answer in answers:
            row += [escape_markdown(answer["response"]), f"{answer['reward']:.2f}"]
        rows.append(row)
    head = ["prompt"]
    for name in policies:
        head += [escape_markdown(display_name(name)), "reward"]
    return f"Temperature {temperature:g}.\n\n" + _markdown(head, rows, left=len(head))


def escape_markdown(text: str) -> str:
    """Text that a cell of a Markdown table shows as it is, line ends included."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    return re.sub(r"\r\n|\r|\n", "<br>", text)


def _markdown(head: list[str], rows: list[list[str]], left: int) -> str:
    rule = ["---" if at < left else "---:" for at in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))
