import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from vbon_jax.errors import InputError
from vbon_jax.report import tables as table
from vbon_jax.report.table import Column, Table, column_groups, markdown

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
    assert table.results_table([VBON, BON]).rows == (
        tuple(VBON_CELLS),
        ("BoN", "8", "1", *VBON_CELLS[3:5], "1.100", "n/a", "38.7", "930"),
    )


def test_kl_to_best_of_n_has_its_interval():
    rows = [VBON | {"kl_bon_ci95": [0.0934, 0.1534]}, BON | {"kl_bon_ci95": None}]
    cells = [row[6] for row in table.results_table(rows).rows]
    assert cells == ["0.123 ± 0.030", "n/a"]


def test_parts_of_the_kl_to_best_of_n_by_hand(kl_parts):
    """A group of rows for each policy that was trained, at each temperature."""
    own = VBON | kl_parts(0.25)
    assert table.kl_parts_table([VBON, BON, own | {"policy": "reference"}]) is None
    found = table.kl_parts_table([BON, own, own | {"temperature": 1.0}])
    assert len(found.rows) == 14 and found.rules == (7,)
    assert found.rows[2] == ("vbon", "8", "0.7", "lost", "0.200 ± 0.025", "", "")
    assert found.rows[6] == (
        "vbon", "8", "0.7", "lost, F 0.9 to 1", "0.050 ± 0.010", "56.0%", "57.0%"
    )  # fmt: skip
    assert found.rows[7][:5] == ("vbon", "8", "1", "KL(·‖BoN)", "0.250 ± 0.030")
    shown = on_screen(found, 80).splitlines()
    assert sum(line.startswith("vbon") for line in shown) == 14  # in one piece


def test_a_real_n_keeps_its_fraction():
    assert table.results_table([VBON | {"n": 2.5}]).rows[0][1] == "2.5"


def test_a_missing_key_is_named():
    with pytest.raises(InputError, match=r"row 1 of evaluation\.json: key 'kl_bon' is missing"):
        table.results_table([VBON, {k: v for k, v in BON.items() if k != "kl_bon"}])


def test_screen_and_markdown_have_the_same_cells():
    wide = on_screen(table.results_table([VBON, BON]), 120)
    for row in table.results_table([VBON, BON]).rows:
        assert any(all(cell in one for cell in row) for one in wide.splitlines())
    lines = table.markdown_table([VBON, BON]).splitlines()
    assert lines[0] == (
        "| policy | n | T | reward | win rate | KL(·‖ref), nats | KL(·‖BoN), nats | responses/s | "
        "tokens/s |"
    )
    assert lines[1] == "| --- |" + " ---: |" * 8
    assert lines[2] == "| " + " | ".join(VBON_CELLS) + " |"
    assert len(lines) == 4


def rows_of(temperature: float, n: float) -> list[dict]:
    """Reference, best-of-n and policy as an evaluation of a large model has them."""
    measured = {
        "reward": -12.345, "reward_ci95": [-12.468, -12.222],
        "win_rate": 0.5, "win_rate_ci95": [0.4, 0.6],
        "kl_ref": 10.234, "kl_ref_ci95": [10.0, 10.468],
        "kl_bon": 11.501, "responses_per_second": 1105.49, "tokens_per_second": 132681.1,
    }  # fmt: skip
    return [
        {"policy": policy, "n": n, "temperature": temperature} | measured
        for policy in ("reference", "bon", "vbon")
    ]


LARGE = ["-12.345 ± 0.123", "0.500 ± 0.100", "10.234 ± 0.234", "11.501", "1,105.5", "132,681"]
SMALL = [one | {"reward": 1.74, "reward_ci95": [1.694, 1.786], "kl_ref": 1.2, "kl_bon": 5.4,
                "kl_ref_ci95": [1.1, 1.3], "tokens_per_second": 32681.0}
         for one in rows_of(1.0, 8.0)]  # fmt: skip


def test_a_usual_evaluation_has_all_but_its_speed_at_a_glance_on_80_columns():
    rows = [row | {"kl_bon_ci95": [5.377, 5.423]} for row in SMALL]
    shown = [line for line in on_screen(table.results_table(rows), 80).splitlines() if line[:1]]
    assert shown[0] == "Held-out prompts (±: half the 95% interval)"
    own = [line for line in shown if line.startswith("vbon")]
    numbers = "1.740 ± 0.046 0.500 ± 0.100 1.200 ± 0.100 5.400 ± 0.023"
    assert [" ".join(line.split()) for line in own] == [
        f"vbon 8 1 {numbers}", "vbon 8 1 1,105.5 32,681"
    ]  # fmt: skip
    wide = on_screen(table.results_table(rows), 90).splitlines()
    assert sum(line.startswith("vbon") for line in wide) == 1


