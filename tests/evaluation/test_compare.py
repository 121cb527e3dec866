import numpy as np
import pytest

from vbon_jax.evaluation import compare


def test_win_rates_count_ties_half():
    references = np.array([[1.0, 2.0, 2.0, 5.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    rewards = np.array([[2.0, 6.0, 0.0], [0.0, 1.0, -1.0]], np.float32)
    expected = [[(1 + 0.5 * 2) / 4, 1.0, 0.0], [0.5, 1.0, 0.0]]
    np.testing.assert_array_equal(compare.win_rates(rewards, references), expected)


def test_win_rate_of_the_reference_over_itself_is_a_half(rng):
    rewards = rng.normal(size=(50, 200)).astype(np.float32)
    references = np.sort(rng.normal(size=(50, 200)).astype(np.float32), axis=1)
    assert compare.win_rates(rewards, references).mean() == pytest.approx(0.5, abs=0.01)


def test_interval_is_over_prompts():
    # Two prompts, many samples each: the interval knows only two independent things.
    values = np.array([[1.0] * 100, [3.0] * 100])
    found = compare.over_prompts(values)
    half = 1.96 * np.sqrt(2) / np.sqrt(2)
    np.testing.assert_allclose(found, (2.0, 2.0 - half, 2.0 + half))
    assert found.ci95 == [found.low, found.high]


def test_interval_covers(rng):
    hits = 0
    for _ in range(400):
        prompt_means = rng.normal(size=(60, 1))
        found = compare.over_prompts(prompt_means + rng.normal(size=(60, 4)))
        hits += found.low <= 0 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_one_prompt_has_no_interval():
    with pytest.raises(ValueError, match="at least 2"):
        compare.over_prompts(np.ones((1, 5)))


def test_best_of_takes_the_winner_of_each_group():
    rewards = np.array([[1, 5, 2, 9, 0, 9], [3, 3, 3, 1, 2, 0]])
    np.testing.assert_array_equal(compare.best_of(rewards, 3), [[1, 3], [0, 4]])
    np.testing.assert_array_equal(compare.best_of(rewards, 1), [np.arange(6)] * 2)
    with pytest.raises(ValueError, match="groups of n=4"):
        compare.best_of(rewards, 4)


def test_best_of_wins_n_of_n_plus_one(rng):
    n, prompts = 4, 40
    rewards = rng.normal(size=(prompts, 400 * n)).astype(np.float32)
    winners = np.take_along_axis(rewards, compare.best_of(rewards, n), axis=1)
    references = np.sort(rng.normal(size=(prompts, 1000)).astype(np.float32), axis=1)
    assert compare.win_rates(winners, references).mean() == pytest.approx(n / (n + 1), abs=0.01)
