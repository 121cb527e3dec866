"""Soft best-of-n against all subsets listed one by one, its limits, and enumeration."""

import itertools

import numpy as np
import pytest

from vbon_jax.bon import pool, soft, theory


def brute_force(rewards, n, temperature):
    """The probability of each column over all subsets of n."""
    found = np.zeros(len(rewards))
    subsets = list(itertools.combinations(range(len(rewards)), n))
    for subset in subsets:
        chances = np.exp((rewards[list(subset)] - rewards.max()) / temperature)
        found[list(subset)] += chances / chances.sum() / len(subsets)
    return found


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("n", range(1, 8))
def test_weights_are_the_mean_over_all_subsets(rng, n, temperature):
    rewards = rng.normal(size=(3, 7)) * [[1], [3], [0.2]]
    rewards[1, 2] = rewards[1, 5]
    got = soft.weights(rewards, n, temperature)
    want = [brute_force(row, n, temperature) for row in rewards]
    np.testing.assert_allclose(got, want, atol=1e-9)
    assert got[1, 2] == pytest.approx(got[1, 5], abs=1e-12)


def test_two_samples_by_hand():
    # exp(log 3) : exp(0), so 3 / 4 of the pair; one of the two alone is either.
    np.testing.assert_allclose(soft.weights([[np.log(3), 0]], 2, 1.0), [[0.75, 0.25]])
    np.testing.assert_allclose(soft.weights([[2 * np.log(3), 0]], 2, 2.0), [[0.75, 0.25]])
    np.testing.assert_allclose(soft.weights([[np.log(3), 0]], 1, 1.0), [[0.5, 0.5]])


@pytest.mark.parametrize("n", [2, 5, 30])
def test_limits_of_the_temperature(rng, n):
    rewards = rng.permutation(30)[None].astype(float)  # no two are near
    cold = soft.weights(rewards, n, 0.01)
    np.testing.assert_allclose(cold, pool.winner_weights(rewards, n), atol=1e-9)
    np.testing.assert_allclose(soft.weights(rewards, n, 1e6), 1 / 30, rtol=1e-4)
    assert soft.kl(rewards, n, 1e6)[0] < 1e-8


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_prompts_are_taken_in_blocks_that_change_nothing(rng, monkeypatch, rows):
    rewards = rng.normal(size=(5, 6))
    want = soft.weights(rewards, 3, 0.5)
    nodes = len(soft._grid(soft._logits(rewards, 0.5), 3))
    monkeypatch.setattr(soft, "BLOCK", rows * 7 * 3 * nodes)
    np.testing.assert_allclose(soft.weights(rewards, 3, 0.5), want, rtol=1e-12)


def test_the_weights_are_unbiased(rng):
    """Over pools of 6 of 3 responses, the mean is soft best-of-3 of the responses themselves."""
    p, values = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 2.5])
    want = np.zeros(3)
    for draw in itertools.product(range(3), repeat=3):
        chances = np.exp(values[list(draw)] / 0.7)
        np.add.at(want, list(draw), np.prod(p[list(draw)]) * chances / chances.sum())
    drawn = rng.choice(3, (40_000, 6), p=p)
    weights = soft.weights(values[drawn], 3, 0.7)
    got = [(weights * (drawn == i)).sum(axis=1).mean() for i in range(3)]
    np.testing.assert_allclose(got, want, atol=4 * 0.5 / np.sqrt(40_000))


def test_kl_with_the_pool_for_its_reference(rng):
    """Against the n-fold product of the pool, listed."""
    rewards = np.array([0.3, 1.0, 1.0, -2.0])
    p = np.zeros(4)
    for draw in itertools.product(range(4), repeat=3):
        chances = np.exp(rewards[list(draw)] / 0.6)
        np.add.at(p, list(draw), chances / chances.sum() / 4**3)
    got = soft.kl(rewards[None], 3, 0.6)
    np.testing.assert_allclose(got, [(p * np.log(4 * p)).sum()], atol=1e-9)


def test_kl_where_it_is_cold_is_that_of_best_of_n(rng):
    """And too low by as much as the docstring says."""
    rewards = rng.permutation(50)[None].astype(float)
    for n, low in ((5, 0.00044), (50, 0.042)):
        short = float(theory.kl_upper_bound(n)) - soft.kl(rewards, n, 0.01)[0]
        assert short == pytest.approx(low, rel=0.1)
    falls = [soft.kl(rewards, 8, t)[0] for t in (0.01, 1.0, 10.0, 100.0)]
    assert (np.diff(falls) < 0).all() and falls[-1] > 0


def test_far_apart_rewards_neither_overflow_nor_warn(rng):
    with np.errstate(all="raise", under="ignore"):
        got = soft.weights([[0.0, 700.0, 1.0, 699.0]], 2, 1.0)
        soft.kl([[0.0, 700.0, 1.0, 699.0]], 2, 1.0)
    np.testing.assert_allclose(got[0], brute_force(np.array([0.0, 700, 1, 699]), 2, 1.0), atol=1e-9)


@pytest.mark.parametrize(
    ("rewards", "n", "temperature", "said"),
    [
        ([[1.0, 2.0]], 3, 1.0, r"from 1 to m=2, .*got n=3"),
        ([[1.0, 2.0]], 1.5, 1.0, r"from 1 to m=2, .*got n=1.5"),
        ([[1.0, 2.0]], 2, 0.0, r"temperature must be finite and > 0, .* got 0.0"),
        ([[1.0, 2.0]], 2, np.nan, r"temperature must be finite and > 0, .* got nan"),
        ([[1.0, np.nan]], 2, 1.0, r"1 NaN among 2 rewards"),
        ([[1.0, np.inf]], 2, 1.0, r"infinite rewards"),
        ([1.0, 2.0], 2, 1.0, r"a matrix .* got shape \(2,\)"),
    ],
)
def test_what_is_wrong_is_named(rewards, n, temperature, said):
    with pytest.raises(ValueError, match=said):
        soft.weights(rewards, n, temperature)
    if n != 1.5:
        n = 0.5 if n == 3 else n
        with pytest.raises(ValueError, match=said if n != 0.5 else r">= 1 .* got n=0.5"):
            soft.kl(rewards, n, temperature)
