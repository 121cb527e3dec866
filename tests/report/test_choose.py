"""Which n to trust, on the screen, as a figure and on the page."""

import json
import re

import numpy as np
import pytest
from matplotlib.image import imread

from tests.report.conftest import LOOKS, ci
from vbon_jax.errors import InputError
from vbon_jax.report import choose, document, results

M = 12


def row(family, n, kl, mean, **changed):
    """A row whose band is 0.1 wide to either side; it lies 2 - mean below the peak."""
    below = 0.0 if (family, n) == ("bon", 6) else 0.05
    return {
        "family": family, "n": float(n), "rate": None, "temperature": None, "kl_ref": kl,
        "reward": 1.5 * mean, "win_rate": 0.5 + kl / 5,
        "evaluator_reward": mean, "evaluator_reward_band": ci(mean, 0.1),
        "evaluator_win_rate": 0.5 + mean / 10, "evaluator_win_rate_band": ci(0.5 + mean / 10, 0.02),
        "below_peak": [2 - mean, 2 - mean - below, 2 - mean + below],
    } | changed  # fmt: skip


def chosen(**changed):
    """It rises to n = 6 and falls beyond; 5 is recommended, 9 over-optimised."""
    rows = [row("bon", n, np.log(n) - (n - 1) / n, 2 - 0.05 * abs(n - 6)) for n in range(1, M + 1)]
    rows += [row("poisson", 1 + r, r / 4, 1 + r / 5, rate=r) for r in (0.5, 1.0, 2.0)]
    for n in (8, M):
        rows += [row("soft", n, 1 / t, 1.8 - t / n, temperature=t) for t in (2.0, 1.0, 0.5)]
    return {
        "temperature": 1.0, "prompts": 1200, "n_max": M, "level": 0.95, "peak": 6, "recommended": 5,
        "over_optimised_from": 9, "over_optimised_to": 11, "falls_short": [0.05, 0.0, 0.1],
        "why": "Because <it> is so.",
        "win_rate": {"peak": 6, "recommended": 5, "over_optimised_from": None},
        "rows": rows,
    } | changed  # fmt: skip


POLICY = {
    "policy": "vbon", "n": 8.0, "temperature": 1.0, "kl_ref": 1.25, "evaluator_reward": 1.7,
    "evaluator_reward_ci95": [1.66, 1.74], "evaluator_win_rate": 0.68,
    "evaluator_win_rate_ci95": [0.67, 0.69],
}  # fmt: skip


@pytest.fixture
def workdir(full_workdir):
    """A single run with an evaluator whose n was chosen."""
    for name in ("sweep.jsonl", "sweep_samples.jsonl", "tabular.json", "convergence.json"):
        (full_workdir / name).unlink()
    (full_workdir / "choose.json").write_text(json.dumps(chosen()))
    evaluation = json.loads((full_workdir / "evaluation.json").read_text())
    for own in evaluation["rows"]:
        if own["policy"] == "vbon":
            own |= POLICY
    (full_workdir / "evaluation.json").write_text(json.dumps(evaluation))
    return full_workdir


def test_the_table_has_the_powers_of_two_and_every_n_spoken_of():
    shown = choose.table(chosen(), [POLICY], LOOKS)
    assert [cells[1] for cells in shown.rows] == [
        "1", "2", "4", "5", "6", "8", "9", "12", "3", "8", "12", "",
    ]  # fmt: skip
    assert shown.strong == (3,) and shown.rules == (8, 11)
    assert shown.rows[3] == ("BoN", "5", "0.809", "1.950 ± 0.100", "0.050 ± 0.050", "0.695 ± 0.020")
    assert shown.rows[4][4] == "the peak"
    # Of the others the setting that the evaluator likes best.
    assert shown.rows[8][0] == "BoPoisson, rate 2" and shown.rows[9][0] == "soft BoN, T = 0.5"
    assert shown.rows[11] == ("vBoN", "", "1.250", "1.700 ± 0.040", "", "0.680 ± 0.010")
    assert "1,200 held-out prompts with 12 samples each, T = 1" in shown.title
    assert choose.table(chosen(over_optimised_from=None), [], LOOKS).rules == (7,)


