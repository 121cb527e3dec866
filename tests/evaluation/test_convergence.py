import json

import numpy as np
import pytest
from scipy import stats

from vbon_jax.errors import InputError
from vbon_jax.evaluation.convergence import convergence

MS = (5, 20, 30)
M = 60


def rewards(mixed: int, ascending: int) -> np.ndarray:
    """Rows whose first rewards are like all, and rows whose first are the lowest of all.

    Mixed are multiples of an odd step modulo a prime: any first m lie evenly among all.
    """
    even = np.argsort(np.arange(1, M + 1) * 23 % 61)
    return np.array([even] * mixed + [np.arange(M)] * ascending, float)


def study(values, ms=MS, level=0.05, temperature=1.0):
    prompts = [f"prompt {i}" for i in range(len(values))]
    return convergence(prompts, values, ms, level, temperature)


def test_rows_equal_scipy_prompt_by_prompt():
    values = np.random.default_rng(0).normal(size=(40, 50)).round(1)  # ties as well
    values[:6] = np.sort(values[:6], axis=1)
    found = study(values, ms=(20, 5), temperature=0.7)
    assert (found["m_full"], found["prompts"], found["level"], found["temperature"]) == (
        50, 40, 0.05, 0.7,
    )  # fmt: skip
    assert [row["m"] for row in found["rows"]] == [5, 20]
    for row in found["rows"]:
        tests = [stats.ks_2samp(v[: row["m"]], v) for v in values]
        rejected = [t for t in tests if t.pvalue <= 0.05]
        assert 6 <= len(rejected) < 20
        assert row["rejected"] == len(rejected) / 40
        assert row["statistic"] == pytest.approx(np.mean([t.statistic for t in rejected]))
        assert row["p_value"] == pytest.approx(np.mean([t.pvalue for t in rejected]))
        assert row["mean_statistic"] == pytest.approx(np.mean([t.statistic for t in tests]))
    assert found["recommended"] is None


def test_rejected_by_hand():
    # The lowest 20 of 60 against all 60: F_20 reaches 1 where F_60 is 1/3.
    (row,) = study(rewards(1, 1), ms=(20,))["rows"]
    assert row["rejected"] == 0.5 and row["statistic"] == pytest.approx(2 / 3)
    (row,) = study(rewards(3, 0), ms=(20,))["rows"]
    assert (row["rejected"], row["statistic"], row["p_value"]) == (0.0, None, None)
    assert 0 < row["mean_statistic"] < 0.1
    p_value = stats.ks_2samp(np.arange(20), np.arange(60)).pvalue
    assert study(rewards(0, 1), (20,), level=p_value * 1.001)["rows"][0]["rejected"] == 1
    assert study(rewards(0, 1), (20,), level=p_value * 0.999)["rows"][0]["rejected"] == 0


def test_one_in_a_thousand_is_tolerated_and_none_of_fewer():
    assert study(rewards(3, 0))["recommended"] == 5
    assert study(rewards(998, 1))["recommended"] is None
    assert study(rewards(999, 1))["recommended"] == 5
    assert study(rewards(998, 2))["recommended"] is None


def test_every_larger_m_must_do_as_well():
    # 5 evenly spread, then the lowest that are left: m = 5 is fine by chance, m = 30 is not.
    row = np.concatenate(
        [np.arange(5) * 12.0 + 5, np.setdiff1d(np.arange(60), np.arange(5) * 12 + 5)]
    )
    assert study([row, row], ms=(5,))["recommended"] == 5
    found = study([row, row], ms=(5, 30, 59))
    assert [r["rejected"] for r in found["rows"]] == [0.0, 1.0, 0.0]
    assert found["recommended"] == 59
    assert study([row, row], ms=(30, 5))["recommended"] is None


def test_why_says_the_numbers():
    assert study(rewards(3, 0), ms=(30, 40))["why"] == (
        "With m = 30 samples, 0 of 3 prompts (0.00%) differ from all 60 by the Kolmogorov-Smirnov "
        "test at level 0.05; it supports best-of-n up to n = 3, where the top 1/n of rewards holds "
        "about 10 of the m samples or more."
    )
    assert "too few for any best-of-n" in study(rewards(3, 0), ms=(19,))["why"]
    assert study(rewards(3, 1), ms=(5, 20))["why"] == (
        "Even with m = 20 samples, 1 of 4 prompts (25.00%) differ from all 60 by the "
        "Kolmogorov-Smirnov test at level 0.05, more than the 0.1% tolerated: draw more than 60 "
        "samples and ask again."
    )


