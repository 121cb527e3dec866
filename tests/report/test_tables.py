import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from vbon_jax.errors import InputError
from vbon_jax.report import tables as table

VBON = {
    "policy": "vbon",
    "n": 8.0,
    "temperature": 0.7,
    "reward": 2.5,
    "reward_ci95": [2.4, 2.6],
    "win_rate": 0.87,
    "win_rate_ci95": [0.86, 0.884],
    "kl_ref": 1.1,
    "kl_ref_ci95": [1.05, 1.15],
    "kl_bon": 0.1234,
    "responses_per_second": 1310.25,
    "tokens_per_second": 31446.0,
}
BON = VBON | {
    "policy": "bon",
    "temperature": 1.0,
    "kl_ref_ci95": None,
    "kl_bon": None,
    "responses_per_second": 38.74,
    "tokens_per_second": 930.4,
}
VBON_CELLS = [
    "vbon",
    "8",
    "0.7",
    "2.500 ± 0.100",
    "0.870 ± 0.012",
    "1.100 ± 0.050",
    "0.123",
    "1,310.2",
    "31,446",
]


def on_screen(shown, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text()


def test_cells_by_hand():
    assert table.results_cells([VBON, BON]) == [
        VBON_CELLS,
        ["BoN", "8", "1", *VBON_CELLS[3:5], "1.100", "n/a", "38.7", "930"],
    ]


def test_a_real_n_keeps_its_fraction():
    assert table.results_cells([VBON | {"n": 2.5}])[0][1] == "2.5"


def test_a_missing_key_is_named():
    with pytest.raises(InputError, match=r"row 1 of evaluation\.json: key 'kl_bon' is missing"):
        table.results_table([VBON, {k: v for k, v in BON.items() if k != "kl_bon"}])


def test_screen_and_markdown_have_the_same_cells():
    wide = on_screen(table.results_table([VBON, BON]), 120)
    for row in table.results_cells([VBON, BON]):
        assert any(all(cell in one for cell in row) for one in wide.splitlines())
    lines = table.markdown_table([VBON, BON]).splitlines()
    assert lines[0] == "| " + " | ".join(table.COLUMNS) + " |"
    assert lines[1] == "| --- |" + " ---: |" * 8
    assert lines[2] == "| " + " | ".join(VBON_CELLS) + " |"
    assert len(lines) == 4


def test_nothing_is_cut_on_80_columns():
    narrow = on_screen(table.results_table([VBON, BON]), 80)
    assert "…" not in narrow
    for row in table.results_cells([VBON, BON]):
        for part in " ".join(row).split():
            assert part in narrow


def test_a_policy_name_is_text_not_markup():
    rows = [VBON | {"policy": "[red]x|y"}]
    assert "[red]x|y" in on_screen(table.results_table(rows), 120)
    assert r"| \[red\]x\|y |" in table.markdown_table(rows)


def test_exact_table_labels_what_it_knows_and_drops_nothing():
    exact = {"kl_ref": 1.1, "kl_bon": 0.12, "win_rate": 0.87, "bon_win_rate": 0.88, "other": 2.0}
    shown = [
        [cell.strip() for cell in one.split("│")[1:3]]
        for one in on_screen(table.exact_table(exact), 80).splitlines()
        if "│" in one
    ]
    assert shown == [
        ["KL(policy‖BoN), nats", "0.1200"],
        ["KL(policy‖ref), nats", "1.1000"],
        ["win rate of the policy", "0.8700"],
        ["win rate of BoN", "0.8800"],
        ["other", "2.0000"],
    ]


def write_samples(workdir: Path, records: list[tuple]) -> None:
    keys = ("policy", "temperature", "prompt_id", "prompt", "response", "reward")
    lines = [json.dumps(dict(zip(keys, record, strict=True))) for record in records]
    (workdir / "evaluation_samples.jsonl").write_text("\n".join(lines) + "\n")


def test_samples_stand_side_by_side_in_order_of_prompt_id(tmp_path):
    long = "word " * 200
    write_samples(
        tmp_path,
        [
            ("bon", 0.7, 10, "c", "best c", 3.0),
            ("bon", 0.7, 2, "b | b", f"best\nb {long}end", 2.0),
            ("bon", 0.7, 2, "b | b", "a second one", 9.0),
            ("vbon", 0.7, 2, "b | b", "mine <unk>", 1.234),
            ("vbon", 0.7, 10, "c", "mine c", 1.5),
            ("reference", 0.7, 2, "b | b", r"a_b \n", -0.5),
            ("reference", 0.7, 10, "c", "plain c", -1.0),
            ("reference", 1.0, 1, "hot", "hot", 0.0),
        ],
    )
    lines = table.samples_table(tmp_path, 5).splitlines()
    assert lines[0] == "Temperature 0.7."
    assert lines[2] == "| prompt | reference | reward | vbon | reward | BoN | reward |"
    assert lines[4] == (
        r"| b \| b | a\_b \\n | -0.50 | mine &lt;unk> | 1.23 | "
        f"best<br>b {long}end | 2.00 |"
    )
    assert lines[5] == "| c | plain c | -1.00 | mine c | 1.50 | best c | 3.00 |"
    assert len(lines) == 6
    assert len(table.samples_table(tmp_path, 1).splitlines()) == 5


def test_samples_faults_are_named(tmp_path):
    with pytest.raises(InputError, match=r"evaluation_samples\.jsonl does not exist.*evaluate"):
        table.samples_table(tmp_path, 1)
    with pytest.raises(InputError, match="count=0"):
        table.samples_table(tmp_path, 0)
    write_samples(tmp_path, [("bon", 1.0, 1, "a", "x", 0.0), ("reference", 1.0, 2, "b", "y", 0.0)])
    with pytest.raises(InputError, match="prompt 1 has no response of 'reference'"):
        table.samples_table(tmp_path, 2)


def test_bons_kl_is_told_three_ways():
    bon = BON | {
        "kl_bound": 1.2045,
        "kl_beirami": 1.19,
        "kl_direct": 1.1,
        "kl_direct_ci95": [1, 1.2],
    }
    assert table.bon_kls([VBON, bon]) == (
        "KL(BoN‖ref), n = 8, T = 1, nats: bound 1.204, Beirami et al. 1.190, "
        "direct (mean log ratio) 1.100 ± 0.100\n"
    )
    assert table.bon_kls([VBON]) == ""