def lines_of(ax):
    return {line.get_label(): line.get_xydata() for line in ax.get_lines()}


def test_the_figure_shows_every_family_against_n_and_kl():
    result = chosen()
    figure = choose.draw(result, [POLICY], LOOKS)
    by_n, by_kl, wins_by_n, wins_by_kl = figure.axes
    bon = result["rows"][:M]
    for ax, x, y in (
        (by_n, "n", "evaluator_reward"), (by_kl, "kl_ref", "evaluator_reward"),
        (wins_by_n, "n", "evaluator_win_rate"), (wins_by_kl, "kl_ref", "evaluator_win_rate"),
    ):  # fmt: skip
        seen = lines_of(ax)
        np.testing.assert_allclose(seen["BoN"], [(r[x], r[y]) for r in bon])
        np.testing.assert_allclose(seen["BoN, peak n = 6"], [(bon[5][x], bon[5][y])])
        np.testing.assert_allclose(seen["BoN, recommended n = 5"], [(bon[4][x], bon[4][y])])
        poisson = [(r[x], r[y]) for r in result["rows"] if r["family"] == "poisson"]
        np.testing.assert_allclose(seen["best-of-Poisson"], poisson)
        assert ("soft BoN of 12, by temperature" in seen) == (x == "kl_ref")
        (grey,) = [p for p in ax.patches if p.get_label() == "over-optimised"]
        assert grey.get_x() == bon[8][x] and grey.get_x() + grey.get_width() == bon[10][x]
        own = [c for c in ax.containers if c.get_label() == "vBoN (its own 95% interval)"]
        assert len(own) == (x == "kl_ref")
    by_reward = [(r["n"], r["win_rate"]) for r in bon]
    np.testing.assert_allclose(lines_of(wins_by_n)["BoN, win rate by the reward itself"], by_reward)
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert len(texts) == len(set(texts)) == 11
    without = choose.draw(chosen(over_optimised_from=None), [], LOOKS)
    assert not [p for ax in without.axes for p in ax.patches if p.get_label() == "over-optimised"]


def test_the_page_shows_it_with_the_reason_the_figure_and_the_table(workdir):
    text = document.write(workdir, LOOKS).read_text()
    section = re.search(r'<section id="choose".*?</section>', text, re.DOTALL)[0]
    assert "Which n to trust" in section and "Because &lt;it&gt; is so." in section
    assert "peak at n = 6, recommended n = 5" in section and "1.700 ± 0.040" in section
    picture = imread(workdir / "figures" / "choose.png")
    assert picture.shape[:2] == (1200, 1650) and picture[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("evaluator", "missing"),
    [({"train": True}, True), ({"function": "a:b"}, True), ({"train": False, "path": ""}, False)],
)
def test_only_a_run_with_an_evaluator_lacks_it(workdir, evaluator, missing):
    (workdir / "choose.json").unlink()
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"evaluator": evaluator}))
    text = document.write(workdir, LOOKS).read_text()
    assert '<section id="choose"' not in text
    assert ("vbon choose --config" in text) == missing


def test_policies_are_those_that_the_evaluator_scored_at_the_temperature(workdir, tmp_path):
    assert [own["policy"] for own in choose.policies(workdir, 1.0)] == ["vbon"]
    assert choose.policies(workdir, 0.5) == []
    (tmp_path / "elsewhere").mkdir()
    assert choose.policies(tmp_path / "elsewhere", 1.0) == []


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("{", r"choose.json is not JSON .*; run `vbon choose` again"),
        ('{"rows": []}', r'choose.json has no "rows"; run `vbon choose` again'),
        (json.dumps({"rows": [{}]}), r"choose.json: key 'temperature' is missing"),
        (json.dumps(chosen(rows=[{"family": "bon"}])), r"row 0 of .*choose.json: key 'n' is"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, broken, said):
    (tmp_path / "choose.json").write_text(broken)
    with pytest.raises(InputError, match=said):
        results.read_choose(tmp_path)