@pytest.mark.parametrize("width", [80, 60, 40])
def test_no_number_is_broken_however_narrow_the_screen(width):
    """Two temperatures, and all nine columns at their widest."""
    rows = [*rows_of(0.25, 128.0), *rows_of(1.0, 128.0)]
    shown = on_screen(table.results_table(rows), width)
    assert "…" not in shown and max(len(line) for line in shown.splitlines()) <= width
    for name in ("reference", "BoN", "vbon"):
        for temperature in ("0.25", "1"):
            parts = [
                line
                for line in shown.splitlines()
                if line.split()[:3] == [name, "128", temperature]
            ]
            assert len(parts) > 1  # it does not fit at once, so that the row heads are repeated
            for cell in LARGE:
                assert sum(cell in part for part in parts) == 1, cell
    numbers = [line for line in shown.splitlines() if "±" in line and "half" not in line]
    assert all(line.split()[0] in ("reference", "BoN", "vbon") for line in numbers)


def test_a_line_stands_between_temperatures():
    table_2 = table.results_table([*rows_of(0.25, 8.0), *rows_of(1.0, 8.0)])
    assert table_2.rules == (3,)
    lines = on_screen(table_2, 200).splitlines()
    at = [number for number, line in enumerate(lines) if line.startswith("vbon")]
    assert not lines[at[0] + 1].strip() and lines[at[0] + 2].startswith("reference")


def test_columns_are_set_closer_before_they_are_split():
    assert column_groups([5, 5, 5], 1, 19) == (2, [(0, 1, 2)])
    assert column_groups([5, 5, 5], 1, 18) == (1, [(0, 1, 2)])
    assert column_groups([5, 5, 5], 1, 17) == (1, [(0, 1, 2)])
    assert column_groups([5, 5, 5], 1, 16) == (2, [(0, 1), (0, 2)])
    assert column_groups([5, 2, 5, 4, 9], 2, 22) == (2, [(0, 1, 2, 3), (0, 1, 4)])
    assert column_groups([5, 30, 5], 1, 16) == (2, [(0, 1), (0, 2)])


def test_text_gives_way_to_numbers():
    columns = (Column("name", "left"), Column("value"))
    shown = on_screen(Table(columns, (("some words of a name", "10.000 ± 0.100"),)), 21)
    assert shown.splitlines()[2].split() == ["some", "10.000", "±", "0.100"]
    assert all(word in shown for word in ("words", "of a", "name"))


def test_text_is_wrapped_and_other_rows_stand_out():
    columns = (Column("name", "left"), Column("the\nvalue", narrow="v"))
    shown = Table(columns, (("a long name of six words", "1.5"), ("[b]", "20")), strong=(1,))
    assert [line.split() for line in on_screen(shown, 18).splitlines() if line.strip()] == [
        ["name", "v"], ["─" * 18], ["a", "long", "name", "1.5"], ["of", "six", "words"],
        ["[b]", "20"],
    ]  # fmt: skip
    console = Console(width=40, force_terminal=True, color_system="standard", file=io.StringIO())
    console.print(shown)
    styled = console.file.getvalue().splitlines()
    assert "\x1b[1m" in styled[-2] and "\x1b[1m" not in styled[-3]
    assert markdown(shown).splitlines()[0] == "| name | the value |"
    with pytest.raises(ValueError, match="2 cells for 1 columns"):
        Table(columns[:1], (("a", "b"),))


def test_a_policy_name_is_text_not_markup():
    rows = [VBON | {"policy": "[red]x|y"}]
    assert "[red]x|y" in on_screen(table.results_table(rows), 120)
    assert r"| \[red\]x\|y |" in table.markdown_table(rows)


def test_exact_table_labels_what_it_knows_and_drops_nothing():
    exact = {"kl_ref": 1.1, "kl_bon": 0.12, "win_rate": 0.87, "bon_win_rate": 0.88, "other": 2.0}
    shown = [one.rsplit(maxsplit=1) for one in on_screen(table.exact_table(exact), 80).splitlines()]
    assert shown[:3] == [["Exact, by", "enumeration"], ["quantity", "value"], ["─" * 30]]
    assert shown[3:-1] == [
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


FOUND = {
    "m_full": 60, "prompts": 1200, "level": 0.05, "temperature": 1.0, "recommended": 59,
    "rows": [
        {"m": 20, "rejected": 0.25, "statistic": 0.6666, "p_value": 0.0004, "mean_statistic": 0.3},
        {"m": 59, "rejected": 0.0, "statistic": None, "p_value": None, "mean_statistic": 0.01},
    ],
}  # fmt: skip


def test_the_study_of_samples_on_80_columns():
    shown = table.convergence_table(FOUND)
    lines = [line.split() for line in on_screen(shown, 80).splitlines() if line.strip()]
    title = "m samples per prompt against all 60, 1,200 prompts, T = 1"
    assert " ".join(lines[0]) == title
    assert lines[-2] == ["20", "25.00%", "0.667", "0.000", "0.300"]
    assert lines[-1] == ["59", "0.00%", "n/a", "n/a", "0.010"]
    assert shown.strong == (1,)
    assert table.convergence_table(FOUND | {"recommended": None}).strong == ()
