"""Simultaneous bands: hand-worked cases, a slow twin, and coverage in a population that is listed.

`python -m tests.evaluation.test_bands` prints the coverage that docs/pages/choose.md tells of.
"""

import itertools

import numpy as np
import pytest

from tests.evaluation import worlds
from vbon_jax.bon import pool
from vbon_jax.evaluation import bands, choose

M = 24


def twin(values, rng, level, draws):
    """Critical values of means and of pairs, prompt by prompt and pair by pair."""
    prompts, points = values.shape
    pairs = list(itertools.combinations(range(points), 2))
    counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), draws)

    def spread(column):
        return np.std(column, ddof=1)

    found = []
    for columns in (
        [values[:, k] for k in range(points)],
        [values[:, a] - values[:, b] for a, b in pairs],
    ):
        floor = bands.FLOOR * max(map(spread, columns))
        largest = []
        for count in counts:
            ts = []
            for column in columns:
                resample = np.repeat(column, count)
                error = abs(resample.mean() - column.mean())
                ts.append(np.sqrt(prompts) * error / max(spread(resample), floor))
            largest.append(max(ts))
        at = 1 - bands.SPENT * (1 - level)
        q = np.sort(largest)[int(np.ceil(at * (draws - 1)))]
        found.append([q * max(spread(column), floor) / np.sqrt(prompts) for column in columns])
    return found, pairs


def test_a_slow_twin(rng):
    values = rng.exponential(size=(12, 4)).cumsum(axis=1)
    got = bands.simultaneous(values, np.random.default_rng(3), 0.9, 40)
    (half, pair_half), pairs = twin(values, np.random.default_rng(3), 0.9, 40)
    np.testing.assert_allclose(got.mean_K, values.mean(axis=0))
    np.testing.assert_allclose(got.half_K, half)
    for (a, b), want in zip(pairs, pair_half):
        for j, k, sign in ((a, b, 1), (b, a, -1)):
            np.testing.assert_allclose(got.difference_half_KxK[j, k], want)
            mean = sign * (values[:, a] - values[:, b]).mean()
            np.testing.assert_allclose(got.difference_KxK[j, k], mean)


def test_one_normal_mean_has_students_interval(rng):
    """Of a symmetric sample the bootstrap-t is Student's t: 2.125 of 39 degrees at 96%."""
    values = rng.normal(size=(40, 1))
    got = bands.simultaneous(values, rng, draws=20_000)
    interval = 2.125 * values.std(ddof=1) / np.sqrt(40)
    np.testing.assert_allclose(got.half_K, interval, rtol=0.08)
    np.testing.assert_array_equal(got.difference_half_KxK, 0.0)


def test_bands_widen_with_the_number_of_points_that_vary_apart(rng):
    values = rng.normal(size=(200, 30))
    one, apart = (bands.simultaneous(values[:, :k], np.random.default_rng(0)) for k in (1, 30))
    again = np.repeat(values[:, :1], 30, axis=1)
    together = bands.simultaneous(again, np.random.default_rng(0))
    np.testing.assert_allclose(together.half_K, one.half_K[0])  # one error, seen 30 times
    assert apart.half_K[0] / one.half_K[0] > 1.4  # 3.2 for 2.05 standard errors
    np.testing.assert_array_equal(together.difference_KxK, 0.0)
    np.testing.assert_array_equal(together.difference_half_KxK, 0.0)


def test_the_same_difference_in_every_prompt_is_certain_but_for_the_floor(rng):
    values = rng.normal(size=(50, 1)) + np.array([0.0, 1.0, 3.0])
    got = bands.simultaneous(values, rng)
    np.testing.assert_allclose(got.difference_KxK[2], [3, 2, 0], atol=1e-12)
    np.testing.assert_allclose(got.difference_half_KxK, 0.0, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "level", "said"),
    [
        (np.zeros(4), 0.95, r"at least 2 prompts, got shape \(4,\)"),
        (np.zeros((1, 3)), 0.95, r"at least 2 prompts, got shape \(1, 3\)"),
        ([[0, np.nan], [np.inf, 1]], 0.95, "2 of the values are not finite"),
        (np.zeros((4, 2)), 1.0, "level must lie between 0 and 1, got level=1.0"),
    ],
)
def test_what_has_no_band_is_refused(rng, values, level, said):
    with pytest.raises(ValueError, match=said):
        bands.simultaneous(values, rng, level)


def study(kind, prompts, times, draws, seed=0):
    """Of ``times`` pools of fresh prompts, the shares in which everything said was true.

    The shares in which the band held the whole curve, the differences' bands all pairs, nothing was
    falsely called over-optimised, the evaluator's true mean at the recommended n was as near that
    at the best n as was said, and something was called over-optimised.
    """
    world = worlds.population(kind)
    truth_K = worlds.true_curve(world, M)
    weights_MxK = pool.all_order_weights(M).T
    tallies = []
    for i in range(times):
        rewards, values = worlds.drawn(world, prompts, M, np.random.default_rng([seed, i]))
        curve_PxK = pool.place_means(values, rewards) @ weights_MxK
        got = bands.simultaneous(curve_PxK, np.random.default_rng(i), draws=draws)
        errors_KxK = got.difference_KxK - (truth_K[:, None] - truth_K)
        peak, best, worse, last = choose.decide(got, M)
        most = got.difference_KxK + got.difference_half_KxK
        lost = truth_K[peak - 1] - truth_K[best - 1]
        tallies.append((
            (np.abs(got.mean_K - truth_K) <= got.half_K).all(),
            (np.abs(errors_KxK) <= got.difference_half_KxK + 1e-12).all(),
            worse is None or (truth_K[peak - 1] > truth_K[worse - 1 : last] + 1e-9).all(),
            lost <= most[peak - 1, best - 1],
            worse is not None,
        ))  # fmt: skip
    return np.mean(tallies, axis=0)


def test_coverage_where_the_evaluator_turns_against_the_reward():
    """200 times 100 prompts anew: the whole curve is inside the band in 95% of them."""
    truth_K = worlds.true_curve(worlds.population("hacked"), M)
    assert 1 < truth_K.argmax() + 1 < M / 2  # it rises, then falls
    curve, pairs, claims, lost, found = study("hacked", 100, 200, 500)
    assert curve >= 0.95 and pairs >= 0.93  # two standard errors of 200 draws are 0.03
    assert claims >= 0.95 and lost >= 0.95 and found >= 0.9


def test_no_n_is_called_over_optimised_where_every_n_is_as_good():
    truth_K = worlds.true_curve(worlds.population("flat"), M)
    np.testing.assert_allclose(truth_K, truth_K[0])
    curve, pairs, claims, _, found = study("flat", 100, 200, 500)
    assert curve >= 0.95 and pairs >= 0.93 and claims >= 0.95 and found <= 0.05


if __name__ == "__main__":
    for kind, prompts in itertools.product(("hacked", "flat"), (50, 100, 400)):
        found = [study(kind, prompts, 500, 1000, seed) for seed in (1, 2)]
        print(kind, prompts, np.mean(found, axis=0).round(3), flush=True)
