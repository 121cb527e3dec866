"""Which n to trust: each figure against a slow one, the rule by hand, and known worlds."""

import numpy as np
import pytest

from tests.evaluation import worlds
from vbon_jax.bon import pool, soft, theory
from vbon_jax.errors import InputError
from vbon_jax.evaluation import bands, choose

PROMPTS, M = 40, 24


def scored(kind, prompts=PROMPTS, m=M, seed=0, order=None):
    """A pool and its opponents, all drawn anew."""
    rng = np.random.default_rng(seed)
    world = worlds.population(kind)
    rewards, values = worlds.drawn(world, prompts, 2 * m, rng)
    return choose.Pool(
        rewards[:, :m], values[:, :m], np.sort(rewards[:, m:]), np.sort(values[:, m:]), order
    )


@pytest.fixture(scope="module")
def hacked():
    return choose.choose(scored("hacked", 200), 8.0, 0.7, seed=3)


def test_every_setting_is_the_mean_by_its_weights(rng):
    samples = scored("hacked", 6)
    values = samples.evaluator_PxM
    opponents = samples.evaluator_opponents_PxO
    wins = np.array([
        [(np.mean(o < v) + np.mean(o <= v)) / 2 for v in row] for row, o in zip(values, opponents)
    ])  # fmt: skip
    found = choose.settings(samples, 8.0)
    assert [s.n for s in found if s.family == "bon"] == list(range(1, M + 1))
    assert [s.rate for s in found if s.family == "poisson"] == [0.5, 1.0, 2.0, 4.0]  # of 24 samples
    assert [s.n for s in found if s.family == "soft"] == [8.0] * 6 + [24.0] * 6
    for s in found:
        if s.family == "bon":
            weights = pool.winner_weights(samples.rewards_PxM, int(s.n))
        elif s.family == "soft":
            weights = soft.weights(samples.rewards_PxM, int(s.n), s.temperature)
        else:
            chance, weights = np.exp(-s.rate), 0.0
            for k in range(M):
                weights = weights + chance * pool.winner_weights(samples.rewards_PxM, k + 1)
                chance *= s.rate / (k + 1)
        np.testing.assert_allclose(
            s.means["evaluator_reward"], (weights * values).sum(1), atol=1e-5
        )
        np.testing.assert_allclose(
            s.means["evaluator_win_rate"], (weights * wins).sum(1), atol=1e-6
        )


def test_temperatures_are_in_standard_deviations_of_the_reward():
    samples = scored("hacked")
    scale = np.sqrt(np.mean([np.var(row) for row in samples.rewards_PxM.astype(float)]))
    got = [s.temperature / scale for s in choose.settings(samples, 24.0) if s.family == "soft"]
    np.testing.assert_allclose(got, choose.SOFTNESS)
    for n in (1.0, 2.5, 24.0, 99.0):  # no second n where the pool has none such
        assert {s.n for s in choose.settings(samples, n) if s.family == "soft"} == {24.0}


def test_kl_without_ties_is_the_closed_form_of_each_family():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(3, M)).astype(np.float32)
    samples = choose.Pool(rewards, rewards, np.sort(rewards), np.sort(rewards))
    for s in choose.settings(samples, 8.0):
        if s.family == "bon":
            np.testing.assert_allclose(s.kl_P, float(theory.kl_upper_bound(s.n)), atol=1e-6)
        if s.family == "poisson" and s.rate == 4.0:
            np.testing.assert_allclose(s.kl_P, 0.673937, atol=1e-6)  # by quadrature
    tied = choose.Pool(np.zeros_like(rewards), rewards, np.sort(rewards), np.sort(rewards))
    for s in choose.settings(tied, 8.0):
        np.testing.assert_allclose(s.kl_P, 0.0, atol=1e-12)
        assert s.means["reward"] == pytest.approx(0.0, abs=1e-12)
    # An order that breaks every tie makes them distinct again.
    places = np.argsort(rng.random(rewards.shape), axis=1)
    ordered = choose.Pool(tied.rewards_PxM, rewards, np.sort(rewards), np.sort(rewards), places)
    last = [s for s in choose.settings(ordered, 8.0) if s.family == "bon"][-1]
    np.testing.assert_allclose(last.kl_P, float(theory.kl_upper_bound(M)), atol=1e-6)


def test_an_evaluator_that_turns_against_the_reward_is_found_out(hacked):
    truth_K = worlds.true_curve(worlds.population("hacked"), M)
    best = int(truth_K.argmax()) + 1
    assert abs(hacked["peak"] - best) <= 1 and 1 < hacked["recommended"] <= hacked["peak"]
    worse = hacked["over_optimised_from"]
    assert hacked["peak"] < worse <= M and truth_K[worse - 1] < truth_K[hacked["peak"] - 1]
    assert f"over-optimised from n = {worse} on: " in hacked["why"]
    assert hacked["over_optimised_to"] == M
    assert f"n = {hacked['recommended']} " in hacked["why"]
    rows = hacked["rows"][:M]
    for row, truth in zip(rows, truth_K):
        low, high = row["evaluator_reward_band"]
        assert low < truth < high
        mean, low, high = row["below_peak"]
        assert low <= mean <= high and (high > low) == (row["n"] != hacked["peak"])
        assert (low > 0) == (row["n"] < hacked["recommended"] or row["n"] >= worse)
    np.testing.assert_allclose(hacked["falls_short"], rows[hacked["recommended"] - 1]["below_peak"])
    assert (np.diff([row["reward"] for row in rows]) > 0).all()  # the reward itself sees nothing
    assert hacked["prompts"] == 200 and hacked["n_max"] == M and hacked["temperature"] == 0.7