def test_examples_are_the_extreme_and_the_middle_prompts_with_smoothed_log_f():
    base = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])
    shift = np.array([0.0, 20.0, -10.0, 5.0, 7.0])
    found = study(base + shift[:, None], ms=(2, 4))
    names = {e["kind"]: e["prompt"] for e in found["examples"]}
    assert names == {"low": "prompt 2", "middle": "prompt 3", "high": "prompt 1"}
    low = found["examples"][0]
    assert [curve["m"] for curve in low["curves"]] == [2, 4, 8]
    for curve in low["curves"]:
        assert curve["rewards"] == [-9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -1.0]
    # Strictly below each: of 3 1; of 3 1 4 1; of all.
    for curve, below in zip(
        low["curves"], ([0, 1, 1, 2, 2, 2, 2], [0, 2, 2, 3, 4, 4, 4], [0, 2, 3, 4, 5, 6, 7])
    ):
        k, m = np.array(below), curve["m"]
        np.testing.assert_allclose(curve["log_f"], np.log((k + 1) / (m + 1)), atol=1e-6)
    for count, kinds in ((1, ["middle"]), (2, ["low", "high"])):
        assert [e["kind"] for e in study(base + shift[:count, None], (2,))["examples"]] == kinds


def test_curves_are_few_and_of_at_most_200_points():
    values = np.random.default_rng(1).normal(size=(3, 500))
    found = study(values, ms=range(10, 500, 10))
    for example, row in zip(found["examples"], values[np.argsort(values.mean(axis=1))]):
        assert [curve["m"] for curve in example["curves"]] == [10, 170, 330, 490, 500]
        for curve in example["curves"]:
            assert len(curve["rewards"]) == len(curve["log_f"]) == 200
            assert (curve["rewards"][0], curve["rewards"][-1]) == (row.min(), row.max())
            assert np.all(np.diff(curve["rewards"]) > 0) and np.all(np.diff(curve["log_f"]) >= 0)
    assert json.loads(json.dumps(found)) == found


def test_constant_rewards_have_one_point_and_no_rejection():
    found = study(np.zeros((2, 10)), ms=(1, 9))
    assert found["recommended"] == 1
    assert [r["mean_statistic"] for r in found["rows"]] == [0.0, 0.0]
    assert found["examples"][0]["curves"][0] == {
        "m": 1, "rewards": [0.0], "log_f": [pytest.approx(np.log(1 / 2))],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("prompts", "values", "ms", "level", "message"),
    [
        (["a"], np.zeros((2, 5)), (1,), 0.05, r"shape \(2, 5\) for 1 prompts"),
        ([], np.zeros((0, 5)), (1,), 0.05, r"shape \(0, 5\) for 0 prompts"),
        (["a"], np.zeros(5), (1,), 0.05, r"shape \(5,\)"),
        (["a"], [[1.0, np.nan, -np.inf, 2.0]], (1,), 0.05, "2 of 4 rewards are not finite"),
        (["a"], np.zeros((1, 5)), (3, 5), 0.05, "m = 5 cannot .* all 5 .* from 1 to 4"),
        (["a"], np.zeros((1, 5)), (0, 3), 0.05, "m = 0 cannot"),
        (["a"], np.zeros((1, 5)), (), 0.05, r"m = \(\) cannot"),
        (["a"], np.zeros((1, 5)), (3,), 0.0, "level = 0.0 of"),
        (["a"], np.zeros((1, 5)), (3,), 1.0, "level = 1.0 of"),
        (["a"], np.zeros((1, 5)), (3,), float("nan"), "level = nan of"),
    ],
)
def test_faults_are_named(prompts, values, ms, level, message):
    with pytest.raises(InputError, match=message):
        convergence(prompts, values, ms, level, 1.0)