def test_a_hedge_is_as_good_as_the_peak_where_best_of_the_whole_pool_is_not(hacked):
    whole = [r for r in hacked["rows"] if r["family"] == "soft" and r["n"] == M]
    assert max(r["evaluator_reward"] for r in whole) > hacked["rows"][M - 1]["evaluator_reward"]
    assert (np.diff([r["kl_ref"] for r in whole]) > 0).all()  # ever colder


def test_the_evaluator_that_is_the_reward_trusts_every_n():
    samples = scored("hacked", 200)
    same = choose.Pool(
        samples.rewards_PxM, samples.rewards_PxM, samples.opponents_PxO, samples.opponents_PxO
    )
    found = choose.choose(same, 8.0, 1.0)
    assert found["over_optimised_from"] is None and found["peak"] == M
    assert found["why"].startswith(f"No over-optimisation seen up to n = {M}. ")
    for row in found["rows"]:
        assert row["reward"] == row["evaluator_reward"]
        assert row["win_rate"] == row["evaluator_win_rate"]


def test_an_evaluator_that_knows_nothing_of_the_reward_recommends_the_reference():
    found = choose.choose(scored("flat", 100), 8.0, 1.0)
    assert found["recommended"] == 1 and found["over_optimised_from"] is None
    assert "best-of-n is not seen to gain anything" in found["why"]


def test_the_seed_alone_decides():
    samples = scored("hacked", 20)
    first, again, other = (choose.choose(samples, 8.0, 1.0, seed) for seed in (1, 1, 2))
    assert first == again != other


def found_bands(means, half):
    means = np.asarray(means, float)
    return bands.Bands(
        means, np.full(len(means), half), means[:, None] - means, np.full((len(means),) * 2, half)
    )


@pytest.mark.parametrize(
    ("means", "half", "want"),
    [
        ([0.0, 0.5, 0.9, 1.0, 0.95, 0.7, 0.2], 0.2, (4, 3, 6, 7)),
        ([0.0, 0.5, 0.9, 1.0, 0.95, 0.85, 0.81], 0.2, (4, 3, None, None)),
        ([0.0, 0.5, 0.9, 1.0, 0.95, 0.85, 0.81], 2.0, (4, 1, None, None)),
        ([0.0, 0.5, 0.9, 1.0], 0.05, (4, 4, None, None)),
        ([1.0, 0.9, 0.5, 0.95], 0.3, (1, 1, 3, 3)),  # 4 is not told apart
        ([0.3, 0.3, 0.3], 0.0, (1, 1, None, None)),
    ],
)
def test_the_rule_by_hand(means, half, want):
    assert choose.decide(found_bands(means, half), len(means)) == want


def test_words_for_each_outcome():
    means = np.linspace(0.1, 0.8, 8)

    def said(*decision, m=8):
        return choose.why(choose.Decision(*decision), m, means, [0.1, -0.2, 0.4])

    assert said(6, 4, None, None) == (
        "No over-optimisation seen up to n = 8. n = 4 is the smallest whose mean of the evaluator "
        "(0.400) is not told apart from the highest (0.600, at n = 6); it is at most 0.400 lower "
        "(95% bands, all n at once)."
    )
    assert "from n = 7 on: the evaluator's mean is lower there than at its peak, n = 6. " in said(
        6, 4, 7, 8
    )
    assert "from n = 7 to n = 7: " in said(6, 4, 7, 7)
    assert "n = 6 has the highest mean of the evaluator (0.600), and every smaller n is" in said(
        6, 6, None, None
    )
    assert "mean of the evaluator (0.100) of n = 1, the reference itself, is not told apart" in (
        said(6, 1, None, None)
    )
    assert "n = 1, the reference itself, has the highest" in (nothing := said(1, 1, 2, 8))
    assert "so that best-of-n is not seen to gain anything (95%" in nothing


def test_settings_beside_best_of_n_are_never_its_peak():
    assert choose.decide(found_bands([0.0, 1.0, 0.5, 9.0], 0.1), 3) == (2, 2, 3, 3)


def test_too_few_prompts_and_scores_without_a_number_are_refused():
    with pytest.raises(
        InputError, match=r"^9 held-out prompts: .* at least 10; raise prompts.test"
    ):
        choose.choose(scored("hacked", 9), 8.0, 1.0)
    samples = scored("hacked", 10)
    for name in ("reward", "evaluator"):
        broken = scored("hacked", 10)
        getattr(broken, {"reward": "rewards_PxM"}.get(name, "evaluator_PxM"))[0, :2] = np.nan
        with pytest.raises(InputError, match=f"2 of 240 scores of the {name} are not finite"):
            choose.choose(broken, 8.0, 1.0)
    assert choose.choose(samples, 8.0, 1.0)["prompts"] == 10
